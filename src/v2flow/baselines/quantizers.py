"""Quantizers of vector-quantize-pytorch behind one interface, every option that matters stated: their defaults change.

The gradient is the plain straight-through one, as V2Flow's own codebook has, not the library's rotation trick.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ, LFQ, ResidualVQ, SimVQ, VectorQuantize

from v2flow.errors import V2FlowError
from v2flow.ranks import world

Kind = Literal["vq", "simvq", "rvq", "fsq", "lfq", "bsq"]


@dataclass
class QuantizerConfig:
    """Options of a quantizer."""

    quantizer: Kind = "vq"
    """vq: cosine codebook of running means; simvq: a frozen codebook behind a learned linear map; rvq: two residual
    codebooks of sqrt(K) codes; fsq: finite scalar levels; lfq: signs; bsq: signs on the sphere. All of log2(K) bits."""
    codebook_size: int = 1024
    """Number of codes K."""
    code_dim: int = 32
    """Width of a code; fsq, lfq and bsq map from it to their few dimensions and back."""
    decay: float = 0.95
    """Decay of the codebook's running means; only for quantizer=vq and rvq."""
    commitment: float = 0.25
    """Weight of the commitment loss, a mean over a code's dimensions; not for quantizer=fsq, which has none."""
    entropy: float = 0.1
    """Weight of the entropy loss; only for quantizer=lfq and bsq."""
    dead_code_threshold: float = 1.0
    """Codes whose running count falls below this are replaced by tokens of the batch; only for vq and rvq."""

    def __post_init__(self) -> None:
        size, kind = self.codebook_size, self.quantizer
        if kind not in get_args(Kind):
            raise V2FlowError(
                f"option quantizer: expected one of {', '.join(get_args(Kind))}, found {kind!r}"
            )
        for name, most in (("codebook_size", 1 << 24), ("code_dim", 1 << 16)):
            if not 1 <= getattr(self, name) <= most:
                raise V2FlowError(f"option {name}: expected 1 to {most}, found {getattr(self, name)}")
        bits = math.log2(size)
        if kind in ("fsq", "lfq", "bsq") and (not bits.is_integer() or bits < 2):
            raise V2FlowError(
                f"option codebook_size: expected a power of two from 4 on for quantizer={kind}, "
                f"found {size}; {2 ** max(round(bits), 2)} is the nearest"
            )
        if kind == "rvq" and math.isqrt(size) ** 2 != size:
            raise V2FlowError(
                f"option codebook_size: expected a square for quantizer=rvq, two codebooks of sqrt(K) codes, "
                f"found {size}; {round(math.sqrt(size)) ** 2} is the nearest"
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
        self.inner: Any = _BUILDERS[config.quantizer](config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes with a straight-through gradient, ids, and the weighted auxiliary loss, a scalar."""
        if self.config.quantizer == "fsq":
            codes, ids = self.inner(x)
            return codes, ids.long(), x.new_zeros(())
        codes, ids, loss = self.inner(x)
        if self.config.quantizer == "rvq":
            ids = ids[..., 0] * math.isqrt(self.config.codebook_size) + ids[..., 1]
        return codes, ids, loss.sum()

    def lookup(self, ids: Tensor) -> Tensor:
        """Codes `[B, N, D]` of ids `[B, N]`."""
        if self.config.quantizer == "rvq":
            side = math.isqrt(self.config.codebook_size)
            return self.inner.get_output_from_indices(torch.stack([ids // side, ids % side], dim=-1))
        if self.config.quantizer == "vq":
            return self.inner.get_output_from_indices(ids)
        return self.inner.indices_to_codes(ids)


def _running_means(config: QuantizerConfig) -> dict[str, Any]:
    """Options of codebooks that are running means of their tokens."""
    return {
        "dim": config.code_dim,
        "decay": config.decay,
        "commitment_weight": config.commitment,
        "threshold_ema_dead_code": config.dead_code_threshold,
        "kmeans_init": False,
        "rotation_trick": False,
        "stochastic_sample_codes": False,
        "sync_codebook": world()[1] > 1,
    }


def _vq(config: QuantizerConfig) -> nn.Module:
    return VectorQuantize(
        codebook_size=config.codebook_size,
        use_cosine_sim=True,
        ema_update=True,
        learnable_codebook=False,
        **_running_means(config),
    )


def _rvq(config: QuantizerConfig) -> nn.Module:
    return ResidualVQ(
        num_quantizers=2,
        codebook_size=math.isqrt(config.codebook_size),
        shared_codebook=False,
        quantize_dropout=False,
        **_running_means(config),
    )


def _simvq(config: QuantizerConfig) -> nn.Module:
    return SimVQ(
        dim=config.code_dim,
        codebook_size=config.codebook_size,
        rotation_trick=False,
        input_to_quantize_commit_loss_weight=config.commitment,
        commitment_weight=1.0,  # of the codes' own error, which is how they learn
    )


def _fsq(config: QuantizerConfig) -> nn.Module:
    with torch.device("cpu"):  # it looks at its own numbers, which there are none of on the meta device
        return FSQ(
            levels=fsq_levels(config.codebook_size),
            dim=config.code_dim,
            preserve_symmetry=False,
            noise_dropout=0.0,
        )


def _lfq(config: QuantizerConfig) -> nn.Module:
    return LFQ(
        dim=config.code_dim,
        codebook_size=config.codebook_size,
        entropy_loss_weight=config.entropy,
        commitment_loss_weight=config.commitment,
        diversity_gamma=1.0,
        num_codebooks=1,
        spherical=config.quantizer == "bsq",
    )


_BUILDERS: dict[str, Callable[[QuantizerConfig], nn.Module]] = {
    "vq": _vq, "rvq": _rvq, "simvq": _simvq, "fsq": _fsq, "lfq": _lfq, "bsq": _lfq
}  # fmt: skip
