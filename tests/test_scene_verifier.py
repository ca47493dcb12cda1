"""The verifier: right on true and degraded renderings, at chance on other captions, near 0 on what shows nothing."""

import io
import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, label
from torch import Tensor

from v2flow.data.scene_sampler import sample_scene
from v2flow.data.scenes import COLOURS, PLACES, SHAPES, TASKS, Demand, Object, Scene
from v2flow.data.shapes import render
from v2flow.errors import V2FlowError
from v2flow.metrics.scene_verifier import _components, detect, related, satisfies, score_scenes, verify

COUNT = 600


def tensor(pictures: np.ndarray) -> Tensor:
    """uint8 or [0, 255] floats [B, H, W, 3] to fp32 [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures, np.float32) / 255).permute(0, 3, 1, 2).clamp(0, 1)


def drawn(*objects: Object, size: int = 32) -> Tensor:
    return tensor(render(Scene("", "", objects, ()), size)[None])[0]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    """Half of training's kind, half held out."""
    turns = [
        10 * (i // 6) + i % 6 for i in range(COUNT)
    ]  # of training's ten, the first six are one of each task
    return [
        sample_scene(10, "test", i) if i < COUNT // 2 else sample_scene(10, "train", turns[i])
        for i in range(COUNT)
    ]


@pytest.fixture(scope="module")
def pictures(scenes: list[Scene]) -> np.ndarray:
    return np.stack([render(scene) for scene in scenes])


def jpeg(picture: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=30)
    return np.asarray(Image.open(buffer))


def noise(pictures: np.ndarray, psnr: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 255 * 10 ** (-psnr / 20), pictures.shape)


def project_patches(pictures: np.ndarray, kept: int) -> np.ndarray:
    """4 x 4 patches by their first principal components: errors as of a linear tokenizer."""
    patches = pictures.reshape(-1, 8, 4, 8, 4, 3).swapaxes(2, 3).reshape(-1, 48).astype(float)
    mean = patches.mean(0)
    basis = np.linalg.eigh(np.cov((patches - mean).T))[1][:, -kept:]
    rebuilt = (patches - mean) @ basis @ basis.T + mean
    return rebuilt.reshape(-1, 8, 8, 4, 4, 3).swapaxes(2, 3).reshape(pictures.shape)


def test_true_renderings(scenes: list[Scene], pictures: np.ndarray) -> None:
    scores = score_scenes(tensor(pictures), scenes)
    assert list(scores) == [*TASKS, "overall"]
    assert min(scores.values()) >= 0.99


def test_what_is_found_is_what_was_drawn(scenes: list[Scene], pictures: np.ndarray) -> None:
    for found, scene in zip(detect(tensor(pictures)), scenes, strict=True):
        kind = lambda each: (each.shape, each.colour, each.size_word)  # noqa: E731
        assert Counter(map(kind, found)) == Counter(map(kind, scene.objects))
        for each in scene.objects:
            nearest = min(found, key=lambda other: math.hypot(other.x - each.x, other.y - each.y))
            assert math.hypot(nearest.x - each.x, nearest.y - each.y) < 0.5 / 32
            assert abs(nearest.size - each.size) < 0.8 / 32


@pytest.mark.parametrize("kind", ["blur 0.7", "blur 1", "jpeg", "patches"])
def test_degraded_renderings(kind: str, scenes: list[Scene], pictures: np.ndarray) -> None:
    """In place of a tokenizer's reconstructions, between 21 and 29 dB."""
    if kind == "jpeg":
        degraded = np.stack([jpeg(picture) for picture in pictures]).astype(float)
    elif kind == "patches":
        degraded = project_patches(pictures, 10)
    else:
        sigma = float(kind.split()[1])
        degraded = gaussian_filter(pictures.astype(float), (0, sigma, sigma, 0)) + noise(pictures, 26)
    degraded = np.clip(degraded, 0, 255)
    mse = ((degraded - pictures) ** 2).mean((1, 2, 3))
    assert 21 < (10 * np.log10(255**2 / mse)).mean() < 29
    scores = score_scenes(tensor(degraded), scenes)
    # Yellow on white is little but colour, whose resolution JPEG halves and small patches lose.
    assert min(scores.values()) >= 0.97


def test_shuffled_captions_score_at_chance(scenes: list[Scene], pictures: np.ndarray) -> None:
    """Chance is counted on the scenes themselves: how often another scene of the task happens to fit."""
    found = detect(tensor(pictures))
    for number, task in enumerate(TASKS):
        own = range(number, COUNT, len(TASKS))
        pairs = [(a, b) for a in own for b in own if a != b]
        chance = np.mean([satisfies(scenes[a].objects, scenes[b]) for a, b in pairs])
        measured = np.mean([satisfies(found[a], scenes[b]) for a, b in pairs])
        assert measured == pytest.approx(chance, abs=0.005)
        assert chance < {"single_object": 0.2, "colors": 0.12, "two_object": 0.15}.get(task, 0.06)


@pytest.mark.parametrize("kind", ["white", "grey", "palette", "uniform noise", "normal noise", "clouds"])
def test_pictures_that_show_nothing(kind: str, scenes: list[Scene]) -> None:
    rng, shape = np.random.default_rng(1), (COUNT, 32, 32, 3)
    nothing = {
        "white": lambda: np.full(shape, 255.0),
        "grey": lambda: np.full(shape, 128.0),
        "palette": lambda: (
            np.array(list(COLOURS.values()))[np.arange(COUNT) % 6, None, None] + np.zeros(shape)
        ),
        "uniform noise": lambda: rng.uniform(0, 255, shape),
        "normal noise": lambda: 255 - np.abs(rng.normal(0, 100, shape)),
        "clouds": lambda: 128 + gaussian_filter(rng.normal(0, 1, shape), (0, 2, 2, 0)) * 1000,
    }[kind]()
    scores = score_scenes(tensor(np.clip(nothing, 0, 255)), scenes)
    assert max(scores.values()) <= 0.01 and scores["overall"] <= 0.005


def test_components_agree_with_scipy() -> None:
    masks = np.random.default_rng(0).random((20, 32, 32)) < 0.55
    for mask, labels in zip(masks, _components(masks), strict=True):
        expected = label(mask)[0]
        assert ((labels > 0) == mask).all()
        pairs = set(zip(labels[mask].tolist(), expected[mask].tolist(), strict=True))
        assert len(pairs) == expected.max() == len(set(labels[mask].tolist()))


A = Object("circle", "red", 0.28, 0.25, 0.3)
B = Object("square", "blue", 0.28, 0.7, 0.35)
C = Object("circle", "red", 0.28, 0.7, 0.75)


def test_further_objects_harm_counting_only() -> None:
    one = Scene("counting", "", (), (Demand("circle", "red"),))
    assert verify(drawn(A), one) and not verify(drawn(A, B), one) and not verify(drawn(A, C), one)
    assert verify(drawn(A, B), Scene("colors", "", (), (Demand("circle", "red"),)))
    two = Scene("counting", "", (), (Demand("circle", "red"),) * 2)
    assert verify(drawn(A, C), two) and not verify(drawn(A), two) and not verify(drawn(A, B), two)


def test_each_attribute_counts() -> None:
    assert not verify(drawn(A), Scene("colors", "", (), (Demand("circle", "blue"),)))
    assert not verify(drawn(A), Scene("colors", "", (), (Demand("square", "red"),)))
    small = Scene("single_object", "", (), (Demand("circle", None, "small"),))
    large = Scene("single_object", "", (), (Demand("circle", None, "large"),))
    big = Object("circle", "red", 0.42, 0.5, 0.5)
    assert verify(drawn(A), small) and not verify(drawn(A), large)
    assert verify(drawn(big), large) and not verify(drawn(big), small)


def test_places() -> None:
    for place, x, y in (
        ("top left", 9, 11),
        ("top right", 21, 9),
        ("bottom left", 7, 20),
        ("bottom right", 20, 22),
    ):
        picture = drawn(Object("circle", "red", 9 / 32, x / 32, y / 32))
        said = {p: Scene("single_object", "", (), (Demand("circle", place=p),)) for p in PLACES}
        assert [p for p, scene in said.items() if verify(picture, scene)] == [place]
    for x, y in ((14, 14), (16, 16), (18, 18), (18, 9)):
        picture = drawn(Object("circle", "red", 9 / 32, x / 32, y / 32))
        assert not any(verify(picture, scene) for scene in said.values())


def test_attributes_are_bound_to_their_object() -> None:
    demands = (Demand("circle", "red"), Demand("square", "blue"))
    assert verify(drawn(A, B), Scene("color_attr", "", (), demands))
    swapped = (Demand("circle", "blue"), Demand("square", "red"))
    assert not verify(drawn(A, B), Scene("color_attr", "", (), swapped))
    assert not verify(drawn(A), Scene("two_object", "", (), (Demand("circle"), Demand("circle"))))


def test_relations() -> None:
    demands = (Demand("circle"), Demand("square"))
    for relation in ("left", "right", "above", "below"):
        scene = Scene("position", "", (), demands, relation)
        assert verify(drawn(A, B), scene) == (relation == "left")
        assert verify(drawn(C, B), scene) == (relation == "below")
    near = Object("square", "blue", 0.28, 0.28, 0.33)
    assert not any(related(relation, A, near) for relation in ("left", "right", "above", "below"))
    diagonal = Object("square", "blue", 0.28, 0.75, 0.8)
    assert (
        related("left", A, diagonal) and related("above", A, diagonal) and not related("below", A, diagonal)
    )


@pytest.mark.parametrize("size", [32, 48, 64, 128])
def test_larger_pictures(size: int) -> None:
    scenes = [sample_scene(2, "train", i) for i in range(60)]
    pictures = np.stack([render(scene, size) for scene in scenes])
    assert score_scenes(tensor(pictures), scenes)["overall"] == 1.0
    assert detect(tensor(pictures)) == detect(torch.from_numpy(pictures).permute(0, 3, 1, 2))


def test_a_shape_of_another_kind_is_unknown() -> None:
    picture = torch.ones(3, 32, 32)
    picture[1:, 10:12, 4:28] = 0.1
    picture[1:, 10:28, 4:6] = 0.1
    (found,) = detect(picture[None])[0]
    assert (found.shape, found.colour) == ("unknown", "red") and "unknown" not in SHAPES
    assert detect(torch.ones(1, 3, 32, 32)) == [[]]
    assert detect(torch.full((1, 3, 32, 32), float("nan")))[0][0].shape == "unknown"


def test_bad_input(scenes: list[Scene]) -> None:
    for shape in ((3, 32, 32), (1, 1, 32, 32), (1, 3, 32, 48)):
        with pytest.raises(V2FlowError, match=r"expected a tensor \[B, 3, S, S\]"):
            detect(torch.zeros(shape))
    with pytest.raises(V2FlowError, match="at least 32 pixels"):
        detect(torch.zeros(1, 3, 16, 16))
    with pytest.raises(V2FlowError, match="one for each picture, found 2 for 1"):
        score_scenes(torch.zeros(1, 3, 32, 32), scenes[:2])
    with pytest.raises(V2FlowError, match="one for each picture, found 0 for 0"):
        score_scenes(torch.zeros(0, 3, 32, 32), [])
