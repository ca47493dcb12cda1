"""A training step as the reference takes it: with its recipe, and with everything made that it makes.

Logits, probabilities and noise of all tokens by all entries lie in memory; the velocity field is evaluated at every
position, visible ones as well, for all draws at once, and the errors of visible positions are then multiplied by zero.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from v2flow.benchmark.subject import Subject
from v2flow.config import TokenizerConfig, VelocityConfig
from v2flow.flow import draw_timesteps
from v2flow.masked_decoder import draw_mask
from v2flow.tokenizer import V2FlowTokenizer
from v2flow.training.module import seeded_generator


def reference_recipe(config: TokenizerConfig) -> TokenizerConfig:
    """The reference's recipe (experiments/tokenizer/reference-512.yaml) in the sizes of another experiment: its
    pictures, vocabulary, tokens, widths and depths."""
    return replace(
        config,
        resampler=replace(
            config.resampler, readout="linear", temperature=[1.0, 1.0], noise=[1.0, 1.0], schedule_end=1.0
        ),
        visual_vocabulary=replace(config.visual_vocabulary, decay=0.8, revive_below=0.0),
        decoder=replace(
            config.decoder, prefix="attend", prefix_attention="full", mask_ratio=[1.0, 0.25, 0.7],
            full_mask_share=0.0, null_probability=0.1,
        ),
        velocity=VelocityConfig(
            kind="per_position", width=config.velocity.width, depth=config.velocity.depth, target="velocity",
            draws=4, start_share=0.0,
        ),
    )  # fmt: skip


@dataclass
class Draws:
    """Random numbers of a step with R noise draws.

    Attributes:
        gumbel: standard Gumbel noise of every token and entry, `[B, N, V]`.
        mask: `[B, L]` bool, true = to be predicted.
        null: `[B]` bool, true where the tokens are left out.
        times: `[R·B, L]`, draw by draw.
        noise: `[R·B, L, C]`.
    """

    gumbel: Tensor
    mask: Tensor
    null: Tensor
    times: Tensor
    noise: Tensor


def draw_all(model: V2FlowTokenizer, latents: Tensor, generator: torch.Generator) -> Draws:
    """Random numbers for latents `[B, C, h, w]`, at every position."""
    batch, channels, device = len(latents), latents.shape[1], latents.device
    positions, config = latents[0, 0].numel(), model.config
    gumbel = torch.empty(batch, model.num_tokens, len(model.resampler.table), device=device)
    gumbel = -gumbel.exponential_(generator=generator).log()  # as torch.nn.functional.gumbel_softmax
    mask, _ = draw_mask(batch, positions, config.decoder, generator, device)
    null = torch.rand(batch, generator=generator, device=device) < config.decoder.null_probability
    rows = (config.velocity.draws * batch, positions)
    times = draw_timesteps(rows, config.velocity, generator, device)
    noise = torch.randn(*rows, channels, generator=generator, device=device)
    return Draws(gumbel, mask, null, times, noise)


def literal_loss(model: V2FlowTokenizer, latents: Tensor, draws: Draws) -> Tensor:
    """The training loss of latents `[B, C, h, w]`: that of `model.latent_losses` at equal draws.

    Args:
        model: of a `reference_recipe`, in training mode.
    """
    logits = model.resampler.logits(model.resampler.encoder(latents))
    probabilities = F.softmax(logits + draws.gumbel, dim=-1)
    tokens = model.visual_vocabulary(probabilities @ model.resampler.table)
    positions = latents.flatten(2).transpose(1, 2)
    condition = model.decoder(tokens.embeddings, positions, draws.mask, draws.null)
    count = len(draws.times) // len(latents)
    target, condition = positions.repeat(count, 1, 1), condition.repeat(count, 1, 1)
    mask, t = draws.mask.repeat(count, 1), draws.times[..., None]
    output = model.head.field((1 - t) * target + t * draws.noise, draws.times, condition, ~mask)
    error = (output - (draws.noise - target)).square().mean(-1)
    flow = (error * mask).sum() / mask.sum()
    config = model.config
    return config.velocity.weight * flow + config.visual_vocabulary.commitment * tokens.commitment


class LiteralSubject(Subject):
    """Training steps of a copy of a module, taken literally."""

    def loss(self, stage: str, draw: int) -> Tensor:
        """The loss of a step; the draw decides its random numbers."""
        with torch.no_grad():
            latents = self.model.codec.encode(self.images)
        draws = draw_all(self.model, latents, seeded_generator(self.device, draw))
        return literal_loss(self.model, latents, draws)
