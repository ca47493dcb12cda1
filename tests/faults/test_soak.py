"""The verdict of a soak on made-up measurements: what grows is found, what goes up and down is not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.soak import Soak, report
from faults.verdict import judge

from v2flow.origin import current_commit

SECONDS = 3600.0


def measured(seconds: float = SECONDS, warm: float = 600.0, **grown: Any) -> list[dict[str, float]]:
    """360 measurements: noise on the memory, a sawtooth in the tensors, and a step with the first validation, which
    ends after `warm` seconds. Others end every minute from there on.

    Args:
        grown: what is added to a column, from the hours and the validations so far.
    """
    draws, times = np.random.default_rng(0), np.linspace(0.0, seconds, 360, endpoint=False)
    validations = np.maximum(0, (times - warm) // 60 + 1)
    columns = {
        "seconds": times,
        "validations": validations,
        "rss_mb": 500 + 20 * (times > 0.08 * seconds) + 9 * (validations > 0) + draws.normal(0, 0.5, 360),
        "tensors": 500 + np.arange(360) % 13,
        "descriptors": 16.0 + 8 * (validations > 0),
        "processes": 1.0 + (validations > 0),
        "threads": 4.0 + (draws.random(360) < 0.1),
    }
    for name, by in grown.items():
        columns[name] = columns[name] + by(times / 3600, validations)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def test_what_does_not_grow_is_good() -> None:
    verdict = judge(measured(), SECONDS, [])
    assert verdict["good"] and verdict["minutes_judged"] == pytest.approx(45, abs=1)
    assert abs(verdict["rss_mb_an_hour"]) < 1 and verdict["rss_mb_an_hour_upper_95"] < 2


def test_what_the_first_validation_brings_is_no_growth() -> None:
    """In the middle of what would be judged, with memory, a process and descriptors that stay."""
    verdict = judge(measured(1200.0, warm=700.0), 1200.0, [])
    assert verdict["good"], verdict["why"]
    assert verdict["growth"]["descriptors"] == verdict["growth"]["processes"] == 0
    assert verdict["minutes_judged"] == pytest.approx(500 / 60, abs=0.1)


@pytest.mark.parametrize("seconds", [1200.0, SECONDS])
def test_a_process_that_each_validation_leaves_behind_is_found(seconds: float) -> None:
    """With what it has open."""
    leaking = measured(
        seconds,
        processes=lambda _, validations: validations,
        descriptors=lambda _, validations: 8 * validations,
    )
    verdict = judge(leaking, seconds, [])
    assert not verdict["good"] and verdict["growth"]["descriptors"] == 8 * verdict["growth"]["processes"] > 0
    assert [why.split()[0] for why in verdict["why"]] == ["descriptors", "processes"]


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("rss_mb", lambda hours, _: 25 * hours),
        ("descriptors", lambda hours, _: hours * 8 // 1),
        ("tensors", lambda hours, _: 40 * hours),
        ("processes", lambda hours, _: hours * 6 // 1),
    ],
)
def test_what_grows_is_named(name: str, by: Any) -> None:
    verdict = judge(measured(**{name: by}), SECONDS, [])
    assert not verdict["good"]
    assert any(("memory" if name == "rss_mb" else name) in why for why in verdict["why"])
    assert len(verdict["why"]) == 1


def test_a_slope_is_measured() -> None:
    verdict = judge(measured(rss_mb=lambda hours, _: 10 * hours), SECONDS, [])
    assert verdict["good"] and verdict["rss_mb_an_hour"] == pytest.approx(10, abs=1)
    assert 10 < verdict["rss_mb_an_hour_upper_95"] < 12


def test_broken_checkpoints_and_short_soaks_are_not_good() -> None:
    assert judge(measured(), SECONDS, ["last.ckpt: cut short"])["why"] == ["last.ckpt: cut short"]
    assert judge([], SECONDS, [])["good"] is judge(measured()[:110], SECONDS, [])["good"] is None
    cold = judge(measured(warm=2 * SECONDS), SECONDS, [])
    assert cold["good"] is None and "after the first validation: expected 30, found 0" in cold["why"][0]


def test_a_result_says_where_it_comes_from(tmp_path: Path) -> None:
    found = report(Soak(tmp_path, seed=3), tmp_path, 60.0, tmp_path / "soak.json")
    assert found["command"][:2] == ["python", "tests/faults/soak.py"] and found["seed"] == 3
    assert found["commit"] == current_commit() and found["machine"]["threads"] == 1
