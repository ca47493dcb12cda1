"""What every stage's LightningDataModule shares: shards by split, loaders, positions that can be saved."""

from typing import Any, Optional, Union

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from v2flow.data.batches import EvaluationBatches, Reader, TrainBatches
from v2flow.data.loaders import EvaluationLoader, TrainLoader
from v2flow.data.shard_names import shard_places
from v2flow.data.shards import ShardSet, open_shards
from v2flow.errors import V2FlowError
from v2flow.ranks import world


class StreamingDataModule(LightningDataModule):
    """Streams samples of WebDataset shards in an order that depends on (seed, epoch, position) alone.

    Shards are local paths, `file:`, `http(s):` or `pipe:`, with braces (`train-{000..012}.tar`) and, for local ones,
    wildcards. The order and the saved position do not depend on the number of workers or ranks as long as the global
    batch (batch_size times ranks) stays. What a sample is, the subclasses say.
    """

    def __init__(
        self, *, train: Optional[Union[str, list[str]]], val: Optional[Union[str, list[str]]],
        test: Optional[Union[str, list[str]]], batch_size: int, eval_batch_size: Optional[int], num_workers: int,
        seed: int, captions: bool, val_limit: Optional[int], test_limit: Optional[int], max_bad_samples: int,
        allow_pipe: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        at_least(1, val_limit=val_limit, test_limit=test_limit)
        at_least(0, num_workers=num_workers, max_bad_samples=max_bad_samples, seed=seed)
        self.train, self.val, self.test = train, val, test
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.captions = captions
        self.val_limit, self.test_limit = val_limit, test_limit
        self.max_bad_samples = max_bad_samples
        self.allow_pipe = allow_pipe
        self._opened: dict[str, ShardSet] = {}
        self._train_loader: Optional[TrainLoader] = None

    def reader(self, split: str) -> Reader:
        """Reads the samples of `train`, `val` or `test`."""
        raise NotImplementedError

    def train_batches(self) -> TrainBatches:
        """The shuffled batches of the training shards."""
        raise NotImplementedError

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
            return shard_places(named, self.allow_pipe) if named is not None else set()
        except V2FlowError:
            return set()  # reported where the split is needed

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
        loader = TrainLoader(
            self.train_batches(),
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
        count = len(self.shards(split))
        batches = EvaluationBatches(self.reader(split), min(count, limit or count))
        return EvaluationLoader(
            batches, self.eval_batch_size, self.num_workers, rank, ranks, self.max_bad_samples
        )

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


def at_least(least: int, **options: Optional[int]) -> None:
    """Refuse options of the data module that are below `least`."""
    for name, value in options.items():
        if value is not None and value < least:
            raise V2FlowError(f"option data.{name}: expected at least {least}, found {value}")
