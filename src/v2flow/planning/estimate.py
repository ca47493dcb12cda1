"""Seconds of a step, from what it takes and what a device can do."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from v2flow.planning.hardware import CPU, Hardware
from v2flow.planning.memory import Traffic
from v2flow.planning.step import StepCost

LAUNCH_SECONDS = 8e-6
"""What an operator costs the host of a GPU at least, from Python to the kernel's launch."""


@dataclass
class Seconds:
    """A step's time on one device.

    Attributes:
        products: matrix products at the utilisation that is assumed.
        memory: operators' reads and writes at the memory's rate.
        launches: operators' launches.
        compute: of a GPU the longest of the three, of a CPU products and memory one after the other.
        communication: what devices send, at the rate of the slowest link.
        exposed: the part of it that they wait for.
    """

    products: float
    memory: float
    launches: float
    compute: float
    communication: float = 0.0
    exposed: float = 0.0

    @property
    def step(self) -> float:
        """Seconds of a step: computing, and sending as far as it does not hide behind that."""
        return self.compute + self.exposed

    @property
    def limit(self) -> str:
        """What the step takes its time for."""
        if self.exposed > self.compute:
            return "communication"
        parts = {"products": self.products, "memory traffic": self.memory, "kernel launches": self.launches}
        return max(parts, key=parts.__getitem__)


def step_seconds(cost: StepCost, hardware: Hardware, bf16: bool, utilisation: float) -> Seconds:
    """Forward, backward and optimiser of one batch, without communication."""
    products = cost.flops / (hardware.tflops(bf16) * 1e12 * utilisation)
    memory = cost.traffic / (hardware.memory_bandwidth * 1e9)
    if hardware.name == CPU:
        return Seconds(products, memory, 0.0, products + memory)
    launches = cost.operators * LAUNCH_SECONDS
    return Seconds(products, memory, launches, max(products, memory, launches))


def with_communication(seconds: Seconds, traffic: Traffic, bandwidth: float, hidden: float) -> Seconds:
    """The same step on several devices.

    Args:
        bandwidth: bytes a second of a device's link.
        hidden: share of the computing behind which communication can hide.
    """
    behind, before = traffic.behind / bandwidth, traffic.before / bandwidth
    exposed = max(behind - hidden * seconds.compute, 0.0) + before
    return replace(seconds, communication=behind + before, exposed=exposed)


def mean_seconds(stages: Mapping[str, tuple[float, Seconds]]) -> Seconds:
    """The mean step of stages, each with its share of the training."""

    def mean(name: str) -> float:
        return sum(share * getattr(seconds, name) for share, seconds in stages.values())

    return Seconds(**{field.name: mean(field.name) for field in fields(Seconds)})
