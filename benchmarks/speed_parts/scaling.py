"""Part `scaling`: how time and memory of a training step and of decoding grow with the size of things."""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from speed_parts.options import CPU, Options, tokenizer_config
from v2flow.benchmark.overhead import measure_subjects
from v2flow.benchmark.subject import Subject, count_flops, peak_rise
from v2flow.config import TokenizerConfig, VocabularyConfig
from v2flow.planning.rates import measured_tflops
from v2flow.training.tokenizer_module import TokenizerModule

DECODE = "decode"
DECODE_OPTIONS = {"steps": 4}
MEASURES = {
    "step_seconds": "seconds a training step", "decode_seconds": "seconds a decoded batch",
    "step_bytes": "bytes of a training step beside weights and optimiser",
    "decode_bytes": "bytes of decoding beside weights",
}  # fmt: skip


def point(config: TokenizerConfig, batch: int, axis: str, value: int) -> tuple[TokenizerConfig, int]:
    """The experiment with one size changed: square grids of so many tokens, rows of the vocabulary, side of the
    pictures (and with it latent positions), pictures of a batch. The vocabulary is random, of the same width."""
    if axis == "tokens":
        side = math.isqrt(value)
        return replace(config, resampler=replace(config.resampler, token_grid=[side, side])), batch
    if axis == "vocabulary":
        return replace(config, vocabulary=replace(config.vocabulary, size=value)), batch
    if axis == "image size":
        return replace(config, image_size=value), batch
    return config, value


def measure(options: Options) -> dict[str, Any]:
    """For each axis the points' figures, and the exponent with which each figure grows."""
    config, _ = tokenizer_config(options.experiment, options)
    vocabulary = config.vocabulary
    if vocabulary.source != "random":
        vocabulary = VocabularyConfig(
            source="random", size=vocabulary.size, dim=640, center=vocabulary.center
        )
    base = replace(config, vocabulary=vocabulary)
    axes = {}
    for axis, values in options.axes.items():
        print(f"scaling: {axis}", file=sys.stderr)
        if axis == "image size":  # as many tokens as the smallest picture has latent positions, at most
            side = min(*base.resampler.token_grid, min(values) // base.codec.patch_size)
            fixed = replace(base, resampler=replace(base.resampler, token_grid=[side, side]))
        else:
            fixed = base
        axes[axis] = _axis(fixed, options, axis, values)
    return {"batch_size": options.scaling_batch, "decode": DECODE_OPTIONS, "axes": axes}


def _axis(base: TokenizerConfig, options: Options, axis: str, values: Sequence[int]) -> dict[str, Any]:
    subjects: dict[str, Subject] = {}

    def build(device: torch.device) -> dict[str, Subject]:
        for value in values:
            config, batch = point(base, options.scaling_batch, axis, value)
            module = TokenizerModule(config, decode_modes={DECODE: dict(DECODE_OPTIONS)})
            subjects[str(value)] = Subject(module, batch, device)
        return subjects

    before = measured_tflops(5)
    found = measure_subjects(build, rounds=max(options.rounds // 2, 1), warmup=1, device=CPU, progress=True)
    rate = (before + measured_tflops(5)) / 2 * 1e12
    points = []
    for value in values:
        row, subject = found[str(value)], subjects[str(value)]
        subject.module.eval()
        speed = row["decode_images_per_second"][DECODE]
        seconds = {"median": "median", "low": "high", "high": "low"}
        decoding = count_flops(partial(subject.decode, DECODE, 0))
        points.append({
            "value": value, "step_seconds": row["step_seconds"], "step_flops": row["step_flops"],
            "of_products": row["step_flops"] / row["step_seconds"]["median"] / rate,
            "decode_flops": decoding,
            "decode_of_products": decoding * speed["median"] / subject.batch_size / rate,
            "decode_seconds": {name: subject.batch_size / speed[of] for name, of in seconds.items()},
            "resident_bytes": subject.resident_bytes(),
            "step_bytes": row["peak_memory_bytes"] - subject.resident_bytes(),
            "decode_bytes": peak_rise(partial(subject.decode, DECODE, 0), CPU),
        })  # fmt: skip
    fits = {name: exponent(values, [_median(p[name]) for p in points]) for name in MEASURES}
    return {"points": points, "exponents": fits, "products_flops_per_second": rate}


def _median(figure: Any) -> float:
    return float(figure["median"] if isinstance(figure, dict) else figure)


def exponent(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """Least squares of log y = a + `exponent`·log x; `r2` is the share of the variance of log y it explains, and
    `last` the exponent between the two largest points alone, where fixed costs matter least."""
    u, v = (torch.tensor([math.log(value) for value in values], dtype=torch.float64) for values in (x, y))
    du, dv = u - u.mean(), v - v.mean()
    slope = float((du * dv).sum() / du.square().sum())
    left = float((dv - slope * du).square().sum())
    total = float(dv.square().sum())
    last = float((v[-1] - v[-2]) / (u[-1] - u[-2]))
    return {"exponent": slope, "r2": 1 - left / total if total > 0 else 1.0, "last": last}
