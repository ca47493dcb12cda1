"""What a checkpoint names is not fetched for it: somebody else's would decide what is downloaded, and how much."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_refused: ContextVar[bool] = ContextVar("downloads_refused", default=False)


@contextmanager
def no_downloads() -> Iterator[None]:
    """Inside, hub ids stand for what the local cache holds of them: the words are a file's and not the user's."""
    token = _refused.set(True)
    try:
        yield
    finally:
        _refused.reset(token)


def downloads_refused() -> bool:
    """Whether only local files may be read; the value of `local_files_only` of the Hugging Face libraries."""
    return _refused.get()


def why_local(name: str) -> str:
    """The end of a message about something named `name` that is not there; empty where downloads are allowed."""
    return f"; a checkpoint names it, so fetch it yourself: hf download {name}" if downloads_refused() else ""
