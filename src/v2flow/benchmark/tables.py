"""The benchmark's report in sections, and all of it as Markdown.

Everything is computed from the content of results.json; what it lacks is left out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from v2flow.benchmark.cost_tables import overhead_section
from v2flow.benchmark.document import ABSENT, Section, Table, escape_markdown, section_markdown
from v2flow.benchmark.probe_tables import probe_sections
from v2flow.benchmark.provenance import commands_section, protocol_section
from v2flow.benchmark.spread import (
    DIRECTIONS,
    FORMS,
    Line,
    Run,
    cells_of,
    modes_of,
    over_seeds,
    result_lines,
    weights_of,
)
from v2flow.benchmark.t2i_tables import made_of_section, text_to_image_sections
from v2flow.benchmark.verdict import verdict_section

NOT_COMPARED = " †"

RUN_COLUMNS: dict[str, tuple[Callable[[Run], float | None], str]] = {
    "codes used": (lambda run: _scaled(_codebook(run).get("usage"), 100), "{:.1f} %"),
    "perplexity": (lambda run: _codebook(run).get("perplexity"), "{:.0f}"),
    "tokens": (lambda run: run.get("tokens"), "{:g}"),
    "bits": (lambda run: run.get("bits"), "{:g}"),
    "parameters, M": (lambda run: _scaled(run.get("parameters"), 1e-6), "{:.2f}"),
    "in all, M": (lambda run: _scaled(run.get("parameters_total"), 1e-6), "{:.1f}"),
    "steps": (lambda run: run.get("step"), "{:.0f}"),
    "wall-clock minutes": (lambda run: run.get("minutes"), "{:.1f}"),
}
"""Heading -> figure of a run, which has no better end, and how it is written."""
CONSTANT = ("tokens", "bits", "parameters, M", "in all, M")
"""The same for every seed."""


def markdown_report(results: Mapping[str, Any]) -> str:
    """The report as a Markdown page.

    Args:
        results: content of results.json: `suite`, `rows` (one a row and seed) and, where they are there,
            `overhead` and `pending`.
    """
    parts = [f"# {escape_markdown(report_title(results))}"]
    parts += [escape_markdown(text) for text in introduction(results)]
    parts += [section_markdown(section) for section in report_sections(results)]
    return "\n\n".join(parts) + "\n"


def report_title(results: Mapping[str, Any]) -> str:
    """The suite's title, or its name."""
    suite = results.get("suite", {})
    return suite.get("title") or suite.get("name") or "Benchmark"


def introduction(results: Mapping[str, Any]) -> list[str]:
    """Paragraphs under the title: what the suite asks, its budget, whose pictures these are, what has not run yet."""
    suite = results.get("suite", {})
    paragraphs = [text.strip() for text in (suite.get("about") or "").split("\n\n") if text.strip()]
    setting = []
    if suite.get("minutes") is not None:
        setting.append(f"{suite['minutes']:g} minutes of training a row")
    if suite.get("threads") is not None:
        setting.append(f"{suite['threads']} thread{'s' if suite['threads'] > 1 else ''}")
    if suite.get("seeds"):
        setting.append(f"seed{'s' if len(suite['seeds']) > 1 else ''} {', '.join(map(str, suite['seeds']))}")
    if suite.get("file"):
        setting.append(f"suite {suite['file']}")
    paragraphs += ["; ".join(setting) + "."] if setting else []
    paragraphs += [suite["attribution"]] if suite.get("attribution") else []
    paragraphs += [pending_sentence(results["pending"])] if results.get("pending") else []
    return paragraphs if results.get("rows") else [*paragraphs, "No row has been run yet."]


def pending_sentence(pending: Sequence[Sequence[Any]]) -> str:
    """Which rows and seeds are still to run."""
    seeds: dict[str, list[str]] = {}
    for name, seed in pending:
        seeds.setdefault(name, []).append(str(seed))
    rows = "; ".join(f"{name} (seed{'s' if len(s) > 1 else ''} {', '.join(s)})" for name, s in seeds.items())
    return f"Not run yet, so this report is incomplete: {rows}."


