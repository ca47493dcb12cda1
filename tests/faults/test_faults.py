"""A few kills of `v2flow fit`; `make test-faults` has many."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_runs_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """SIGKILL and SIGTERM at random moments of a tokenizer's training, then two ranks stopped in an accumulation."""
    out = tmp_path / "faults.json"
    words = ["--kills", "3", "--stages", "tokenizer", "--ranks", "--seed", "4", "--out", str(out)]
    script = Path(__file__).with_name("run.py")
    run = subprocess.run(
        [sys.executable, str(script), *words, "--folder", str(tmp_path / "runs")],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(out.read_text())["stages"]
    assert result["tokenizer"]["kills"] >= 3 and result["tokenizer"]["trainings"] >= 1
    assert result["tokenizer"]["lines_a_training"] == 28
    assert result["tokenizer"]["differences"] == result["ranks"]["differences"] == []
