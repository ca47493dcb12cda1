"""Where v2flow keeps what it can make again, and writing without partial files."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """The cache folder: environment variable V2FLOW_CACHE, by default ~/.cache/v2flow. It may not exist yet."""
    return Path(os.environ.get("V2FLOW_CACHE") or Path.home() / ".cache" / "v2flow")


def pictures_folder() -> Path:
    """Where pictures lie that are not built here: the environment variable V2FLOW_DATA, else ../shared/data if it is
    there, else data."""
    shared = Path("../shared/data")
    return Path(os.environ.get("V2FLOW_DATA") or (shared if shared.is_dir() else "data"))


def name_pictures_folder() -> None:
    """Puts that folder into V2FLOW_DATA, through which experiment and suite files find it."""
    os.environ["V2FLOW_DATA"] = str(pictures_folder())


@contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """A temporary path in the folder of `final`, renamed to it on success and removed on failure."""
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
