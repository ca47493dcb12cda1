"""Every exit status that docs/command-line.md names occurs, each in a run of the real command."""

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from training_toys import experiment, write, write_shards

from v2flow.cli import main

PAGE = "docs/command-line.md"
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class SendSignals(Callback):
    """Sends this process signals after the first training step, or the first batch of `v2flow validate`."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.state.fn == "validate":
            self._send()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            self._send()

    def _send(self) -> None:
        for number in self.numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # two signals at once could be taken for one


class Breaks(Callback):
    """Has a mistake in its code."""

    def on_fit_start(self, *_: Any) -> None:
        raise ZeroDivisionError("a callback's own")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_shards(tmp_path_factory.mktemp("shards"))


def train(shards: dict[str, str], folder: Path, callback: str, verb: str = "fit", **options: Any) -> int:
    """`v2flow fit` of two steps, or another verb, with a callback of this file."""
    folder.mkdir(exist_ok=True)
    config = experiment(shards, folder, max_steps=2)
    config["model"]["init_args"]["decode_modes"] = {"one_step": {"steps": 1, "temperature": 0.0}}
    config["trainer"]["callbacks"] += [{"class_path": f"test_exit_status.{callback}", "init_args": options}]
    return main([verb, "--config", write(config, folder / "e.yaml")])


def stopped_by(number: int, shards: dict[str, str], folder: Path, verb: str = "fit") -> int:
    """Exit status of a training or validation that a signal has stopped."""
    with pytest.raises(SystemExit) as stopped:
        train(shards, folder, "SendSignals", verb, numbers=[int(number)])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_every_documented_status_is_in_the_help_and_has_a_test_here(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documented = re.findall(r"^\| (\d+) \|", (repository / PAGE).read_text(), re.MULTILINE)
    tested = {name.split("_")[2] for name in globals() if name.startswith("test_status_")}
    assert len(documented) > 5 and set(documented) == tested
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out.partition("Exit status:")[2]
    assert re.findall(r"\d+", said) == documented


def test_status_0_after_success(tmp_path: Path) -> None:
    few = ["--train", "2", "--val", "2", "--test", "2", "--out", str(tmp_path / "shapes")]
    assert main(["data", "shapes", *few]) == 0
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0


def test_status_1_with_a_traceback_after_an_error_that_is_no_user_s(
    shards: dict[str, str], tmp_path: Path
) -> None:
    """The command lets it through, and Python ends with its traceback and 1."""
    with pytest.raises(ZeroDivisionError):
        train(shards, tmp_path, "Breaks")


def test_status_2_with_one_line_after_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "nowhere.ckpt", "nowhere"]) == 2
    assert re.fullmatch(r"v2flow: error: nowhere\.ckpt: .+\n", capsys.readouterr().err)


def test_status_130_after_ctrl_c(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "shapes"
    # A shell ignores Ctrl-C in what it starts in the background, and so would these tests in a script.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def press() -> None:
        end = time.monotonic() + 60
        while not out.exists() and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    assert main(["data", "shapes", "--train", "10000000", "--out", str(out)]) == 130
    assert "v2flow: interrupted" in capsys.readouterr().err


def test_status_130_of_trainings(
    shards: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C stops after the step; a second one at once, where Lightning would end with 1."""
    assert stopped_by(signal.SIGINT, shards, tmp_path) == 130
    assert "go on with --ckpt_path" in capsys.readouterr().err
    twice = {"numbers": [int(signal.SIGINT), int(signal.SIGINT)]}
    assert train(shards, tmp_path / "twice", "SendSignals", **twice) == 130
    assert "v2flow: interrupted" in capsys.readouterr().err


def test_status_138_after_slurm_has_been_asked_to_run_the_job_again(
    shards: dict[str, str], tmp_path: Path, slurm_requests: Path
) -> None:
    assert stopped_by(signal.SIGUSR1, shards, tmp_path) == 138
    assert slurm_requests.read_text().split() == ["requeue", "77"]


def test_status_141_when_the_reader_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    few = ["--train", "2", "--val", "2", "--test", "2", "--out", str(tmp_path / "shapes")]
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["data", "shapes", *few]) == 141
    assert capsys.readouterr().err == ""


def test_status_143_after_sigterm(
    shards: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stopped_by(signal.SIGTERM, shards, tmp_path) == 143
    line = capsys.readouterr().err.strip().splitlines()[-1]
    (saved,) = re.findall(r"--ckpt_path (\S+\.ckpt)", line)
    assert Path(saved).is_file()
    assert stopped_by(signal.SIGTERM, shards, tmp_path, "validate") == 143  # Lightning alone would end with 0
