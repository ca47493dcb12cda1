"""Where v2flow keeps what it can make again, and writing without partial files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """The cache folder: environment variable V2FLOW_CACHE, by default ~/.cache/v2flow. It may not exist yet."""
    return Path(os.environ.get("V2FLOW_CACHE") or Path.home() / ".cache" / "v2flow")


def find_pictures() -> None:
    """Sets V2FLOW_DATA, where experiment files find pictures that are not built here, unless the user has: to
    ../shared/data if that is there, else to data."""
    shared = Path("../shared/data")
    os.environ.setdefault("V2FLOW_DATA", str(shared if shared.is_dir() else "data"))


@contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """A temporary path in the folder of `final`, renamed to it on success and removed on failure."""
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
