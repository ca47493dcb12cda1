"""The plan of an experiment: what its training takes on given devices, and whether it fits."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from v2flow.errors import V2FlowError
from v2flow.planning.estimate import LAUNCH_SECONDS, Seconds, mean_seconds, step_seconds, with_communication
from v2flow.planning.experiment import Experiment, check_global_batch
from v2flow.planning.hardware import CPU, Hardware
from v2flow.planning.memory import (
    Memory,
    Sizes,
    ddp_memory,
    ddp_traffic,
    fsdp_memory,
    fsdp_traffic,
    sizes_of,
)
from v2flow.planning.parts import parameters_by_part
from v2flow.planning.step import StepCost, step_costs
from v2flow.planning.training import Training, build_training

UTILISATION = 0.35
"""Share of a GPU's peak that a training's products reach, unless the user says otherwise."""
USABLE = 0.92
"""Share of a GPU's memory for tensors: the rest is the driver's, the libraries' and lost between blocks."""
STRATEGIES = ("DDP", "FSDP2")


@dataclass(frozen=True)
class Setting:
    """Where and how an experiment is to run.

    Attributes:
        hardware: each device.
        devices: of a node.
        nodes: of the run.
        bf16: mixed precision.
        batch_size: samples a device and step.
        utilisation: share of the peak that products reach.
    """

    hardware: Hardware
    devices: int
    nodes: int
    bf16: bool
    batch_size: int
    utilisation: float

    def __post_init__(self) -> None:
        for name, value in (
            ("devices", self.devices),
            ("nodes", self.nodes),
            ("batch-size", self.batch_size),
        ):
            if value < 1:
                raise V2FlowError(f"option --{name}: expected at least 1, found {value}")
        if not 0 < self.utilisation <= 1:
            raise V2FlowError(f"option --utilisation: expected a share in (0, 1], found {self.utilisation:g}")

    @property
    def world(self) -> int:
        """Devices in all."""
        return self.devices * self.nodes

    @property
    def strategies(self) -> tuple[str, ...]:
        """Names of what there is to choose from: on one device nothing is shared out."""
        return STRATEGIES if self.world > 1 else STRATEGIES[:1]

    @property
    def bandwidth(self) -> float:
        """Bytes a second of the slowest link between two devices."""
        links = [self.hardware.node_bandwidth] + [self.hardware.network_bandwidth] * (self.nodes > 1)
        return min(links) * 1e9

    @property
    def memory(self) -> float:
        """Bytes for tensors on a device."""
        return self.hardware.memory_gb * 1e9 * (1.0 if self.hardware.name == CPU else USABLE)


@dataclass
class Strategy:
    """An experiment under DDP or FSDP2.

    Attributes:
        memory: at a step's peak, on one device.
        sent: bytes that a device sends in a step.
        seconds: of a step.
        days: of the recipe.
        fits: whether memory is enough.
    """

    memory: Memory
    sent: float
    seconds: Seconds
    days: float
    fits: bool


@dataclass
class Plan:
    """Everything that is said of an experiment.

    Attributes:
        name: of the experiment.
        setting: where and how it is to run.
        steps: optimiser steps of the recipe.
        accumulate: batches of an optimiser step.
        samples: of the training set, if it is on this machine.
        parts: part -> parameters "trained" and "frozen", and elements of "buffers".
        stages: kind of step -> what one takes on one device.
        strategies: by name.
        verdict: which strategy fits.
        assumptions: what the figures rest on.
    """

    name: str
    setting: Setting
    steps: int
    accumulate: int
    samples: int | None
    parts: dict[str, dict[str, int]]
    stages: dict[str, StepCost]
    strategies: dict[str, Strategy]
    verdict: str
    assumptions: list[str]

    def parameters(self, kind: str) -> int:
        """All parameters `trained` or `frozen`."""
        return sum(part[kind] for part in self.parts.values())

    @property
    def flops(self) -> float:
        """Of a device's mean step, all its batches included."""
        return self.accumulate * sum(cost.share * cost.flops for cost in self.stages.values())

    def document(self) -> dict[str, Any]:
        """Plain values: the fields, and sums of them."""
        found = asdict(self)
        for name, strategy in self.strategies.items():
            found["strategies"][name]["memory"]["total"] = strategy.memory.total
            found["strategies"][name]["seconds"] |= {
                "step": strategy.seconds.step,
                "limit": strategy.seconds.limit,
            }
        totals = {kind: self.parameters(kind) for kind in ("trained", "frozen", "buffers")}
        return found | {"parameters": totals, "flops_per_step": self.flops}


def plan_experiment(
    experiment: Experiment, setting: Setting, caption_tokens: int | None = None, draws: int = 1
) -> Plan:
    """Plans an experiment; needs no weights, no data and no GPU.

    Args:
        caption_tokens: see `build_training`.
        draws: see `step_costs`.

    Raises:
        V2FlowError: sizes that are not known, a step that cannot be followed without data, or a batch of all devices
            that is larger than the training set.
    """
    samples = check_global_batch(experiment, setting.batch_size, setting.world)
    training = build_training(experiment, caption_tokens)
    stages = step_costs(training, setting.batch_size, setting.bf16, draws)
    sizes = sizes_of(training, experiment.ema)
    strategies = {name: _strategy(name, experiment, setting, sizes, stages) for name in setting.strategies}
    return Plan(
        name=experiment.name,
        setting=setting,
        steps=experiment.steps,
        accumulate=experiment.accumulate,
        samples=samples,
        parts=parameters_by_part(training.model),
        stages=stages,
        strategies=strategies,
        verdict=_verdict(training, setting, sizes, stages, strategies),
        assumptions=[*_assumptions(experiment, setting), *training.assumptions],
    )


