"""What a tokenizer is made of, as plain dataclasses.

They are the options of the experiment files (``--model.init_args.tokenizer.…``), the hyper-parameters in a
checkpoint and the ``config.json`` of an exported tokenizer. Contradictions are refused here, before any work.
"""

import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, Optional

from v2flow.errors import V2FlowError


def _require(condition: bool, option: str, expected: str, found: object) -> None:
    if not condition:
        raise V2FlowError(f"option {option}: expected {expected}, found {found!r}")


MAX_BLOCKS = 1000
"""Blocks are built one by one, before anything can be compared with the weights of a file."""
MAX_RANDOM = 1 << 28
"""Numbers in a random vocabulary, which no file bounds."""


def require_blocks(option: str, found: int, least: int = 0) -> None:
    """Refuses a number of blocks below `least` or above `MAX_BLOCKS`."""
    _require(
        least <= found <= MAX_BLOCKS, option, f"a number >= {least} of blocks, at most {MAX_BLOCKS}", found
    )


@dataclass
class CodecConfig:
    """How pixels become latents of about unit scale."""

    kind: Literal["patch", "dc", "kl"] = "patch"
    """patch: pixel patches, no network; dc: frozen AutoencoderDC; kl: frozen AutoencoderKL (diffusers)."""
    patch_size: int = 4
    """Side of a pixel patch; only for kind=patch."""
    path: Optional[str] = None
    """Folder or hub id of the diffusers autoencoder; only for kind=dc and kl."""
    scale: float = 4.0
    """Factor that brings latents to unit scale (0.41407 for the reference's DC-AE)."""
    shift: float = 0.5
    """Subtracted from pixel values before scaling; only for kind=patch."""

    def __post_init__(self) -> None:
        _require(self.patch_size >= 1, "codec.patch_size", "a positive number of pixels", self.patch_size)
        _require(self.scale > 0, "codec.scale", "a positive factor", self.scale)
        _require(self.kind == "patch" or self.shift == 0.5, "codec.shift",
                 f"to be left out with kind={self.kind}, which takes pixels as they are", self.shift)  # fmt: skip
        _require(self.kind != "patch" or self.path is None, "codec.path",
                 "to be left out with kind=patch, which has no weights", self.path)  # fmt: skip


@dataclass
class VocabularyConfig:
    """The frozen vocabulary of the pretrained LLM."""

    source: str = "gemma3-270m"
    """gemma3-270m, wordllama, random, or a Hugging Face model folder, .gguf or .safetensors file."""
    size: Optional[int] = 2048
    """Number of entries: a documented subset (see llm.py); null takes the whole vocabulary."""
    center: bool = True
    """Subtract the mean row before anything else: Gemma's rows share half of their length."""
    dim: int = 640
    """Width of the rows; only for source=random."""
    seed: int = 0
    """Seed of the rows; only for source=random."""

    def __post_init__(self) -> None:
        _require(
            self.size is None or self.size >= 2, "vocabulary.size", "null or at least 2 entries", self.size
        )
        _require(self.source != "random" or (self.size or 0) * self.dim <= MAX_RANDOM, "vocabulary.size and dim",
                 f"at most {MAX_RANDOM} random numbers", (self.size, self.dim))  # fmt: skip


@dataclass
class ResamplerConfig:
    """Latents to soft categorical distributions over the LLM vocabulary."""

    width: int = 192
    """Channels of the convolutional stages."""
    depth: int = 3
    """Residual blocks in each of the two stages (one before, one after the pooling). 0: a token says what its own
    patches show and nothing of their surroundings; equal patches get equal ids, which an LLM learns sooner."""
    token_grid: list[int] = field(default_factory=lambda: [8, 8])
    """Rows and columns of visual tokens; latents are average-pooled onto this grid."""
    readout: Literal["keys", "linear", "none"] = "keys"
    """keys: cosine similarity to a learned projection of the table; linear: one free row an entry; none: the query
    itself is the token, without any vocabulary (the ablation: VQ tokens with V2Flow's decoder)."""
    key_dim: int = 32
    """Width of queries and keys; not for readout=linear. Narrow keys keep the tokens in few dimensions, where a
    codebook of a thousand entries goes far."""
    scale: float = 6.0
    """Largest logit of readout=keys: high values saturate the softmax and stop its gradient."""
    temperature: list[float] = field(default_factory=lambda: [1.0, 1.0])
    """Softmax temperature at the start and at the end of the noise schedule (linear between)."""
    noise: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Amplitude of the Gumbel noise at the start and at the end of its schedule; none at inference."""
    schedule_end: float = 0.5
    """Share of the training after which noise and temperature stay at their end values."""
    hard: bool = False
    """One-hot forward pass with the soft gradient (straight-through) instead of the soft mixture."""
    memory_budget_mb: float = 256.0
    """MB for the logits of all tokens over the vocabulary and what is made of them: where they need more, they are
    computed in tiles, forward and backward, and never held together. Results are the same but for rounding."""

    def __post_init__(self) -> None:
        require_blocks("resampler.depth", self.depth)
        _require(len(self.token_grid) == 2 and min(self.token_grid) >= 1, "resampler.token_grid",
                 "two positive numbers, rows and columns", self.token_grid)  # fmt: skip
        _require(len(self.temperature) == 2 and min(self.temperature) > 0, "resampler.temperature",
                 "two positive numbers, start and end", self.temperature)  # fmt: skip
        _require(len(self.noise) == 2 and min(self.noise) >= 0, "resampler.noise",
                 "two numbers >= 0, start and end", self.noise)  # fmt: skip
        _require(self.readout != "none" or not (self.hard or any(self.noise)), "resampler.noise and hard",
                 "0 and false with readout=none, which has no distribution", (self.noise, self.hard))  # fmt: skip
        _require(0 < self.schedule_end <= 1, "resampler.schedule_end", "a share in (0, 1]", self.schedule_end)
        _require(self.memory_budget_mb > 0, "resampler.memory_budget_mb", "a positive number of MB",
                 self.memory_budget_mb)  # fmt: skip


@dataclass
class VisualVocabularyConfig:
    """The cosine codebook in the LLM's embedding space."""

    size: int = 1024
    """Number of visual tokens K."""
    decay: float = 0.95
    """Decay of the running means that are the codes (the reference: 0.8)."""
    commitment: float = 0.01
    """Weight of the commitment loss, a squared distance summed over the dimensions (libraries take their mean: their
    0.25 at 32 dimensions is 0.008 here). At 0.25 tokens shrink onto their codes and say less."""
    revive_below: float = 0.05
    """A code used less than this share of the average code is set to a token of the batch; 0 = never."""

    def __post_init__(self) -> None:
        _require(self.size >= 2, "visual_vocabulary.size", "at least 2 codes", self.size)
        _require(0 <= self.decay < 1, "visual_vocabulary.decay", "a number in [0, 1)", self.decay)


