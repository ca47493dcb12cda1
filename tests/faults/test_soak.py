"""The verdict of a soak on made-up measurements: what grows is found, what goes up and down is not."""

from typing import Any

import numpy as np
import pytest
from faults.soak import judge

SECONDS = 3600.0


def measured(**grown: Any) -> list[dict[str, float]]:
    """An hour, every ten seconds; noise on the memory, a sawtooth in the tensors, a step in the first quarter."""
    draws, times = np.random.default_rng(0), np.arange(0.0, SECONDS, 10.0)
    columns = {
        "seconds": times,
        "rss_mb": 500 + 20 * (times > 300) + draws.normal(0, 0.5, len(times)),
        "tensors": 500 + times // 10 % 13,
        "descriptors": 16.0 + 8 * (times > 600),
        "processes": 1.0 + (times > 600),
        "threads": 4.0 + (draws.random(len(times)) < 0.1),
    }
    for name, by in grown.items():
        columns[name] = columns[name] + by(times / SECONDS)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def test_what_does_not_grow_is_good() -> None:
    verdict = judge(measured(), SECONDS, [])
    assert verdict["good"] and verdict["minutes_judged"] == pytest.approx(45, abs=1)
    assert abs(verdict["rss_mb_an_hour"]) < 1 and verdict["rss_mb_an_hour_upper_95"] < 2


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("rss_mb", lambda hours: 25 * hours),
        ("descriptors", lambda hours: hours * 8 // 1),
        ("tensors", lambda hours: 40 * hours),
        ("processes", lambda hours: hours * 6 // 1),
    ],
)
def test_what_grows_is_named(name: str, by: Any) -> None:
    verdict = judge(measured(**{name: by}), SECONDS, [])
    assert not verdict["good"]
    assert any(("memory" if name == "rss_mb" else name) in why for why in verdict["why"])
    assert len(verdict["why"]) == 1


def test_a_slope_is_measured() -> None:
    verdict = judge(measured(rss_mb=lambda hours: 10 * hours), SECONDS, [])
    assert verdict["good"] and verdict["rss_mb_an_hour"] == pytest.approx(10, abs=1)
    assert 10 < verdict["rss_mb_an_hour_upper_95"] < 12


def test_broken_checkpoints_and_short_soaks_are_not_good() -> None:
    assert judge(measured(), SECONDS, ["last.ckpt: cut short"])["why"] == ["last.ckpt: cut short"]
    assert judge(measured()[:5], SECONDS, [])["good"] is None