def _strategy(
    name: str, experiment: Experiment, setting: Setting, sizes: Sizes, stages: Mapping[str, StepCost]
) -> Strategy:
    memory = _memory(name, setting, sizes, _activations(stages))
    if name == "DDP":
        sent = ddp_traffic(sizes, setting.world, experiment.local_buffers)
    else:
        sent = fsdp_traffic(sizes, setting.world)
    found = {}
    for stage, cost in stages.items():
        seconds = step_seconds(cost, setting.hardware, setting.bf16, setting.utilisation)
        # Gradients come with backward; parameters are gathered ahead of every block.
        hidden = cost.backward if name == "DDP" else 1.0
        found[stage] = cost.share, with_communication(seconds, sent, setting.bandwidth, hidden)
    mean = mean_seconds(found)
    waits = (experiment.accumulate - 1) * mean.compute  # ranks talk once an optimiser step
    days = experiment.steps * (mean.step + waits) / 86400
    return Strategy(memory, sent.behind + sent.before, mean, days, memory.total <= setting.memory)


def _activations(stages: Mapping[str, StepCost]) -> int:
    return max(cost.activations for cost in stages.values())


def _memory(
    name: str, setting: Setting, sizes: Sizes, activations: float, world: int | None = None
) -> Memory:
    take = ddp_memory if name == "DDP" else fsdp_memory
    return take(sizes, activations, world or setting.world)


def _verdict(
    training: Training, setting: Setting, sizes: Sizes, stages: Mapping[str, StepCost],
    strategies: Mapping[str, Strategy],
) -> str:  # fmt: skip
    fitting = [name for name, strategy in strategies.items() if strategy.fits]
    room = f"the {setting.memory / 1e9:.1f} GB that a {setting.hardware.name} has for tensors"
    if setting.world == 1:
        if fitting:
            return f"one device is enough: it fits into {room}"
    elif fitting:
        fastest = min(fitting, key=lambda name: strategies[name].days)
        others = [name for name in strategies if name not in fitting]
        does_not = f"; {others[0]} does not fit" if others else f"; so do both, {fastest} is no slower"
        return f"{fastest} fits into {room}{does_not}"
    return f"nothing fits into {room}: {_smallest_change(training, setting, sizes, stages)}"


def _smallest_change(
    training: Training, setting: Setting, sizes: Sizes, stages: Mapping[str, StepCost]
) -> str:
    """The largest batch that fits, and the fewest devices that do; a step's memory grows evenly with its batch."""
    at_most, advice = _activations(stages), []
    one = at_most
    if setting.batch_size > 1:
        one = _activations(step_costs(training, 1, setting.bf16))
        each = (at_most - one) / (setting.batch_size - 1)
        for name in setting.strategies:
            rest = setting.memory - _memory(name, setting, sizes, 0).total - (one - each)
            batch = math.floor(rest / each) if each > 0 else 0
            while (
                batch > 0 and _memory(name, setting, sizes, one + (batch - 1) * each).total > setting.memory
            ):
                batch -= 1
            if batch > 0:
                advice.append(f"{name} does with --batch-size {batch}")
    for activations, batch in ((at_most, setting.batch_size), (one, 1)):
        world = _fewest_devices(setting, sizes, activations)
        if world is not None:
            advice.append(f"FSDP2 does with {batch} a device on {world} devices")
            break
    return "; ".join(advice) or "not even one sample on any number of them; take a device with more memory"


def _fewest_devices(setting: Setting, sizes: Sizes, activations: float) -> int | None:
    for exponent in range(1, 14):
        if _memory("FSDP2", setting, sizes, activations, 2**exponent).total <= setting.memory:
            low, high = 2 ** (exponent - 1), 2**exponent
            while high - low > 1:
                middle = (low + high) // 2
                fits = _memory("FSDP2", setting, sizes, activations, middle).total <= setting.memory
                low, high = (low, middle) if fits else (middle, high)
            return high
    return None


def _assumptions(experiment: Experiment, setting: Setting) -> list[str]:
    hardware = setting.hardware
    if hardware.name == CPU:
        rates = (
            f"products at {1000 * hardware.tflops(setting.bf16) * setting.utilisation:.0f} GFLOP/s and memory at "
            f"{hardware.memory_bandwidth:.0f} GB/s, one after the other"
        )
    else:
        rates = (
            f"products at {setting.utilisation:.0%} of {hardware.tflops(setting.bf16):g} TFLOP/s; a step takes no less "
            f"than its memory traffic at {hardware.memory_bandwidth:g} GB/s and {LAUNCH_SECONDS * 1e6:g} µs an operator"
        )
    precision = (
        "bf16 autocast: weights, gradients and AdamW's means in fp32, copies of weights in bf16 among the activations"
        if setting.bf16
        else "fp32 throughout"
    )
    found = [rates, precision, "loading of data, validation, checkpoints and logging are not counted"]
    if setting.world > 1:
        found.append(
            f"links at {setting.bandwidth / 1e9:g} GB/s a device, the slowest nominal rate; gradients are sent during "
            "backward, FSDP2's parameters a block ahead"
            + ("" if experiment.local_buffers else ", DDP's buffers before each step")
        )
        if not experiment.text_to_image:
            found.append("v2flow shards text-to-image models only: FSDP2 here says what sharding would bring")
    return found
