"""Attention over a vocabulary tile by tile: a tile of logits, never the matrix of all tokens by all entries.

Forward keeps a running softmax (online softmax) over tiles of the vocabulary; backward computes each tile again from
queries and keys, noise included. `vocabulary_attention` says what is computed and decides when this way is taken.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from v2flow.errors import V2FlowError
from v2flow.vocabulary_logits import GumbelNoise, Logits, block_shape, part_of, spans

TILE = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Logits in a tile: more than that is no faster, and on a CPU no longer near its caches."""
SLACK = 20.0
"""How far a logit may lie above the reference of its row's running sum before the sum is scaled down. Scaling at each
larger maximum would be a pass over all embeddings a tile; sums of exp(20) are far from overflow."""


@dataclass(frozen=True)
class Tiling:
    """Shape of the tiles, and what is said of the distributions on the way.

    Attributes:
        tokens: rows of a tile.
        entries: columns of a tile.
        described: first rows whose entropy and most probable words are wanted.
        top: how many words, at most as many as there are entries.
    """

    tokens: int
    entries: int
    described: int = 0
    top: int = 1


def fit_tiles(tokens: int, values: Tensor, dtype: torch.dtype, budget: int, noise: bool) -> Tiling:
    """The largest tiles that fit into `budget` bytes and are worth it.

    Args:
        tokens: rows of the whole matrix; its columns are the rows of `values`.
        dtype: of the logits; values of another type are converted tile by tile.
        noise: whether blocks of noise are needed as well.

    Raises:
        V2FlowError: not even the smallest tile fits.
    """
    entries, item = len(values), dtype.itemsize
    converted = 0 if values.dtype == dtype else values.shape[1]
    height, width = block_shape(values.device)
    fixed = noise * height * width * (4 + item)  # in fp32 and converted

    def column(rows: int) -> int:
        """Bytes: logits and, in backward, their gradients; a row of values."""
        return (2 * rows + converted) * item

    rows, narrow = min(tokens, 8 * height), min(entries, width)
    while rows > height and fixed + column(rows) * narrow > budget:
        rows = (rows - 1) // height * height
    smallest = fixed + column(rows) * narrow
    if smallest > budget:
        raise V2FlowError(
            f"option resampler.memory_budget_mb: expected at least {math.ceil(smallest / 2**18) / 4:g}, for tiles of "
            f"{rows} tokens by {narrow} of {entries} entries, found {budget / 2**20:g}"
        )
    columns = min((budget - fixed) // column(rows), TILE.get(values.device.type, TILE["cpu"]) // rows)
    return Tiling(rows, min(entries, max(columns // width * width, narrow)))


def largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row of `[n, v]`, falling, and their columns; of equals the first if count is 1."""
    found = logits.max(1, keepdim=True) if count == 1 else logits.topk(count, dim=1)
    return found.values, found.indices


class _Description:
    """Entropy and most probable words of the first `rows` rows of a strip of tiles, gathered tile by tile.

    With p = exp(logit - reference), total = Σ p and moment = Σ p·(logit - reference), the entropy is
    log(total) - moment / total.
    """

    def __init__(self, rows: int, top: int, buffer: Tensor) -> None:
        self.rows, self.top, self.buffer = rows, top, buffer
        self.moment = buffer.new_zeros(rows)
        self.logits = buffer.new_full((rows, top), -math.inf)
        self.words = torch.zeros(rows, top, dtype=torch.long, device=buffer.device)

    def see_logits(self, tile: Tensor, start: int) -> None:
        """Look for the largest logits in a tile whose first column is `start`."""
        logits, words = largest(tile[: self.rows], min(self.top, tile.shape[1]))
        # What was found before comes first, and stays first among equals.
        logits, words = torch.cat([self.logits, logits], 1), torch.cat([self.words, words + start], 1)
        self.logits, places = largest(logits, self.top)
        self.words = words.gather(1, places)

    def keep(self, shifted: Tensor) -> None:
        """Keep logits minus reference until their exponentials are there."""
        rows = shifted[: self.rows]
        part_of(self.buffer, *rows.shape).copy_(rows)

    def see_exponentials(self, tile: Tensor) -> None:
        rows = tile[: self.rows]
        self.moment += part_of(self.buffer, *rows.shape).mul_(rows).sum(1)

    def rise(self, step: Tensor, total: Tensor) -> None:
        """The reference rises by `step` `[n, 1]`; `total` `[n, 1]` is the sum up to now, before."""
        step, total = step[: self.rows, 0], total[: self.rows, 0]
        self.moment.sub_(step * total).mul_(step.neg().exp())

    def finish(self, total: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Entropy `[rows]`, words and their probabilities `[rows, top]`."""
        total, log_sum = total[: self.rows], log_sum[: self.rows]
        entropy = total[:, 0].log() - self.moment / total[:, 0]
        return entropy.clamp_min_(0), self.words, (self.logits - log_sum).exp()


def _mix_strip(
    logits: Logits, values: Tensor, rows: slice, tiling: Tiling, buffers: tuple[Tensor, Tensor], out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Expected values of some rows into `out` `[n, D]`; their log-sum-exp `[n, 1]` and description are returned."""
    described = min(max(tiling.described - rows.start, 0), len(out))
    description = _Description(described, tiling.top, buffers[1])
    reference, total = out.new_zeros(len(out), 1), out.new_zeros(len(out), 1)
    out.zero_()
    for columns in spans(len(logits.keys), tiling.entries):
        tile = logits.tile(rows, columns, buffers[0])
        if described:
            description.see_logits(tile, columns.start)
        highest = tile.amax(1, keepdim=True)
        if not columns.start:
            reference = highest
        elif out.is_cuda or (highest > reference + SLACK).any():  # to ask a GPU costs more than to rescale
            step = (highest - reference).clamp_min_(0)
            scale = step.neg().exp()
            description.rise(step, total)
            out.mul_(scale)
            reference, total = reference + step, total * scale
        tile.sub_(reference)
        if described:
            description.keep(tile)
        total = total + tile.exp_().sum(1, keepdim=True)
        if described:
            description.see_exponentials(tile)
        out.addmm_(tile, values[columns].to(tile.dtype))
    out.div_(total)
    log_sum = reference + total.log()
    return log_sum, *description.finish(total, log_sum)


def _differentiate_strip(
    logits: Logits,
    values: Tensor,
    rows: slice,
    tiling: Tiling,
    buffers: tuple[Tensor, Tensor],
    parts: tuple[Tensor, Tensor, Tensor],
    grads: list[Tensor | None],
) -> None:
    """Add what some rows contribute to the gradients of queries, keys, values and bias, those that are wanted.

    Args:
        parts: of these rows, upstream gradient `[n, D]`, expected values `[n, D]` and log-sum-exp `[n, 1]`.
    """
    above, out, log_sum = parts
    for_queries, for_keys, for_values, for_bias = grads
    # Σ_v p_v·(∂/∂p_v) of each token, without the probabilities: products of rows, no matrix for their terms.
    mean = torch.bmm(above[:, None], out[:, :, None])[:, 0]
    for columns in spans(len(logits.keys), tiling.entries):
        shares = logits.tile(rows, columns, buffers[0]).sub_(log_sum).exp_()
        if for_values is not None:
            for_values[columns].addmm_(shares.T, above)
        part = values[columns].to(shares.dtype)
        tile = torch.mm(above, part.T, out=part_of(buffers[1], *shares.shape)).sub_(mean).mul_(shares)
        if for_queries is not None:
            for_queries[rows].addmm_(tile, logits.keys[columns])
        if for_keys is not None:
            for_keys[columns].addmm_(tile.T, logits.queries[rows])
        if for_bias is not None:
            for_bias[columns].add_(tile.sum(0))


class _TiledAttention(torch.autograd.Function):
    """See `tiled_attention`."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor | None,
        noise: GumbelNoise | None,
        tiling: Tiling,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = Logits(queries, keys, bias, noise)
        buffers = _buffers(queries, tiling)
        out = queries.new_empty(len(queries), values.shape[1])
        strips = []
        for rows in spans(len(queries), tiling.tokens):
            strips.append(_mix_strip(logits, values, rows, tiling, buffers, out[rows]))
        log_sum, entropy, words, shares = (torch.cat(parts) for parts in zip(*strips, strict=True))
        ctx.save_for_backward(queries, keys, values, bias, out, log_sum)
        ctx.noise, ctx.tiling = noise, tiling
        ctx.mark_non_differentiable(entropy, words, shares)
        return out, entropy, words, shares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, bias, out, log_sum = ctx.saved_tensors
        grads = [
            torch.zeros_like(x, dtype=out.dtype) if wanted else None
            for x, wanted in zip((queries, keys, values, bias), ctx.needs_input_grad, strict=False)
        ]
        logits = Logits(queries, keys, bias, ctx.noise)
        buffers = _buffers(queries, ctx.tiling)
        with torch.autocast(queries.device.type, enabled=False):
            for rows in spans(len(queries), ctx.tiling.tokens):
                parts = (upstream[rows].contiguous(), out[rows], log_sum[rows])
                _differentiate_strip(logits, values, rows, ctx.tiling, buffers, parts, grads)
        return *grads, None, None


def _buffers(like: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """Memory of two tiles."""
    size = tiling.tokens * tiling.entries
    return like.new_empty(size), like.new_empty(size)


@torch.compiler.disable
def tiled_attention(logits: Logits, values: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`softmax(logits)·values`, exactly, in memory for two tiles; differentiable once.

    Args:
        logits: flat ones, in fp32 or double, and so is everything that is computed.
        values: `[V, D]`, of any floating type.

    Returns:
        Expected values `[n, D]`; and without gradients, of the first `tiling.described` rows, entropy in nats
        `[described]`, the most probable words and their probabilities, falling, `[described, top]`.
    """
    with torch.autocast(values.device.type, enabled=False):
        found: tuple[Tensor, Tensor, Tensor, Tensor] = _TiledAttention.apply(
            logits.queries, logits.keys, values, logits.bias, logits.noise, tiling
        )
        return found
