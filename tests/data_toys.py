"""Small shards for the data tests."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from v2flow.data.cifar10 import CLASSES, FILES, RECORD


def encode(pixels: np.ndarray | Image.Image, format: str = "PNG", **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def numbered_picture(number: int, size: int = 8) -> bytes:
    """A picture whose colour tells its number."""
    return encode(np.full((size, size, 3), (number % 256, number // 256, 7), np.uint8))


def number_of(image: Any) -> int:
    """The number of a decoded fp32 picture [3, S, S]."""
    red, green = (image[:2, 0, 0] * 255).round().int().tolist()
    return red + 256 * green


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def numbered_shards(folder: Path, sizes: Iterable[int], extra: Mapping[int, bytes] | None = None) -> str:
    """Shards `s-000000.tar` … of numbered pictures with captions; `extra` replaces single pictures. Gives a glob."""
    number = 0
    for shard, size in enumerate(sizes):
        members = []
        for _ in range(size):
            picture = (extra or {}).get(number, numbered_picture(number))
            members.append((f"{number:06d}.png", picture))
            members.append((f"{number:06d}.txt", f"number {number}".encode()))
            number += 1
        write_tar(folder / f"s-{shard:06d}.tar", members)
    return str(folder / "s-*.tar")


def cifar10_records(each: int) -> dict[str, np.ndarray]:
    """Rows of the files in CIFAR-10's archive, so many in each: a class and a picture of noise."""
    made = np.random.default_rng(3)
    files = {name: made.integers(0, 256, (each, RECORD), dtype=np.uint8) for name in FILES}
    for rows in files.values():
        rows[:, 0] %= len(CLASSES)
    return files


def write_cifar10(path: Path, files: dict[str, bytes]) -> Path:
    """An archive as CIFAR-10's authors lay it out."""
    with tarfile.open(path, "w:gz") as archive:
        for name, data in {"batches.meta.txt": "\n".join(CLASSES).encode(), **files}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path
