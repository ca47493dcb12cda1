"""The document of benchmarks/speed.py as Markdown and plots."""

import shlex
from collections.abc import Callable, Mapping
from typing import Any

from speed_parts.reference import CODEC, LITERAL_WAY
from speed_parts.scaling import MEASURES
from v2flow.benchmark.document import ABSENT, Block, Section, Table, section_markdown
from v2flow.benchmark.drawing import SETTINGS, axis_scale, looks_of, panels, svg

Document = Mapping[str, Any]


def spread(figure: Mapping[str, float] | float | None, form: str = "{:.3g}", factor: float = 1.0) -> str:
    """`median (low to high)`."""
    if figure is None:
        return ABSENT
    if not isinstance(figure, Mapping):
        return form.format(figure * factor)
    median, low, high = (form.format(figure[name] * factor) for name in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def percent(figure: Mapping[str, float] | float) -> str:
    """A share, with its quartiles if it has some."""
    return spread(figure, "{:.1f}", 100.0) + " %"


def gigabytes(count: float) -> str:
    """Bytes as GB of 10**9."""
    return f"{count / 1e9:.3g} GB"


def places(reads: Mapping[str, int]) -> str:
    """Where numbers of the device are asked for."""
    return ", ".join(f"{place} {count}" for place, count in reads.items()) or "no device reads"


def goals(parts: Document) -> list[list[str]]:
    """Rows: what was to be reached, what is wanted, what was found, and whether it is reached."""
    rows: list[list[str]] = []

    def add(name: str, wanted: float, found: float, most: bool) -> None:
        reached = found <= wanted if most else found >= wanted
        sign = "≤" if most else "≥"
        rows.append([name, f"{sign} {wanted:g}", f"{found:.3g}", "yes" if reached else "no"])

    if step := parts.get("step"):
        shipped = step["rows"]["shipped"]
        add(
            "training step, share of the rate of matrix products",
            0.45,
            shipped["of_products"]["median"],
            False,
        )
        for key, other in (("shipped", "the experiment"), ("recipe", "the same recipe")):
            add(f"literal step to that of {other}, times", 1.5, step[f"literal_to_{key}"]["median"], False)
    if data := parts.get("data"):
        add(
            "step from shards to step on a cached batch, times",
            1.05,
            data["shards_to_cached"]["median"],
            True,
        )
    if reference := parts.get("reference"):
        train, decode = reference["train"], reference["decode"]
        rows.append([
            "a training step of the reference's size fits", f"≤ {reference['memory_gb']:g} GiB",
            train.get("error") or f"{train['peak_rss_bytes'] / 2**30:.1f} GiB", "no" if "error" in train else "yes",
        ])  # fmt: skip
        for name, row in decode.get("rows", {}).items():
            if name not in (LITERAL_WAY, CODEC):
                add(f"a picture decoded, {name}, to literal, times", 0.25, row["to_literal"]["median"], True)
    for row in parts.get("vocabulary", {}).get("rows", []):
        size = f"{row['entries']:,} x {row['dim']}, keys of {row['key_dim']}"
        ratio, wide = row["tiles_to_matrix"], row["key_dim"] > 512
        add(f"vocabulary {size}: extra memory, times less", 10, 1 / ratio["extra_bytes"], False)
        add(f"vocabulary {size}: time, times", 1.35 if wide else 1.15, ratio["seconds"], True)
    return rows


def step_section(part: Document) -> list[Block]:
    """Of the part step."""
    rows = part["rows"]
    kinds = list(next(iter(rows.values()))["shares"])
    table = [
        [name, f"{row['parameters']:,}", spread(row["seconds"]), f"{row['flops'] / 1e9:.4g}",
         percent(row["of_products"]), gigabytes(row["peak_memory_bytes"])]
        for name, row in rows.items()
    ]  # fmt: skip
    hooks = part["hooks"]["callbacks"]
    return [
        f"{part['batch_size']} pictures a step. FLOPs are torch's count of products and convolutions, forward and "
        "backward; the share is of the rate of fp32 matrix products in the same rounds.",
        Table(["row", "parameters", "seconds ↓", "GFLOP", "of matrix products ↑", "peak memory ↓"], table),
        f"The literal step takes {spread(part['literal_to_shipped'])} times as long as the experiment's and "
        f"{spread(part['literal_to_recipe'])} times as long as the package's step of the same recipe.",
        "Where the time goes, by the innermost operator:",
        Table(
            ["class", *rows], [[k, *(f"{100 * r['shares'][k]:.1f} %" for r in rows.values())] for k in kinds]
        ),
        f"Numbers of the device that forward and backward ask for: {places(part['device_reads'])}. Callbacks' hooks, "
        "as a share of a step: "
        + "; ".join(f"{n} {percent(h['share'])}, {places(h['device_reads'])}" for n, h in hooks.items())
        + ".",
    ]


def data_section(part: Document) -> list[Block]:
    """Of the part data."""
    rows = [[name, spread(r["seconds"]), percent(r["of_products"])] for name, r in part["rows"].items()]
    return [
        f"{part['steps_a_round']} steps of {part['batch_size']} pictures a round; {part['pictures']} pictures, "
        f"{part['workers']} workers, decoded pictures {'kept' if part['cache_decoded'] else 'not kept'} in memory, "
        f"{part['epochs']:.1f} epochs.",
        Table(["batches", "seconds a round ↓", "of matrix products ↑"], rows),
        f"From shards to cached: {spread(part['shards_to_cached'], '{:.4g}')}.",
    ]


def reference_section(part: Document) -> list[Block]:
    """Of the part reference."""
    train, decode = part["train"], part["decode"]
    if "error" in train:
        first = f"A training step {train['error']}."
    else:
        first = (
            f"A training step at batch 1, fp32, {train['optimizer']}, {train['parameters']:,} trained parameters: "
            f"{spread(train['seconds'])} s, {percent(train['of_products'])} of matrix products; peak of resident "
            f"memory {gigabytes(train['peak_rss_bytes'])}, of which weights, gradients and states "
            f"{gigabytes(train['resident_bytes'])}."
        )
    blocks: list[Block] = [
        f"{part['image_size']} px, {part['tokens']} tokens; all weights are random.",
        first,
    ]
    if "error" in decode:
        return [*blocks, f"Decoding {decode['error']}."]
    rows = [
        [name, ", ".join(f"{k} {v}" for k, v in r["options"].items()), spread(r["seconds"]), spread(r["to_literal"]),
         percent(r["of_products"]), gigabytes(r["peak_extra_bytes"])]
        for name, r in decode["rows"].items()
    ]  # fmt: skip
    return [
        *blocks,
        f"One picture decoded; weights take {gigabytes(decode['resident_bytes'])}, peak of resident memory "
        f"{gigabytes(decode['peak_rss_bytes'])}. Pictures of the first two rows differ by "
        f"{decode['largest_difference']:.1e} at most.",
        Table(
            ["way", "options", "seconds ↓", "to literal ↓", "of matrix products ↑", "peak beside weights ↓"],
            rows,
        ),
    ]


def vocabulary_section(part: Document) -> list[Block]:
    """Of the part vocabulary."""
    rows = []
    for row in part["rows"]:
        tiles, matrix, ratio = row["tiles"], row["matrix"], row["tiles_to_matrix"]
        rows.append([
            f"{row['entries']:,} x {row['dim']}", str(row["key_dim"]),
            f"{tiles['seconds']:.3g} / {matrix['seconds']:.3g}", f"{ratio['seconds']:.3g}",
            f"{percent(tiles['of_products'])} / {percent(matrix['of_products'])}",
            f"{gigabytes(tiles['extra_bytes'])} / {gigabytes(matrix['extra_bytes'])}",
            f"{1 / ratio['extra_bytes']:.1f}",
        ])  # fmt: skip
    heads = [
        "table", "keys", "seconds, tiles / matrix", "time ratio ↓", "of matrix products", "extra memory", "times less ↑"
    ]  # fmt: skip
    return [
        f"Forward and backward of {part['rows'][0]['tokens']} tokens, budget {part['budget_mb']:g} MB, medians of "
        f"{part['repeats']} in turns.",
        Table(heads, rows),
    ]


def scaling_section(part: Document) -> list[Block]:
    """Of the part scaling."""
    rows = []
    for axis, found in part["axes"].items():
        points = " ".join(str(p["value"]) for p in found["points"])
        fits = [found["exponents"][name] for name in MEASURES]
        rows.append(
            [axis, points, *(f"{f['exponent']:.2f} (r² {f['r2']:.2f}; last {f['last']:.2f})" for f in fits)]
        )
    return [
        f"{part['batch_size']} pictures where the batch is not what varies; decoding in {part['decode']['steps']} "
        "steps. Exponents are least squares of logarithms over all points; `last` is between the two largest.",
        Table(["varied", "values", *MEASURES.values()], rows),
    ]


GOALS = ["figure", "wanted", "found", "reached"]
PLOTS = {"scaling-time": ("step_seconds", "decode_seconds"), "scaling-memory": ("step_bytes", "decode_bytes")}
"""Name of a plot -> what is drawn in it against each axis."""
SECTIONS: dict[str, tuple[str, Callable[[Document], list[Block]]]] = {
    "step": ("Training step", step_section),
    "data": ("Data loading", data_section),
    "reference": ("The paper's size", reference_section),
    "vocabulary": ("Vocabulary attention", vocabulary_section),
    "scaling": ("How cost grows", scaling_section),
}


def markdown(document: Document) -> str:
    """The whole document; spreads are median (quartiles)."""
    parts = document["parts"]
    written = [section_markdown(Section("Figures to reach", [Table(GOALS, goals(parts))]))]
    for name, (title, write) in SECTIONS.items():
        if name in parts:
            written.append(section_markdown(Section(title, [_origin(parts[name]), *write(parts[name])])))
    if "scaling" in parts:
        written += [f"![{name}]({name}.svg)" for name in PLOTS]
    about = "Spreads are medians (quartiles) over rounds in turns."
    return "\n\n".join(["# Speed", about, *written]) + "\n"


def _origin(part: Document) -> str:
    machine = part["machine"]
    rate = f", commit {part['commit'] or 'unknown'}, {part['minutes']:.1f} minutes"
    toy = " Toy sizes: these figures say nothing." if part["setting"]["smoke"] else ""
    return (
        f"{shlex.join(part['command'])}{rate}; {machine['processor']}, {machine['threads']} threads, torch "
        f"{machine['torch']}.{toy}"
    )


def plots(part: Document) -> dict[str, str]:
    """File name -> SVG: time and memory against each axis, both axes logarithmic where they span enough."""
    from matplotlib import style

    drawn = {}
    with style.context(["default", SETTINGS]):
        for name, measures in PLOTS.items():
            drawn[f"{name}.svg"] = _plot(part, name, measures)
    return drawn


def _plot(part: Document, name: str, measures: tuple[str, ...]) -> str:
    looks = looks_of(measures)
    figure, axes = panels([1.9] * len(part["axes"]))
    for panel, (axis, found) in zip(axes, part["axes"].items(), strict=True):
        x, drawn = [p["value"] for p in found["points"]], []
        for measure in measures:
            values = [p[measure] for p in found["points"]]
            y = [v["median"] if isinstance(v, Mapping) else v for v in values]
            look, fit = looks[measure], found["exponents"][measure]
            label = f"{MEASURES[measure]}: exponent {fit['exponent']:.2f}"
            panel.plot(x, y, color=look.color, marker=look.marker, markersize=4, label=label)
            drawn += y
        axis_scale(panel.xaxis, panel.set_xscale, x)
        axis_scale(panel.yaxis, panel.set_yscale, drawn)
        panel.set(xlabel=axis)
        panel.legend(loc="upper left", fontsize=6.5)
    return svg(figure, name)