@dataclass
class DecoderConfig:
    """The masked autoregressive transformer: visual tokens and visible latents to conditions."""

    width: int = 192
    """Model width."""
    heads: int = 6
    """Attention heads."""
    encoder_depth: int = 2
    """Blocks over the prefix and the visible latents."""
    decoder_depth: int = 2
    """Blocks over all positions, mask tokens included."""
    prefix: Literal["aligned", "attend"] = "aligned"
    """attend: the decoder blocks attend to the prefix (the reference); aligned: each position is given the
    encoder's state of the token above it and the prefix is left out of the decoder blocks: half the sequence."""
    prefix_attention: Literal["full", "self"] = "full"
    """full: the visual tokens attend to the visible latents as well (the reference), so they are encoded anew in every
    AR iteration; self: to each other only, in encoder and decoder, so their keys and values are computed once a
    picture. Both have the same parameters."""
    mask_ratio: list[float] = field(default_factory=lambda: [1.0, 0.25, 0.7])
    """Mean, standard deviation and minimum of the truncated normal (maximum 1) of a batch's mask ratio."""
    full_mask_share: float = 0.5
    """Share of batches masked everywhere: tokens that visible latents can replace are not learned."""
    null_probability: float = 0.1
    """Share of pictures that are decoded without their tokens, for guidance: the transformer is given the null
    embedding; with velocity.target=residual the field alone goes without its condition."""
    checkpointing: bool = False
    """Recompute activations in backward: less memory, a third more time."""

    def __post_init__(self) -> None:
        _require(self.width % 4 == 0, "decoder.width", "a multiple of 4", self.width)
        _require(
            self.width % self.heads == 0, "decoder.heads", f"a divisor of width {self.width}", self.heads
        )
        require_blocks("decoder.encoder_depth", self.encoder_depth)
        require_blocks("decoder.decoder_depth", self.decoder_depth)
        _require(self.prefix_attention in ("full", "self"), "decoder.prefix_attention", "full or self",
                 self.prefix_attention)  # fmt: skip
        ratio = self.mask_ratio
        _require(len(ratio) == 3 and 0 < ratio[2] <= ratio[0] <= 1 and 0 < ratio[1] < math.inf, "decoder.mask_ratio",
                 "mean, standard deviation above 0 and minimum, 0 < minimum <= mean <= 1", ratio)  # fmt: skip
        _require(
            0 <= self.full_mask_share <= 1,
            "decoder.full_mask_share",
            "a share in [0, 1]",
            self.full_mask_share,
        )
        _require(0 <= self.null_probability < 1, "decoder.null_probability", "a share in [0, 1)",
                 self.null_probability)  # fmt: skip


