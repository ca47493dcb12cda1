"""Exit statuses of the command, as docs/command-line.md has them."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

MISTAKE, INTERRUPTED, READER_GONE, TERMINATED = 2, 130, 141, 143
"""All but the first are what a shell gives for a process that SIGINT, SIGPIPE or SIGTERM has ended."""


def reader_is_gone() -> bool:
    """Whether nothing reads standard output any more; what is left of it then goes nowhere."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Else Python would try again when it ends, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


@contextmanager
def signals_in_trainer() -> Iterator[None]:
    """Tells signals apart that Lightning's trainer ends the process after: with 1 for Ctrl-C, with 0 for SIGTERM.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
        SystemExit: with status 143, after SIGTERM in a validation or test; others as they come.
    """
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SIGTERMException as stop:
        raise SystemExit(TERMINATED) from stop
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, before)  # Lightning leaves it ignored
        raise KeyboardInterrupt from stop
