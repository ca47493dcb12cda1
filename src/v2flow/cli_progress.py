"""The progress bar of verbs that go through pictures one by one."""

from collections.abc import Collection, Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def counted(items: Collection[Item], what: str, unit: str = "picture") -> Iterable[Item]:
    """The items, under a bar on standard error that shows after two seconds, in a terminal only, and leaves nothing."""
    return tqdm(items, what, unit=unit, delay=2.0, leave=False, disable=None)
