"""Trains and scores the rows of a suite, each in processes of its own, and keeps what is finished.

A row's result belongs to the words and to the experiment file that made it: another command, or another content of
the file, is another result. A killed training goes on from its last checkpoint; one that is only scored in another way
is not run again.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from v2flow.benchmark.plan import Plan
from v2flow.benchmark.processes import HeldRow, RowProcesses, holding, stopped_together
from v2flow.benchmark.suite import Row, Suite, evaluate_command, fit_command, words_sha256
from v2flow.errors import V2FlowError
from v2flow.metrics.files import write_json
from v2flow.origin import current_commit
from v2flow.training.checkpoint_files import newest_checkpoint

Result = dict[str, Any]


def run_rows(
    suite: Suite, plan: Plan, out: Path, runs: Path, jobs: int, report: Callable[[list[Result]], None]
) -> list[Result]:
    """Trains and scores every row and seed that has no result yet.

    Args:
        out: folder of the results: a JSON file a row and seed, and a strip of pictures.
        runs: folder of the trainings themselves, with their checkpoints and logs.
        jobs: rows at once; the threads of the suite, or the cores shared among them, are each one's.
        report: called with all results so far after each row.

    Returns:
        The results in the order of the suite, seed by seed.

    Raises:
        V2FlowError: a training failed; rows that were finished are kept.
        KeyboardInterrupt: after Ctrl-C; the processes of the rows at work have ended, trainings with a checkpoint.
        SystemExit: likewise after SIGTERM, with status 143.
    """
    pairs = [(row, seed) for seed in suite.seeds for row in plan.rows]
    results = {(r["name"], r["seed"]): r for r in kept_results(suite, plan, out)}
    waiting = [(row, seed) for row, seed in pairs if (row.name, seed) not in results]

    def ordered() -> list[Result]:
        return [results[row.name, seed] for row, seed in pairs if (row.name, seed) in results]

    report(ordered())
    processes = RowProcesses(suite.threads or max((os.cpu_count() or 1) // jobs, 1))

    def run(row: Row, seed: int) -> Result | None:
        if processes.closed:
            return None
        try:
            return _run_row(suite, plan, row, seed, out, runs, processes)
        except BaseException:
            processes.closed = True  # before this thread takes the next row
            raise

    with stopped_together(processes, ThreadPoolExecutor(jobs)) as pool:
        futures = {pool.submit(run, row, seed): (row, seed) for row, seed in waiting}
        for future in as_completed(futures):
            result = future.result()
            if result is None:
                continue
            row, seed = futures[future]
            results[row.name, seed] = result
            report(ordered())
            print(f"v2flow: {len(results)} of {len(pairs)} done: {row.name}, seed {seed}", flush=True)
    return ordered()


def kept_results(suite: Suite, plan: Plan, out: Path) -> list[Result]:
    """The results that stand in `out` and were made by the rows' words from their experiment files as they are."""
    kept = []
    for seed in suite.seeds:
        for row in plan.rows:
            path = out / f"{row.slug}-seed{seed}.json"
            result = json.loads(path.read_text()) if path.is_file() else {}
            if result.get("identity") == identity(suite, plan, row, seed):
                kept.append(result)
    return kept


def identity(suite: Suite, plan: Plan, row: Row, seed: int) -> str:
    """SHA-256 of all that decides a row's figures: its commands, its experiment file, the tokenizer of its tokens."""
    facts = plan.facts[row.name]
    train = [] if row.tokenizer else fit_command(suite, row, seed, facts.steps)
    score = evaluate_command(suite, row, row.tokenizer or "CHECKPOINT", "OUT", "GRID")
    return words_sha256(train, score, *([facts.inputs] if facts.inputs else []))


def training_folder(suite: Suite, plan: Plan, row: Row, seed: int, runs: Path) -> Path:
    """Where a row is trained: named after what decides the training alone, so that another way to score it finds it."""
    facts = plan.facts[row.name]
    train = [row.tokenizer] if row.tokenizer else fit_command(suite, row, seed, facts.steps)
    return runs / f"{row.slug}-seed{seed}-{words_sha256(train, facts.inputs)[:8]}"


