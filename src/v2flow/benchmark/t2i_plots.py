"""Plots of text-to-image rows."""

from collections.abc import Mapping
from typing import Any

from v2flow.benchmark.curves import training_curves
from v2flow.benchmark.drawing import Look

DRAWING_CAPTIONS = {
    "learning": (
        "On the way, on validation samples: nats a visual token given its caption, the shapes score and retrieval, "
        "mean over seeds with a band of one standard deviation, against steps and against minutes (the budget's, or "
        "else the run's own, spread evenly over its steps)."
    ),
}
"""Figure -> what it shows."""
_CURVES = {
    "visual": "← nats a visual token",
    "shapes/overall": "shapes score →",
    "retrieval": "retrieval →",
}


def learning(results: Mapping[str, Any], looks: dict[str, Look]) -> Any:
    """The training curves; None for tokenizers."""
    return training_curves(results, looks, _CURVES)
