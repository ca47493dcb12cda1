"""The visual vocabulary resampler: latents to soft categorical distributions over the LLM vocabulary.

Paper section 3.2 (visual vocabulary resampler); the reference reads the logits out with one linear layer and
draws Gumbel noise at inference as well. Here noise is for training only, so the same picture gives the same ids.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from v2flow.arrays import EmbeddingTable, Latents, TokenFlags, TokenStates
from v2flow.config import ResamplerConfig
from v2flow.vocabulary_attention import SoftDistribution, vocabulary_attention
from v2flow.vocabulary_logits import GumbelNoise, Logits, block_shape
from v2flow.vocabulary_tiles import fit_tiles


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of `[B, C, H, W]`."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises [B, C, h, w] over its channels, each position alone."""
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
        """A residual block on [B, C, h, w]."""
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

    def forward(self, latents: Latents) -> TokenStates:
        """Latents [B, C, h, w] to features [B, N, width], N the cells of the token grid, row by row."""
        x = self.before(self.stem(latents.contiguous(memory_format=torch.channels_last)))
        if tuple(x.shape[-2:]) != self.token_grid:
            x = F.adaptive_avg_pool2d(x, self.token_grid)
        return self.norm(self.after(x)).flatten(2).transpose(1, 2)


class VisualVocabularyResampler(nn.Module):
    """Latents to soft distributions over the frozen table and their expected embeddings.

    Args:
        channels: channels of the latents.
        config: widths, read-out and schedules.
        table: the (centred) embedding table `[V, D]`; kept as a buffer that no checkpoint stores.

    Attributes:
        dim: width of the embeddings that come out.

    Raises:
        V2FlowError: a memory budget that some batch of pictures would not fit into.
    """

    table: EmbeddingTable

    def __init__(self, channels: int, config: ResamplerConfig, table: EmbeddingTable) -> None:
        super().__init__()
        self.config = config
        self.encoder = PatchEncoder(channels, config)
        self.register_buffer("table", table, persistent=False)
        if config.readout != "none":
            # Refused before any work: pictures are encoded in double precision (V2FlowTokenizer.encode).
            double = table.new_zeros((), dtype=torch.float64).expand_as(table)
            budget, tokens = int(config.memory_budget_mb * 2**20), block_shape(table.device)[0]
            fit_tiles(tokens, double, double.dtype, budget, any(config.noise))
        self.dim = table.shape[1] if config.readout != "none" else config.key_dim
        if config.readout == "none":
            self.query = nn.Linear(config.width, config.key_dim)
        elif config.readout == "keys":
            self.query = nn.Linear(config.width, min(config.key_dim, table.shape[1]))
            self.key = nn.Parameter(_whitening(table, self.query.out_features))
        else:
            self.logits = nn.Linear(config.width, table.shape[0])

    def forward(
        self,
        latents: Latents,
        progress: float = 1.0,
        generator: torch.Generator | None = None,
        described: int | None = None,
        top: int = 1,
        chosen: TokenFlags | None = None,
    ) -> SoftDistribution:
        """Latents `[B, C, h, w]` to distributions; Gumbel noise only in training mode.

        With readout=none the embeddings are the queries, and there are no words and no entropy.

        Args:
            progress: share of the training done, in [0, 1]; sets noise amplitude and temperature.
            generator: source of the noise.
            described: pictures whose entropy and most probable words are wanted, the first so many; None = all.
            top: words of each token.
            chosen: only these tokens of `[B, N]`, as those of one picture; None = all.
        """
        features = self.encoder(latents)
        if chosen is not None:
            features = features[chosen][None]
        if self.config.readout == "none":
            queries = self.query(features)
            nothing = queries.detach()[:described, :, :0]
            return SoftDistribution(queries, nothing.sum(-1), nothing.long(), nothing)
        # Softmax over thousands of entries and the expected embedding stay in fp32 under autocast.
        with torch.autocast(features.device.type, enabled=False):
            logits = self._logits(features.to(torch.promote_types(features.dtype, torch.float32)))
            amplitude, temperature = self._schedule(progress)
            noise = None
            if self.training and amplitude > 0:
                noise = GumbelNoise.draw(amplitude, generator)
            return vocabulary_attention(
                replace(logits, noise=noise, temperature=temperature),
                self.table,
                self.config.hard,
                described,
                top,
                self.config.memory_budget_mb,
            )

    def _logits(self, features: Tensor) -> Logits:
        """Without noise and temperature."""
        if self.config.readout == "linear":
            return Logits(features, self.logits.weight, self.logits.bias)
        queries = self.config.scale * F.normalize(self.query(features), dim=-1)
        return Logits(queries, F.normalize(self.table @ self.key, dim=-1))

    def _schedule(self, progress: float) -> tuple[float, float]:
        """Noise amplitude and softmax temperature at this share of the training."""
        done = min(max(progress, 0.0) / self.config.schedule_end, 1.0)
        (n0, n1), (t0, t1) = self.config.noise, self.config.temperature
        return n0 + (n1 - n0) * done, t0 + (t1 - t0) * done


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
