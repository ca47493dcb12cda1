"""Scenes and their drawings: captions true of the scene, held-out combinations, determinism, shards."""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_toys import encode, write_tar
from PIL import Image

from v2flow.cli import main
from v2flow.data.batches import EvaluationBatches, SampleReader
from v2flow.data.decode import decode_image
from v2flow.data.loaders import EvaluationLoader
from v2flow.data.scenes import (
    COLOURS,
    INK,
    LEVELS,
    PITCH,
    RELATIONS,
    SHAPES,
    SIZES,
    TASKS,
    Demand,
    Object,
    Scene,
    held_out,
    sample_scene,
    scene_from_json,
)
from v2flow.data.shapes import build_shapes, read_scenes, render, signed_distance
from v2flow.data.shards import open_shards
from v2flow.data.validate import validate_shards
from v2flow.errors import V2FlowError
from v2flow.metrics.scene_verifier import satisfies, verify

SHAPE_OF = {word: word for word in SHAPES} | {f"{word}s": word for word in SHAPES} | {"crosses": "cross"}
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4}


def scenes(split: str, count: int, seed: int = 0, level: str = "things") -> list[Scene]:
    return [sample_scene(seed, split, index, level) for index in range(count)]


def test_what_is_held_out() -> None:
    """Written out: the figures of two versions compare only if it stays as it is."""
    assert held_out().things == {
        ("small", "red", "bar"),
        ("large", "red", "cross"),
        ("small", "green", "cross"),
        ("large", "green", "ring"),
        ("small", "blue", "ring"),
        ("large", "blue", "circle"),
        ("small", "yellow", "circle"),
        ("large", "yellow", "square"),
        ("small", "purple", "square"),
        ("large", "purple", "triangle"),
    }
    pairs = {("red", "bar"), ("green", "cross"), ("blue", "ring"), ("yellow", "circle"), ("purple", "square")}
    assert held_out("pairs").things == {(size, *pair) for size in SIZES for pair in pairs}
    assert sorted(sorted(duo) for duo in held_out().duos) == [
        ["bar", "circle"],
        ["bar", "ring"],
        ["circle", "square"],
        ["cross", "ring"],
        ["cross", "triangle"],
        ["square", "triangle"],
    ]
    assert held_out("pairs").duos == held_out().duos


@pytest.mark.parametrize("level", LEVELS)
def test_training_never_shows_a_held_out_combination_and_every_test_caption_names_one(level: str) -> None:
    """Checked on what is drawn, with no help from the sampler's own rule."""
    out = held_out(level)

    def things(scene: Scene) -> set[tuple[str, str, str]]:
        return {(o.size_word, o.colour, o.shape) for o in scene.objects}

    def duos(scene: Scene) -> set[frozenset[str]]:
        shapes = {o.shape for o in scene.objects}
        return {frozenset(duo) for duo in combinations(sorted(shapes), 2)}

    train = scenes("train", 20_000, level=level)
    shown = train + scenes("val", 3_000, level=level)
    assert not any(things(scene) & out.things or duos(scene) & out.duos for scene in shown)
    test = scenes("test", 3_000, level=level)
    for scene in test:
        said = {(size, d.colour, d.shape) for d in scene.demands for size in SIZES if d.size in (None, size)}
        certain = [t for t in said if {t, *((s, *t[1:]) for s in SIZES if (s, *t[1:]) in said)} <= out.things]
        assert certain or duos(scene) & out.duos
        assert things(scene) & out.things or duos(scene) & out.duos
    assert not {scene.group for scene in train} & {scene.group for scene in test}
    assert not {scene.caption for scene in train} & {scene.caption for scene in test}
    # Whatever is not held out is seen, so that training can teach each part of a combination.
    seen = set().union(*map(things, train))
    assert len(seen) == len(SIZES) * len(COLOURS) * len(SHAPES) - len(out.things)
    assert len({(colour, shape) for _, colour, shape in seen}) == (36 if level == "things" else 31)
    assert len(set().union(*map(duos, train))) == 15 - len(out.duos)


def test_what_has_no_colour_in_its_caption_is_black() -> None:
    for scene in scenes("train", 3_000) + scenes("test", 600):
        for thing, demand in zip(scene.objects, scene.demands, strict=True):
            assert thing.colour == (demand.colour or INK)


