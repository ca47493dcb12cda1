"""A training that was stopped and resumed is the one in a piece: samples, losses, logged steps and validations."""

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from v2flow.cli import main

sys.path.insert(0, str(Path(__file__).parent / "faults"))

from harness import variant, write_toys


class SignalAt(Callback):
    """Sends a signal to this process at the n-th batch or validation batch, or raises a `RuntimeError` there."""

    def __init__(self, where: str, count: int, number: int) -> None:
        self.where, self.left, self.number = where, count, number

    def _count(self, where: str) -> None:
        if where == self.where:
            self.left -= 1
            if self.left == 0 and self.number:
                os.kill(os.getpid(), self.number)
            elif self.left == 0:
                raise RuntimeError("the power is gone")

    def on_train_batch_start(self, *_: Any) -> None:
        self._count("batch_start")

    def on_train_batch_end(self, *_: Any) -> None:
        self._count("batch_end")

    def on_validation_batch_end(self, *_: Any) -> None:
        self._count("validation")


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Six batches an epoch, four a step, a validation every five."""
    return write_toys("tokenizer", tmp_path_factory.mktemp("toys"))


def fit(path: str, *words: str, at: tuple[str, int, int] | None = None, status: int = 0) -> None:
    """`v2flow fit`, with a signal, and the exit status that it ends with."""
    callback = []
    if at is not None:
        values = zip(("where", "count", "number"), at, strict=True)
        callback = ["--trainer.callbacks+=test_resume.SignalAt"]
        callback += [f"--trainer.callbacks.{name}={value}" for name, value in values]
    assert main(["fit", "--config", path, *callback, *words]) == status


def lineage(folder: Path) -> list[str]:
    lines = json.loads((folder / "lineage.json").read_text())
    (folder / "lineage.json").unlink()
    return lines


@pytest.fixture(scope="module")
def whole(toys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The lines of the training in a piece: 24 batches in eight steps, and four validations of six pictures."""
    folder = tmp_path_factory.mktemp("whole")
    fit(variant(toys, folder, 0))
    lines = lineage(folder)
    assert len(lines) == 28 and sum("batches 3" in line for line in lines) == 4
    return lines


def newest(folder: Path) -> Path:
    return max(folder.glob("run/version_*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.parametrize(
    ("where", "count", "number", "batches"),
    [
        ("batch_start", 8, signal.SIGTERM, 10),  # its accumulation is finished first
        ("batch_end", 18, signal.SIGINT, 18),  # the last batch of an epoch
        ("validation", 4, signal.SIGTERM, 10),  # the second validation; an accumulation's last batch
        ("validation", 2, signal.SIGTERM, 5),  # one batch of an accumulation is done
    ],
)
def test_a_signal_saves_between_two_steps_and_the_resume_is_exact(
    toys: dict[str, Any], whole: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str],
    where: str, count: int, number: int, batches: int,
) -> None:  # fmt: skip
    path = variant(toys, tmp_path, 0)
    with pytest.raises(SystemExit) as stopped:
        fit(path, at=(where, count, int(number)))
    assert stopped.value.code == 128 + number
    saved = newest(tmp_path)
    checkpoint = torch.load(saved, weights_only=True)
    assert checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == batches
    assert ("accumulated_gradients" in checkpoint) == (batches == 5)
    error = capfd.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("v2flow: stopped by")]
    step = checkpoint["global_step"]
    assert signal.Signals(number).name in line and str(saved) in line and f"after step {step};" in line
    assert not (tmp_path / "lineage.json").exists()

    fit(path, "--ckpt_path", str(saved))
    assert lineage(tmp_path) == whole


def test_a_second_ctrl_c_stops_at_once(toys: dict[str, Any], tmp_path: Path) -> None:
    path = variant(toys, tmp_path, 0)
    first = ["--trainer.callbacks+=test_resume.SignalAt"]
    first += ["--trainer.callbacks.where=batch_start", "--trainer.callbacks.count=2"]
    first += [f"--trainer.callbacks.number={int(signal.SIGINT)}"]
    before = signal.getsignal(signal.SIGINT)
    fit(path, *first, at=("batch_end", 2, int(signal.SIGINT)), status=130)
    assert signal.getsignal(signal.SIGINT) is before  # Lightning leaves it ignored
    assert not list(tmp_path.glob("run/*/checkpoints/*.ckpt"))


