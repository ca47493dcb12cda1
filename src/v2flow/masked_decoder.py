"""The masked autoregressive transformer: visual tokens and visible latents to one condition a position.

Paper section 3.3 (masked autoregressive decoder), after MAR: an encoder over what is known, a decoder over
every position with mask tokens where the latent is to be predicted.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from v2flow.arrays import (
    Conditions,
    PictureFlags,
    PositionLatents,
    PositionMask,
    TokenEmbeddings,
    TokensAbove,
    TokenStates,
)
from v2flow.config import DecoderConfig
from v2flow.devices import host_generator
from v2flow.transformer import KeysValues, Transformer, grid_positions, init_linear


@dataclass
class Prefix:
    """What the visual tokens of a batch give to every AR iteration.

    Attributes:
        embeddings: projected tokens with their positions, `[B, N, W]`.
        states: their states after the encoder, `[B, N, W]`; None where these depend on what is visible
            (prefix_attention=full).
        encoder: their keys and values in every block of the encoder; empty without `states`.
        decoder: the same in the decoder; empty unless they are part of its sequence as well (prefix=attend).
    """

    embeddings: TokenStates
    states: TokenStates | None
    encoder: list[KeysValues]
    decoder: list[KeysValues]


class MaskedAutoregressiveDecoder(nn.Module):
    """Conditions for the velocity field.

    Args:
        token_dim: width of the quantised visual tokens.
        token_grid: rows and columns of visual tokens.
        channels: channels of a latent position.
        latent_grid: rows and columns of latent positions, L in all.
        null: learn an embedding that takes the tokens' place, for guidance.
    """

    above: Tensor

    def __init__(
        self, token_dim: int, token_grid: tuple[int, int], channels: int, latent_grid: tuple[int, int],
        config: DecoderConfig, null: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        width = config.width
        self.project = nn.Linear(token_dim, width)
        self.embed = nn.Linear(channels, width)
        self.null = nn.Parameter(torch.randn(1, 1, width) * 0.02) if null else None
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        tokens, latents = grid_positions(*token_grid, width), grid_positions(*latent_grid, width)
        self.token_positions = nn.Parameter(tokens)
        self.latent_positions = nn.Parameter(latents)
        self.decoder_positions = nn.Parameter(latents.clone())
        self.encoder = Transformer(width, config.encoder_depth, config.heads, config.checkpointing)
        self.decoder = Transformer(width, config.decoder_depth, config.heads, config.checkpointing)
        if config.prefix == "aligned":
            above = token_above(token_grid, latent_grid)
        else:
            above = torch.empty(0, dtype=torch.long)
            self.decoder_token_positions = nn.Parameter(tokens.clone())
        self.register_buffer("above", above, persistent=False)
        init_linear(self)

    def forward(
        self,
        tokens: TokenEmbeddings,
        latents: PositionLatents,
        mask: PositionMask,
        null: PictureFlags | None = None,
        masked: int | None = None,
    ) -> Conditions:
        """Conditions `[B, L, W]` for every position.

        Args:
            tokens: quantised visual tokens `[B, N, D]`.
            latents: `[B, L, C]`; masked positions are not read.
            mask: `[B, L]` bool, true = to be predicted; the same number of true entries in every row.
            null: `[B]` bool, true where the tokens are replaced by the null embedding.
            masked: true entries of a row of the mask, where they are known; to count them is to wait for the device.
        """
        return self.conditions(self.read_tokens(tokens, null), latents, mask, masked)

    def read_tokens(self, tokens: TokenEmbeddings, null: PictureFlags | None = None) -> Prefix:
        """All that can be computed of tokens `[B, N, D]` and `null [B]`, see `forward`, before any latent is known."""
        # Unit vectors have entries of about 1/sqrt(D): brought to unit scale, or the positions drown them.
        prefix = self.project(tokens * tokens.shape[-1] ** 0.5)
        if null is not None:
            assert self.null is not None
            prefix = torch.where(null[:, None, None], self.null.to(prefix.dtype), prefix)
        embeddings = prefix + self.token_positions
        if self.config.prefix_attention == "full":
            return Prefix(embeddings, None, [], [])
        states, encoder = self.encoder.read_prefix(embeddings)
        decoder: list[KeysValues] = []
        if self.config.prefix == "attend":
            decoder = self.decoder.read_prefix(states + self.decoder_token_positions)[1]
        return Prefix(embeddings, states, encoder, decoder)

    def conditions(
        self, prefix: Prefix, latents: PositionLatents, mask: PositionMask, masked: int | None = None
    ) -> Conditions:
        """`forward` of tokens that have been read."""
        masked = int(mask[0].sum()) if masked is None else masked
        states, visible, index = self._encode(prefix, latents, mask, mask.shape[1] - masked)
        x = self.mask_token.to(states.dtype).expand(len(latents), latents.shape[1], -1)
        # An empty one too after a prefix of its own: under DDP the embedding of latents has to take part.
        if index.shape[1] or prefix.states is not None:
            x = x.scatter(1, index[..., None].expand_as(visible), visible)
        x = x + self.decoder_positions
        if self.config.prefix == "aligned":
            return self.decoder(x + states[:, self.above])
        if prefix.states is not None:
            return self.decoder.after_prefix(x, prefix.decoder)
        x = torch.cat([states + self.decoder_token_positions, x], dim=1)
        return self.decoder(x)[:, states.shape[1] :]

    def _encode(
        self, prefix: Prefix, latents: Tensor, mask: Tensor, visible: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encoder states of the prefix and of the visible latents, and the visible positions `[B, visible]`."""
        # A stable sort puts the visible positions first, in order, without a data-dependent shape.
        index = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :visible]
        known = latents.gather(1, index[..., None].expand(-1, -1, latents.shape[2]))
        x = self.embed(known) + self.latent_positions[index]
        if prefix.states is not None:
            return prefix.states, self.encoder.after_prefix(x, prefix.encoder) if visible else x, index
        count = prefix.embeddings.shape[1]
        x = self.encoder(torch.cat([prefix.embeddings, x], dim=1))
        return x[:, :count], x[:, count:], index


