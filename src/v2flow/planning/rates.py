"""How fast this machine multiplies matrices and moves memory, measured."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

SIDE = 768
"""Of the matrices."""
ELEMENTS = 1 << 24
"""Of the vectors: 64 MB each, more than a cache holds."""


def measured_tflops(rounds: int = 5) -> float:
    """TFLOP/s of fp32 matrix products, the median of so many."""
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    return 2 * SIDE**3 / _median_seconds(lambda: a @ b, rounds) / 1e12


def measured_bandwidth(rounds: int = 5) -> float:
    """GB/s of sums of two vectors into a third, the median of so many."""
    a, b, out = torch.ones(ELEMENTS), torch.ones(ELEMENTS), torch.ones(ELEMENTS)
    return 12 * ELEMENTS / _median_seconds(lambda: torch.add(a, b, out=out), rounds) / 1e9


def _median_seconds(action: Callable[[], Any], rounds: int) -> float:
    action()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
