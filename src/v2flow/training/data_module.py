"""The LightningDataModule of every stage: WebDataset shards in, batches of pictures, captions and keys out."""

import hashlib
import os
from typing import Any, Literal, Optional, Union

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from v2flow.data.batches import EvaluationBatches, SampleReader, TrainBatches
from v2flow.data.loaders import EvaluationLoader, TrainLoader
from v2flow.data.shards import ShardSet, expand_shards, open_shards
from v2flow.errors import V2FlowError
from v2flow.ranks import world


class ShardDataModule(LightningDataModule):
    """Streams pictures from WebDataset shards in an order that depends on (seed, epoch, position) alone.

    Batches are {"image": fp32 [B, 3, S, S] in [0, 1], "caption": list[str], "key": list[str]}; in evaluation also
    "valid": bool [B], False for padding. Shards are local paths, `file:`, `http(s):` or `pipe:`, with braces
    (`train-{000..012}.tar`) and, for local ones, wildcards. A picture's shorter side is resized to `image_size`.
    The order and the saved position do not depend on the number of workers or ranks as long as the global batch
    (batch_size times ranks) stays.

    Args:
        image_size: side of the pictures in pixels.
        train: training shards; None if there is no training.
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
        cache_decoded: keep decoded pictures in memory, up to 256 MB for each worker; needs crop=center.
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
        super().__init__()
        _at_least(1, image_size=image_size, batch_size=batch_size, eval_batch_size=eval_batch_size)
        _at_least(1, val_limit=val_limit, test_limit=test_limit)
        _at_least(0, num_workers=num_workers, max_bad_samples=max_bad_samples, seed=seed)
        if crop not in ("center", "random"):
            raise V2FlowError(f"option data.crop: expected center or random, found {crop!r}")
        if cache_decoded and crop == "random":
            raise V2FlowError(
                "option data.cache_decoded: a random crop is decoded anew each time; use crop=center"
            )
        self.image_size = image_size
        self.train, self.val, self.test = train, val, test
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.crop = crop
        self.flip = flip
        self.seed = seed
        self.captions = captions
        self.val_limit, self.test_limit = val_limit, test_limit
        self.max_bad_samples = max_bad_samples
        self.allow_pipe = allow_pipe
        self.cache_decoded = cache_decoded
        self._opened: dict[str, ShardSet] = {}
        self._train_loader: Optional[TrainLoader] = None

    def prepare_data(self) -> None:
        """Once on each machine: indexes the shards, and fetches remote ones that have no manifest."""
        running = self.trainer.state.fn if self.trainer is not None else None
        if running is not None:
            self.setup(str(running.value))

    def setup(self, stage: str) -> None:
        """Opens the shards of a stage: fit, validate or test.

        Raises:
            V2FlowError: shards are not named, missing or damaged, or training and evaluation share one.
        """
        for split in self._splits_of(stage):
            self.shards(split)

    def _splits_of(self, stage: Optional[str]) -> list[str]:
        wanted = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}.get(stage or "", [])
        if wanted and getattr(self, wanted[0]) is None:
            raise V2FlowError(f"option data.{wanted[0]}: no shards are named, but `{stage}` needs them")
        self._refuse_shared_shards()
        return [split for split in wanted if getattr(self, split) is not None]

    def _refuse_shared_shards(self) -> None:
        if self.train is None:
            return
        train = self._places("train")
        for split in ("val", "test"):
            shared = train & self._places(split)
            if shared:
                raise V2FlowError(
                    f"option data.{split}: {min(shared)} is also a training shard; expected held-out pictures "
                    "(to overfit on purpose there is trainer.overfit_batches)"
                )

    def _places(self, split: str) -> set[str]:
        """Shards of a split as far as they are there, local ones by their real path."""
        named = getattr(self, split)
        try:
            names = expand_shards(named, self.allow_pipe) if named is not None else []
        except V2FlowError:
            return set()  # reported where the split is needed
        return {os.path.realpath(name) if os.path.exists(name) else name for name in names}

    def shards(self, split: str) -> ShardSet:
        """The opened shards of `train`, `val` or `test`.

        Raises:
            V2FlowError: no shards are named for it, or see :func:`v2flow.data.shards.open_shards`.
        """
        if split not in self._opened:
            named = getattr(self, split)
            if named is None:
                raise V2FlowError(f"option data.{split}: no shards are named")
            opened = open_shards(named, self.allow_pipe)
            lacking = next(opened.missing("txt", "json"), None) if self.captions else None
            if lacking is not None:
                raise V2FlowError(
                    f"{opened.where(lacking)}: no caption, but captions are required; expected a member txt or json"
                )
            self._opened[split] = opened
        return self._opened[split]

    def train_dataloader(self) -> TrainLoader:
        """This rank's training batches; see :class:`v2flow.data.loaders.TrainLoader`."""
        rank, ranks = world()
        reader = SampleReader(self.shards("train"), self.image_size, self.captions, self.cache_decoded)
        batches = TrainBatches(reader, self.seed, self.crop == "random", self.flip, self.max_bad_samples)
        loader = TrainLoader(
            batches,
            self.batch_size,
            self.num_workers,
            rank,
            ranks,
            repeat=getattr(self.trainer, "overfit_batches", 0) > 0,
            progress=self._batch_progress if self.trainer is not None else None,
        )
        left = loader.total % loader.global_batch
        rank_zero_info(
            f"training data: {loader.total} samples, {len(loader)} batches of {loader.global_batch} an epoch"
            + (f"; the last {left} samples of each epoch's order are left out" if left else "")
        )
        self._train_loader = loader
        return loader

    def val_dataloader(self) -> Union[EvaluationLoader, list]:
        """This rank's validation batches; an empty list if no shards are named."""
        return self._evaluation("val", self.val_limit) if self.val is not None else []

    def test_dataloader(self) -> EvaluationLoader:
        """This rank's test batches."""
        return self._evaluation("test", self.test_limit)

    def _evaluation(self, split: str, limit: Optional[int]) -> EvaluationLoader:
        rank, ranks = world()
        shards = self.shards(split)
        # Workers of an evaluation end with it, and what they keep in memory with them.
        reader = SampleReader(
            shards, self.image_size, self.captions, self.cache_decoded and self.num_workers == 0
        )
        batches = EvaluationBatches(reader, min(len(shards), limit or len(shards)))
        return EvaluationLoader(
            batches, self.eval_batch_size, self.num_workers, rank, ranks, self.max_bad_samples
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

    def _batch_progress(self) -> Any:
        """Lightning's count of this epoch's batches."""
        assert self.trainer is not None
        return self.trainer.fit_loop.epoch_loop.batch_progress.current

    def teardown(self, stage: str) -> None:
        """Ends the workers."""
        if self._train_loader is not None:
            self._train_loader.close()

    def on_exception(self, exception: BaseException) -> None:
        """Ends the workers."""
        self.teardown("")


def _at_least(least: int, **options: Optional[int]) -> None:
    for name, value in options.items():
        if value is not None and value < least:
            raise V2FlowError(f"option data.{name}: expected at least {least}, found {value}")
