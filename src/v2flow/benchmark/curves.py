"""Curves of validations on the way of a training, over steps and over minutes."""

from collections.abc import Mapping, Sequence
from typing import Any

from v2flow.benchmark.drawing import Look, legend, panels
from v2flow.benchmark.spread import Run, Spread, over_seeds, runs_by_name


def training_curves(results: Mapping[str, Any], looks: dict[str, Look], labels: Mapping[str, str]) -> Any:
    """A figure with a panel for each figure of the validations and each of steps and minutes; None without curves.

    Args:
        labels: figure of a run's `curve` -> what stands at its axis.
    """
    rows = runs_by_name(results)
    curves = {key: {n: c for n, runs in rows.items() if (c := mean_curve(runs, key))} for key in labels}
    curves = {key: found for key, found in curves.items() if found}
    if not curves:
        return None
    names = [name for name in rows if any(name in found for found in curves.values())]
    scales: dict[str, dict[str, float]] = {"steps": dict.fromkeys(names, 1.0)}
    timed = {name: each for name in names if (each := _minutes_a_step(rows[name])) is not None}
    scales |= {"minutes": timed} if timed else {}
    figure, axes = panels([2.4] * len(scales) * len(curves))
    drawn = [(key, unit) for key in curves for unit in scales]
    for panel, (key, unit) in zip(axes, drawn, strict=True):
        for name, spreads in curves[key].items():
            scale = scales[unit].get(name)
            if scale is not None:
                curve(panel, {step * scale: spread for step, spread in spreads.items()}, looks[name])
        panel.set(xlabel=unit, ylabel=labels[key])
    legend(figure, names, looks)
    return figure


def mean_curve(runs: Sequence[Run], key: str) -> dict[int, Spread]:
    """Step -> figure over the seeds that were validated there."""
    values: dict[int, list[float]] = {}
    for run in runs:
        for entry in run.get("curve") or []:
            if entry.get(key) is not None:
                values.setdefault(entry["step"], []).append(entry[key])
    return {step: spread for step, v in sorted(values.items()) if (spread := over_seeds(v)) is not None}


def _minutes_a_step(runs: Sequence[Run]) -> float | None:
    """Of the budget where there is one, since a run's own clock also counts scoring and waiting."""
    spread = over_seeds(
        (run.get("budget_minutes") or run["minutes"]) / run["step"]
        for run in runs
        if run.get("curve") and run.get("step") and (run.get("budget_minutes") or run.get("minutes"))
    )
    return None if spread is None else spread.mean


def curve(axes: Any, points: Mapping[float, Spread], look: Look) -> None:
    """A line through the means, and a band of one standard deviation."""
    x = list(points)
    axes.plot(
        x,
        [spread.mean for spread in points.values()],
        color=look.color,
        linestyle=look.style,
        marker=look.marker,
        markersize=3.5,
    )
    low, high = ([s.mean + sign * (s.std or 0.0) for s in points.values()] for sign in (-1, 1))
    if low != high:
        axes.fill_between(x, low, high, color=look.color, alpha=0.15, linewidth=0)
