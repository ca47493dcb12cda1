"""Shards that are opened: which samples they hold, and the bytes of a sample's members."""

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from v2flow.data.decode import MAX_CAPTION
from v2flow.data.fetching import fetch_shard
from v2flow.data.http import fetch_text, probe, register_openers
from v2flow.data.manifest import (
    FIELDS,
    MANIFEST,
    ShardIndex,
    cached_index,
    check_against_manifest,
    read_manifest,
)
from v2flow.data.shard_names import SCHEME, Shards, expand_shards
from v2flow.errors import V2FlowError

MAX_OPEN_FILES = 64
MAX_BYTES = {"image": 256 << 20, "txt": MAX_CAPTION, "json": MAX_CAPTION, "cls": MAX_CAPTION}
"""Of members by field; a larger one is never read."""


@dataclass(frozen=True, eq=False)
class Shard:
    """One shard: what to call it, where it is or can be fetched, and which samples it holds.

    Attributes:
        name: path or URL as the user knows it.
        index: its samples.
        version: of a remote shard, what tells its contents from others of the same URL.
        remote: whether it has to be fetched.
    """

    name: str
    index: ShardIndex
    version: str
    remote: bool

    @property
    def folder(self) -> str:
        """Where keys must be unique."""
        return self.name.rpartition("/")[0] if self.remote else str(Path(self.name).resolve().parent)

    def local_path(self) -> Path:
        """The file to read; a remote one is fetched into the cache first, by one process for all."""
        return fetch_shard(self.name, self.version, self.index.size) if self.remote else Path(self.name)


class TooLargeError(V2FlowError):
    """A member that is not read.

    Attributes:
        where: shard and key.
        reason: what is wrong with it.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)  # so that it can be sent from one process to another
        self.where, self.reason = where, reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}; take it out of the shard"


class ShardSet:
    """Samples of several shards, numbered through; open with :func:`open_shards`."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        self.sizes = [len(shard.index) for shard in self.shards]
        self._edges = np.concatenate([[0], np.cumsum(self.sizes)])
        self._files: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return int(self._edges[-1])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": OrderedDict()}

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)

    def locate(self, sample: int) -> tuple[int, int]:
        """Number of the shard, and of the sample in it."""
        shard = int(np.searchsorted(self._edges, sample, side="right")) - 1
        return shard, sample - int(self._edges[shard])

    def key(self, sample: int) -> str:
        """Key of a sample, counted from 0 over all shards."""
        shard, row = self.locate(sample)
        return self.shards[shard].index.key(row)

    def where(self, sample: int) -> str:
        """`SHARD, sample KEY`, for messages."""
        shard, row = self.locate(sample)
        return f"{self.shards[shard].name}, sample {self.shards[shard].index.key(row)!r}"

    def read(self, sample: int, field: int) -> bytes | None:
        """A member's bytes, or None if the sample has none. `field` counts in FIELDS.

        Raises:
            TooLargeError: the member has more than `MAX_BYTES`.
            V2FlowError: the shard was removed, changed or made shorter since it was opened, or cannot be read.
        """
        shard, row = self.locate(sample)
        offset, size = self.shards[shard].index.members[row, field].tolist()
        if offset < 0:
            return None
        if size > (most := MAX_BYTES[FIELDS[field]]):
            raise TooLargeError(self.where(sample), f"{FIELDS[field]}: {size:,} bytes, more than {most:,}")
        file = self._open(shard)
        try:
            data = os.pread(file, size, offset)
        except OSError as error:
            raise V2FlowError(f"{self.where(sample)}: cannot be read ({error.strerror}); {_GO_ON}") from error
        if len(data) != size:
            raise V2FlowError(
                f"{self.where(sample)}: the file ends before it; was it changed during the run? {_GO_ON}"
            )
        return data

    def missing(self, *fields: str) -> Iterator[int]:
        """Samples that have none of the fields."""
        for first, shard in zip(self._edges, self.shards, strict=False):
            yield from (int(first) + int(row) for row in np.flatnonzero(shard.index.missing(*fields)))

    def caption_bytes(self) -> np.ndarray:
        """Bytes of each sample's member txt, int64 [n], 0 without one; nothing is read for it."""
        sizes = [np.maximum(shard.index.members[:, FIELDS.index("txt"), 1], 0) for shard in self.shards]
        return np.concatenate(sizes) if sizes else np.zeros(0, np.int64)

    def _open(self, shard: int) -> int:
        file = self._files.get(shard)
        if file is None:
            if len(self._files) >= MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            file = self._files[shard] = _open_again(self.shards[shard])
        return file


_GO_ON = "put the shard back as it was, and resume with --ckpt_path last"


