"""How many processes take part, asked at call time: modules are made before Lightning makes their process group."""

import torch.distributed as dist


def world() -> tuple[int, int]:
    """(rank, number of ranks) at this moment; (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def nearest_batch(samples: int, batch_size: int, ranks: int, option: str) -> str:
    """What to change where `ranks` batches of `batch_size` are more than all samples, of which there is at least one.

    Args:
        option: which sets the batch of one rank.

    >>> nearest_batch(43, 16, 4, "batch_size")
    'use batch_size 10 or less, or 2 devices in all'
    """
    ways = []
    if samples >= ranks:
        ways.append(f"{option} {samples // ranks} or less")
    if batch_size <= samples:
        ways.append(f"{samples // batch_size} devices in all")
    return f"use {', or '.join(ways) or f'{option} 1 and {samples} devices in all'}"
