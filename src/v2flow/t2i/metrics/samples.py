"""Held-out captions with their pictures' visual tokens, from token shards or from captioned picture shards."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from v2flow.data.batches import EvaluationBatches, SampleReader
from v2flow.data.loaders import EvaluationLoader
from v2flow.data.manifest import FIELDS
from v2flow.data.openmoji import group_of
from v2flow.data.scenes import Scene, scene_from_json
from v2flow.data.shapes import render
from v2flow.data.shard_names import Shards
from v2flow.data.shards import ShardSet, open_shards
from v2flow.data.tokens import TokenReader, check_source, source_of
from v2flow.errors import V2FlowError
from v2flow.metrics.reconstruction import to_uint8

_IMAGE, _JSON = (FIELDS.index(name) for name in ("image", "json"))


@dataclass(frozen=True)
class CaptionedSamples:
    """Captions and what belongs to them, in the order of the shards.

    Attributes:
        keys: names of the samples.
        captions: texts.
        groups: samples of one group have captions that say the same.
        ids: visual token ids `[n, N]` long on the CPU.
        pictures: uint8 `[n, 3, S, S]`; None where the shards hold none and no scene tells how they look.
        scenes: what each picture shows, for the verifier; None for other data than scenes.
    """

    keys: Sequence[str]
    captions: Sequence[str]
    groups: Sequence[str]
    ids: Tensor
    pictures: Tensor | None = None
    scenes: Sequence[Scene] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def members(self) -> dict[str, list[int]]:
        """Group -> numbers of its samples."""
        found: dict[str, list[int]] = {}
        for number, group in enumerate(self.groups):
            found.setdefault(group, []).append(number)
        return found

    def first(self, count: int) -> "CaptionedSamples":
        """The first `count` samples, or all."""
        return replace(
            self, keys=self.keys[:count], captions=self.captions[:count], groups=self.groups[:count],
            ids=self.ids[:count], pictures=None if self.pictures is None else self.pictures[:count],
            scenes=None if self.scenes is None else self.scenes[:count],
        )  # fmt: skip

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the keys, the captions and the ids, each in their order."""
        parts = {
            "keys": "\n".join(self.keys).encode(),
            "captions": "\n".join(self.captions).encode(),
            "ids": self.ids.contiguous().numpy().tobytes(),
        }
        return {f"{name}_sha256": hashlib.sha256(part).hexdigest() for name, part in parts.items()}


def read_samples(
    data: Shards, tokenizer: Any, *, limit: int | None = None, batch_size: int = 64, num_workers: int = 0,
    allow_pipe: bool = False,
) -> CaptionedSamples:  # fmt: skip
    """The first `limit` samples of shards, or all.

    Args:
        data: token shards of `v2flow data tokens`, or captioned pictures, which are encoded now.
        tokenizer: the V2Flow tokenizer of the model.
        batch_size: pictures encoded at a time; the ids do not depend on it.
        allow_pipe: accept shards `pipe:COMMAND`.

    Raises:
        V2FlowError: no sample, a sample without caption, or token shards of another tokenizer.
    """
    if limit is not None and limit < 1:
        raise V2FlowError(f"option limit: expected at least 1, found {limit}")
    shards = open_shards(data, allow_pipe)
    count = min(len(shards), limit or len(shards))
    parts = list(encoded_batches(shards, tokenizer, count, batch_size, num_workers))
    if not any(len(part["key"]) for part in parts):
        raise V2FlowError(
            "evaluation: the data held no sample; expected at least one caption with its picture"
        )
    keys = [key for part in parts for key in part["key"]]
    captions = [caption for part in parts for caption in part["caption"]]
    scenes = None
    if (
        len(keys) == count
    ):  # else a picture could not be decoded, and numbers are no longer those of the shards
        found = [_scene(shards, sample) for sample in range(count)]
        scenes = [scene for scene in found if scene is not None]
    whole = scenes is not None and len(scenes) == count
    return CaptionedSamples(
        keys, captions, [scene_group(s) for s in scenes] if whole and scenes else _groups(keys, captions),
        torch.cat([part["ids"] for part in parts]),
        torch.cat([part["image"] for part in parts]) if "image" in parts[0] else None,
        scenes if whole else None,
    )  # fmt: skip