def _open_again(shard: Shard) -> int:
    """Opens a shard for reading, if it still is what was indexed."""
    path = shard.local_path()
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise V2FlowError(
            f"{shard.name}: was there and can no longer be opened ({error.strerror}); {_GO_ON}"
        ) from error
    size = os.fstat(file).st_size
    if size != shard.index.size:
        os.close(file)
        if shard.remote:
            path.unlink(missing_ok=True)  # else the damaged copy would outlive the repair of its source
        raise V2FlowError(
            f"{shard.name}: expected {shard.index.size} bytes as when it was indexed, found {size}; {_GO_ON}"
        )
    return file


def open_shards(shards: Shards, allow_pipe: bool = False, progress: bool = True) -> ShardSet:
    """Finds the samples of shards: from their manifest, or by reading their headers once.

    Remote shards without a manifest are fetched now, those with one when they are first read.

    Args:
        shards, allow_pipe: see :func:`v2flow.data.shard_names.expand_shards`.
        progress: show a bar when it takes more than two seconds.

    Raises:
        V2FlowError: a shard is missing, damaged, empty or shorter than its manifest says, or two samples of one
            folder have the same key.
    """
    names = expand_shards(shards, allow_pipe)
    manifests: dict[str, dict[str, ShardIndex]] = {}
    bar = tqdm(names, "index shards", unit="shard", delay=2.0, disable=not progress, leave=False)
    opened = ShardSet([open_shard(name, manifests) for name in bar])
    _refuse_duplicates(opened)
    return opened


def open_shard(name: str, manifests: dict[str, dict[str, ShardIndex]] | None = None) -> Shard:
    """Opens one expanded name.

    Args:
        manifests: those read before, by folder; gets what is read now.

    Raises:
        V2FlowError: missing, damaged, empty or shorter than its manifest says.
    """
    manifests = {} if manifests is None else manifests
    return _open_remote(name, manifests) if SCHEME.match(name) else _open_local(name, manifests)


def folder_manifest(folder: str) -> tuple[dict[str, Any], dict[str, ShardIndex]]:
    """How the shards of a folder, local or remote, were built, and their indexes; both empty without a manifest.

    Raises:
        V2FlowError: a manifest that is not v2flow's.
    """
    if "://" in folder:
        place = f"{folder}/{MANIFEST}"
        text = fetch_text(place)
    else:
        place = str(Path(folder) / MANIFEST)
        text = Path(place).read_text(errors="replace") if Path(place).is_file() else None
    return read_manifest(text, place) if text is not None else ({}, {})


def _open_local(name: str, manifests: dict[str, dict[str, ShardIndex]]) -> Shard:
    path = Path(name)
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise V2FlowError(f"{name}: no such shard; check the path and the braces") from error
    if not path.is_file():
        raise V2FlowError(
            f"{name}: expected a tar file, found a folder; use {name}/*.tar for the shards in it"
        )
    folder = str(path.parent)
    if folder not in manifests:
        manifests[folder] = folder_manifest(folder)[1]
    expected = manifests[folder].get(path.name)
    if expected is not None:
        check_against_manifest(status.st_size, expected, path, name)
        return Shard(name, expected, "", False)
    version = f"{status.st_size}-{status.st_mtime_ns}"
    return Shard(name, cached_index(path, str(path.resolve()), version, name), "", False)


def _open_remote(name: str, manifests: dict[str, dict[str, ShardIndex]]) -> Shard:
    register_openers()
    if name.startswith("pipe:"):
        return Shard(name, _index_of_fetched(name, ""), "", True)
    found = probe(name)
    version = f"{found.size}-{found.version}"
    folder, _, file = name.rpartition("/")
    if "?" not in name and folder not in manifests:
        manifests[folder] = folder_manifest(folder)[1]
    expected = manifests.get(folder, {}).get(file)
    if expected is None:
        return Shard(name, _index_of_fetched(name, version), version, True)
    if found.size is not None:
        check_against_manifest(found.size, expected, Path(file), name)
    return Shard(name, expected, version, True)


def _index_of_fetched(name: str, version: str) -> ShardIndex:
    path = fetch_shard(name, version)
    try:
        return cached_index(path, name, version)
    except V2FlowError:
        path.unlink(missing_ok=True)  # else the damaged copy would outlive the repair of its source
        raise


def _refuse_duplicates(opened: ShardSet) -> None:
    """Keys name samples in reports: one folder of shards holds each once. Other folders may be other data sets."""
    folders: dict[str, list[Shard]] = {}
    for shard in opened.shards:
        folders.setdefault(shard.folder, []).append(shard)
    for shards in folders.values():
        keys = np.concatenate([shard.index.keys for shard in shards])
        ordered = np.argsort(keys, kind="stable")
        same = np.flatnonzero(keys[ordered[1:]] == keys[ordered[:-1]])
        if len(same):
            owners = np.repeat(np.arange(len(shards)), [len(shard.index) for shard in shards])
            first, second = (shards[owners[i]].name for i in ordered[same[0] : same[0] + 2])
            key = keys[ordered[same[0]]].decode()
            raise V2FlowError(f"{second}: the key {key!r} is also in {first}; keys must be unique")
