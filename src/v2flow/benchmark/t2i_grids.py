"""The same captions drawn by every text-to-image row, small enough to stand inside a page."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v2flow.benchmark.grids import MAX_BYTES, Picture, data_uri, encode, shown_runs, shrink
from v2flow.benchmark.t2i_figures import findings
from v2flow.images import GRID_COLUMNS, GRID_MARGIN, read_picture

PICTURES = 12
"""Shown of each row."""
QUALITIES = (None, 90, 70, 50)
"""WebP qualities (None: lossless), tried in turn until the page is small enough."""


@dataclass(frozen=True)
class Drawn:
    """Captions, and their pictures by row.

    Attributes:
        captions: texts.
        rows: row name -> data URI of each caption's picture.
    """

    captions: list[str]
    rows: dict[str, list[str]]


def drawn_captions(results: Mapping[str, Any], folder: Path) -> list[Drawn]:
    """The first captions with the pictures of every row, of its first seed whose grid file is there.

    Rows that were asked for other captions stand apart.

    Args:
        folder: what the paths of the grids are relative to.

    Raises:
        V2FlowError: a grid file that is no picture.
    """
    groups: dict[tuple[str, ...], dict[str, list[Picture]]] = {}
    for name, run in shown_runs(results, folder).items():
        path = folder / run["grid"]
        if not findings(run) or not path.with_suffix(".txt").is_file():
            continue
        captions = path.with_suffix(".txt").read_text().splitlines()
        pictures = [shrink(p) for p in cut_drawings(read_picture(path), len(captions))[:PICTURES]]
        groups.setdefault(tuple(captions[:PICTURES]), {})[name] = pictures
    found: list[Drawn] = []
    for quality in QUALITIES:
        found = [
            Drawn(
                list(captions),
                {name: [data_uri(encode([p], quality)) for p in ps] for name, ps in rows.items()},
            )
            for captions, rows in groups.items()
        ]
        if sum(len(uri) for drawn in found for uris in drawn.rows.values() for uri in uris) <= MAX_BYTES:
            break
    return found


def cut_drawings(image: Picture, count: int) -> list[Picture]:
    """The pictures of a grid file with `count` captions, in their order, without their margin."""
    columns = min(GRID_COLUMNS, count)
    width, height = image.width // columns, image.height // -(-count // columns)
    places = [(index % columns * width, index // columns * height) for index in range(count)]
    margin = GRID_MARGIN
    return [
        image.crop((left + margin, top + margin, left + width - margin, top + height - margin))
        for left, top in places
    ]
