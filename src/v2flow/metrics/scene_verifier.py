"""Scores pictures of scenes by GenEval's tasks (Ghosh et al. 2023, section 3) by measuring them, with no network.

A picture passes if everything its caption says is true of what is found in it. Things that the caption does not ask
for do no harm, as in GenEval, except in counting, where any further object fails. Two demands are never met by one
object. Where an attribute is not said, any value passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from v2flow.data.scenes import COLOURS, SHAPES, TASKS, Object, Scene
from v2flow.data.shapes import signed_distance
from v2flow.errors import V2FlowError
from v2flow.metrics.reconstruction import to_uint8

SIDE = 32
"""Larger pictures are reduced to it first."""
UNKNOWN = "unknown"
"""The shape of what is there and like none of the shapes."""
FOREGROUND = 0.45
"""A pixel with this share of a colour on white belongs to an object."""
SPECK = 14
"""Pixels: what is smaller is dirt. The smallest shape that is drawn covers 37."""
MOST = 20.0
"""Pixels: what is wider is no object. The largest that is drawn has a diameter of 13."""
LIKENESS = 0.7
"""Of the best shape (intersection over union); below it the shape is unknown."""
BLURS = (0.0, 0.6, 1.0, 1.4)
"""Standard deviations in pixels of the blurs that are tried."""
PALENESS = (0.75, 1.1)
"""How much of a colour's full difference from white an object may show, pale by blur, and count as no other colour."""
WEAK = 0.2
"""Channels with less of a colour's strongest ink say more of the noise than of the shape."""
_CHUNK = 256
_INK = np.array([[255 - level for level in rgb] for rgb in COLOURS.values()]) / 255.0
_INK_NORM = np.linalg.norm(_INK, axis=1)
_COLOURS = tuple(COLOURS)


