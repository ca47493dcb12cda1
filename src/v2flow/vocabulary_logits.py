"""Logits of tokens over a vocabulary, not computed yet: all of them at once, or any tile of them, noise included."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from v2flow.devices import host_generator

BLOCK = {"cpu": (128, 512), "cuda": (1024, 4096)}
"""Tokens and entries of a block of noise, and of the smallest tile: small enough for a CPU's caches, large enough for a
GPU to be worth its kernels."""
_COLUMN_BLOCKS = 1 << 14  # more than any vocabulary has


@dataclass(frozen=True)
class GumbelNoise:
    """Standard Gumbel noise times an amplitude, the same whenever and in whatever tiles it is computed.

    Each block of tokens and entries (`block_shape`) has its own generator, seeded from one number and the block's
    place, so the noise depends on neither the memory budget nor the precision; it does on the kind of device.

    Attributes:
        seed: of this draw.
        amplitude: factor of the noise.
    """

    seed: int
    amplitude: float

    @classmethod
    def draw(cls, amplitude: float, generator: torch.Generator | None) -> "GumbelNoise":
        """Noise whose seed is one draw of `generator`."""
        return cls(int(torch.randint(1 << 32, (), generator=host_generator(generator))), amplitude)

    def add_to(self, logits: Tensor, row: int = 0, column: int = 0) -> Tensor:
        """Add the noise to a tile `[n, v]` in place, whose corner, at the corner of a block, is (`row`, `column`)."""
        generator, (height, width) = torch.Generator(logits.device), block_shape(logits.device)
        first = _mix(self.seed)
        for rows in spans(len(logits), height):
            for columns in spans(logits.shape[1], width):
                place = (row + rows.start) // height * _COLUMN_BLOCKS + (column + columns.start) // width
                generator.manual_seed(_mix(first + place))
                block = logits[rows, columns]
                uniform = torch.rand(block.shape, generator=generator, device=logits.device)
                gumbel = uniform.clamp_min_(1e-20).log_().neg_().clamp_min_(1e-20).log_()
                block.sub_(gumbel.to(logits.dtype), alpha=self.amplitude)
        return logits


def _mix(number: int) -> int:
    """A permutation of 32 bits, those that torch's CPU generator takes from a seed (the last step of MurmurHash3):
    blocks of one draw never share a seed, and neighbours get unrelated ones."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        number &= 0xFFFFFFFF
        number = (number ^ (number >> shift)) * factor
    number &= 0xFFFFFFFF
    return number ^ (number >> 16)


@dataclass(frozen=True)
class Logits:
    """`(queries·keysᵀ + bias + noise) / temperature`, not computed yet.

    Attributes:
        queries: `[…, d]`.
        keys: `[V, d]`.
        bias: `[V]`.
        noise: if there is any, tiles are cut at multiples of `block_shape`.
        temperature: positive.
    """

    queries: Tensor
    keys: Tensor
    bias: Tensor | None = None
    noise: GumbelNoise | None = None
    temperature: float = 1.0

    def to(self, dtype: torch.dtype) -> "Logits":
        """The same logits with queries, keys and bias of another dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, queries=self.queries.to(dtype), keys=self.keys.to(dtype), bias=bias)

    def whole(self) -> Tensor:
        """All of them, `[…, V]`."""
        logits = (
            self.queries @ self.keys.T if self.bias is None else F.linear(self.queries, self.keys, self.bias)
        )
        if self.noise is not None:
            logits = logits + self.noise.add_to(torch.zeros_like(logits).flatten(0, -2)).view_as(logits)
        if self.temperature != 1.0:  # a division of every logit by one costs as much as the softmax
            logits = logits / self.temperature
        return logits

    def flat(self) -> "Logits":
        """The same with queries `[n, d]` and a temperature of 1."""
        t = self.temperature
        flat = replace(self, queries=self.queries.flatten(0, -2), temperature=1.0)
        if t == 1.0:
            return flat
        bias = None if self.bias is None else self.bias / t
        noise = None if self.noise is None else replace(self.noise, amplitude=self.noise.amplitude / t)
        return replace(flat, queries=flat.queries / t, bias=bias, noise=noise)

    def tile(self, rows: slice, columns: slice, buffer: Tensor) -> Tensor:
        """Rows by columns of flat ones, in the memory of `buffer`."""
        queries, keys = self.queries[rows], self.keys[columns]
        tile = part_of(buffer, len(queries), len(keys))
        if self.bias is None:
            torch.mm(queries, keys.T, out=tile)
        else:
            torch.addmm(self.bias[columns], queries, keys.T, out=tile)
        return tile if self.noise is None else self.noise.add_to(tile, rows.start, columns.start)


def block_shape(device: torch.device) -> tuple[int, int]:
    """Tokens and entries of a block on this device."""
    return BLOCK.get(device.type, BLOCK["cpu"])


def spans(total: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `total`."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def part_of(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """A contiguous `[rows, columns]` in the memory of a flat buffer."""
    return buffer[: rows * columns].view(rows, columns)
