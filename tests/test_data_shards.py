"""Names of shards, and shards from a server that fails, stalls, cuts and changes."""

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import webdataset
from data_toys import numbered_shards

from v2flow.data import fetching
from v2flow.data import http as v2http
from v2flow.data.fetching import fetch_shard
from v2flow.data.http import HttpLimits, open_http
from v2flow.data.manifest import index_tar, write_manifest
from v2flow.data.shard_names import expand_shards
from v2flow.data.shards import open_shards
from v2flow.errors import V2FlowError

QUICK = HttpLimits(stall=0.5, total=20.0, retries=3, backoff=0.01)


@pytest.fixture(autouse=True)
def quick_and_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V2FLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(v2http, "LIMITS", QUICK)


class Server(ThreadingHTTPServer):
    """Serves files of a folder; `faults` are used up, one for each GET of a tar."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: list[str] = []
        self.requests: list[tuple[str, str | None]] = []
        self.ranges = True
        self.etag = '"one"'

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of these tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        fault = self.server.faults.pop(0) if self.server.faults and path.suffix == ".tar" else ""
        if fault.isdigit():
            return self.send_error(int(fault))
        data, first = path.read_bytes(), 0
        if wanted and self.server.ranges:
            first = int(wanted.removeprefix("bytes=").rstrip("-"))
            if first >= len(data):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - first))
        self.send_header("ETag", self.server.etag)
        self.end_headers()
        self._send(data[first:], fault)

    def _send(self, data: bytes, fault: str) -> None:
        if fault in ("cut", "stall"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "stall":
                time.sleep(2.0)
            self.close_connection = True
        elif fault == "drip":
            for byte in data[:200]:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.1)
        else:
            self.wfile.write(data)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    numbered_shards(tmp_path / "served", [300, 200])
    with Server(tmp_path / "served") as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def tar(server: Server, number: int = 0) -> tuple[str, bytes]:
    name = f"s-{number:06d}.tar"
    return f"{server.url}/{name}", (server.folder / name).read_bytes()


def test_names_are_expanded(tmp_path: Path) -> None:
    numbered_shards(tmp_path / "a b", [1, 1, 1])
    folder = str(tmp_path / "a b")
    three = [f"{folder}/s-{i:06d}.tar" for i in range(3)]
    assert expand_shards(f"{folder}/s-*.tar") == three
    assert expand_shards(f"{folder}/s-{{000000..000002}}.tar") == three
    assert expand_shards([f"file:{folder.replace(' ', '%20')}/s-00000{{1,2}}.tar", three[0]]) == [
        *three[1:],
        three[0],
    ]
    assert expand_shards("http://host/x-{0..1}.tar?sig=a") == [
        "http://host/x-0.tar?sig=a",
        "http://host/x-1.tar?sig=a",
    ]
    assert expand_shards("pipe:cat x-{0..1}.tar", allow_pipe=True) == ["pipe:cat x-0.tar", "pipe:cat x-1.tar"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("nowhere/*.tar", "no shard matches"),
        ("pipe:cat a.tar", "allow_pipe"),
        ("s3://bucket/a.tar", "unknown scheme 's3'"),
        ("http://host/*.tar", "wildcards only work for local"),
        ("a-{0..3.tar", "brace is not closed"),
        (["a.tar", "b.tar", "a.tar"], "a.tar: named twice"),
        ([], "at least one"),
    ],
)
def test_bad_names_are_one_line(pattern: Any, expected: str) -> None:
    with pytest.raises(V2FlowError, match=expected) as caught:
        expand_shards(pattern)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", ["", "500", "503", "429", "cut", "stall"])
@pytest.mark.parametrize("ranges", [True, False])
def test_passing_faults_do_not_change_a_byte(server: Server, fault: str, ranges: bool) -> None:
    url, expected = tar(server)
    server.faults, server.ranges = [fault], ranges
    with open_http(url) as stream:
        assert stream.read() == expected
    assert len(server.requests) == (2 if fault else 1)
    if fault in ("cut", "stall"):
        assert server.requests[1][1] == f"bytes={len(expected) // 2}-", "goes on where it stopped"


def test_webdataset_itself_reads_through_the_opener(server: Server) -> None:
    v2http.register_openers()
    server.faults = ["503", "cut"]
    url = tar(server)[0]
    keys = [sample["__key__"] for sample in webdataset.WebDataset(url, shardshuffle=False)]
    assert keys == [f"{i:06d}" for i in range(300)] and len(server.requests) == 3


@pytest.mark.parametrize(
    ("faults", "expected", "requests"),
    [
        (["404"] * 9, "404", 1),
        (["403"] * 9, "403", 1),
        (["500"] * 9, "gave up at byte 0 after 4 attempts: 500", 4),
    ],
)
def test_lasting_faults_end_soon(server: Server, faults: list[str], expected: str, requests: int) -> None:
    server.faults = faults
    with pytest.raises(V2FlowError, match=expected) as caught:
        open_http(tar(server)[0])
    assert tar(server)[0] in str(caught.value) and len(server.requests) == requests


def test_stall_time_and_change_limits(server: Server) -> None:
    url = tar(server)[0]
    server.faults = ["stall"] * 9
    started = time.monotonic()
    with (
        pytest.raises(V2FlowError, match="no byte for 0.3 s"),
        open_http(url, limits=HttpLimits(stall=0.3, retries=0)) as stream,
    ):
        stream.read()
    server.faults = ["drip"] * 9
    with (
        pytest.raises(V2FlowError, match="not finished after 0.6 s"),
        open_http(url, limits=HttpLimits(stall=0.5, total=0.6)) as stream,
    ):
        stream.read()
    assert time.monotonic() - started < 10
    server.faults = ["cut"]
    with pytest.raises(V2FlowError, match="changed on the server"), open_http(url) as stream:
        stream.read(10)
        server.etag = '"two"'
        stream.read()


@pytest.mark.parametrize(
    "name",
    [
        "{url}/café.tar",
        "{url}/a b.tar",
        "http://[::1/x.tar",
        "http://host:port/x.tar",
        "file://[::1/x.tar",
        "a\0.tar",
    ],
)
def test_names_that_are_no_url_are_one_line(server: Server, name: str) -> None:
    """And are not asked for again and again."""
    name = name.format(url=server.url)
    with pytest.raises(V2FlowError) as caught:
        open_shards(name, progress=False)
    assert str(caught.value).startswith(f"{name}: no ") and "\n" not in str(caught.value)
    assert server.requests == []


def test_a_transfer_without_end_is_cut_off(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a shard at the size that its manifest, its server or v2flow allows; of a manifest at v2flow's."""
    url, expected = tar(server)
    endless = "pipe:yes"
    monkeypatch.setattr(fetching, "MAX_SHARD", 3 << 20)
    with pytest.raises(V2FlowError, match="pipe:yes: more than the 3,145,728 bytes that were expected"):
        fetch_shard(endless, "")
    with pytest.raises(V2FlowError, match="more than the 5,000 bytes that were expected"):
        fetch_shard(url, "", size=5000)
    (server.folder / "manifest.json").write_text(" " * 2000)
    monkeypatch.setattr(v2http, "MAX_TEXT", 1000)
    with pytest.raises(V2FlowError, match="manifest.json: more than 1,000 bytes; copy"):
        open_shards(url, progress=False)
    assert not [*(tmp_path / "cache").rglob("*.tar"), *(tmp_path / "cache").rglob("*.part")]


