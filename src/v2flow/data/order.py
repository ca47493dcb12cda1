"""The order of samples: a pure function of (seed, epoch, position), the same for any number of ranks and workers.

All randomness is a hash of integers (SplitMix64, Steele et al. 2014), so that it depends on no library's
random generator, on no earlier draw and on no process.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

BLOCK_SIZE = 512
"""Samples in a block: a shard or part of one."""
WINDOW_BLOCKS = 16
"""Neighbouring blocks of an epoch's order whose samples are mixed with each other."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function on uint64 values; wraps around by design."""
    x = (x ^ (x >> np.uint64(30))) * _M1
    x = (x ^ (x >> np.uint64(27))) * _M2
    return x ^ (x >> np.uint64(31))


def keyed_hashes(indices: np.ndarray, *key: int) -> np.ndarray:
    """One uint64 for each index, a pure function of (key, index)."""
    state = np.zeros(1, np.uint64)
    for part in key:
        # Python's integers, as numpy warns when a scalar (not an array) wraps around.
        state = _mix(state + np.uint64((part * int(_M1) + int(_GOLDEN)) & _MASK))
    return _mix(state + (indices.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def keyed_uniform(indices: np.ndarray, *key: int) -> np.ndarray:
    """One float64 in [0, 1) for each index, a pure function of (key, index)."""
    return (keyed_hashes(indices, *key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keyed_permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of 0 … count-1 as int64 [count], a pure function of (key, count)."""
    return np.argsort(keyed_hashes(np.arange(count), *key), kind="stable")


class ShuffledOrder:
    """Epochs over the samples of shards: blocks are permuted, then the samples within a few neighbouring blocks.

    A slice of an epoch touches only the windows that it lies in, so a resume reads nothing but those.

    Args:
        shard_sizes: samples in each shard; sample numbers count through the shards in this order.
        seed: epochs of different seeds are unrelated.
        block_size: most samples in a block; blocks do not cross shards.
        window_blocks: blocks that are mixed with each other.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        seed: int,
        block_size: int = BLOCK_SIZE,
        window_blocks: int = WINDOW_BLOCKS,
    ) -> None:
        self.seed = seed
        starts, sizes, first = [], [], 0
        for size in shard_sizes:
            offsets = np.arange(0, size, block_size)
            starts.append(first + offsets)
            sizes.append(np.minimum(block_size, size - offsets))
            first += size
        self._starts = np.concatenate(starts) if starts else np.zeros(0, np.int64)
        self._sizes = np.concatenate(sizes) if sizes else np.zeros(0, np.int64)
        self._window_blocks = window_blocks
        self._length = first
        self._plan = lru_cache(2)(self._make_plan)
        self._window = lru_cache(4)(self._make_window)

    def __len__(self) -> int:
        return self._length

    def samples(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Sample numbers at positions start … stop-1 of an epoch, int64 [stop - start]."""
        _, edges = self._plan(epoch)
        parts = []
        for window in range(*self._window_range(edges, start, stop)):
            low, high = int(edges[window]), int(edges[window + 1])
            parts.append(self._window(epoch, window)[max(start - low, 0) : min(stop, high) - low])
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    @staticmethod
    def _window_range(edges: np.ndarray, start: int, stop: int) -> tuple[int, int]:
        if start >= stop:
            return 0, 0
        first = int(np.searchsorted(edges, start, side="right")) - 1
        return first, int(np.searchsorted(edges, stop, side="left"))

    def _make_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Blocks in the epoch's order, and the positions at which windows begin (and the last one ends)."""
        blocks = keyed_permutation(len(self._starts), self.seed, epoch, 0)
        ends = np.cumsum(self._sizes[blocks])
        inner = ends[self._window_blocks - 1 :: self._window_blocks]
        edges = np.concatenate([[0], inner, [self._length]])
        return blocks, np.unique(edges)

    def _make_window(self, epoch: int, window: int) -> np.ndarray:
        blocks, _ = self._plan(epoch)
        chosen = blocks[window * self._window_blocks : (window + 1) * self._window_blocks]
        spans = [np.arange(self._starts[b], self._starts[b] + self._sizes[b]) for b in chosen]
        samples = np.concatenate(spans)
        return samples[keyed_permutation(len(samples), self.seed, epoch, 1 + window)]


BUCKETS = 8
"""Parts into which a window of samples is cut after it was sorted by length."""


class LengthBucketedOrder(ShuffledOrder):
    """A shuffled order in which neighbours have captions of about the same length, so that batches need little padding.

    Each window of an epoch's positions is sorted by length and cut into `BUCKETS` parts, which are then permuted. All
    samples of a batch come from one part if the global batch divides an eighth of the window.

    Args:
        shard_sizes, seed: see `ShuffledOrder`.
        lengths: of each sample, [n], in any unit.
        window: positions that are sorted together.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, lengths: np.ndarray, window: int) -> None:
        super().__init__(shard_sizes, seed)
        self._lengths = lengths
        self._size = window
        self._sorted = lru_cache(4)(self._sort)

    def samples(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Sample numbers at positions start … stop-1 of an epoch, int64 [stop - start]."""
        parts = []
        for window in range(start // self._size, -(-stop // self._size)):
            low = window * self._size
            parts.append(self._sorted(epoch, window)[max(start - low, 0) : stop - low])
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _sort(self, epoch: int, window: int) -> np.ndarray:
        low = window * self._size
        samples = super().samples(epoch, low, min(low + self._size, len(self)))
        ordered = samples[np.argsort(self._lengths[samples], kind="stable")]
        buckets = np.array_split(ordered, BUCKETS)
        # Windows of blocks have keys from 1 on; those of lengths are told apart by one more integer.
        return np.concatenate([buckets[i] for i in keyed_permutation(BUCKETS, self.seed, epoch, window, 1)])
