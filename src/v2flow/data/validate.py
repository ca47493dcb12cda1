"""Checking shards before a training depends on them."""

import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from webdataset.tariterators import base_plus_ext

from v2flow.data.decode import BadSampleError, decode_caption, decode_image
from v2flow.data.manifest import (
    FIELDS,
    IMAGE_EXTENSIONS,
    TAR_ERRORS,
    ShardIndex,
    check_key,
    index_tar,
    make_index,
    plain_files,
)
from v2flow.data.shard_names import expand_shards
from v2flow.data.shards import Shard, ShardSet, open_shard
from v2flow.errors import V2FlowError

_CHUNK = 500
SHOWN = 20
"""Of each kind of problem, so many are printed; the JSON report has them all."""
_IMAGE, _TXT, _JSON, _CLS = (FIELDS.index(name) for name in ("image", "txt", "json", "cls"))


@dataclass
class ShardReport:
    """What was found in shards.

    Attributes:
        shards: shards that can be read.
        samples: samples in them; in damaged ones up to where they are whole.
        bytes: bytes of them, likewise.
        captions: samples with a caption (`txt`, or `caption` in `json`).
        labels: samples with a class number (`cls`).
        smallest: width and height of the picture with the fewest pixels; None without any.
        largest: of the one with the most.
        sizes: number of pictures by size, as `32x32` (width and height).
        formats: number of pictures by format: JPEG, PNG, WEBP.
        bad_shards: missing, empty, cut short or otherwise unreadable, one line each.
        bad_members: members that cannot be decoded, one line each.
        duplicate_keys: keys that occur more than once, one line each.
        missing_captions: keys of samples without a caption, by shard.
    """

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    captions: int = 0
    labels: int = 0
    smallest: list[int] | None = None
    largest: list[int] | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    bad_shards: list[str] = field(default_factory=list)
    bad_members: list[str] = field(default_factory=list)
    duplicate_keys: list[str] = field(default_factory=list)
    missing_captions: dict[str, list[str]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """No bad shard, no bad member, no duplicate key. Missing captions are no fault as such."""
        return self.samples > 0 and not (self.bad_shards or self.bad_members or self.duplicate_keys)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        formats = ", ".join(f"{count} {name}" for name, count in sorted(self.formats.items())) or "none"
        lines = [
            f"shards    {self.shards} ({self.bytes / 1e6:.1f} MB)",
            f"samples   {self.samples}, {self.captions} with a caption, {self.labels} with a class number",
            f"pictures  {formats}",
        ]
        if self.smallest and self.largest:
            lines[-1] += ", {}x{} to {}x{} pixels".format(*self.smallest, *self.largest)
        lines += _listed("bad shard", self.bad_shards)
        lines += _listed("bad member", self.bad_members)
        lines += _listed("duplicate key", self.duplicate_keys)
        missing = sum(map(len, self.missing_captions.values()))
        if missing and self.captions:
            shard, keys = next(iter(self.missing_captions.items()))
            lines.append(f"without caption: {missing} samples, the first {shard}, sample {keys[0]!r}")
        return "\n".join([*lines, "ok" if self.ok else "not ok"])


def _listed(name: str, problems: list[str]) -> list[str]:
    lines = [f"{name}: {problem}" for problem in problems[:SHOWN]]
    return [*lines, f"{name}: and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else lines


@dataclass
class _Found:
    """What one shard held."""

    bad: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    uncaptioned: list[str] = field(default_factory=list)


def validate_shards(
    urls: str | Sequence[str], *, allow_pipe: bool = False, processes: int = 2, progress: bool = True
) -> ShardReport:
    """Reads shards through: every header, every picture, every caption. Goes on after what is bad.

    Args:
        urls: paths or URLs, with braces and, for local ones, wildcards.
        allow_pipe: accept `pipe:COMMAND`.
        processes: how many decode.
        progress: show a progress bar.

    Raises:
        V2FlowError: only if no shard is named or a name cannot be understood; what is wrong with shards is reported.
    """
    report = ShardReport()
    opened: list[Shard] = []
    manifests: dict[str, dict[str, ShardIndex]] = {}
    for name in expand_shards(urls, allow_pipe):
        opened += _open(name, manifests, report)
    _count(report, opened)
    chunks = [(shard, start) for shard in opened for start in range(0, len(shard.index), _CHUNK)]
    with ProcessPoolExecutor(max(1, processes)) as pool:
        found = pool.map(_check, [shard for shard, _ in chunks], [start for _, start in chunks])
        bar = tqdm(found, "validate", len(chunks), unit="chunk", disable=not progress, delay=2.0)
        for (shard, _), result in zip(chunks, bar, strict=True):
            _add(report, shard, result)
    report.captions = report.samples - sum(map(len, report.missing_captions.values()))
    return report


def _open(name: str, manifests: dict[str, dict[str, ShardIndex]], report: ShardReport) -> list[Shard]:
    """The shard, or what can be read of it; the headers of a local one are read and not only its manifest."""
    try:
        shard = open_shard(name, manifests)
        found = shard.index if shard.remote else index_tar(name)
    except V2FlowError as error:
        report.bad_shards.append(str(error))
        return _salvage(name)
    expected = shard.index
    if len(found) != len(expected):
        report.bad_shards.append(
            f"{name}: {len(found)} samples, but the manifest says {len(expected)} samples"
        )
    elif not (np.array_equal(found.keys, expected.keys) and np.array_equal(found.members, expected.members)):
        report.bad_shards.append(f"{name}: keys or places of its members are not those of the manifest")
    return [replace(shard, index=found)]


def _salvage(name: str) -> list[Shard]:
    """What can be read of a damaged local shard, so that all its problems are reported and not only the first."""
    path = Path(name)
    if not path.is_file():
        return []
    size = path.stat().st_size
    keys: list[str] = []
    members: list[dict[str, tuple[int, int]]] = []
    for member in _whole_members(path, size):
        key, extension = base_plus_ext(member.name)
        if key is None or not _is_key(key):
            continue
        if not keys or key != keys[-1]:
            keys.append(key)
            members.append({})
        extension = extension.lower()
        kind = "image" if extension in IMAGE_EXTENSIONS else extension
        if kind in FIELDS:
            members[-1].setdefault(kind, (member.offset_data, member.size))
    if keys and "image" not in members[-1]:  # the cut went through this sample
        keys.pop()
        members.pop()
    return [Shard(name, make_index(size, keys, members), "", False)] if keys else []


def _is_key(key: str) -> bool:
    try:
        check_key(key, "")
    except V2FlowError:
        return False
    return True


def _whole_members(path: Path, size: int) -> Iterator[tarfile.TarInfo]:
    """Files in a tar up to where it is damaged."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in plain_files(archive, str(path)):
                if member.offset_data + member.size > size:
                    return
                yield member
    except (*TAR_ERRORS, OSError):
        return


def _count(report: ShardReport, shards: list[Shard]) -> None:
    report.shards = len(shards)
    first: dict[tuple[str, str], str] = {}
    for shard in shards:
        report.samples += len(shard.index)
        report.bytes += shard.index.size
        report.labels += len(shard.index) - int(shard.index.missing("cls").sum())
        for row in range(len(shard.index)):
            place = (shard.folder, shard.index.key(row))
            if place in first:
                report.duplicate_keys.append(f"{shard.name}: {place[1]!r} is also in {first[place]}")
            first.setdefault(place, shard.name)


def _check(shard: Shard, start: int) -> _Found:
    """Decodes the samples start … start + _CHUNK - 1 of a shard."""
    found, shards = _Found(), ShardSet([shard])
    for sample in range(start, min(start + _CHUNK, len(shards))):
        for check in (_check_picture, _check_texts):
            try:
                check(shards, sample, found)
            except BadSampleError as error:
                found.bad.append(f"{shards.where(sample)}: {error}")
            except V2FlowError as error:
                found.bad.append(str(error))
    return found


def _check_picture(shards: ShardSet, sample: int, found: _Found) -> None:
    data = shards.read(sample, _IMAGE)
    if data is None:
        raise BadSampleError("no member jpg, jpeg, png or webp (does its file name have a second dot?)")
    picture = decode_image(data)
    found.sizes.append(picture.size)
    found.formats[_format(data)] += 1


def _check_texts(shards: ShardSet, sample: int, found: _Found) -> None:
    label = shards.read(sample, _CLS)
    if label is not None and not label.strip().lstrip(b"-").isdigit():
        raise BadSampleError(f"cls: expected a class number, found {label[:20]!r}")
    if not decode_caption(shards.read(sample, _TXT), shards.read(sample, _JSON)):
        found.uncaptioned.append(shards.key(sample))


def _format(data: bytes) -> str:
    return "JPEG" if data[:2] == b"\xff\xd8" else "PNG" if data[:4] == b"\x89PNG" else "WEBP"


def _add(report: ShardReport, shard: Shard, found: _Found) -> None:
    report.bad_members += found.bad
    for name, count in found.formats.items():
        report.formats[name] = report.formats.get(name, 0) + count
    for size in found.sizes:
        name = "{}x{}".format(*size)
        report.sizes[name] = report.sizes.get(name, 0) + 1
        if report.smallest is None or size[0] * size[1] < report.smallest[0] * report.smallest[1]:
            report.smallest = list(size)
        if report.largest is None or size[0] * size[1] > report.largest[0] * report.largest[1]:
            report.largest = list(size)
    if found.uncaptioned:
        report.missing_captions.setdefault(shard.name, []).extend(found.uncaptioned)
