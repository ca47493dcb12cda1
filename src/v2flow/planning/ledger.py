"""Keeps books of a step on fake tensors: FLOPs, bytes that operators read and write, bytes that are alive."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from v2flow.planning.known_values import KnownValues, tensors_in

aten = torch.ops.aten


class Ledger(TorchDispatchMode):
    """Watches every operator below autograd, backward passes and recomputation included.

    FLOPs are torch's count of matrix products and convolutions; attention counts as the two products it is, and as
    four in backward. A storage is alive from the operator that makes it until nothing refers to it any more, which
    on fake tensors is as on real ones.

    Args:
        given: values of single fake tensors, see `KnownValues`.

    Attributes:
        flops: so far.
        traffic: bytes of the tensors that operators read and write, views left out.
        operators: how many ran, views left out.
        live: bytes of storages that were made under this mode and are still there.
        peak: the largest `live` so far; set it to `live` to look at a new span.
    """

    def __init__(self, given: Iterable[tuple[Tensor, Tensor]] = ()) -> None:
        super().__init__()
        self.flops = self.traffic = self.operators = self.live = self.peak = 0
        self._storages: set[int] = set()
        self._values = KnownValues(given)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return torch.device("cpu")  # asked at every other step, where all fake tensors are
        if func is aten._local_scalar_dense.default:
            return self._values.scalar(args[0])
        inputs = tensors_in((args, kwargs))
        for x in inputs:
            self._watch(x, made_here=False)
        out = func(*args, **kwargs)
        outputs = tensors_in(out)
        for x in outputs:
            self._watch(x, made_here=True)
        packet = func._overloadpacket
        count = _FORMULAS.get(packet) or flop_registry.get(packet)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        if not func.is_view:
            self.operators += 1
            self.traffic += sum(x.numel() * x.element_size() for x in (*inputs, *outputs))
        self._values.follow(func, args, kwargs, inputs, outputs)
        return out

    def _watch(self, x: Tensor, made_here: bool) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes() if made_here else 0  # weights were there before
        self._storages.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone() -> None:
            self._storages.discard(key)
            self.live -= size

        weakref.finalize(storage, gone).atexit = False


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    return 2 * sdpa_flop_count(query.shape, key.shape, value.shape)


IN_PLACE: dict[Any, Any] = {
    aten.addmm_: flop_registry[aten.addmm],
    aten.baddbmm_: flop_registry[aten.baddbmm],
}
"""Products that add to a tensor in place, which torch has no formula for: attention in tiles is made of them."""
_FORMULAS: dict[Any, Any] = {
    # Nor has it one for the CPU's fused attention.
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    **IN_PLACE,
}
