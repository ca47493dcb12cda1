"""The processes that train and score rows: stopped with the benchmark, and never two at work in one folder."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from v2flow.errors import V2FlowError

LOCK = "in-use.lock"


class RowProcesses:
    """Runs verbs of `v2flow`, each in a process of its own, from the threads of one benchmark.

    Args:
        threads: of each process.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._running: set[subprocess.Popen[bytes]] = set()
        self._guard = threading.Lock()
        self._stopped = False

    def call(self, name: str, command: list[str], log: Path) -> None:
        """Runs one verb to its end, for as long as no other process holds the log's folder.

        The process holds the folder itself: it stays held where a benchmark is killed and its training goes on.

        Args:
            name: of the row.
            command: the words after `v2flow`.
            log: what it prints is added to this file.

        Raises:
            V2FlowError: it fails, another process holds the folder, or the benchmark is being stopped.
        """
        with (log.parent / LOCK).open("ab") as lock, log.open("ab") as file:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise V2FlowError(
                    f"row {name!r}: another process trains or scores it in {log.parent}, perhaps one whose benchmark "
                    "was killed; wait for its end or stop it, then run the same command again"
                ) from error
            process = self._start(name, command, file.fileno(), lock.fileno())
            try:
                status = process.wait()
            finally:
                with self._guard:
                    self._running.discard(process)
        if status:
            last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
            raise V2FlowError(
                f"row {name!r}: `v2flow {command[0]}` ended with status {status}: {last[-300:]}; see {log}. Finished "
                "rows are kept; run the same command again to go on"
            )

    def _start(self, name: str, command: list[str], output: int, lock: int) -> "subprocess.Popen[bytes]":
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        with self._guard:
            if self._stopped:
                raise V2FlowError(f"row {name!r}: not begun, the benchmark is being stopped")
            process = subprocess.Popen(
                [sys.executable, "-m", "v2flow", *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[lock],
            )
            self._running.add(process)
        return process

    def stop(self) -> None:
        """Asks every process to stop, trainings with a checkpoint, and lets none begin."""
        with self._guard:
            self._stopped = True
            for process in self._running:
                # Not SIGINT: a terminal has sent that already, and a second one stops without a checkpoint.
                process.terminate()


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
