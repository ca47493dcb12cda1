"""Devices by name: their vendors' figures, for dense products and one direction of a link."""

import difflib
import os
from dataclasses import dataclass, replace
from typing import Any

from v2flow.errors import V2FlowError


@dataclass(frozen=True)
class Hardware:
    """A device and how it is connected.

    Attributes:
        name: as `--device` takes it.
        bf16_tflops: peak of dense bf16 products (fp16 on a V100, which has no bf16), TFLOP/s.
        fp32_tflops: of fp32 products, TFLOP/s.
        memory_gb: of a device, GB (10⁹ bytes).
        memory_bandwidth: of that memory, GB/s.
        node_bandwidth: between the devices of a node, GB/s a device and direction.
        network_bandwidth: between nodes, GB/s a device and direction.
    """

    name: str
    bf16_tflops: float
    fp32_tflops: float
    memory_gb: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float

    def tflops(self, bf16: bool) -> float:
        """Peak of a precision."""
        return self.bf16_tflops if bf16 else self.fp32_tflops


# NVLink, Infinity Fabric or PCIe within a node; a 400 Gbit/s port a device (A100: 200, V100: 100) between nodes.
_KNOWN = [
    Hardware("v100", 125, 15.7, 32, 900, 150, 12.5),
    Hardware("a100-40gb", 312, 19.5, 40, 1555, 300, 25),
    Hardware("a100-80gb", 312, 19.5, 80, 2039, 300, 25),
    Hardware("h100", 989, 67, 80, 3350, 450, 50),
    Hardware("h200", 989, 67, 141, 4800, 450, 50),
    Hardware("l40s", 362, 91.6, 48, 864, 32, 25),
    Hardware("rtx4090", 165, 82.6, 24, 1008, 32, 3),
    Hardware("mi300x", 1307, 163, 192, 5300, 448, 50),
]
DEVICES = {hardware.name: hardware for hardware in _KNOWN}
CPU = "cpu"


def find_hardware(name: str) -> Hardware:
    """The device of that name.

    Raises:
        V2FlowError: an unknown one, with the nearest that is known.
    """
    if name in DEVICES:
        return DEVICES[name]
    names = [*DEVICES, CPU]
    near = [known for known in names if name and known.startswith(name.lower())]
    near = near or difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]}? " if near else ""
    raise V2FlowError(f"option --device: unknown device {name!r}; {hint}known: {', '.join(names)}")


def this_cpu(tflops: float, memory_bandwidth: float) -> Hardware:
    """This machine's processor, at rates that were measured; its links are its memory.

    Args:
        tflops: of fp32 products; bf16 is no faster here.
        memory_bandwidth: GB/s.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return Hardware(CPU, tflops, tflops, memory, memory_bandwidth, memory_bandwidth, 1.0)


def override(hardware: Hardware, **figures: float | None) -> Hardware:
    """The same device with other figures; None leaves one as it is.

    Raises:
        V2FlowError: a figure that is not positive.
    """
    given: dict[str, Any] = {name: value for name, value in figures.items() if value is not None}
    for name, value in given.items():
        if value <= 0:
            option = name.removeprefix("bf16_").removeprefix("fp32_").replace("_", "-")
            raise V2FlowError(f"option --{option}: expected a positive number, found {value:g}")
    return replace(hardware, **given)