@dataclass
class VelocityConfig:
    """The velocity field of the rectified flow and its loss."""

    kind: Literal["per_position", "joint"] = "joint"
    """per_position: an AdaLN MLP on each latent alone (the paper's); joint: attends over positions."""
    width: int = 192
    """Width of the field."""
    depth: int = 2
    """Blocks."""
    heads: int = 6
    """Attention heads; only for kind=joint."""
    modulation: Literal["condition", "timestep"] = "condition"
    """What sets the norms and gates of kind=per_position. condition: timestep and condition of each position (the
    reference), one row a position; timestep: the timestep alone, one row for all positions when decoding, with the
    condition added at the input. Both have the same parameters. kind=joint always does the latter."""
    fine_patch: int = 4
    """Read each latent as fine_patch² finer positions (the pixels of a patch) and put convolutions on that grid
    around the transformer; 1 = none; only for kind=joint."""
    fine_width: int = 32
    """Channels of those convolutions."""
    fine_depth: int = 1
    """Residual blocks of two convolutions, before and after the transformer."""
    mean_depth: int = 0
    """Residual blocks of two convolutions on the fine grid behind the linear conditional mean, as wide as
    `fine_width`; 0 = linear only. Only for kind=joint, fine_patch > 1 and target=residual."""
    alone: float = 0.0
    """Last share of the training, in which the field learns alone on frozen tokens and conditional means, and
    before which it does not learn at all; 0 = everything together throughout. Only for target=residual."""
    target: Literal["residual", "x0", "velocity"] = "residual"
    """What flows: the normalised residual to the conditional mean; the latent with the error weighed in x_0;
    or the latent with the velocity loss (the reference)."""
    skip: bool = True
    """Add a linear image of the condition to the predicted x_0; only for target=x0."""
    draws: int = 1
    """Noise draws a position and step."""
    weight_cap: float = 4.0
    """Largest weight min(1/t^2, cap) of the error in x_0; only for target=x0."""
    start_share: float = 0.1
    """Share of draws exactly at t=1, where every sampler starts; the rest is logit-normal."""
    logit_mean: float = 0.0
    """Mean of the logit-normal timestep distribution."""
    logit_std: float = 1.0
    """Standard deviation of the logit-normal timestep distribution."""
    weight: float = 1.0
    """Weight of the flow loss; with target=residual, beside the loss of the conditional mean."""

    def __post_init__(self) -> None:
        _require(self.kind != "joint" or self.width % 4 == 0, "velocity.width", "a multiple of 4", self.width)
        _require(self.kind != "joint" or self.width % self.heads == 0, "velocity.heads",
                 f"a divisor of width {self.width}", self.heads)  # fmt: skip
        for name in ("depth", "fine_depth", "mean_depth"):
            require_blocks(f"velocity.{name}", getattr(self, name))
        _require(self.modulation in ("condition", "timestep"), "velocity.modulation", "condition or timestep",
                 self.modulation)  # fmt: skip
        _require(self.modulation == "condition" or self.kind == "per_position", "velocity.modulation",
                 f"to be left out with kind={self.kind}, which is modulated by the timestep alone as it is",
                 self.modulation)  # fmt: skip
        _require(self.fine_patch >= 1, "velocity.fine_patch", "at least 1", self.fine_patch)
        _require(self.kind != "joint" or self.fine_patch == 1 or self.fine_width % 4 == 0, "velocity.fine_width",
                 "a multiple of 4", self.fine_width)  # fmt: skip
        fine_mean = self.kind == "joint" and self.fine_patch > 1 and self.target == "residual"
        _require(self.mean_depth == 0 or fine_mean, "velocity.mean_depth",
                 "0 unless kind is joint, fine_patch above 1 and target residual", self.mean_depth)  # fmt: skip
        _require(self.alone == 0 or (0 < self.alone < 1 and self.target == "residual"), "velocity.alone",
                 "a share in [0, 1), and 0 unless target is residual", self.alone)  # fmt: skip
        _require(self.skip or self.target == "x0", "velocity.skip", f"to be left out with target={self.target}",
                 self.skip)  # fmt: skip
        _require(self.draws >= 1, "velocity.draws", "at least 1 draw", self.draws)
        _require(0 <= self.start_share <= 1, "velocity.start_share", "a share in [0, 1]", self.start_share)

    def stage(self, progress: float) -> Literal["together", "tokens", "field"]:
        """What learns at this share of the training: everything, all but the field, or the field alone."""
        if self.alone == 0:
            return "together"
        return "tokens" if progress < 1 - self.alone else "field"


@dataclass
class TokenizerConfig:
    """Everything that defines a V2Flow tokenizer."""

    image_size: int = 32
    """Side of the square pictures it is trained on."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    resampler: ResamplerConfig = field(default_factory=ResamplerConfig)
    visual_vocabulary: VisualVocabularyConfig = field(default_factory=VisualVocabularyConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    velocity: VelocityConfig = field(default_factory=VelocityConfig)


def from_dict(cls: type, values: dict[str, Any], where: str = "config") -> Any:
    """Build the dataclass `cls` from nested plain values, as read from ``config.json`` or a checkpoint.

    Raises:
        V2FlowError: an option that the class does not have.
    """
    known = {f.name: f for f in fields(cls)}
    unknown = sorted(set(values) - set(known), key=str)
    if unknown:
        raise V2FlowError(f"{where}: unknown option {unknown[0]!r}; expected one of {', '.join(known)}")
    built = {}
    for name, value in values.items():
        kind = known[name].type
        if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, dict):
            value = from_dict(kind, value, f"{where}.{name}")
        built[name] = value
    return cls(**built)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values of a dataclass; the inverse of `from_dict`."""
    return asdict(config)
