"""Visual tokens without a model: each position's ids drawn from how often training pictures have them there."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from v2flow.errors import V2FlowError


def marginal_ids(loader: Iterable[Mapping[str, Any]], codebook_size: int) -> Tensor:
    """How often each id stands at each position, long `[N, K]`.

    Args:
        loader: batches {"ids": long [B, N] in [0, K), optional "valid": bool [B]}.

    Raises:
        V2FlowError: no picture.
    """
    counts: Tensor | None = None
    for batch in loader:
        ids = (batch["ids"][batch["valid"]] if "valid" in batch else batch["ids"]).cpu()
        if counts is None:
            counts = torch.zeros(ids.shape[1], codebook_size, dtype=torch.long)
        counts.scatter_add_(1, ids.T.contiguous(), torch.ones_like(ids.T.contiguous()))
    if counts is None or not int(counts.sum()):
        raise V2FlowError("training marginal: the data held no picture; expected at least one")
    return counts


def sample_marginal(counts: Tensor, number: int, generator: torch.Generator | None = None) -> Tensor:
    """Ids `[number, N]` drawn independently by counts `[N, K]`."""
    return torch.multinomial(counts.double(), number, replacement=True, generator=generator).T.contiguous()
