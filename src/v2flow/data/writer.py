"""Writing shards with their manifest: complete under their final names, or not there at all."""

import fcntl
import io
import os
import shutil
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v2flow.data.disk import disk_reason
from v2flow.data.manifest import MANIFEST, ShardIndex, index_tar, read_manifest, write_manifest
from v2flow.errors import V2FlowError

STAGING = ".building"
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Sample:
    """A sample to write.

    Attributes:
        split: `train`, `val` or `test`.
        key: unique in its build; without dots in its last part, as a key ends at a file name's first dot.
        members: extension -> bytes.
    """

    split: str
    key: str
    members: Mapping[str, bytes]


def finished_build(out: Path, build: Mapping[str, Any]) -> dict[str, int] | None:
    """Samples by split if `out` holds a complete build of these settings; None if it holds none.

    Raises:
        V2FlowError: it holds another build, or shards of unknown origin.
    """
    manifest = out / MANIFEST
    if manifest.is_file():
        found, indexes = read_manifest(manifest.read_text(errors="replace"), str(manifest))
        if found != dict(build):
            changed = sorted(k for k in found.keys() | build.keys() if found.get(k) != build.get(k))
            raise V2FlowError(
                f"{out}: holds shards built with other settings ({', '.join(changed)}); choose another folder or "
                "remove this one"
            )
        if all((out / n).is_file() and (out / n).stat().st_size == i.size for n, i in indexes.items()):
            return count_by_split(indexes)
        # Shards are gone or damaged: built again. The same settings give the same bytes, so the manifest holds.
    elif (strange := next(iter(sorted(out.glob("*.tar"))), None)) is not None and not (
        out / STAGING
    ).is_dir():
        raise V2FlowError(
            f"{strange}: a shard without manifest is in the way; choose another folder or remove it"
        )
    return None


def count_by_split(indexes: Mapping[str, ShardIndex]) -> dict[str, int]:
    """Samples of each split that has any."""
    counts = dict.fromkeys(SPLITS, 0)
    for name, index in indexes.items():
        counts[name.partition("-")[0]] += len(index)
    return {split: count for split, count in counts.items() if count}


def write_shards(
    out: Path,
    samples: Iterable[Sample],
    build: Mapping[str, Any],
    samples_per_shard: int = 1000,
    texts: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Writes `SPLIT-NNNNNN.tar` into `out`, and the manifest last.

    The shards grow in a staging folder and are moved when all are whole. The same samples give the same bytes.

    Args:
        samples: in the order to be written.
        build: how they were built, for the manifest.
        texts: further text files by name, such as an attribution.

    Returns:
        Samples by split.

    Raises:
        V2FlowError: two samples of one key, a key with a dot, no samples at all, a disk that is full, or another
            process that builds this folder.
    """
    new = not out.exists()
    staging = out / STAGING
    if staging.exists():
        os.close(_hold(staging))  # refused while it is another's
    shutil.rmtree(staging, ignore_errors=True)
    held: int | None = None
    try:
        staging.mkdir(parents=True)
        held = _hold(staging)
        indexes = _write_all(staging, samples, samples_per_shard)
        for name, text in (texts or {}).items():
            (staging / name).write_text(text)
        write_manifest(staging, indexes, build)  # before anything is moved: there must be room for it
    except BaseException as error:  # also when interrupted from the keyboard
        shutil.rmtree(out if new else staging, ignore_errors=True)
        reason = disk_reason(error)
        if reason is None or isinstance(error, V2FlowError):
            raise
        raise V2FlowError(
            f"{out}: the shards cannot be written: {reason}; nothing is left of them: make room or name another "
            "folder, and call again"
        ) from error
    finally:
        if held is not None:
            os.close(held)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == MANIFEST):
        path.replace(out / path.name)
    staging.rmdir()
    return count_by_split(indexes)


def _hold(staging: Path) -> int:
    """Locks a staging folder for this process, until the descriptor is closed.

    Raises:
        V2FlowError: it is locked.
    """
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise V2FlowError(
            f"{staging.parent}: another process is building these shards; wait until it has ended, and call again"
        ) from error
    except OSError:  # a file system without locks
        pass
    return descriptor


def _write_all(folder: Path, samples: Iterable[Sample], samples_per_shard: int) -> dict[str, ShardIndex]:
    """Fills the shards and reads them back: file name -> index."""
    keys: set[str] = set()
    writers = {split: _SplitWriter(folder, split, samples_per_shard) for split in SPLITS}
    try:
        for sample in samples:
            _check_key(sample.key, keys, folder.parent)
            keys.add(sample.key)
            writers[sample.split].write(sample)
    finally:
        for writer in writers.values():
            writer.close()
    if not keys:
        raise V2FlowError(f"{folder.parent}: no samples to write")
    return {path.name: index_tar(path) for path in sorted(folder.glob("*.tar"))}


def _check_key(key: str, keys: set[str], out: Path) -> None:
    if key in keys:
        raise V2FlowError(f"{out}: two samples of the key {key!r}; keys must be unique")
    if not key or "." in key.rpartition("/")[2]:
        raise V2FlowError(f"{out}: the key {key!r} is empty or has a dot; replace the dots")


class _SplitWriter:
    """Fills one shard of a split after the other."""

    def __init__(self, folder: Path, split: str, samples_per_shard: int) -> None:
        self._folder = folder
        self._split = split
        self._most = samples_per_shard
        self._shards = 0
        self._samples = 0
        self._archive: tarfile.TarFile | None = None

    def write(self, sample: Sample) -> None:
        if self._archive is None or self._samples == self._most:
            self.close()
            path = self._folder / f"{self._split}-{self._shards:06d}.tar"
            self._archive = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 (closed in close)
            self._shards += 1
            self._samples = 0
        for extension, data in sample.members.items():
            # Neither owner nor time: the same bytes each time.
            member = tarfile.TarInfo(f"{sample.key}.{extension}")
            member.size = len(data)
            self._archive.addfile(member, io.BytesIO(data))
        self._samples += 1

    def close(self) -> None:
        if self._archive is not None:
            self._archive.close()
            self._archive = None
