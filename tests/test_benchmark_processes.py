"""A benchmark that is stopped stops its trainings too, and no two processes ever train a row in one folder."""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_benchmark import run, write_experiment, write_suite

from v2flow.benchmark.plan import plan_suite
from v2flow.benchmark.processes import LOCK, holding
from v2flow.benchmark.runs import training_folder
from v2flow.benchmark.suite import read_suite
from v2flow.training.checkpoint import read_checkpoint

LONG = ["--model.init_args.optimizer.total_steps=1000000"]
ROWS = [
    {"name": name, "arguments": [f"--model.init_args.tokenizer.resampler.key_dim={size}"]}
    for name, size in (("one", 4), ("two", 12))
]


def in_use(folder: Path) -> bool:
    with (folder / LOCK).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def trainings(benchmark: int) -> list[int]:
    lists = Path(f"/proc/{benchmark}/task").glob("*/children")
    return [int(word) for path in lists for word in path.read_text().split()]


def stopped_step(folder: Path, signal_name: str) -> int:
    """The step after which a training says that it was stopped, which its checkpoint has to be of."""
    text = (folder / "fit.log").read_text()
    said = re.search(rf"stopped by {signal_name} after step (\d+); go on with --ckpt_path (\S+)", text)
    assert said is not None, text[-1000:]
    found: int = read_checkpoint(said[2])["global_step"]
    assert found == int(said[1])
    return found


def folders(suite: Path) -> list[Path]:
    read = read_suite(suite)
    plan = plan_suite(read, suite.parent / "out", progress=False)
    return [training_folder(read, plan, row, 3, suite.parent / "runs") for row in plan.rows]


def wait_for(what: Callable[[], bool], benchmark: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 200
    while not what():
        assert benchmark.poll() is None, benchmark.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


@contextmanager
def benchmark_of(suite: Path, at_work: int) -> Iterator["subprocess.Popen[str]"]:
    """A benchmark of all rows at once, once `at_work` of them, which would train for hours, have a checkpoint."""
    words = [
        "benchmark",
        str(suite),
        "--out",
        str(suite.parent / "out"),
        "--runs",
        str(suite.parent / "runs"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "v2flow", *words, "--jobs", "3"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that starts the tests in the background has them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        pattern = "runs/*/fit/*/checkpoints/last.ckpt"
        wait_for(lambda: len(list(suite.parent.glob(pattern))) == at_work, process)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigterm_stops_the_trainings_with_checkpoints_after_a_failure_too(tmp_path: Path) -> None:
    """One row fails, and the benchmark waits for the others before it says so."""
    write_experiment(tmp_path)
    breaks = {"name": "breaks", "arguments": ["--data.batch_size=1000"]}
    suite = write_suite(tmp_path, rows=[*ROWS, breaks], arguments=LONG)
    *at_work, failed = folders(suite)
    with benchmark_of(suite, len(ROWS)) as benchmark:
        log = failed / "fit.log"
        wait_for(
            lambda: log.is_file() and "v2flow: error" in log.read_text() and not in_use(failed), benchmark
        )
        assert all(in_use(folder) for folder in at_work)
        benchmark.terminate()
        _, error = benchmark.communicate(timeout=200)
    assert benchmark.returncode == 143
    assert "finished rows are kept" in error and "Traceback" not in error
    for folder in at_work:
        assert stopped_step(folder, "SIGTERM") > 0 and not in_use(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_in_a_terminal_reaches_everyone_and_stops_each_once(tmp_path: Path) -> None:
    """The terminal's signal goes to the trainings as well; another from the benchmark would be a second Ctrl-C."""
    write_experiment(tmp_path)
    suite = write_suite(tmp_path, rows=ROWS[:1], arguments=LONG)
    (folder,) = folders(suite)
    with benchmark_of(suite, 1) as benchmark:
        os.killpg(benchmark.pid, signal.SIGINT)
        _, error = benchmark.communicate(timeout=200)
    assert benchmark.returncode == 130 and "Traceback" not in error
    assert stopped_step(folder, "SIGINT") > 0 and not in_use(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_row_that_outlives_its_benchmark_is_not_trained_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_experiment(tmp_path)
    suite = write_suite(tmp_path, rows=ROWS[:1], arguments=LONG)
    (folder,) = folders(suite)
    with benchmark_of(suite, 1) as benchmark:
        (left,) = trainings(benchmark.pid)
        benchmark.kill()
        benchmark.wait()
        assert run(suite) == 2
        assert "another process trains or scores it" in capsys.readouterr().err
        os.kill(left, signal.SIGKILL)
        end = time.monotonic() + 60
        while in_use(folder):
            assert time.monotonic() < end
            time.sleep(0.05)


def test_no_further_row_begins_after_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_experiment(tmp_path)
    suite = write_suite(tmp_path, rows=ROWS)
    first, *others = folders(suite)
    with holding("a test", first):
        assert run(suite) == 2
    assert "row 'one': another process trains or scores it" in capsys.readouterr().err
    assert not any(folder.exists() for folder in others)