def test_a_fetch_leaves_room_on_the_disk(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, expected = tar(server)
    disk = SimpleNamespace(total=10_000, free=100 + len(expected) - 1)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda folder: disk)
    room = f"only {len(expected) - 1:,} bytes can be used in"
    with pytest.raises(V2FlowError, match=f"{url}: {len(expected):,} bytes, but {room}"):
        fetch_shard(url, f'{len(expected)}-"one"')
    with pytest.raises(V2FlowError, match=f"{url}: {room}"):
        fetch_shard(url, "None-")
    assert all(path.stat().st_size == 0 for path in (tmp_path / "cache" / "shards").iterdir())
    disk.free += 1
    assert fetch_shard(url, f'{len(expected)}-"one"').read_bytes() == expected


def test_no_server_is_one_line() -> None:
    with pytest.raises(V2FlowError, match="gave up at byte 0") as caught:
        open_shards("http://127.0.0.1:9/x.tar", progress=False)
    assert "\n" not in str(caught.value)


def test_remote_shards_are_fetched_once_and_read_as_local_ones(server: Server) -> None:
    remote = open_shards(f"{server.url}/s-{{000000..000001}}.tar", progress=False)
    local = open_shards(str(server.folder / "*.tar"), progress=False)
    assert remote.sizes == [300, 200]
    assert all(remote.read(i, 0) == local.read(i, 0) for i in (0, 299, 300, 499))
    full = sum(1 for path, wanted in server.requests if path.endswith(".tar"))
    again = open_shards(f"{server.url}/s-{{000000..000001}}.tar", progress=False)
    assert again.read(7, 1) == b"number 7"
    probes = sum(1 for path, wanted in server.requests if path.endswith(".tar")) - full
    assert probes == 2, "only asked whether they are still the same"
    numbered_shards(server.folder, [300, 40])
    server.etag = '"two"'
    assert open_shards(f"{server.url}/s-{{000000..000001}}.tar", progress=False).sizes == [300, 40]


