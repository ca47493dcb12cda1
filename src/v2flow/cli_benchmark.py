"""The verb `v2flow benchmark`."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from v2flow.errors import V2FlowError


def add_benchmark_verb(verbs: Any) -> None:
    """Adds the verb to the subparsers of `v2flow`."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "benchmark",
        help="train and score the rows of a suite and report on them",
        description="Train and score every row of a suite that has no result yet, then write results.json, README.md "
        "and report.html of all of them. A finished row is not run again, a killed one continues.",
    )
    parser.add_argument("suite", type=Path, metavar="SUITE", help="a YAML file; see experiments/benchmark/")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the results; default: results/SUITE"
    )
    parser.add_argument(
        "--runs", type=Path, metavar="DIR", help="folder of the trainings; default: checkpoints/SUITE"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="rows at once; default: 1")
    parser.add_argument(
        "--plan", action="store_true", help="check the suite, measure what its rows cost, and train nothing"
    )
    parser.add_argument(
        "--report", action="store_true", help="write the report of what is there, and train nothing"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write results.json here; with --plan, what the rows are made of and what they cost",
    )
    parser.set_defaults(run=run_benchmark)


def run_benchmark(options: argparse.Namespace) -> None:
    """Runs the suite, and writes its report after every row."""
    from v2flow.benchmark.plan import plan_suite
    from v2flow.benchmark.report import suite_document, write_report
    from v2flow.benchmark.runs import kept_results, run_rows
    from v2flow.benchmark.suite import read_suite
    from v2flow.metrics.files import write_json

    if options.jobs < 1:
        raise V2FlowError(f"option --jobs: expected at least 1, found {options.jobs}")
    suite = read_suite(options.suite)
    out: Path = options.out or Path("results") / suite.name
    out.mkdir(parents=True, exist_ok=True)
    plan = plan_suite(suite, out, measure=not options.report)
    if options.plan:
        if options.json is not None:
            rows = {name: asdict(facts) for name, facts in plan.facts.items()}
            write_json(options.json, {"rows": rows, "overhead": plan.overhead})
        return
    if options.report:
        results = kept_results(suite, plan, out)
        write_report(suite, plan, results, out)
    else:
        runs = options.runs or Path("checkpoints") / suite.name
        results = run_rows(
            suite, plan, out, runs, options.jobs, lambda results: write_report(suite, plan, results, out)
        )
    if options.json is not None:
        write_json(options.json, suite_document(suite, plan, results))
    print(f"v2flow: report {out / 'README.md'}, {out / 'report.html'}")
