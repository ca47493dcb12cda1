"""Whole batches as pure functions of a request: what a loader's workers run."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from v2flow.data.decode import BadSampleError, decode_caption, decode_image, square_crop
from v2flow.data.manifest import FIELDS
from v2flow.data.order import LengthBucketedOrder, ShuffledOrder, keyed_uniform
from v2flow.data.shards import ShardSet, TooLargeError
from v2flow.errors import V2FlowError

CACHE_BYTES = 256 << 20
_IMAGE, _TXT, _JSON = (FIELDS.index(name) for name in ("image", "txt", "json"))
# Purposes of random draws; with (seed, epoch, position) they key every draw.
_CROP, _FLIP = 101, 102


@dataclass(frozen=True)
class Request:
    """A batch of one rank: positions first … first + count - 1 of an epoch's order."""

    epoch: int
    first: int
    count: int


@dataclass
class Batch:
    """What a worker hands over.

    Attributes:
        tensors: by name, such as `image`, uint8 [B, 3, S, S]; see `Reader.stack`.
        valid: bool [B].
        bad: messages of samples that were skipped, by sample number.
        error: a mistake in the data that ends the run; the batch is empty then.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    caption: list[str] = field(default_factory=list)
    key: list[str] = field(default_factory=list)
    valid: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    bad: dict[int, str] = field(default_factory=dict)
    error: str | None = None


class Reader(ABC):
    """Reads single samples: captions, and what a kind of shards holds beside them.

    Args:
        captions: whether a sample without caption is an error; else its caption is the empty string.
    """

    def __init__(self, shards: ShardSet, captions: bool) -> None:
        self.shards = shards
        self.captions = captions

    @abstractmethod
    def content(self, sample: int, place: float = 0.5) -> np.ndarray:
        """What is learned of a sample.

        Args:
            place: where along the longer side of a picture it is cropped, in [0, 1].

        Raises:
            BadSampleError: there is nothing that can be used.
        """

    def member(self, sample: int, field: int) -> bytes | None:
        """A member's bytes, or None if the sample has none; see `ShardSet.read`.

        Raises:
            BadSampleError: it is too large.
        """
        try:
            return self.shards.read(sample, field)
        except TooLargeError as error:
            raise BadSampleError(error.reason) from error

    def mirrored(self, content: np.ndarray) -> np.ndarray:
        """The content of a picture's mirror image, if there are pictures."""
        raise NotImplementedError

    @abstractmethod
    def blank(self) -> np.ndarray:
        """What stands for a sample that cannot be used."""

    @abstractmethod
    def stack(self, contents: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """The tensors of a batch, by name; uint8 stands for numbers in [0, 1]."""

    def caption(self, sample: int) -> str:
        """The caption.

        Raises:
            V2FlowError: captions are required and this sample has none.
        """
        try:
            txt = self.member(sample, _TXT)
            caption = decode_caption(txt, self.member(sample, _JSON) if txt is None else None)
        except BadSampleError as error:
            if self.captions:
                raise V2FlowError(f"{self.shards.where(sample)}: {error}") from error
            caption = None
        if not caption and self.captions:
            raise V2FlowError(
                f"{self.shards.where(sample)}: no caption; expected a member txt, or a field 'caption' in json"
            )
        return caption or ""

    def batch(self, samples: Sequence[int], contents: Sequence[np.ndarray], valid: np.ndarray) -> Batch:
        """Collates contents with the captions and keys of their samples."""
        return Batch(
            self.stack(contents),
            [self.caption(sample) for sample in samples],
            [self.shards.key(sample) for sample in samples],
            torch.from_numpy(valid),
        )


class SampleReader(Reader):
    """Reads, decodes and crops pictures.

    Args:
        captions: see `Reader`.
        cache: keep decoded centre crops in memory, up to `CACHE_BYTES` in each process.
    """

    def __init__(
        self, shards: ShardSet, image_size: int, captions: bool = False, cache: bool = False
    ) -> None:
        super().__init__(shards, captions)
        self.image_size = image_size
        self._room = CACHE_BYTES if cache else 0
        self._decoded: dict[int, np.ndarray] = {}

    def content(self, sample: int, place: float = 0.5) -> np.ndarray:
        """uint8 [S, S, 3]; see :func:`v2flow.data.decode.square_crop`.

        Raises:
            BadSampleError: no picture, or one that cannot be decoded.
        """
        picture = self._decoded.get(sample)
        if picture is None:
            data = self.member(sample, _IMAGE)
            if data is None:
                raise BadSampleError(
                    "no member jpg, jpeg, png or webp (does its file name have a second dot?)"
                )
            picture = square_crop(decode_image(data), self.image_size, place)
            if self._room >= picture.nbytes:
                self._decoded[sample] = picture
                self._room -= picture.nbytes
        return picture

    def mirrored(self, content: np.ndarray) -> np.ndarray:
        """The mirror image of decoded content [H, W, C]."""
        return content[:, ::-1]

    def blank(self) -> np.ndarray:
        """White, uint8 [S, S, 3]."""
        return np.full((self.image_size, self.image_size, 3), 255, np.uint8)

    def stack(self, contents: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """{"image": uint8 [B, 3, S, S]}."""
        stacked = np.stack(contents).transpose(0, 3, 1, 2)
        return {"image": torch.from_numpy(np.ascontiguousarray(stacked))}


class TrainBatches(Dataset):
    """Batches of the shuffled order. A sample that cannot be decoded is replaced by the next good one of the order.

    Args:
        order: made anew in every process.
        random_crop, flip: augmentations of pictures, drawn anew for each (seed, epoch, position).
        max_bad: more bad samples than this in one batch end the run at once.
        length_window: samples of the order that are sorted by the length of their captions, see
            `LengthBucketedOrder`; 0 for none.
    """

    def __init__(
        self, reader: Reader, seed: int, random_crop: bool, flip: bool, max_bad: int, length_window: int = 0
    ) -> None:
        self.reader = reader
        self.seed = seed
        self.random_crop = random_crop
        self.flip = flip
        self.max_bad = max_bad
        self.length_window = length_window
        self._order: ShuffledOrder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_order": None}

    @property
    def order(self) -> ShuffledOrder:
        """The order of samples."""
        if self._order is None:
            shards = self.reader.shards
            self._order = (
                LengthBucketedOrder(shards.sizes, self.seed, shards.caption_bytes(), self.length_window)
                if self.length_window
                else ShuffledOrder(shards.sizes, self.seed)
            )
        return self._order

    @cached_property
    def facts(self) -> dict[str, int | str]:
        """What the order depends on beside the seed, as plain values.

        Not where the shards lie, nor their bytes: copies of them, and latents of their pictures, have the same order.
        """
        shards = self.reader.shards
        digest = hashlib.sha256()
        for shard in shards.shards:
            digest.update(f"{len(shard.index)}\n".encode() + shard.index.keys.tobytes())
        if self.length_window:
            digest.update(shards.caption_bytes().tobytes())
        return {
            "shards": len(shards.shards),
            "total": len(shards),
            "length_window": self.length_window,
            "order_sha256": digest.hexdigest(),
        }

    def __getitem__(self, request: Request) -> Batch:
        try:
            return self._build(request)
        except V2FlowError as error:  # an exception would come out of a worker as a page of traceback
            return Batch(error=str(error))

    def _build(self, request: Request) -> Batch:
        positions = np.arange(request.first, request.first + request.count)
        places = keyed_uniform(positions, self.seed, request.epoch, _CROP) if self.random_crop else None
        flips = keyed_uniform(positions, self.seed, request.epoch, _FLIP) < 0.5 if self.flip else None
        bad: dict[int, str] = {}
        chosen, contents = [], []
        wanted = self.order.samples(request.epoch, request.first, request.first + request.count).tolist()
        for row, sample in enumerate(wanted):
            place = 0.5 if places is None else float(places[row])
            sample, content = self._first_good(request, int(positions[row]), sample, place, bad)
            chosen.append(sample)
            contents.append(self.reader.mirrored(content) if flips is not None and flips[row] else content)
        batch = self.reader.batch(chosen, contents, np.ones(request.count, bool))
        batch.bad = bad
        return batch

    def _first_good(
        self, request: Request, position: int, sample: int, place: float, bad: dict[int, str]
    ) -> tuple[int, np.ndarray]:
        """The sample at a position, or the next one of the epoch (from its end on, of its start) that decodes."""
        while True:
            try:
                return sample, self.reader.content(sample, place)
            except BadSampleError as error:
                bad[sample] = f"{self.reader.shards.where(sample)}: {error}"
            if len(bad) > min(self.max_bad, len(self.order) - 1):
                raise V2FlowError(too_many(bad.values(), self.max_bad))
            position = (position + 1) % len(self.order)
            sample = int(self.order.samples(request.epoch, position, position + 1)[0])


class EvaluationBatches(Dataset):
    """Batches of the first `count` samples in their own order: centre crop, no flip.

    Positions from `count` on are padding, with the last sample again; it and undecodable samples are not `valid`.
    """

    def __init__(self, reader: Reader, count: int) -> None:
        self.reader = reader
        self.count = count

    def __getitem__(self, request: Request) -> Batch:
        try:
            return self._build(request)
        except V2FlowError as error:
            return Batch(error=str(error))

    def _build(self, request: Request) -> Batch:
        positions = np.arange(request.first, request.first + request.count)
        valid = positions < self.count
        samples = np.minimum(positions, self.count - 1).tolist()
        bad: dict[int, str] = {}
        contents: list[np.ndarray] = []
        for row, sample in enumerate(samples):
            if sample in bad or (not valid[row] and contents):
                valid[row] = False
                contents.append(contents[-1])
                continue
            try:
                contents.append(self.reader.content(sample))
            except BadSampleError as error:
                bad[sample] = f"{self.reader.shards.where(sample)}: {error}"
                valid[row] = False
                contents.append(self.reader.blank())
        batch = self.reader.batch(samples, contents, valid)
        batch.bad = bad
        return batch


def too_many(messages: Iterable[str], limit: int) -> str:
    """The error line when bad samples exceed the limit; names the last one."""
    listed = list(messages)
    return (
        f"{listed[-1]}: that makes {len(listed)} bad samples, more than max_bad_samples={limit}; "
        "see `v2flow data validate`"
    )
