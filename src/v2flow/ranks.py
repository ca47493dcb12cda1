"""How many processes take part, asked at call time: modules are made before Lightning makes their process group."""

import torch.distributed as dist


def world() -> tuple[int, int]:
    """(rank, number of ranks) at this moment; (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
