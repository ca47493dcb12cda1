"""The verdict of a soak: does anything grow once it is warm?"""

from typing import Any

import numpy as np

LIMIT_MB = 20.0
"""Of the upper 95 % bound of the memory's slope, in MB an hour."""
WINDOW = 0.75
"""Share of the soak, its last, that is judged: of an hour, 45 minutes."""
ENOUGH = 30
"""Measurements in it, at least."""


def theil_sen(seconds: np.ndarray, values: np.ndarray) -> tuple[float, float, float]:
    """Median slope over all pairs, and its lower and upper 95 % bound (Sen 1968), in units an hour.

    Each bound is one-sided, by Kendall's statistic. Its variance is enlarged by (1 + r) / (1 - r) for residuals with
    the correlation r to their neighbours.
    """
    first, second = np.triu_indices(len(values), 1)
    slopes = np.sort((values[second] - values[first]) / (seconds[second] - seconds[first])) * 3600.0
    count, slope = len(values), float(np.median(slopes))
    residuals = values - slope / 3600.0 * seconds
    residuals = residuals - residuals.mean()
    spread = float(residuals @ residuals)
    lag = float(np.clip(residuals[1:] @ residuals[:-1] / spread, 0.0, 0.95)) if spread else 0.0
    variance = count * (count - 1) * (2 * count + 5) / 18.0 * (1.0 + lag) / (1.0 - lag)
    ranks = [round((len(slopes) + sign * 1.645 * np.sqrt(variance)) / 2) for sign in (-1, 1)]
    lower, upper = (float(slopes[min(max(rank, 0), len(slopes) - 1)]) for rank in ranks)
    return slope, lower, upper


def judge(samples: list[dict[str, float]], seconds: float, broken: list[str]) -> dict[str, Any]:
    """The verdict on what was measured over the last three quarters of the soak, after the first validation."""
    begin = samples[0]["seconds"] + (1 - WINDOW) * seconds if samples else 0.0
    kept = [sample for sample in samples if sample["seconds"] >= begin and sample["validations"]]
    if len(kept) < ENOUGH:
        few = f"too few measurements after the first validation: expected {ENOUGH}, found {len(kept)}"
        return {"samples": len(kept), "good": None, "why": [few, *broken]}
    columns = {name: np.array([sample[name] for sample in kept]) for name in kept[0]}
    slope, _, bound = theil_sen(columns["seconds"], columns["rss_mb"])
    third = len(kept) // 3
    growth = {
        name: float(np.median(columns[name][-third:]) - np.median(columns[name][:third]))
        for name in ("tensors", "descriptors", "processes", "threads")
    }
    # They go up and down with logging and validation: growth is a slope that is positive beyond doubt.
    why = [
        f"{name} grew by {grown:g}"
        for name, grown in growth.items()
        if theil_sen(columns["seconds"], columns[name])[1] > 0
    ]
    if bound >= LIMIT_MB:
        why.append(f"memory grows by up to {bound:.1f} MB an hour")
    return {
        "samples": len(kept),
        "minutes_judged": round(float(np.ptp(columns["seconds"])) / 60, 1),
        "rss_mb_an_hour": round(slope, 2),
        "rss_mb_an_hour_upper_95": round(bound, 2),
        "rss_mb_median": round(float(np.median(columns["rss_mb"])), 1),
        "growth": growth,
        "good": not why and not broken,
        "why": why + broken,
    }
