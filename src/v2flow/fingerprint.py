"""SHA-256 of files, and names of models: what a checkpoint or a data set that leaves weights out belongs to."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

SAMPLED = 1 << 16  # values of a tensor that are looked at
_BLOCK = 1 << 20


def file_sha256(path: Path) -> str:
    """Of all bytes of a file, which is read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor], facts: Iterable[Any] = ()) -> str:
    """A name for tensors: names, shapes, types and values, and further `facts`.

    Of a large tensor `SAMPLED` evenly spaced values count: all of an LLM's would take minutes, and tensors of two
    models do not differ elsewhere only.
    """
    digest = hashlib.sha256(repr(list(facts)).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        if not tensor.is_meta:
            flat = tensor.reshape(-1)
            values = flat[:: max(1, flat.numel() // SAMPLED)].cpu()
            values = values.double() if values.is_floating_point() else values.long()
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """Name of a V2Flow tokenizer: its weights and the frozen vocabulary and codec that they belong to. The same for
    its checkpoint and its exported folder."""
    facts = (tokenizer.vocabulary_sha256, tokenizer.codec.fingerprint())
    return tensors_sha256(tokenizer.state_dict(), facts)


def language_model_sha256(model: Any) -> str:
    """Name of an LLM's weights, its buffers and adapters left out."""
    return tensors_sha256({n: p for n, p in model.named_parameters() if "lora_" not in n})
