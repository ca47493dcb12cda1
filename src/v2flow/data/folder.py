"""Shards of your own pictures: any folder of images, with captions from text files or a CSV, or without."""

import csv
import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from v2flow.data.decode import FILE_FORMATS, BadSampleError, decode_image
from v2flow.data.writer import Sample, finished_build, write_shards
from v2flow.errors import V2FlowError

COPIED = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
"""Written as they are; pictures of the other formats become PNG."""
CONVERTED = (".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2")


@dataclass
class FolderReport:
    """What was built.

    Attributes:
        samples: by split.
        captions: samples that have one.
        bad: reason for each picture that was left out, by file.
    """

    samples: dict[str, int] = field(default_factory=dict)
    captions: int = 0
    bad: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {split}" for split, count in self.samples.items())
        lines = [f"{sum(self.samples.values())} samples ({counts}), {self.captions} with a caption"]
        lines += [f"left out: {file}: {reason}" for file, reason in self.bad.items()]
        return "\n".join(lines)


def build_folder(
    source: str | Path,
    out: str | Path,
    *,
    captions: str | Path | None = None,
    val_fraction: float = 0.05,
    test_fraction: float = 0.05,
    split_by: Literal["key", "folder"] = "key",
    samples_per_shard: int = 1000,
    processes: int = 2,
    max_bad: int | None = None,
    progress: bool = True,
) -> FolderReport:
    """Builds `train-*.tar`, `val-*.tar` and `test-*.tar` from a folder of pictures, with a manifest.

    A key is the path within the folder without its extension, dots replaced by `_`. Links that lead out of the folder
    are not followed: a folder made by somebody else must not bring files of yours into the shards. JPEG, PNG and WebP
    are copied byte for byte; BMP, GIF, TIFF, PPM and JPEG 2000 become PNG. Each picture is decoded once, and those
    that cannot be are left out and reported.

    Args:
        source: the folder; subfolders are searched, hidden files are not.
        out: folder of the shards, outside of `source` or without pictures in it.
        captions: a CSV file with the columns `file` (relative to `source`) and `caption`; None takes the caption of
            `a/b.jpg` from `a/b.txt` where there is one.
        val_fraction, test_fraction: shares of the pictures, in [0, 1); 0 for no such split.
        split_by: what stays together in a split: a picture (`key`) or a folder's pictures (`folder`). The split is
            decided by a hash, so that adding pictures moves no other picture to another split.
        samples_per_shard: most samples in a shard.
        processes: how many decode.
        max_bad: more bad pictures than this are an error; None for no limit.
        progress: show a progress bar.

    Raises:
        V2FlowError: no pictures, two pictures of one key, a bad CSV, too many bad pictures, or other shards in `out`.
    """
    source, out = Path(source), Path(out)
    _check_options(source, val_fraction, test_fraction, samples_per_shard)
    files = _find_pictures(source, out)
    texts = _read_csv(Path(captions), source, files) if captions is not None else None
    splits = _assign_splits(files, source, val_fraction, test_fraction, split_by)
    build: dict[str, Any] = {"kind": "folder", "val_fraction": val_fraction, "test_fraction": test_fraction}
    build |= {
        "split_by": split_by,
        "samples_per_shard": samples_per_shard,
        "pictures": _digest(files, source, texts),
    }
    report = FolderReport()
    finished = finished_build(out, build)
    if finished is not None:
        report.samples = finished
        report.captions = sum(_caption(path, source, texts) is not None for path in files.values())
        return report
    samples = _samples(files, source, texts, splits, processes, max_bad, report, progress)
    report.samples = write_shards(out, samples, build, samples_per_shard)
    return report


def _check_options(source: Path, val_fraction: float, test_fraction: float, samples_per_shard: int) -> None:
    if not source.is_dir():
        raise V2FlowError(f"{source}: no such folder of pictures")
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise V2FlowError(
            "options val_fraction and test_fraction: expected at least 0 and less than 1 together, found "
            f"{val_fraction} and {test_fraction}"
        )
    if samples_per_shard < 1:
        raise V2FlowError(f"option samples_per_shard: expected at least 1, found {samples_per_shard}")


def _find_pictures(source: Path, out: Path) -> dict[str, Path]:
    """Key -> file, ordered by the hash of the key, so that the first samples are no special ones."""
    files: dict[str, Path] = {}
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        if any(part.startswith(".") for part in relative.parts) or out in path.parents:
            continue
        if path.suffix.lower() not in (*COPIED, *CONVERTED) or not path.is_file():
            continue
        key = relative.with_suffix("").as_posix().replace(".", "_")
        if key in files:
            raise V2FlowError(f"{path}: has the key {key!r}, as {files[key]} has; rename one of them")
        files[key] = path
    if not files:
        raise V2FlowError(f"{source}: no pictures found; expected files {', '.join((*COPIED, *CONVERTED))}")
    return dict(sorted(files.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest()))


