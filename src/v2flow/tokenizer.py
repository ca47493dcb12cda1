"""The V2Flow tokenizer: codec, resampler, visual vocabulary, masked decoder and flow, assembled."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from v2flow.arrays import (
    Latents,
    PerToken,
    Pictures,
    Scalar,
    TokenEmbeddings,
    TopProbabilities,
    TopWords,
    VisualIds,
)
from v2flow.codec import build_codec
from v2flow.config import TokenizerConfig
from v2flow.decode_modes import Presets, preset_options, shipped_presets
from v2flow.decoding import DecodeOptions, decode_options, draw_latents
from v2flow.encoding import encode_ids, nearest_codes, soft_tokens
from v2flow.errors import V2FlowError
from v2flow.flow import FlowHead
from v2flow.hub import PretrainedMixin
from v2flow.llm import LLMVocabulary, load_vocabulary
from v2flow.masked_decoder import MaskedAutoregressiveDecoder, draw_mask
from v2flow.resampler import VisualVocabularyResampler
from v2flow.visual_vocabulary import VisualVocabulary

HEALTH_PICTURES = 4
"""Pictures of a batch whose distributions are looked at in training."""


@dataclass
class SoftTokens:
    """Soft visual tokens of a batch of pictures.

    Attributes:
        ids: `[B, N]` long, in [0, K).
        embeddings: expected embeddings of the (centred) LLM table, `[B, N, D]`.
        words: the k most probable vocabulary entries of each token, `[B, N, k]` long; see `tokenizer.words`. k is 0
            without a vocabulary (readout=none).
        probabilities: their probabilities, `[B, N, k]`, falling.
        entropy: entropy of the whole distribution in nats, `[B, N]`.
    """

    ids: VisualIds
    embeddings: TokenEmbeddings
    words: TopWords
    probabilities: TopProbabilities
    entropy: PerToken


@dataclass
class TokenizerLosses:
    """Training losses and health figures of one batch; all scalars, `ids` is `[B, N]`."""

    total: Scalar
    mean: Scalar
    flow: Scalar
    commitment: Scalar
    entropy: Scalar
    agreement: Scalar
    ids: VisualIds


class V2FlowTokenizer(nn.Module, PretrainedMixin):
    """Pictures to ids of a visual vocabulary in an LLM's embedding space, and back.

    Args:
        config: sizes and options.
        vocabulary: the LLM's vocabulary; loaded from `config.vocabulary` when left out.

    Attributes:
        num_tokens: visual tokens a picture, N.
        codebook_size: size of the visual vocabulary, K.
        decode_presets: options of `decode` by the name of a preset; of an exported folder its own, where they were
            measured for it.
    """

    def __init__(self, config: TokenizerConfig, vocabulary: LLMVocabulary | None = None) -> None:
        super().__init__()
        self.config = config
        vocabulary = vocabulary if vocabulary is not None else load_vocabulary(config.vocabulary)
        mean = vocabulary.table.mean(0) if config.vocabulary.center else vocabulary.table.new_zeros(())
        table = vocabulary.table - mean
        self.codec = build_codec(config.codec, weights=not table.is_meta)
        channels, height, width = self.codec.latent_shape(config.image_size, config.image_size)
        self.latent_grid = (height, width)
        rows, columns = config.resampler.token_grid
        check_token_grid("resampler.token_grid", (rows, columns), self.latent_grid)
        self.num_tokens = rows * columns
        self.codebook_size = config.visual_vocabulary.size
        self.resampler = VisualVocabularyResampler(channels, config.resampler, table)
        self.visual_vocabulary = VisualVocabulary(self.resampler.dim, config.visual_vocabulary)
        self.decoder = MaskedAutoregressiveDecoder(
            self.resampler.dim, (rows, columns), channels, self.latent_grid, config.decoder,
            null=config.velocity.target != "residual",
        )  # fmt: skip
        self.head = FlowHead(channels, config.decoder.width, self.latent_grid, config.velocity)
        self.decode_presets: Presets = shipped_presets()
        self.vocabulary = vocabulary  # the LLM's own rows, not centred; shared with every copy of this module

    @property
    def words(self) -> list[str]:
        """Strings of the LLM vocabulary entries, V of them."""
        return self.vocabulary.words

    @property
    def vocabulary_sha256(self) -> str:
        """Name of the frozen embedding rows that the weights belong to."""
        return self.vocabulary.sha256

    def losses(
        self, images: Pictures, progress: float = 1.0, generator: torch.Generator | None = None
    ) -> TokenizerLosses:
        """Training losses of pictures `[B, 3, H, W]` in [0, 1].

        Args:
            progress: share of the training done, for the schedules of noise and temperature and for the stage
                (`VelocityConfig.alone`).
            generator: source of every random draw.
        """
        with torch.no_grad():
            latents = self.codec.encode(check_images(images, self.config.image_size))
        return self.latent_losses(latents, progress, generator)

    def latent_losses(
        self, latents: Latents, progress: float = 1.0, generator: torch.Generator | None = None
    ) -> TokenizerLosses:
        """`losses` of pictures whose codec latents `[B, C, h, w]` are at hand."""
        batch, device = len(latents), latents.device
        positions = latents.flatten(2).transpose(1, 2)
        frozen = self.config.velocity.stage(progress) == "field"
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            # Health figures from the first pictures only: over the whole batch they would cost as much as the look-up.
            soft = self.resampler(latents, progress, generator, described=HEALTH_PICTURES)
            quantized = self.visual_vocabulary(soft.embeddings, generator)
            mask, masked = draw_mask(batch, positions.shape[1], self.config.decoder, generator, device)
            null = (
                torch.rand(batch, generator=generator, device=device) < self.config.decoder.null_probability
            )
            # A residual is guided in the field alone: a mean without tokens would be the data's mean picture, whose
            # large errors drown what the tokens have to learn.
            residual = self.config.velocity.target == "residual"
            condition = self.decoder(
                quantized.embeddings, positions, mask, None if residual else null, masked
            )
        flow = self.head.loss(
            positions, condition, mask, generator, progress, null if residual else None, masked
        )
        total = flow.total + self.config.visual_vocabulary.commitment * quantized.commitment
        with torch.no_grad():
            agreement = self._agreement(soft.words, quantized.ids[:HEALTH_PICTURES])
        return TokenizerLosses(
            total, flow.mean, flow.flow, quantized.commitment, soft.entropy.mean(), agreement, quantized.ids
        )

    def windows(self) -> dict[str, tuple[float, float]]:
        """Prefixes of parameter names, and the shares of the training between which those parameters learn."""
        alone = self.config.velocity.alone
        if not alone:
            return {"": (0.0, 1.0)}
        field = (1 - alone, 1.0)
        return {"head.field.": field, "head.null_condition": field, "": (0.0, 1 - alone)}

    def _agreement(self, words: Tensor, ids: Tensor) -> Tensor:
        """Share of tokens whose most probable word, of `words` `[b, N, 1]`, alone gives the same id as the mixture."""
        if not words.shape[-1]:
            return torch.zeros((), device=ids.device)
        table = nn.functional.normalize(self.resampler.table[words[..., 0]], dim=-1)
        return (self.visual_vocabulary.nearest(table) == ids).float().mean()

    @overload
    def encode(self, images: Pictures, return_soft: Literal[False] = False, top_words: int = 5) -> VisualIds:
        """Ids alone."""

    @overload
    def encode(self, images: Pictures, return_soft: Literal[True], top_words: int = 5) -> SoftTokens:
        """Ids with the distributions behind them."""

    @torch.no_grad()
    def encode(
        self, images: Pictures, return_soft: bool = False, top_words: int = 5
    ) -> VisualIds | SoftTokens:
        """Ids `[B, N]` long of pictures `[B, 3, H, W]` in [0, 1]; with `return_soft` a `SoftTokens`.

        Without noise, in whatever mode the module is, and as in double precision: rounding that depends on batch size
        or threads is then far below any gap between codes, and the ids do not depend on it. See `encode_ids`.

        Raises:
            V2FlowError: pictures of another shape than the tokenizer was made for.
        """
        if not len(check_images(images, self.config.image_size)) and not return_soft:
            return torch.empty(0, self.num_tokens, dtype=torch.long, device=images.device)
        with inference(self), torch.autocast(images.device.type, enabled=False):
            latents = self.codec.encode(images.float())
            codes = self.visual_vocabulary.codes
            if not return_soft:
                return encode_ids(self.resampler, codes, latents)
            soft = soft_tokens(self.resampler, latents, torch.float64, described=None, top=top_words)
            ids, _ = nearest_codes(soft.embeddings, codes)
        return SoftTokens(
            ids, soft.embeddings.float(), soft.words, soft.probabilities.float(), soft.entropy.float()
        )

    def decode_settings(self, options: Mapping[str, Any]) -> DecodeOptions:
        """Options of `decode`, checked against this tokenizer.

        Raises:
            V2FlowError: an unknown or impossible option, or guidance that was not trained.
        """
        settings = decode_options(dict(options))
        if settings.guidance != 1.0 and self.config.decoder.null_probability == 0:
            raise V2FlowError(
                f"option guidance: expected 1, found {settings.guidance}: this tokenizer was trained with "
                "decoder.null_probability=0 and knows nothing to guide away from"
            )
        return settings

    @torch.no_grad()
    def decode(
        self, ids: VisualIds, generator: torch.Generator | None = None, preset: str | None = None, **options: Any,
    ) -> Pictures:  # fmt: skip
        """Pictures `[B, 3, H, W]` in [0, 1] of ids `[B, N]`.

        Args:
            generator: source of the noise and of the order of positions; seed it to repeat a picture.
            preset: fast, balanced or best, from a measured frontier of quality against speed; in the place of options.
            options: the fields of `DecodeOptions` (steps, iterations, guidance, solver, …).

        Raises:
            V2FlowError: ids of another shape or outside [0, K), an unknown option or preset, both of them, or guidance
                that was not trained.
        """
        if preset is not None:
            options = preset_options(self.decode_presets, preset, options)
        settings = self.decode_settings(options)
        check_ids(ids, self.num_tokens, self.codebook_size)
        if not len(ids):
            return torch.empty(0, 3, self.config.image_size, self.config.image_size)
        device = self.visual_vocabulary.codes.device
        with inference(self), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            tokens = self.visual_vocabulary.lookup(ids.to(device).long())
            height, width = self.latent_grid
            channels = self.head.residual_std.shape[0]
            latents = draw_latents(
                self.decoder, self.head, tokens, height * width, channels, settings, generator
            )
            latents = latents.transpose(1, 2).unflatten(2, (height, width))
            return self.codec.decode(latents).float().clamp(0, 1)

    def reconstruct(
        self, images: Pictures, generator: torch.Generator | None = None, **options: Any
    ) -> Pictures:
        """`decode(encode(images))`; `options` as of `decode`, a preset included."""
        return self.decode(self.encode(images), generator, **options)


def check_token_grid(option: str, tokens: tuple[int, int], latents: tuple[int, int]) -> None:
    """Refuse a token grid finer than the latents that are pooled onto it.

    Raises:
        V2FlowError: names `option` and both grids.
    """
    if tokens[0] > latents[0] or tokens[1] > latents[1]:
        raise V2FlowError(
            f"option {option}: {tokens[0]}x{tokens[1]} tokens need at least as many latent positions, found "
            f"{latents[0]}x{latents[1]}; use a smaller grid, a smaller patch or a larger image_size"
        )


def check_images(images: Tensor, size: int) -> Pictures:
    """The pictures, if they have the shape `[B, 3, size, size]`.

    Raises:
        V2FlowError: another shape.
    """
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
        raise V2FlowError(
            f"images: expected shape [B, 3, {size}, {size}], found {list(images.shape)}; resize or crop first"
        )
    return images


def check_ids(ids: Tensor, num_tokens: int, codebook_size: int) -> None:
    """Refuse ids that are not integers `[B, N]` in [0, K).

    Raises:
        V2FlowError: what is wrong with them.
    """
    integers = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.ndim != 2 or ids.shape[1] != num_tokens or not integers:
        raise V2FlowError(
            f"ids: expected integers of shape [B, {num_tokens}], found {ids.dtype} {list(ids.shape)}"
        )
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < codebook_size):
        raise V2FlowError(
            f"ids: expected values from 0 to {codebook_size - 1}, found {int(ids.min())} to {int(ids.max())}"
        )


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and no TF32 in products or convolutions; all of it is put back afterwards."""
    modes = {name: part.training for name, part in module.named_modules()}
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        module.eval()
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions
        for name, part in module.named_modules():
            part.training = modes[name]
