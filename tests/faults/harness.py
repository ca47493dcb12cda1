"""Runs `v2flow fit` in processes of their own, kills them, resumes them, and compares them with a run in a piece."""

import json
import os
import random
import re
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from recorder import FAULT
from t2i_training_toys import Toys
from training_toys import experiment, write_shards

STAGES = ("tokenizer", "t2i")
MOMENTS = {
    # where -> the latest of its occurrences that is struck
    "batch_start": 14, "batch_end": 14, "forward": 14, "validation": 5, "write": 60, "fsync": 6, "link": 2,
    "replace": 4, "saved": 2, "time": 1500,
}  # fmt: skip


@dataclass
class Tally:
    """What happened in a stage.

    Attributes:
        kills: "SIGNAL at MOMENT" -> how often a run was ended so.
        rounds: trainings that came to their end.
        lines: batches and validations in a training.
        workers: number of data workers -> how often a run was started with them.
        differences: what was not as in the run in a piece, one line each.
    """

    kills: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    lines: int = 0
    workers: Counter[int] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)


def origin(script: str) -> dict[str, Any]:
    """Where a result comes from: the command, the commit, and the machine with the one thread of each training."""
    from v2flow.benchmark.runs import machine
    from v2flow.origin import current_commit

    return {
        "command": ["python", script, *sys.argv[1:]],
        "commit": current_commit(),
        "machine": machine(threads=1),
    }


def write_toys(stage: str, folder: Path) -> dict[str, Any]:
    """A small experiment: six batches an epoch, four of them a step, so that the last step of an epoch has two; a
    validation every five batches, at any place in an accumulation."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = stage == "tokenizer"
    config = experiment(write_shards(folder), folder) if pictures else Toys(folder).experiment(folder)
    config["model"]["init_args"]["optimizer"]["total_steps"] = 8
    config["data"]["eval_batch_size"] = 2
    config["trainer"] |= {"accumulate_grad_batches": 4, "val_check_interval": 5, "enable_progress_bar": False}
    return config


def variant(config: dict[str, Any], folder: Path, number: int) -> str:
    """Writes the experiment into a folder; by their numbers some save after each step, have no validation and save at
    the end of each epoch, or have one that falls together with the epochs' ends."""
    trainer = config["trainer"] | {"val_check_interval": {3: 3, 4: 6, 7: 3}.get(number % 8, 5)}
    last = {"filename": "last", "enable_version_counter": False}
    if number % 2:
        last["every_n_train_steps"] = 1
    checkpoint = "lightning.pytorch.callbacks.ModelCheckpoint"
    callbacks = [
        {"class_path": "recorder.Recorder", "init_args": {"folder": str(folder)}},
        {"class_path": "recorder.Saboteur"},
        {"class_path": "v2flow.training.ema.EMACallback", "init_args": {"decay": 0.9}},
        {"class_path": checkpoint, "init_args": {"monitor": "val/loss", "filename": "best-{step}"}},
        {"class_path": checkpoint, "init_args": last},
    ]
    data = dict(config["data"])
    if number % 4 == 2:
        del callbacks[3]
        data["val"] = None
        last["save_on_train_epoch_end"] = True
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder), "name": "run"},
    }
    whole = config | {
        "trainer": trainer | {"callbacks": callbacks, "logger": logger},
        "data": data,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(whole))
    return str(path)


def in_processes(works: list[Any], log: Path) -> list[int]:
    """Forks a process for each `work()`, and gives their exit statuses; minus the signal's number where one ended it.

    Forks and not new starts: importing PyTorch takes longer than these trainings. The parent must not train itself.
    """
    children = [_fork(work, log) for work in works]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _fork(work: Any, log: Path) -> int:
    child = os.fork()
    if child != 0:
        return child
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = work() or 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def fit(path: str, log: Path, fault: dict[str, Any] | None = None, **options: Any) -> int:
    """`v2flow fit --config PATH --ckpt_path last` in a process; gives its exit status."""
    (status,) = in_processes([fitting(path, fault, {}, **options)], log)
    return status


def fitting(path: str, fault: dict[str, Any] | None, environment: dict[str, str], **options: Any) -> Any:
    """The work of a process that trains.

    Args:
        fault: see `Saboteur`.
        options: further words of the command, with __ for a dot.
    """

    def work() -> int:
        import torch

        from v2flow.cli import main

        torch.set_num_threads(1)
        os.environ.update(environment | {FAULT: json.dumps(fault)})
        words = [f"--{name.replace('__', '.')}={value}" for name, value in options.items()]
        return main(["fit", "--config", path, "--ckpt_path", "last", *words])

    return work


def draw_fault(draws: random.Random) -> dict[str, Any]:
    where = draws.choice(sorted(MOMENTS))
    return {
        "where": where,
        "count": draws.randint(1, MOMENTS[where]),
        "signal": int(draws.choice([signal.SIGKILL, signal.SIGTERM])),
    }


