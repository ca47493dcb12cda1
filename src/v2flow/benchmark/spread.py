"""Figures over seeds: mean, standard deviation, and whether two rows differ by more than their spread."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from v2flow.benchmark.document import ABSENT, Best
from v2flow.benchmark.t2i_figures import CLIP, NATS, PAIR, RETRIEVAL, SHAPES, drawing_figures, findings
from v2flow.benchmark.t2i_figures import FORMS as DRAWING_FORMS
from v2flow.cli_report import COLUMNS

Run = Mapping[str, Any]
"""One row of results.json: a tokenizer or text-to-image model trained with one seed, and its figures."""

DIRECTIONS = {
    SHAPES: 1,
    RETRIEVAL: 1,
    NATS: -1,
    "psnr": 1,
    "psnr_pooled": 1,
    "ssim": 1,
    "kid-efficientnet-lite0": -1,
    "rfd-efficientnet-lite0": -1,
    "lpips": -1,
    "rfid": -1,
    "kid-inception": -1,
    PAIR: 1,
    CLIP: 1,
}
"""Figure -> 1 where more is better, -1 where less is; in the order of the tables' columns."""
FORMS = {name: form for name, (_, form) in COLUMNS.items()} | DRAWING_FORMS
"""Figure -> how it is written."""
KID = "kid-efficientnet-lite0"
LEVEL = 0.05
"""Probability below which a difference counts as one."""


@dataclass(frozen=True)
class Spread:
    """One figure over n seeds.

    Attributes:
        std: sample standard deviation (n - 1 in the denominator); None for one seed.
        error: mean standard error that the choice of evaluation pictures leaves, where it is known.
    """

    mean: float
    std: float | None
    n: int
    error: float | None = None

    def text(self, form: str) -> str:
        """`mean ± std`, the mean alone for one seed; `form` such as `{:.2f}` writes both."""
        mean = form.format(self.mean)
        return mean if self.std is None else f"{mean} ± {form.format(self.std)}"


@dataclass(frozen=True)
class Line:
    """A row in one decode mode over all of its seeds; the mode of a text-to-image model is empty."""

    name: str
    mode: str
    comparable: bool
    runs: list[Run]
    figures: dict[str, Spread]


def over_seeds(values: Iterable[float | None], errors: Iterable[float | None] = ()) -> Spread | None:
    """The spread of the values that are there; None if there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    known_errors = [error for error in errors if error is not None]
    return Spread(
        statistics.fmean(known),
        statistics.stdev(known) if len(known) > 1 else None,
        len(known),
        statistics.fmean(known_errors) if known_errors else None,
    )


def runs_by_name(results: Mapping[str, Any]) -> dict[str, list[Run]]:
    """Row name -> its runs, in the order of the suite."""
    rows: dict[str, list[Run]] = {}
    for run in results.get("rows", []):
        rows.setdefault(run["name"], []).append(run)
    return rows


def weights_of(run: Run) -> Mapping[str, Any]:
    """Figures of the averaged weights, or of the only ones there are."""
    weights = run.get("weights") or {}
    return weights.get("ema") or next(iter(weights.values()), {})


def modes_of(run: Run) -> Mapping[str, Mapping[str, float]]:
    """Decode mode -> figures; a text-to-image model's figures are under the empty name."""
    if findings(run):
        return {"": drawing_figures(run)}
    return weights_of(run).get("modes") or {}


def figure_spreads(sets: Iterable[Mapping[str, float]]) -> dict[str, Spread]:
    """Figure -> spread over sets of figures, one set a seed."""
    sets = list(sets)
    spreads = {
        name: over_seeds((s.get(name) for s in sets), (s.get(f"{name}_se") for s in sets))
        for name in DIRECTIONS
    }
    return {name: spread for name, spread in spreads.items() if spread is not None}


def result_lines(results: Mapping[str, Any]) -> list[Line]:
    """Every row in every decode mode, in the order of the suite."""
    lines = []
    for name, runs in runs_by_name(results).items():
        for mode in dict.fromkeys(mode for run in runs for mode in modes_of(run)):
            having = [run for run in runs if mode in modes_of(run)]
            figures = figure_spreads(modes_of(run)[mode] for run in having)
            lines.append(Line(name, mode, bool(runs[0].get("comparable", True)), having, figures))
    return lines


def best_lines(lines: Iterable[Line], figure: str) -> list[Line]:
    """Of each row the line with the best mean of a figure, the best row first; ties in the order of the suite."""
    best: dict[str, Line] = {}
    sign = DIRECTIONS[figure]
    for line in lines:
        if figure in line.figures:
            known = best.get(line.name)
            better = known is None or sign * line.figures[figure].mean > sign * known.figures[figure].mean
            best[line.name] = line if better else best[line.name]
    return sorted(best.values(), key=lambda line: -sign * line.figures[figure].mean)


def told_apart(first: Spread, second: Spread) -> bool | None:
    """Whether two means differ by more than their spread; None where one seed leaves the spread unknown.

    Welch's t-test over seeds at the level :data:`LEVEL`. Where the pictures' standard errors are known, the difference
    must also exceed twice that of the difference, as if each row had pictures of its own, which asks too much
    rather than too little.
    """
    difference = abs(first.mean - second.mean)
    if first.error is not None and second.error is not None:
        within = difference <= 2 * math.hypot(first.error, second.error)
        if within:
            return False
    if first.std is None or second.std is None:
        return None
    if first.std == second.std == 0:
        return difference > 0
    from scipy.stats import ttest_ind_from_stats

    test = ttest_ind_from_stats(
        first.mean, first.std, first.n, second.mean, second.std, second.n, equal_var=False
    )
    return bool(test.pvalue < LEVEL)


def cells_of(
    spreads: Sequence[Spread | None], comparable: Sequence[bool], form: str, direction: int
) -> list[str]:
    """Cells of a column; the best mean of the comparable ones is bold, and so is what prints like it.

    Args:
        direction: 1 where more is better, -1 where less is.
    """
    pairs = list(zip(spreads, comparable, strict=True))
    means = [spread.mean for spread, fair in pairs if fair and spread is not None]
    best = form.format(max(means, key=lambda mean: direction * mean)) if means else None
    cells = []
    for spread, fair in pairs:
        text = ABSENT if spread is None else spread.text(form)
        cells.append(Best(text) if fair and spread is not None and form.format(spread.mean) == best else text)
    return cells


def figure_text(figure: str, spread: Spread) -> str:
    """The spread as the tables print this figure."""
    return spread.text(FORMS[figure])
