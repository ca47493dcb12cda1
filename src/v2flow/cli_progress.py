"""The progress bar of verbs that take a while."""

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(
    what: str, items: Iterable[Any] | None = None, total: int | None = None, unit: str = "picture"
) -> "tqdm[Any]":
    """A bar over items, or one to update by hand: on standard error, after two seconds, in a terminal only, and gone
    at the end."""
    return tqdm(items, what, total, unit=unit, delay=2.0, leave=False, disable=None)
