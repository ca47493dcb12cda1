"""A few kills of `v2flow fit`; `make test-faults` has many."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from v2flow.origin import current_commit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a process of its own: one that has trained must not be forked."""
    folder = tmp_path_factory.mktemp("faults")
    out = folder / "faults.json"
    words = ["--kills", "3", "--ranks", "--data", "0", "--seed", "4", "--out", str(out)]
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run.py")), *words, "--folder", str(folder / "runs")],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    assert found["command"] == ["python", "tests/faults/run.py", *words, "--folder", str(folder / "runs")]
    assert found["commit"] == current_commit() and found["machine"]["threads"] == 1
    return found


@pytest.mark.parametrize("stage", ["tokenizer", "t2i"])
def test_killed_runs_go_on_as_if_nothing_had_happened(result: dict[str, Any], stage: str) -> None:
    """SIGKILL and SIGTERM at random moments, and another number of data workers at each start."""
    found = result["stages"][stage]
    assert found["kills"] >= 3 and found["trainings"] >= 1 and found["lines_a_training"] == 28
    assert found["differences"] == []
    assert len(found["starts_by_workers"]) > 1


def test_two_ranks_that_are_killed_go_on_as_two_and_as_one(result: dict[str, Any]) -> None:
    """Both as a machine that dies, and one alone, which the other outlives by no more than one line of error."""
    found = result["stages"]["ranks"]
    assert found["trainings"] == 2 and found["differences"] == []
    kills = " ".join(found["kills_by_moment"])
    assert all(way in kills for way in ("SIGKILL of (0, 1)", "SIGKILL of (1,)", "SIGTERM of (0,) amid"))
