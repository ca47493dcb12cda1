"""A real HTTP server on 127.0.0.1 that serves a folder, and fails, stalls or crawls as it is told."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FaultyServer(ThreadingHTTPServer):
    """Serves files of a folder, with byte ranges.

    Attributes:
        faults: used up, one for each request of a tar: the number of a status, "cut" after half of the bytes, "crawl"
            (200 bytes a second), or "" for none.
        order: a file that may name the fault of every request when `faults` is used up: another process can write it.
        pause: seconds between two pieces of 1 kB, for a server that is slow but works.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: list[str] = []
        self.order = folder / "fault"
        self.pause = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        fault = ""
        if path.suffix == ".tar":
            order = self.server.order
            lasting = order.read_text() if order.is_file() else ""
            try:
                fault = self.server.faults.pop(0)  # requests come from several processes at once
            except IndexError:
                fault = lasting
        if fault.isdigit():
            return self.send_error(int(fault))
        data, first = path.read_bytes(), 0
        wanted = self.headers.get("Range")
        if wanted:
            first = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - first))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        self._send(data[first:], fault)

    def _send(self, data: bytes, fault: str) -> None:
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif fault == "crawl":
            for start in range(0, len(data), 10):
                self.wfile.write(data[start : start + 10])
                self.wfile.flush()
                time.sleep(0.05)
        else:
            for start in range(0, len(data), 1024):
                self.wfile.write(data[start : start + 1024])
                self.wfile.flush()
                time.sleep(self.server.pause)


@contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    """A server of a folder, in a thread."""
    with FaultyServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
