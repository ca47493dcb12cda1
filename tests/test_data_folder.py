"""Shards of a folder of pictures: keys, captions, bad pictures, splits."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from v2flow.data.folder import FolderReport, build_folder
from v2flow.data.manifest import MANIFEST
from v2flow.data.shards import open_shards
from v2flow.errors import V2FlowError


def _picture(path: Path, seed: int = 0, size: tuple[int, int] = (8, 8)) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def _build(source: Path, out: Path, **options: object) -> FolderReport:
    return build_folder(source, out, processes=1, progress=False, **options)


def _members(out: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as archive:
            found |= {m.name: archive.extractfile(m).read() for m in archive}
    return found


def test_pictures_are_copied_with_the_captions_beside_them(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    png = _picture(source / "a.png", 1)
    jpg = _picture(source / "cats" / "b.JPG", 2)
    (source / "cats" / "b.txt").write_text(" a grey cat\n", encoding="utf-8-sig")
    _picture(source / ".hidden" / "c.png")
    report = _build(source, out)
    assert sum(report.samples.values()) == 2 and report.captions == 1 and report.bad == {}
    assert _members(out) == {"a.png": png, "cats/b.jpg": jpg, "cats/b.txt": b"a grey cat"}
    assert len(open_shards(str(out / "*.tar"))) == 2


def test_other_formats_become_png(tmp_path: Path) -> None:
    _picture(tmp_path / "in" / "a.bmp", 3)
    _build(tmp_path / "in", tmp_path / "out")
    pixels = np.asarray(Image.open(io.BytesIO(_members(tmp_path / "out")["a.png"])))
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(tmp_path / "in" / "a.bmp")))


def test_dotted_names_have_keys_of_their_own(tmp_path: Path) -> None:
    """webdataset ends a key at the first dot: both pictures would be `img` and one of them lost."""
    for number in (1, 2):
        _picture(tmp_path / "in" / "run.7" / f"img.v2.00{number}.png", number)
    (tmp_path / "in" / "run.7" / "img.v2.001.txt").write_text("one")
    _build(tmp_path / "in", tmp_path / "out")
    names = {"run_7/img_v2_001.png", "run_7/img_v2_002.png", "run_7/img_v2_001.txt"}
    assert set(_members(tmp_path / "out")) == names
    assert {shard.index.key(0) for shard in open_shards(str(tmp_path / "out" / "*.tar")).shards} <= {
        "run_7/img_v2_001",
        "run_7/img_v2_002",
    }


@pytest.mark.parametrize("names", [("a.png", "a.jpg"), ("a.b.png", "a_b.png")])
def test_two_files_of_one_key_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        _picture(tmp_path / "in" / name)
    with pytest.raises(V2FlowError, match="rename one of them") as error:
        _build(tmp_path / "in", tmp_path / "out")
    assert all(name in str(error.value) for name in names)
    assert not (tmp_path / "out").exists()


def test_captions_of_a_table(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        _picture(tmp_path / "in" / name)
    (tmp_path / "in" / "b.txt").write_text("not this one")
    table = tmp_path / "captions.csv"
    table.write_text('file,caption\na.png,"red, green"\n')
    report = _build(tmp_path / "in", tmp_path / "out", captions=table)
    assert report.captions == 1
    assert set(_members(tmp_path / "out")) == {"a.png", "a.txt", "b.png"}
    assert _members(tmp_path / "out")["a.txt"] == b"red, green"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,caption\na.png,x\ngone.png,y\n", "line 3: no picture .*gone.png"),
        ("file,caption\na.png,x\na.png,y\n", "line 3: a second caption"),
        ("name,caption\na.png,x\n", "columns file and caption .* found name, caption"),
        ("", "found nothing"),
        (None, "no such CSV file"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str | None, message: str) -> None:
    _picture(tmp_path / "in" / "a.png")
    table = tmp_path / "captions.csv"
    if text is not None:
        table.write_text(text)
    with pytest.raises(V2FlowError, match=message) as error:
        _build(tmp_path / "in", tmp_path / "out", captions=table)
    assert str(table) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_bad_pictures_are_left_out_and_reported(tmp_path: Path) -> None:
    source = tmp_path / "in"
    _picture(source / "good.png")
    data = _picture(source / "cut.png", 5, (64, 64))
    (source / "cut.png").write_bytes(data[: len(data) // 2])
    (source / "text.jpg").write_text("no picture")
    (source / "empty.webp").write_bytes(b"")
    report = _build(source, tmp_path / "out")
    assert {Path(file).name for file in report.bad} == {"cut.png", "text.jpg", "empty.webp"}
    assert set(_members(tmp_path / "out")) == {"good.png"}
    assert "text.jpg" in str(report)
    with pytest.raises(V2FlowError, match="3 bad pictures, max_bad=2"):
        _build(source, tmp_path / "strict", max_bad=2)
    assert not (tmp_path / "strict").exists()


def test_only_bad_pictures(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_text("no picture")
    with pytest.raises(V2FlowError, match="no samples"):
        _build(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_pictures_move_no_picture_to_another_split(tmp_path: Path) -> None:
    places = {}
    for count in (60, 90):
        for i in range(count):
            _picture(tmp_path / "in" / f"{i}.png", i)
        out = tmp_path / f"out{count}"
        report = _build(tmp_path / "in", out, val_fraction=0.2, test_fraction=0.2)
        assert sum(report.samples.values()) == count
        shards = open_shards(str(out / "*.tar")).shards
        places[count] = {s.index.key(i): Path(s.name).name[:4] for s in shards for i in range(len(s.index))}
    assert places[60].items() <= places[90].items()
    assert set(places[60].values()) == {"trai", "val-", "test"}


def test_the_same_build_is_not_made_twice(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    for i in range(4):
        _picture(source / f"{i}.png", i)
    (source / "0.txt").write_text("zero")
    first = _build(source, out)
    before = (out / MANIFEST).stat().st_mtime_ns
    again = _build(source, out)
    assert (again.samples, again.captions) == (first.samples, 1)
    assert (out / MANIFEST).stat().st_mtime_ns == before
    (source / "0.txt").write_text("nought")
    with pytest.raises(V2FlowError, match="other settings"):
        _build(source, out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "val_fraction"),
        ({"samples_per_shard": 0}, "samples_per_shard"),
    ],
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, float], message: str) -> None:
    _picture(tmp_path / "in" / "a.png")
    with pytest.raises(V2FlowError, match=message):
        _build(tmp_path / "in", tmp_path / "out", **options)


def test_no_folder_and_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(V2FlowError, match="no such folder"):
        _build(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "in").mkdir()
    with pytest.raises(V2FlowError, match="no pictures"):
        _build(tmp_path / "in", tmp_path / "out")
