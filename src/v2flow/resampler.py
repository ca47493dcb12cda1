"""The visual vocabulary resampler: latents to soft categorical distributions over the LLM vocabulary.

Paper section 3.2 (visual vocabulary resampler); the reference reads the logits out with one linear layer and
draws Gumbel noise at inference as well. Here noise is for training only, so the same picture gives the same ids.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from v2flow.config import ResamplerConfig


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of `[B, C, H, W]`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvBlock(nn.Module):
    """RegNet-style residual bottleneck: 1×1, depthwise 3×3, 1×1 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(width)
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.spatial = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.norm2 = LayerNorm2d(2 * width)
        self.reduce = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.spatial(F.silu(self.expand(self.norm1(x))))
        return x + self.reduce(F.silu(self.norm2(y)))


class PatchEncoder(nn.Module):
    """Two convolutional stages around an average pool: latents `[B, C, h, w]` to features `[B, N, D]`."""

    def __init__(self, channels: int, config: ResamplerConfig) -> None:
        super().__init__()
        self.token_grid = (config.token_grid[0], config.token_grid[1])
        self.stem = nn.Conv2d(channels, config.width, 1)
        self.before = nn.Sequential(*(ConvBlock(config.width) for _ in range(config.depth)))
        self.after = nn.Sequential(*(ConvBlock(config.width) for _ in range(config.depth)))
        self.norm = LayerNorm2d(config.width)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.before(self.stem(latents.contiguous(memory_format=torch.channels_last)))
        if tuple(x.shape[-2:]) != self.token_grid:
            x = F.adaptive_avg_pool2d(x, self.token_grid)
        return self.norm(self.after(x)).flatten(2).transpose(1, 2)


@dataclass
class SoftDistribution:
    """What the resampler says of each visual token.

    Attributes:
        probabilities: `[B, N, V]`, rows sum to 1; `[B, N, 0]` with readout=none.
        embeddings: expected embeddings of the (centred) table, `[B, N, D]`; the queries with readout=none.
    """

    probabilities: Tensor
    embeddings: Tensor

    def entropy(self) -> Tensor:
        """Entropy of each token's distribution in nats, `[B, N]`."""
        return -(self.probabilities * self.probabilities.clamp_min(1e-12).log()).sum(-1)


class VisualVocabularyResampler(nn.Module):
    """Latents to soft distributions over the frozen table and their expected embeddings.

    Args:
        channels: channels of the latents.
        config: widths, read-out and schedules.
        table: the (centred) embedding table `[V, D]`; kept as a buffer that no checkpoint stores.

    Attributes:
        dim: width of the embeddings that come out.
    """

    table: Tensor

    def __init__(self, channels: int, config: ResamplerConfig, table: Tensor) -> None:
        super().__init__()
        self.config = config
        self.encoder = PatchEncoder(channels, config)
        self.register_buffer("table", table, persistent=False)
        self.dim = table.shape[1] if config.readout != "none" else config.key_dim
        if config.readout == "none":
            self.query = nn.Linear(config.width, config.key_dim)
        elif config.readout == "keys":
            self.query = nn.Linear(config.width, min(config.key_dim, table.shape[1]))
            self.key = nn.Parameter(_whitening(table, self.query.out_features))
        else:
            self.logits = nn.Linear(config.width, table.shape[0])

    def _logits(self, features: Tensor) -> Tensor:
        if self.config.readout == "linear":
            return self.logits(features)
        keys = F.normalize(self.table @ self.key, dim=-1)
        return self.config.scale * F.normalize(self.query(features), dim=-1) @ keys.T

    def forward(
        self, latents: Tensor, progress: float = 1.0, generator: torch.Generator | None = None
    ) -> SoftDistribution:
        """Latents `[B, C, h, w]` to distributions; Gumbel noise only in training mode.

        Args:
            progress: share of the training done, in [0, 1]; sets noise amplitude and temperature.
        """
        features = self.encoder(latents)
        if self.config.readout == "none":
            queries = self.query(features)
            return SoftDistribution(queries[..., :0], queries)
        # Softmax over thousands of entries and the expected embedding stay in fp32 under autocast.
        with torch.autocast(features.device.type, enabled=False):
            logits = self._logits(features.to(torch.promote_types(features.dtype, torch.float32)))
            amplitude, temperature = self._schedule(progress)
            if self.training and amplitude > 0:
                uniform = torch.rand(logits.shape, generator=generator, device=logits.device)
                logits = logits - amplitude * (-uniform.clamp_min(1e-20).log()).clamp_min(1e-20).log()
            if temperature != 1.0:  # a division of every logit by one costs as much as the softmax
                logits = logits / temperature
            probabilities = F.softmax(logits, dim=-1)
            mixture = _straight_through(probabilities) if self.config.hard else probabilities
            return SoftDistribution(probabilities, mixture @ self.table)

    def _schedule(self, progress: float) -> tuple[float, float]:
        """Noise amplitude and softmax temperature at this share of the training."""
        done = min(max(progress, 0.0) / self.config.schedule_end, 1.0)
        (n0, n1), (t0, t1) = self.config.noise, self.config.temperature
        return n0 + (n1 - n0) * done, t0 + (t1 - t0) * done


def _straight_through(probabilities: Tensor) -> Tensor:
    hard = F.one_hot(probabilities.argmax(-1), probabilities.shape[-1]).to(probabilities.dtype)
    return hard + probabilities - probabilities.detach()


def _whitening(table: Tensor, dim: int) -> Tensor:
    """Projection `[D, dim]` onto the table's first principal directions, each scaled to unit variance.

    Whitened keys point in all directions alike, so that a similarity can single out any entry from the start.
    """
    if table.is_meta:
        return torch.empty(table.shape[1], dim, device="meta")
    centred = (table - table.mean(0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(table))
    scale = values.flip(0)[:dim].clamp_min(1e-12).rsqrt()
    return (vectors.flip(1)[:, :dim] * scale).float()
