"""The report's plots as small SVG pictures.

Ink is `currentColor`, so that a plot inside a page takes the page's colour, light or dark. Text stays text. The same
results give the same bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from v2flow.benchmark.alignment_plot import alignment
from v2flow.benchmark.curves import curve, training_curves
from v2flow.benchmark.drawing import (
    SETTINGS,
    Look,
    axis_scale,
    bar,
    legend,
    looks_of,
    panels,
    point,
    short,
    svg,
)
from v2flow.benchmark.probe_tables import decoding_points, robustness_points
from v2flow.benchmark.spread import (
    KID,
    Spread,
    best_lines,
    result_lines,
    runs_by_name,
)
from v2flow.benchmark.t2i_plots import learning
from v2flow.errors import V2FlowError, missing

CAPTIONS = {
    "tradeoff": (
        "Distortion against perception: psnr and kernel distance of every row and decode mode; lower right is better. "
        "Filled: a row's first decode mode, open: the others. Dots: its decode settings on the probe's pictures, "
        "line: those that no other setting is better than in both. Bars: standard deviation over seeds."
    ),
    "training": (
        "Quality on the way, psnr of the first decode mode on validation pictures, mean over seeds, against steps and "
        "against minutes (the budget's, or else the run's own, spread evenly over its steps)."
    ),
    "tokens": "Quality against tokens a picture, each row at its best decode mode for the figure.",
    "speed": (
        "Time of a training step, and pictures encoded and decoded, or drawn of captions, a second. Bars: quartiles "
        "over the repetitions. Filled: a row's first decode mode, open: the others."
    ),
    "robustness": "psnr when a share of the tokens is replaced: solid by random ones, dashed by near ones.",
    "alignment": (
        "Both vocabularies in the plane in which the LLM's rows spread most, directions only. Grey: rows of the LLM's "
        "table. Coloured: codes of the visual vocabulary, larger the more tokens have them. First seed of each row."
    ),
}
"""Figure -> what it shows, in the order of the report."""


def figures(results: Mapping[str, Any]) -> dict[str, str]:
    """Plots by name, see :data:`CAPTIONS` and those of text-to-image rows, each an SVG element; those without data are
    left out.

    Raises:
        V2FlowError: matplotlib is not installed.
    """
    try:
        from matplotlib import style
    except ImportError as error:
        raise V2FlowError(f"the report {missing('matplotlib', 'benchmark')}") from error
    looks = looks_of([*runs_by_name(results), *(results.get("overhead") or {})])
    plots: dict[str, Callable[[Mapping[str, Any], dict[str, Look]], Any]] = {
        "tradeoff": _tradeoff,
        "training": _training,
        "tokens": _tokens,
        "speed": _speed,
        "robustness": _robustness,
        "alignment": alignment,
        "learning": learning,
    }
    with style.context(["default", SETTINGS]):
        drawn = {name: plot(results, looks) for name, plot in plots.items()}
        return {name: svg(figure, name) for name, figure in drawn.items() if figure is not None}


def _tradeoff(results: Mapping[str, Any], looks: dict[str, Look]) -> Any:
    lines = [line for line in result_lines(results) if {"psnr", KID} <= line.figures.keys()]
    if not lines:
        return None
    figure, (axes,) = panels([3.4])
    kids = [line.figures[KID].mean for line in lines]
    for name, runs in runs_by_name(results).items():
        known = [p for p in decoding_points(runs).values() if {"psnr", KID} <= p.keys()]
        points = [(p["psnr"].mean, p[KID].mean) for p in known]
        kids += [kid for _, kid in points]
        look = looks[name]
        for each, marker, line_style in ((points, ".", "none"), (frontier(points), "", look.style)):
            x, y = [psnr for psnr, _ in each], [kid for _, kid in each]
            axes.plot(x, y, color=look.color, marker=marker, markersize=4, linestyle=line_style, alpha=0.8)
    seen: set[str] = set()
    for line in lines:
        filled = line.name not in seen
        point(axes, line.figures["psnr"], line.figures[KID], looks[line.name], filled)
        seen.add(line.name)
    axis_scale(axes.yaxis, axes.set_yscale, kids)
    axes.set(xlabel="psnr, dB →", ylabel=f"← {KID}")
    legend(figure, [line.name for line in lines], looks)
    return figure


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (psnr, distance) that no other is better than in both, by descending psnr."""
    best: list[tuple[float, float]] = []
    for psnr, distance in sorted(points, key=lambda p: (-p[0], p[1])):
        if not best or distance < best[-1][1]:
            best.append((psnr, distance))
    return best


