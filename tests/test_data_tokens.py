"""Token shards: ids are the tokenizer's, captions and scenes stay, order and batches depend on integers alone."""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_toys import write_tar
from t2i_training_toys import CAPTIONS, Toys, toy_tokenizer, write_pictures

from v2flow import V2FlowTokenizer
from v2flow.cli import main
from v2flow.data.manifest import read_manifest
from v2flow.data.order import BUCKETS, LengthBucketedOrder, ShuffledOrder
from v2flow.data.shards import open_shards
from v2flow.data.tokens import build_tokens, check_source, source_of
from v2flow.data.views import shifted, view_of
from v2flow.errors import V2FlowError
from v2flow.fingerprint import tokenizer_sha256
from v2flow.training.data_module import ShardDataModule
from v2flow.training.token_data_module import TokenDataModule

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]


def data(toys: Toys, **options: Any) -> TokenDataModule:
    splits = {split: toys.shards(split) for split in ("train", "val", "test")}
    return TokenDataModule(**splits | {"batch_size": 4, "seed": 3} | options)


def test_ids_are_the_tokenizers(toys: Toys) -> None:
    tokenizer = V2FlowTokenizer.from_pretrained(toys.tokenizer)
    folder = Path(toys.pictures).parent
    for split, count in (("train", 24), ("val", 6), ("test", 6)):
        found = members(toys.tokens / f"{split}-000000.tar")
        originals = members(folder / f"{split}-000000.tar")
        assert len(found) == 2 * count
        loader = ShardDataModule(16, val=str(folder / f"{split}-000000.tar"), batch_size=5).val_dataloader()
        for batch in loader:
            ids = tokenizer.encode(batch["image"])[batch["valid"]]
            for key, row in zip(batch["key"], ids, strict=False):
                facts = json.loads(found[f"{key}.json"])
                assert facts["ids"] == row.tolist()
                assert facts["number"] == json.loads(originals[f"{key}.json"])["number"], (
                    "the picture's own json stays"
                )
                assert found[f"{key}.txt"] == originals[f"{key}.txt"]
    used = {i for name, text in members(toys.tokens / "train-000000.tar").items() if name.endswith("json")
            for i in json.loads(text)["ids"]}  # fmt: skip
    assert len(used) > 1


def test_manifest_names_the_tokenizer(toys: Toys) -> None:
    build, _ = read_manifest((toys.tokens / "manifest.json").read_text(), "manifest")
    tokenizer = V2FlowTokenizer.from_pretrained(toys.tokenizer)
    assert build["tokenizer_sha256"] == tokenizer_sha256(tokenizer)
    assert (build["kind"], build["codebook_size"], build["num_tokens"]) == ("tokens", 32, 4)


def test_every_part_of_the_tokenizer_counts(toys: Toys) -> None:
    names = {tokenizer_sha256(V2FlowTokenizer.from_pretrained(toys.tokenizer))}
    for part in ("resampler", "visual_vocabulary", "decoder"):
        tokenizer = V2FlowTokenizer.from_pretrained(toys.tokenizer)
        state = getattr(tokenizer, part).state_dict()
        next(t for t in state.values() if t.is_floating_point()).add_(1e-3)
        names.add(tokenizer_sha256(tokenizer))
    assert len(names) == 4


def test_command_builds_once(toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "tokens", toys.tokenizer, "--data", toys.pictures, "--out", str(tmp_path / "out")]
    assert main([*words, "--batch-size", "7", "--json", str(tmp_path / "counts.json")]) == 0
    assert json.loads((tmp_path / "counts.json").read_text()) == {
        "samples": {"train": 24, "val": 6, "test": 6}
    }
    for split in ("train", "val", "test"):
        shard = f"{split}-000000.tar"
        assert (tmp_path / "out" / shard).read_bytes() == (toys.tokens / shard).read_bytes(), (
            "whatever the batch"
        )
    stamp = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert main(words) == 0
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == stamp
    toy_tokenizer(seed=4).save_pretrained(tmp_path / "other")
    words[2] = str(tmp_path / "other")
    capsys.readouterr()
    assert main(words) == 2
    assert "built with other settings (tokenizer_sha256)" in capsys.readouterr().err