def encoded_batches(
    shards: ShardSet, tokenizer: Any, count: int, batch_size: int = 64, num_workers: int = 0,
    pictures: bool = True,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Batches {"ids": long [b, N], "caption", "key", perhaps "image": uint8 [b, 3, S, S]} of the first samples.

    Undecodable pictures are left out.

    Args:
        pictures: draw the scenes of token shards, so that there are pictures as well.

    Raises:
        V2FlowError: token shards of another tokenizer.
    """
    if holds_tokens(shards):
        check_source(shards, source_of(tokenizer))
        yield from token_batches(
            shards, tokenizer.config.image_size if pictures else None, count, batch_size, num_workers
        )
        return
    place = tokenizer.visual_vocabulary.codes.device
    for batch in picture_batches(shards, tokenizer.config.image_size, count, batch_size, num_workers):
        images = batch["image"]
        ids = (
            tokenizer.encode(images.to(place)).cpu()
            if len(images)
            else torch.empty(0, tokenizer.num_tokens).long()
        )
        yield batch | {"ids": ids, "image": to_uint8(images)}


def picture_batches(
    shards: ShardSet, size: int, count: int, batch_size: int = 64, num_workers: int = 0
) -> Iterator[dict[str, Any]]:
    """Batches {"image": [b, 3, S, S] in [0, 1], "caption", "key"} of picture shards, undecodable ones left out."""
    reader = SampleReader(shards, size, captions=True)
    for batch in EvaluationLoader(EvaluationBatches(reader, count), batch_size, num_workers, max_bad=count):
        yield _valid(batch, "image")


def token_batches(
    shards: ShardSet, size: int | None, count: int, batch_size: int = 64, num_workers: int = 0
) -> Iterator[dict[str, Any]]:
    """Batches {"ids": long [b, N], "caption", "key"} of token shards.

    Args:
        size: side of the pictures "image", uint8 [b, 3, S, S], that scenes are drawn as; None for no pictures.
    """
    drawn = size is not None and holds_scenes(shards)
    start = 0
    for batch in EvaluationLoader(EvaluationBatches(TokenReader(shards), count), batch_size, num_workers):
        part = _valid(batch, "ids")
        if drawn and size is not None:
            samples = range(start, start + len(part["key"]))
            part["image"] = torch.stack([_drawn(shards, sample, size) for sample in samples])
        start += batch_size
        yield part


def _valid(batch: dict[str, Any], tensor: str) -> dict[str, Any]:
    rows = batch["valid"].nonzero().squeeze(1).tolist()
    part = {name: [batch[name][row] for row in rows] for name in ("caption", "key")}
    return part | {tensor: batch[tensor][rows]}


def holds_scenes(shards: ShardSet) -> bool:
    """Whether the first sample is a scene of `v2flow data shapes`."""
    return _scene(shards, 0) is not None


def holds_tokens(shards: ShardSet) -> bool:
    """Whether the first sample has no picture: then these are token shards, or of no use."""
    return shards.read(0, _IMAGE) is None


def scene_group(scene: Scene) -> str:
    """What a scene's caption says, in whatever words: `left: red ring, small square`."""
    nouns = [" ".join(word for word in (d.size, d.colour, d.shape, d.place) if word) for d in scene.demands]
    return f"{scene.relation}: {', '.join(nouns if scene.relation else sorted(nouns))}"


def _groups(keys: Sequence[str], captions: Sequence[str]) -> list[str]:
    """Of OpenMoji, what skin-tone variants share; of other data each caption is a group."""
    try:
        return [group_of(key) for key in keys]
    except ValueError:  # the keys are not code points
        return list(captions)


def _scene(shards: ShardSet, sample: int) -> Scene | None:
    """The scene of a sample; None if its json, or the lack of it, is not one of `v2flow data shapes`."""
    text = shards.read(sample, _JSON)
    try:
        value = json.loads(text) if text is not None else None
    except ValueError:
        return None
    if not isinstance(value, dict) or "demands" not in value:
        return None
    return scene_from_json(text or b"", shards.where(sample))


def _drawn(shards: ShardSet, sample: int, size: int) -> Tensor:
    """Picture uint8 [3, S, S] of a sample that is a scene."""
    scene = _scene(shards, sample)
    if scene is None:
        raise V2FlowError(
            f"{shards.where(sample)}: expected a scene as in the first sample, found none; do not mix data sets"
        )
    return torch.from_numpy(render(scene, size)).permute(2, 0, 1)
