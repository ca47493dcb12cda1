"""Trains toy tokenizers for an hour under mixed faults, and says whether anything grows.

python tests/faults/soak.py --minutes 60 --out soak.json

One training runs throughout and is measured: its shards come from a server that is slow and fails, a hundredth of its
samples cannot be decoded, and its data workers are killed. Beside it trainings are killed at random and resumed, again
and again. `--out` is written as the soak goes on, so that one that is ended early says what it knows.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

for place in (Path(__file__).parent, Path(__file__).parent.parent):
    sys.path.insert(0, str(place))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import yaml  # noqa: E402
from data_faults import quick_limits  # noqa: E402
from data_toys import encode, write_tar  # noqa: E402
from harness import _fork, fitting, make_toys  # noqa: E402
from server import FaultyServer, serving  # noqa: E402

LIMIT_MB = 20.0
"""Of the upper 95 % bound of the memory's slope, in MB an hour."""
WINDOW = 0.75
"""Share of the soak, its last, that is judged: of an hour, 45 minutes."""
SHARDS, EACH, DAMAGED = 8, 40, 3
CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"


@dataclass
class Soak:
    """What happened so far.

    Attributes:
        events: what was done to the trainings, by kind.
        broken: checkpoints that could not be read, and ends that were not expected; one line each.
    """

    folder: Path
    seed: int
    events: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def count(self, event: str) -> None:
        self.events[event] = self.events.get(event, 0) + 1


# --- statistics ---------------------------------------------------------------------------------------------------