def test_views_of_training_pictures(toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ids of a view are the tokenizer's ids of the moved picture; the other splits stay as they are."""
    words = ["data", "tokens", toys.tokenizer, "--data", toys.pictures, "--views", "3"]
    assert main([*words, "--out", str(tmp_path / "out"), "--json", str(tmp_path / "counts.json")]) == 0
    assert json.loads((tmp_path / "counts.json").read_text())["samples"] == {"train": 72, "val": 6, "test": 6}
    found, plain = (members(folder / "train-000000.tar") for folder in (tmp_path / "out", toys.tokens))
    assert {name: found[name] for name in plain} == plain
    tokenizer = V2FlowTokenizer.from_pretrained(toys.tokenizer)
    shards = str(Path(toys.pictures).parent / "train-000000.tar")
    (batch,) = ShardDataModule(16, val=shards, batch_size=24).val_dataloader()
    for view in (1, 2):
        for picture, key in zip(batch["image"], batch["key"], strict=True):
            caption = plain[f"{key}.txt"].decode()
            ids = tokenizer.encode(view_of(picture, caption, key, view)[None])[0].tolist()
            assert json.loads(found[f"{key}-{view}.json"])["ids"] == ids
            assert found[f"{key}-{view}.txt"].decode() == caption
    assert main([*words[:-1], "10", "--out", str(tmp_path / "more")]) == 2
    assert (
        "option views: expected 1 to 9 (the shifts of pictures of 16 pixels), found 10"
        in capsys.readouterr().err
    )


def test_a_view_does_not_take_the_key_of_another_picture(
    toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told before anything is encoded."""
    red = members(Path(toys.pictures.replace("*", "train-000000")))
    write_tar(tmp_path / "train-000000.tar", [
        (f"{key}.{end}", red[f"train000.{end}"]) for key in ("cat", "cat-1") for end in ("png", "txt")
    ])  # fmt: skip
    out = str(tmp_path / "tokens")
    words = ["data", "tokens", toys.tokenizer, "--data", str(tmp_path / "train-000000.tar"), "--out", out]
    assert main([*words, "--views", "3"]) == 2
    error = capsys.readouterr().err
    assert "sample 'cat': option --views: " in error and "of another picture, 'cat-1'" in error
    assert not Path(out).exists() and main(words) == 0


def test_views_are_shifts_and_mirror_images() -> None:
    picture = torch.rand(3, 32, 32)
    moves = range(-2, 3)
    plain = {(x, y): shifted(picture, x, y) for x in moves for y in moves}
    torch.testing.assert_close(plain[2, -1][:, :31, 2:], picture[:, 1:, :30])
    assert (plain[2, -1][:, :, :2] == plain[2, -1][:, :, 2:3]).all(), "the edge is repeated"
    mirrored = {(x, y): shifted(picture.flip(-1), x, y) for x in moves for y in moves}

    def found(caption: str, key: str) -> list[int]:
        choices = [*plain.values(), *mirrored.values()]
        views = [view_of(picture, caption, key, view) for view in range(25)]
        return [next(i for i, each in enumerate(choices) if torch.equal(each, view)) for view in views]

    for caption, both in (("a strawberry", True), ("hand pointing LEFT", False), ("nine o’clock", False)):
        order = found(caption, "some key")
        assert order[0] == 12 and len(set(order)) == 25
        assert any(i >= 25 for i in order) == both
    assert (
        found("a strawberry", "some key")
        == found("a strawberry", "some key")
        != found("a strawberry", "other")
    )


@pytest.mark.parametrize(("name", "caption", "expected"), [
    ("pictures-000000", b"a red thing", "expected a shard named train-*, val-*, test-*"),
    ("train-000000", b" ", "no caption"),
    ("train-000000", None, "no caption"),
])  # fmt: skip
def test_bad_pictures_are_refused(
    toys: Toys, tmp_path: Path, name: str, caption: bytes | None, expected: str
) -> None:
    write_pictures(tmp_path / "good", {"train": 1})
    picture = members(tmp_path / "good" / "train-000000.tar")["train000.png"]
    texts = [] if caption is None else [("a.txt", caption)]
    path = write_tar(tmp_path / "bad" / f"{name}.tar", [("a.png", picture), *texts])
    with pytest.raises(V2FlowError, match=expected.replace("*", r"\*")) as caught:
        build_tokens(toys.tokenizer, path, tmp_path / "out", progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_batches_hold_ids_captions_and_keys(toys: Toys) -> None:
    stored = members(toys.tokens / "train-000000.tar")
    seen = []
    for batch in data(toys).train_dataloader():
        assert batch["ids"].dtype == torch.int64 and batch["ids"].shape == (4, 4)
        for row, (key, caption) in enumerate(zip(batch["key"], batch["caption"], strict=True)):
            assert json.loads(stored[f"{key}.json"])["ids"] == batch["ids"][row].tolist()
            assert stored[f"{key}.txt"].decode() == caption
        seen += batch["key"]
    assert len(seen) == len(set(seen)) == 24


@pytest.mark.parametrize("window", [0, 16])
def test_order_does_not_depend_on_workers(toys: Toys, window: int) -> None:
    def epochs(workers: int) -> list[list[str]]:
        module = data(toys, num_workers=workers, length_window=window)
        loader = module.train_dataloader()
        keys = [[key for batch in loader for key in batch["key"]] for _ in range(2)]
        module.teardown("fit")
        return keys

    expected = epochs(0)
    assert expected[0] != expected[1] and sorted(expected[0]) == sorted(expected[1])
    assert epochs(3) == expected


def test_a_saved_position_continues(toys: Toys) -> None:
    whole = [batch["key"] for batch in data(toys, length_window=16).train_dataloader()]
    loader = iter(first := data(toys, length_window=16).train_dataloader())
    begun = [next(loader)["key"] for _ in range(2)]
    second = data(toys, length_window=16).train_dataloader()
    second.load_state_dict(first.state_dict())
    assert begun + [batch["key"] for batch in second] == whole


def test_evaluation_is_in_order_and_padded(toys: Toys) -> None:
    batches = list(data(toys, eval_batch_size=4).val_dataloader())
    keys = [key for b in batches for key, valid in zip(b["key"], b["valid"].tolist(), strict=True) if valid]
    assert keys == [f"val{i:03d}" for i in range(6)]
    assert [len(batch["ids"]) for batch in batches] == [4, 4]
    assert sum(len(b["valid"]) for b in data(toys, val_limit=3, eval_batch_size=4).val_dataloader()) == 4


def test_buckets_are_windows_of_the_shuffled_order() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 200)
    plain = ShuffledOrder([120, 80], 5)
    order = LengthBucketedOrder([120, 80], 5, lengths, 64)
    whole = order.samples(1, 0, 200)
    for low in range(0, 200, 64):
        window = whole[low : low + 64]
        assert sorted(window) == sorted(plain.samples(1, low, min(low + 64, 200)))
    spread = [np.ptp(lengths[whole[i : i + 8]]) for i in range(0, 192, 8)]
    assert max(spread) < 40 and np.mean(spread) < 99 / BUCKETS * 1.5
    assert np.any(np.diff([lengths[whole[i : i + 8]].mean() for i in range(0, 64, 8)]) < 0), (
        "parts are permuted"
    )
    assert not np.array_equal(whole, order.samples(2, 0, 200))
    for start, stop in ((0, 1), (60, 70), (63, 129), (199, 200), (7, 7)):
        assert np.array_equal(order.samples(1, start, stop), whole[start:stop])


def test_long_captions_are_each_found_once(toys: Toys) -> None:
    module, longest = data(toys), {"a few green things", "a few white things"}
    assert set(module.long_captions("train", tokens=17)) == longest
    assert set(module.long_captions("train", tokens=0)) == set(CAPTIONS)
    assert set(module.long_captions("train", tokens=0, count=4)) == longest  # two samples each
    assert module.long_captions("train", tokens=18) == {}
    assert (
        "train-000000.tar, sample 'train009'"
        in module.long_captions("train", tokens=17)["a few green things"]
    )


def test_shards_of_other_kinds_are_refused(toys: Toys, tmp_path: Path) -> None:
    source = source_of(V2FlowTokenizer.from_pretrained(toys.tokenizer))
    check_source(open_shards(toys.shards("train")), source)
    shutil_copy = tmp_path / "copy"
    shutil_copy.mkdir()
    (shutil_copy / "train-000000.tar").write_bytes((toys.tokens / "train-000000.tar").read_bytes())
    check_source(open_shards(str(shutil_copy / "*.tar")), source)  # no manifest says anything
    manifest = json.loads((toys.tokens / "manifest.json").read_text())
    manifest["build"] = {"kind": "openmoji"}
    (shutil_copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(V2FlowError, match="expected shards of token ids, found 'openmoji'"):
        check_source(open_shards(str(shutil_copy / "*.tar")), source)


def test_bad_ids_are_one_line(tmp_path: Path) -> None:
    for text in (b"{}", b'{"ids": [0.5]}', b'{"ids": [[1]]}', b"no json"):
        path = write_tar(tmp_path / "train-0.tar", [("a.txt", b"red"), ("a.json", text)])
        with pytest.raises(V2FlowError, match="'ids'") as caught:
            next(iter(TokenDataModule(train=path, batch_size=1).train_dataloader()))
        assert "\n" not in str(caught.value)
    rows = [("a.txt", b"red"), ("a.json", b'{"ids": [1]}'), ("b.txt", b"red"), ("b.json", b'{"ids": [1, 2]}')]
    path = write_tar(tmp_path / "train-1.tar", rows)
    with pytest.raises(V2FlowError, match="same number of ids in every sample, found 1 and 2"):
        next(iter(TokenDataModule(train=path, batch_size=2).train_dataloader()))
