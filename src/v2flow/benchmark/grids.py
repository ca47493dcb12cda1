"""The same pictures through every tokenizer, small enough to stand inside a page."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from v2flow.benchmark.spread import Run, modes_of, runs_by_name
from v2flow.benchmark.t2i_figures import findings
from v2flow.images import GRID_MARGIN, GRID_PICTURE, read_picture

MAX_BYTES = 300_000
"""All strips of a page together."""
MAX_HEIGHT = 128
"""Larger pictures are shown at this height."""
ATTEMPTS = ((16, None), (12, None), (8, None), (16, 95), (16, 85), (8, 85), (8, 70), (4, 70), (4, 50))
"""Pictures a strip and WebP quality (None: lossless), tried in turn until the page is small enough."""

Picture = Image.Image


@dataclass(frozen=True)
class Strip:
    """Pictures side by side.

    Attributes:
        label: the row and decode mode they went through, or the originals.
        source: data URI.
    """

    label: str
    source: str


def picture_strips(results: Mapping[str, Any], folder: Path) -> tuple[list[Strip], str]:
    """The originals once, then a strip for each row and decode mode, and a sentence on how they are shown.

    Of a row the first seed is taken whose grid file is there; a row without one is left out. Originals that differ
    from those before, such as another size, are shown again.

    Args:
        folder: what the paths of the grids are relative to.

    Raises:
        V2FlowError: a grid file that is no picture.
    """
    labelled: list[tuple[str, list[Picture]]] = []
    originals: list[bytes] = []
    for name, run in shown_runs(results, folder).items():
        if findings(run):
            continue
        original, *decoded = cut_grid(read_picture(folder / run["grid"]), run)
        content = [picture.tobytes() for picture in original]
        if content != originals:
            labelled.append(("originals", original))
            originals = content
        labelled += [(f"{name}, {mode}", s) for mode, s in zip(modes_of(run), decoded, strict=True)]
    if not labelled:
        return [], ""
    labelled = [(label, [shrink(picture) for picture in pictures]) for label, pictures in labelled]
    for columns, quality in ATTEMPTS:
        pixels = sum(p.width * p.height for _, pictures in labelled for p in pictures[:columns])
        if quality is None and pixels > 4 * MAX_BYTES:
            continue  # would hardly fit, and to find out is slow
        encoded = [(label, encode(pictures[:columns], quality)) for label, pictures in labelled]
        if sum(len(data) for _, data in encoded) <= MAX_BYTES:
            break
    how = "without loss" if quality is None else f"as WebP of quality {quality}"
    strips = [Strip(label, data_uri(data)) for label, data in encoded]
    return strips, f"The first pictures of the evaluation set, {how}; one seed of each row."


def shown_runs(results: Mapping[str, Any], folder: Path) -> dict[str, Run]:
    """Row name -> its first seed whose grid file is there."""
    rows = {
        name: next((run for run in runs if run.get("grid") and (folder / run["grid"]).is_file()), None)
        for name, runs in runs_by_name(results).items()
    }
    return {name: run for name, run in rows.items() if run is not None}


def cut_grid(image: Picture, run: Run) -> list[list[Picture]]:
    """The strips of a grid file, originals first and then the run's decode modes, as pictures of their own size.

    Undoes the margin and the enlargement of :func:`v2flow.images.save_grid`, as far as the protocol gives the size of
    the pictures; otherwise, or if the file does not divide so, each strip stays one picture.
    """
    count = 1 + len(modes_of(run))
    height = image.height // count
    protocol = run.get("protocol") or {}
    size = protocol.get("width", 0), protocol.get("height", 0)
    strips = [image.crop((0, height * i, image.width, height * (i + 1))) for i in range(count)]
    if not all(size):
        return [[strip] for strip in strips]
    factor = -(-GRID_PICTURE // size[1]) if size[1] < GRID_PICTURE else 1
    cell = [side * factor + 2 * GRID_MARGIN for side in size]
    if image.width % cell[0] or height != cell[1] or image.height % count:
        return [[strip] for strip in strips]
    return [
        [_picture(strip, column, cell[0], size) for column in range(image.width // cell[0])]
        for strip in strips
    ]


def _picture(strip: Picture, column: int, width: int, size: tuple[int, int]) -> Picture:
    left, right = column * width + GRID_MARGIN, (column + 1) * width - GRID_MARGIN
    cut = strip.crop((left, GRID_MARGIN, right, strip.height - GRID_MARGIN))
    return cut.resize(size, Image.Resampling.NEAREST)


def shrink(picture: Picture) -> Picture:
    """The picture, at most :data:`MAX_HEIGHT` pixels high."""
    if picture.height <= MAX_HEIGHT:
        return picture
    return picture.resize(
        (max(picture.width * MAX_HEIGHT // picture.height, 1), MAX_HEIGHT), Image.Resampling.LANCZOS
    )


def data_uri(data: bytes) -> str:
    """A WebP file as text that stands inside a page."""
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"


def encode(pictures: list[Picture], quality: int | None) -> bytes:
    """Pictures of one height side by side as a WebP file; without loss if `quality` is None."""
    width, height = sum(p.width for p in pictures), pictures[0].height
    strip = Image.new("RGB", (width, height))
    left = 0
    for picture in pictures:
        strip.paste(picture, (left, 0))
        left += picture.width
    buffer = io.BytesIO()
    # Without loss, quality is how hard the encoder tries.
    strip.save(buffer, "WEBP", lossless=quality is None, quality=quality or 75, method=4)
    return buffer.getvalue()
