"""Distortion against perception of one V2Flow tokenizer: what steps, solver, noise, guidance and iterations buy.

The same ids can be decoded towards the conditional mean (best PSNR) or towards a sample (best feature distances), at
any price: one training gives a curve where an autoencoder gives a point.
"""

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from v2flow.evaluate import evaluate_model
from v2flow.probes.findings import Batches, Findings, ProbeSettings
from v2flow.tokenizer import V2FlowTokenizer

POINTS: dict[str, dict[str, Any]] = {
    "one_step": {"steps": 1, "temperature": 0.0},
    "one_step_noise": {"steps": 1},
    "euler_4": {"steps": 4},
    "euler_8": {"steps": 8},
    "euler_16": {"steps": 16},
    "heun_8": {"steps": 8, "solver": "heun"},
    "multistep_8": {"steps": 8, "solver": "multistep"},
    "temperature_0.3": {"steps": 8, "temperature": 0.3},
    "temperature_0.5": {"steps": 8, "temperature": 0.5},
    "temperature_0.7": {"steps": 8, "temperature": 0.7},
    "guidance_1.5": {"steps": 8, "temperature": 0.7, "guidance": 1.5},
    "guidance_2": {"steps": 8, "temperature": 0.7, "guidance": 2.0},
    "iterations_2": {"steps": 8, "iterations": 2},
    "iterations_4": {"steps": 8, "iterations": 4},
}
"""Point -> options of `decode`, what is left out being Euler's solver, one AR iteration, temperature 1, no guidance.

`one_step` is the conditional mean, `one_step_noise` the same step from full noise; then the number of steps, the solver
(heun evaluates the field 15 times in 8 steps), the temperature (1.0 is `euler_8`), guidance and AR iterations.
"""

FRONTIER: dict[str, dict[str, Any]] = POINTS | {
    "temperature_0.8": {"steps": 8, "temperature": 0.8},
    "steps_2": {"steps": 2, "temperature": 0.8},
    "steps_3": {"steps": 3, "temperature": 0.8},
    "steps_4": {"steps": 4, "temperature": 0.8},
    "steps_6": {"steps": 6, "temperature": 0.8},
    "shift_2": {"steps": 4, "temperature": 0.8, "timestep_shift": 2.0},
    "multistep_4": {"steps": 4, "temperature": 0.8, "solver": "multistep"},
    "guidance_interval": {"steps": 8, "temperature": 0.8, "guidance": 1.5, "guidance_interval": [0.3, 0.8]},
}
"""The points and, between the cheapest and the best of them, few steps from weak noise; for decode presets."""


def trained_points(
    model: V2FlowTokenizer, points: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The points that the tokenizer was trained for: those with guidance need `decoder.null_probability` above 0."""
    guides = model.config.decoder.null_probability > 0
    return {name: dict(o) for name, o in points.items() if guides or o.get("guidance", 1.0) == 1.0}


def sweep_decoding(
    model: Any,
    loader: Batches,
    points: Mapping[str, Mapping[str, Any]] | None = None,
    settings: ProbeSettings | None = None,
) -> Findings:
    """Scores a tokenizer at every point of decoding, by :func:`v2flow.evaluate.evaluate_model`.

    Args:
        model: a V2FlowTokenizer; any other tokenizer has one way to decode and gets a note instead of figures.
        points: name -> options of `decode`; None for :data:`POINTS`, of which those with guidance are left out, with
            a note, where it was not trained.

    Returns:
        Point -> the evaluation's figures (psnr, ssim, kid-efficientnet-lite0 with its `_se`, …),
        `seconds_per_picture` (median over the batches after the first, of decoding alone) and `field_evaluations`
        (of the velocity field for a picture; guidance doubles them where it acts). The protocol names options and
        threads.

    Raises:
        V2FlowError: no picture, an unknown option, or guidance in `points` that was not trained.
    """
    settings = settings or ProbeSettings()
    if not isinstance(model, V2FlowTokenizer):
        return Findings(notes={"decoding": f"{type(model).__name__} has no options of decoding to vary"})
    notes: dict[str, str] = {}
    if points is None:
        points = trained_points(model, POINTS)
        guided = [name for name in POINTS if name not in points]
        notes = dict.fromkeys(guided, "trained with decoder.null_probability=0, without guidance")
    meter = DecodingMeter(model)
    result = evaluate_model(
        meter, loader, points, seed=settings.seed, features=settings.features,
        inception_weights=settings.inception_weights, progress=settings.progress,
    )  # fmt: skip
    figures = {name: result["modes"][name] | meter.costs(options) for name, options in points.items()}
    protocol = result["protocol"] | {"threads": torch.get_num_threads()}
    return Findings(figures, notes | result.get("notes", {}), protocol)


class DecodingMeter(nn.Module):
    """A V2Flow tokenizer whose decoding is timed and whose velocity field is counted, by the options of decoding."""

    def __init__(self, model: V2FlowTokenizer) -> None:
        super().__init__()
        self.model = model
        self.codebook_size = model.codebook_size
        self._seconds: dict[str, list[float]] = {}
        self._evaluations: dict[str, int] = {}

    def encode(self, images: Tensor) -> Tensor:
        """Ids `[B, N]` of pictures `[B, 3, H, W]`."""
        ids: Tensor = self.model.encode(images)
        return ids

    def decode(self, ids: Tensor, generator: torch.Generator | None = None, **options: Any) -> Tensor:
        """Pictures `[B, 3, H, W]` of ids `[B, N]`."""
        rows = 0

        def count(field: nn.Module, inputs: Any, output: Tensor) -> None:
            nonlocal rows
            rows += len(output)

        key, device = _key(options), self.model.visual_vocabulary.codes.device
        handle = self.model.head.field.register_forward_hook(count)
        try:
            _finish(device)
            start = time.perf_counter()
            pictures = self.model.decode(ids, generator, **options)
            _finish(device)
            seconds = time.perf_counter() - start
        finally:
            handle.remove()
        self._seconds.setdefault(key, []).append(seconds / len(ids))
        self._evaluations[key] = rows // len(ids)
        return pictures

    def costs(self, options: Mapping[str, Any]) -> dict[str, float]:
        """`seconds_per_picture` and `field_evaluations` of pictures decoded with `options` so far."""
        seconds = self._seconds[_key(options)]
        steady = seconds[1:] or seconds  # the first batch also pays for what is set up once
        return {
            "seconds_per_picture": statistics.median(steady),
            "field_evaluations": self._evaluations[_key(options)],
        }


def _key(options: Mapping[str, Any]) -> str:
    return repr(sorted(options.items()))


def _finish(device: torch.device) -> None:
    """Waits for what was sent to the device, so that the clock sees it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
