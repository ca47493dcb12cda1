"""Soft look-up in a vocabulary: attention whose keys and values are the entries of an embedding table.

Paper section 3.2: the expected embedding under a (Gumbel) softmax over the LLM's vocabulary. A matrix of all tokens by
all entries is made only where it fits into a memory budget, because that is fastest for small ones.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from v2flow.arrays import (
    EmbeddingTable,
    PerToken,
    TokenEmbeddings,
    TopProbabilities,
    TopWords,
    WordProbabilities,
)
from v2flow.errors import V2FlowError
from v2flow.vocabulary_logits import Logits
from v2flow.vocabulary_tiles import fit_tiles, largest, tiled_attention

MEMORY_BUDGET_MB = 256.0
MATRICES = 3
"""Matrices of logits' size that the plain way holds at its peak, in backward: probabilities and two gradients."""


@dataclass
class SoftDistribution:
    """What the vocabulary says of each token. Without gradients but for the embeddings; `b` ≤ B pictures are described.

    Attributes:
        embeddings: expected embeddings, `[B, N, D]`.
        entropy: of each token's distribution in nats, `[b, N]`.
        words: the k most probable entries, `[b, N, k]` long. The first of equals where k is 1; where k is more, which
            of equally probable words comes first is open.
        probabilities: theirs, `[b, N, k]`, falling.
    """

    embeddings: TokenEmbeddings
    entropy: PerToken
    words: TopWords
    probabilities: TopProbabilities

    def dense(self, entries: int) -> WordProbabilities:
        """All probabilities `[b, N, V]` in the table's order, of a description by all V = `entries` words.

        Raises:
            V2FlowError: it has fewer words.
        """
        if self.words.shape[-1] != entries:
            raise V2FlowError(
                f"distribution: expected the probabilities of all {entries} words, found {self.words.shape[-1]}; "
                f"ask for top={entries}"
            )
        return torch.zeros_like(self.probabilities).scatter_(-1, self.words, self.probabilities)


def vocabulary_attention(
    logits: Logits,
    values: EmbeddingTable,
    hard: bool = False,
    described: int | None = None,
    top: int = 1,
    memory_budget_mb: float = MEMORY_BUDGET_MB,
) -> SoftDistribution:
    """`softmax(logits)·values`, with gradients to queries, keys, bias and values.

    Computed in fp32, or in double where the queries are; to be called outside of autocast regions. The budget decides
    how, and changes results by no more than rounding; noise is the same whatever the budget.

    Args:
        logits: of queries `[B, N, d]`.
        values: `[V, D]`.
        hard: the row of the most probable word instead of the mixture, with the mixture's gradient (straight-through).
        described: of how many of the B entropy and words are wanted, the first ones; None = all.
        top: words wanted of each token.
        memory_budget_mb: MB (2**20 bytes) for logits and what is made of them. Not counted are queries, keys, values
            and embeddings with their gradients, and the description.

    Raises:
        V2FlowError: the budget does not hold the smallest tiles.
    """
    dtype = torch.promote_types(logits.queries.dtype, torch.float32)
    logits, budget = logits.to(dtype), int(memory_budget_mb * 2**20)
    count, tokens = logits.queries.shape[:2]
    described = count if described is None else min(described, count)
    top = min(top, len(values))
    # The hard way needs every token's word.
    shown, words = (count, max(top, 1)) if hard else (described, top)
    if MATRICES * count * tokens * len(values) * dtype.itemsize <= budget:
        soft = _whole(logits, values.to(dtype), shown, words)
    else:
        tiling = fit_tiles(count * tokens, values, dtype, budget, logits.noise is not None)
        tiling = replace(tiling, described=shown * tokens, top=words)
        found = tiled_attention(logits.flat(), values, tiling)
        soft = SoftDistribution(*(x.unflatten(0, (-1, tokens)) for x in found))
    if hard:
        row, mixture = values.detach()[soft.words[..., 0]].to(dtype), soft.embeddings
        soft.embeddings = row + (mixture - mixture.detach())
    return SoftDistribution(
        soft.embeddings,
        soft.entropy[:described],
        soft.words[:described, :, :top],
        soft.probabilities[:described, :, :top],
    )


def _whole(logits: Logits, values: Tensor, described: int, top: int) -> SoftDistribution:
    """By way of the whole matrix."""
    scores = logits.whole()
    probabilities = F.softmax(scores, dim=-1)
    with torch.no_grad():
        shares = probabilities[:described]
        words = largest(scores[:described].flatten(0, 1), top)[1].unflatten(0, shares.shape[:2])
        del scores
        entropy = -shares.clamp_min(1e-12).log_().mul_(shares).sum(-1)
        likely = shares.gather(-1, words)
    return SoftDistribution(probabilities @ values, entropy, words, likely)
