"""Checking any shards: every picture is decoded, every problem is listed, and none of them ends the check."""

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm
from webdataset.tariterators import base_plus_ext

from v2flow.data.decode import BadSampleError, decode_image
from v2flow.data.http import fetch_text, probe, register_openers
from v2flow.data.manifest import IMAGE_EXTENSIONS, MANIFEST, ShardIndex, index_tar, read_manifest
from v2flow.data.shards import Shards, expand_shards, fetch_shard
from v2flow.errors import V2FlowError

READ_EXTENSIONS = (*IMAGE_EXTENSIONS, "txt", "json", "cls")
SHOWN = 20  # problems of a kind, and sizes, in the summary


@dataclass(frozen=True)
class Problem:
    """What is wrong where; `key` is empty if it concerns the whole shard."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}{f', sample {self.key!r}' if self.key else ''}: {self.reason}"


@dataclass
class ShardReport:
    """What shards hold.

    Attributes:
        shards: how many were named.
        samples: that could be read, good or bad.
        captions: samples with one.
        sizes: `WIDTHxHEIGHT` -> pictures.
        ignored: extension -> members that are never opened, such as pickles.
        bad: samples without picture, and pictures or captions that cannot be decoded.
        duplicates: samples of a key, or members of a name, that were there before.
        damaged: shards that are missing, empty, no tar or cut short.
        manifest: differences from the manifests beside the shards.
    """

    shards: int = 0
    samples: int = 0
    captions: int = 0
    sizes: dict[str, int] = field(default_factory=Counter)
    ignored: dict[str, int] = field(default_factory=Counter)
    bad: list[Problem] = field(default_factory=list)
    duplicates: list[Problem] = field(default_factory=list)
    damaged: list[Problem] = field(default_factory=list)
    manifest: list[Problem] = field(default_factory=list)

    @property
    def problems(self) -> list[Problem]:
        """All of them; empty if the shards are in order."""
        return [*self.damaged, *self.manifest, *self.duplicates, *self.bad]

    def to_json(self) -> str:
        """All figures and problems as a JSON object."""
        return json.dumps(asdict(self) | {"ok": not self.problems}, indent=2) + "\n"

    def summary(self) -> str:
        """The figures, and the first problems of each kind, as lines of text."""
        lines = [f"{self.shards} shards, {self.samples} samples, {self.captions} with caption"]
        sizes = sorted(self.sizes.items(), key=lambda item: (-item[1], item[0]))
        lines += [f"  {count} pictures of {size}" for size, count in sizes[:SHOWN]]
        if len(sizes) > SHOWN:
            lines.append(f"  {sum(count for _, count in sizes[SHOWN:])} pictures of {len(sizes) - SHOWN} other sizes")
        lines += [f"  {count} members .{extension} ignored" for extension, count in sorted(self.ignored.items())]
        for title in ("damaged", "manifest", "duplicates", "bad"):
            problems = getattr(self, title)
            lines += [f"{title}: {problem}" for problem in problems[:SHOWN]]
            if len(problems) > SHOWN:
                lines.append(f"{title}: {len(problems) - SHOWN} more")
        lines.append(f"{len(self.problems)} problems" if self.problems else "no problems")
        return "\n".join(lines)


def validate_shards(urls: Shards, allow_pipe: bool = False, progress: bool = False) -> ShardReport:
    """Reads shards to their end, decodes every picture and compares them with the manifests beside them.

    Args:
        urls: paths and URLs with braces, paths with wildcards.
        allow_pipe: also run `pipe:` commands.
        progress: show a bar.

    Raises:
        V2FlowError: the names match no shard at all; everything else is in the report.
    """
    names = expand_shards(urls, allow_pipe)
    report = ShardReport(shards=len(names))
    check = _Check(report)
    for name in tqdm(names, "validate", unit="shard", disable=not progress):
        check.shard(name)
    return report


class _Check:
    """The state of a check: where each key was seen, and the manifests that were read."""

    def __init__(self, report: ShardReport) -> None:
        self.report = report
        self._seen: dict[tuple[str, str], str] = {}
        self._manifests: dict[str, dict[str, ShardIndex] | None] = {}

    def shard(self, name: str) -> None:
        try:
            path = _local(name)
            size = path.stat().st_size
        except V2FlowError as error:
            self.report.damaged.append(Problem(name, "", str(error)))
            return
        except OSError as error:
            self.report.damaged.append(Problem(name, "", f"cannot be read ({error.strerror})"))
            return
        keys: list[str] = []
        whole = self._samples(path, name, size, keys)
        self._compare(path, name, size, keys, whole)

    def _samples(self, path: Path, name: str, size: int, keys: list[str]) -> bool:
        """Checks sample after sample, collects their keys, and says whether the tar was whole."""
        members: dict[str, bytes] = {}
        problem = ""
        try:
            with path.open("rb") as file:
                for key, extension, data in _members(file, size):
                    if not keys or key != keys[-1]:
                        self._sample(name, keys, members)
                        keys.append(key)
                        members = {}
                        self._note_key(name, key)
                    if extension in members:
                        self.report.duplicates.append(Problem(name, key, f"two members .{extension}"))
                    members[extension] = data
        except tarfile.TarError as error:
            problem = str(error)
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        if problem and keys and not any(extension in members for extension in IMAGE_EXTENSIONS):
            keys.pop()  # the cut went through this sample: it is not one of those that are left
        else:
            self._sample(name, keys, members)
        if problem:
            self.report.damaged.append(Problem(name, "", f"{problem}; {len(keys)} samples are readable"))
        elif not keys:
            self.report.damaged.append(Problem(name, "", "an empty tar: no sample KEY.jpg, KEY.png or KEY.webp"))
        return not problem

    def _note_key(self, name: str, key: str) -> None:
        # Shards of other folders may be other data sets.
        place = (name.rpartition("/")[0], key)
        if place in self._seen:
            also = "in this shard" if self._seen[place] == name else f"in {self._seen[place]}"
            self.report.duplicates.append(Problem(name, key, f"the key is used before {also}"))
        self._seen.setdefault(place, name)

    def _sample(self, name: str, keys: list[str], members: dict[str, bytes]) -> None:
        if not keys:
            return
        key, report = keys[-1], self.report
        report.samples += 1
        report.ignored.update(extension for extension in members if extension not in READ_EXTENSIONS)  # type: ignore[call-overload]
        image = next((members[extension] for extension in members if extension in IMAGE_EXTENSIONS), None)
        if image is None:
            found = ", ".join(f"{key}.{extension}" for extension in members)
            report.bad.append(Problem(name, key, f"no picture .jpg, .png or .webp, found {found}"))
        else:
            try:
                width, height = decode_image(image).size
                report.sizes[f"{width}x{height}"] = report.sizes.get(f"{width}x{height}", 0) + 1
            except BadSampleError as error:
                report.bad.append(Problem(name, key, f"the picture cannot be decoded ({error})"))
        self._caption(name, key, members)

    def _caption(self, name: str, key: str, members: dict[str, bytes]) -> None:
        try:
            caption = members["txt"].decode() if "txt" in members else ""
            document = json.loads(members["json"]) if "json" in members else None
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            kind = "txt is not UTF-8" if isinstance(error, UnicodeDecodeError) else "json cannot be read"
            self.report.bad.append(Problem(name, key, f"the member {key}.{kind}"))
            return
        if not caption.strip() and isinstance(document, dict) and isinstance(document.get("caption"), str):
            caption = document["caption"]
        self.report.captions += bool(caption.strip())

    def _compare(self, path: Path, name: str, size: int, keys: list[str], whole: bool) -> None:
        indexes = self._manifest(name)
        if indexes is None:
            return
        expected = indexes.get(name.rpartition("/")[2])
        problem = None
        if expected is None:
            problem = "the manifest beside it does not name this shard"
        elif len(expected) != len(keys) or expected.size != size:
            problem = f"{len(keys)} samples in {size} bytes, the manifest says {len(expected)} in {expected.size}"
        elif whole and not _same_places(path, expected):
            problem = "keys or places of members are not those of the manifest"
        if problem is not None:
            self.report.manifest.append(Problem(name, "", problem))

    def _manifest(self, name: str) -> dict[str, ShardIndex] | None:
        folder, slash, _ = name.rpartition("/")
        if name.startswith("pipe:") or "?" in name:
            return None
        if folder not in self._manifests:
            place = f"{folder}{slash}{MANIFEST}"
            self._manifests[folder] = None
            try:
                text = _read_text(place)
                if text is not None:
                    self._manifests[folder] = read_manifest(text, place)[1]
            except V2FlowError as error:
                self.report.manifest.append(Problem(place, "", str(error).removeprefix(f"{place}: ")))
        return self._manifests[folder]


def _members(file: BinaryIO, size: int) -> Iterator[tuple[str, str, bytes]]:
    """Key, extension and bytes of each member; no bytes for members that v2flow never opens.

    Raises:
        tarfile.TarError: the tar is damaged or cut; what came before is good.
    """
    if size == 0:
        raise tarfile.ReadError("an empty file")
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # else each header stays in memory
            if member.offset_data + member.size > size:
                raise tarfile.ReadError(f"cut short inside the member {member.name}")
            key, extension = base_plus_ext(member.name)
            if not member.isreg() or key is None or member.name.startswith("__"):
                continue
            wanted = extension.lower() in READ_EXTENSIONS
            data = archive.extractfile(member) if wanted else None
            yield key, extension.lower(), data.read() if data else b""
        end = archive.offset
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE).count(0) != tarfile.BLOCKSIZE:
        raise tarfile.ReadError("cut short between two members: the end of the archive is missing")


def _same_places(path: Path, expected: ShardIndex) -> bool:
    try:
        found = index_tar(path)
    except V2FlowError:
        return True  # a problem that is in the report already
    return np.array_equal(found.keys, expected.keys) and np.array_equal(found.members, expected.members)


def _local(name: str) -> Path:
    """The shard as a file of this machine."""
    if name.startswith("pipe:"):
        return fetch_shard(name, "")
    if name.startswith(("http:", "https:")):
        register_openers()
        found = probe(name)
        return fetch_shard(name, f"{found.size}-{found.version}")
    return Path(name)


def _read_text(place: str) -> str | None:
    if place.startswith(("http:", "https:")):
        return fetch_text(place)
    path = Path(place)
    return path.read_text(errors="replace") if path.is_file() else None