def _training(results: Mapping[str, Any], looks: dict[str, Look]) -> Any:
    return training_curves(results, looks, {"psnr": "psnr, dB →"})


def token_counts(results: Mapping[str, Any]) -> list[int]:
    """The distinct numbers of tokens a picture, ascending."""
    return sorted({run["tokens"] for run in results.get("rows", []) if run.get("tokens") is not None})


def _tokens(results: Mapping[str, Any], looks: dict[str, Look]) -> Any:
    counts = token_counts(results)
    known = [line for line in result_lines(results) if line.runs[0].get("tokens") is not None]
    shown = [figure for figure in ("psnr", KID) if any(figure in line.figures for line in known)]
    if len(counts) < 2 or not shown:
        return None
    figure, drawn = panels([2.2] * len(shown))
    for axes, name in zip(drawn, shown, strict=True):
        best = best_lines(known, name)
        for line in best:
            tokens = Spread(line.runs[0]["tokens"], None, 1)
            point(axes, tokens, line.figures[name], looks[line.name])
        axes.set(xlabel="tokens a picture", ylabel="psnr, dB →" if name == "psnr" else f"← {name}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        if name != "psnr":
            axis_scale(axes.yaxis, axes.set_yscale, [line.figures[name].mean for line in best])
    legend(figure, [line.name for line in known], looks)
    return figure


def _speed(results: Mapping[str, Any], looks: dict[str, Look]) -> Any:
    overhead = results.get("overhead") or {}
    titles = {
        "step_seconds": "seconds a training step (left is better)",
        "encode_images_per_second": "pictures encoded a second (right is better)",
        "decode_images_per_second": "pictures decoded a second (right is better)",
        "generate_images_per_second": "pictures drawn of captions a second (right is better)",
    }
    shown = [key for key in titles if any(cost.get(key) for cost in overhead.values())]
    if not shown:
        return None
    figure, drawn = panels([0.5 + 0.17 * len(overhead)] * len(shown))
    for axes, key in zip(drawn, shown, strict=True):
        values: list[float] = []
        for y, (name, cost) in enumerate(overhead.items()):
            measured = cost.get(key) or {}
            spreads = list(measured.values()) if key.startswith("decode") else [measured] if measured else []
            for i, spread in enumerate(spreads):
                values += [spread["low"], spread["high"]]
                bar(axes, spread, y, looks[name], filled=i == 0)
        axes.set_yticks(range(len(overhead)), [short(name, 32) for name in overhead])
        axes.set_ylim(len(overhead) - 0.5, -0.5)
        axes.set_title(titles[key], loc="left")
        axis_scale(axes.xaxis, axes.set_xscale, values)
    return figure


def _robustness(results: Mapping[str, Any], looks: dict[str, Look]) -> Any:
    found = {name: robustness_points(runs) for name, runs in runs_by_name(results).items()}
    found = {name: kinds for name, kinds in found.items() if kinds}
    if not found:
        return None
    figure, (axes,) = panels([2.8])
    looks = {name: replace(looks[name], style="-") for name in found}
    for name, kinds in found.items():
        for kind, points in kinds.items():
            curve(axes, points, replace(looks[name], style="--") if kind == "near" else looks[name])
    axes.set(xlabel="share of tokens replaced", ylabel="psnr, dB →")
    legend(figure, list(found), looks)
    return figure
