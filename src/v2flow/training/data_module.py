"""The LightningDataModule of pictures: WebDataset shards in, batches of pictures, captions and keys out."""

import hashlib
from typing import Literal, Optional, Union

from v2flow.data.batches import Reader, SampleReader, TrainBatches
from v2flow.data.latents import LatentFormat, LatentReader, stored_format
from v2flow.errors import V2FlowError
from v2flow.training.streaming import StreamingDataModule, at_least


class ShardDataModule(StreamingDataModule):
    """Streams pictures from WebDataset shards in an order that depends on (seed, epoch, position) alone.

    Batches are {"image": fp32 [B, 3, S, S] in [0, 1], "caption": list[str], "key": list[str]}; in evaluation also
    "valid": bool [B], False for padding. Shards are local paths, `file:`, `http(s):` or `pipe:`, with braces
    (`train-{000..012}.tar`) and, for local ones, wildcards. A picture's shorter side is resized to `image_size`.
    The order and the saved position do not depend on the number of workers or ranks as long as the global batch
    (batch_size times ranks) stays.

    Training shards may also be cached latents (`v2flow data latents`): training batches then have {"latents": fp32
    [B, C, h, w]} in place of the pictures, in the same order, and the same ones of them are of mirror images.

    Args:
        image_size: side of the pictures in pixels.
        train: training shards, of pictures or cached latents; None if there is no training.
        val: validation shards; None for no validation. Never taken from the training shards.
        test: test shards; None if there is no test.
        batch_size: pictures in a training batch of one rank; the last partial global batch of an epoch is dropped.
        eval_batch_size: pictures in a validation or test batch of one rank; None for batch_size.
        num_workers: processes that read and decode; 0 does it in the training process.
        crop: which square of a training picture; evaluation always takes the centre.
        flip: flip training pictures horizontally, half of the time.
        seed: of the order, the crops and the flips.
        captions: whether captions are required; if not, missing ones are empty strings.
        val_limit: only the first so many validation samples.
        test_limit: only the first so many test samples.
        max_bad_samples: undecodable samples that are skipped and logged before it is an error.
        allow_pipe: accept shards `pipe:COMMAND`, which run a shell command.
        cache_decoded: keep decoded pictures in memory, up to 256 MB for each worker; needs crop=center. Cached latents
            need no decoding and are read each time.
    """

    def __init__(
        self,
        image_size: int,
        train: Optional[Union[str, list[str]]] = None,
        val: Optional[Union[str, list[str]]] = None,
        test: Optional[Union[str, list[str]]] = None,
        batch_size: int = 32,
        eval_batch_size: Optional[int] = None,
        num_workers: int = 0,
        crop: Literal["center", "random"] = "center",
        flip: bool = False,
        seed: int = 0,
        captions: bool = False,
        val_limit: Optional[int] = None,
        test_limit: Optional[int] = None,
        max_bad_samples: int = 10,
        allow_pipe: bool = False,
        cache_decoded: bool = False,
    ) -> None:
        super().__init__(
            train=train, val=val, test=test, batch_size=batch_size, eval_batch_size=eval_batch_size,
            num_workers=num_workers, seed=seed, captions=captions, val_limit=val_limit, test_limit=test_limit,
            max_bad_samples=max_bad_samples, allow_pipe=allow_pipe,
        )  # fmt: skip
        at_least(1, image_size=image_size)
        if crop not in ("center", "random"):
            raise V2FlowError(f"option data.crop: expected center or random, found {crop!r}")
        if cache_decoded and crop == "random":
            raise V2FlowError(
                "option data.cache_decoded: a random crop is decoded anew each time; use crop=center"
            )
        self.image_size = image_size
        self.crop = crop
        self.flip = flip
        self.cache_decoded = cache_decoded
        self._formats: dict[str, Optional[LatentFormat]] = {}

    def setup(self, stage: str) -> None:
        """Opens the shards of a stage: fit, validate or test.

        Raises:
            V2FlowError: see `StreamingDataModule`; also cached latents where they do not serve.
        """
        super().setup(stage)
        for split in self._opened:
            self._latents_of(split)

    @property
    def latents(self) -> Optional[LatentFormat]:
        """How the latents in the training shards are stored; None for pictures."""
        return self._latents_of("train")

    def _latents_of(self, split: str) -> Optional[LatentFormat]:
        if split not in self._formats:
            form = stored_format(self.shards(split))
            if form is not None:
                self._refuse_latents(split, form)
            self._formats[split] = form
        return self._formats[split]

    def _refuse_latents(self, split: str, form: LatentFormat) -> None:
        if split != "train":
            raise V2FlowError(
                f"option data.{split}: expected pictures, which the metrics need, found cached latents; name the "
                "shards of pictures"
            )
        if self.crop == "random":
            raise V2FlowError(
                "option data.crop: expected center with cached latents, which are of centre crops, found random"
            )
        if self.flip and not form.flip:
            raise V2FlowError(
                "option data.flip: the cached latents have none of mirror images; set it to false, or build them "
                "with --flip"
            )

    def reader(self, split: str) -> Reader:
        """Reads the pictures of `train`, `val` or `test`, or the cached latents of `train`."""
        form = self._latents_of(split)
        if form is not None:
            return LatentReader(self.shards(split), form, self.captions)
        # Workers of an evaluation end with it, and what they keep in memory with them.
        cache = self.cache_decoded and (split == "train" or self.num_workers == 0)
        return SampleReader(self.shards(split), self.image_size, self.captions, cache)

    def train_batches(self) -> TrainBatches:
        """The shuffled batches of the training shards, augmented."""
        return TrainBatches(
            self.reader("train"), self.seed, self.crop == "random", self.flip, self.max_bad_samples
        )

    def eval_fingerprint(self, split: str) -> str:
        """SHA-256 that names a set of evaluation pictures: keys in their order, count, size and crop."""
        shards = self.shards(split)
        limit = {"val": self.val_limit, "test": self.test_limit}.get(split)
        count = min(len(shards), limit or len(shards))
        digest = hashlib.sha256(f"crop=center size={self.image_size} count={count}\n".encode())
        for sample in range(count):
            digest.update(shards.key(sample).encode() + b"\n")
        return digest.hexdigest()
