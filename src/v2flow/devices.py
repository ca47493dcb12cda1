"""Where a model runs when nobody says where, and random numbers that the host needs."""

import torch


def pick_device(device: str | torch.device | None = None) -> torch.device:
    """`device`, or when left out cuda where there is one, else cpu."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def host_generator(generator: torch.Generator | None) -> torch.Generator | None:
    """A generator on the CPU for numbers that decide what is to be done next, such as seeds, so that nobody waits for a
    device to name them: `generator` itself where it is on the CPU, else one seeded by where it stands.

    A CUDA generator is moved on by one draw, so that the next call gives another.
    """
    if generator is None or generator.device.type == "cpu":
        return generator
    if generator.device.type != "cuda":  # others do not say where they stand
        seed = torch.randint(1 << 62, (), generator=generator, device=generator.device)
        return torch.Generator().manual_seed(int(seed))
    offset = generator.get_offset()
    generator.set_offset(offset + 4)  # Philox gives four numbers at a time
    return torch.Generator().manual_seed((generator.initial_seed() + offset * 0x9E3779B97F4A7C15) % (1 << 63))
