"""What a text-to-image model is made of, and which of its parameters learn."""

from dataclasses import dataclass, field
from typing import Literal, Optional, Union

from v2flow.errors import V2FlowError

RowsMethod = Literal["vocabulary", "words", "projection", "random"]


@dataclass
class LoraOptions:
    """Low-rank adapters of the LLM's attention and MLP projections (Hu et al. 2021); for train=lora only."""

    rank: int = 16
    """Rank of an adapter."""
    alpha: float = 32.0
    """An adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout of an adapter's input."""

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "lora.rank", "at least 1", self.rank)
        _require(self.alpha > 0, "lora.alpha", "a positive number", self.alpha)
        _require(0 <= self.dropout < 1, "lora.dropout", "a share in [0, 1)", self.dropout)


@dataclass
class TextToImageConfig:
    """Everything that defines a text-to-image model and its training loss."""

    tokenizer: str
    """A trained V2Flow tokenizer: a .ckpt file, whose averaged weights are taken, or a folder of `v2flow export`."""
    llm: str = "gemma3-270m"
    """The LLM: gemma3-270m, a Hugging Face folder or hub id, gpt2-style:SIZE or neox-style:SIZE; see
    `load_language_model`."""
    layers: Optional[int] = None
    """Keep so many of its first blocks; null for all."""
    random_weights: bool = False
    """Draw its weights anew: the control without pretraining."""
    rows: RowsMethod = "vocabulary"
    """Where the visual tokens' rows start; see initial_rows.py."""
    pictures: Optional[Union[str, list[str]]] = None
    """Captioned picture shards for what is read from data before training: the visual tokens' words of rows=words, and
    the captions that the tokenizer of a gpt2-style or neox-style LLM is trained on."""
    words_pictures: int = 1000
    """Pictures that rows=words reads."""
    train: Literal["full", "last_layers", "lora", "rows"] = "full"
    """What learns beside the visual rows: all blocks and norms, the last blocks and the final norm, adapters, or
    nothing. The text rows of table and head never do."""
    train_layers: int = 4
    """Blocks that learn; for train=last_layers only."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    """Adapters; for train=lora only."""
    max_caption: int = 64
    """Most LLM ids of a caption, the beginning-of-sequence token included."""
    caption_dropout: float = 0.1
    """Share of captions that are left out in training, for classifier-free guidance."""
    full_share: float = 0.125
    """Share of image positions whose softmax runs over the whole vocabulary, so that text loses its probability; they
    stand for all positions."""
    full_every: int = 1
    """Those positions are of every so-many-th step alone, and so many times as many there: what they cost beside their
    products, reading the LLM's whole table, is then paid less often; so is what they teach."""
    sampled_words: int = 0
    """At all other positions what text costs is estimated from so many words, drawn for each step; 0 leaves it out. For
    LLMs of large vocabularies, of which a few positions of a step say too little."""
    text_weight: float = 0.0
    """Weight of the captions' own next-token loss, which keeps the LLM's language; 0 leaves it out."""
    checkpointing: bool = False
    """Compute the LLM's activations again in backward: less memory for a third more time."""
    seed: int = 0
    """Of every random weight: rows, adapters, LLMs without pretraining."""

    def __post_init__(self) -> None:
        _require(bool(self.tokenizer), "tokenizer", "a checkpoint or folder", self.tokenizer)
        _require(self.train_layers >= 1, "train_layers", "at least 1", self.train_layers)
        _require(self.words_pictures >= 1, "words_pictures", "at least 1", self.words_pictures)
        _require(self.max_caption >= 1, "max_caption", "at least 1", self.max_caption)
        _require(0 <= self.caption_dropout <= 1, "caption_dropout", "a share in [0, 1]", self.caption_dropout)
        _require(0 <= self.full_share <= 1, "full_share", "a share in [0, 1]", self.full_share)
        _require(self.full_every >= 1, "full_every", "at least 1", self.full_every)
        _require(self.full_share * self.full_every <= 1, "full_every", f"at most 1 / full_share = "
                 f"{1 / max(self.full_share, 1e-9):g}", self.full_every)  # fmt: skip
        _require(self.sampled_words >= 0, "sampled_words", "at least 0", self.sampled_words)
        _require(not self.sampled_words or self.full_share < 1, "sampled_words",
                 "0 beside full_share = 1, which leaves no position to them", self.sampled_words)  # fmt: skip
        _require(self.text_weight >= 0, "text_weight", "a number >= 0", self.text_weight)

    def full_at(self, step: int) -> tuple[float, int]:
        """Share of the positions of a training step whose softmax runs over the whole vocabulary, and the weight of
        what they add: such a step stands for `full_every`."""
        return (0.0, 1) if step % self.full_every else (self.full_share * self.full_every, self.full_every)

    def step_kinds(self) -> dict[str, tuple[float, float]]:
        """Kinds of training steps, and the shares of the training that they take, as intervals."""
        if self.full_every == 1:
            return {"all": (0.0, 1.0)}
        first = 1 / self.full_every
        return {"whole vocabulary": (0.0, first), "visual columns": (first, 1.0)}

    def step_of(self, kind: str) -> int:
        """The first training step of a kind."""
        return list(self.step_kinds()).index(kind)


def _require(fits: bool, name: str, expected: str, found: object) -> None:
    if not fits:
        raise V2FlowError(f"option text_to_image.{name}: expected {expected}, found {found!r}")
