"""Part `data`: do training steps wait for the shards?"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speed_parts.options import CPU, Options
from speed_parts.turns import take_turns
from v2flow.benchmark.subject import Subject
from v2flow.cli_training import build_experiment
from v2flow.data.shapes import build_shapes

SHARDS, CACHED = "from shards", "one batch in memory"
AHEAD = 4
"""Batches that a worker of `v2flow.data.loaders.TrainLoader` makes ready (its `prefetch_factor`)."""


def measure(options: Options) -> dict[str, Any]:
    """Training steps on the next batch of the experiment's loader against the same steps on one batch in memory.

    The loader is the experiment's own: its workers, crops and flips. What its workers made ready during the other
    way's steps is thrown away before a turn, so the shards have to keep up with the steps. `epochs` says how often the
    loader went through its pictures: with `cache_decoded` the first time is the slow one.
    """
    with tempfile.TemporaryDirectory() as folder:
        shards = options.data
        if options.smoke and shards is None:
            build_shapes(folder, train=16, val=4, test=4, size=16, progress=False)
            shards = str(Path(folder) / "train-*.tar")
        return _measure(options, shards)


def _measure(options: Options, shards: str | None) -> dict[str, Any]:
    words = ["--config", str(options.experiment), *(f"--{change}" for change in options.all_changes)]
    module, data = build_experiment(words + ([f"--data.train={shards}"] if shards else []))
    subject = Subject(module, data.batch_size, CPU)
    loader = data.train_dataloader()
    batches, stage = _Endless(loader), next(iter(subject.stages))
    cached = next(batches)["image"]

    def steps(images: Callable[[], Any]) -> Callable[[int], None]:
        def run(draw: int) -> None:
            for number in range(options.steps_a_round):
                subject.images = images()
                subject.step(stage, draw * options.steps_a_round + number)

        return run

    ways = {SHARDS: steps(lambda: next(batches)["image"]), CACHED: steps(lambda: cached)}
    ahead = {SHARDS: lambda: batches.drop(AHEAD * data.num_workers)}
    try:
        turns = take_turns(ways, options.rounds // 2 + 1, prepare=ahead)
    finally:
        data.teardown("fit")
    flops = options.steps_a_round * sum(subject.flops(stage, draw) for draw in range(3)) / 3
    return {
        "pictures": loader.total,
        "batch_size": data.batch_size,
        "workers": data.num_workers,
        "cache_decoded": bool(getattr(data, "cache_decoded", False)),
        "epochs": batches.taken / len(loader),
        "steps_a_round": options.steps_a_round,
        "products_flops_per_second": turns.products(),
        "rows": {name: turns.row(name, flops) for name in (SHARDS, CACHED)},
        "shards_to_cached": turns.ratio(SHARDS, CACHED),
    }


class _Endless:
    """The batches of a loader, epoch after epoch."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.taken = loader, 0
        self.batches = iter(loader)

    def __next__(self) -> dict[str, Any]:
        self.taken += 1
        try:
            return next(self.batches)
        except StopIteration:
            self.batches = iter(self.loader)
            return next(self.batches)

    def drop(self, count: int) -> None:
        """Throw away the next batches."""
        for _ in range(count):
            next(self)
