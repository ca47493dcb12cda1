"""Writing shards: complete under their final names, or not there at all."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from v2flow.data.manifest import MANIFEST, read_manifest
from v2flow.data.writer import STAGING, Sample, finished_build, write_shards
from v2flow.errors import V2FlowError

BUILD = {"kind": "test", "size": 8}


def _samples(count: int, split: str = "train") -> list[Sample]:
    return [Sample(split, f"{split}{i}", {"png": bytes([i]) * (i + 1), "txt": b"word"}) for i in range(count)]


def test_shards_hold_what_was_written_and_the_manifest_says_so(tmp_path: Path) -> None:
    out = tmp_path / "set"
    samples = _samples(5) + _samples(1, "val")
    counts = write_shards(out, samples, BUILD, samples_per_shard=2, texts={"NOTICE": "hello"})
    assert counts == {"train": 5, "val": 1}
    names = [f"train-00000{i}.tar" for i in range(3)] + ["val-000000.tar"]
    assert sorted(p.name for p in out.iterdir()) == sorted([*names, "NOTICE", MANIFEST])
    build, indexes = read_manifest((out / MANIFEST).read_text(), MANIFEST)
    assert build == BUILD
    assert [len(indexes[name]) for name in names] == [2, 2, 1, 1]
    found = {}
    for name in names:
        with tarfile.open(out / name) as archive:
            found |= {m.name: archive.extractfile(m).read() for m in archive}
    assert found == {f"{s.key}.{e}": data for s in samples for e, data in s.members.items()}


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_shards(tmp_path / name, _samples(3), BUILD)
    for file in ("train-000000.tar", MANIFEST):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train1", "two samples of the key 'train1'"),
        ("img.v2", "'img.v2' is empty or has a dot"),
        ("", "empty"),
    ],
)
def test_bad_keys_are_refused_and_leave_nothing(tmp_path: Path, key: str, message: str) -> None:
    with pytest.raises(V2FlowError, match=message):
        write_shards(tmp_path / "set", [*_samples(3), Sample("val", key, {"png": b"x"})], BUILD)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_build_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> Iterator[Sample]:
        yield from _samples(3)
        raise error

    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(error):
            write_shards(tmp_path / name, interrupted(), BUILD, samples_per_shard=1)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_no_samples(tmp_path: Path) -> None:
    with pytest.raises(V2FlowError, match="no samples"):
        write_shards(tmp_path / "set", [], BUILD)
    assert not (tmp_path / "set").exists()


def test_a_finished_build_is_recognised_by_its_recipe(tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert finished_build(out, BUILD) is None
    counts = write_shards(out, _samples(3), BUILD)
    assert finished_build(out, BUILD) == counts
    with pytest.raises(V2FlowError, match=r"other settings \(size\)"):
        finished_build(out, BUILD | {"size": 16})


def test_a_build_that_lost_a_shard_is_built_again(tmp_path: Path) -> None:
    write_shards(tmp_path, _samples(3), BUILD, samples_per_shard=2)
    (tmp_path / "train-000001.tar").write_bytes(b"")
    assert finished_build(tmp_path, BUILD) is None
    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, _interrupted(), BUILD, samples_per_shard=2)
    assert finished_build(tmp_path, BUILD) is None, "not in the way of the next"
    counts = write_shards(tmp_path, _samples(3), BUILD, samples_per_shard=2)
    assert finished_build(tmp_path, BUILD) == counts


def _interrupted() -> Iterator[Sample]:
    yield from _samples(1)
    raise KeyboardInterrupt


def test_two_builds_of_one_folder_do_not_meet(tmp_path: Path) -> None:
    """The second is refused while the first is at work, and leaves it alone; what a killed one left is cleared."""
    out = tmp_path / "set"

    def first() -> Iterator[Sample]:
        yield from _samples(2)
        with pytest.raises(V2FlowError, match="set: another process is building these shards; wait"):
            write_shards(out, _samples(3), BUILD)
        yield from list(_samples(3))[2:]

    assert write_shards(out, first(), BUILD) == write_shards(tmp_path / "alone", _samples(3), BUILD)
    assert (out / "train-000000.tar").read_bytes() == (tmp_path / "alone" / "train-000000.tar").read_bytes()
    (tmp_path / "killed" / STAGING).mkdir(parents=True)
    assert write_shards(tmp_path / "killed", _samples(3), BUILD)


def test_shards_of_others_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.tar").write_bytes(b"precious")
    with pytest.raises(V2FlowError, match=r"mine\.tar: a shard without manifest"):
        finished_build(tmp_path, BUILD)
