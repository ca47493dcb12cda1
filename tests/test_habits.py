"""What CONTRIBUTING.md promises to a newcomer, and the checks that run before a commit."""

import configparser
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
TEXT = (REPOSITORY / "CONTRIBUTING.md").read_text()
MAKEFILE = (REPOSITORY / "Makefile").read_text()
HOOKS: dict[str, dict[str, Any]] = {
    hook["id"]: hook
    for source in yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in source["hooks"]
}


def table_of_the_tree() -> str:
    return TEXT.split("## The tree\n")[1].split("\n## ")[0]


# --- CONTRIBUTING.md --------------------------------------------------------------------------------------------


def test_it_is_one_page() -> None:
    assert len(TEXT.splitlines()) <= 90


def test_the_tree_is_the_one_that_is_there() -> None:
    """Each folder that is named exists; each subpackage, and each folder of the top that git keeps, is named."""
    named = {Path(name) for name in re.findall(r"`([\w./]+/)`", table_of_the_tree())}
    lacking = [
        str(path)
        for path in named
        if not any((REPOSITORY / top / path).is_dir() for top in ("", "experiments", "tests"))
    ]
    assert not lacking
    kept = {path.parent for path in (REPOSITORY / "src/v2flow").glob("*/__init__.py")}
    kept |= {
        REPOSITORY / name
        for name in ("experiments", "benchmarks", "tests", "docs", "notebooks", "data", "checkpoints")
    }
    assert {path.relative_to(REPOSITORY) for path in kept} <= named


def test_files_and_links_that_it_names_exist() -> None:
    paths = re.findall(r"`((?:src|tests|docs|experiments|benchmarks|notebooks)/[\w./-]+)`", TEXT)
    assert len(paths) > 15
    for path in paths + re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (REPOSITORY / path).exists(), path
    way = TEXT.split("## The way of the data\n")[1].split("\n## ")[0]
    for name in re.findall(r"`(\w+\.py)`", way):
        assert (REPOSITORY / "src/v2flow/data" / name).is_file(), name


def test_make_targets_that_it_names_exist() -> None:
    targets = set(re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split())  # type: ignore[index]
    named = {word for words in re.findall(r"`?make ((?:[a-z][a-z0-9-]* ?)+)", TEXT) for word in words.split()}
    assert {"test", "lint", "coverage", "docs"} <= named & targets
    assert {word for words in re.findall(r"`make ([a-z0-9 -]+)`", TEXT) for word in words.split()} <= targets


def test_each_target_has_a_line_of_help() -> None:
    targets = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split()  # type: ignore[index]
    said = subprocess.run(["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    for target in targets:
        assert target.endswith("-exists") or target == "help" or f"\nmake {target} " in f"\n{said}", target


def test_a_tokenizer_of_an_interrupted_training_is_trained_to_its_end_first(tmp_path: Path) -> None:
    """What `make train-t2i` would do in a clone with such runs; the figures are the last thing that a run writes."""

    def planned() -> str:
        words = ["make", "-n", "checkpoints/tokenizers/small/config.json"]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    def training(said: str) -> list[str]:
        return [line for line in said.splitlines() if line.startswith(".venv/bin/python -m v2flow fit")]

    (tmp_path / "experiments" / "tokenizer").mkdir(parents=True)
    (tmp_path / "Makefile").write_text(MAKEFILE)
    for name in ("experiments/tokenizer/small.yaml", "setup.cfg", "pyproject.toml"):
        (tmp_path / name).touch()
    (line,) = training(planned())
    assert '--config "experiments/tokenizer/small.yaml"' in line and "ckpt_path" not in line
    for number, finished in ((2, False), (2, True), (10, False), (10, True)):
        run = tmp_path / "checkpoints" / "small" / f"version_{number}"
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "checkpoints" / "last.ckpt").touch()
        if finished:
            (run / "metrics.json").touch()
        said = planned()
        assert "v2flow export" in said and bool(training(said)) == (not finished), said
        assert (
            finished
            or f"version_{number}/checkpoints/last.ckpt is of a training that was interrupted" in said
        )
        assert finished or "--ckpt_path last" in training(said)[0]


def test_markers_are_those_that_it_explains(pytestconfig: pytest.Config) -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()
    ours = re.findall(r'^    "(\w+): ', text.split("markers = [")[1].split("]")[0], re.MULTILINE)
    assert sorted(ours) == ["gpu", "slow"]
    for name in ours:
        assert f"`{name}`" in TEXT and any(
            line.startswith(f"{name}:") for line in pytestconfig.getini("markers")
        )


# --- before a commit --------------------------------------------------------------------------------------------


def run_hook(name: str, *files: Path) -> subprocess.CompletedProcess:
    """Runs a hook of language system as pre-commit does, by this process's Python."""
    python, *words = shlex.split(HOOKS[name]["entry"])
    assert python == ".venv/bin/python" and "VENV ?= .venv\n" in MAKEFILE
    return subprocess.run([sys.executable, *words, *map(str, files)], capture_output=True, text=True)


def test_hooks_are_the_commands_of_make_lint_and_what_it_installs() -> None:
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    packages = re.findall(r"^[\w-]+", setup["options.extras_require"]["lint"], re.MULTILINE)
    lint = re.findall(r"^\t\$\(PY\) -m (ruff check|ruff format|mypy)\b", MAKEFILE, re.MULTILINE)
    for name, command in (("ruff-check", "ruff check"), ("ruff-format", "ruff format"), ("mypy", "mypy")):
        entry = HOOKS[name]["entry"]
        assert entry.startswith(f".venv/bin/python -m {command}") and command in lint
        assert command.split()[0] in packages


def test_large_files_are_stopped(tmp_path: Path) -> None:
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    small.write_bytes(bytes(2_000_000))
    large.write_bytes(bytes(2_000_001))
    assert run_hook("large-files", small).returncode == 0
    stopped = run_hook("large-files", small, large)
    assert stopped.returncode == 1 and "large.png" in stopped.stderr and "small.png" not in stopped.stderr


def test_no_file_of_ours_is_large() -> None:
    folders = ("src", "experiments", "benchmarks", "tests", "docs", "notebooks")
    files = [path for folder in folders for path in (REPOSITORY / folder).rglob("*") if path.is_file()]
    kept = [path for path in files if not {"_build", "__pycache__"} & set(path.parts)]
    assert len(kept) > 300
    assert not [str(path) for path in kept if path.stat().st_size > 2_000_000]


def test_outputs_of_notebooks_are_stopped() -> None:
    hook = HOOKS["notebook-outputs"]
    assert hook["language"] == "pygrep" and re.search(hook["files"], "notebooks/tokenizer.ipynb")
    for ran in (' "output_type": "stream",', ' "execution_count": 3,'):
        assert re.search(hook["entry"], ran)
    for path in (REPOSITORY / "notebooks").glob("*.ipynb"):
        assert not re.search(hook["entry"], path.read_text())