def report_sections(results: Mapping[str, Any]) -> list[Section]:
    """All sections in their order; those without content are left out."""
    sections = [
        main_section(results),
        verdict_section(results),
        made_of_section(results),
        *text_to_image_sections(results),
        overhead_section(results),
        *probe_sections(results),
        seed_section(results),
        commands_section(results),
        protocol_section(results),
    ]
    return [section for section in sections if section is not None]


def main_section(results: Mapping[str, Any]) -> Section | None:
    """A line for each row, and decode mode of a tokenizer: mean ± standard deviation over seeds."""
    lines = result_lines(results)
    if not lines:
        return None
    figures = [name for name in DIRECTIONS if any(name in line.figures for line in lines)]
    columns = {
        name: column
        for name, column in RUN_COLUMNS.items()
        if any(column[0](run) is not None for line in lines for run in line.runs)
    }
    fair = [line.comparable for line in lines]
    cells = {
        name: cells_of([line.figures.get(name) for line in lines], fair, FORMS[name], DIRECTIONS[name])
        for name in figures
    }
    rows = [
        [
            line.name + ("" if line.comparable else NOT_COMPARED),
            *_mode_cell(line.mode),
            str(len(line.runs)),
            *(cells[name][number] for name in figures),
            *(_run_cell(line, name) for name in columns),
        ]
        for number, line in enumerate(lines)
    ]
    headings = [
        "row",
        *_mode_heading(line.mode for line in lines),
        "n",
        *(f"{name} {arrow(name)}" for name in figures),
        *columns,
    ]
    note = (
        "Mean ± sample standard deviation over n seeds; with one seed the figure alone. Bold: the best of the "
        "comparable rows."
    )
    if not all(line.comparable for line in lines):
        note += f"{NOT_COMPARED}: tokens or bits differ, not compared with the others."
    return Section("Results", [Table(headings, rows), note])


def _mode_heading(modes: Iterable[str]) -> list[str]:
    """The heading of decode modes, where there are any."""
    return ["decode"] if any(modes) else []


def _mode_cell(mode: str) -> list[str]:
    return [mode] if mode else []


def arrow(figure: str) -> str:
    """Which way a figure is better."""
    return "↑" if DIRECTIONS[figure] > 0 else "↓"


def _run_cell(line: Line, column: str) -> str:
    value, form = RUN_COLUMNS[column]
    spread = over_seeds(value(run) for run in line.runs)
    if spread is None:
        return ABSENT
    if column in CONSTANT or spread.std == 0:
        return form.format(spread.mean)
    return spread.text(form)


def seed_section(results: Mapping[str, Any]) -> Section | None:
    """A line for each row, seed and decode mode, with the standard errors over pictures that are known."""
    runs = results.get("rows", [])
    scored = [(run, mode, figures) for run in runs for mode, figures in modes_of(run).items()]
    if not scored:
        return None
    names = [name for name in DIRECTIONS if any(name in figures for _, _, figures in scored)]
    columns = [
        name
        for name in RUN_COLUMNS
        if name not in CONSTANT and any(RUN_COLUMNS[name][0](run) is not None for run in runs)
    ]
    rows = [
        [
            run["name"],
            str(run["seed"]),
            *_mode_cell(mode),
            *(_single(figures, name) for name in names),
            *(_run_cell(Line(run["name"], mode, True, [run], {}), name) for name in columns),
            run.get("commit") or ABSENT,
        ]
        for run, mode, figures in scored
    ]
    headings = [
        "row",
        "seed",
        *_mode_heading(mode for _, mode, _ in scored),
        *(f"{name} {arrow(name)}" for name in names),
        *columns,
        "commit",
    ]
    note = "± after a figure: its standard error over pictures, of a kernel distance by jackknife."
    return Section("Each seed", [Table(headings, rows), note])


def _single(figures: Mapping[str, float], name: str) -> str:
    if figures.get(name) is None:
        return ABSENT
    form = FORMS[name]
    error = figures.get(f"{name}_se")
    return form.format(figures[name]) + ("" if error is None else f" ± {form.format(error)}")


def _codebook(run: Run) -> Mapping[str, float]:
    return weights_of(run).get("codebook") or {}


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
