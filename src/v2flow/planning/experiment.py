"""What an experiment file says of a training, read by the real command line; nothing of it is loaded or built."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v2flow.cli_experiment import TEXT_TO_IMAGE
from v2flow.cli_training import TrainingCLI, experiment_cli
from v2flow.data.shards import open_shards
from v2flow.errors import V2FlowError
from v2flow.ranks import nearest_batch
from v2flow.training.ddp import BUFFER_OPTIONS, LOCAL_BUFFERS

AUTO_DEVICES = 8
"""Devices of a node where the experiment says `auto`."""


@dataclass
class Experiment:
    """An experiment as its file and options describe it.

    Attributes:
        name: the file's, without folder and suffix.
        path: of the file.
        model: class path of its LightningModule.
        options: its `init_args`, plain values.
        config: everything, as the command line read it.
        parser: which reads and instantiates it.
        steps: optimiser steps of the recipe.
        batch_size: samples of a step on one device.
        accumulate: batches of one optimiser step.
        devices: of a node.
        nodes: of the run.
        bf16: whether it runs in mixed precision.
        ema: whether averaged weights are kept.
        local_buffers: whether DDP leaves buffers to the ranks, and does not broadcast them before each step.
    """

    name: str
    path: Path
    model: str
    options: dict[str, Any]
    config: Any
    parser: Any
    steps: int
    batch_size: int
    accumulate: int
    devices: int
    nodes: int
    bf16: bool
    ema: bool
    local_buffers: bool

    @property
    def text_to_image(self) -> bool:
        """Whether it trains an LLM to draw."""
        return self.model.rpartition(".")[2] == TEXT_TO_IMAGE


class _ReadingCLI(TrainingCLI):
    """Reads and checks, and makes nothing."""

    def _set_seed(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass


def read_experiment(path: str | Path, changes: Sequence[str] = ()) -> Experiment:
    """Reads an experiment file.

    Args:
        changes: `OPTION=VALUE` as for `v2flow fit --OPTION=VALUE`.

    Raises:
        V2FlowError: what the command line finds wrong with it, or a length of training that no steps say.
    """
    path = Path(path)
    if not path.is_file():
        raise V2FlowError(
            f"option --config: {path}: no such file; see experiments/tokenizer/ and experiments/t2i/"
        )
    words = ["--config", str(path), *(f"--{change.removeprefix('--')}" for change in changes)]
    cli = experiment_cli(words, _ReadingCLI)
    config: Any = cli.config
    trainer = config.trainer
    options = config.model.init_args.as_dict()
    callbacks = trainer.callbacks or []
    devices = trainer.devices
    return Experiment(
        name=path.stem,
        path=path,
        model=config.model.class_path,
        options=options,
        config=config,
        parser=cli.parser,
        steps=_steps(path, trainer.max_steps, options),
        batch_size=config.data.batch_size,
        accumulate=trainer.accumulate_grad_batches or 1,
        devices=_count(devices),
        nodes=trainer.num_nodes,
        bf16=str(trainer.precision or "").startswith(("bf16", "16")),
        ema=any(callback.class_path.endswith("EMACallback") for callback in callbacks),
        local_buffers=_local_buffers(trainer.strategy),
    )


def _count(devices: Any) -> int:
    """Number of `trainer.devices`: a number, a list of devices also as text, or auto."""
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]
    if isinstance(devices, list):
        return len(devices)
    return int(devices) if str(devices).isdigit() else AUTO_DEVICES


def _local_buffers(strategy: Any) -> bool:
    """Whether a strategy, a name or a class with options, is a DDP that does not broadcast buffers."""
    if isinstance(strategy, str):
        return strategy == LOCAL_BUFFERS
    options = strategy.init_args.as_dict() if "init_args" in strategy else {}
    return any(options.get(name) is False for name in BUFFER_OPTIONS)


def _steps(path: Path, max_steps: int, options: dict[str, Any]) -> int:
    steps = max_steps if max_steps > 0 else (options.get("optimizer") or {}).get("total_steps", 0)
    if steps < 1:
        raise V2FlowError(
            f"{path}: option trainer.max_steps: expected the number of steps of the training, found {max_steps}; set it"
        )
    return int(steps)


def check_global_batch(experiment: Experiment, batch_size: int, world: int) -> int | None:
    """Samples of the training shards, if they are on this machine; None if they are not.

    Raises:
        V2FlowError: a batch of all devices together that is larger than the training set.
    """
    named = experiment.config.data.train
    if not named:
        return None
    try:
        samples = len(open_shards(named, progress=False)) if _local(named) else 0
    except V2FlowError:  # not built yet
        return None
    if not samples:
        return None
    if batch_size * world > samples:
        raise V2FlowError(
            f"{experiment.path}: {world} devices with {batch_size} samples each take {batch_size * world} a step, but "
            f"its training shards hold {samples}; "
            f"{nearest_batch(samples, batch_size, world, '--batch-size')}"
        )
    return samples


def _local(named: Any) -> bool:
    names = [named] if isinstance(named, str) else named
    return not any("://" in name or name.startswith("pipe:") for name in names)
