"""Remote shards: fetched once for all processes of a machine into a cache, and never more than was expected."""

import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from webdataset.gopen import gopen

from v2flow.data.disk import disk_reason
from v2flow.data.http import HttpStream
from v2flow.errors import V2FlowError, first_line
from v2flow.paths import cache_dir

_log = logging.getLogger(__name__)

MAX_SHARD = 64 << 30
"""Bytes of a remote shard, where neither a manifest nor its server says how many it has."""
KEPT_FREE = 1 << 30
"""Bytes that a fetch leaves free on the disk, or a hundredth of it where that is less."""


def fetch_shard(name: str, version: str, size: int | None = None) -> Path:
    """Fetches a remote shard into the cache, once for all processes of this machine, and gives its path.

    What was fetched of it before an interruption is kept. Nothing is ever removed from the cache.

    Args:
        version: what tells its contents from others of the same name; begins with its bytes, if the server says them.
        size: its bytes, if a manifest says them.

    Raises:
        V2FlowError: it cannot be read to its end, is larger than it should be, or there is no room for it.
    """
    digest = hashlib.sha256(f"{name}\n{version}".encode()).hexdigest()[:32]
    final = cache_dir() / "shards" / f"{digest}.tar"
    if final.exists():
        if not version.partition("-")[2]:
            _log.info(
                "%s: taken from the cache, though nothing says whether it has changed since: its source has neither "
                "ETag nor time; delete %s to fetch it again", name, final,
            )  # fmt: skip
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(final.with_suffix(".lock")):
            if not final.exists():
                partial = final.with_suffix(".part")
                if size is None and version.partition("-")[0].isdigit():
                    size = int(version.partition("-")[0])
                (_run_pipe if name.startswith("pipe:") else _download)(name, version, partial, size)
                os.replace(partial, final)
    except OSError as error:
        reason = disk_reason(error) or error.strerror
        raise V2FlowError(
            f"{name}: cannot be kept in {final.parent} ({reason}); make room there, or name another folder in the "
            "variable V2FLOW_CACHE; what was fetched is kept"
        ) from error
    return final


def _download(url: str, version: str, partial: Path, size: int | None) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    tag = version.partition("-")[2]
    with HttpStream(url, have if tag else 0, tag) as stream, partial.open("ab" if tag else "wb") as file:
        _copy(stream, file, url, size)


def _run_pipe(name: str, version: str, partial: Path, size: int | None) -> None:
    try:
        with gopen(name) as stream, partial.open("wb") as file:
            _copy(stream, file, name, size)
    except V2FlowError:
        raise
    except OSError as error:
        raise V2FlowError(f"{name}: the command failed ({first_line(error)})") from error


def _copy(stream: Any, file: BinaryIO, name: str, size: int | None) -> None:
    """Writes a stream behind what the file has. One without end is cut off, and nothing of it is kept."""
    disk = shutil.disk_usage(Path(file.name).parent)
    room = disk.free - min(KEPT_FREE, disk.total // 100) + file.tell()
    most = min(MAX_SHARD if size is None else size, room)
    if size is None or size <= room:
        while chunk := stream.read(1 << 20):
            file.write(chunk)
            if file.tell() > most:
                break
        else:
            return
        Path(file.name).unlink()
    if most == room:
        needed = "" if size is None else f"{size:,} bytes, but "
        raise V2FlowError(
            f"{name}: {needed}only {max(room, 0):,} bytes can be used in {Path(file.name).parent}; make room there, or "
            "name another folder in the variable V2FLOW_CACHE"
        )
    raise V2FlowError(f"{name}: more than the {most:,} bytes that were expected; is it the right file?")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
