"""The work behind the page, without a page: pictures to tokens in words, tokens and captions to pictures."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

from v2flow.data.decode import BadSampleError, decode_image, square_crop
from v2flow.decoding import decode_options
from v2flow.demo.filling import PAUSE, Frame, frames
from v2flow.devices import pick_device
from v2flow.errors import V2FlowError
from v2flow.inference import LoadedModel, is_text_to_image, load_text_to_image_model, picture_psnr
from v2flow.probes.alignment import cannot_compare
from v2flow.training.module import seeded_generator

TOP_WORDS = 10
"""Words of a token that are shown."""
Words = list[tuple[str, float]]
"""Words of the LLM vocabulary and a number for each, falling."""


@dataclass
class TokenWords:
    """One visual token in words.

    Attributes:
        id: in [0, K).
        probable: the most probable words of its soft distribution; none without a vocabulary (readout=none).
        entropy: of the whole distribution in nats.
    """

    id: int
    probable: Words
    entropy: float


@dataclass
class Reading:
    """A picture and its tokens.

    Attributes:
        name: of the file.
        picture: `[3, S, S]` in [0, 1], as the tokenizer sees it.
        tokens: N of them, row by row of the token grid.
        dropped: set when the visitor has taken the picture away.
    """

    name: str
    picture: Tensor
    tokens: list[TokenWords]
    dropped: Event = field(default_factory=Event)

    @property
    def ids(self) -> Tensor:
        """`[N]` long."""
        return torch.tensor([token.id for token in self.tokens])


class Session:
    """The models of a demo; any thread may call it, one at a time computes.

    Args:
        tokenizer: holds a `V2FlowTokenizer`.
        text_to_image: a `V2FlowForTextToImage`, or None.
        baseline: another tokenizer of the same picture size, or None.

    Raises:
        V2FlowError: another kind of tokenizer, or a baseline of another picture size.
    """

    def __init__(
        self, tokenizer: LoadedModel, text_to_image: Any = None, baseline: LoadedModel | None = None
    ) -> None:
        if tokenizer.name != "V2FlowTokenizer":
            raise V2FlowError(
                f"expected a V2FlowTokenizer, found a {tokenizer.name}; it can be shown beside one: --baseline"
            )
        size = tokenizer.model.config.image_size
        if baseline is not None and baseline.model.config.image_size != size:
            raise V2FlowError(
                f"option --baseline: expected a tokenizer of {size} px pictures, found one of "
                f"{baseline.model.config.image_size} px; train both at one size"
            )
        self.loaded, self.text_to_image, self.baseline = tokenizer, text_to_image, baseline
        self._lock = Lock()
        self._row_norms: Tensor | None = None

    @property
    def tokenizer(self) -> Any:
        """The `V2FlowTokenizer`."""
        return self.loaded.model

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        rows, columns = self.tokenizer.config.resampler.token_grid
        return rows, columns

    def read(self, path: str) -> Reading:
        """The tokens of a JPEG, PNG or WebP file, cropped and resized as in training.

        Raises:
            V2FlowError: no such picture, or a damaged one.
        """
        name = Path(path).name
        try:
            # Not by every decoder of Pillow's: some of those run other programs on what a stranger sent.
            image = decode_image(Path(path).read_bytes())
        except OSError as error:
            raise V2FlowError(
                f"{path}: cannot be read ({error.strerror}); expected a picture file"
            ) from error
        except BadSampleError as error:
            raise V2FlowError(f"{name}: expected a JPEG, PNG or WebP picture, found: {error}") from error
        pixels = square_crop(image, self.tokenizer.config.image_size)
        picture = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
        with self._lock:
            return Reading(name, picture, self._tokens(picture))

    def nearest(self, token: int) -> Words:
        """Words nearest by cosine to a code of the visual vocabulary; none where the two cannot be compared."""
        model = self.tokenizer
        if cannot_compare(model):
            return []
        with self._lock, torch.no_grad():
            table = model.resampler.table
            if self._row_norms is None:
                self._row_norms = table.norm(dim=-1).clamp_min(1e-12)
            cosines = table @ model.visual_vocabulary.codes[token].to(table.dtype) / self._row_norms
            best = cosines.topk(min(TOP_WORDS, len(cosines)))
        return [
            (model.words[i], value)
            for i, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def reconstruct(
        self, reading: Reading, options: Mapping[str, Any], seed: int = 0, pause: float = PAUSE
    ) -> Iterator[Frame]:
        """The picture as its tokens are decoded; the last frame is what `v2flow reconstruct` makes of it.

        Args:
            options: fields of `DecodeOptions`.
            pause: least seconds between two frames.

        Raises:
            V2FlowError: an option out of range.
        """

        def decode() -> Tensor:
            return self.loaded.decode(reading.ids, options, (seed, 0))

        return frames(self.tokenizer, decode, self._lock, _evaluations(options), pause)

    def reconstruct_by_baseline(self, reading: Reading) -> Frame | None:
        """The picture by the baseline, in its one way or its first decode mode; None without a baseline."""
        if self.baseline is None:
            return None
        with self._lock:
            start = perf_counter()
            picture = self.baseline.decode(
                self.baseline.encode(reading.picture), self.baseline.decode_options(None, {}), (0, 0)
            )
            return Frame(picture, 0, 0.0, True, perf_counter() - start)

    def draw(
        self, caption: str, options: Mapping[str, Any], guidance: float = 1.0, temperature: float = 1.0,
        seed: int = 0, pause: float = PAUSE,
    ) -> Iterator[Frame]:  # fmt: skip
        """The picture of a caption while it is decoded; the last frame is what `v2flow generate` draws.

        Args:
            options: fields of `DecodeOptions`, of the way from tokens to pixels.
            guidance: classifier-free scale of the LLM; 1 is none.
            temperature: of the LLM's draws; 0 takes the most probable token.

        Raises:
            V2FlowError: no text-to-image model, an empty or too long caption, or an option out of range.
        """
        if self.text_to_image is None:
            raise V2FlowError("captions: no text-to-image model is loaded; start with --text-to-image")
        from v2flow.t2i.generation import generate_ids

        model, cpu = self.text_to_image, torch.device("cpu")

        def decode() -> Tensor:
            ids = generate_ids(
                model, [caption.strip()], guidance=guidance, temperature=temperature,
                generator=seeded_generator(cpu, seed, 0),
            )  # fmt: skip
            picture: Tensor = model.tokenizer.decode(ids, seeded_generator(cpu, seed, 1), **options)
            return picture[0].cpu()

        return frames(model.tokenizer, decode, self._lock, _evaluations(options), pause)

    def psnr(self, reading: Reading, picture: Tensor) -> float:
        """In dB, on 8-bit values."""
        return picture_psnr(reading.picture, picture)

    def _tokens(self, picture: Tensor) -> list[TokenWords]:
        model = self.tokenizer
        soft = model.encode(picture[None].to(self.loaded.device), return_soft=True, top_words=TOP_WORDS)
        rows = zip(
            soft.ids[0].tolist(),
            soft.words[0].tolist(),
            soft.probabilities[0].tolist(),
            soft.entropy[0].tolist(),
            strict=True,
        )
        return [
            TokenWords(
                token, [(model.words[w], p) for w, p in zip(words, shares, strict=True)], max(entropy, 0.0)
            )
            for token, words, shares, entropy in rows
        ]


def _evaluations(options: Mapping[str, Any]) -> int:
    """Of the velocity field, but for those that a second-order solver adds."""
    settings = decode_options(dict(options))
    return settings.steps * settings.iterations


def load_session(
    checkpoint: str,
    weights: Literal["ema", "raw"] = "ema",
    text_to_image: str | None = None,
    baseline: str | None = None,
) -> Session:
    """A session of checkpoints: .ckpt files or exported folders.

    Raises:
        V2FlowError: an unusable one, or one of another kind than asked for.
    """
    if is_text_to_image(checkpoint):
        raise V2FlowError(
            f"{checkpoint}: expected a tokenizer, found a text-to-image model; name it with --text-to-image"
        )
    tokenizer = LoadedModel(checkpoint, weights)
    other = LoadedModel(baseline, weights) if baseline is not None else None
    painter = load_text_to_image_model(text_to_image) if text_to_image is not None else None
    return Session(tokenizer, painter.to(pick_device()) if painter is not None else None, other)
