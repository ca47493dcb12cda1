"""benchmarks/corrupt_samples.py: a few pictures under a clock of our own."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import corrupt_samples

from v2flow.origin import current_commit

SMALL = ["--samples", "96", "--share", "0.04", "--size", "32", "--image-size", "16", "--batch", "8"]


def test_the_ratio_is_the_median_of_interleaved_pairs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A clean batch takes a second; a damaged one takes one in the first repetition, two in the second, and so on."""
    monkeypatch.setenv("V2FLOW_CACHE", str(tmp_path))
    now, looks = 0.0, 0

    def process_time() -> float:
        """Asked before and after each batch: damaged, clean, clean, damaged, ..."""
        nonlocal now, looks
        batch, looks = looks // 2, looks + 1
        if looks % 2 == 0:
            now += 1 + batch // 24 if batch % 4 in (0, 3) else 1
        return now

    monkeypatch.setattr(corrupt_samples.time, "process_time", process_time)
    corrupt_samples.main([*SMALL, "--repetitions", "4"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["damaged_samples"] == 4 and looks == 5 * 48
    assert found["ratios"] == [2, 3, 4, 5] and found["ratio"] == 3.5, "the first repetition is thrown away"
    assert found["cpu_ms_a_good_sample"] == {"clean": 125, "damaged": 437.5}, "eight pictures in a batch"
    assert found["command"][:4] == ["python", "benchmarks/corrupt_samples.py", "--samples", "96"]
    assert found["commit"] == current_commit() and found["machine"]["threads"] == torch.get_num_threads()