def detect(pictures: Tensor) -> list[list[Object]]:
    """The objects in pictures on white.

    Connected pixels that differ from white make an object. Its colour is the nearest, paled by blur or not. Its
    shape is the one that, drawn and blurred with the same area about the same centroid, covers it best
    (intersection over union of the antialiased coverage).

    Args:
        pictures: [B, 3, S, S], floating point in [0, 1] or uint8, S at least 32.

    Returns:
        For each picture its objects, the largest first; shapes that are not recognised are `unknown`.

    Raises:
        V2FlowError: another shape of tensor.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3 or pictures.shape[2] != pictures.shape[3]:
        raise V2FlowError(f"pictures: expected a tensor [B, 3, S, S], found {list(pictures.shape)}")
    if pictures.shape[-1] < SIDE:
        raise V2FlowError(f"pictures: expected at least {SIDE} pixels a side, found {pictures.shape[-1]}")
    found: list[list[Object]] = []
    for chunk in pictures.split(_CHUNK):
        pixels = to_uint8(chunk.detach()).cpu().float() / 255.0
        if pixels.shape[-1] != SIDE:
            pixels = torch.nn.functional.interpolate(
                pixels, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False
            )
        found += _detect(1.0 - pixels.numpy().transpose(0, 2, 3, 1).astype(np.float64))
    return found


def satisfies(found: Sequence[Object], scene: Scene) -> bool:
    """Whether objects are what the caption of a scene says; see the rule at the head of this module."""
    if scene.task == "counting" and len(found) != len(scene.demands):
        return False
    for chosen in permutations(found, len(scene.demands)):
        if all(demand.fits(each) for demand, each in zip(scene.demands, chosen, strict=True)) and (
            scene.relation is None or related(scene.relation, chosen[0], chosen[1])
        ):
            return True
    return False


def related(relation: str, first: Object, second: Object) -> bool:
    """Whether the first object lies `left`, `right`, `above` or `below` the second, by GenEval's rule.

    The offset of the centres, less a tenth of both diameters in each direction, must point within 60 degrees of
    the axis; so a diagonal is both.
    """
    offset = np.array([first.x - second.x, first.y - second.y])
    offset = np.sign(offset) * np.maximum(np.abs(offset) - 0.1 * (first.size + second.size), 0.0)
    length = np.linalg.norm(offset)
    along = offset[0] if relation in ("left", "right") else offset[1]
    return bool((along if relation in ("right", "below") else -along) > 0.5 * length)


def verify(picture: Tensor, scene: Scene) -> bool:
    """Whether a picture [3, S, S] in [0, 1] shows what the caption of a scene says.

    Raises:
        V2FlowError: another shape of tensor.
    """
    return satisfies(detect(picture[None])[0], scene)


def score_scenes(pictures: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """The share of pictures that show what their captions say.

    Args:
        pictures: [B, 3, S, S], floating point in [0, 1] or uint8.
        scenes: what they should show.

    Returns:
        The share in [0, 1] of each task that occurs, and `overall`, their mean over tasks as in GenEval.

    Raises:
        V2FlowError: no pictures, another number of scenes, or another shape of tensor.
    """
    if len(pictures) != len(scenes) or not scenes:
        raise V2FlowError(f"scenes: expected one for each picture, found {len(scenes)} for {len(pictures)}")
    passed: dict[str, list[bool]] = {}
    for found, scene in zip(detect(pictures), scenes, strict=True):
        passed.setdefault(scene.task, []).append(satisfies(found, scene))
    scores = {task: float(np.mean(passed[task])) for task in TASKS if task in passed}
    return scores | {"overall": float(np.mean(list(scores.values())))}


def _detect(ink: np.ndarray) -> list[list[Object]]:
    """Objects of pictures given as their difference from white, [B, 32, 32, 3]."""
    foreground = _coverage(ink) > FOREGROUND
    labels = _components(foreground)
    owners, masks = [], []
    for picture, label in enumerate(labels):
        values, areas = np.unique(label[label > 0], return_counts=True)
        for value in values[areas >= SPECK][np.argsort(-areas[areas >= SPECK], kind="stable")]:
            owners.append(picture)
            masks.append(label == value)
    found: list[list[Object]] = [[] for _ in ink]
    if masks:
        for owner, each in zip(
            owners, _recognise(ink[owners], np.stack(masks), foreground[owners]), strict=True
        ):
            found[owner].append(each)
    return found


def _coverage(ink: np.ndarray) -> np.ndarray:
    """How much of a pixel is covered by the colour that it is most like: [..., 3] to [...]."""
    norm = np.linalg.norm(ink, axis=-1)
    nearest = (ink @ (_INK / _INK_NORM[:, None]).T).argmax(-1)
    return norm / _INK_NORM[nearest]


def _components(foreground: np.ndarray) -> np.ndarray:
    """Labels of pixels connected by their sides, bool [B, H, W] to int [B, H, W]; 0 is background."""
    labels = foreground * (1 + np.arange(foreground[0].size).reshape(foreground[0].shape))
    while True:
        spread = np.pad(labels, ((0, 0), (1, 1), (1, 1)))
        around = (spread[:, :-2, 1:-1], spread[:, 2:, 1:-1], spread[:, 1:-1, :-2], spread[:, 1:-1, 2:])
        grown = np.maximum.reduce([labels, *around]) * foreground
        if np.array_equal(grown, labels):
            return labels
        labels = grown


def _recognise(ink: np.ndarray, masks: np.ndarray, foreground: np.ndarray) -> list[Object]:
    """Colour, shape, size and place of M components: ink [M, 32, 32, 3], masks and all foreground [M, 32, 32]."""
    near = _grow(_grow(masks)) & ~(foreground & ~masks)  # the blurred edge too, but no neighbour
    colours, inks = _colours(ink, masks, near)
    # Blur pales small objects: a covered pixel has at least the full ink of the colour.
    full = inks * np.maximum(1.0, _INK_NORM[colours] / np.linalg.norm(inks, axis=1))[:, None]
    fit = _fit(_evenly(ink, full) * near, near)
    objects = []
    for row, colour in enumerate(colours):
        best = int(fit.likeness[row].argmax())
        size, x, y = (float(each[row, best]) for each in (fit.size, fit.x, fit.y))
        known = fit.likeness[row, best] >= LIKENESS and size <= MOST
        shape = SHAPES[best] if known else UNKNOWN
        objects.append(Object(shape, _COLOURS[colour], size / SIDE, x / SIDE, y / SIDE))
    return objects


@dataclass(frozen=True)
class _Fit:
    """Each shape laid over components: likeness in [0, 1], diameter and centre in pixels, [M, shapes] each."""

    likeness: np.ndarray
    size: np.ndarray
    x: np.ndarray
    y: np.ndarray


def _evenly(ink: np.ndarray, full: np.ndarray) -> np.ndarray:
    """How much of each pixel is covered, the mean over channels: ink [M, 32, 32, 3] and the ink of a covered pixel
    [M, 3] to [M, 32, 32] in [0, 1].

    Each strong channel counts alike. A projection on yellow would be nearly all blue, and blue is what JPEG
    and tokenizers blur most.
    """
    strong = full > WEAK * full.max(1, keepdims=True)
    weights = strong / (strong.sum(1, keepdims=True) * np.where(strong, full, 1.0))
    return np.clip(np.einsum("mhwc,mc->mhw", ink, weights), 0.0, 1.0)


def _fit(coverage: np.ndarray, near: np.ndarray) -> _Fit:
    """Lays each shape over components, blurred as suits it best: coverage and pixels that count, [M, 32, 32]."""
    area = coverage.sum((1, 2))
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    x, y = (coverage * columns).sum((1, 2)) / area, (coverage * rows).sum((1, 2)) / area
    areas, rises = _moments()
    sizes = np.sqrt(area[:, None] / areas)
    tops = y[:, None] - rises * sizes
    likeness = np.empty_like(sizes)
    for number, shape in enumerate(SHAPES):
        drawn = _drawn(shape, sizes[:, number], x, tops[:, number])
        likeness[:, number] = np.max(
            [_overlap(_blurred(drawn, blur) * near, coverage) for blur in BLURS], axis=0
        )
    return _Fit(likeness, sizes, np.broadcast_to(x[:, None], sizes.shape), tops)


def _drawn(shape: str, size: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Coverage [M, 32, 32] by a shape of given diameters and centres in pixels, [M]."""
    line, scale = np.arange(SIDE) + 0.5, size[:, None, None]
    u, v = (line - x[:, None, None]) / scale, (line[:, None] - y[:, None, None]) / scale
    return np.clip(0.5 - signed_distance(shape, u, v) * scale, 0.0, 1.0)


def _blurred(coverage: np.ndarray, blur: float) -> np.ndarray:
    """Gaussian blur of pictures [M, 32, 32]."""
    if blur == 0:
        return coverage
    offsets = np.arange(SIDE)[:, None] - np.arange(SIDE)
    kernel = np.exp(-0.5 * (offsets / blur) ** 2)
    kernel /= kernel.sum(1, keepdims=True)
    return kernel @ coverage @ kernel.T


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of coverages [M, 32, 32]."""
    return np.minimum(a, b).sum((1, 2)) / np.maximum(a, b).sum((1, 2))


def _colours(ink: np.ndarray, masks: np.ndarray, near: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of the colour of each component, and its ink as measured in its inner half, [M] and [M, 3]."""
    strength = np.linalg.norm(ink, axis=-1)
    inks = np.empty((len(ink), 3))
    for row, mask in enumerate(masks):
        inner = mask & (strength[row] >= np.median(strength[row][mask]))
        inks[row] = ink[row][inner].mean(0)
    # The hue is that of all its ink: blur moves ink, unequally by channel perhaps, but keeps the sum.
    total = np.einsum("mhwc,mhw->mc", ink, near)
    total *= np.linalg.norm(inks, axis=1, keepdims=True) / np.linalg.norm(total, axis=1, keepdims=True)
    share = np.clip((total @ _INK.T) / _INK_NORM**2, *PALENESS)
    error = np.linalg.norm(total[:, None] - share[..., None] * _INK, axis=2)
    return error.argmin(1), inks


def _grow(masks: np.ndarray) -> np.ndarray:
    """Masks [M, H, W] one pixel wider on each side, corners included."""
    spread = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
    rows = spread[:, :-2] | spread[:, 1:-1] | spread[:, 2:]
    return rows[..., :-2] | rows[..., 1:-1] | rows[..., 2:]


@cache
def _moments() -> tuple[np.ndarray, np.ndarray]:
    """Area of each shape of diameter 1, and how far its centroid lies below its centre, from its own outline."""
    line = (np.arange(1000) + 0.5) / 1000 * 1.2 - 0.6
    u, v = np.meshgrid(line, line)
    insides = [signed_distance(shape, u, v) < 0 for shape in SHAPES]
    return np.array([1.44 * inside.mean() for inside in insides]), np.array([v[i].mean() for i in insides])
