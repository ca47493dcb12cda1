"""Quantizers of vector-quantize-pytorch behind one interface, every option that matters stated: their defaults change.

The gradient is the plain straight-through one, as V2Flow's own codebook has, not the library's rotation trick.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, LFQ, ResidualVQ, SimVQ, VectorQuantize

from v2flow.errors import V2FlowError

Kind = Literal["vq", "simvq", "rvq", "fsq", "lfq", "bsq"]


@dataclass
class QuantizerConfig:
    """Options of a quantizer; see `VQAutoencoderConfig`."""

    kind: Kind
    size: int
    dim: int
    decay: float
    commitment: float
    entropy: float
    dead_code_threshold: float

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise V2FlowError(
                f"option quantizer: expected one of {', '.join(get_args(Kind))}, found {self.kind!r}"
            )
        bits = math.log2(self.size)
        if self.kind in ("fsq", "lfq", "bsq") and (not bits.is_integer() or bits < 2):
            raise V2FlowError(
                f"option codebook_size: expected a power of two from 4 on for quantizer={self.kind}, "
                f"found {self.size}; {2 ** max(round(bits), 2)} is the nearest"
            )
        if self.kind == "rvq" and math.isqrt(self.size) ** 2 != self.size:
            raise V2FlowError(
                f"option codebook_size: expected a square for quantizer=rvq, two codebooks of sqrt(K) codes, "
                f"found {self.size}; {round(math.sqrt(self.size)) ** 2} is the nearest"
            )


def fsq_levels(size: int) -> list[int]:
    """Levels of finite scalar quantization whose product is `size`, a power of two: four each, the last eight if the
    bits are odd."""
    bits = int(math.log2(size))
    levels = [4] * (bits // 2)
    if bits % 2:
        levels[-1] = 8
    return levels


class Quantizer(nn.Module):
    """Features `[B, N, D]` to codes of the same shape, ids `[B, N]` in [0, K) and an auxiliary loss.

    Attributes:
        inner: the library's module.
    """

    def __init__(self, config: QuantizerConfig) -> None:
        super().__init__()
        self.config = config
        self.inner: Any = _BUILDERS[config.kind](config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes with a straight-through gradient, ids, and the weighted auxiliary loss, a scalar."""
        if self.config.kind == "fsq":
            codes, ids = self.inner(x)
            return codes, ids.long(), x.new_zeros(())
        codes, ids, loss = self.inner(x)
        if self.config.kind == "rvq":
            ids = ids[..., 0] * math.isqrt(self.config.size) + ids[..., 1]
        return codes, ids, loss.sum()

    def lookup(self, ids: Tensor) -> Tensor:
        """Codes `[B, N, D]` of ids `[B, N]`."""
        if self.config.kind == "rvq":
            side = math.isqrt(self.config.size)
            return self.inner.get_output_from_indices(torch.stack([ids // side, ids % side], dim=-1))
        if self.config.kind == "vq":
            return self.inner.get_output_from_indices(ids)
        return self.inner.indices_to_codes(ids)


def _synchronised() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _vq(config: QuantizerConfig) -> nn.Module:
    return VectorQuantize(
        dim=config.dim,
        codebook_size=config.size,
        use_cosine_sim=True,
        ema_update=True,
        learnable_codebook=False,
        decay=config.decay,
        commitment_weight=config.commitment,
        threshold_ema_dead_code=config.dead_code_threshold,
        kmeans_init=False,
        rotation_trick=False,
        stochastic_sample_codes=False,
        sync_codebook=_synchronised(),
    )


def _rvq(config: QuantizerConfig) -> nn.Module:
    return ResidualVQ(
        dim=config.dim,
        num_quantizers=2,
        codebook_size=math.isqrt(config.size),
        shared_codebook=False,
        quantize_dropout=False,
        decay=config.decay,
        commitment_weight=config.commitment,
        threshold_ema_dead_code=config.dead_code_threshold,
        kmeans_init=False,
        rotation_trick=False,
        stochastic_sample_codes=False,
        sync_codebook=_synchronised(),
    )


def _simvq(config: QuantizerConfig) -> nn.Module:
    return SimVQ(
        dim=config.dim,
        codebook_size=config.size,
        rotation_trick=False,
        input_to_quantize_commit_loss_weight=config.commitment,
        commitment_weight=1.0,  # of the codes' own error, which is how they learn
    )


def _fsq(config: QuantizerConfig) -> nn.Module:
    return FSQ(levels=fsq_levels(config.size), dim=config.dim, preserve_symmetry=False, noise_dropout=0.0)


def _lfq(config: QuantizerConfig) -> nn.Module:
    return LFQ(
        dim=config.dim,
        codebook_size=config.size,
        entropy_loss_weight=config.entropy,
        commitment_loss_weight=config.commitment,
        diversity_gamma=1.0,
        num_codebooks=1,
        spherical=config.kind == "bsq",
    )


_BUILDERS: dict[str, Callable[[QuantizerConfig], nn.Module]] = {
    "vq": _vq, "rvq": _rvq, "simvq": _simvq, "fsq": _fsq, "lfq": _lfq, "bsq": _lfq
}  # fmt: skip
