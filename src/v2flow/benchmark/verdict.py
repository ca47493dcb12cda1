"""What the figures say, in sentences that are made from them and claim no more than their spread allows."""

from collections.abc import Mapping, Sequence
from typing import Any

from v2flow.benchmark.document import Block, Bullets, Section
from v2flow.benchmark.spread import (
    DIRECTIONS,
    FORMS,
    KID,
    LEVEL,
    Line,
    best_lines,
    figure_text,
    result_lines,
    told_apart,
)
from v2flow.benchmark.t2i_figures import CLIP, NATS, PAIR, RETRIEVAL, SHAPES

JUDGED = (
    SHAPES, RETRIEVAL, NATS, "psnr", KID, "rfd-efficientnet-lite0", "lpips", "rfid", "kid-inception", PAIR, CLIP,
)  # fmt: skip
DISTANCES = (SHAPES, RETRIEVAL, NATS, "psnr", KID, PAIR)
"""Figures whose distance from the reference is given."""
REFERENCE = "VQ"
HOW = (
    f"Two rows are told apart when Welch's t-test over their seeds gives p < {LEVEL:g} (each pair by itself, not "
    "corrected for the number of pairs) and, where a figure's standard error over the pictures is known (kernel "
    "distances, shares and means of pictures), the difference also exceeds twice that of the difference. One seed has "
    "no spread, so its differences are given but not judged. All of it holds for these pictures and this budget."
)


def verdict_section(results: Mapping[str, Any]) -> Section | None:
    """The section of the report; None while there are not two comparable rows."""
    every = result_lines(results)
    lines = [line for line in every if line.comparable]
    if len({line.name for line in lines}) < 2:
        return None
    sentences = [best_sentence(lines, figure) for figure in JUDGED]
    blocks: list[Block] = [Bullets([sentence for sentence in sentences if sentence])]
    reference = reference_name(results, lines)
    against = against_reference(lines, reference) if reference is not None else []
    if against:
        how = ", each row at its best decode mode for the figure" if any(line.mode for line in lines) else ""
        blocks += [f"Against {reference}{how}:", Bullets(against)]
    others = list(dict.fromkeys(line.name for line in every if not line.comparable))
    if others:
        blocks.append(f"Not compared, since tokens or bits differ: {', '.join(others)}.")
    return Section("What the figures say", [*blocks, HOW])


def best_sentence(lines: Sequence[Line], figure: str) -> str | None:
    """Which row has the best figure and which rows it can be told apart from; None with fewer than two rows."""
    ranked = best_lines(lines, figure)
    if len(ranked) < 2:
        return None
    best, *rest = ranked
    groups: dict[bool | None, list[str]] = {True: [], False: [], None: []}
    for line in rest:
        groups[told_apart(best.figures[figure], line.figures[figure])].append(_named(line, figure))
    word = "Highest" if DIRECTIONS[figure] > 0 else "Lowest"
    sentence = f"{word} {figure}: {_named(best, figure)}{_seeds(best, figure)}."
    for apart, start in ((True, "Told apart from"), (False, "Cannot be told apart from")):
        if groups[apart]:
            sentence += f" {start} {', '.join(groups[apart])}."
    if groups[None]:
        sentence += f" Not judged (one seed): {', '.join(groups[None])}."
    return sentence


def reference_name(results: Mapping[str, Any], lines: Sequence[Line]) -> str | None:
    """The row that distances are given to: the one named VQ, or else the suite's own reference."""
    names = [line.name for line in lines]
    wanted = (REFERENCE, results.get("suite", {}).get("reference"))
    return next((name for name in wanted if name in names), None)


def against_reference(lines: Sequence[Line], reference: str) -> list[str]:
    """One item a row: how far its best figures are from the reference's."""
    items: dict[str, list[str]] = {}
    for figure in DISTANCES:
        best = {line.name: line for line in best_lines(lines, figure)}
        if reference not in best:
            continue
        base = best.pop(reference).figures[figure]
        for name in dict.fromkeys(line.name for line in lines if line.name in best):
            found = best[name].figures[figure]
            difference = found.mean - base.mean
            amount = FORMS[figure].format(abs(difference)) + (" dB" if figure == "psnr" else "")
            side = "above" if difference > 0 else "below"
            judged = {
                True: "more than the spread",
                False: "cannot be told apart",
                None: "one seed, not judged",
            }
            mode = f"{best[name].mode}; " if best[name].mode else ""
            items.setdefault(name, []).append(
                f"{figure} {amount} {side} ({mode}{judged[told_apart(found, base)]})"
            )
    return [f"{name}: {', '.join(parts)}." for name, parts in items.items()]


def _named(line: Line, figure: str) -> str:
    mode = f" ({line.mode})" if line.mode else ""
    return f"{line.name}{mode} {figure_text(figure, line.figures[figure])}"


def _seeds(line: Line, figure: str) -> str:
    n = line.figures[figure].n
    return f", {n} seed{'s' if n > 1 else ''}"
