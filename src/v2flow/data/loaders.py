"""Loaders of whole batches: for training, with a position that can be saved; for evaluation, padded and masked."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from v2flow.data.batches import Batch, EvaluationBatches, Request, TrainBatches, too_many
from v2flow.errors import V2FlowError, first_line
from v2flow.ranks import nearest_batch

_log = logging.getLogger(__name__)

MAX_DEATHS = 3
"""Deaths of workers without a batch in between that end a run."""


class _Requests(Sampler):
    """The requests of the next pass, set before the workers start on it."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


def _same(batch: Any) -> Any:
    return batch


class _Workers:
    """Runs requests in their order, request i in worker i mod W, and keeps the account of bad samples.

    A batch is a function of its request alone, so what a killed worker had in hand is made again by a new one.
    """

    def __init__(self, dataset: Dataset, num_workers: int, max_bad: int, persistent: bool) -> None:
        self._dataset = dataset
        self._num_workers = num_workers
        self._persistent = persistent and num_workers > 0
        self._requests = _Requests()
        self._max_bad = max_bad
        self._bad: dict[int, str] = {}
        self._loader = self._new_loader()

    def _new_loader(self) -> DataLoader:
        return DataLoader(
            self._dataset,
            batch_size=None,
            sampler=self._requests,
            num_workers=self._num_workers,
            collate_fn=_same,
            persistent_workers=self._persistent,
            prefetch_factor=4 if self._num_workers > 0 else None,
            generator=torch.Generator().manual_seed(0),  # else each pass draws from the global generator
        )

    def run(self, requests: list[Request]) -> Iterator[Batch]:
        """Batches of the requests.

        Raises:
            V2FlowError: a mistake in the data, more than `max_bad` undecodable samples, or workers that die again
                and again.
        """
        for batch in self._batches(requests):
            if batch.error is not None:
                raise V2FlowError(batch.error)
            for sample, message in batch.bad.items():
                if sample not in self._bad:
                    self._bad[sample] = message
                    _log.warning("skipped: %s (%d so far)", message, len(self._bad))
            if len(self._bad) > self._max_bad:
                raise V2FlowError(too_many(self._bad.values(), self._max_bad))
            yield batch

    def _batches(self, requests: list[Request]) -> Iterator[Batch]:
        done = deaths = 0
        while done < len(requests):
            self._requests.requests = requests[done:]
            try:
                batches = iter(self._loader)
                _leave_dead_workers_to_us()
                while done < len(requests):
                    batch = next(batches)
                    done, deaths = done + 1, 0
                    if done == len(requests):  # Lightning asks for no more: now they end, unless persistent
                        del batches
                    yield batch
                return
            except (RuntimeError, OSError, EOFError) as error:
                if self._num_workers == 0 or not _is_a_death(error):
                    raise
                deaths += 1
                if deaths > MAX_DEATHS:
                    raise V2FlowError(
                        f"data workers: {deaths} were killed without a batch in between ({first_line(error)}), maybe "
                        "for lack of memory; lower data.num_workers or data.batch_size and resume with --ckpt_path last"
                    ) from error
                _log.warning("a data worker was killed (%s): its batches are made again", first_line(error))
            self._loader = self._new_loader()


def _is_a_death(error: BaseException) -> bool:
    """Whether a worker is dead: PyTorch says so, or a connection to it broke while a batch was fetched from it.

    What a worker itself raises comes with the story of where it was caught.
    """
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    return "in DataLoader worker process" not in str(error)


def _leave_dead_workers_to_us() -> None:
    """PyTorch's handler of SIGCHLD raises an error on a dead worker wherever the training happens to be."""
    if threading.current_thread() is not threading.main_thread():
        return
    if str(getattr(signal.getsignal(signal.SIGCHLD), "__module__", "")).startswith("torch."):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _as_dict(batch: Batch, pinned: bool = False) -> dict[str, Any]:
    tensors = {name: _numbers(tensor, pinned) for name, tensor in batch.tensors.items()}
    return {**tensors, "caption": batch.caption, "key": batch.key}


def _numbers(tensor: torch.Tensor, pinned: bool) -> torch.Tensor:
    """Pictures in [0, 1], and others as they are; in pinned memory, from which a GPU copies while it computes."""
    if tensor.dtype != torch.uint8:
        return tensor.pin_memory() if pinned else tensor
    return torch.empty_like(tensor, dtype=torch.float, pin_memory=pinned).copy_(tensor).div_(255.0)


