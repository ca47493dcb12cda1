"""Faults that are put into a training process before `v2flow fit` runs in it: at a batch, in a worker, in the clock."""

import multiprocessing
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Prepare = Callable[[], None]
"""Called in the process that will train."""


def before_batch(number: int, action: Callable[[], None]) -> Prepare:
    """Do something just before the `number`-th training batch is made, in the process that makes it."""

    def prepare() -> None:
        from v2flow.data.batches import TrainBatches

        build, made = TrainBatches._build, iter(range(1, 1 << 30))

        def counted(self: Any, request: Any) -> Any:
            if next(made) == number:
                action()
            return build(self, request)

        TrainBatches._build = counted  # type: ignore[method-assign]

    return prepare


def in_step(number: int, action: Callable[[Any], Any]) -> Prepare:
    """Hand what the training step returns through `action`, from the `number`-th call on."""

    def prepare() -> None:
        from v2flow.training.tokenizer_module import TokenizerModule

        step, made = TokenizerModule.training_step, iter(range(1, 1 << 30))

        def changed(self: Any, *arguments: Any) -> Any:
            result = step(self, *arguments)
            return action(result) if next(made) >= number else result

        TokenizerModule.training_step = changed  # type: ignore[method-assign]

    return prepare


def quick_watch() -> None:
    """PyTorch looks for dead workers every five seconds; five times a second here."""
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as Workers

    Workers._try_get_data.__defaults__ = (0.2,)  # type: ignore[attr-defined]


def kill_workers(batches: set[int]) -> Prepare:
    """Kill one of the data workers after each of these training batches."""

    def prepare() -> None:
        from v2flow.data.loaders import TrainLoader

        quick_watch()
        served, handed = TrainLoader.__iter__, iter(range(1, 1 << 30))

        def watched(self: Any) -> Iterator[Any]:
            for batch in served(self):
                if next(handed) in batches:
                    os.kill(random.choice(multiprocessing.active_children()).pid or 0, signal.SIGKILL)
                yield batch

        TrainLoader.__iter__ = watched  # type: ignore[method-assign]

    return prepare


def jumping_clock() -> None:
    """The wall clock jumps by up to three days, back and forth, at each look at it."""
    import tqdm.std

    real, draws = time.time, random.Random(0)

    def jumping() -> float:
        return real() + draws.uniform(-3, 3) * 86400

    time.time = tqdm.std.time = jumping  # type: ignore[assignment]


def little_memory() -> None:
    """No more than 64 MB of address space beyond what is in use."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))


def little_files() -> None:
    """No file may grow beyond 40 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path | None]:
    """A file system of its own in memory; None where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(words, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def make_read_only(folder: Path) -> None:
    """Of a disk of :func:`small_disk`."""
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Writes FOLDER/filler until the disk is full."""
    try:
        with open(folder / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError:
        return
