"""The visual vocabulary: a cosine-similarity codebook in the LLM's embedding space (paper section 3.2).

Our own rather than a library's: no N×K one-hots, distribution asked for at call time, revival that is the same
on every rank, nothing updated in evaluation, in recomputation or without gradients.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from v2flow.arrays import Codebook, Scalar, TokenEmbeddings, VisualIds
from v2flow.config import VisualVocabularyConfig


@dataclass
class Quantized:
    """Result of a look-up.

    Attributes:
        ids: `[B, N]` long, in [0, K).
        embeddings: unit codes `[B, N, D]`; gradients pass straight through to the input's direction.
        commitment: mean squared distance between the input's direction and its code, a scalar.
    """

    ids: VisualIds
    embeddings: TokenEmbeddings
    commitment: Scalar


def _all_reduce(x: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


class VisualVocabulary(nn.Module):
    """K unit vectors, each the running mean of the directions assigned to it.

    Codes are set to tokens of the first training batches: unseen codes count as dead and are revived.
    """

    codes: Codebook
    counts: Tensor
    sums: Tensor

    def __init__(self, dim: int, config: VisualVocabularyConfig) -> None:
        super().__init__()
        self.config = config
        codes = F.normalize(torch.randn(config.size, dim), dim=-1)
        self.register_buffer("codes", codes)
        self.register_buffer("sums", codes.clone())
        self.register_buffer("counts", torch.zeros(config.size))

    def forward(self, x: TokenEmbeddings, generator: torch.Generator | None = None) -> Quantized:
        """Quantise `[B, N, D]` by cosine similarity; in training mode the codes follow."""
        with torch.autocast(x.device.type, enabled=False):
            directions = F.normalize(x.float(), dim=-1)
            ids = self.nearest(directions.detach())
            codes = self.codes[ids]
            if self.training and torch.is_grad_enabled():
                self._update(directions.detach().flatten(0, 1), ids.flatten(), generator)
            commitment = (directions - codes).square().sum(-1).mean()
            return Quantized(ids, directions + (codes - directions).detach(), commitment)

    def nearest(self, directions: TokenEmbeddings) -> VisualIds:
        """Ids `[B, N]` of the codes most similar to unit vectors `[B, N, D]`."""
        return (directions @ self.codes.T).argmax(-1)

    def lookup(self, ids: VisualIds) -> TokenEmbeddings:
        """Unit codes `[B, N, D]` of ids `[B, N]`."""
        return self.codes[ids]

    @torch.no_grad()
    def _update(self, directions: Tensor, ids: Tensor, generator: torch.Generator | None) -> None:
        counts = torch.zeros_like(self.counts).index_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))
        sums = torch.zeros_like(self.sums).index_add_(0, ids, directions)
        self.counts.lerp_(_all_reduce(counts), 1 - self.config.decay)
        self.sums.lerp_(_all_reduce(sums), 1 - self.config.decay)
        if self.config.revive_below > 0:
            self._revive(directions, generator)
        self.codes.copy_(F.normalize(self.sums, dim=-1))

    def _revive(self, directions: Tensor, generator: torch.Generator | None) -> None:
        """Set dead codes to random tokens of the batch, the same ones on every rank, with an average weight."""
        mean = self.counts.mean()
        dead = self.counts < self.config.revive_below * mean
        pick = torch.randint(
            len(directions), (len(self.codes),), generator=generator, device=directions.device
        )
        fresh = directions[pick]
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(fresh, src=0)
        self.sums.copy_(torch.where(dead[:, None], mean * fresh, self.sums))
        self.counts.copy_(torch.where(dead, mean, self.counts))