def test_tasks_and_attributes_are_balanced() -> None:
    train = scenes("train", 6_000)
    assert Counter(scene.task for scene in train) == dict.fromkeys(TASKS, 1_000)
    counts = Counter(len(scene.objects) for scene in train if scene.task == "counting")
    relations = Counter(scene.relation for scene in train if scene.task == "position")
    assert set(counts) == {1, 2, 3, 4} and set(relations) == set(RELATIONS)
    assert min(*counts.values(), *relations.values()) > 200
    colours = Counter(scene.objects[0].colour for scene in train)
    # A third of the captions say no colour.
    assert set(colours) == set(COLOURS) and min(colours.values()) > 500 and colours[INK] > 2_000
    assert len({scene.caption for scene in train}) > 1_000


@pytest.mark.parametrize("split", ["train", "test"])
def test_captions_say_what_is_demanded_and_drawn(split: str) -> None:
    for scene in scenes(split, 1_200):
        words = scene.caption.split()
        shapes = [SHAPE_OF[word] for word in words if word in SHAPE_OF]
        assert shapes == list(dict.fromkeys(demand.shape for demand in scene.demands))
        colours = [demand.colour for demand in scene.demands if demand.colour]
        assert [word for word in words if word in COLOURS] == list(dict.fromkeys(colours))
        sizes = [demand.size for demand in scene.demands if demand.size]
        assert [word for word in words if word in SIZES] == list(dict.fromkeys(sizes))
        numbers = [NUMBERS[word] for word in words if word in NUMBERS]
        assert numbers == ([len(scene.objects)] if scene.task == "counting" else [])
        if scene.relation:
            assert any(f" {phrase} " in scene.caption for phrase in RELATIONS[scene.relation])
        assert satisfies(scene.objects, scene)


def test_a_sample_is_a_pure_function_of_seed_split_and_index() -> None:
    last_first = [sample_scene(3, "train", index) for index in reversed(range(50))]
    assert last_first[::-1] == scenes("train", 50, seed=3)
    first = Object("cross", "black", 13 / 32, 0.5625, 0.75)
    second = Object("circle", "black", 13 / 32, 0.75, 0.25)
    caption, demands = "a cross below a circle", (Demand("cross"), Demand("circle"))
    # Written out, so that it is also the same on another machine and in the next version.
    assert sample_scene(3, "train", 4) == Scene("position", caption, (first, second), demands, "below")
    assert scenes("train", 50, seed=4) != scenes("train", 50, seed=3)
    assert scenes("val", 50, seed=3) != scenes("train", 50, seed=3)
    sample_scene(0, "train", 10**12)  # endless


def test_objects_lie_inside_and_apart() -> None:
    for scene in scenes("train", 600) + scenes("test", 600):
        covered = np.zeros((256, 256), int)
        for each in scene.objects:
            assert (
                (each.x / PITCH).is_integer()
                and (each.y / PITCH).is_integer()
                and each.size in SIZES.values()
            )
            line = (np.arange(256) + 0.5) / 256
            u, v = np.meshgrid((line - each.x) / each.size, (line - each.y) / each.size)
            # With a rim of half a pixel of 32: what is drawn is at least a pixel apart.
            distance = signed_distance(each.shape, u, v) * each.size
            covered += distance < 0.5 / 32
            assert min(distance[0].min(), distance[-1].min(), distance[:, 0].min(), distance[:, -1].min()) > 0
        assert covered.max() == 1


def test_drawings_agree_between_sizes() -> None:
    """A picture of 64 pixels, each 2 x 2 averaged, is that of 32 up to the rounding of edges to points.

    An edge may differ by 1/16 + 1/32 of a pixel, a corner by two edges.
    """
    means = []
    for scene in scenes("train", 24):
        small = render(scene, 32).astype(float)
        difference = np.abs(render(scene, 64).reshape(32, 2, 32, 2, 3).mean((1, 3)) - small)
        assert difference.max() <= 48
        means.append(difference.mean())
        assert (small[[0, -1, 0, -1], [0, 0, -1, -1]] == 255).all()
    assert np.mean(means) < 0.3


def test_a_drawing_by_hand() -> None:
    picture = render(Scene("colors", "", (Object("square", "blue", 0.5 / 0.88, 0.5, 0.5),), ()), 32)
    assert (picture[8:24, 8:24] == COLOURS["blue"]).all()
    picture[8:24, 8:24] = 255
    assert (picture == 255).all()


