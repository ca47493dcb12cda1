"""What tokenizers cost: parameters, FLOPs, time and memory of a training step, encoded and decoded pictures a second.

All rows are measured in one process, interleaved: a round measures every row once, and ratios are taken within a
round, so that what else the machine does falls on both sides of a ratio. Nothing is measured through a Trainer, and
the pictures lie on the device already: loading, logging and weight averages are in no figure.
"""

import copy
import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from v2flow.errors import V2FlowError
from v2flow.training.module import ReconstructionModule, seeded_generator

CLIP = 3.0
"""Norm to which gradients are clipped, as in the shipped experiments; it does not change the cost."""


@dataclass
class Spread:
    """Median and quartiles of a figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """The spread of at least one value; quartiles are interpolated linearly."""
        points = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
        return cls(*torch.tensor(values, dtype=torch.float64).quantile(points).tolist())


def measure_overhead(
    modules: Mapping[str, ReconstructionModule],
    batch_size: int,
    *,
    rounds: int = 9,
    warmup: int = 2,
    threads: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Measures copies of the modules; they themselves and the global random state stay as they are.

    A training step is forward, backward, gradient clipping and the step of the module's own optimiser, in fp32 and at
    a learning rate of zero, on pictures of noise. Where a module has several kinds of steps
    (`ReconstructionModule.training_stages`), each is measured in the middle of its share of the training, and a
    figure of the whole step is their mean weighted by those shares; peak memory is their maximum.

    FLOPs are torch's count of matrix products and convolutions forward and backward, a mean over the draws of the
    rounds, with attention counted as the two products it is (torch has no formula for its fused CPU kernel). Peak
    memory is of tensors: weights, buffers, gradients, optimiser state and what a step allocates beyond them, a maximum
    over the same draws. Networks that the module does not own (a codec's frozen autoencoder, a discriminator) take
    part in time and FLOPs and with what they allocate in a step, but not with their weights.

    Args:
        modules: row name -> module as an experiment file builds it; the first is the reference of all ratios.
        batch_size: pictures of a step, an encoding and a decoding.
        rounds: measurements of each figure, in an order of rows that alternates.
        warmup: rounds before them that are thrown away.
        threads: of torch's operators; None leaves them as they are.
        device: cpu or cuda; None takes a GPU if there is one.

    Returns:
        For each row plain values, a spread being `{"median", "low", "high"}` with the quartiles:
        `reference`, `device`, `threads`, `batch_size`, `rounds`; `parameters` (trainable), `parameters_total` (and
        elements of buffers); `stages`: name -> `share`, `step_seconds`, `step_flops`, `peak_memory_bytes`; of the mean
        step `step_seconds` (spread), `step_flops`, `peak_memory_bytes`; `encode_images_per_second` (spread),
        `decode_images_per_second` (mode -> spread). To the reference, where below 1 is cheaper: `parameters_ratio`,
        `step_time_ratio` (spread), `step_flops_ratio`, `peak_memory_ratio`; where above 1 is faster:
        `encode_speed_ratio` (spread), `decode_speed_ratio` (mode -> spread), a mode against the reference's mode of
        that name, or else its first.

    Raises:
        V2FlowError: no module, a number below 1, or another device.
    """
    _check(modules, batch_size, rounds, warmup, threads)
    chosen = _device(device)
    cuda = [chosen] if chosen.type == "cuda" else []
    with _threads(threads), torch.random.fork_rng(devices=cuda):
        try:
            subjects = {name: _Subject(module, batch_size, chosen) for name, module in modules.items()}
            times = _time_rounds(subjects, rounds, warmup, progress)
            setting = {
                "device": chosen.type,
                "threads": torch.get_num_threads(),
                "batch_size": batch_size,
                "rounds": rounds,
            }
            counted = tqdm(
                subjects.items(), "count FLOPs and bytes", unit="row", disable=not progress, delay=2.0
            )
            rows = {name: setting | _figures(subject, times[name], rounds) for name, subject in counted}
        finally:
            for module in modules.values():
                module.to(module.device)  # a codec's frozen autoencoder went to the device with the copy
    return _with_ratios(rows, times)


def steps_for_minutes(overhead_row: Mapping[str, Any], minutes: float, multiple: int = 10) -> int:
    """Training steps of a row that fit into so many minutes of computing, rounded down to a multiple.

    Raises:
        V2FlowError: not even `multiple` steps fit.
    """
    seconds = overhead_row["step_seconds"]["median"]
    steps = int(minutes * 60 / seconds) // multiple * multiple
    if steps < multiple:
        raise V2FlowError(
            f"option minutes: expected time for at least {multiple} steps of {seconds:.3g} s, found {minutes:g}; "
            f"use {multiple * seconds / 60 + 0.005:.2f} or more"
        )
    return steps