def token_above(token_grid: tuple[int, int], latent_grid: tuple[int, int]) -> TokensAbove:
    """Index `[L]` of the visual token whose cell covers each latent position."""
    rows = (torch.arange(latent_grid[0]) * token_grid[0]) // latent_grid[0]
    columns = (torch.arange(latent_grid[1]) * token_grid[1]) // latent_grid[1]
    return (rows[:, None] * token_grid[1] + columns).flatten()


def draw_mask(
    batch: int, positions: int, config: DecoderConfig, generator: torch.Generator | None, device: torch.device
) -> tuple[PositionMask, int]:
    """A training mask `[B, L]` bool, and how many entries of each row are true: one ratio a batch, random positions a
    picture.

    The ratio is 1 for `full_mask_share` of the batches, else from a normal distribution truncated to [min, 1].
    """
    mean, std, low = config.mask_ratio
    full, level = torch.rand(2, generator=host_generator(generator)).tolist()
    if full < config.full_mask_share:
        count = positions
    else:
        normal = torch.distributions.Normal(0.0, 1.0)
        a, b = (float(normal.cdf(torch.tensor((edge - mean) / std))) for edge in (low, 1.0))
        ratio = mean + std * float(normal.icdf(torch.tensor(a + level * (b - a))))
        count = min(max(math.ceil(positions * ratio), 1), positions)
    order = torch.rand(batch, positions, generator=generator, device=device).argsort(dim=1)
    return order < count, count


def cosine_schedule(iterations: int, positions: int) -> list[int]:
    """Positions still masked after each AR iteration: floor(L·cos(π/2·k/K)), falling by at least one to 0."""
    counts: list[int] = []
    left = positions
    for k in range(1, iterations + 1):
        goal = 0 if k == iterations else int(positions * math.cos(math.pi / 2 * k / iterations))
        left = max(min(goal, left - 1), iterations - k, 0)
        counts.append(left)
    return counts
