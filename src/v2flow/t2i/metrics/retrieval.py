"""Generative retrieval: does the model find a picture likeliest under its own caption, among captions of others?"""

import math
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from v2flow.errors import V2FlowError
from v2flow.metrics.scene_verifier import satisfies
from v2flow.t2i.metrics.samples import CaptionedSamples
from v2flow.tokenizer import inference
from v2flow.training.module import seeded_generator


def retrieval_accuracy(
    model: Any, samples: CaptionedSamples, ways: int = 16, seed: int = 0, pictures: int | None = None,
    progress: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Share of pictures whose true caption gives them the highest likelihood among `ways` captions.

    The other captions are drawn from `samples`, one for each of `ways` - 1 other groups; a group is as likely as any
    other. They all read differently and are untrue of the picture: none is drawn whose picture has the same ids, or
    that the verifier finds true of the picture's scene. A tie is wrong. Each picture costs one pass over `ways`
    sequences.

    Args:
        model: has `log_likelihood(captions, ids [B, N]) -> [B]`.
        pictures: only the first so many are scored; captions are still drawn from all.
        seed: of the draws; a picture's captions do not depend on how many pictures are scored.

    Returns:
        `accuracy` in [0, 1], `accuracy_se` (binomial), `chance` = 1 / `ways`, `ways`, `pictures`.

    Raises:
        V2FlowError: too few groups for so many captions.
    """
    count = min(len(samples), pictures or len(samples))
    right = 0
    with inference(model):
        for index in tqdm(range(count), "retrieval", unit="picture", disable=not progress):
            captions = [samples.captions[i] for i in [index, *distractors(samples, index, ways, seed)]]
            found = model.log_likelihood(captions, samples.ids[index].expand(ways, -1))
            right += is_first(found)
    accuracy = right / count
    error = math.sqrt(accuracy * (1 - accuracy) / count)
    return {
        "accuracy": accuracy, "accuracy_se": error, "chance": 1 / ways, "ways": ways, "pictures": count
    }  # fmt: skip


def is_first(likelihoods: Tensor) -> bool:
    """Whether the first of `[ways]` is above all others; equal ones, and what is no number, are not below it."""
    return bool((likelihoods[0] > likelihoods[1:]).all())


def distractors(samples: CaptionedSamples, index: int, ways: int, seed: int) -> list[int]:
    """Numbers of `ways` - 1 samples of different groups whose captions are untrue of picture `index`.

    Raises:
        V2FlowError: there are not so many groups, or `ways` is below 2.
    """
    if ways < 2:
        raise V2FlowError(f"option ways: expected at least 2, found {ways}")
    generator = seeded_generator(torch.device("cpu"), seed, index)
    groups = [group for group in samples.members if group != samples.groups[index]]
    chosen: list[int] = []
    read = {samples.captions[index]}
    for place in torch.randperm(len(groups), generator=generator).tolist():
        candidates = samples.members[groups[place]]
        number = candidates[int(torch.randint(len(candidates), (), generator=generator))]
        if samples.captions[number] not in read and _untrue(samples, index, number):
            chosen.append(number)
            read.add(samples.captions[number])
        if len(chosen) == ways - 1:
            return chosen
    raise V2FlowError(
        f"retrieval: expected {ways - 1} further groups with captions untrue of {samples.keys[index]}, found "
        f"{len(chosen)}; add samples or lower option ways"
    )


def _untrue(samples: CaptionedSamples, picture: int, caption: int) -> bool:
    """Whether the caption of one sample does not fit the picture of another."""
    if samples.scenes is not None:
        return not satisfies(samples.scenes[picture].objects, samples.scenes[caption])
    return not torch.equal(samples.ids[picture], samples.ids[caption])
