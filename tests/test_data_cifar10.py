"""CIFAR-10's archive as shards: each picture once, without loss, under its class; other archives are refused."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_toys import cifar10_records, write_cifar10
from PIL import Image

from v2flow.cli import main
from v2flow.data.cifar10 import CLASSES, FILES, build_cifar10
from v2flow.errors import V2FlowError
from v2flow.training.data_module import ShardDataModule

EACH = 12


@pytest.fixture(scope="module")
def records() -> dict[str, np.ndarray]:
    return cifar10_records(EACH)


@pytest.fixture(scope="module")
def archive(records: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {name: rows.tobytes() for name, rows in records.items()}
    return write_cifar10(tmp_path_factory.mktemp("archive") / "cifar-10-binary.tar.gz", files)


def read(shard: Path) -> list[tuple[str, np.ndarray, str]]:
    """Key, pixels `[32, 32, 3]` and caption of each sample."""
    with tarfile.open(shard) as file:
        members = {member.name: file.extractfile(member).read() for member in file}  # type: ignore[union-attr]
    keys = [name.removesuffix(".png") for name in members if name.endswith(".png")]
    picture = {key: np.asarray(Image.open(io.BytesIO(members[f"{key}.png"]))) for key in keys}
    return [(key, picture[key], members[f"{key}.txt"].decode()) for key in keys]


def test_each_picture_is_there_once_under_its_class(
    records: dict[str, np.ndarray], archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "cifar10", str(archive), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{5 * EACH} train, {EACH} test: {tmp_path / 'out'}\n"
    for split in ("train", "test"):
        rows = np.concatenate([rows for name, rows in records.items() if FILES[name] == split])
        expected = {}
        for row in rows:  # red, green and blue planes, by the archive's description
            planes = [row[1 + c * 1024 : 1 + (c + 1) * 1024].reshape(32, 32) for c in range(3)]
            expected[np.stack(planes, axis=2).tobytes()] = CLASSES[row[0]]
        samples = read(tmp_path / "out" / f"{split}-000000.tar")
        assert {pixels.tobytes(): text.split()[-1] for _, pixels, text in samples} == expected
        assert [key for key, _, _ in samples] == [f"{split}_{i:06d}" for i in range(len(rows))]
        assert [pixels.tobytes() for _, pixels, _ in samples] != [*expected], "not shuffled"
    assert {text.split()[3] for _, _, text in samples if text.split()[-1][0] != "a"} == {"a"}


def test_same_archive_same_bytes(archive: Path, tmp_path: Path) -> None:
    for folder in ("a", "b", "a"):
        build_cifar10(archive, tmp_path / folder)
    assert (tmp_path / "a/train-000000.tar").read_bytes() == (tmp_path / "b/train-000000.tar").read_bytes()


def test_shards_can_be_read(archive: Path, tmp_path: Path) -> None:
    build_cifar10(archive, tmp_path)
    loader = ShardDataModule(32, val=str(tmp_path / "train-*.tar"), batch_size=10).val_dataloader()
    batch = next(iter(loader))
    assert batch["image"].shape == (10, 3, 32, 32) and torch.isfinite(batch["image"]).all()


def test_other_archives_are_refused(records: dict[str, np.ndarray], archive: Path, tmp_path: Path) -> None:
    files = {name: rows.tobytes() for name, rows in records.items()}
    wrong = {
        "no such archive": tmp_path / "missing.tar.gz",
        "no file test_batch.bin": write_cifar10(
            tmp_path / "less.tar.gz", {n: files[n] for n in files if "data" in n}
        ),
        "expected 1 to 10,000 pictures of 3073 bytes": write_cifar10(
            tmp_path / "short.tar.gz", files | {"test_batch.bin": b"a"}
        ),
        "expected classes 0 to 9, found 10": write_cifar10(
            tmp_path / "hundred.tar.gz", files | {"test_batch.bin": b"\n" + files["test_batch.bin"][1:]}
        ),
    }
    for name, data in {
        "text": b"no archive", "cut": archive.read_bytes()[:-5000], "no tar": gzip.compress(bytes(range(256)) * 9),
        "damaged": (whole := archive.read_bytes())[:2000] + bytes(400) + whole[2400:],
    }.items():  # fmt: skip
        path = tmp_path / f"{name}.tar.gz"
        path.write_bytes(data)
        with pytest.raises(V2FlowError, match="found no whole archive.*load it again"):
            build_cifar10(path, tmp_path / "out")
    for message, path in wrong.items():
        with pytest.raises(V2FlowError, match=message) as error:
            build_cifar10(path, tmp_path / "out")
        assert str(path) in str(error.value)
    assert not (tmp_path / "out").exists()
