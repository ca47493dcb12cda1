"""A machine that has run out of memory or disk, or another one that is gone, told in one line with advice."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from v2flow.data.disk import disk_reason
from v2flow.errors import V2FlowError, first_line

_ALLOCATORS = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory", "CUDA out of memory")
_THREADS = ("can't start new thread", "Resource temporarily unavailable", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up: of a CUDA device, of PyTorch on the CPU, or of Python."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, (RuntimeError, OSError)) and any(part in text for part in _ALLOCATORS + _THREADS)


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error says that another rank, without a word, no longer takes part."""
    # Of gloo's errors some have a class of their own, others only say where they come from.
    return isinstance(error, (dist.DistBackendError, dist.DistNetworkError)) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )


@contextmanager
def clear_exhaustion() -> Iterator[None]:
    """Tells what a machine has run out of in one line; checkpoints that are there stay as they are.

    Raises:
        V2FlowError: in place of an error that says that memory or disk is used up, or another rank gone.
    """
    try:
        yield
    except V2FlowError:
        raise
    except (MemoryError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            raise V2FlowError(
                f"training: out of memory ({first_line(error)[:200]}); lower data.batch_size and raise "
                "trainer.accumulate_grad_batches by as much, or lower data.num_workers, and go on with "
                "--ckpt_path last"
            ) from error
        reason = disk_reason(error) if getattr(error, "filename", None) is None else None
        if reason is not None:
            _raise_what_was_told_before(error)
            raise V2FlowError(
                f"training: {reason} ({first_line(error)[:200]}); make room and go on with --ckpt_path last"
            ) from error
        if is_lost_rank(error):
            raise V2FlowError(
                f"training: the connection to another rank broke ({first_line(error)[:200]}); see that rank's "
                "output, and go on with --ckpt_path last"
            ) from error
        raise


def _raise_what_was_told_before(error: BaseException) -> None:
    """A logger that closes on a full disk must not hide which file the training could not write."""
    context = error.__context__
    while context is not None:
        if isinstance(context, V2FlowError):
            raise context
        context = context.__context__
