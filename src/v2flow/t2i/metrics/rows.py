"""The pictures that are compared: generated ones, and what stands beside them as floor, control and ceiling."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from v2flow.decoding import decode_options
from v2flow.errors import V2FlowError
from v2flow.metrics.reconstruction import to_uint8
from v2flow.t2i.generation import generate_ids, generation_options
from v2flow.t2i.metrics.marginal import sample_marginal
from v2flow.t2i.metrics.samples import CaptionedSamples
from v2flow.t2i.text_to_image import MEAN
from v2flow.training.module import seeded_generator

GENERATED, SHUFFLED, WORDS, MARGINAL, UNTRAINED, RECONSTRUCTED, NEAREST, REAL = (
    "generated", "captions_shuffled", "words_shuffled", "marginal_ids", "untrained", "reconstructed",
    "nearest_training_picture", "real",
)  # fmt: skip
_IDS, _NOISE, _MARGINAL, _ORDER, _WORDS = range(5)  # purposes of draws, keyed with the seed


@dataclass(frozen=True)
class Drawing:
    """How pictures are made of captions.

    Attributes:
        options: fields of `GenerationOptions`.
        decode: fields of `DecodeOptions`.
        batch_size: captions at a time; it decides which noise of the decoder a picture gets.
        seed: of all draws; every row starts from it anew.
        draws: how often `generated` and `words_shuffled` are drawn, each time with the next seed. More of them make
            the distances of sets surer, whose captions are few.

    Raises:
        V2FlowError: an option that is unknown or out of range.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    decode: Mapping[str, Any] = field(default_factory=lambda: dict(MEAN))
    batch_size: int = 16
    seed: int = 0
    draws: int = 1

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise V2FlowError(f"option draws: expected at least 1, found {self.draws}")
        generation_options(self.options)
        decode_options(dict(self.decode))

    def generator(self, purpose: int) -> torch.Generator:
        """A source of draws on the CPU, whatever the model is on."""
        return seeded_generator(torch.device("cpu"), self.seed, purpose)

    def again(self) -> list["Drawing"]:
        """One for each draw."""
        return [replace(self, seed=self.seed + turn, draws=1) for turn in range(self.draws)]

    def draw(self, model: Any, captions: Sequence[str]) -> Tensor:
        """Pictures uint8 `[n, 3, S, S]` of captions."""
        generator = self.generator(_IDS)
        ids = generate_ids(
            model, captions, batch_size=self.batch_size, generator=generator, **dict(self.options)
        )
        return self.pictures(model.tokenizer, ids)

    def pictures(self, tokenizer: Any, ids: Tensor) -> Tensor:
        """Pictures uint8 `[n, 3, S, S]` of ids `[n, N]`."""
        place = tokenizer.visual_vocabulary.codes.device
        noise = self.generator(_NOISE)
        parts = [
            to_uint8(tokenizer.decode(part.to(place), noise, **dict(self.decode))).cpu()
            for part in ids.split(self.batch_size)
        ]
        return torch.cat(parts)


def draw_rows(
    model: Any, samples: CaptionedSamples, drawing: Drawing, *, marginal: Tensor | None = None,
    untrained: Any = None, progress: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Pictures uint8 `[n, 3, S, S]` of each row, one for each sample; of the first two `[draws * n, 3, S, S]`, every
    sample once, then every one once more, and so on.

    - `generated`: of the captions.
    - `words_shuffled`: of captions whose words were dealt out anew among all of them, see `deal_words`; no such row if
      one of these became too long.
    - `marginal_ids`: of ids drawn from the training marginal at each position.
    - `untrained`: of the captions, by the model before its training.
    - `reconstructed`: the tokenizer's, of the true ids: what no generator of these ids surpasses.

    Args:
        marginal: counts `[N, K]` of `marginal_ids`; without them there is no such row.
        untrained: the model before training; without it there is no such row.
    """
    turns = drawing.again()
    steps: dict[str, Callable[[], Tensor]] = {
        GENERATED: lambda: torch.cat([turn.draw(model, samples.captions) for turn in turns])
    }
    dealt = [deal_words(samples.captions, turn.generator(_WORDS)) for turn in turns]
    if all(_fit(model, captions) for captions in dealt):
        steps[WORDS] = lambda: torch.cat(
            [turn.draw(model, captions) for turn, captions in zip(turns, dealt, strict=True)]
        )
    if marginal is not None:
        ids = sample_marginal(marginal, len(samples), drawing.generator(_MARGINAL))
        steps[MARGINAL] = lambda: drawing.pictures(model.tokenizer, ids)
    if untrained is not None:
        steps[UNTRAINED] = lambda: drawing.draw(untrained, samples.captions)
    steps[RECONSTRUCTED] = lambda: drawing.pictures(model.tokenizer, samples.ids)
    bar = tqdm(steps.items(), "draw", unit="row", disable=not progress)
    return {name: make() for name, make in bar}


def shuffled_order(count: int, drawing: Drawing) -> Tensor:
    """A cyclic permutation of `count` in random order, `[count]`: nothing stays at its place if there are two."""
    order = torch.randperm(count, generator=drawing.generator(_ORDER))
    shuffled = torch.empty(count, dtype=torch.long)
    shuffled[order] = order.roll(1)
    return shuffled


def _fit(model: Any, captions: Sequence[str]) -> bool:
    try:
        model.caption_ids(captions)
    except V2FlowError:
        return False
    return True


def deal_words(captions: Sequence[str], generator: torch.Generator) -> list[str]:
    """The captions with all their words dealt out anew: as many to each as it had, and the same words in all."""
    words = [word for caption in captions for word in caption.split()]
    order = iter(torch.randperm(len(words), generator=generator).tolist())
    return [" ".join(words[next(order)] for _ in caption.split()) for caption in captions]
