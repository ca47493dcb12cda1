"""What rows cost: parameters, FLOPs, time and memory of a training step, pictures coded or generated a second.

All rows are measured in one process, interleaved: a round measures every row once, and ratios are taken within a
round, so that what else the machine does falls on both sides of a ratio. Nothing is measured through a Trainer, and
the batches are in memory already: loading, logging and weight averages are in no figure.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from v2flow.benchmark.subject import Subject, TrainingSubject
from v2flow.devices import pick_device
from v2flow.errors import V2FlowError
from v2flow.training.module import ReconstructionModule


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
    """Measures copies of tokenizers' modules; they themselves and the global random state stay as they are.

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

    def subjects(place: torch.device) -> dict[str, Subject]:
        return {name: Subject(module, batch_size, place) for name, module in modules.items()}

    try:
        return measure_subjects(
            subjects, rounds=rounds, warmup=warmup, threads=threads, device=device, progress=progress
        )
    finally:
        for module in modules.values():
            module.to(module.device)  # a codec's frozen autoencoder went to the device with the copy


def measure_subjects(
    build: Callable[[torch.device], Mapping[str, TrainingSubject]],
    *,
    rounds: int,
    warmup: int,
    threads: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Measures what `build` makes for a device: row name -> subject; see :func:`measure_overhead`.

    Returns:
        The figures of `measure_overhead`; those of encoding and decoding only where they were timed, and of a model
        that draws pictures of captions `generate_images_per_second` (spread) and `generate_speed_ratio` (spread).

    Raises:
        V2FlowError: another device than cpu or cuda.
    """
    chosen = _device(device)
    cuda = [chosen] if chosen.type == "cuda" else []
    with _threads(threads), torch.random.fork_rng(devices=cuda):
        subjects = build(chosen)
        times = time_rounds(subjects, rounds, warmup, progress)
        setting = {"device": chosen.type, "threads": torch.get_num_threads()}
        counted = tqdm(subjects.items(), "count FLOPs and bytes", unit="row", disable=not progress, delay=2.0)
        rows = {
            name: setting
            | {"batch_size": subject.batch_size, "rounds": rounds}
            | _figures(subject, times[name], rounds)
            for name, subject in counted
        }
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


Times = dict[str, list[float]]
"""What was timed -> seconds in each round."""
DECODE = "decode "
"""Before the name of a decode mode, in the names of what was timed."""


def time_rounds(
    subjects: Mapping[str, TrainingSubject], rounds: int, warmup: int, progress: bool
) -> dict[str, Times]:
    """Times every subject once a round, in an order that alternates, `warmup` rounds of which are thrown away."""
    times: dict[str, Times] = {name: {} for name in subjects}
    total = (warmup + rounds) * len(subjects)
    with tqdm(desc="measure rows", total=total, unit="row", disable=not progress, delay=2.0) as bar:
        for number in range(-warmup, rounds):
            order = list(subjects) if number % 2 == 0 else list(reversed(list(subjects)))
            for name in order:
                for what, seconds in subjects[name].time(max(number, 0)).items():
                    if number >= 0:
                        times[name].setdefault(what, []).append(seconds)
                bar.update()
    return times


def _figures(subject: TrainingSubject, times: Times, rounds: int) -> dict[str, Any]:
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
    return {
        "parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "parameters_total": sum(x.numel() for x in [*parameters, *subject.module.buffers()]),
        "stages": stages,
        "step_seconds": asdict(Spread.of(times["step"])),
        "step_flops": sum(s["share"] * s["step_flops"] for s in stages.values()),
        "peak_memory_bytes": max(s["peak_memory_bytes"] for s in stages.values()),
    } | _speeds(times, subject.batch_size)


def _speeds(times: Times, batch_size: int) -> dict[str, Any]:
    """Pictures a second of whatever was timed beside training steps."""
    spreads = {what: asdict(Spread.of([batch_size / s for s in seconds])) for what, seconds in times.items()}
    speeds: dict[str, Any] = {
        f"{what}_images_per_second": spreads[what] for what in ("encode", "generate") if what in spreads
    }
    decoders = {what.removeprefix(DECODE): s for what, s in spreads.items() if what.startswith(DECODE)}
    return speeds | ({"decode_images_per_second": decoders} if decoders else {})


def _with_ratios(rows: dict[str, dict[str, Any]], times: dict[str, Times]) -> dict[str, dict[str, Any]]:
    reference = next(iter(rows))
    base, base_times = rows[reference], times[reference]
    for name, row in rows.items():
        own = times[name]
        rows[name] = {"reference": reference} | row | {
            "parameters_ratio": row["parameters"] / base["parameters"],
            "step_time_ratio": _ratio(own["step"], base_times["step"]),
            "step_flops_ratio": row["step_flops"] / base["step_flops"],
            "peak_memory_ratio": row["peak_memory_bytes"] / base["peak_memory_bytes"],
        } | _speed_ratios(own, base_times)  # fmt: skip
    return rows


def _speed_ratios(own: Times, base: Times) -> dict[str, Any]:
    ratios: dict[str, Any] = {
        f"{what}_speed_ratio": _ratio(base[what], own[what]) for what in ("encode", "generate") if what in own
    }
    decoders = [what for what in own if what.startswith(DECODE)]
    if decoders:
        first = next(what for what in base if what.startswith(DECODE))
        ratios["decode_speed_ratio"] = {
            what.removeprefix(DECODE): _ratio(base[what if what in base else first], own[what])
            for what in decoders
        }
    return ratios


def _ratio(upper: list[float], lower: list[float]) -> dict[str, float]:
    """Spread of the ratio within each round."""
    return asdict(Spread.of([a / b for a, b in zip(upper, lower, strict=True)]))


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
    chosen = pick_device(device)
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