def overhead_table(overhead: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a line for each row; behind a figure its ratio to the reference, and behind that its quartiles."""
    lines = [
        "| row | parameters, M | ms a step | GFLOPs a step | peak memory, MB | encoded images/s | decoded images/s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in overhead.items():
        modes = "<br>".join(
            f"{mode}: {_timed(speed['median'], row['decode_speed_ratio'][mode])}"
            for mode, speed in row["decode_images_per_second"].items()
        )
        cells = [
            name,
            f"{row['parameters'] / 1e6:.3g} ({row['parameters_ratio']:.2f}×)",
            _timed(row["step_seconds"]["median"] * 1e3, row["step_time_ratio"]),
            f"{row['step_flops'] / 1e9:.3g} ({row['step_flops_ratio']:.2f}×)",
            f"{row['peak_memory_bytes'] / 1e6:.3g} ({row['peak_memory_ratio']:.2f}×)",
            _timed(row["encode_images_per_second"]["median"], row["encode_speed_ratio"]),
            modes,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _timed(value: float, ratio: Mapping[str, float]) -> str:
    shown = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return f"{shown} ({ratio['median']:.2f}×, {ratio['low']:.2f}–{ratio['high']:.2f})"


class _Subject:
    """A copy of a module with an optimiser that changes nothing, on pictures and ids of noise."""

    def __init__(self, module: ReconstructionModule, batch_size: int, device: torch.device) -> None:
        self.module = copy.deepcopy(module).to(device)
        self.model = cast(Any, self.module.model)
        configured: Any = self.module.configure_optimizers()
        self.optimizer: torch.optim.Optimizer = (
            configured["optimizer"] if isinstance(configured, dict) else configured
        )
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.stages = self.module.training_stages()
        self.takes_generator = "generator" in inspect.signature(self.model.decode).parameters
        self.device, self.batch_size = device, batch_size
        noise, size = seeded_generator(device, batch_size), self.model.config.image_size
        self.images = torch.rand(batch_size, 3, size, size, generator=noise, device=device)
        shape = (batch_size, self.model.num_tokens)
        self.ids = torch.randint(0, self.model.codebook_size, shape, generator=noise, device=device)

    def share(self, stage: str) -> float:
        begin, end = self.stages[stage]
        return end - begin

    def _loss(self, stage: str, draw: int) -> Tensor:
        progress = sum(self.stages[stage]) / 2
        return self.module.training_losses(self.images, progress, seeded_generator(self.device, draw))["loss"]

    def step(self, stage: str, draw: int) -> None:
        """A training step in the Trainer's order: the last step's gradients lie there during forward."""
        loss = self._loss(stage, draw)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()

    def flops(self, stage: str, draw: int) -> int:
        """FLOPs of forward and backward."""
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self._loss(stage, draw).backward()
        return counter.get_total_flops()

    def resident_bytes(self) -> int:
        """Weights, buffers and optimiser state."""
        state = [x for values in self.optimizer.state.values() for x in values.values()]
        held = [*self.module.parameters(), *self.module.buffers(), *state]
        return sum(x.numel() * x.element_size() for x in held if isinstance(x, Tensor))

    def peak_memory(self, stage: str, draws: int) -> int:
        """Largest number of bytes in tensors at any moment of steps of this stage."""

        def steps() -> None:
            # One more than the draws: no gradients lie there during the forward pass of the first.
            for draw in (0, *range(draws)):
                self.step(stage, draw)

        self.optimizer.zero_grad()
        return self.resident_bytes() + peak_rise(steps, self.device)

    def encode(self) -> None:
        self.model.encode(self.images)

    def decode(self, mode: str, draw: int) -> None:
        options = dict(self.module.decode_modes[mode])
        if self.takes_generator:
            options["generator"] = seeded_generator(self.device, draw)
        self.model.decode(self.ids, **options)

    def time(self, draw: int) -> dict[str, float]:
        """Seconds of each stage's step, of encoding, and of each way to decode, once."""
        self.module.train()
        seconds = {
            f"step {stage}": _seconds(partial(self.step, stage, draw), self.device) for stage in self.stages
        }
        seconds["step"] = sum(self.share(stage) * seconds[f"step {stage}"] for stage in self.stages)
        self.module.eval()
        seconds["encode"] = _seconds(self.encode, self.device)
        for mode in self.module.decode_modes:
            seconds[f"decode {mode}"] = _seconds(partial(self.decode, mode, draw), self.device)
        return seconds


Times = dict[str, list[float]]
"""What was timed -> seconds in each round."""


def _time_rounds(subjects: dict[str, _Subject], rounds: int, warmup: int, progress: bool) -> dict[str, Times]:
    times: dict[str, Times] = {name: {} for name in subjects}
    total = (warmup + rounds) * len(subjects)
    with tqdm(desc="measure rows", total=total, unit="row", disable=not progress, delay=2.0) as bar:
        for number in range(-warmup, rounds):
            order = list(subjects) if number % 2 == 0 else list(reversed(subjects))
            for name in order:
                for what, seconds in subjects[name].time(max(number, 0)).items():
                    if number >= 0:
                        times[name].setdefault(what, []).append(seconds)
                bar.update()
    return times


def _figures(subject: _Subject, times: Times, rounds: int) -> dict[str, Any]:
    """Everything of a row but its ratios."""
    subject.module.train()
    stages: dict[str, dict[str, Any]] = {}
    for stage in subject.stages:
        flops = [subject.flops(stage, draw) for draw in range(rounds)]
        stages[stage] = {
            "share": subject.share(stage),
            "step_seconds": asdict(Spread.of(times[f"step {stage}"])),
            "step_flops": sum(flops) / rounds,
            "peak_memory_bytes": subject.peak_memory(stage, rounds),
        }
    parameters = list(subject.module.parameters())
    speeds = {
        what: asdict(Spread.of([subject.batch_size / s for s in seconds]))
        for what, seconds in times.items()
        if what.startswith(("encode", "decode"))
    }
    return {
        "parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "parameters_total": sum(x.numel() for x in [*parameters, *subject.module.buffers()]),
        "stages": stages,
        "step_seconds": asdict(Spread.of(times["step"])),
        "step_flops": sum(s["share"] * s["step_flops"] for s in stages.values()),
        "peak_memory_bytes": max(s["peak_memory_bytes"] for s in stages.values()),
        "encode_images_per_second": speeds["encode"],
        "decode_images_per_second": {mode: speeds[f"decode {mode}"] for mode in subject.module.decode_modes},
    }


def _with_ratios(rows: dict[str, dict[str, Any]], times: dict[str, Times]) -> dict[str, dict[str, Any]]:
    reference = next(iter(rows))
    base, base_times = rows[reference], times[reference]
    first_mode = next(iter(base["decode_images_per_second"]))
    for name, row in rows.items():
        own = times[name]
        decode_ratios = {}
        for mode in row["decode_images_per_second"]:
            counterpart = mode if f"decode {mode}" in base_times else first_mode
            decode_ratios[mode] = _ratio(base_times[f"decode {counterpart}"], own[f"decode {mode}"])
        rows[name] = {"reference": reference} | row | {
            "parameters_ratio": row["parameters"] / base["parameters"],
            "step_time_ratio": _ratio(own["step"], base_times["step"]),
            "step_flops_ratio": row["step_flops"] / base["step_flops"],
            "peak_memory_ratio": row["peak_memory_bytes"] / base["peak_memory_bytes"],
            "encode_speed_ratio": _ratio(base_times["encode"], own["encode"]),
            "decode_speed_ratio": decode_ratios,
        }  # fmt: skip
    return rows


def _ratio(upper: list[float], lower: list[float]) -> dict[str, float]:
    """Spread of the ratio within each round."""
    return asdict(Spread.of([a / b for a, b in zip(upper, lower, strict=True)]))


def peak_rise(action: Callable[[], Any], device: torch.device) -> int:
    """Largest number of bytes in tensors at any moment of `action`, beyond those that were there before it.

    On a CPU `action` should free none of those: the profiler does not know their sizes.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    # Read when the first profiler starts: without it every profile writes lines of its own to standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _seconds(action: Callable[[], None], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    action()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many threads inside, as many as before afterwards."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before if count is None else count)
        yield
    finally:
        torch.set_num_threads(before)


def _device(device: torch.device | str | None) -> torch.device:
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type not in ("cpu", "cuda"):
        raise V2FlowError(
            f"option device: expected cpu or cuda, found {chosen.type}; its memory cannot be measured"
        )
    return chosen


def _check(
    modules: Mapping[str, Any], batch_size: int, rounds: int, warmup: int, threads: int | None
) -> None:
    if not modules:
        raise V2FlowError(
            "option modules: expected at least one row, the reference of the ratios, found none"
        )
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("rounds", rounds, 1),
        ("warmup", warmup, 0),
        ("threads", 1 if threads is None else threads, 1),
    ):
        if value < least:
            raise V2FlowError(f"option {name}: expected at least {least}, found {value}")
