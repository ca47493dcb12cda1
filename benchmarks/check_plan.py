"""Is `v2flow plan` right? Measured step times and peak memory of CPU experiments against the plan's estimates.

    python benchmarks/check_plan.py                                   # three experiments, their own batch sizes
    python benchmarks/check_plan.py --config experiments/tokenizer/openmoji-32-vq.yaml --batch-size 8 --rounds 2

All in this process and in turns: the rates of matrix products and of memory, and training steps of each stage on
pictures of noise, after steps that are thrown away. The estimate of a step's time takes the plan's FLOPs and bytes at
the rates of the same rounds; that of its peak memory takes nothing measured. Prints one JSON document as the last line;
`--out` writes it to a file as well.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from v2flow.benchmark.runs import machine
from v2flow.benchmark.subject import Subject, seconds_of
from v2flow.cli_training import build_experiment
from v2flow.metrics.files import write_json
from v2flow.origin import current_commit
from v2flow.planning.estimate import step_seconds
from v2flow.planning.experiment import read_experiment
from v2flow.planning.hardware import this_cpu
from v2flow.planning.memory import ddp_memory, sizes_of
from v2flow.planning.rates import measured_bandwidth, measured_tflops
from v2flow.planning.step import step_costs
from v2flow.planning.training import build_training

EXPERIMENTS = [
    Path("experiments/tokenizer") / f"{name}.yaml"
    for name in ("openmoji-32", "openmoji-32-vq", "openmoji-64")
]
TOLERANCE = 0.25
CPU = torch.device("cpu")


def check(path: Path, batch_size: int | None, rounds: int) -> list[dict[str, Any]]:
    """A row for each stage of an experiment: measured, estimated, and their quotients."""
    experiment = read_experiment(path)
    batch = batch_size or experiment.batch_size
    training = build_training(experiment)
    costs = step_costs(training, batch, bf16=False)
    sizes = sizes_of(training, ema=False)  # the average is a callback's: no trainer runs here
    module, _ = build_experiment(["--config", str(path)])
    subject = Subject(module, batch, CPU)
    rows = []
    for stage in costs:  # the optimiser's state of all stages is there at the end of a training
        subject.step(stage, 0)
    for stage, cost in costs.items():
        seconds, estimates = [], []
        for draw in range(rounds):
            hardware = this_cpu(measured_tflops(3), measured_bandwidth(3))
            estimates.append(step_seconds(cost, hardware, bf16=False, utilisation=1.0).step)
            seconds.append(seconds_of(partial(subject.step, stage, draw), CPU))
        memory = ddp_memory(sizes, cost.activations, devices=1).total
        measured = {"seconds": statistics.median(seconds), "bytes": subject.peak_memory(stage, 1)}
        estimated = {"seconds": statistics.median(estimates), "bytes": memory}
        rows.append({
            "experiment": experiment.name, "stage": stage, "batch_size": batch, "measured": measured,
            "estimated": estimated, "flops": {"plan": cost.flops, "counted": subject.flops(stage, 0)},
            "time_ratio": estimated["seconds"] / measured["seconds"],
            "memory_ratio": estimated["bytes"] / measured["bytes"],
        })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--config", type=Path, action="append", metavar="FILE", help="default: three of OpenMoji"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="default: the experiment's")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the document here")
    options = parser.parse_args()
    start = time.perf_counter()
    rows = []
    for path in options.config or EXPERIMENTS:
        for row in check(path, options.batch_size, options.rounds):
            rows.append(row)
            print(
                f"{row['experiment']} {row['stage']}: {row['measured']['seconds']:.3f} s, estimated "
                f"{row['estimated']['seconds']:.3f}; {row['measured']['bytes'] / 1e6:.0f} MB, estimated "
                f"{row['estimated']['bytes'] / 1e6:.0f}",
                file=sys.stderr,
            )
    within = all(abs(row[name] - 1) <= TOLERANCE for row in rows for name in ("time_ratio", "memory_ratio"))
    document = {
        "tolerance": TOLERANCE, "within": within, "command": ["python", *sys.argv], "commit": current_commit(),
        "machine": machine(torch.get_num_threads()), "rounds": options.rounds,
        "minutes": (time.perf_counter() - start) / 60, "rows": rows,
    }  # fmt: skip
    if options.out is not None:
        write_json(options.out, document)
    print(json.dumps(document))
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
