"""Where the samples of a shard lie: indexes of tar files, and the manifest that says what shards must hold.

A shard is a plain tar file whose members `KEY.EXTENSION` of one key, one after the other, are a sample, as
webdataset defines it (the key ends at the first dot of the file name). Its index holds, for each sample, the
byte range of the members that v2flow reads. Shards that v2flow builds come with a `manifest.json` of all
indexes, written last; for others the index is made once and kept in the cache folder.
"""

import hashlib
import json
import logging
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from webdataset.tariterators import base_plus_ext

from v2flow.errors import V2FlowError, first_line
from v2flow.paths import atomic_path, cache_dir

_log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = "v2flow-shards-1"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
FIELDS = ("image", "txt", "json", "cls")
"""What is read of a sample; members of any other extension are never opened."""
_FIELD_OF = {**dict.fromkeys(IMAGE_EXTENSIONS, 0), "txt": 1, "json": 2, "cls": 3}
MAX_KEY = 4096
"""Bytes of a key: an index gives each key the room of the longest."""
_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset skips too


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Samples of one shard.

    Attributes:
        size: bytes of the tar file.
        keys: UTF-8 bytes, dtype S, [n].
        members: int64 [n, 4, 2]: offset and size of the fields in `FIELDS`; offset -1 where absent.
    """

    size: int
    keys: np.ndarray
    members: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, sample: int) -> str:
        """Key of a sample, counted from 0 in the shard."""
        return self.keys[sample].decode()

    def missing(self, *fields: str) -> np.ndarray:
        """bool [n]: samples that have none of the fields."""
        return np.all(self.members[:, [FIELDS.index(field) for field in fields], 0] < 0, axis=1)


def make_index(size: int, keys: Sequence[str], members: Sequence[Mapping[str, Sequence[int]]]) -> ShardIndex:
    """An index of samples given as field -> (offset, size)."""
    table = np.full((len(keys), len(FIELDS), 2), -1, np.int64)
    for row, fields in zip(table, members, strict=True):
        for name, place in fields.items():
            row[FIELDS.index(name)] = place
    return ShardIndex(size, np.array([key.encode() for key in keys], dtype=np.bytes_), table)


def index_tar(path: str | Path, name: str | None = None) -> ShardIndex:
    """Reads the headers of a tar file.

    Args:
        path: the file.
        name: what to call it in messages.

    Raises:
        V2FlowError: not a plain tar, cut short, empty, or two members or samples of one name.
    """
    name = name or str(path)
    try:
        with open(path, "rb", buffering=1 << 16) as file:
            return _scan(file, os.fstat(file.fileno()).st_size, name)
    except FileNotFoundError as error:
        raise V2FlowError(f"{name}: no such shard; check the path and the braces") from error
    except V2FlowError:
        raise
    except TAR_ERRORS as error:
        raise V2FlowError(
            f"{name}: cut short, or not an uncompressed tar file ({first_line(error)}); copy or build it again"
        ) from error


def _scan(file: BinaryIO, size: int, name: str) -> ShardIndex:
    if size == 0:
        raise V2FlowError(f"{name}: an empty file; expected a tar file with at least one sample")
    keys: list[str] = []
    members: list[dict[str, tuple[int, int]]] = []
    extensions: set[str] = set()
    seen: set[str] = set()
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in plain_files(archive, name):
            if _META.match(member.name):
                continue
            if member.offset_data + member.size > size:
                raise V2FlowError(
                    f"{name}: cut short inside member {member.name}; copy or build the shard again"
                )
            key, extension = base_plus_ext(member.name)
            if key is None:
                continue
            if not keys or key != keys[-1]:
                check_key(key, name)
                if key in seen:
                    raise V2FlowError(f"{name}: two samples of the key {key!r}; {_DUPLICATE_ADVICE}")
                seen.add(key)
                keys.append(key)
                members.append({})
                extensions = set()
            _add_member(members[-1], extensions, extension.lower(), member, key, name)
        end = archive.offset
    _check_end(file, end, size, len(keys), name)
    return make_index(size, keys, members)


def check_key(key: str, name: str) -> None:
    """Refuse a key that is not UTF-8 or longer than `MAX_KEY`.

    Raises:
        V2FlowError: names the shard and the key.
    """
    try:
        length = len(key.encode())
    except UnicodeEncodeError as error:
        raise V2FlowError(f"{name}: the member name {key[:40]!r} is not UTF-8; rename it") from error
    if length > MAX_KEY:
        raise V2FlowError(f"{name}: a key of {length} bytes, {key[:40]!r}…, more than {MAX_KEY}; rename it")


# What the tarfile module raises on headers that make no sense: their numbers, texts and sizes can be anything, and a
# header for a long name can be followed by another one, and so on.
TAR_ERRORS = (
    tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError, LookupError, TypeError, RecursionError,
)  # fmt: skip


def plain_files(archive: tarfile.TarFile, name: str) -> Iterator[tarfile.TarInfo]:
    """The plain files of a tar from front to back: no links, folders, devices or files with holes.

    Args:
        name: what to call it in messages.

    Raises:
        V2FlowError: a header that leads back to one before it.
    """
    place = -1
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]  # else each header stays in memory
        if archive.offset <= place or member.size < 0:
            raise V2FlowError(
                f"{name}: the header of {member.name[:80]!r} has no possible size; build it again"
            )
        place = archive.offset
        if member.isreg() and not member.issparse():
            yield member


_DUPLICATE_ADVICE = "keys must be unique and end at the first dot of a file name: rename the members"


def _add_member(
    fields: dict[str, tuple[int, int]],
    extensions: set[str],
    extension: str,
    member: tarfile.TarInfo,
    key: str,
    name: str,
) -> None:
    if extension in extensions:
        raise V2FlowError(f"{name}: two members {key}.{extension}; {_DUPLICATE_ADVICE}")
    extensions.add(extension)
    field = _FIELD_OF.get(extension)
    if field is None or (field == 0 and "image" in fields):
        return
    fields[FIELDS[field]] = (member.offset_data, member.size)


def _check_end(file: BinaryIO, end: int, size: int, samples: int, name: str) -> None:
    """A tar ends with blocks of zeros: without them it was cut, maybe between two members."""
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE).count(0) != tarfile.BLOCKSIZE:
        raise V2FlowError(
            f"{name}: the end of the archive is missing after {samples} samples ({size} bytes): the file was cut "
            "short or damaged; copy or build it again"
        )
    if samples == 0:
        raise V2FlowError(f"{name}: an empty tar; expected at least one sample KEY.jpg, KEY.png or KEY.webp")


def write_manifest(folder: Path, indexes: Mapping[str, ShardIndex], build: Mapping[str, Any]) -> None:
    """Writes `manifest.json` into the folder of the shards, atomically: with it the shards are complete.

    Args:
        indexes: file name of each shard -> index.
        build: how the shards were built; plain values.
    """
    shards = []
    for name, index in sorted(indexes.items()):
        entry: dict[str, Any] = {"file": name, "bytes": index.size, "samples": len(index)}
        entry["keys"] = [index.key(i) for i in range(len(index))]
        for number, field in enumerate(FIELDS):
            if (index.members[:, number, 0] >= 0).any():
                entry[field] = index.members[:, number].tolist()
        shards.append(entry)
    document = {"format": FORMAT, "build": dict(build), "shards": shards}
    with atomic_path(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(document, separators=(",", ":")) + "\n")


def read_manifest(text: str, name: str) -> tuple[dict[str, Any], dict[str, ShardIndex]]:
    """How shards were built, and file name -> index, of a `manifest.json`.

    Raises:
        V2FlowError: not one of v2flow's manifests.
    """
    try:
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']!r}, expected {FORMAT!r}")
        _check_keys(document["shards"], (1 << 28) + 16 * len(text))
        indexes = {_plain_name(entry["file"]): _index_of(entry) for entry in document["shards"]}
        return dict(document["build"]), indexes
    except (
        ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError,
    ) as error:  # fmt: skip
        raise V2FlowError(
            f"{name}: not a manifest of v2flow's ({first_line(error)}); remove it or build the shards again"
        ) from error


def _plain_name(name: str) -> str:
    if Path(name).name != name:
        raise ValueError(f"{name!r} is not the name of a file beside it")
    return name


def _check_keys(shards: Sequence[Mapping[str, Any]], most: int) -> None:
    """Each key gets the room of the longest one of its shard: of a small file that could be gigabytes."""
    room = 0
    for entry in shards:
        longest = max((len(key.encode()) for key in entry["keys"]), default=0)
        room += longest * len(entry["keys"])
        if longest > MAX_KEY or room > most:
            raise ValueError(f"{entry['file']} has {len(entry['keys'])} keys, one of them of {longest} bytes")


def _index_of(entry: Mapping[str, Any]) -> ShardIndex:
    keys = np.array([key.encode() for key in entry["keys"]], dtype=np.bytes_)
    if len(keys) != entry["samples"] or not len(keys):
        raise ValueError(f"{entry['file']} says {entry['samples']} samples and names {len(keys)}")
    table = np.full((len(keys), len(FIELDS), 2), -1, np.int64)
    for number, field in enumerate(FIELDS):
        if field in entry:
            table[:, number] = entry[field]
    size = int(entry["bytes"])
    start, length = table[..., 0], table[..., 1]
    if not (
        (start == -1) | ((start >= 0) & (length >= 0) & (length <= size) & (start <= size - length))
    ).all():
        raise ValueError(f"{entry['file']} names members outside of its {size} bytes")
    return ShardIndex(size, keys, table)


def check_against_manifest(found: int, expected: ShardIndex, path: Path, name: str) -> None:
    """Compares a shard's size with the manifest's; says how many samples are left where it was cut.

    Raises:
        V2FlowError: the sizes differ.
    """
    if found == expected.size:
        return
    whole = f"the manifest says {len(expected)} samples in {expected.size} bytes"
    if found < expected.size:
        ends = (expected.members[:, :, 0] + expected.members[:, :, 1]).max(1)
        left = int((ends <= found).sum())
        raise V2FlowError(
            f"{name}: cut short: {left} samples in {found} bytes, but {whole}; copy or build it again"
        )
    raise V2FlowError(
        f"{name}: {found} bytes, but {whole}; remove {path.with_name(MANIFEST)} if the shard is right, or build again"
    )


def cached_index(path: Path, identity: str, version: str, name: str | None = None) -> ShardIndex:
    """The index of a shard without manifest: made once, then read from the cache folder.

    Args:
        path: the tar file.
        identity: its URL or absolute path.
        version: changes whenever the file does (size and time, or an ETag).
        name: what to call it in messages, if not `identity`.

    Raises:
        V2FlowError: see :func:`index_tar`.
    """
    digest = hashlib.sha256(f"{FORMAT}\n{identity}\n{version}".encode()).hexdigest()[:32]
    stored = cache_dir() / "indexes" / f"{digest}.npz"
    try:
        with np.load(stored, allow_pickle=False) as arrays:
            return ShardIndex(int(arrays["size"]), arrays["keys"], arrays["members"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not there yet, or damaged: made anew
    index = index_tar(path, name or identity)
    try:
        stored.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(stored) as temporary, temporary.open("wb") as file:
            np.savez(file, size=index.size, keys=index.keys, members=index.members)
    except OSError as error:  # a full or read-only cache costs time, no more
        _log.warning(
            "%s: the index of %s cannot be kept (%s)", stored.parent, name or identity, error.strerror
        )
    return index
