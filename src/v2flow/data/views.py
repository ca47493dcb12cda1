"""Views of a training picture: itself, then moved a little and mirrored, so that few pictures are not soon worn out.

The ids of a picture that is moved by a few pixels are other ids: what stays the same is what it shows.
"""

import random
import re

import torch.nn.functional as F
from torch import Tensor

from v2flow.errors import V2FlowError

SHIFT = 1 / 16
"""Largest shift along an axis, of the side of a picture."""
_SIDED = re.compile(
    r"\b(left|right|clock|letter|number|word|text|sign|button|keycap|flag|symbol)", re.IGNORECASE
)
"""In captions of pictures that a mirror would make wrong: they have sides or writing."""


def view_of(picture: Tensor, caption: str, key: str, view: int) -> Tensor:
    """View `view` of a picture; a pure function of its arguments, other at each `view` of a `key`.

    View 0 is the picture itself. The others are moved by up to SHIFT along each axis, the edge repeated where nothing
    was, and half of them mirrored, unless the caption speaks of sides or writing.

    Args:
        picture: `[C, S, S]`.

    Raises:
        V2FlowError: more views than there are shifts.
    """
    if view == 0:
        return picture
    reach = int(SHIFT * picture.shape[-1])
    check_views(view + 1, picture.shape[-1])
    moves = range(-reach, reach + 1)
    mirrors = (False,) if _SIDED.search(caption) else (False, True)
    choices = [
        (mirror, x, y) for mirror in mirrors for x in moves for y in moves if (mirror, x, y) != (False, 0, 0)
    ]
    rng = random.Random(key)
    # Only `random()` is drawn from: Python promises its sequence for a seed.
    mirror, x, y = sorted(choices, key=lambda _: rng.random())[view - 1]
    return shifted(picture.flip(-1) if mirror else picture, x, y)


def shifted(picture: Tensor, x: int, y: int) -> Tensor:
    """A picture `[C, S, S]` moved right by `x` and down by `y` pixels, its edges repeated where nothing was."""
    side = picture.shape[-1]
    reach = max(abs(x), abs(y))
    padded = F.pad(picture[None], (reach,) * 4, mode="replicate")[0]
    return padded[:, reach - y : reach - y + side, reach - x : reach - x + side]


def check_views(views: int, side: int) -> None:
    """Refuse a number of views that pictures of this side do not have.

    Raises:
        V2FlowError: it is out of range.
    """
    most = (2 * int(SHIFT * side) + 1) ** 2
    if not 1 <= views <= most:
        raise V2FlowError(
            f"option views: expected 1 to {most} (the shifts of pictures of {side} pixels), found {views}"
        )
