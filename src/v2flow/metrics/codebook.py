"""Use of the codebook: how many codes occur, and how evenly."""

import torch
from torch import Tensor
from torchmetrics import Metric


def codebook_statistics(counts: Tensor) -> dict[str, float]:
    """Usage and perplexity of a codebook.

    Args:
        counts: [K], how often each code was chosen; any non-negative numbers.

    Returns:
        `usage`, the share of the K codes that occur at all, in [0, 1], and `perplexity`, exp of the entropy
        (nats) of the code distribution, in [1, K] (0 when nothing was counted).
    """
    counts = counts.double()
    total = counts.sum()
    if total == 0:
        return {"usage": 0.0, "perplexity": 0.0}
    probabilities = counts / total
    entropy = -torch.xlogy(probabilities, probabilities).sum()
    return {"usage": (counts > 0).double().mean().item(), "perplexity": entropy.exp().item()}


class CodebookUsage(Metric):
    """Counts the codes of `size` over token ids; the counts are summed over ranks before anything is computed."""

    full_state_update = False
    counts: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.add_state("counts", default=torch.zeros(size, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, ids: Tensor, valid: Tensor | None = None) -> None:
        """Adds ids [B, ...] in [0, K); rows where `valid` [B] is False are left out.

        Raises:
            ValueError: an id is outside the codebook.
        """
        if valid is not None:
            ids = ids[valid]
        ids = ids.flatten()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.size:
            raise ValueError(
                f"token ids {int(ids.min())}..{int(ids.max())} do not fit a codebook of {self.size}"
            )
        self.counts += torch.bincount(ids, minlength=self.size)

    def compute(self) -> dict[str, float]:
        """`usage` and `perplexity`, see :func:`codebook_statistics`."""
        return codebook_statistics(self.counts)