def test_with_a_manifest_nothing_is_fetched_before_it_is_read(server: Server, tmp_path: Path) -> None:
    write_manifest(server.folder, {p.name: index_tar(p) for p in server.folder.glob("*.tar")}, {})
    shards = open_shards(f"{server.url}/s-{{000000..000001}}.tar", progress=False)
    assert len(shards) == 500 and not list((tmp_path / "cache").rglob("*.tar"))
    assert shards.read(301, 1) == b"number 301"
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 1
    cut = server.folder / "s-000000.tar"
    cut.write_bytes(cut.read_bytes()[:51_200])
    with pytest.raises(V2FlowError, match="cut short: .* manifest says 300 samples"):
        open_shards(f"{server.url}/s-000000.tar", progress=False)


def test_an_interrupted_fetch_goes_on_and_leaves_no_final_file(server: Server, tmp_path: Path) -> None:
    url, expected = tar(server)
    version = f'{len(expected)}-"one"'
    server.faults = ["cut", "500", "500", "500", "500"]
    with pytest.raises(V2FlowError, match="gave up"):
        fetch_shard(url, version)
    (partial,) = (tmp_path / "cache").rglob("*.part")
    assert partial.stat().st_size == len(expected) // 2 and not list((tmp_path / "cache").rglob("*.tar"))
    server.faults, server.requests = [], []
    assert fetch_shard(url, version).read_bytes() == expected
    assert server.requests == [("/s-000000.tar", f"bytes={len(expected) // 2}-")]


def _fetch(url: str, version: str) -> int:
    return os.path.getsize(fetch_shard(url, version))


def test_processes_share_one_fetch(server: Server) -> None:
    url, expected = tar(server)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        sizes = pool.starmap(_fetch, [(url, f'{len(expected)}-"one"')] * 4)
    assert sizes == [len(expected)] * 4 and len(server.requests) == 1


def test_pipes_only_when_allowed(tmp_path: Path) -> None:
    numbered_shards(tmp_path / "a", [3])
    path = tmp_path / "a" / "s-000000.tar"
    with pytest.raises(V2FlowError, match="allow_pipe"):
        open_shards(f"pipe:cat {path}", progress=False)
    shards = open_shards(f"pipe:cat {path}", allow_pipe=True, progress=False)
    assert shards.read(2, 1) == b"number 2"
    with pytest.raises(V2FlowError, match="the command failed"):
        open_shards(f"pipe:head -c 2000 {path}; exit 3", allow_pipe=True, progress=False)
    source = tmp_path / "source.tar"
    source.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(V2FlowError, match="cut short"):
        open_shards(f"pipe:cat {source}", allow_pipe=True, progress=False)
    source.write_bytes(path.read_bytes())
    assert len(open_shards(f"pipe:cat {source}", allow_pipe=True, progress=False)) == 3, (
        "the bad copy is forgotten"
    )
