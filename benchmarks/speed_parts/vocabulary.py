"""Part `vocabulary`: attention over a vocabulary in tiles against the whole matrix, see vocabulary_attention.py."""

import sys
from argparse import Namespace
from typing import Any

import vocabulary_attention

from speed_parts.options import CPU, Options
from v2flow.planning.rates import measured_tflops
from v2flow.vocabulary_attention import MEMORY_BUDGET_MB


def measure(options: Options) -> dict[str, Any]:
    """Rows of `vocabulary_attention.measure`, each with the rate of matrix products around it.

    FLOPs are the useful ones: queries by keys and probabilities by values forward, three products more backward (to
    probabilities, queries and keys; the values are frozen). Computing the logits again in backward is no use.
    """
    settings = Namespace(noise=0.0, budget_mb=MEMORY_BUDGET_MB, repeats=max(options.rounds // 2, 1))
    if options.smoke:
        settings.budget_mb = 1.0
    tokens = options.vocabulary_tokens
    rows = []
    for entries, width, keys in options.vocabulary_sizes:
        print(f"vocabulary: {entries} x {width}, keys of {keys}", file=sys.stderr)
        before = measured_tflops(5)
        row = vocabulary_attention.measure(tokens, entries, width, keys, settings, CPU)
        rate = (before + measured_tflops(5)) / 2 * 1e12
        flops = useful_flops(tokens, entries, width, keys)
        for way in ("tiles", "matrix"):
            row[way]["of_products"] = flops / row[way]["seconds"] / rate
        rows.append(row | {"flops": flops, "products_flops_per_second": rate})
    return {"budget_mb": settings.budget_mb, "repeats": settings.repeats, "rows": rows}


def useful_flops(tokens: int, entries: int, width: int, keys: int) -> int:
    """FLOPs of forward and backward to queries and keys."""
    return 2 * tokens * entries * (2 * width + 3 * keys)
