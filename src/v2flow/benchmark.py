"""Benchmark suites: many trainings that differ in named options only, and one table of what they reached.

A suite is a YAML file (`experiments/benchmark/`). Every row is a `v2flow fit` of its own process, so that its command,
written beside its figures, gives them again. A finished row is a small file and is not run again.
"""

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from v2flow.errors import V2FlowError
from v2flow.metrics.files import write_json

TABLE = "README.md"


@dataclass
class Row:
    """One training of a suite.

    Attributes:
        name: what stands in the table.
        arguments: words for `v2flow fit`.
        experiment: experiment file; when None the suite's, with the arguments that its rows share.
    """

    name: str
    arguments: list[str] = field(default_factory=list)
    experiment: str | None = None

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass
class Suite:
    """Trainings to compare.

    Attributes:
        title: heading of the table.
        about: what the suite asks, in a few sentences.
        experiment: experiment file of the rows that name none.
        arguments: words for `v2flow fit` that those rows share.
        seeds: every row is run once for each.
        rows: the trainings.
    """

    title: str
    experiment: str
    rows: list[Row]
    about: str = ""
    arguments: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])


def read_suite(path: Path) -> Suite:
    """The suite that a YAML file describes.

    Raises:
        V2FlowError: not YAML, an unknown or missing key, or two rows of one name.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise V2FlowError(f"{path}: not a YAML file: {error}") from error
    suite = _build(Suite, values, str(path))
    if not isinstance(suite.rows, list) or not suite.rows:
        raise V2FlowError(f"{path}: rows: expected a list of trainings, found {suite.rows!r}")
    suite.rows = [_build(Row, row, f"{path}: row {i + 1}") for i, row in enumerate(suite.rows)]
    for row in suite.rows:
        if not isinstance(row.name, str):
            raise V2FlowError(f"{path}: rows: expected a name in words, found {row.name!r}; put it in quotes")
    slugs = [row.slug for row in suite.rows]
    for slug in slugs:
        if slugs.count(slug) > 1 or not slug:
            raise V2FlowError(
                f"{path}: rows: expected a name of its own for each row, found {slug!r} more than once"
            )
    return suite


def _build(kind: Any, values: Any, where: str) -> Any:
    known = [f.name for f in fields(kind)]
    if not isinstance(values, dict):
        raise V2FlowError(f"{where}: expected the keys {', '.join(known)}, found {type(values).__name__}")
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise V2FlowError(f"{where}: unknown key {unknown[0]!r}; expected one of {', '.join(known)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise V2FlowError(f"{where}: {str(error).split('__init__() ')[-1]}") from error


def row_command(suite: Suite, row: Row, seed: int) -> list[str]:
    """The words after `v2flow` that train a row."""
    experiment, shared = (
        (suite.experiment, suite.arguments) if row.experiment is None else (row.experiment, [])
    )
    return ["fit", "--config", experiment, f"--seed_everything={seed}", *shared, *row.arguments]


def run_suite(suite: Suite, out: Path, runs: Path) -> list[dict[str, Any]]:
    """Trains every row that has no result of the same command yet, and writes the table after each.

    Args:
        out: folder of the results: a JSON file a row and seed, and the table.
        runs: folder of the trainings themselves, with their checkpoints and logs.

    Returns:
        The results in the order of the suite.

    Raises:
        V2FlowError: a training failed; the rows before it are kept.
    """
    jobs = [(row, seed) for seed in suite.seeds for row in suite.rows]
    results: list[dict[str, Any]] = []
    for number, (row, seed) in enumerate(jobs):
        path = out / f"{row.slug}-seed{seed}.json"
        command = row_command(suite, row, seed)
        result = json.loads(path.read_text()) if path.is_file() else None
        if result is None or not _is_current(result, command):
            print(f"v2flow: row {number + 1} of {len(jobs)}: {row.name}, seed {seed}", flush=True)
            result = _train(row, seed, command, runs)
            write_json(path, result)
        results.append(result)
        (out / TABLE).write_text(suite_table(suite, results))
    return results


def experiment_hash(command: list[str]) -> str:
    """SHA-256 of the experiment file that a command names."""
    return hashlib.sha256(Path(command[command.index("--config") + 1]).read_bytes()).hexdigest()


def _is_current(result: dict[str, Any], command: list[str]) -> bool:
    """Whether a result comes from these words and from the experiment file as it is now."""
    same = result["command"] == ["v2flow", *command]
    return same and result["experiment_sha256"] == experiment_hash(command)


def _train(row: Row, seed: int, command: list[str], runs: Path) -> dict[str, Any]:
    name = f"{row.slug}-seed{seed}"
    folder = runs / name
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "fit.log"
    places = [f"--trainer.logger.init_args.save_dir={runs}", f"--trainer.logger.init_args.name={name}"]
    before = set(folder.glob("version_*/metrics.json"))
    origin = {"commit": current_commit(), "experiment_sha256": experiment_hash(command)}
    start = time.monotonic()
    with log.open("wb") as file:
        status = subprocess.run(
            [sys.executable, "-m", "v2flow", *command, *places], stdout=file, stderr=subprocess.STDOUT
        ).returncode
    minutes = (time.monotonic() - start) / 60
    written = set(folder.glob("version_*/metrics.json")) - before
    if status or not written:
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
        raise V2FlowError(
            f"row {row.name!r}: `v2flow fit` ended with status {status}: {last[-300:]}; see {log}. Finished rows are "
            "kept; run the same command again to go on"
        )
    report = json.loads(written.pop().read_text())
    return {
        "name": row.name,
        "seed": seed,
        "command": ["v2flow", *command],
        **origin,
        "minutes": round(minutes, 2),
        "step": report["step"],
        "weights": report["weights"],
    }


def current_commit() -> str | None:
    """The commit of the working tree, with `+` after it if files differ from it; None outside a repository."""
    git = ["git", "-C", os.fspath(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return None
    status = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True)
    return head.stdout.strip() + ("+" if status.stdout else "")


def suite_table(suite: Suite, results: list[dict[str, Any]]) -> str:
    """Markdown: a line for each row, seed and way to decode, and below it every row's command."""
    lines = [f"# {suite.title}", "", suite.about.strip(), ""]
    lines += [
        "| row | seed | decode | psnr | ssim | kid-efficientnet-lite0 | codes used | perplexity | steps | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        weights = result["weights"].get("ema") or next(iter(result["weights"].values()))
        codebook = weights["codebook"]
        for mode, figures in weights["modes"].items():
            kid = "–"
            if "kid-efficientnet-lite0" in figures:
                error = figures["kid-efficientnet-lite0_se"]
                kid = f"{figures['kid-efficientnet-lite0']:.3f} ± {error:.3f}"
            lines.append(
                f"| {result['name']} | {result['seed']} | {mode} | {figures['psnr']:.2f} | {figures['ssim']:.3f} | "
                f"{kid} | {codebook['usage']:.0%} | {codebook['perplexity']:.0f} | {result['step']} | "
                f"{result['minutes']:.1f} |"
            )
    lines += ["", "Commands, with the commit they ran at:", ""]
    lines += [f"- {r['name']} ({r['commit']}): `{shlex.join(r['command'])}`" for r in results]
    return "\n".join(lines) + "\n"
