"""The figures of a text-to-image run by the names of the report's columns."""

import math
from collections.abc import Mapping
from typing import Any

SHAPES, RETRIEVAL, NATS = "shapes score", "retrieval", "nats a visual token"
PAIR, CLIP = "pair-efficientnet-lite0", "clip score"
GENERATED = "generated"
FORMS = {
    SHAPES: "{:.3f}",
    RETRIEVAL: "{:.3f}",
    NATS: "{:.3f}",
    PAIR: "{:.3f}",
    f"{PAIR}_se": "{:.3f}",
    CLIP: "{:.2f}",
}
"""Figure -> how it is written, beside those of `v2flow.cli_report.COLUMNS`."""


def findings(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `v2flow evaluate` found of a text-to-image model; empty for a tokenizer."""
    return run.get("text_to_image") or {}


def drawing_figures(run: Mapping[str, Any], row: str = GENERATED) -> dict[str, float]:
    """Figure -> value, and `FIGURE_se` where its standard error over pictures is known, of a row of pictures.

    Args:
        row: the generated pictures, or a control, see `v2flow.t2i.metrics.rows`; retrieval and nats a visual token are
            of the generated ones only.
    """
    found = findings(run)
    figures: dict[str, float] = {}
    scores = (found.get("shapes") or {}).get(row)
    if scores:
        figures |= {SHAPES: scores["overall"], f"{SHAPES}_se": shapes_error(scores, found["drawn"])}
    figures |= (found.get("distances") or {}).get(row) or {}
    score = (found.get("clip_score") or {}).get(row)
    figures |= {CLIP: score} if score is not None else {}
    if row == GENERATED:
        retrieval = found["retrieval"]
        figures |= {RETRIEVAL: retrieval["accuracy"], f"{RETRIEVAL}_se": retrieval["accuracy_se"]}
        figures[NATS] = found["language"]["nats_per_token"]
    return figures


def shapes_error(scores: Mapping[str, float], pictures: int) -> float:
    """Binomial standard error of `overall`, the mean of the tasks' shares, each of an equal part of the pictures."""
    shares = [share for task, share in scores.items() if task != "overall"]
    return math.sqrt(sum(p * (1 - p) for p in shares) / (len(shares) * pictures))
