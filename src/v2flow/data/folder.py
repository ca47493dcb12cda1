"""Shards from any folder of pictures, with captions beside the pictures or in a table."""

import csv
import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from v2flow.data.decode import FORMATS, BadSampleError, decode_image
from v2flow.data.writer import SAMPLES_PER_SHARD, ShardWriter, already_built, counts_of, new_shards, split_of
from v2flow.errors import V2FlowError

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats whose files go into shards as they are, and the members' extensions."""
CONVERTED = ("BMP", "GIF", "TIFF")
"""Formats whose first picture goes into shards as PNG."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass
class FolderReport:
    """What became of a folder of pictures.

    Attributes:
        samples: split -> samples.
        captions: samples with a caption; None if the shards were there already.
        bad: file, relative to the folder -> why it was skipped.
    """

    samples: dict[str, int] = field(default_factory=dict)
    captions: int | None = 0
    bad: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """Lines of text."""
        counts = ", ".join(f"{count} {split}" for split, count in self.samples.items())
        if self.captions is None:
            return f"{counts}: complete already, nothing to do"
        skipped = [f"skipped {file}: {reason}" for file, reason in self.bad.items()]
        return "\n".join([*skipped, f"{counts}; {self.captions} with caption, {len(self.bad)} bad pictures skipped"])


def key_of(file: str) -> str:
    """The key of a file: its path in the folder without the last extension; dots and slashes become `_`.

    >>> key_of("cats/img.v2.001.jpg")
    'cats_img_v2_001'
    """
    return os.path.splitext(file)[0].replace("/", "_").replace(".", "_")


def build_folder(
    source: Path,
    out: Path,
    captions: Path | None = None,
    val: float = 0.05,
    test: float = 0.05,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    max_bad: int = 100,
    progress: bool = True,
) -> FolderReport:
    """Builds `{train,val,test}-*.tar` and their manifest from the pictures of a folder and its subfolders.

    JPEG, PNG and WebP files are stored as they are, BMP, GIF and TIFF as PNG. Hidden files are left out. A folder
    that holds the same build already is left as it is.

    Args:
        source: the pictures; without `captions`, NAME.txt beside a picture is its caption.
        out: a folder that does not exist, is empty, or holds this build.
        captions: CSV file with the columns `file` (path in `source`) and `caption`; exactly its files are taken.
        val, test: expected fractions of the splits, decided by the hash of the key.
        samples_per_shard: most samples in a shard.
        max_bad: undecodable pictures to skip before it is an error.
        progress: show a bar.

    Raises:
        V2FlowError: no picture, two files of one key, a table that names a missing file, too many bad pictures,
            a fraction out of range, or an `out` that holds something else.
    """
    if val < 0 or test < 0 or val + test > 1:
        raise V2FlowError(f"options val and test: expected fractions that add up to at most 1, found {val} and {test}")
    if not source.is_dir():
        raise V2FlowError(f"{source}: no such folder; expected a folder of pictures")
    texts = None if captions is None else _read_table(captions, source)
    files = _list_pictures(source) if texts is None else list(texts)
    if not files:
        raise V2FlowError(f"{source}: no pictures; expected files {', '.join(SUFFIXES)}")
    keys = _unique_keys(files, source)
    recipe: dict[str, Any] = {"data": "folder", "version": 1, "source_sha256": _fingerprint(source, files, texts)}
    recipe |= {"val": val, "test": test, "samples_per_shard": samples_per_shard}
    built = already_built(out, recipe)
    if built is not None:
        return FolderReport(counts_of(built), None)
    report = FolderReport()
    # Mixed once, so that any first n pictures of a split are a fair sample of it.
    order = sorted(files, key=lambda file: hashlib.sha256(keys[file].encode()).digest())
    with new_shards(out, recipe, samples_per_shard) as writer:
        for file in tqdm(order, "folder", unit="pic", disable=not progress):
            split = split_of(keys[file], val, test)
            try:
                _add(writer, split, keys[file], source / file, None if texts is None else texts[file], report)
            except BadSampleError as error:
                _skip(report, source, file, str(error), max_bad)
        if not writer.counts:
            raise V2FlowError(f"{source}: none of its {len(files)} pictures can be decoded; the first: {_first(report)}")
    report.samples = counts_of(writer.indexes)
    return report


def _add(
    writer: ShardWriter, split: str, key: str, path: Path, caption: str | None, report: FolderReport
) -> None:
    try:
        data = path.read_bytes()
        beside = path.with_suffix(".txt")
        if caption is None and beside.is_file():
            caption = beside.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError(f"its caption {beside.name} is not UTF-8") from error
    except OSError as error:
        raise BadSampleError(f"cannot be read ({error.strerror})") from error
    extension, data = _encoded(data)
    members = {extension: data}
    if caption is not None and caption.strip():
        members["txt"] = caption.strip().encode()
        report.captions = (report.captions or 0) + 1
    writer.write(split, key, members)


def _encoded(data: bytes) -> tuple[str, bytes]:
    """Extension and bytes to store; the picture is decoded to its end to see that it can be."""
    picture = decode_image(data, (*FORMATS, *CONVERTED))
    with Image.open(io.BytesIO(data)) as image:
        extension = EXTENSIONS.get(image.format or "")
    if extension is not None:
        return extension, data
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "png", buffer.getvalue()


def _skip(report: FolderReport, source: Path, file: str, reason: str, max_bad: int) -> None:
    report.bad[file] = reason
    if len(report.bad) > max_bad:
        raise V2FlowError(
            f"{source / file}: {reason}; {len(report.bad)} bad pictures, more than max_bad={max_bad}: remove them or "
            "raise the limit"
        )


def _first(report: FolderReport) -> str:
    file, reason = next(iter(report.bad.items()))
    return f"{file}: {reason}"


def _list_pictures(source: Path) -> list[str]:
    """Paths of the pictures relative to the folder, with `/`, sorted."""
    found = []
    for folder, subfolders, names in os.walk(source):
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__MACOSX"))]
        found += [
            (Path(folder) / name).relative_to(source).as_posix()
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found)


def _unique_keys(files: list[str], source: Path) -> dict[str, str]:
    """File -> key."""
    owners: dict[str, str] = {}
    for file in files:
        key = key_of(file)
        if key in owners:
            raise V2FlowError(f"{source}: {owners[key]} and {file} both have the key {key!r}; rename one of them")
        try:
            key.encode()
        except UnicodeEncodeError as error:
            raise V2FlowError(f"{source}: the file name {file!r} is not UTF-8; rename it") from error
        owners[key] = file
    return {file: key for key, file in owners.items()}


def _read_table(table: Path, source: Path) -> dict[str, str]:
    """File -> caption of a CSV file."""
    texts: dict[str, str] = {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            if not {"file", "caption"} <= set(reader.fieldnames or ()):
                found = ", ".join(reader.fieldnames or ()) or "nothing"
                raise V2FlowError(f"{table}: expected the columns file and caption in its first line, found {found}")
            for row in reader:
                file = os.path.normpath(row["file"] or "").replace(os.sep, "/")
                place = f"{table}, line {reader.line_num}"
                _check_row(file, source, place, texts)
                texts[file] = row["caption"] or ""
    except FileNotFoundError as error:
        raise V2FlowError(f"{table}: no such file; expected a CSV file with the columns file and caption") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise V2FlowError(f"{table}: not a CSV file in UTF-8 ({str(error).splitlines()[0]})") from error
    return texts


def _check_row(file: str, source: Path, place: str, texts: Mapping[str, str]) -> None:
    if file.startswith(("../", "/")):
        raise V2FlowError(f"{place}: {file!r} is not inside {source}; expected a path relative to it")
    if file in texts:
        raise V2FlowError(f"{place}: {file!r} is named twice; remove one of the lines")
    if not (source / file).is_file():
        raise V2FlowError(f"{place}: no file {file!r} in {source}; correct or remove the line")


def _fingerprint(source: Path, files: list[str], texts: Mapping[str, str] | None) -> str:
    """Changes when a picture or caption does, by name, size and time."""
    digest = hashlib.sha256()
    for file in files:
        path = source / file
        if texts is not None:
            digest.update(f"{file}\0{texts[file]}\0".encode())
        for part in (path, path.with_suffix(".txt")) if texts is None else (path,):
            status = part.stat() if part.is_file() else None
            digest.update(f"{part.name} {status and (status.st_size, status.st_mtime_ns)}\n".encode())
    return digest.hexdigest()