def _read_csv(path: Path, source: Path, files: dict[str, Path]) -> dict[Path, str]:
    """File -> caption."""
    known, captions = set(files.values()), {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"file", "caption"} <= set(rows.fieldnames or ()):
                found = ", ".join(rows.fieldnames or ()) or "nothing"
                raise V2FlowError(
                    f"{path}: expected the columns file and caption in the first line, found {found}"
                )
            for row in rows:
                picture = source / (row["file"] or "")
                if picture not in known:
                    raise V2FlowError(f"{path}, line {rows.line_num}: no picture {picture}")
                if picture in captions:
                    raise V2FlowError(f"{path}, line {rows.line_num}: a second caption for {picture}")
                captions[picture] = (row["caption"] or "").strip()
    except FileNotFoundError as error:
        raise V2FlowError(f"{path}: no such CSV file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise V2FlowError(f"{path}: not a CSV file in UTF-8 ({error})") from error
    return captions


def _leads_out(path: Path, source: Path) -> bool:
    return path.is_symlink() and not path.resolve().is_relative_to(source.resolve())


def _caption(path: Path, source: Path, texts: dict[Path, str] | None) -> str | None:
    if texts is not None:
        return texts.get(path) or None
    beside = path.with_suffix(".txt")
    if _leads_out(beside, source):
        raise V2FlowError(f"{beside}: expected a caption, found a link out of {source}; copy the file there")
    try:
        return beside.read_text(encoding="utf-8-sig").strip() or None if beside.is_file() else None
    except UnicodeDecodeError as error:
        raise V2FlowError(f"{beside}: expected a caption in UTF-8, found other bytes") from error


def _share(group: str) -> float:
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64


def _assign_splits(
    files: dict[str, Path], source: Path, val_fraction: float, test_fraction: float, split_by: str
) -> dict[str, str]:
    """Key -> split, by the hash of its group. A split that would stay empty takes one group of the training split."""
    groups = {
        k: k if split_by == "key" else p.parent.relative_to(source).as_posix() for k, p in files.items()
    }
    split_of: dict[str, str] = {}
    for group in set(groups.values()):
        share = _share(group)
        test = share >= 1 - test_fraction
        split_of[group] = "test" if test else "val" if share >= 1 - test_fraction - val_fraction else "train"
    for split, fraction in (("test", test_fraction), ("val", val_fraction)):
        training = sorted((g for g, s in split_of.items() if s == "train"), key=_share)
        if fraction > 0 and split not in split_of.values() and len(training) > 1:
            split_of[training[-1]] = split
    return {key: split_of[group] for key, group in groups.items()}


def _digest(files: dict[str, Path], source: Path, texts: dict[Path, str] | None) -> str:
    """Changes when pictures or captions are added, removed or changed."""
    digest = hashlib.sha256()
    for key, path in files.items():
        status = path.stat()
        digest.update(
            f"{key}\0{status.st_size}\0{status.st_mtime_ns}\0{_caption(path, source, texts)}\n".encode()
        )
    return digest.hexdigest()


def _encode(path: Path, source: Path) -> tuple[str, bytes] | str:
    """Extension and bytes of a picture that decodes, or what is wrong with it."""
    if _leads_out(path, source):
        return f"a link out of {source}; copy the picture there"
    try:
        data = path.read_bytes()
        extension = COPIED.get(path.suffix.lower())
        picture = decode_image(data) if extension else decode_image(data, FILE_FORMATS)
    except (BadSampleError, OSError) as error:
        return str(error)
    if extension:
        return extension, data
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "png", buffer.getvalue()


def _samples(
    files: dict[str, Path],
    source: Path,
    texts: dict[Path, str] | None,
    splits: dict[str, str],
    processes: int,
    max_bad: int | None,
    report: FolderReport,
    progress: bool,
) -> Iterator[Sample]:
    with ProcessPoolExecutor(max(1, processes)) as pool:
        encoded = pool.map(_encode, files.values(), repeat(source), chunksize=8)
        bar = tqdm(encoded, "read pictures", len(files), unit="picture", disable=not progress, delay=2.0)
        for (key, path), result in zip(files.items(), bar, strict=True):
            if isinstance(result, str):
                report.bad[str(path)] = result
                if max_bad is not None and len(report.bad) > max_bad:
                    raise V2FlowError(
                        f"{path}: {result}; that makes {len(report.bad)} bad pictures, max_bad={max_bad}"
                    )
                continue
            members = dict([result])
            caption = _caption(path, source, texts)
            if caption is not None:
                members["txt"] = caption.encode()
                report.captions += 1
            yield Sample(splits[key], key, members)