class TrainLoader:
    """One rank's batches {"image": fp32 [B, 3, S, S] in [0, 1], "caption": B strings, "key": B strings}, or of other
    tensors than pictures, as the reader stacks them.

    Global batch i of an epoch is positions i·G … (i+1)·G-1 of its order, G = batch_size · ranks; rank r has the
    r-th part. The last, partial global batch is dropped. The state is (seed, epoch, samples consumed by all
    ranks); each pass is an epoch, and starts where a loaded state says. Tensors are in pinned memory where there
    is CUDA.

    Args:
        batches: what to serve.
        rank, ranks: of this process.
        repeat: every epoch has the order and the draws of epoch 0 (to overfit batches).
        progress: a Lightning tracker whose `processed` counts the batches trained on in this epoch, so that a
            batch handed out and then lost to an interruption does not count; None counts those handed out.

    Raises:
        V2FlowError: fewer samples than one global batch.
    """

    def __init__(
        self,
        batches: TrainBatches,
        batch_size: int,
        num_workers: int = 0,
        rank: int = 0,
        ranks: int = 1,
        repeat: bool = False,
        progress: Callable[[], Any] | None = None,
    ) -> None:
        self.batches = batches
        self.batch_size = batch_size
        self.rank = rank
        self.global_batch = batch_size * ranks
        self.total = len(batches.order)
        if self.total < self.global_batch:
            raise V2FlowError(
                f"training shards: {self.total} samples are fewer than one batch of {self.global_batch}; "
                f"{nearest_batch(self.total, batch_size, ranks, 'data.batch_size')}"
            )
        self._repeat = repeat
        self._progress = progress
        self._num_workers = num_workers
        self._workers: _Workers | None = None
        self._set(0, 0)

    def __len__(self) -> int:
        return self.total // self.global_batch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A generator: nothing is decided or started before the first batch is asked for.
        if (self.total - self._start) < self.global_batch:
            self._set(self._epoch + 1, 0)
        tracker = self._tracker()
        self._base = tracker.processed if tracker else 0
        self._handed_out = 0
        if self._workers is None:
            self._workers = _Workers(self.batches, self._num_workers, self.batches.max_bad, persistent=True)
        pinned = torch.cuda.is_available()
        for batch in self._workers.run(self._rest_of_epoch()):
            self._handed_out += 1
            yield _as_dict(batch, pinned)
        if tracker is None:
            self._set(self._epoch + 1, 0)

    def _rest_of_epoch(self) -> list[Request]:
        epoch = 0 if self._repeat else self._epoch
        firsts = range(self._start, self.total - self.global_batch + 1, self.global_batch)
        return [Request(epoch, first + self.rank * self.batch_size, self.batch_size) for first in firsts]

    def _set(self, epoch: int, start: int) -> None:
        self._epoch, self._start = epoch, start
        self._handed_out = self._base = 0

    def _tracker(self) -> Any:
        return self._progress() if self._progress is not None else None

    def set_epoch(self, epoch: int) -> None:
        """The next pass begins at the start of this epoch; no effect if the loader stands in it already."""
        if epoch != self._epoch:
            self._set(epoch, 0)

    @property
    def batch_sampler(self) -> "_EpochReceiver":
        """Where Lightning looks for `set_epoch`."""
        return _EpochReceiver(self)

    def state_dict(self) -> dict[str, int | str]:
        """{"seed", "epoch", "samples"}, samples consumed in this epoch by all ranks together, and the facts of the
        order; see `TrainBatches.facts`."""
        trained = self._handed_out
        tracker = self._tracker()
        if tracker is not None and self._handed_out:
            trained = min(trained, max(tracker.processed - self._base, 0))
        samples = self._start + trained * self.global_batch
        return {"seed": self.batches.seed, "epoch": self._epoch, "samples": samples, **self.batches.facts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at a saved position, also one saved with another number of ranks or another batch size.

        Raises:
            V2FlowError: the state belongs to another order: another seed, other samples or another length_window.
        """
        difference = _difference(state, {"seed": self.batches.seed, **self.batches.facts})
        if difference:
            raise V2FlowError(f"{difference}; resume with the same, or start a new run with --init-from")
        self._set(state["epoch"], min(state["samples"], self.total))
        tracker = self._tracker()
        if (
            tracker is not None
            and state["samples"]
            and tracker.processed * self.global_batch != state["samples"]
        ):
            # Another global batch: the trainer must count in the new batches, or it would end the epoch early.
            shift = len(self) - len(self._rest_of_epoch()) - tracker.processed
            for name in ("ready", "started", "processed", "completed"):
                setattr(tracker, name, getattr(tracker, name) + shift)

    def close(self) -> None:
        """Ends the workers; a later pass starts new ones."""
        self._workers = None


def _difference(saved: dict[str, Any], found: dict[str, Any]) -> str:
    """How the order of a checkpoint is not the one found; empty if it is. Early checkpoints say the seed alone."""
    saved = {name: saved.get(name, value) for name, value in found.items()}
    for name in ("seed", "length_window"):
        if saved[name] != found[name]:
            return f"option data.{name}: the checkpoint was trained with {saved[name]}, found {found[name]}"
    trained = "option data.train: the checkpoint was trained on"
    was, now = (f"{facts['total']} samples (shards: {facts['shards']})" for facts in (saved, found))
    if was != now:
        return f"{trained} {was}, found {now}"
    if saved["order_sha256"] != found["order_sha256"]:
        return f"{trained} {was}, found as many with other keys, captions or in another order"
    return ""


class _EpochReceiver:
    """Lightning calls `loader.batch_sampler.sampler.set_epoch`; a `sampler` of the loader itself it would replace."""

    def __init__(self, loader: TrainLoader) -> None:
        self.sampler = loader


class EvaluationLoader:
    """One rank's part of the first `count` samples, in order, with "valid": bool [B] beside the training keys.

    Every rank has the same number of batches of the same size; what is not `valid` is padding or could not be
    decoded, and must be left out of every figure. Over the ranks each sample is valid at most once.
    """

    def __init__(
        self,
        batches: EvaluationBatches,
        batch_size: int,
        num_workers: int = 0,
        rank: int = 0,
        ranks: int = 1,
        max_bad: int = 0,
    ) -> None:
        self.batches = batches
        self.batch_size = batch_size
        self._rank, self._ranks = rank, ranks
        self._num_workers = num_workers
        self._max_bad = max_bad

    def __len__(self) -> int:
        return -(-self.batches.count // (self.batch_size * self._ranks))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        size = self.batch_size
        requests = [Request(0, (i * self._ranks + self._rank) * size, size) for i in range(len(self))]
        workers = _Workers(self.batches, self._num_workers, self._max_bad, persistent=False)
        for batch in workers.run(requests):
            yield _as_dict(batch) | {"valid": batch.valid}
