"""Both vocabularies in one plane, as in the paper's second figure: points for a plot."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

POINTS = 250
"""Points of each vocabulary that are kept, drawn at random."""


def plane_points(table: Tensor, codes: Tensor, counts: Tensor, draws: torch.Generator) -> dict[str, Any]:
    """Directions of some of the LLM's rows `[V, D]` and of the codes `[K, D]`, seen along the same two axes.

    Args:
        counts: how often the pictures' tokens have each code, `[K]`.

    Returns:
        `variance`: the axes' shares of the rows' variance; `rows`: x and y of each; `codes`: x, y and the share of all
        tokens of each. To three digits, as a plot shows no more.
    """
    rows, points, shares = project(table, codes)
    used = counts.double() / counts.sum().clamp(min=1)
    points = torch.cat([points, used[:, None]], dim=1)
    chosen = {name: sample(x, draws, POINTS) for name, x in (("rows", rows), ("codes", points))}
    found = {name: [[float(f"{v:.3g}") for v in point] for point in x.tolist()] for name, x in chosen.items()}
    return {"variance": shares, **found}


def project(table: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """Directions of rows `[V, D]` and codes `[K, D]` in the plane of the rows' largest variance.

    Returns:
        `[V, 2]`, `[K, 2]`, and the two components' shares of the rows' variance.
    """
    rows, codes = (F.normalize(x.detach().double().cpu(), dim=-1) for x in (table, codes))
    values, vectors = torch.linalg.eigh(rows.T.cov())
    plane = vectors.flip(1)[:, :2]
    shares = (values.flip(0)[:2] / values.sum()).tolist()
    return (rows - rows.mean(0)) @ plane, (codes - rows.mean(0)) @ plane, shares


def sample(vectors: Tensor, draws: torch.Generator, size: int) -> Tensor:
    """At most `size` of the vectors `[n, D]`, all of them in their order if there are no more."""
    if len(vectors) <= size:
        return vectors
    chosen = torch.randperm(len(vectors), generator=draws)[:size].sort().values
    return vectors[chosen.to(vectors.device)]
