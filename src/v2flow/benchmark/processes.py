"""The processes that train and score rows: stopped with the benchmark, and never two at work in one folder."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from v2flow.errors import V2FlowError

LOCK = "in-use.lock"


class RowProcesses:
    """Runs verbs of `v2flow`, each in a process of its own, from the threads of one benchmark.

    Args:
        threads: of each process.

    Attributes:
        closed: no further row is to begin, as one has failed or the benchmark is being stopped.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.closed = False
        self._running: set[subprocess.Popen[bytes]] = set()
        self._guard = threading.Lock()
        self._stopped = False

    def call(self, row: "HeldRow", command: list[str], log: Path) -> None:
        """Runs one verb to its end.

        The process holds the row's folder too: it stays held where a benchmark is killed and its training goes on.

        Args:
            command: the words after `v2flow`.
            log: what it prints is added to this file.

        Raises:
            V2FlowError: it fails, or the benchmark is being stopped.
        """
        with log.open("ab") as file:
            process = self._start(row, command, file.fileno())
            try:
                status = process.wait()
            finally:
                with self._guard:
                    self._running.discard(process)
        if status:
            last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            raise V2FlowError(
                f"row {row.name!r}: `v2flow {command[0]}` ended with status {status}: {last[-300:]}; see {log}. "
                "Finished rows are kept; run the same command again to go on"
            )

    def _start(self, row: "HeldRow", command: list[str], output: int) -> "subprocess.Popen[bytes]":
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        with self._guard:
            if self._stopped:
                raise V2FlowError(f"row {row.name!r}: the benchmark is being stopped")
            process = subprocess.Popen(
                [sys.executable, "-m", "v2flow", *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[row.lock],
            )
            self._running.add(process)
        return process

    def stop(self) -> None:
        """Asks every process to stop, trainings with a checkpoint, and lets none begin."""
        with self._guard:
            self.closed = self._stopped = True
            for process in self._running:
                # Not SIGINT: a terminal has sent that already, and a second one stops without a checkpoint.
                process.terminate()


@dataclass
class HeldRow:
    """A row whose folder no other process works in.

    Attributes:
        name: of the row.
        lock: descriptor that holds the folder for as long as any process has it open.
    """

    name: str
    lock: int


@contextmanager
def holding(name: str, folder: Path) -> Iterator[HeldRow]:
    """Holds the folder of the row `name`, which is made if need be.

    Raises:
        V2FlowError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise V2FlowError(
                f"row {name!r}: another process trains or scores it in {folder}, perhaps one whose benchmark was "
                "killed; wait for its end or stop it, then run the same command again"
            ) from error
        except OSError as error:  # some network file systems have no locks
            print(
                f"v2flow: warning: {folder} cannot be locked: {error.strerror}", file=sys.stderr, flush=True
            )
        yield HeldRow(name, lock.fileno())


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Within it SIGTERM raises SystemExit with status 143 in the main thread, as Ctrl-C raises KeyboardInterrupt."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stopped_together(processes: RowProcesses, pool: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
    """Ends with the pool; Ctrl-C and SIGTERM stop its rows first, and in any case no further row begins.

    After a row's failure the rows at work come to their end, and can still be stopped.
    """
    with stopped_by_sigterm():
        try:
            try:
                yield pool
            except Exception:
                pool.shutdown(cancel_futures=True)
                raise
        except (KeyboardInterrupt, SystemExit):
            processes.stop()
            print(
                "v2flow: stopping; finished rows are kept, run the same command again to go on",
                file=sys.stderr,
                flush=True,
            )
            raise
        finally:
            pool.shutdown(cancel_futures=True)
