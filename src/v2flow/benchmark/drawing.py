"""How every plot of the report is drawn: colours, marks and the SVG that comes out."""

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from v2flow.benchmark.spread import Spread

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours without yellow and black, which one of a light and a dark page swallows."""
MARKERS = "os^DvPX<>*"
STYLES = ("-", "--", "-.", ":")
INK = "#012345"
"""Stands for the colour of text until the file is written."""
WIDTH = 5.2
"""Inches; on a phone text is then about as large as the page's."""
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "v2flow",
    "text.parse_math": False,
    "font.size": 8.5,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.grid": True,
    "grid.alpha": 0.2,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
} | dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
)


@dataclass(frozen=True)
class Look:
    """How a row is drawn in every plot."""

    color: str
    marker: str
    style: Any


def looks_of(names: Iterable[str]) -> dict[str, Look]:
    """A look for each name, in their order: the same in every plot of a report."""
    return {
        name: Look(
            PALETTE[i % len(PALETTE)],
            MARKERS[i % len(MARKERS)],
            STYLES[i // len(PALETTE) % len(STYLES)],
        )
        for i, name in enumerate(dict.fromkeys(names))
    }


def svg(figure: Any, name: str) -> str:
    """A figure as an SVG element; its ids start with `name`, since the plots of a page share one space of ids."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(
        buffer, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.05, metadata=metadata
    )
    svg = buffer.getvalue()
    svg = (
        svg[svg.index("<svg") :]
        .replace(INK, "currentColor")
        .replace("<svg ", '<svg font-family="sans-serif" ', 1)
    )
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'\b(d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), svg)
    return re.sub(r"\s*\n\s*", "\n", svg).strip()


def panels(heights: Sequence[float]) -> tuple[Any, Any]:
    """A figure of panels beneath each other, of these heights in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    return figure, figure.subplots(len(heights), 1, squeeze=False, height_ratios=list(heights))[:, 0]


def point(axes: Any, x: Spread, y: Spread, look: Look, filled: bool = True) -> None:
    """A mark at the means, with bars of one standard deviation."""
    axes.errorbar(
        x.mean,
        y.mean,
        xerr=x.std or None,
        yerr=y.std or None,
        color=look.color,
        marker=look.marker,
        markerfacecolor=look.color if filled else "none",
        markersize=5.5,
        elinewidth=0.8,
        linestyle="none",
    )


def bar(axes: Any, spread: Mapping[str, float], y: float, look: Look, filled: bool) -> None:
    """A mark at the median, with a bar from `low` to `high`."""
    axes.hlines(y, spread["low"], spread["high"], color=look.color, linewidth=1)
    face = look.color if filled else "none"
    axes.plot(spread["median"], y, color=look.color, marker=look.marker, markerfacecolor=face, markersize=5)


def axis_scale(axis: Any, set_scale: Callable[[str], Any], values: Sequence[float]) -> None:
    """Logarithmic where positive values spread over more than a factor of six; plain numbers at the ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if min(values) > 0 and max(values) > 6 * min(values):
        set_scale("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def legend(figure: Any, names: Sequence[str], looks: dict[str, Look]) -> None:
    """The rows' names under the panels."""
    from matplotlib.lines import Line2D

    names = list(dict.fromkeys(names))
    handles = [
        Line2D([], [], color=looks[n].color, marker=looks[n].marker, linestyle=looks[n].style, markersize=4.5)
        for n in names
    ]
    # An invisible character first: a label with a leading underscore would be left out.
    labels = ["\u200b" + short(name, 34) for name in names]
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.0, 0.0), ncols=2)


def short(name: str, length: int) -> str:
    """The name, cut to a length."""
    return name if len(name) <= length else name[: length - 1] + "…"