def test_shards_hold_picture_caption_and_scene(tmp_path: Path) -> None:
    out = tmp_path / "shapes"
    counts = build_shapes(out, train=30, val=6, test=12, seed=1, progress=False)
    assert counts == {"train": 30, "val": 6, "test": 12}
    report = validate_shards(str(out / "*.tar"), processes=1)
    assert report.ok and report.captions == report.samples == 48 and report.sizes == {"32x32": 48}
    assert read_scenes(str(out / "test-*.tar")) == scenes("test", 12, seed=1)
    reader = SampleReader(open_shards(str(out / "test-*.tar"), progress=False), 32, captions=True)
    (batch,) = EvaluationLoader(EvaluationBatches(reader, 12), 12)
    for picture, caption, scene in zip(
        batch["image"], batch["caption"], scenes("test", 12, seed=1), strict=True
    ):
        assert caption == scene.caption
        assert torch.equal((picture * 255).round().byte().permute(1, 2, 0), torch.from_numpy(render(scene)))
        assert verify(picture, scene)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert build_shapes(out, train=30, val=6, test=12, seed=1, progress=False) == counts
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(V2FlowError, match="other settings"):
        build_shapes(out, train=30, val=6, test=12, seed=2, progress=False)


def test_the_same_settings_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        build_shapes(tmp_path / name, train=12, val=0, test=6, size=48, progress=False)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    opened = open_shards(str(tmp_path / "a" / "train-*.tar"))
    assert decode_image(opened.read(0, 0) or b"").size == (48, 48)


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    options = ["--train", "6", "--val", "6", "--test", "6", "--json", str(tmp_path / "counts.json")]
    assert main(["data", "shapes", "--out", str(out), *options]) == 0
    assert "6 train, 6 val, 6 test" in capsys.readouterr().out
    assert json.loads((tmp_path / "counts.json").read_text()) == {
        "samples": dict.fromkeys(("train", "val", "test"), 6)
    }
    assert main(["data", "shapes", "--out", str(out), *options, "--held-out", "pairs"]) == 2
    assert "held_out" in capsys.readouterr().err
    pairs = tmp_path / "pairs"
    assert main(["data", "shapes", "--out", str(pairs), *options, "--held-out", "pairs"]) == 0
    assert read_scenes(f"{pairs}/test-*.tar") == scenes("test", 6, level="pairs") != scenes("test", 6)
    capsys.readouterr()
    assert main(["data", "shapes", "--out", str(tmp_path / "other"), "--size", "8"]) == 2
    assert "at least 16 pixels" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train": -1}, "train, val, test"),
        ({"train": 0, "val": 0, "test": 0}, "train, val, test"),
        ({"size": 15}, "size, seed"),
        ({"seed": -1}, "size, seed"),
        ({"level": "all"}, "held_out: expected one of things, pairs, found 'all'"),
    ],
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(V2FlowError, match=words):
        build_shapes(tmp_path / "set", progress=False, **options)


def test_bad_samples_and_scenes(tmp_path: Path) -> None:
    with pytest.raises(V2FlowError, match="split: expected one of train, val, test, found 'trian'"):
        sample_scene(0, "trian", 0)
    with pytest.raises(V2FlowError, match="not negative"):
        sample_scene(0, "train", -1)
    with pytest.raises(V2FlowError, match="at least 16 pixels"):
        render(sample_scene(0, "train", 0), 8)
    with pytest.raises(V2FlowError, match="cannot be drawn"):
        signed_distance("unknown", np.zeros(1), np.zeros(1))
    scene = sample_scene(0, "train", 4)
    assert scene_from_json(scene.to_json()) == scene
    for bad in (b"[]", "no json", '{"task": "colors"}', scene.to_json().replace('"size":', '"big":')):
        with pytest.raises(V2FlowError, match="^here: expected the JSON of a scene"):
            scene_from_json(bad, "here")
    for old, new in (("position", "poetry"), (scene.demands[0].shape, "blob"), (str(scene.relation), "near")):
        with pytest.raises(V2FlowError, match=f"^scene: .*expected one of .*found '{new}'"):
            scene_from_json(scene.to_json().replace(f'"{old}"', f'"{new}"'))


def test_shards_without_scenes_are_refused(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "s.tar", [("a.png", encode(Image.new("RGB", (32, 32)))), ("a.txt", b"a circle")]
    )
    with pytest.raises(V2FlowError, match="sample 'a': no member json .*v2flow data shapes"):
        read_scenes(shard)
