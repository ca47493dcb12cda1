"""Shards of CIFAR-10 from its own archive: captioned pictures in an order that is shuffled once."""

import gzip
import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from v2flow.data.manifest import TAR_ERRORS
from v2flow.data.writer import Sample, finished_build, write_shards
from v2flow.errors import V2FlowError, first_line

ARCHIVE = "cifar-10-binary.tar.gz"
"""The version without pickles; https://www.cs.toronto.edu/~kriz/cifar.html says how it is laid out."""
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FILES = {f"data_batch_{number}.bin": "train" for number in range(1, 6)} | {"test_batch.bin": "test"}
SIDE = 32
RECORD = 1 + 3 * SIDE * SIDE
"""Bytes of a picture: its class, then all red values row by row, all green, all blue."""
MOST = 10_000
"""Pictures in a file."""
SAMPLES_PER_SHARD = 5_000


def build_cifar10(archive: str | Path, out: str | Path, *, progress: bool = True) -> dict[str, int]:
    """Builds `train-{000000..000009}.tar` and `test-{000000..000001}.tar`, with a manifest.

    Pictures are PNG, without loss; a caption is `a photo of a CLASS`. CIFAR-10 has no validation split: the experiments
    take the last shard of the training pictures for one.

    Args:
        archive: `cifar-10-binary.tar.gz` as its authors offer it.
        out: folder of the shards.
        progress: show a progress bar.

    Returns:
        Samples by split.

    Raises:
        V2FlowError: no such archive, another one, a damaged one, or other shards in `out`.
    """
    archive, out = Path(archive), Path(out)
    records = _read(archive)
    digest = hashlib.sha256()
    for name in sorted(records):
        digest.update(records[name].tobytes())
    build: dict[str, Any] = {"kind": "cifar10", "pictures": digest.hexdigest()}
    finished = finished_build(out, build)
    if finished is not None:
        return finished
    return write_shards(out, _samples(records, progress), build, SAMPLES_PER_SHARD)


def _read(path: Path) -> dict[str, np.ndarray]:
    """The pictures of each file of the archive, `[N, RECORD]` uint8."""
    records: dict[str, np.ndarray] = {}
    try:
        with gzip.open(path) as whole, tarfile.open(fileobj=whole, mode="r:") as archive:
            for member in archive:
                name = Path(member.name).name
                file = archive.extractfile(member) if name in FILES else None
                if file is not None:
                    records[name] = _parse(file.read(MOST * RECORD + 1), f"{path}: {name}")
            while whole.read(2**20):  # to its end, where the checksum is
                pass
    except FileNotFoundError as error:
        raise V2FlowError(f"{path}: no such archive; CIFAR-10's authors offer it as {ARCHIVE}") from error
    except (*TAR_ERRORS, zlib.error, OSError) as error:
        raise V2FlowError(
            f"{path}: expected {ARCHIVE}, found no whole archive ({first_line(error)}); load it again"
        ) from error
    missing = sorted(FILES.keys() - records.keys())
    if missing:
        raise V2FlowError(f"{path}: expected {ARCHIVE}, found no file {missing[0]} in it")
    return records


def _parse(data: bytes, where: str) -> np.ndarray:
    if not data or len(data) % RECORD or len(data) > MOST * RECORD:
        raise V2FlowError(
            f"{where}: expected 1 to {MOST:,} pictures of {RECORD} bytes, found {len(data):,} bytes; "
            "load the archive again"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
    if records[:, 0].max() >= len(CLASSES):
        raise V2FlowError(f"{where}: expected classes 0 to 9, found {records[:, 0].max()}")
    return records


def _samples(records: dict[str, np.ndarray], progress: bool) -> Iterator[Sample]:
    with tqdm(
        desc="write pictures",
        total=sum(map(len, records.values())),
        unit="picture",
        disable=not progress,
        delay=2.0,
    ) as bar:
        for split in ("train", "test"):
            rows = np.concatenate([records[name] for name in sorted(records) if FILES[name] == split])
            for place, source in enumerate(np.random.default_rng(0).permutation(len(rows))):
                row = rows[source]
                picture = Image.fromarray(row[1:].reshape(3, SIDE, SIDE).transpose(1, 2, 0))
                buffer = io.BytesIO()
                picture.save(buffer, "PNG")
                members = {"png": buffer.getvalue(), "txt": _caption(CLASSES[row[0]]).encode()}
                yield Sample(split, f"{split}_{place:06d}", members)
                bar.update()


def _caption(name: str) -> str:
    return f"a photo of {'an' if name.startswith('a') else 'a'} {name}"