def test_a_checkpoint_amid_an_accumulation_holds_its_gradients(
    toys: dict[str, Any], whole: list[str], tmp_path: Path
) -> None:
    """`last.ckpt` follows the validation after five batches; the power goes with the sixth."""
    path = variant(toys, tmp_path, 0)
    with pytest.raises(RuntimeError, match="power"):
        fit(path, at=("batch_end", 6, 0))
    saved = newest(tmp_path)
    checkpoint = torch.load(saved, weights_only=True)
    assert checkpoint["accumulated_gradients"].keys() <= checkpoint["current_model_state"].keys()
    fit(path, "--ckpt_path", "last")
    assert lineage(tmp_path) == whole

    # Without them the next step is another one.
    del checkpoint["accumulated_gradients"]
    torch.save(checkpoint, tmp_path / "without.ckpt")
    fit(path, "--ckpt_path", str(tmp_path / "without.ckpt"))
    without = lineage(tmp_path)
    assert without[:7] == whole[:7] and without != whole


def test_last_is_the_newest_run_and_starts_anew_without_one(
    toys: dict[str, Any], whole: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    path = variant(toys, tmp_path, 0)
    with caplog.at_level(logging.INFO):
        fit(path, "--ckpt_path", "last", "--trainer.max_steps=3")
    assert f"--ckpt_path last: no */checkpoints/last*.ckpt in {tmp_path / 'run'} yet" in caplog.text
    fit(path, "--ckpt_path", "last", "--trainer.max_steps=5")
    (tmp_path / "run" / "version_2").mkdir()  # a run that ended before it saved anything
    fit(path, "--ckpt_path", "last")
    assert lineage(tmp_path) == whole
    capfd.readouterr()
    assert main(["validate", "--config", variant(toys, tmp_path / "none", 0), "--ckpt_path", "last"]) == 2
    assert "option --ckpt_path last: expected" in capfd.readouterr().err


@pytest.mark.parametrize(
    "kind", [1, 3]
)  # saving after each step; the validations of 3 fall on the ends of epochs
def test_stopped_at_the_ends_of_epochs_in_a_row(toys: dict[str, Any], tmp_path: Path, kind: int) -> None:
    fit(variant(toys, tmp_path, kind))
    whole = lineage(tmp_path)
    path = variant(toys, tmp_path / "stopped", kind)
    for batch in (13, 7, 5):  # after 12, 18 and 22 batches
        with pytest.raises(RuntimeError, match="power"):
            fit(path, "--ckpt_path", "last", at=("batch_start", batch, 0))
    fit(path, "--ckpt_path", "last")
    assert lineage(tmp_path / "stopped") == whole


def test_a_training_without_validation_is_lengthened(toys: dict[str, Any], tmp_path: Path) -> None:
    """It saves at the end of each epoch, which the last step cuts short."""
    fit(variant(toys, tmp_path, 2))
    whole = lineage(tmp_path)
    fit(variant(toys, tmp_path / "two", 2), "--trainer.max_steps=3")
    assert len(lineage(tmp_path / "two")) == 10
    fit(variant(toys, tmp_path / "two", 2), "--ckpt_path", "last", "--trainer.max_steps=6")
    assert len(lineage(tmp_path / "two")) == 18  # three epochs
    fit(variant(toys, tmp_path / "two", 2), "--ckpt_path", "last")
    assert lineage(tmp_path / "two") == whole


def test_slurm_is_told_to_run_the_job_again(
    toys: dict[str, Any], whole: list[str], tmp_path: Path, slurm_requests: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Lightning's own handler saves and requeues, but between two steps; the next job finds the checkpoint itself."""
    path = variant(toys, tmp_path, 0)
    with pytest.raises(SystemExit) as stopped:
        fit(path, at=("batch_start", 8, int(signal.SIGUSR1)))
    assert stopped.value.code == 128 + signal.SIGUSR1
    assert slurm_requests.read_text().split() == ["requeue", "77"]
    assert torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 3
    assert "saved a checkpoint for SLURM" in capfd.readouterr().err
    fit(path)
    assert lineage(tmp_path) == whole


def test_handlers_are_put_back(toys: dict[str, Any], tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    fit(variant(toys, tmp_path, 0), "--trainer.max_steps=1")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