def theil_sen(seconds: np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """Median slope over all pairs, and its lower and upper 95 % bound (Sen 1968), in units an hour.

    Each bound is one-sided, by Kendall's statistic; its variance is enlarged for values that follow their neighbours
    (the lag-1 term of Hamed and Rao 1998).
    """
    first, second = np.triu_indices(len(values), 1)
    slopes = np.sort((values[second] - values[first]) / (seconds[second] - seconds[first])) * 3600.0
    count, slope = len(values), float(np.median(slopes))
    residuals = values - slope / 3600.0 * seconds
    residuals = residuals - residuals.mean()
    spread = float(residuals @ residuals)
    lag = float(np.clip(residuals[1:] @ residuals[:-1] / spread, 0.0, 0.95)) if spread else 0.0
    variance = count * (count - 1) * (2 * count + 5) / 18.0 * (1.0 + lag) / (1.0 - lag)
    ranks = [round((len(slopes) + sign * 1.645 * np.sqrt(variance)) / 2) for sign in (-1, 1)]
    lower, upper = (float(slopes[min(max(rank, 0), len(slopes) - 1)]) for rank in ranks)
    return slope, lower, upper


def judge(samples: list[dict[str, float]], seconds: float, broken: list[str]) -> dict[str, Any]:
    """The verdict on what was measured, over the last three quarters of the soak."""
    begin = samples[0]["seconds"] + (1 - WINDOW) * seconds if samples else 0.0
    kept = [sample for sample in samples if sample["seconds"] >= begin]
    if len(kept) < 30:
        return {"samples": len(kept), "good": None, "why": ["too few measurements", *broken]}
    columns = {name: np.array([sample[name] for sample in kept]) for name in kept[0]}
    slope, _, bound = theil_sen(columns["seconds"], columns["rss_mb"])
    third = len(kept) // 3
    growth = {
        name: float(np.median(columns[name][-third:]) - np.median(columns[name][:third]))
        for name in ("tensors", "descriptors", "processes", "threads")
    }
    # They go up and down with logging and validation: growth is a slope that is positive beyond doubt.
    why = [
        f"{name} grew by {grown:g}"
        for name, grown in growth.items()
        if theil_sen(columns["seconds"], columns[name])[1] > 0
    ]
    if bound >= LIMIT_MB:
        why.append(f"memory grows by up to {bound:.1f} MB an hour")
    return {
        "samples": len(kept),
        "minutes_judged": round(float(np.ptp(columns["seconds"])) / 60, 1),
        "rss_mb_an_hour": round(slope, 2),
        "rss_mb_an_hour_upper_95": round(bound, 2),
        "rss_mb_median": round(float(np.median(columns["rss_mb"])), 1),
        "growth": growth,
        "good": not why and not broken,
        "why": why + broken,
    }


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


def start(path: str, folder: Path) -> int:
    """Forks a process that trains, and gives its number."""
    work = fitting(path, None, {"V2FLOW_CACHE": str(folder / "cache")})

    def limited() -> int:
        quick_limits()
        return work()

    return _fork(limited, folder / "log")


def disturb(
    soak: Soak, folder: Path, trainer: int | None, server: FaultyServer, draws: random.Random
) -> None:
    """Makes the next fetches slow and faulty, forgets what was fetched, and kills the data workers of a training."""
    server.pause = draws.choice([0.0, 0.002, 0.02])
    server.faults = [draws.choice(["500", "503", "cut", "crawl", "", ""]) for _ in range(6)]
    for shard in (folder / "cache" / "shards").glob("*.tar"):
        shard.unlink()
    soak.count("shards forgotten, server slow and faulty")
    for worker in psutil.Process(trainer).children() if trainer is not None else []:
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
        except FileNotFoundError:
            continue  # replaced meanwhile
        except Exception as error:
            reason = reason or repr(error)
        soak.count("checkpoints loaded")
        if reason is not None:
            soak.broken.append(f"{path}: {reason}")


def ended(soak: Soak, status: int, folder: Path, expected: tuple[int, ...]) -> None:
    if status not in expected:
        soak.broken.append(
            f"{folder.name}: expected an end with {expected}, found {status}; see {folder / 'log'}"
        )


# --- the hour -----------------------------------------------------------------------------------------------------


def run(soak: Soak, minutes: float, every: float, out: Path) -> dict[str, Any]:
    """The soak; gives the whole result, which is also in `out`."""
    draws = random.Random(soak.seed)
    config = make_toys("tokenizer", soak.folder)
    write_data(soak.folder / "data")
    long, short = soak.folder / "measured", soak.folder / "killed"
    with serving(soak.folder / "data") as server:
        trainer = start(write_experiment(config, long, server, every), long)
        path = write_experiment(config, short, server, 0.0)
        begun = time.monotonic()
        victim, strike, next_fault, next_report = 0, 0.0, begun + min(60.0, 10 * minutes), begun
        while (now := time.monotonic()) < begun + 60 * minutes and not soak.broken:
            if not victim:
                victim, strike = start(path, short), now + draws.uniform(5.0, 60.0)
            elif now > strike:
                number = draws.choice([signal.SIGKILL, signal.SIGTERM])
                os.kill(victim, number)
                status = os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1])
                ended(soak, status, short, (-number, 128 + number))
                soak.count(f"killed by {number.name}, resumed")
                check_checkpoints(soak, short)
                if draws.random() < 0.5:
                    disturb(soak, short, None, server, draws)
                victim = 0
            if now > next_fault:
                disturb(soak, long, trainer, server, draws)
                next_fault = now + draws.uniform(60.0, 180.0)
            if os.waitpid(trainer, os.WNOHANG)[0]:
                soak.broken.append(f"the measured training has ended; see {long / 'log'}")
                trainer = 0
            if now > next_report:
                report(soak, long, now - begun, out)
                next_report = now + 30.0
            time.sleep(0.5)
        for process, folder in ((trainer, long), (victim, short)):
            if process:
                os.kill(process, signal.SIGTERM)
                status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                ended(soak, status, folder, (143, -15))
    check_checkpoints(soak, long)
    return report(soak, long, time.monotonic() - begun, out)


def report(soak: Soak, folder: Path, seconds: float, out: Path) -> dict[str, Any]:
    """Writes what is known to `out`."""
    gauge = folder / "gauge.jsonl"
    lines = gauge.read_text().rpartition("\n")[0].splitlines() if gauge.is_file() else []
    samples = [json.loads(line) for line in lines]
    result = {
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
