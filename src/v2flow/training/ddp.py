"""`--trainer.strategy=ddp_local_buffers`: Lightning's DDP without a broadcast of all buffers before each step.

Frozen tables are the same on every rank from the start, and what the training changes (codebooks, the residual's scale)
is made of sums over all ranks: nothing is left for a broadcast to make equal.
"""

import inspect

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch.nn.parallel import DistributedDataParallel

LOCAL_BUFFERS = "ddp_local_buffers"

BUFFER_OPTIONS = ("forward_sync_buffers", "broadcast_buffers")
"""DDP's name of the option that broadcasts buffers, in newer and in older versions of PyTorch."""
_known = inspect.signature(DistributedDataParallel).parameters

StrategyRegistry.register(
    LOCAL_BUFFERS, DDPStrategy, description="DDP whose buffers are left to the ranks, which keep them equal",
    **{next(name for name in BUFFER_OPTIONS if name in _known): False},
)  # fmt: skip
