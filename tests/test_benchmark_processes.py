"""A benchmark that is stopped stops its trainings too, and no two processes ever train a row in one folder."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_benchmark import run, write_experiment, write_suite

from v2flow.benchmark.processes import LOCK

LONG = ["--model.init_args.optimizer.total_steps=1000000"]


def wait_for(what: Callable[[], bool], benchmark: "subprocess.Popen[str]", seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert benchmark.poll() is None, benchmark.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def in_use(folder: Path) -> bool:
    with (folder / LOCK).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def step(folder: Path) -> int:
    (checkpoint,) = folder.glob("fit/*/checkpoints/last.ckpt")
    found: int = torch.load(checkpoint, weights_only=False)["global_step"]
    return found


def trainings(benchmark: int) -> list[int]:
    lists = Path(f"/proc/{benchmark}/task").glob("*/children")
    return [int(word) for path in lists for word in path.read_text().split()]


@pytest.fixture
def benchmark(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A benchmark of two rows at once, each of which has a checkpoint and would train for hours."""
    write_experiment(tmp_path)
    suite = write_suite(tmp_path, arguments=LONG)
    words = ["benchmark", str(suite), "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    process = subprocess.Popen(
        [sys.executable, "-m", "v2flow", *words, "--jobs", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that starts the tests in the background has them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        wait_for(lambda: len(list(tmp_path.glob("runs/*/fit/*/checkpoints/last.ckpt"))) == 2, process)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_sigterm_stops_the_trainings_with_checkpoints(
    benchmark: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    folders = sorted((tmp_path / "runs").iterdir())
    steps = [step(folder) for folder in folders]
    benchmark.terminate()
    _, error = benchmark.communicate(timeout=120)
    assert benchmark.returncode == 143
    assert "finished rows are kept" in error and "Traceback" not in error
    for folder, before in zip(folders, steps, strict=True):
        assert not in_use(folder)
        assert "stopped by SIGTERM after step" in (folder / "fit.log").read_text()
        assert step(folder) >= before


def test_ctrl_c_in_a_terminal_reaches_everyone_and_stops_each_once(
    benchmark: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    """The terminal's signal goes to the trainings as well; another from the benchmark would be a second Ctrl-C."""
    os.killpg(benchmark.pid, signal.SIGINT)
    _, error = benchmark.communicate(timeout=120)
    assert benchmark.returncode == 130 and "Traceback" not in error
    for folder in (tmp_path / "runs").iterdir():
        assert "stopped by SIGINT after step" in (folder / "fit.log").read_text()


def test_a_row_that_outlives_its_benchmark_is_not_trained_twice(
    benchmark: "subprocess.Popen[str]", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = trainings(benchmark.pid)
    assert len(left) == 2
    benchmark.kill()
    benchmark.wait()
    suite = tmp_path / "suite.yaml"
    assert run(suite) == 2
    assert "another process trains or scores it" in capsys.readouterr().err
    for number in left:
        os.kill(number, signal.SIGKILL)
    folders = list((tmp_path / "runs").iterdir())
    end = time.monotonic() + 30
    while any(in_use(folder) for folder in folders):
        assert time.monotonic() < end
        time.sleep(0.05)
