"""Checkpoint files: whole after a crash at any moment of writing, checked when read, and the one before is kept."""

import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from v2flow.errors import V2FlowError
from v2flow.training import checkpoint_files
from v2flow.training.checkpoint import read_checkpoint
from v2flow.training.checkpoint_files import damage, previous_of, usable_checkpoint, write_checkpoint
from v2flow.training.checkpoint_io import CheckedCheckpointIO

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*resumed from a checkpoint that ended before the epoch ended"),
]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is a new process as far as files known to be sound are concerned."""
    monkeypatch.setattr(checkpoint_files, "_sound", set())
    monkeypatch.setattr(checkpoint_files, "_warned", set())


def content(step: int) -> dict[str, Any]:
    weight = torch.full((300,), float(step))
    return {"global_step": step, "state_dict": {"model.weight": weight}, "v2flow": {"model": "M"}}


def written(path: Path, *steps: int) -> Path:
    for step in steps:
        write_checkpoint(content(step), path)
    return path


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_others_read_the_file_and_its_checksum(tmp_path: Path) -> None:
    path = written(tmp_path / "deep" / "last.ckpt", 3)
    for mmap in (False, True):
        found = torch.load(path, weights_only=True, mmap=mmap)
        assert found["global_step"] == 3
        assert torch.equal(found["state_dict"]["model.weight"], torch.full((300,), 3.0))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"v2flow-sha256:")
    assert damage(path) is None
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    path = written(tmp_path / "last.ckpt", 3)
    data = path.read_bytes()
    for place in [*range(0, len(data) - 78, 97), len(data) - 10]:
        flip(path, place)
        assert damage(path) is not None, place
        path.write_bytes(data)
    assert damage(path) is None


@pytest.mark.parametrize("keep", [0, 1, 1000, -79, -78, -40, -1])
def test_a_file_cut_short_is_found(tmp_path: Path, keep: int) -> None:
    path = written(tmp_path / "last.ckpt", 3)
    path.write_bytes(path.read_bytes()[:keep])
    assert damage(path) in ("it is cut short", "it is empty")
    assert damage(path, quick=True) in ("it is cut short", "it is empty")


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    path = written(tmp_path / "last.ckpt", 1, 2, 3)
    assert read_checkpoint(path)["global_step"] == 3
    assert read_checkpoint(previous_of(path))["global_step"] == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "last.previous.ckpt"]


@pytest.mark.parametrize("harm", ["flipped", "cut", "missing"])
@pytest.mark.parametrize("mmap", [False, True])
def test_a_damaged_one_gives_way_to_the_one_before(
    tmp_path: Path, harm: str, mmap: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path / "last.ckpt", 1, 2)
    if harm == "flipped":
        flip(path, 800)
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    else:
        path.unlink()
    with caplog.at_level(logging.WARNING):
        first, second = read_checkpoint(path, mmap), read_checkpoint(path, mmap)
    if mmap and harm == "flipped":
        assert first["global_step"] == 2  # a look at the description does not read it all
        return
    assert first["global_step"] == second["global_step"] == 1
    (warning,) = caplog.messages
    assert str(path) in warning and str(previous_of(path)) in warning


def test_a_damaged_one_of_slurms_gives_way_to_the_one_with_the_next_lower_number(tmp_path: Path) -> None:
    paths = {number: written(tmp_path / f"hpc_ckpt_{number}.ckpt", number) for number in (2, 9, 10, 11)}
    flip(paths[10], 800)
    assert usable_checkpoint(paths[10]) == paths[9]
    flip(paths[9], 800)
    assert usable_checkpoint(paths[10]) == paths[2]
    flip(paths[2], 800)
    with pytest.raises(
        V2FlowError, match=r"hpc_ckpt_9.ckpt \(its checksum is wrong\), nor .*hpc_ckpt_2.ckpt"
    ):
        usable_checkpoint(paths[10])


def test_two_damaged_ones_are_an_error_that_names_both(tmp_path: Path) -> None:
    path = written(tmp_path / "last.ckpt", 1, 2)
    flip(path, 800)
    flip(previous_of(path), 800)
    with pytest.raises(V2FlowError) as caught:
        usable_checkpoint(path)
    assert str(path) in str(caught.value) and str(previous_of(path)) in str(caught.value)


def test_a_damaged_one_does_not_replace_the_good_one_before(tmp_path: Path) -> None:
    """After a resume from the one before, writing must not leave a single good file."""
    path = written(tmp_path / "last.ckpt", 1, 2)
    flip(path, 800)
    written(path, 3)
    assert read_checkpoint(path)["global_step"] == 3
    assert read_checkpoint(previous_of(path))["global_step"] == 1


def test_a_checkpoint_without_a_checksum_still_loads(tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    torch.save(content(5), path)
    assert read_checkpoint(path)["global_step"] == 5
    written(path, 6)
    assert read_checkpoint(previous_of(path))["global_step"] == 5


class Disk:
    """The module `os`, whose process dies at the n-th call that touches the disk."""

    def __init__(self, left: int, links: bool) -> None:
        self.left, self.links = left, links

    def __getattr__(self, name: str) -> Any:
        if name == "link" and not self.links:
            return self.no_links
        return self.mortal(getattr(os, name)) if name in ("fsync", "link", "replace") else getattr(os, name)

    def no_links(self, *_: Any) -> None:
        raise OSError("no hard links here")

    def mortal(self, call: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                os._exit(9)
            return call(*arguments)

        return wrapped


def write_and_die(path: Path, step: int, after: int, links: bool) -> bool:
    """Writes in a process that dies at a moment; whether it came to its end."""
    child = os.fork()
    if child == 0:
        disk = Disk(after, links)
        checkpoint_files.os = disk  # type: ignore[attr-defined]
        append = checkpoint_files._append_checksum
        checkpoint_files._append_checksum = disk.mortal(
            append
        )  # the archive is written, but not its checksum
        write, writes = checkpoint_files._HashingFile.write, iter(range(1000))
        mortal = disk.mortal(write)
        checkpoint_files._HashingFile.write = (  # type: ignore[method-assign]
            lambda *arguments: mortal(*arguments) if next(writes) in (0, 9) else write(*arguments)
        )
        written(path, step)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("links", [True, False])
def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, links: bool) -> None:
    """Every call that touches the disk is the last one, once; what it leaves is the old state or the new one."""
    moments, done = 0, False
    while not done:
        path = written(tmp_path / str(moments) / "last.ckpt", 1, 2)
        done = write_and_die(path, 3, moments, links)
        moments += 1
        checkpoint_files._sound.clear()
        assert read_checkpoint(path)["global_step"] in ((3,) if done else (2, 3))
        # The next run writes there again, over whatever was left behind.
        written(path, 4, 5)
        assert [read_checkpoint(p)["global_step"] for p in (path, previous_of(path))] == [5, 4]
        assert sorted(file.name for file in path.parent.iterdir()) == ["last.ckpt", "last.previous.ckpt"]
    assert moments > 7


# --- under Lightning --------------------------------------------------------------------------------------------


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, steps: int, resume: Path | None = None) -> Model:
    saver = ModelCheckpoint(folder, filename="last", every_n_train_steps=1, enable_version_counter=False)
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, callbacks=[saver], plugins=[CheckedCheckpointIO()],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    torch.manual_seed(0)
    module = Model()
    trainer.fit(module, DataLoader(torch.ones(8, 3, 2), batch_size=None), ckpt_path=resume)
    return module


def test_a_training_resumes_from_the_one_before_a_damaged_last_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = fit(tmp_path / "whole", 5)
    folder = tmp_path / "broken"
    fit(folder, 3)
    flip(folder / "last.ckpt", 800)
    with caplog.at_level(logging.WARNING, logger="v2flow"):
        resumed = fit(folder, 5, folder / "last.ckpt")
    assert len([record for record in caplog.records if record.name.startswith("v2flow")]) == 1
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    names = ["last.ckpt", "last.previous.ckpt"]
    assert [torch.load(folder / name, weights_only=True)["global_step"] for name in names] == [5, 4]


def test_removing_a_checkpoint_removes_the_one_before_it(tmp_path: Path) -> None:
    path = written(tmp_path / "best.ckpt", 1, 2)
    CheckedCheckpointIO().remove_checkpoint(path)
    assert list(tmp_path.iterdir()) == []
