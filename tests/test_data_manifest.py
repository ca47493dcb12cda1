"""Indexes of tar files and manifests: complete shards only, one clear line for everything else."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from data_toys import numbered_picture, numbered_shards, write_tar

from v2flow.data.manifest import FIELDS, MANIFEST, ShardIndex, cached_index, index_tar, write_manifest
from v2flow.data.shards import open_shards
from v2flow.errors import V2FlowError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("V2FLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def one_line(path: str) -> str:
    with pytest.raises(V2FlowError) as caught:
        open_shards(path, progress=False)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    return message


def test_the_index_reads_what_webdataset_reads(tmp_path: Path) -> None:
    """Same keys and bytes, with img2dataset's members, directories, upper case, meta files and long names."""
    long = "directory.v1/" + "x" * 150
    members = [
        ("__meta__/info.json", b"{}"),
        ("000000001.jpg", b"picture 1"),
        ("000000001.txt", b"one"),
        ("000000001.json", b'{"caption": "one"}'),
        ("n01440764/n01440764_10026.JPEG", b"picture 2"),
        ("n01440764/n01440764_10026.cls", b"7"),
        (f"{long}.webp", b"picture 3"),
        (f"{long}.seg.png", b"mask"),
        ("last.txt", b"no picture"),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    shards = open_shards(path, progress=False)
    found = [
        {f: data for n, f in enumerate(FIELDS) if (data := shards.read(i, n)) is not None}
        for i in range(len(shards))
    ]
    expected = list(webdataset.WebDataset(path, shardshuffle=False, empty_check=False))
    assert [shards.key(i) for i in range(len(shards))] == [sample["__key__"] for sample in expected]
    assert found == [
        {"image": b"picture 1", "txt": b"one", "json": b'{"caption": "one"}'},
        {"image": b"picture 2", "cls": b"7"},
        {"image": b"picture 3"},
        {"txt": b"no picture"},
    ]
    for sample, fields in zip(expected, found, strict=True):
        images = [sample[e] for e in ("jpg", "jpeg", "webp") if e in sample]
        assert fields.get("image") == (images[0] if images else None)


def test_shared_photographs_match_webdataset(shared_data: Path) -> None:
    path = shared_data / "imagenet-sample" / "val-000000.tar"
    shards = open_shards(str(path), progress=False)
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert len(shards) == len(samples) == 500
    for i in (0, 1, 250, 499):
        assert shards.key(i) == samples[i]["__key__"]
        assert shards.read(i, 0) == samples[i]["jpg"] and shards.read(i, 1) == samples[i]["txt"]


@pytest.mark.parametrize("with_manifest", [False, True])
def test_a_tar_cut_anywhere_is_an_error(tmp_path: Path, with_manifest: bool) -> None:
    folder = tmp_path / "shards"
    numbered_shards(folder, [5])
    path = folder / "s-000000.tar"
    whole, index = path.read_bytes(), index_tar(path)
    if with_manifest:
        write_manifest(folder, {path.name: index}, {})
    ends = index.members[:, :2].sum(2).max(1)
    boundary = -(-int(ends[2]) // 512) * 512  # after the third sample
    inside = int(index.members[3, 0, 0]) + 10
    header = boundary + 100
    for cut in (boundary, inside, header, int(index.members[2, 1, 0])):
        path.write_bytes(whole[:cut])
        message = one_line(str(path))
        assert message.startswith(f"{path}: ")
        assert "cut short" in message
        if with_manifest:
            left = 3 if cut >= boundary else 2
            assert f"{left} samples in {cut} bytes" in message and "manifest says 5 samples" in message
    path.write_bytes(whole)
    assert len(open_shards(str(path), progress=False)) == 5


def test_a_tar_closed_after_fewer_samples_than_the_manifest_says(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    numbered_shards(folder, [30])
    path = folder / "s-000000.tar"
    write_manifest(folder, {path.name: index_tar(path)}, {})
    numbered_shards(folder, [12])
    assert "manifest says 30 samples" in one_line(str(path))
    numbered_shards(folder, [60])
    assert "manifest says 30 samples" in one_line(str(path))


def test_empty_missing_and_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "zero.tar").write_bytes(b"")
    write_tar(tmp_path / "none.tar", [])
    (tmp_path / "text.tar").write_bytes(b"no tar at all " * 100)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    assert "empty file" in one_line(str(tmp_path / "zero.tar"))
    assert "empty tar" in one_line(str(tmp_path / "none.tar"))
    assert "uncompressed tar" in one_line(str(tmp_path / "text.tar"))
    assert "uncompressed tar" in one_line(str(tmp_path / "packed.tar"))
    assert "no such shard" in one_line(str(tmp_path / "missing-000001.tar"))
    assert "found a folder" in one_line(str(tmp_path))


def test_two_samples_of_one_key(tmp_path: Path) -> None:
    picture = numbered_picture(1)
    apart = write_tar(tmp_path / "a.tar", [("x.png", picture), ("y.png", picture), ("x.jpg", picture)])
    assert "'x'" in one_line(apart) and "two samples" in one_line(apart)
    twice = write_tar(tmp_path / "b.tar", [("x.png", picture), ("x.png", picture)])
    assert "x.png" in one_line(twice)
    first = write_tar(tmp_path / "c" / "1.tar", [("k.png", picture), ("m.png", picture)])
    second = write_tar(tmp_path / "c" / "2.tar", [("n.png", picture), ("m.png", picture)])
    message = one_line(str(tmp_path / "c" / "*.tar"))
    assert "'m'" in message and first in message and second in message
    write_tar(tmp_path / "d" / "1.tar", [("m.png", picture)])  # another data set may use the same key
    assert len(open_shards([first, str(tmp_path / "d" / "1.tar")], progress=False)) == 3


def test_manifest_round_trip_and_damage(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    pattern = numbered_shards(folder, [3, 4])
    indexes = {path.name: index_tar(path) for path in folder.glob("*.tar")}
    scanned = open_shards(pattern, progress=False)
    write_manifest(folder, indexes, {"kind": "test"})
    listed = open_shards(pattern, progress=False)
    assert listed.sizes == scanned.sizes == [3, 4]
    for one, other in zip(listed.shards, scanned.shards, strict=True):
        np.testing.assert_array_equal(one.index.members, other.index.members)
        assert one.index.keys.tolist() == other.index.keys.tolist()
    document = json.loads((folder / MANIFEST).read_text())
    for damage in ("{", "[]", '{"format": "other"}', json.dumps(document | {"shards": [{"file": "x"}]})):
        (folder / MANIFEST).write_text(damage)
        assert MANIFEST in one_line(pattern)
    document["shards"][0]["samples"] += 1
    (folder / MANIFEST).write_text(json.dumps(document))
    assert "says 4 samples and names 3" in one_line(pattern)


def test_the_cached_index_is_used_until_the_file_changes(tmp_path: Path, own_cache: Path) -> None:
    pattern = numbered_shards(tmp_path / "shards", [3])
    assert len(open_shards(pattern, progress=False)) == 3
    (stored,) = own_cache.rglob("*.npz")
    before = stored.stat().st_mtime_ns
    open_shards(pattern, progress=False)
    assert stored.stat().st_mtime_ns == before
    numbered_shards(tmp_path / "shards", [7])
    assert len(open_shards(pattern, progress=False)) == 7
    for damaged in own_cache.rglob("*.npz"):
        damaged.write_bytes(b"PK damaged")
    assert len(open_shards(pattern, progress=False)) == 7
    assert not list(own_cache.rglob("*.tmp"))


def test_a_read_only_folder_of_shards_stays_untouched(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    numbered_shards(folder, [2])
    before = sorted(os.listdir(folder))
    open_shards(str(folder / "*.tar"), progress=False)
    assert sorted(os.listdir(folder)) == before


class Bomb:
    def __reduce__(self) -> tuple:
        return (os.mkdir, (os.environ["V2FLOW_TEST_BOMB"],))


def test_pickled_members_are_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from v2flow.data.batches import EvaluationBatches, Request, SampleReader
    from v2flow.data.validate import validate_shards

    target = tmp_path / "exploded"
    monkeypatch.setenv("V2FLOW_TEST_BOMB", str(target))
    payload = pickle.dumps(Bomb())
    names = ("pyd", "pickle", "pkl", "pth", "npy", "jpg")
    path = write_tar(
        tmp_path / "a.tar", [("a.png", numbered_picture(5)), *((f"a.{name}", payload) for name in names)]
    )
    batch = EvaluationBatches(SampleReader(open_shards(path, progress=False), 8), 1)[Request(0, 0, 1)]
    assert batch.error is None and batch.tensors["image"][0, 0, 0, 0] == 5
    assert validate_shards(path, progress=False, processes=1).ok
    assert not target.exists()
    pickle.loads(payload)  # the payload would have worked
    assert target.is_dir()


def test_a_damaged_cache_cannot_run_code(tmp_path: Path) -> None:
    """The index cache is read without pickle, so that a foreign file there is only made anew."""
    path = write_tar(tmp_path / "a.tar", [("a.png", numbered_picture(5))])
    cached_index(Path(path), "name", "1")
    (stored,) = (tmp_path / "cache").rglob("*.npz")
    np.savez(stored, size=1, keys=np.array([{"an": "object"}], dtype=object), members=np.zeros((1, 4, 2)))
    index = cached_index(Path(path), "name", "1")
    assert isinstance(index, ShardIndex) and index.key(0) == "a"
