"""What verbs that take a while show of it."""

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

DELAY = 2.0
"""Seconds before anything is shown."""


def progress_bar(
    what: str, items: Iterable[Any] | None = None, total: int | None = None, unit: str = "picture"
) -> "tqdm[Any]":
    """A bar over items, or one to update by hand: on standard error, after two seconds, in a terminal only, and gone
    at the end."""
    return tqdm(items, what, total, unit=unit, delay=DELAY, leave=False, disable=None)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says what goes on while it cannot be counted: a line on standard error, after two seconds, in a terminal only."""
    if not sys.stderr.isatty():
        yield
        return
    timer = threading.Timer(DELAY, print, [f"v2flow: {what} …"], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
