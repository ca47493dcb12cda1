"""Loaders: the same batches for any workers and ranks, exact positions, padding, bad samples, augmentation."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from data_toys import encode, number_of, numbered_shards, write_tar
from PIL import Image

from v2flow.data.batches import EvaluationBatches, SampleReader, TrainBatches
from v2flow.data.loaders import EvaluationLoader, TrainLoader
from v2flow.data.shards import open_shards
from v2flow.errors import V2FlowError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")


SIZES = [30, 17, 25]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V2FLOW_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pattern(tmp_path: Path) -> str:
    return numbered_shards(tmp_path / "shards", SIZES)


def train_loader(pattern: str, batch_size: int = 4, seed: int = 3, **options: Any) -> TrainLoader:
    augment = {k: options.pop(k, False) for k in ("random_crop", "flip")}
    max_bad = options.pop("max_bad", 0)
    reader = SampleReader(open_shards(pattern, progress=False), options.pop("size", 8))
    return TrainLoader(TrainBatches(reader, seed, max_bad=max_bad, **augment), batch_size, **options)


def numbers(batch: dict[str, Any]) -> list[int]:
    found = [number_of(image) for image in batch["image"]]
    assert batch["key"] == [f"{n:06d}" for n in found] and batch["caption"] == [f"number {n}" for n in found]
    return found


def epoch(loader: TrainLoader) -> list[list[int]]:
    return [numbers(batch) for batch in loader]


def test_batches_do_not_depend_on_workers(pattern: str) -> None:
    expected = [epoch(loader := train_loader(pattern)), epoch(loader)]
    assert expected[0] != expected[1]
    for workers in (1, 3):
        loader = train_loader(pattern, num_workers=workers)
        assert [epoch(loader), epoch(loader)] == expected
        loader.close()


def test_ranks_share_out_the_same_global_batches(pattern: str) -> None:
    alone = epoch(train_loader(pattern, batch_size=12))
    for ranks in (2, 3, 4):
        parts = [
            epoch(train_loader(pattern, batch_size=12 // ranks, rank=r, ranks=ranks)) for r in range(ranks)
        ]
        assert [sum(batch, []) for batch in zip(*parts, strict=True)] == alone


def test_an_epoch_is_a_permutation_without_the_last_partial_batch(pattern: str) -> None:
    loader = train_loader(pattern, batch_size=5)
    seen = sum(epoch(loader), [])
    assert len(loader) == 14 and len(seen) == len(set(seen)) == 70
    assert seen != sorted(seen)


@pytest.mark.parametrize(
    ("batch_size", "ranks", "way"),
    [
        (20, 4, "use data.batch_size 18 or less, or 3 devices in all"),
        (73, 1, "use data.batch_size 72 or less"),
        (80, 2, "use data.batch_size 36 or less"),
        (2, 80, "use 36 devices in all"),
        (73, 80, "use data.batch_size 1 and 72 devices in all"),
    ],
)
def test_a_batch_of_more_than_all_samples_is_told_the_nearest(
    pattern: str, batch_size: int, ranks: int, way: str
) -> None:
    message = f"training shards: 72 samples are fewer than one batch of {batch_size * ranks}; {way}"
    with pytest.raises(V2FlowError, match=f"^{re.escape(message)}$"):
        train_loader(pattern, batch_size=batch_size, ranks=ranks)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("stop", [0, 1, 7, 18])
def test_resume_is_exact_wherever_it_stopped(pattern: str, workers: int, stop: int) -> None:
    """Batches that workers had prepared and nobody took do not count."""
    loader = train_loader(pattern, flip=True)
    whole = [numbers(b) for _ in range(3) for b in loader]
    first = train_loader(pattern, flip=True, num_workers=workers)
    batches = iter(first)
    taken = [numbers(next(batches)) for _ in range(stop)]
    state = first.state_dict()
    assert state == {"seed": 3, "epoch": 0, "samples": 4 * stop, **first.batches.facts}
    first.close()
    resumed = train_loader(pattern, flip=True, num_workers=workers)
    resumed.load_state_dict(state)
    rest = [numbers(b) for _ in range(2) for b in resumed]
    assert (taken + rest) == whole[: len(taken + rest)] and len(rest) >= 18


def test_resume_with_other_ranks_and_batch_sizes_goes_on_in_the_same_order(pattern: str) -> None:
    one = train_loader(pattern, batch_size=8)
    taken = [numbers(batch) for batch, _ in zip(one, range(3), strict=False)]
    whole = sum(epoch(train_loader(pattern, batch_size=1)), [])
    assert sum(taken, []) == whole[:24]
    state = {"seed": 3, "epoch": 0, "samples": 24}
    for size, ranks in ((4, 2), (2, 3), (8, 1), (5, 1)):
        parts = []
        for rank in range(ranks):
            loader = train_loader(pattern, batch_size=size, rank=rank, ranks=ranks)
            loader.load_state_dict(state)
            parts.append(epoch(loader))
        rest = sum((sum(batch, []) for batch in zip(*parts, strict=True)), [])
        assert rest == whole[24 : 24 + len(rest)] and len(rest) > 48 - size * ranks


def test_a_state_of_another_seed_is_refused(pattern: str) -> None:
    with pytest.raises(V2FlowError, match="trained with 4, found 3"):
        train_loader(pattern).load_state_dict({"seed": 4, "epoch": 0, "samples": 0})


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ([30, 17, 25, 8], "72 samples (shards: 3), found 80 samples (shards: 4)"),
        ([30, 17, 24], "72 samples (shards: 3), found 71 samples (shards: 3)"),
        ([72], "72 samples (shards: 3), found 72 samples (shards: 1)"),
        ([17, 30, 25], "72 samples (shards: 3), found as many with other keys, captions or in another order"),
    ],
    ids=["one more shard", "one sample less", "other shards", "another order"],
)
def test_a_state_of_other_samples_is_refused(
    tmp_path: Path, pattern: str, sizes: list[int], found: str
) -> None:
    state = train_loader(pattern).state_dict()
    other = train_loader(numbered_shards(tmp_path / "other", sizes))
    with pytest.raises(V2FlowError) as caught:
        other.load_state_dict(state)
    assert str(caught.value).startswith(f"option data.train: the checkpoint was trained on {found}; resume")


def windowed(pattern: str, window: int) -> TrainLoader:
    reader = SampleReader(open_shards(pattern, progress=False), 8)
    return TrainLoader(TrainBatches(reader, 3, False, False, 0, window), 4)


def test_a_state_of_another_length_window_or_of_longer_captions_is_refused(
    tmp_path: Path, pattern: str
) -> None:
    state = windowed(pattern, 16).state_dict()
    with pytest.raises(
        V2FlowError, match=r"data.length_window: the checkpoint was trained with 16, found 0;"
    ):
        train_loader(pattern).load_state_dict(state)
    picture = encode(Image.new("RGB", (8, 8)))
    for number, length in enumerate((3, 4)):  # lengths decide the order within a window
        members = [
            (f"{i}.{end}", data) for i in range(9) for end, data in (("png", picture), ("txt", b"x" * i))
        ]
        write_tar(tmp_path / str(number) / "a.tar", [*members, ("9.png", picture), ("9.txt", b"x" * length)])
    one, other = (str(tmp_path / str(number) / "a.tar") for number in (0, 1))
    with pytest.raises(V2FlowError, match="found as many with other keys, captions"):
        windowed(other, 16).load_state_dict(windowed(one, 16).state_dict())
    train_loader(other).load_state_dict(train_loader(one).state_dict())


def test_a_state_goes_with_copies_of_the_shards_and_one_without_facts_with_any(
    tmp_path: Path, pattern: str
) -> None:
    state = train_loader(pattern, num_workers=1).state_dict()
    copied = numbered_shards(tmp_path / "copied", SIZES, {3: encode(Image.new("RGB", (9, 9)))})
    train_loader(copied, batch_size=2, ranks=2, rank=1).load_state_dict(state)
    train_loader(copied).load_state_dict({"seed": 3, "epoch": 0, "samples": 4})


def test_set_epoch_and_repeat(pattern: str) -> None:
    plain = train_loader(pattern)
    epochs = [epoch(plain) for _ in range(3)]
    jump = train_loader(pattern)
    jump.batch_sampler.sampler.set_epoch(2)
    assert epoch(jump) == epochs[2]
    again = train_loader(pattern, repeat=True)
    assert epoch(again) == epoch(again) == epochs[0]


def test_global_random_state_is_left_alone(pattern: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    epoch(train_loader(pattern, flip=True, random_crop=True))
    assert torch.equal(torch.rand(3), expected)


def striped(tmp_path: Path, count: int = 40) -> str:
    """Pictures 24 × 8 whose columns grow from left to right, so that crops and flips show."""
    columns = torch.arange(24, dtype=torch.uint8).mul(10).repeat(8, 1)
    pixels = columns[..., None].repeat(1, 1, 3).numpy()
    members = [(f"{i:03d}.png", encode(pixels)) for i in range(count)]
    return write_tar(tmp_path / "striped.tar", members)


def test_draws_belong_to_positions(tmp_path: Path) -> None:
    """Crops and flips are those of (seed, epoch, position): equal for other workers, ranks and after a resume."""
    path = striped(tmp_path)
    options: dict[str, Any] = {"random_crop": True, "flip": True}

    def images(loader: TrainLoader) -> torch.Tensor:
        return torch.cat([batch["image"] for batch in loader])

    whole = images(train_loader(path, 8, **options))
    assert torch.equal(images(train_loader(path, 8, num_workers=3, **options)), whole)
    parts = [train_loader(path, 4, rank=r, ranks=2, **options) for r in range(2)]
    merged = torch.cat([b["image"] for pair in zip(*parts, strict=True) for b in pair])
    assert torch.equal(merged, whole)
    resumed = train_loader(path, 8, **options)
    resumed.load_state_dict({"seed": 3, "epoch": 0, "samples": 16})
    assert torch.equal(images(resumed), whole[16:])
    loader = train_loader(path, 8, **options)
    assert not torch.equal(images(loader), images(loader)), "drawn anew in each epoch"
    for one in options:  # all pictures are alike, so only the draws can make two epochs differ
        loader = train_loader(path, 8, **{one: True})
        assert not torch.equal(images(loader), images(loader)), f"{one} is drawn anew in each epoch"

    first, last = (whole[:, 0, 0, place] * 25.5 for place in (0, -1))
    flipped = first > last
    assert 0.25 < flipped.float().mean() < 0.75
    left = torch.minimum(first, last).round().long()
    assert left.min() <= 2 and left.max() >= 14 and len(left.unique()) > 8, "crops lie all along the picture"
    centre = images(train_loader(path, 8))
    assert torch.equal(centre, centre[:1].expand_as(centre))
    assert (centre[0, 0, 0] * 25.5).round().tolist() == list(range(8, 16))


def test_batches_are_pictures_in_0_to_1(pattern: str) -> None:
    batch = next(iter(train_loader(pattern)))
    image = batch["image"]
    assert image.dtype == torch.float32 and image.shape == (4, 3, 8, 8) and image.is_contiguous()
    assert image.min() >= 0 and image.max() <= 1 and torch.equal((image * 255).round() / 255, image)


BAD = {5: b"not a picture", 21: encode(Image.new("RGB", (8, 8)), "JPEG")[:50], 40: b""}


def test_bad_samples_are_replaced_by_the_next_good_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = numbered_shards(tmp_path / "good", [72])
    bad = numbered_shards(tmp_path / "bad", [72], BAD)
    order = train_loader(good).batches.order.samples(0, 0, 72).tolist()
    expected = []
    for position in range(72):
        while order[position % 72] in BAD:
            position += 1
        expected.append(order[position % 72])
    for workers in (0, 3):
        caplog.clear()
        loader = train_loader(bad, max_bad=3, num_workers=workers)
        assert sum(epoch(loader), []) == expected
        epoch(loader)
        skipped = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert len(skipped) == 3, "each bad sample is logged once"
        assert any("s-000000.tar, sample '000005': not a JPEG, PNG or WebP" in line for line in skipped)
        loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_name_shard_and_key(tmp_path: Path, workers: int) -> None:
    bad = numbered_shards(tmp_path / "bad", [72], BAD)
    with pytest.raises(
        V2FlowError, match=r"s-000000.tar, sample '0000\d\d': .* more than max_bad_samples=2"
    ) as caught:
        epoch(train_loader(bad, max_bad=2, num_workers=workers))
    assert "\n" not in str(caught.value)
    nothing = numbered_shards(tmp_path / "nothing", [9], dict.fromkeys(range(9), b"x"))
    with pytest.raises(V2FlowError, match="bad samples"):
        epoch(train_loader(nothing, max_bad=100, num_workers=workers))


def evaluation(pattern: str, batch_size: int, limit: int | None = None, **options: Any) -> EvaluationLoader:
    shards = open_shards(pattern, progress=False)
    reader = SampleReader(shards, 8)
    return EvaluationLoader(EvaluationBatches(reader, limit or len(shards)), batch_size, **options)


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 10), (2, 10), (3, 7), (5, 32)])
def test_evaluation_counts_each_sample_once_in_equal_steps(
    pattern: str, workers: int, ranks: int, batch_size: int
) -> None:
    seen: list[int] = []
    steps = set()
    for rank in range(ranks):
        batches = list(evaluation(pattern, batch_size, rank=rank, ranks=ranks, num_workers=workers))
        steps.add(len(batches))
        for batch in batches:
            assert batch["image"].shape == (batch_size, 3, 8, 8) and batch["valid"].dtype == torch.bool
            seen += [n for n, valid in zip(numbers(batch), batch["valid"], strict=True) if valid]
    assert sorted(seen) == list(range(72)) and steps == {-(-72 // (batch_size * ranks))}
    assert ranks > 1 or seen == sorted(seen)


def test_evaluation_of_the_first_samples_and_of_bad_ones(tmp_path: Path, pattern: str) -> None:
    (batch,) = evaluation(pattern, 8, limit=6)
    assert batch["valid"].tolist() == [True] * 6 + [False] * 2
    bad = numbered_shards(tmp_path / "bad", [8], {2: b"x", 7: b"y"})
    (batch,) = evaluation(bad, 10, max_bad=2)
    assert batch["valid"].tolist() == [n not in (2, 7, 8, 9) for n in range(10)]
    assert batch["image"].isfinite().all()
    with pytest.raises(V2FlowError, match="sample '000007'.*more than max_bad_samples=1"):
        list(evaluation(bad, 10, max_bad=1))


def test_captions_only_where_they_are_required(tmp_path: Path) -> None:
    picture = encode(Image.new("RGB", (8, 8)))
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("a.png", picture), ("a.json", b'{"caption": "from json"}'),
            ("b.png", picture), ("b.json", b'{"width": 8}'),
            ("c.png", picture), ("c.cls", b"3"),
        ],
    )  # fmt: skip
    shards = open_shards(path, progress=False)
    (batch,) = EvaluationLoader(EvaluationBatches(SampleReader(shards, 8), 3), 3)
    assert batch["caption"] == ["from json", "", ""]
    for workers in (0, 1):
        strict = EvaluationBatches(SampleReader(shards, 8, captions=True), 3)
        with pytest.raises(V2FlowError, match=r"a.tar, sample 'b': no caption") as caught:
            list(EvaluationLoader(strict, 3, num_workers=workers))
        assert "\n" not in str(caught.value)


def test_decoded_pictures_kept_in_memory_are_the_same(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = open_shards(pattern, progress=False)
    reader = SampleReader(shards, 8, cache=True)
    reader._room = 50 * 8 * 8 * 3
    loader = TrainLoader(TrainBatches(reader, 3, False, True, 0), 4)
    plain = train_loader(pattern, flip=True)
    for _ in range(3):
        for one, other in zip(loader, plain, strict=True):
            assert torch.equal(one["image"], other["image"])
    assert len(reader._decoded) == 50, "and no more memory than allowed"
    read: list[int] = []
    monkeypatch.setattr(shards, "read", lambda sample, field: read.append(field) or b"")
    for sample in reader._decoded:
        reader.content(sample)
    assert read == []
