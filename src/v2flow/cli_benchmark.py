"""The verb `v2flow benchmark`."""

import argparse
from pathlib import Path
from typing import Any


def add_benchmark_verb(verbs: Any) -> None:
    """Adds the verb to the subparsers of `v2flow`."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "benchmark",
        help="train the rows of a suite and table their figures",
        description="Train every row of a suite that has no result yet, and write a table of all rows.",
    )
    parser.add_argument("suite", type=Path, metavar="SUITE", help="a YAML file; see experiments/benchmark/")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the results; default: benchmarks/results/SUITE"
    )
    parser.add_argument(
        "--runs", type=Path, metavar="DIR", help="folder of the trainings; default: checkpoints/SUITE"
    )
    parser.set_defaults(run=run_benchmark)


def run_benchmark(options: argparse.Namespace) -> None:
    """Runs the suite and prints its table."""
    from v2flow.benchmark import TABLE, read_suite, run_suite, suite_table

    suite = read_suite(options.suite)
    name = options.suite.stem
    out = options.out or Path("benchmarks/results") / name
    out.mkdir(parents=True, exist_ok=True)
    results = run_suite(suite, out, options.runs or Path("checkpoints") / name)
    print(suite_table(suite, results))
    print(f"v2flow: table {out / TABLE}")
