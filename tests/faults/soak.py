"""Trains toy tokenizers for an hour under mixed faults, and says whether anything grows.

python tests/faults/soak.py --minutes 60 --out soak.json

One training runs throughout and is measured: its shards come from a server that is slow and fails, a hundredth of its
samples cannot be decoded, and its data workers are killed. Beside it trainings are killed at random and resumed, again
and again. `--out` is written as the soak goes on, so that one that is ended early says what it knows. What comes with
the first validation is warm-up, and is not judged. The memory's slope needs most of an hour to be known to 20 MB.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

for place in (Path(__file__).parent, Path(__file__).parent.parent):
    sys.path.insert(0, str(place))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import yaml  # noqa: E402
from data_faults import quick_limits  # noqa: E402
from data_toys import encode, write_tar  # noqa: E402
from harness import _fork, fitting, make_toys, origin  # noqa: E402
from server import FaultyServer, serving  # noqa: E402
from verdict import LIMIT_MB, judge  # noqa: E402

SHARDS, EACH, DAMAGED = 8, 40, 3
CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"


@dataclass
class Soak:
    """What happened so far.

    Attributes:
        events: what was done to the trainings, by kind.
        broken: checkpoints that could not be read, and ends that were not expected; one line each.
        running: the process that trains in a folder.
        origin: command, commit and machine.
    """

    folder: Path
    seed: int
    events: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    running: dict[Path, int] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=lambda: origin("tests/faults/soak.py"))

    def count(self, event: str) -> None:
        self.events[event] = self.events.get(event, 0) + 1


# --- trainings ----------------------------------------------------------------------------------------------------


def write_data(folder: Path) -> None:
    """Shards of random pictures, a hundredth of which cannot be decoded."""
    draws = np.random.default_rng(0)
    bad = set(draws.choice(SHARDS * EACH, DAMAGED, replace=False).tolist())
    for shard in range(SHARDS):
        members = []
        for number in range(shard * EACH, (shard + 1) * EACH):
            data = encode(draws.integers(0, 256, (16, 16, 3), np.uint8))
            members.append((f"s{number:05d}.png", data[: len(data) // 2] if number in bad else data))
        write_tar(folder / f"train-{shard:06d}.tar", members)


def write_experiment(config: dict[str, Any], folder: Path, server: FaultyServer, every: float) -> str:
    """A training without end that validates, saves and logs often; it measures itself if `every` is given."""
    whole = deepcopy(config)
    whole["model"]["init_args"]["optimizer"]["total_steps"] = 10**7
    whole["data"] |= {
        "train": f"{server.url}/train-{{000000..{SHARDS - 1:06d}}}.tar", "num_workers": 1, "crop": "random",
        "flip": True, "max_bad_samples": DAMAGED,
    }  # fmt: skip
    last = {"filename": "last", "enable_version_counter": False, "every_n_train_steps": 50}
    callbacks: list[dict[str, Any]] = [
        {"class_path": "v2flow.training.ema.EMACallback", "init_args": {"decay": 0.99}},
        {"class_path": CHECKPOINT, "init_args": {"monitor": "val/loss", "filename": "best-{step}"}},
        {"class_path": CHECKPOINT, "init_args": last},
    ]
    if every:
        gauge = {"file": str(folder / "gauge.jsonl"), "every": every}
        callbacks.append({"class_path": "gauge.Gauge", "init_args": gauge})
    whole["trainer"] |= {
        "accumulate_grad_batches": 2, "val_check_interval": 70, "log_every_n_steps": 20, "callbacks": callbacks,
        "logger": config["trainer"]["logger"] | {"init_args": {"save_dir": str(folder), "name": "run"}},
    }  # fmt: skip
    folder.mkdir(parents=True)
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(whole))
    return str(path)


def start(soak: Soak, folder: Path) -> None:
    """Forks a process that trains the experiment in a folder."""
    work = fitting(str(folder / "experiment.yaml"), None, {"V2FLOW_CACHE": str(folder / "cache")})

    def limited() -> int:
        from v2flow.data import http

        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        quick_limits()
        http.LIMITS = replace(http.LIMITS, retries=20)  # more than there are faults in a row
        return work()

    soak.running[folder] = _fork(limited, folder / "log")


def stop(soak: Soak, folder: Path, number: signal.Signals) -> None:
    """Sends a signal to the training in a folder, which must end by it and leave checkpoints that load."""
    process = soak.running.pop(folder)
    os.kill(process, number)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status not in (-number, 128 + number):
        soak.broken.append(
            f"{folder.name}: expected an end by {number.name}, found {status}; see {folder / 'log'}"
        )
    check_checkpoints(soak, folder)


@contextmanager
def no_survivors(soak: Soak) -> Iterator[None]:
    """No training outlives the soak, however it ends."""
    try:
        yield
    finally:
        for process in soak.running.values():
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def disturb(soak: Soak, folder: Path, server: FaultyServer, draws: random.Random) -> None:
    """Makes the next fetches slow and faulty, forgets what was fetched, and kills the data workers of a training."""
    server.pause = draws.choice([0.0, 0.002, 0.02])
    server.faults = [draws.choice(["500", "503", "cut", "crawl", "", ""]) for _ in range(6)]
    for shard in (folder / "cache" / "shards").glob("*.tar"):
        shard.unlink()
    soak.count("shards forgotten, server slow and faulty")
    if folder in soak.running:
        for worker in psutil.Process(soak.running[folder]).children():
            with suppress(psutil.NoSuchProcess):  # one of a validation that has ended meanwhile
                worker.kill()
                soak.count("data workers killed")


def check_checkpoints(soak: Soak, folder: Path) -> None:
    """Every checkpoint that has a final name must load."""
    import torch

    from v2flow.training.checkpoint_files import damage

    for path in folder.glob("run/version_*/checkpoints/*.ckpt"):
        reason = damage(path)
        try:
            torch.load(path, weights_only=True)
        except Exception as error:
            reason = reason or repr(error)
        soak.count("checkpoints loaded")
        if reason is not None:
            soak.broken.append(f"{path}: {reason}")


# --- the hour -----------------------------------------------------------------------------------------------------


def run(soak: Soak, minutes: float, every: float, out: Path) -> dict[str, Any]:
    """The soak; gives the whole result, which is also in `out`."""
    draws = random.Random(soak.seed)
    config = make_toys("tokenizer", soak.folder)
    write_data(soak.folder / "data")
    long, short = soak.folder / "measured", soak.folder / "killed"
    with serving(soak.folder / "data") as server, no_survivors(soak):
        write_experiment(config, long, server, every)
        write_experiment(config, short, server, 0.0)
        start(soak, long)
        begun = time.monotonic()
        strike, next_fault, next_report = 0.0, begun + min(60.0, 10 * minutes), begun
        while (now := time.monotonic()) < begun + 60 * minutes and not soak.broken:
            if short not in soak.running:
                start(soak, short)
                strike = now + draws.uniform(5.0, 60.0)
            elif now > strike:
                number = draws.choice([signal.SIGKILL, signal.SIGTERM])
                stop(soak, short, number)
                soak.count(f"killed by {number.name}, resumed")
                if draws.random() < 0.5:
                    disturb(soak, short, server, draws)
            if now > next_fault:
                disturb(soak, long, server, draws)
                next_fault = now + draws.uniform(60.0, 180.0)
            if os.waitpid(soak.running[long], os.WNOHANG)[0]:
                del soak.running[long]
                soak.broken.append(f"the measured training has ended; see {long / 'log'}")
            if now > next_report:
                report(soak, long, now - begun, out)
                next_report = now + 30.0
            time.sleep(0.5)
        for folder in list(soak.running):
            stop(soak, folder, signal.SIGTERM)
    return report(soak, long, time.monotonic() - begun, out)


def report(soak: Soak, folder: Path, seconds: float, out: Path) -> dict[str, Any]:
    """Writes what is known to `out`."""
    gauge = folder / "gauge.jsonl"
    lines = gauge.read_text().rpartition("\n")[0].splitlines() if gauge.is_file() else []
    samples = [json.loads(line) for line in lines]
    result = {
        **soak.origin,
        "seed": soak.seed, "minutes": round(seconds / 60, 2), "limit_mb_an_hour": LIMIT_MB, "events": soak.events,
        "verdict": judge(samples, seconds, soak.broken), "samples": samples,
    }  # fmt: skip
    partial = out.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(out)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Train under mixed faults; exit status 1 if anything grows or breaks."
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two measurements")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the trainings are left to be looked at"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # Imported once; each training is a fork of this process.
    import v2flow.cli_training
    import v2flow.training.tokenizer_module  # noqa: F401

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        result = run(Soak(folder, options.seed), options.minutes, options.every, options.out)
    print(json.dumps({name: value for name, value in result.items() if name != "samples"}))
    return 0 if result["verdict"]["good"] else 1


if __name__ == "__main__":
    sys.exit(main())
