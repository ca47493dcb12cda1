"""Which classes of operations a training step spends its time on, and how often it waits for the device."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

OUTSIDE, OPTIMISER, OTHER = "outside of operators", "optimiser", "other"
CLASSES: dict[str, tuple[str, ...]] = {
    "attention": ("scaled_dot_product", "flash_attention", "efficient_attention"),
    "convolutions": ("convolution", "conv2d", "conv_depthwise"),
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mkldnn_linear", "addmv", "dot"),
    "normalisation": ("layer_norm", "batch_norm", "group_norm"),
    "random numbers": ("normal_", "uniform_", "exponential_", "random_", "randn", "rand", "randint"),
    "data movement": (
        "copy_", "_to_copy", "to", "cat", "stack", "clone", "contiguous", "index", "index_", "index_select", "gather",
        "scatter", "scatter_add_", "index_add_", "embedding", "fill_", "zero_", "zeros", "pixel_shuffle",
        "pixel_unshuffle", "pad", "repeat", "empty", "empty_like", "empty_strided", "resize_", "select_backward",
        "slice_backward", "as_strided", "expand", "view", "reshape", "permute", "transpose", "slice", "new_zeros",
    ),
    "pointwise and reductions": (
        "add", "sub", "rsub", "mul", "div", "pow", "sqrt", "rsqrt", "exp", "log", "sin", "cos", "neg", "reciprocal",
        "gelu", "silu", "sigmoid", "tanh", "square", "where", "lerp", "clamp", "clamp_min", "clamp_max", "softmax",
        "sum", "mean", "max", "min", "argmax", "argmin", "sort", "argsort", "topk", "norm", "var", "linalg_vector_norm",
        "eq", "ne", "lt", "le", "gt", "ge", "bitwise_and", "bitwise_not", "isfinite", "threshold", "fill", "cumsum",
        "masked_fill", "any", "all", "adaptive_avg_pool2d", "avg_pool2d", "upsample", "addcmul", "addcdiv",
    ),
}  # fmt: skip
"""Class -> names of torch's operators, without `aten::`, underscores at the ends and `_backward…`; those of attention,
convolutions and normalisation may be anywhere in a name. The first class that fits counts."""
_ANYWHERE = ("attention", "convolutions", "normalisation")


def class_of(name: str) -> str:
    """The class of an operator of the profiler, such as `aten::addmm`."""
    if not name.startswith("aten::"):
        return OTHER
    name = name.removeprefix("aten::").removeprefix("_foreach_")
    plain = name.replace("_backward_data", "").replace("_backward", "").removeprefix("native_").strip("_")
    for kind, words in CLASSES.items():
        if kind in _ANYWHERE and any(word in name for word in words):
            return kind
        if any(word.strip("_") == plain for word in words):
            return kind
    return OTHER


def operator_shares(action: Callable[[], Any]) -> dict[str, float]:
    """Class -> share of the time of `action` on a CPU, 1 in all; see `CLASSES`.

    Time counts for the innermost operator. What runs in an optimiser's step is `optimiser` whatever it is; Python
    between operators is `outside of operators`.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("whole"):
        action()
    shares = dict.fromkeys((*CLASSES, OPTIMISER, OTHER, OUTSIDE), 0.0)
    for event in profiler.events():
        shares[_class_in(event)] += event.self_cpu_time_total
    total = sum(shares.values())
    return {kind: time / total for kind, time in shares.items()}


def _class_in(event: Any) -> str:
    if event.name == "whole":
        return OUTSIDE
    parent = event
    while parent is not None:
        if parent.name.startswith("Optimizer."):
            return OPTIMISER
        parent = parent.cpu_parent
    return class_of(event.name)


class DeviceReads(TorchDispatchMode):
    """Counts how often a number of a tensor is asked for, which on a GPU waits for all work before it.

    An upper limit in so far as tensors that lie on the host even then are counted; `tolist` is not seen.

    Attributes:
        where: function of v2flow that asked, or was being called from -> how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.where: dict[str, int] = {}

    @property
    def count(self) -> int:
        """In all."""
        return sum(self.where.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            frames = [f for f in traceback.extract_stack() if f"{os.sep}v2flow{os.sep}" in f.filename]
            place = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "elsewhere"
            self.where[place] = self.where.get(place, 0) + 1
        return func(*args, **(kwargs or {}))