def _run_row(
    suite: Suite, plan: Plan, row: Row, seed: int, out: Path, runs: Path, processes: RowProcesses
) -> Result:
    """Trains and scores one row; see :func:`run_rows`."""
    name, folder = f"{row.slug}-seed{seed}", training_folder(suite, plan, row, seed, runs)
    train = None if row.tokenizer else fit_command(suite, row, seed, plan.facts[row.name].steps)
    grid = f"pictures/{name}.png"
    with holding(row.name, folder) as held:
        trained: dict[str, Any] = {"checkpoint": row.tokenizer, "commit": current_commit(), "minutes": 0.0}
        if train is not None:
            trained = _train(held, train, folder, processes)
        start, found = time.monotonic(), folder / "evaluation.json"
        score = evaluate_command(suite, row, trained["checkpoint"], str(found), str(out / grid))
        processes.call(held, score, folder / "evaluate.log")
        evaluation = json.loads(found.read_text())
    result = {
        "name": row.name,
        "slug": row.slug,
        "seed": seed,
        "comparable": row.comparable,
        "command": None if train is None else ["v2flow", *train],
        "evaluate_command": [
            "v2flow",
            *evaluate_command(suite, row, row.tokenizer or "CHECKPOINT", "OUT", "GRID"),
        ],
        "commit": trained["commit"],
        "evaluate_commit": current_commit(),
        "identity": identity(suite, plan, row, seed),
        "minutes": round(trained["minutes"] + (time.monotonic() - start) / 60, 2),
        "budget_minutes": suite.minutes,
        "step": evaluation["step"],
        **asdict(plan.facts[row.name]),
        "machine": machine(processes.threads),
        "protocol": evaluation["protocol"],
        **_findings(evaluation),
        "curve": _curve(folder),
        "grid": grid,
    }
    shown = _without_places(result)
    write_json(out / f"{name}.json", shown)
    return shown


def _train(row: HeldRow, command: list[str], folder: Path, processes: RowProcesses) -> dict[str, Any]:
    """Trains, from the last checkpoint of an interrupted training if there is one.

    Returns:
        `checkpoint`, the last one's path, the `commit` that trained it, and the `minutes` of the process that ended it.
    """
    finished, start = folder / "trained.json", time.monotonic()
    if not finished.is_file():
        commit, resume = current_commit(), _newest(folder)
        places = [f"--trainer.logger.init_args.save_dir={folder}", "--trainer.logger.init_args.name=fit"]
        places += [f"--ckpt_path={resume}"] if resume else []
        processes.call(row, [*command, *places], folder / "fit.log")
        checkpoint = _newest(folder)
        if checkpoint is None:
            raise V2FlowError(
                f"row {row.name!r}: `v2flow fit` left no last.ckpt in {folder}; see its fit.log"
            )
        minutes = (time.monotonic() - start) / 60
        write_json(finished, {"checkpoint": checkpoint, "commit": commit, "minutes": minutes})
    trained: dict[str, Any] = json.loads(finished.read_text())
    return trained


def _newest(folder: Path) -> str | None:
    found = newest_checkpoint(folder, "fit/version_*/checkpoints/last.ckpt")
    return None if found is None else str(found)


def _findings(evaluation: Mapping[str, Any]) -> Result:
    """What `v2flow evaluate` found: of a tokenizer by weights, of a text-to-image model under a key of its own."""
    if "weights" in evaluation:
        keys = ("probes", "probe_notes")
        return {"weights": evaluation["weights"]} | {key: evaluation.get(key, {}) for key in keys}
    head = ("checkpoint", "model", "step", "protocol", "date", "commit")
    return {"text_to_image": {key: value for key, value in evaluation.items() if key not in head}}


def _curve(folder: Path) -> list[dict[str, float]]:
    """Validations of all parts of a training, by step: the averaged weights' figures in the first decode mode."""
    points: dict[int, dict[str, float]] = {}
    for path in sorted(folder.glob("fit/version_*/validation.jsonl")):
        for line in path.read_text().splitlines():
            try:
                point = json.loads(line)
            except json.JSONDecodeError:  # a line that a full disk or a power cut left half
                continue
            points[point["step"]] = point
    return [points[step] for step in sorted(points)]


def machine(threads: int) -> dict[str, Any]:
    """What a figure of speed depends on; no name of the machine."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _without_places(result: Result) -> Result:
    """The result with the user's folders written as `~` and as paths from here: it is made to be shown."""
    text = json.dumps(result).replace(f"{Path.cwd()}/", "").replace(f"{Path.home()}/", "~/")
    plain: Result = json.loads(text)
    return plain
