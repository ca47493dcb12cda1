"""Reading `http(s)` URLs without another program: time and stall limits, capped retries, resuming by byte range."""

import http.client
import io
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from webdataset.gopen import gopen_schemes

from v2flow.errors import V2FlowError, first_line

_RETRIED = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class HttpLimits:
    """When to give up.

    Attributes:
        stall: seconds without a byte, also while connecting.
        slowest: bytes a second; less than this over `stall` seconds of waiting is a crawl, and a new attempt.
        total: seconds for the whole transfer.
        retries: attempts after the first one; reading on counts a new attempt only where nothing came.
        backoff: seconds before the first retry; doubled each time, at most 30.
    """

    stall: float = 30.0
    slowest: float = 1000.0
    total: float = 3600.0
    retries: int = 5
    backoff: float = 1.0


LIMITS = HttpLimits()
MAX_TEXT = 256 << 20
"""Bytes of a remote manifest, which is read into memory: about four million samples."""


@dataclass(frozen=True)
class RemoteFile:
    """What a server says of a file.

    Attributes:
        size: bytes, or None where the server does not say.
        version: ETag, else time of the last change; empty where the server says neither.
    """

    size: int | None
    version: str


class HttpStream(io.RawIOBase):
    """The bytes of a URL from `offset` on; after a broken or stalled transfer it goes on where it stopped.

    Raises (while reading, too):
        V2FlowError: not found or refused, changed while being read, or out of time or retries.
    """

    def __init__(
        self, url: str, offset: int = 0, version: str = "", limits: HttpLimits | None = None
    ) -> None:
        super().__init__()
        self.url = url
        self.position = offset
        self.file = RemoteFile(None, version)
        self._limits = limits or LIMITS
        self._deadline = time.monotonic() + self._limits.total
        self._failures = 0
        self._crawls = 0
        self._waited, self._came = 0.0, 0  # seconds and bytes since the speed was looked at last
        self._response: http.client.HTTPResponse | None = None
        self._attempt(self._open)

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills some of the buffer; 0 at the end of the file."""
        view = memoryview(buffer).cast("B")
        return self._attempt(lambda: self._read_some(view)) if len(view) else 0

    def close(self) -> None:
        """Closes the connection."""
        if self._response is not None:
            self._response.close()
            self._response = None
        super().close()

    def _attempt(self, action: Any) -> Any:
        """Runs an action, again after errors that may pass, within the limits."""
        while True:
            if time.monotonic() > self._deadline:
                raise V2FlowError(
                    f"{self.url}: not finished after {self._limits.total:g} s; is the server too slow?"
                )
            try:
                return action()
            except urllib.error.HTTPError as error:
                error.close()
                if error.code not in _RETRIED:
                    raise V2FlowError(
                        f"{self.url}: the server answers {error.code} {error.reason}"
                    ) from error
                reason = f"{error.code} {error.reason}"
            except V2FlowError:
                raise
            except (ValueError, http.client.InvalidURL) as error:
                raise V2FlowError(
                    f"{self.url}: no URL that can be asked for ({first_line(error)}); write letters beyond ASCII "
                    "and spaces as %XX"
                ) from error
            except (OSError, http.client.HTTPException) as error:
                reason = _reason(error, self._limits.stall)
            self._wait_before_retry(reason)

    def _wait_before_retry(self, reason: str) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None
        if self._failures >= self._limits.retries:
            raise V2FlowError(
                f"{self.url}: gave up at byte {self.position} after {self._failures + 1} attempts: {reason}"
            )
        pause = min(self._limits.backoff * 2.0**self._failures, 30.0)
        time.sleep(max(0.0, min(pause, self._deadline - time.monotonic())))
        self._failures += 1

    def _open(self) -> None:
        headers = {"User-Agent": "v2flow", "Accept-Encoding": "identity"}
        if self.position:
            headers["Range"] = f"bytes={self.position}-"
        request = urllib.request.Request(self.url, headers=headers)
        try:
            response = urllib.request.urlopen(request, timeout=self._limits.stall)
        except urllib.error.HTTPError as error:
            if error.code == 416 and self.position:  # nothing after the position: the file is complete
                error.close()
                self.file = RemoteFile(self.position, self.file.version)
                return
            raise
        self._response = response
        found = describe(response)
        if self.file.version and found.version and found.version != self.file.version:
            raise V2FlowError(f"{self.url}: changed on the server while it was being read; start again")
        self.file = RemoteFile(found.size, found.version or self.file.version)
        if response.status != 206:
            self._skip(self.position)

    def _skip(self, count: int) -> None:
        """Reads over what we have, where the server cannot begin in the middle."""
        assert self._response is not None
        while count > 0:
            chunk = self._response.read(min(count, 1 << 20))
            if not chunk:
                raise http.client.IncompleteRead(b"", count)
            count -= len(chunk)

    def _read_some(self, view: memoryview) -> int:
        if self._response is None:
            if self.file.size is not None and self.position >= self.file.size:
                return 0
            self._open()
            if self._response is None:
                return 0
        begun = time.monotonic()
        data = self._response.read1(
            len(view)
        )  # what is there, so that the time limit is looked at in between
        count = len(data)
        self._watch_speed(time.monotonic() - begun, count)
        view[:count] = data
        if count == 0 and self.file.size is not None and self.position < self.file.size:
            raise http.client.IncompleteRead(b"", self.file.size - self.position)
        self.position += count
        if count:
            self._failures = 0
        return count

    def _watch_speed(self, seconds: float, count: int) -> None:
        """Gives up a connection that crawls: another one may be served better. What has come is kept."""
        self._waited, self._came = self._waited + seconds, self._came + count
        if self._waited < self._limits.stall:
            return
        rate, self._waited, self._came = self._came / self._waited, 0.0, 0
        if rate >= self._limits.slowest or count == 0 or self._response is None:
            return
        self._response.close()
        self._response = None
        self._crawls += 1
        if self._crawls > self._limits.retries:
            raise V2FlowError(
                f"{self.url}: gave up at byte {self.position + count} after {self._crawls} connections of "
                f"{rate:.0f} bytes a second, expected at least {self._limits.slowest:g}; is the server overloaded?"
            )


def describe(response: http.client.HTTPResponse) -> RemoteFile:
    """Size and version of the whole file, of a full (200) or a partial (206) answer."""
    headers = response.headers
    version = headers.get("ETag") or headers.get("Last-Modified") or ""
    size: str | None = headers.get("Content-Length")
    if response.status == 206:
        size = headers.get("Content-Range", "").rpartition("/")[2]
    return RemoteFile(int(size) if size and size.isdigit() else None, version)


def probe(url: str, limits: HttpLimits | None = None) -> RemoteFile:
    """Size and version of a remote file; asks with GET, as signed URLs often refuse HEAD.

    Raises:
        V2FlowError: see :class:`HttpStream`.
    """
    stream = HttpStream(url, limits=limits)
    stream.close()
    return stream.file


def fetch_text(url: str, limits: HttpLimits | None = None) -> str | None:
    """A small text file, or None if the server has none of this name.

    Raises:
        V2FlowError: any other failure, or more than `MAX_TEXT` bytes.
    """
    try:
        with open_http(url, limits=limits) as stream:
            data = stream.read(MAX_TEXT + 1)
        if len(data) > MAX_TEXT:
            raise V2FlowError(f"{url}: more than {MAX_TEXT:,} bytes; copy the shards to a local folder")
        return data.decode()
    except V2FlowError as error:
        cause = error.__cause__
        if isinstance(cause, urllib.error.HTTPError) and cause.code in (403, 404, 410):
            return None
        raise
    except UnicodeDecodeError as error:
        raise V2FlowError(f"{url}: expected UTF-8 text, found other bytes") from error


def open_http(
    url: str, mode: str = "rb", bufsize: int = 1 << 20, limits: HttpLimits | None = None, **_: Any
) -> io.BufferedReader:
    """Opens a URL for reading, with the signature of webdataset's openers."""
    if mode != "rb":
        raise V2FlowError(f"{url}: http(s) can only be read, not opened with mode {mode!r}")
    return io.BufferedReader(HttpStream(url, limits=limits), buffer_size=max(bufsize, 1 << 16))


def register_openers() -> None:
    """Makes webdataset read `http(s)` through :func:`open_http` instead of a curl process."""
    gopen_schemes.update(http=open_http, https=open_http)


def _reason(error: BaseException, stall: float) -> str:
    inner = getattr(error, "reason", error)
    if isinstance(inner, TimeoutError) or "timed out" in str(inner):
        return f"no byte for {stall:g} s"
    return first_line(inner)
