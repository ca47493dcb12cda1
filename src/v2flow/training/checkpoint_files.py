"""Checkpoint files that outlive a crash: written aside and renamed, with a SHA-256, and the one before is kept.

`torch.save` writes a zip archive, and an archive may end with a comment: the checksum is that comment, so that file and
checksum are one, and anybody's `torch.load(weights_only=True)` still reads it.
"""

import hashlib
import logging
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from v2flow.data.disk import disk_reason
from v2flow.errors import V2FlowError

_log = logging.getLogger(__name__)

METADATA, REST = ".metadata", "meta.pt"
"""Of a sharded checkpoint's folder: the file by which PyTorch knows it, and Lightning's for what is in no shard."""

_MARK = b"v2flow-sha256:"
_COMMENT = len(_MARK) + 64
# A zip archive's last record; its last two bytes are the length of the comment that follows.
_RECORD, _RECORD_BYTES = b"PK\x05\x06", 22
_CHUNK = 1 << 20

_Identity = tuple[str, int, int, int]
_sound: set[_Identity] = set()
"""Files whose checksum was right: (path, size, time of change, inode). A resume looks at its checkpoint twice."""
_warned: set[str] = set()


def previous_of(path: str | Path) -> Path:
    """Where the checkpoint that `path` held before is kept: `last.ckpt` -> `last.previous.ckpt`."""
    path = Path(path)
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def is_sharded(path: str | Path) -> bool:
    """Whether this is a sharded checkpoint's folder."""
    return Path(path, METADATA).is_file()


def write_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint so that at every moment `path` is the old one or the new one, whole and on the disk.

    What `path` held before is then `previous_of(path)`.

    Raises:
        V2FlowError: the disk is full or read-only; what `path` held is untouched.
    """
    path = Path(path)
    try:
        _write(checkpoint, path)
    except (OSError, RuntimeError) as error:
        reason = disk_reason(error)
        if reason is None:
            raise
        raise not_written(path, reason) from error
    _sound.add(_identity(path))


def not_written(path: Path, reason: str) -> V2FlowError:
    """The line about a checkpoint that a disk has refused; what `path` holds is the one before it."""
    left = f"; {path} is the one before it" if path.exists() else ""
    return V2FlowError(
        f"{path}: the checkpoint cannot be written: {reason}{left}; make room there and go on with --ckpt_path last"
    )


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb+") as file:
            hashing: Any = _HashingFile(file)
            torch.save(checkpoint, hashing)
            _append_checksum(file, hashing.hexdigest())
            os.fsync(file.fileno())
        if path.is_file() and damage(path) is None:
            _keep_previous(path)
        os.replace(part, path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):  # on a read-only disk: there is none
            part.unlink(missing_ok=True)


def usable_checkpoint(path: str | Path, find_damage: Callable[[Path], str | None] | None = None) -> Path:
    """`path` if it is whole, else the checkpoint before it, with one warning line.

    Args:
        find_damage: says what is wrong with a checkpoint, None for nothing; `damage` by default.

    Raises:
        V2FlowError: there is no such checkpoint, or it is damaged, and none from before it is whole.
    """
    path, find_damage = Path(path), find_damage or damage
    reason = find_damage(path)
    if reason is None:
        return path
    reasons = []
    for previous in _before(path):
        reason_too = find_damage(previous)
        if reason_too is None:
            if str(path) not in _warned:
                _warned.add(str(path))
                _log.warning("%s: %s; taking the one before it, %s", path, reason, previous)
            return previous
        reasons.append(f"{previous} ({reason_too})")
    if reasons:
        raise V2FlowError(
            f"{path}: not a readable checkpoint ({reason}), nor is {', nor '.join(reasons)}; name another one"
        )
    if not path.exists():
        raise V2FlowError(f"{path}: no such checkpoint; expected a .ckpt file or an exported folder")
    raise V2FlowError(f"{path}: not a readable checkpoint ({reason}); is it cut short or foreign?")


def _before(path: Path) -> list[Path]:
    """Checkpoints from before `path`, newest first: the one that it replaced, and SLURM's with lower numbers."""
    numbers = {found: _slurm_number(found) for found in path.parent.glob("hpc_ckpt_*.ckpt")}
    earlier = [found for found, number in numbers.items() if 0 <= number < _slurm_number(path)]
    replaced = [previous_of(path)] if previous_of(path).exists() else []
    return replaced + sorted(earlier, key=lambda found: -numbers[found])


