"""Checking shards: everything that is wrong is found, and the first problem ends nothing."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from v2flow.data.manifest import MANIFEST
from v2flow.data.validate import ShardReport, validate_shards
from v2flow.data.writer import Sample, write_shards
from v2flow.errors import V2FlowError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V2FLOW_CACHE", str(tmp_path / "cache"))


def _png(size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return path


def _check(*shards: Path | str) -> ShardReport:
    return validate_shards([str(shard) for shard in shards], processes=1, progress=False)


def _build(folder: Path, count: int = 4) -> Path:
    samples = [Sample("train", f"s{i}", {"png": _png(), "txt": b"words"}) for i in range(count)]
    write_shards(folder, samples, {"kind": "test"})
    return folder / "train-000000.tar"


def test_good_shards(tmp_path: Path) -> None:
    _build(tmp_path / "a")
    _tar(
        tmp_path / "b.tar",
        [("x.png", _png((16, 4))), ("x.json", b'{"caption": "x"}'), ("y.png", _png()), ("y.cls", b"3")],
    )
    report = _check(tmp_path / "a" / "*.tar", tmp_path / "b.tar")
    assert report.ok
    assert (report.shards, report.samples, report.captions, report.labels) == (2, 6, 5, 1)
    assert report.sizes == {"8x8": 5, "16x4": 1} and report.formats == {"PNG": 6}
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True
    assert "6, 5 with a caption" in str(report) and str(report).endswith("\nok")


def test_real_photographs(shared_data: Path) -> None:
    report = _check(shared_data / "imagenet-sample" / "val-000000.tar")
    assert report.ok and (report.samples, report.captions) == (500, 500)
    assert report.sizes == {"256x256": 500} and report.formats == {"JPEG": 500}


def test_every_problem_of_every_shard_is_named(tmp_path: Path) -> None:
    png = _png((64, 64))
    bad = _tar(
        tmp_path / "bad.tar",
        [
            ("cut.png", png[:99]),
            ("text.jpg", b"no"),
            ("none.txt", b"x"),
            ("label.png", png),
            ("label.cls", b"cat"),
        ],
    )
    json_shard = _tar(tmp_path / "json.tar", [("broken.png", png), ("broken.json", b"{")])
    report = _check(tmp_path / "gone.tar", bad, json_shard)
    assert not report.ok
    assert [line for line in report.bad_shards if "gone.tar" in line] and len(report.bad_shards) == 1
    assert (report.shards, report.samples, report.sizes) == (2, 5, {"64x64": 2})
    for shard, key in (
        ("bad", "cut"),
        ("bad", "text"),
        ("bad", "none"),
        ("bad", "label"),
        ("json", "broken"),
    ):
        assert [line for line in report.bad_members if f"{shard}.tar, sample '{key}': " in line], key
    assert len(report.bad_members) == 5
    assert str(report).endswith("not ok")


def test_cut_inside_a_member(tmp_path: Path) -> None:
    shard = _tar(tmp_path / "a.tar", [("a.png", _png()), ("b.png", _png()), ("c.png", _png((64, 64)))])
    with tarfile.open(shard) as archive:
        cut = archive.getmember("c.png").offset_data + 700
    shard.write_bytes(shard.read_bytes()[:cut])
    report = _check(shard)
    assert not report.ok and "a.tar: cut short inside member c.png" in report.bad_shards[0]
    assert report.samples == 2 and report.sizes == {"8x8": 2} and report.bad_members == []


def test_cut_at_a_members_boundary(tmp_path: Path) -> None:
    shard = _tar(tmp_path / "a.tar", [("a.png", _png()), ("b.png", _png()), ("c.png", _png())])
    with tarfile.open(shard) as archive:
        cut = archive.getmember("c.png").offset
    shard.write_bytes(shard.read_bytes()[:cut])
    report = _check(shard)
    assert not report.ok and "cut" in report.bad_shards[0]
    assert report.samples == 2 and report.sizes == {"8x8": 2}


def test_fewer_samples_than_the_manifest_says(tmp_path: Path) -> None:
    """A tar that is in order by itself, but shorter than the one that was built."""
    shard = _build(tmp_path / "set", 4)
    _tar(shard, [("s0.png", _png()), ("s0.txt", b"words")])
    assert (shard.parent / MANIFEST).is_file()
    report = _check(shard)
    assert not report.ok and "the manifest says 4 samples" in report.bad_shards[0]
    assert report.samples == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "an empty file"), (bytes(10240), "empty tar"), (b"no tar" * 300, "tar file")],
)
def test_files_that_are_no_shards(tmp_path: Path, content: bytes, message: str) -> None:
    shard = tmp_path / "a.tar"
    shard.write_bytes(content)
    report = _check(shard)
    assert not report.ok and report.samples == 0
    assert len(report.bad_shards) == 1
    assert str(shard) in report.bad_shards[0] and message in report.bad_shards[0]


def test_duplicate_keys(tmp_path: Path) -> None:
    one = _tar(tmp_path / "a.tar", [("a.png", _png()), ("b.png", _png()), ("a.png", _png())])
    two = _tar(tmp_path / "b.tar", [("b.png", _png()), ("c.png", b"bad")])
    (tmp_path / "other").mkdir()
    other = _tar(tmp_path / "other" / "c.tar", [("c.png", _png())])  # another folder may be another data set
    report = _check(one, two, other)
    assert not report.ok
    assert [line for line in report.duplicate_keys if "'a'" in line and "a.tar" in line]
    assert [line for line in report.duplicate_keys if "'b'" in line and "a.tar" in line and "b.tar" in line]
    assert not [line for line in report.duplicate_keys if "'c'" in line]
    assert len(report.bad_members) == 1  # the duplicates did not end the check


def test_a_dotted_file_name_is_explained(tmp_path: Path) -> None:
    report = _check(_tar(tmp_path / "a.tar", [("img.v2.001.jpg", _png())]))
    assert "sample 'img'" in report.bad_members[0] and "second dot" in report.bad_members[0]


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "exploded",))

    import pickle

    bomb = pickle.dumps(Bomb())
    names = [f"a.{extension}" for extension in ("pyd", "pickle", "pth", "npy")]
    report = _check(_tar(tmp_path / "a.tar", [("a.png", _png()), *((name, bomb) for name in names)]))
    assert report.ok and report.samples == 1
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)
    assert (tmp_path / "exploded").exists()  # it would have gone off


def test_names_that_match_nothing(tmp_path: Path) -> None:
    with pytest.raises(V2FlowError, match="no shard matches"):
        _check(tmp_path / "*.tar")
