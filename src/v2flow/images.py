"""Reading and writing pictures, and grids of them."""

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from v2flow.data.decode import FILE_FORMATS, BadSampleError, decode_image
from v2flow.errors import V2FlowError
from v2flow.metrics.files import write_atomically
from v2flow.metrics.reconstruction import to_uint8

GRID_PICTURE = 64
"""Smaller pictures are enlarged in a grid, by a whole factor, to at least this height."""
GRID_MARGIN = 2
GRID_PICTURES, GRID_COLUMNS = 64, 8
"""Of a grid of generated pictures: at most so many, so many in a line."""


def read_picture(path: str | Path) -> Image.Image:
    """A picture file in mode RGB, decoded as training pictures are, also of the other formats of `FILE_FORMATS`.

    Raises:
        V2FlowError: the file is missing or is no picture that can be decoded.
    """
    try:
        return decode_image(Path(path).read_bytes(), FILE_FORMATS)
    except FileNotFoundError as error:
        raise V2FlowError(f"{path}: no such picture file") from error
    except BadSampleError as error:
        raise V2FlowError(f"{path}: expected a picture, found something else: {error}") from error


def load_image(path: str | Path) -> Tensor:
    """A picture file as fp32 [3, H, W] in [0, 1]; see :func:`read_picture`."""
    return torch.from_numpy(np.array(read_picture(path))).permute(2, 0, 1).float() / 255.0


def save_image(image: Tensor, path: str | Path) -> None:
    """Writes a picture [3, H, W] in [0, 1] as an 8-bit PNG, atomically; folders are made."""
    picture = Image.fromarray(to_uint8(image).cpu().permute(1, 2, 0).contiguous().numpy())
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    write_atomically(Path(path), lambda file: file.write(buffer.getvalue()))


def save_grid(rows: list[Tensor], path: str | Path, columns: int = 16) -> None:
    """Writes rows of pictures, picture i of each row beneath that of the row before, as one PNG.

    Args:
        rows: e.g. originals and reconstructions, each [n, 3, H, W] in [0, 1], all of one shape.
        columns: after so many pictures the rows go on in a block beneath.
    """
    if not rows or len(rows[0]) == 0 or any(row.shape != rows[0].shape for row in rows):
        raise ValueError(
            f"a grid needs rows of one shape with pictures, found {[tuple(row.shape) for row in rows]}"
        )
    height = rows[0].shape[2]
    factor = -(-GRID_PICTURE // height) if height < GRID_PICTURE else 1
    columns = min(columns, len(rows[0]))
    blocks = [
        _join(
            [_join(list(_enlarge(row[start : start + columns], factor)), columns, dim=2) for row in rows],
            len(rows),
            1,
        )
        for start in range(0, len(rows[0]), columns)
    ]
    save_image(_join(blocks, len(blocks), dim=1), path)


def _enlarge(pictures: Tensor, factor: int) -> Tensor:
    """[n, 3, H, W] to pictures `factor` times the size with a white margin."""
    pictures = pictures.float().cpu().repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return F.pad(pictures, (GRID_MARGIN,) * 4, value=1.0)


def _join(pictures: list[Tensor], count: int, dim: int) -> Tensor:
    """Joins [3, H, W] pictures, filled up to `count` with white."""
    filler = [torch.ones_like(pictures[0])] * (count - len(pictures))
    return torch.cat(pictures + filler, dim=dim)
