"""Full and read-only disks, memory that is used up, and clocks that jump: what each part promises by itself."""

import errno
import io
import logging
import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_toys import numbered_picture, numbered_shards
from torch.utils.data import TensorDataset

from v2flow.data import disk
from v2flow.data.batches import Batch, EvaluationBatches, Request, SampleReader
from v2flow.data.fetching import fetch_shard
from v2flow.data.http import HttpLimits, HttpStream
from v2flow.data.loaders import EvaluationLoader, _Workers
from v2flow.data.manifest import MANIFEST
from v2flow.data.shards import open_shards
from v2flow.data.writer import Sample, write_shards
from v2flow.errors import V2FlowError
from v2flow.training import progress
from v2flow.training.checkpoint_files import (
    newest_checkpoint,
    previous_of,
    usable_checkpoint,
    write_checkpoint,
)
from v2flow.training.exhaustion import clear_exhaustion


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("V2FLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def limited(limit: int, most: int, work: Callable[[], Any]) -> str:
    """What a `V2FlowError` of `work` says, in a process with a limit such as RLIMIT_FSIZE."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        text = "no error"
        try:
            resource.setrlimit(limit, (most, resource.getrlimit(limit)[1]))
            work()
        except V2FlowError as error:
            text = str(error)
        except BaseException as error:
            text = f"another error: {error!r}"
        finally:
            os.write(writing, text.encode())
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as file:
        return file.read()


# --- disk ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint({"step": 1}, path)
    write_checkpoint({"step": 2}, path)
    large = {"step": 3, "weights": torch.zeros(100_000)}
    message = limited(resource.RLIMIT_FSIZE, 100_000, lambda: write_checkpoint(large, path))
    assert message.startswith(f"{path}: the checkpoint cannot be written: the file is larger")
    assert f"{path} is the one before it" in message and "--ckpt_path last" in message
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.ckpt", "last.previous.ckpt"]
    steps = [torch.load(usable_checkpoint(p), weights_only=True)["step"] for p in (path, previous_of(path))]
    assert steps == [2, 1]


def test_a_checkpoint_where_no_folder_can_be(tmp_path: Path) -> None:
    """The parent is a file, as root may write into folders that are marked read-only."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):  # one line in the command: it has a file name
        write_checkpoint({}, tmp_path / "file" / "run" / "last.ckpt")


def test_shards_that_do_not_fit_leave_nothing(tmp_path: Path) -> None:
    samples = [Sample("train", f"s{i}", {"png": bytes(20_000)}) for i in range(9)]
    out = tmp_path / "new"
    message = limited(resource.RLIMIT_FSIZE, 50_000, lambda: write_shards(out, samples, {}))
    assert message.startswith(f"{out}: the shards cannot be written: the file is larger")
    assert not out.exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes").write_text("mine")
    limited(resource.RLIMIT_FSIZE, 50_000, lambda: write_shards(tmp_path / "old", samples, {}))
    assert [file.name for file in (tmp_path / "old").iterdir()] == ["notes"]


def test_no_shards_without_room_for_their_manifest(tmp_path: Path) -> None:
    """Else they would stand in the way of the next build."""
    samples = [Sample("train", f"s{i}", {"png": b"x"}) for i in range(3)]
    build = {"long": "x" * 60_000}
    (tmp_path / "old").mkdir()
    message = limited(resource.RLIMIT_FSIZE, 50_000, lambda: write_shards(tmp_path / "old", samples, build))
    assert "the shards cannot be written" in message and list((tmp_path / "old").iterdir()) == []
    assert write_shards(tmp_path / "old", samples, build) == {"train": 3}
    assert (tmp_path / "old" / MANIFEST).is_file()


def test_a_cache_that_cannot_be_written_costs_time_only(
    tmp_path: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own_cache.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, logger="v2flow"):
        assert len(open_shards(numbered_shards(tmp_path / "a", [3]), progress=False)) == 3
    assert [message for message in caplog.messages if str(own_cache) in message]


def test_a_remote_shard_that_cannot_be_kept(tmp_path: Path, own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be")
    with pytest.raises(V2FlowError, match="V2FLOW_CACHE"):
        fetch_shard("pipe:cat /dev/null", "")


def test_errors_of_other_kinds_are_not_the_disks() -> None:
    assert disk.disk_reason(OSError(errno.ENOENT, "none")) is None and disk.disk_reason(ValueError()) is None
    try:
        try:
            raise OSError(errno.ENOSPC, "full")
        finally:
            raise RuntimeError("the writer's own words")
    except RuntimeError as error:
        assert disk.disk_reason(error) == "the disk is full"


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "take", [lambda: torch.ones(1 << 40), lambda: bytearray(1 << 42)], ids=["torch", "python"]
)
def test_memory_that_is_used_up_is_one_line(take: Callable[[], Any]) -> None:
    with pytest.raises(V2FlowError, match="out of memory") as caught, clear_exhaustion():
        take()
    assert "\n" not in str(caught.value) and "data.batch_size" in str(caught.value)


def test_memory_of_a_device_is_named_as_well() -> None:
    with pytest.raises(V2FlowError, match="out of memory .CUDA out of memory"), clear_exhaustion():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore words")


def test_other_errors_pass_unchanged() -> None:
    for error in (RuntimeError("shapes"), FileNotFoundError(errno.ENOENT, "none", "x"), V2FlowError("mine")):
        with pytest.raises(type(error)) as caught, clear_exhaustion():
            raise error
        assert caught.value is error


def test_a_logger_that_fails_too_does_not_hide_the_first_error() -> None:
    with pytest.raises(V2FlowError, match="last.ckpt"), clear_exhaustion():
        try:
            raise V2FlowError("last.ckpt: the checkpoint cannot be written")
        finally:
            raise OSError(errno.ENOSPC, "metrics")


# --- clock --------------------------------------------------------------------------------------------------------


def test_the_bars_rate_stands_on_the_monotonic_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock jumps back a day, then ahead two; ten steps of one second each are one step a second."""
    wall, steady = [1e9], [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: wall[0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: steady[0])
    text = io.StringIO()
    with progress.SteadyBar(total=100, file=text, mininterval=0.5, miniters=1, ascii=True) as bar:
        for step in range(10):
            wall[0] += -86400 if step < 3 else 172800
            steady[0] += 1.0
            bar.update()
        facts = bar.format_dict
    assert facts["elapsed"] == pytest.approx(10.0) and facts["rate"] == pytest.approx(1.0)
    assert "10/100 [00:10<01:30" in text.getvalue()
    assert text.getvalue().count("\r") >= 10, "the bar went on while the clock stood in the past"


def test_the_newest_run_is_not_the_one_with_the_latest_clock(tmp_path: Path) -> None:
    for number, when in ((0, 3e9), (2, 1e9), (10, 2e9)):
        path = tmp_path / f"version_{number}" / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (when, when))
    newest = newest_checkpoint(tmp_path, "*/checkpoints/last*.ckpt")
    assert newest == tmp_path / "version_10" / "checkpoints" / "last.ckpt"


def test_time_limits_of_transfers_do_not_look_at_the_wall_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from faults.server import serving

    numbered_shards(tmp_path, [40])
    offsets = iter(range(0, 10**9, 86400))
    monkeypatch.setattr(time, "time", lambda: float(next(offsets)))
    with (
        serving(tmp_path) as server,
        HttpStream(
            f"{server.url}/s-000000.tar", limits=HttpLimits(stall=5.0, total=60.0, retries=0)
        ) as stream,
    ):
        assert stream.read() == (tmp_path / "s-000000.tar").read_bytes()


def test_no_code_of_ours_asks_the_wall_clock(repository: Path) -> None:
    """Rates and limits need `time.monotonic` or `time.perf_counter`; only the date in a report is the clock's."""
    words = ("time.time(", "from time import time\n", "datetime.now(", "utcnow(")
    found = [
        f"{path}: {word}"
        for path in sorted((repository / "src" / "v2flow").rglob("*.py"))
        for word in words
        if word in path.read_text() and (path.name, word) != ("origin.py", "datetime.now(")
    ]
    assert found == []


# --- workers ------------------------------------------------------------------------------------------------------


class Breaking:
    """A loader of two workers whose connection to one breaks at the third batch of the first pass."""

    def __init__(self, requests: Any, error: Exception | None) -> None:
        self.requests, self.error = requests, error

    def __iter__(self) -> Any:
        for number, request in enumerate(self.requests):
            if number == 2 and self.error is not None:
                raise self.error
            yield Batch(key=[str(request)])


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        EOFError(),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_worker_that_dies_while_a_batch_is_fetched_from_it(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Its memory is handed over through a socket of its own, which then is gone."""
    errors: list[Exception | None] = [error, None]
    monkeypatch.setattr(_Workers, "_new_loader", lambda self: Breaking(self._requests, errors.pop(0)))
    workers = _Workers(TensorDataset(), 2, 0, persistent=False)
    requests = [Request(0, first, 1) for first in range(6)]
    assert [batch.key for batch in workers.run(requests)] == [[str(request)] for request in requests]
    assert errors == []


def test_what_a_worker_raises_itself_is_not_its_death(monkeypatch: pytest.MonkeyPatch) -> None:
    own = OSError("Caught OSError in DataLoader worker process 0.\nOriginal Traceback ...")
    monkeypatch.setattr(_Workers, "_new_loader", lambda self: Breaking(self._requests, own))
    with pytest.raises(OSError, match="Original Traceback"):
        list(_Workers(TensorDataset(), 2, 0, persistent=False).run([Request(0, i, 1) for i in range(4)]))


def test_workers_of_an_evaluation_end_with_its_last_batch(tmp_path: Path) -> None:
    """Lightning knows the number of batches and does not ask for one more."""
    shards = open_shards(numbered_shards(tmp_path / "a", [3]), progress=False)
    others = {*multiprocessing.active_children()}
    batches = iter(EvaluationLoader(EvaluationBatches(SampleReader(shards, 8), 3), 2, num_workers=1))
    assert len(next(batches)["key"]) == 2 and len({*multiprocessing.active_children()} - others) == 1
    assert next(batches)["valid"].tolist() == [True, False]
    assert {*multiprocessing.active_children()} <= others
    assert next(batches, None) is None


# --- what is not there --------------------------------------------------------------------------------------------


def test_a_shard_that_changed_since_it_was_indexed(tmp_path: Path) -> None:
    pattern = numbered_shards(tmp_path / "a", [3])
    opened = open_shards(pattern, progress=False)
    path = tmp_path / "a" / "s-000000.tar"
    os.truncate(path, 1024)
    with pytest.raises(V2FlowError, match="bytes as when it was indexed, found 1024"):
        opened.read(0, 0)
    path.unlink()
    with pytest.raises(V2FlowError, match="can no longer be opened"):
        opened.read(0, 0)
    numbered_shards(tmp_path / "a", [3])
    assert opened.read(0, 0) == numbered_picture(0)
