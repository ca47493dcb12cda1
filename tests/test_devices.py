"""Random numbers that the host needs."""

import pytest
import torch

from v2flow.devices import host_generator


class CudaGenerator:
    """What is asked of a generator on a GPU: nothing here waits for one."""

    device = torch.device("cuda")

    def __init__(self, seed: int) -> None:
        self.seed, self.offset = seed, 0

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        assert offset % 4 == 0, "as CUDA demands"
        self.offset = offset


def draws(generator: CudaGenerator, count: int) -> list[float]:
    return [float(torch.rand((), generator=host_generator(generator))) for _ in range(count)]  # type: ignore[arg-type]


def test_on_the_cpu_it_is_the_generator_itself() -> None:
    generator = torch.Generator().manual_seed(1)
    assert host_generator(generator) is generator and host_generator(None) is None


@pytest.mark.parametrize("seed", [0, 1, (1 << 63) - 1])
def test_draws_of_a_gpu_generator_differ_and_repeat(seed: int) -> None:
    generator = CudaGenerator(seed)
    found = draws(generator, 5)
    assert len(set(found)) == 5 and draws(CudaGenerator(seed), 5) == found
    assert draws(generator, 1)[0] not in found, "moved on"
    assert draws(CudaGenerator(seed ^ 2), 1)[0] not in found
