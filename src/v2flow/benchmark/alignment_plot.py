"""The plot of both vocabularies in one plane, a panel for each row of a suite that has an LLM's vocabulary."""

from collections.abc import Mapping
from typing import Any

from v2flow.benchmark.drawing import INK, WIDTH, Look, short
from v2flow.benchmark.probe_tables import probes
from v2flow.benchmark.spread import runs_by_name

COLUMNS = 2


def planes(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Row -> its points, of its first seed; see :func:`v2flow.probes.alignment_plane.plane_points`."""
    found = {name: probes(runs, "alignment") for name, runs in runs_by_name(results).items()}
    return {name: sets[0]["plane"] for name, sets in found.items() if sets and "plane" in sets[0]}


def alignment(results: Mapping[str, Any], looks: dict[str, Look]) -> Any:
    """Grey: rows of the LLM's table; in the row's colour: its codes, larger the more tokens have them."""
    from matplotlib.figure import Figure

    found = planes(results)
    if not found:
        return None
    columns = min(COLUMNS, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(WIDTH, lines * (0.6 + 3.6 / columns)), layout="constrained")
    drawn = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (name, plane) in zip(drawn, found.items(), strict=False):
        _panel(axes, plane, looks[name], name)
    for axes in drawn[len(found) :]:
        axes.remove()
    return figure


def _panel(axes: Any, plane: Mapping[str, Any], look: Look, name: str) -> None:
    x, y = zip(*plane["rows"], strict=True)
    axes.scatter(x, y, s=3, color=INK, alpha=0.35, linewidths=0)
    x, y, shares = zip(*plane["codes"], strict=True)
    most = max(shares) or 1.0
    axes.scatter(
        x, y, s=[3 + 25 * share / most for share in shares], color=look.color, alpha=0.6, linewidths=0
    )
    axes.set_title(short(name, 36), loc="left")
    first, second = (f"{share:.0%}" for share in plane["variance"])
    axes.set_xlabel(f"component 1 ({first} of the rows' variance)")
    axes.set_ylabel(f"2 ({second})")
    axes.set_aspect("equal", adjustable="datalim")
