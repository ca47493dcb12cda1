"""Models on the meta device, then on fake tensors: shapes and types of everything, memory for nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import v2flow.baselines.autoencoder
import v2flow.tokenizer
from v2flow.codec import FrozenAutoencoder, ImageCodec, build_codec
from v2flow.config import CodecConfig, VocabularyConfig
from v2flow.llm import LLMVocabulary
from v2flow.planning.language_models import vocabulary_shape


@contextmanager
def nothing_loaded() -> Iterator[None]:
    """Inside, tokenizers and baselines are built on the meta device, and what they would load is made there too."""
    stand_ins: list[tuple[Any, str, Any]] = [
        (v2flow.tokenizer, "load_vocabulary", _vocabulary),
        (v2flow.tokenizer, "build_codec", _codec),
        (v2flow.baselines.autoencoder, "build_codec", _codec),
    ]
    loaders = [(module, name, getattr(module, name)) for module, name, _ in stand_ins]
    try:
        for module, name, stand_in in stand_ins:
            setattr(module, name, stand_in)
        with torch.device("meta"):
            yield
    finally:
        for module, name, loader in loaders:
            setattr(module, name, loader)


def _vocabulary(config: VocabularyConfig) -> LLMVocabulary:
    rows, width = vocabulary_shape(config)
    return LLMVocabulary.from_table(torch.empty(rows, width, device="meta"), [""] * rows, "meta")


def _codec(config: CodecConfig, weights: bool = True) -> ImageCodec:
    return build_codec(config, weights=False)


def held_networks(module: nn.Module) -> list[nn.Module]:
    """Frozen autoencoders of codecs, which are no parts of the modules that hold them."""
    return [part.autoencoder for part in module.modules() if isinstance(part, FrozenAutoencoder)]


def make_fake(module: nn.Module, mode: FakeTensorMode) -> list[tuple[Tensor, Tensor]]:
    """Puts fake tensors on the CPU in place of all parameters and buffers; shared ones stay shared.

    Returns:
        The fake ones of buffers that are a single number and have a value, such as flags, with that value.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with what they stand for, or its id would be given away
    for network in (module, *held_networks(module)):
        for part in network.modules():
            for slots in (part._parameters, part._buffers):
                for name, tensor in slots.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:
                        made[id(tensor)] = tensor, _fake(tensor, mode)
                    slots[name] = made[id(tensor)][1]  # type: ignore[assignment]
    return [
        (stand_in, tensor)
        for tensor, stand_in in made.values()
        if tensor.numel() == 1 and not tensor.is_meta and not isinstance(tensor, nn.Parameter)
    ]


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        made = torch.empty(tensor.shape, dtype=tensor.dtype)
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