def _slurm_number(path: Path) -> int:
    """N of ``hpc_ckpt_N.ckpt``, which Lightning saves when SLURM takes a job away; -1 of another file."""
    match = re.fullmatch(r"hpc_ckpt_(\d+)\.ckpt", path.name)
    return int(match[1]) if match else -1


def newest_checkpoint(folder: Path, pattern: str) -> Path | None:
    """The newest checkpoint under `folder`, of the ones that fit the pattern; None if there is none.

    That is one of the last run by the number of its folder, `version_12`, and of those the one written last: a clock
    that was set back between two runs makes the later one look older.
    """
    found = {path: (_run_number(path), path.stat().st_mtime_ns) for path in folder.glob(pattern)}
    return max(found, key=lambda path: found[path]) if found else None


def _run_number(path: Path) -> int:
    """Number of the nearest folder `version_N`; -1 without one."""
    matches = (re.fullmatch(r"version_(\d+)", part) for part in reversed(path.parts))
    return next((int(match[1]) for match in matches if match), -1)


def damage(path: Path, quick: bool = False) -> str | None:
    """What is wrong with a checkpoint; None if nothing is known to be. Files without checksum need only an end.

    Of a sharded one, a folder, the shards' checksums are left to the strategy, whose ranks compute them together.

    Args:
        quick: only look whether the file has its end: for a look at what a checkpoint says of itself.
    """
    if path.is_dir():
        from v2flow.training.checkpoint_folders import folder_damage

        return folder_damage(path, quick=True)
    if not path.is_file():
        return "no such file"
    identity = _identity(path)
    if identity in _sound:
        return None
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            return "it is cut short" if identity[1] else "it is empty"
        comment = _comment(file)
        if comment is None:
            return "it is cut short"
        if quick or not comment.startswith(_MARK):
            return None
        if _checksum(file, identity[1] - len(comment)) != comment[len(_MARK) :].decode(errors="replace"):
            return "its checksum is wrong"
    _sound.add(identity)
    return None


class _HashingFile:
    """Passes what is written on to a file, in order, and hashes it on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _append_checksum(file: BinaryIO, checksum: str) -> None:
    """Give a zip archive without a comment the checksum of its bytes as its comment."""
    start = file.seek(-_RECORD_BYTES, os.SEEK_END)
    record = file.read(_RECORD_BYTES)
    assert record.startswith(_RECORD) and record.endswith(b"\0\0"), "torch.save wrote no plain zip archive"
    file.seek(start + _RECORD_BYTES - 2)
    file.write(struct.pack("<H", _COMMENT) + _MARK + checksum.encode())
    file.flush()


def _comment(file: BinaryIO) -> bytes | None:
    """The archive's comment, empty if it is none of ours; None if it is shorter than the archive says."""
    file.seek(-min(file.seek(0, os.SEEK_END), _RECORD_BYTES + _COMMENT), os.SEEK_END)
    tail = file.read()
    start = tail.rfind(_RECORD)
    if start < 0:
        return b""
    record, comment = tail[start : start + _RECORD_BYTES], tail[start + _RECORD_BYTES :]
    return comment if record.endswith(struct.pack("<H", len(comment))) else None


def _checksum(file: BinaryIO, size: int) -> str:
    """Of the first `size` bytes as they were before the archive had a comment."""
    digest = hashlib.sha256()
    file.seek(0)
    left = size - 2
    while left:
        block = file.read(min(left, _CHUNK))
        if not block:
            return "cut short"
        digest.update(block)
        left -= len(block)
    digest.update(b"\0\0")
    return digest.hexdigest()


def _keep_previous(path: Path) -> None:
    """Give what `path` holds the previous one's name as well; `path` itself is there all the time."""
    with _fresh(path.with_name(f".{previous_of(path).name}.part")) as link:
        try:
            os.link(path, link)
        except OSError:  # a file system without hard links: for a moment only the previous one is there
            os.replace(path, previous_of(path))
        else:
            os.replace(link, previous_of(path))
    sync_folder(path.parent)


@contextmanager
def _fresh(path: Path) -> Iterator[Path]:
    """A name that no killed process has left a file under."""
    path.unlink(missing_ok=True)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _identity(path: Path) -> _Identity:
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino
