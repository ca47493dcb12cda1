"""Draws scenes of coloured shapes at any size and writes them as captioned shards; no licence binds the pictures."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from v2flow.data.manifest import FIELDS
from v2flow.data.scene_sampler import HELD_OUT_SEED, held_out, sample_scene
from v2flow.data.scenes import COLOURS, REACH, Scene, scene_from_json
from v2flow.data.shard_names import Shards
from v2flow.data.shards import open_shards
from v2flow.data.writer import SPLITS, Sample, finished_build, write_shards
from v2flow.errors import V2FlowError

SUPERSAMPLING = 8
SMALLEST = 16
"""Pixels: below it a ring has no hole."""
_RULES = 10  # of scenes and drawing; another number tells shards of other rules apart
_JSON = FIELDS.index("json")


def signed_distance(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance to the outline of a shape of diameter 1 about the origin: negative inside.

    Exact along the straight and round parts of the outline, a lower bound beyond its corners.

    Args:
        shape: one of `scenes.SHAPES`.
        u, v: coordinates to the right and downwards, in diameters, of one common shape.

    Raises:
        V2FlowError: an unknown shape.
    """
    if shape == "circle":
        return np.hypot(u, v) - 0.5
    if shape == "ring":  # the hole is a little less than half as wide as the ring
        return np.abs(np.hypot(u, v) - 0.36) - 0.14
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.44
    if shape == "triangle":
        half, height = REACH, 0.48
        slope = np.hypot(half, 2 * height)
        return np.maximum(v - height, (np.abs(u) * 2 * height - (v + height) * half) / slope)
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return np.minimum(np.maximum(a - 0.5, b - 0.19), np.maximum(a - 0.19, b - 0.5))
    if shape == "bar":
        return np.maximum(np.abs(u) - 0.5, np.abs(v) - 0.23)
    raise V2FlowError(f"shape: {shape!r} cannot be drawn")


def render(scene: Scene, size: int = 32) -> np.ndarray:
    """Draws a scene on white, antialiased: each pixel is the mean of 8 x 8 points.

    Args:
        scene: objects that do not overlap.
        size: side of the picture in pixels, at least 16.

    Returns:
        uint8 [size, size, 3].

    Raises:
        V2FlowError: the size is too small.
    """
    if size < SMALLEST:
        raise V2FlowError(f"size: expected at least {SMALLEST} pixels, found {size}; shapes would be blots")
    picture = np.full((size, size, 3), 255.0)
    for each in scene.objects:
        reach = REACH * each.size
        left, top = (max(0, int((centre - reach) * size)) for centre in (each.x, each.y))
        right, bottom = (min(size, int((centre + reach) * size) + 2) for centre in (each.x, each.y))
        u = (
            (np.arange(left * SUPERSAMPLING, right * SUPERSAMPLING) + 0.5) / (size * SUPERSAMPLING) - each.x
        ) / each.size
        v = (
            (np.arange(top * SUPERSAMPLING, bottom * SUPERSAMPLING) + 0.5) / (size * SUPERSAMPLING) - each.y
        ) / each.size
        inside = signed_distance(each.shape, *np.meshgrid(u, v)) < 0
        cells = inside.reshape(bottom - top, SUPERSAMPLING, right - left, SUPERSAMPLING)
        coverage = cells.mean((1, 3))[..., None]
        window = picture[top:bottom, left:right]
        window += coverage * (np.array(COLOURS[each.colour]) - window)
    return np.rint(picture).astype(np.uint8)


def build_shapes(
    out: str | Path,
    train: int = 60000,
    val: int = 1200,
    test: int = 1200,
    size: int = 32,
    seed: int = 0,
    level: str = "whole",
    progress: bool = True,
) -> dict[str, int]:
    """Builds `train-*.tar`, `val-*.tar`, `test-*.tar` of captioned scenes, unless they are there.

    Samples are KEY.png, KEY.txt (the caption) and KEY.json (the scene, see `scenes.scene_from_json`). The splits
    differ by combinations of attributes: `train` and `val` show none of `scene_sampler.held_out`, each caption of
    `test` names one. A longer build begins with the pictures of a shorter one.

    Args:
        out: folder of the shards.
        train, val, test: pictures by split.
        size: side of a picture in pixels.
        seed: of the samples; the held-out combinations are the same for all seeds.
        level: of what training never shows, one of `scene_sampler.LEVELS`.
        progress: show a progress bar.

    Returns:
        Samples by split.

    Raises:
        V2FlowError: an option is out of range, or `out` holds shards of other settings.
    """
    out = Path(out)
    counts = dict(zip(SPLITS, (train, val, test), strict=True))
    if min(counts.values()) < 0 or not any(counts.values()):
        raise V2FlowError(
            f"options train, val, test: expected numbers of pictures, found {train}, {val}, {test}"
        )
    if size < SMALLEST or seed < 0:
        raise V2FlowError(
            f"options size, seed: expected at least {SMALLEST} pixels and a seed from 0 on, found {size}, {seed}"
        )
    build = {
        "kind": "shapes",
        "rules": _RULES,
        "held_out_seed": HELD_OUT_SEED,
        "held_out": level,
        "seed": seed,
        "size": size,
    } | counts
    held_out(level)  # refuses an unknown one before anything is written
    finished = finished_build(out, build)
    if finished is not None:
        return finished
    return write_shards(out, _samples(counts, size, seed, level, progress), build)


def _samples(counts: dict[str, int], size: int, seed: int, level: str, progress: bool) -> Iterator[Sample]:
    bar = tqdm(
        desc="draw shapes", total=sum(counts.values()), unit="picture", disable=not progress, delay=2.0
    )
    with bar:
        for split, count in counts.items():
            for index in range(count):
                scene = sample_scene(seed, split, index, level)
                buffer = io.BytesIO()
                Image.fromarray(render(scene, size)).save(buffer, "PNG")
                members = {
                    "png": buffer.getvalue(),
                    "txt": scene.caption.encode(),
                    "json": scene.to_json().encode(),
                }
                yield Sample(split, f"{split}-{index:08d}", members)
                bar.update()


def read_scenes(shards: Shards) -> list[Scene]:
    """The scenes of shards of `build_shapes` in their order, for the verifier.

    Args:
        shards: paths or URLs, with braces or wildcards.

    Raises:
        V2FlowError: a shard cannot be read, or a sample has no scene.
    """
    opened = open_shards(shards)
    scenes = []
    for sample in range(len(opened)):
        text = opened.read(sample, _JSON)
        if text is None:
            raise V2FlowError(
                f"{opened.where(sample)}: no member json with its scene; build the shards with `v2flow data shapes`"
            )
        scenes.append(scene_from_json(text, opened.where(sample)))
    return scenes
