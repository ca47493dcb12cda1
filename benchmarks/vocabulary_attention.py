"""Time and memory of the resampler's attention over a vocabulary, in tiles and by way of the whole matrix.

Forward and backward to queries and keys, with the upstream gradient given; entropy and most probable word of an eighth
of the tokens, as in training. Both ways are timed in turn. `extra_bytes` is the peak without what either way has to
hand back (embeddings and gradients), `peak_bytes` with it. The last line is one JSON document.

    python benchmarks/vocabulary_attention.py --sizes 32000x4096 262144x640 --key-dims 32 512
"""

import argparse
import json
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor

from v2flow.benchmark.subject import peak_rise, seconds_of
from v2flow.vocabulary_attention import MEMORY_BUDGET_MB, vocabulary_attention
from v2flow.vocabulary_logits import GumbelNoise, Logits

PICTURES = 8


def attend(
    queries: Tensor, keys: Tensor, table: Tensor, upstream: Tensor, noise: float, budget: float
) -> list[Tensor]:
    """Embeddings and the gradients of queries and keys."""
    inputs = [x.detach().requires_grad_() for x in (queries, keys)]
    gumbel = GumbelNoise(0, noise) if noise else None
    logits = Logits(*inputs, noise=gumbel)
    soft = vocabulary_attention(logits, table, described=1, memory_budget_mb=budget)
    return [soft.embeddings.detach(), *torch.autograd.grad(soft.embeddings, inputs, upstream)]


def measure(
    tokens: int, entries: int, dim: int, key_dim: int, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Figures of one size: of both ways `peak_bytes`, `extra_bytes` and `seconds`, and how they compare."""
    draws = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws, device=device)

    shape = (PICTURES, tokens // PICTURES)
    queries = 6 * torch.nn.functional.normalize(normal(*shape, key_dim), dim=-1)
    keys = torch.nn.functional.normalize(normal(entries, key_dim), dim=-1)
    call = partial(attend, queries, keys, normal(entries, dim), normal(*shape, dim), options.noise)
    ways = {name: partial(call, budget) for name, budget in (("tiles", options.budget_mb), ("matrix", 1e9))}
    found, apart = (way() for way in ways.values())
    error = max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(found, apart, strict=True))
    returned = sum(x.numel() * x.element_size() for x in found)
    del found, apart
    peaks = {name: peak_rise(way, device) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, way in ways.items():
            seconds[name].append(seconds_of(way, device))
    rows = {
        name: {
            "peak_bytes": peaks[name],
            "extra_bytes": peaks[name] - returned,
            "seconds": statistics.median(seconds[name]),
        }
        for name in ways
    }
    ratio = {key: rows["tiles"][key] / rows["matrix"][key] for key in rows["tiles"]}
    size = {"tokens": tokens, "entries": entries, "dim": dim, "key_dim": key_dim}
    return {**size, **rows, "tiles_to_matrix": ratio, "largest_relative_difference": error}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024, help=f"a multiple of {PICTURES}")
    parser.add_argument(
        "--sizes", nargs="+", default=["32000x4096", "262144x640"], help="entries x width of the table"
    )
    parser.add_argument("--key-dims", nargs="+", type=int, default=[32, 512])
    parser.add_argument("--noise", type=float, default=0.0, help="amplitude of the Gumbel noise")
    parser.add_argument("--budget-mb", type=float, default=MEMORY_BUDGET_MB)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()
    rows = []
    for size in options.sizes:
        entries, dim = (int(number) for number in size.split("x"))
        for key_dim in options.key_dims:
            rows.append(measure(options.tokens, entries, dim, key_dim, options, options.device))
    setting = {"noise": options.noise, "budget_mb": options.budget_mb, "repeats": options.repeats}
    threads = {"threads": torch.get_num_threads(), "device": str(options.device), "torch": torch.__version__}
    print(json.dumps({**setting, **threads, "rows": rows}))


if __name__ == "__main__":
    main()