def make_toys(stage: str, folder: Path) -> dict[str, Any]:
    """The experiment of a stage, with its data in FOLDER/STAGE."""
    toys = folder / stage

    def make() -> None:
        config = write_toys(stage, toys)
        (toys / "config.json").write_text(json.dumps(config))

    folder.mkdir(parents=True, exist_ok=True)
    if in_processes([make], folder / f"{stage}.log") != [0]:
        raise RuntimeError(f"no toys were made; see {folder / stage}.log")
    return json.loads((toys / "config.json").read_text())


def run_stage(stage: str, folder: Path, kills: int, seed: int, report: Any = print) -> Tally:
    """Kills runs of a stage at random moments until `kills` of them were killed and each training came to its end.

    Args:
        report: called with a line on each training.
    """
    draws, tally, configs = random.Random(seed), Tally(), {}
    config, toys = make_toys(stage, folder), folder / stage
    while tally.kills.total() < kills:
        number = tally.rounds
        kind = number % 8  # see `variant`
        if kind not in configs:
            configs[kind] = uninterrupted(config, toys / f"whole-{kind}", kind)
        expected = configs[kind]
        before = tally.kills.total()
        run_round(config, toys / f"round-{number}", number, expected, draws, kills - before, tally)
        tally.lines = len(expected)
        report(
            f"{stage} training {number}: {tally.kills.total() - before} kills, "
            f"{len(tally.differences)} differences so far"
        )
    return tally


def uninterrupted(config: dict[str, Any], folder: Path, number: int) -> list[str]:
    """The lines of a run in a piece."""
    status = fit(variant(config, folder, number), folder / "log")
    if status != 0:
        raise RuntimeError(f"the run in a piece ended with {status}; see {folder / 'log'}")
    return lineage(folder)


def run_round(
    config: dict[str, Any], folder: Path, number: int, expected: list[str], draws: random.Random,
    most: int, tally: Tally,
) -> None:  # fmt: skip
    """One training, killed at most `most` times and then let through."""
    path = variant(config, folder, number)
    for struck in range(1000):
        fault, workers = draw_fault(draws) if struck < min(most, 12) else None, draws.randrange(3)
        status = fit(path, folder / "log", fault, data__num_workers=workers)
        tally.workers[workers] += 1
        if status == 0:
            break
        if fault is None or status not in (-fault["signal"], 128 + fault["signal"]):
            tally.differences.append(
                f"{folder.name}: {fault} ended with status {status}; see {folder / 'log'}"
            )
            tally.kills["unexpected"] += 1
            return
        tally.kills[f"{signal.Signals(fault['signal']).name} at {fault['where']}"] += 1
    tally.rounds += 1
    tally.differences += compare(folder, expected)


def compare(folder: Path, expected: list[str], of: Callable[[str], str] = str) -> list[str]:
    """What the surviving line of checkpoints, or any line ever written, has that the run in a piece has not.

    Args:
        of: what is compared of a line.
    """
    expected, found = [of(line) for line in expected], [of(line) for line in lineage(folder)]
    if not (folder / "lineage.json").exists():
        # Lightning ends a training whose last step is made without the validation that was to follow.
        found += [line for line in expected[len(found) :] if line.startswith("val")]
    differences = []
    for index, (one, other) in enumerate(zip(found, expected, strict=False)):
        if one != other:
            differences.append(f"{folder.name}, line {index}: expected {other!r}, found {one!r}")
            break
    if len(found) != len(expected):
        differences.append(f"{folder.name}: expected {len(expected)} lines, found {len(found)}")
    everything = [of(json.loads(line)) for line in (folder / "all.jsonl").read_text().splitlines()]
    foreign = [line for line in everything if not line.startswith("start") and line not in set(expected)]
    differences += [f"{folder.name}: no line of the run in a piece: {line!r}" for line in foreign[:1]]
    return differences


def lineage(folder: Path) -> list[str]:
    """The lines of a finished run. One that was killed after its last step was saved has them in its checkpoint."""
    path = folder / "lineage.json"
    if path.exists():
        return json.loads(path.read_text())
    callbacks = saved_state(folder)["callbacks"]
    return next(state["lines"] for name, state in callbacks.items() if name.startswith("Recorder"))


def saved_state(folder: Path) -> dict[str, Any]:
    """The contents of a training's `last.ckpt`; nothing if there is none."""
    import torch

    paths = sorted(
        folder.glob("run/version_*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime_ns
    )
    return torch.load(paths[-1], weights_only=True) if paths else {}


def without_loss(line: str) -> str:
    """Draws depend on the rank, and with them the losses."""
    return re.sub(r"loss \S+", "", line)
