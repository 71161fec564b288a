"""Parts of files on web servers: looked up once, received over as many connections as it takes.

Nothing that a server says of itself is believed twice: every answer must be the part that was asked
for, of the file that was looked up, as plain bytes. Slow is no failure, standing still is.
"""

import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import (
    HTTPConnection,
    HTTPException,
    HTTPMessage,
    HTTPResponse,
    HTTPSConnection,
)
from io import BufferedReader
from socket import socket
from typing import Any, cast
from urllib.parse import urlsplit

from vitft.errors import DataError, Fault, MachineError

TRIES = 4  # attempts in a row that bring next to nothing
PAUSE = 0.5  # seconds before the second attempt, doubled each time
TIMEOUT = 20.0  # seconds without a byte
SLOWEST = 2_000  # bytes a second, over as many seconds; less is taken for a connection that hangs
PROGRESS = 2**16  # bytes with which an attempt was worth another
WEB = ("http", "https")
TRUE = {"1", "on", "yes", "true"}
PLAIN = ("", "identity")
TOO_MANY = 429  # requests: come back later
WAY_OUT = "VITFT_OFFLINE=1 goes on with what the cache holds"


@dataclass(frozen=True)
class Far:
    """A file elsewhere.

    Attributes:
        url: Where it is.
        size: Bytes.
        mark: What changes when its content does: its ETag, else its date.
        date: When it was changed, as the server has it; empty where it does not say.
    """

    url: str
    size: int
    mark: str
    date: str = ""

    def same(self, mark: str, date: str) -> bool:
        """Whether an answer is of this file; mirrors may mark equal files of one date unlike."""
        return mark in ("", self.mark) or date == self.date != ""


class _Unlike(Exception):
    """An answer that is not what was asked for, and may be the next time."""


def offline() -> bool:
    """Whether the environment forbids the network."""
    return any(os.environ.get(v, "").lower() in TRUE for v in ("HF_HUB_OFFLINE", "VITFT_OFFLINE"))


def hub() -> str:
    """The address of the hub."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


# -- one connection -------------------------------------------------------------------------------


class _Lines:
    """A reader whose lines must all be there in time, however they come."""

    def __init__(self, stream: BufferedReader, seconds: float) -> None:
        self.stream, self.seconds = stream, seconds
        self.began, self.count = time.monotonic(), 0

    def readline(self, limit: int) -> bytes:
        """As of any file; peeking waits for the next bytes, not for a line of them."""
        line = b""
        while len(line) < limit and not line.endswith(b"\n") and (ahead := self.stream.peek(1)):
            part = self.stream.readline(min(len(ahead), limit - len(line)))
            line, self.count = line + part, self.count + len(part)
            if (seconds := time.monotonic() - self.began) > self.seconds:
                raise TimeoutError(f"{self.count:,} bytes of headers came in {seconds:.0f} s")
        return line

    def close(self) -> None:
        """Where what came is no answer of the web's, http.client closes what it reads."""
        self.stream.close()


class _Answer(HTTPResponse):
    """An answer that takes no longer for its headers than a connection may stand still."""

    def __init__(self, sock: socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.seconds = sock.gettimeout()

    def begin(self) -> None:
        """Reads the headers."""
        body = self.fp
        if self.seconds is not None:
            self.fp = cast(BufferedReader, _Lines(body, self.seconds))
        try:
            super().begin()
        finally:
            if self.fp:  # else it was closed, as what came is no answer
                self.fp = body


class _Plain(HTTPConnection):
    response_class = _Answer


class _Safe(HTTPSConnection):
    response_class = _Answer


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(_Plain, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> HTTPResponse:
        return self.do_open(_Safe, req)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """A token is for the server it was given to, not for the one that it points at.

    Nor does a server of pictures point at an ftp: address.
    """

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in WEB:
            return None
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and _server(newurl) != _server(req.full_url):
            new.remove_header("Authorization")
        return new


def connect(
    url: str,
    headers: dict[str, str] | None = None,
    *,
    method: str = "GET",
    timeout: float = TIMEOUT,
) -> HTTPResponse:
    """An open answer. Only http and https, never file: or ftp:, also behind a redirection.

    Args:
        url: An address of the web.
        headers: Sent too.
        method: Of the request.
        timeout: Seconds without a byte, and seconds until all headers of an answer are there.

    Raises:
        OSError, HTTPException: As urllib.
        ValueError: Another kind of address.
    """
    if urlsplit(url).scheme not in WEB:
        raise ValueError(f"not a web address: {url}")
    request = urllib.request.Request(
        url, headers={"User-Agent": "vitft"} | token(url) | (headers or {}), method=method
    )
    opener = urllib.request.build_opener(_Redirects(), _Http(), _Https())
    return cast(HTTPResponse, opener.open(request, timeout=timeout))


def _server(url: str) -> tuple[str, str]:
    return urlsplit(url).scheme, urlsplit(url).netloc


def token(url: str) -> dict[str, str]:
    """For the hub, and for nobody else; nor for anybody on the way there."""
    if _server(url) != _server(hub()):
        return {}
    from huggingface_hub import get_token

    found = get_token()
    return {"Authorization": f"Bearer {found}"} if found else {}


def let_go(error: Exception) -> None:
    """An answer that is an error holds its connection open."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()


# -- what is there --------------------------------------------------------------------------------


def look_up(url: str) -> Far | Fault:
    """One byte tells size and mark, and that the server sends parts of a file."""
    found: Far | Fault | urllib.error.HTTPError
    found = _tried(url, {"Range": "bytes=0-0"}, lambda answer: _far(url, answer))
    if isinstance(found, urllib.error.HTTPError):
        return refused(url, found.code, str(found.reason).partition("\n")[0])
    return found


def small(url: str) -> bytes | None:
    """A small file, whole; None where there is none.

    Raises:
        MachineError: `env.unreachable`.
    """
    found: Any = _tried(url, {}, lambda answer: answer.read())
    if isinstance(found, Fault):
        raise MachineError([found])
    return None if isinstance(found, urllib.error.HTTPError) else found


def _tried(url: str, headers: dict[str, str], use: Any) -> Any:
    """What an answer gave, the server's own refusal, or the fault of a network that has none."""
    for wait in _waits():
        try:
            with connect(url, headers) as answer:
                return use(answer)
        except urllib.error.HTTPError as error:
            let_go(error)
            if error.code < 500 and error.code != TOO_MANY:
                return error
            problem: Exception = error
        except (OSError, HTTPException) as error:
            problem = error
        time.sleep(wait)
    fix = f"look at the network and the address, and run again; {WAY_OUT}"
    return Fault("env.unreachable", url, f"no answer in {TRIES} attempts: {problem}", fix)


def _waits() -> Iterator[float]:
    yield from (PAUSE * 2**n for n in range(TRIES - 1))
    yield 0.0


def _far(url: str, answer: HTTPResponse) -> Far | Fault:
    fix = "download the shards, or use another server"
    if answer.status != 206:
        text = "the server sends whole files only, no parts (it ignores Range)"
        return Fault("data.shard", url, text, fix)
    if (coded := answer.headers.get("Content-Encoding", "").lower()) not in PLAIN:
        return Fault("data.shard", url, f"the server packs what it sends ({coded})", fix)
    total = answer.headers.get("Content-Range", "").rpartition("/")[2]
    if not total.isdecimal():
        return Fault("data.shard", url, "the server does not say how large it is", fix)
    mark, date = _mark(answer.headers)
    return Far(url, int(total), mark or f"looked up at {time.time_ns()}", date)


def _mark(headers: HTTPMessage) -> tuple[str, str]:
    date = str(headers.get("Last-Modified") or "")
    return str(headers.get("ETag") or date), date


def refused(url: str, code: int, reason: str) -> Fault:
    """What a server's refusal means for a data set."""
    text = f"the server answers {code} {reason}"
    if code in (401, 403):
        fix = "make it readable; for hf:// log in (hf auth login) or set HF_TOKEN"
        return Fault("data.root_permission", url, text, fix)
    if code == 416:
        return Fault("data.shard", url, f"{text}: is it empty?", "leave it out")
    return Fault("data.root_missing", url, text, "correct data.root")


# -- what it holds --------------------------------------------------------------------------------


def receive(far: Far, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file, over as many connections as it takes.

    Raises:
        DataError: `data.changed`.
        MachineError: `env.unreachable`: attempts in a row that brought next to nothing, or the
            environment forbids the network.
    """
    if offline():
        text = f"bytes {start:,} to {end:,} are not in the cache, and the network is switched off"
        fix = "unset HF_HUB_OFFLINE and VITFT_OFFLINE"
        raise MachineError.of("env.unreachable", far.url, f"{text} by the environment", fix)
    data, failures, problem = bytearray(), 0, cast(object, "the connection ended early")
    while failures < TRIES:
        before = len(data)
        try:
            _go_on(far, start, end, data)
        except (OSError, HTTPException, _Unlike) as error:
            let_go(error)
            problem = error
        if len(data) == end - start:
            return bytes(data)
        failures = 0 if len(data) - before >= PROGRESS else failures + 1
        if failures < TRIES:
            time.sleep(PAUSE * 2 ** max(failures - 1, 0))
    text = f"{len(data):,} of {end - start:,} bytes from {start:,} on arrived, then: {problem}"
    fix = "look at the network; --resume auto goes on where the run stopped"
    raise MachineError.of("env.unreachable", far.url, text, fix)


def _go_on(far: Far, start: int, end: int, data: bytearray) -> None:
    """Adds to the data what one connection brings."""
    first = start + len(data)
    with connect(far.url, {"Range": f"bytes={first}-{end - 1}"}) as answer:
        _require_same(far, first, answer)
        began, had = time.monotonic(), len(data)
        while len(data) < end - start and (part := answer.read1(min(2**20, end - first))):
            data += part[: end - start - len(data)]
            if (seconds := time.monotonic() - began) > TIMEOUT:
                if len(data) - had < SLOWEST * seconds:
                    raise TimeoutError(f"{len(data) - had:,} bytes came in {seconds:.0f} s")
                began, had = time.monotonic(), len(data)


def _require_same(far: Far, first: int, answer: HTTPResponse) -> None:
    """The part asked for, of the file looked up."""
    if answer.status != 206 or answer.headers.get("Content-Encoding", "").lower() not in PLAIN:
        raise _Unlike(f"it answers {answer.status} with the whole file, or packs it")
    span, _, total = answer.headers.get("Content-Range", "").rpartition("/")
    mark, date = _mark(answer.headers)
    if total != str(far.size) or not far.same(mark, date):
        text = f"is another file by now: {total or '?'} bytes, {mark or 'no mark'} (was "
        fix = "start a new run, which looks at it again"
        raise DataError.of("data.changed", far.url, f"{text}{far.size:,}, {far.mark})", fix)
    if not span.replace(" ", "").lower().startswith(f"bytes{first}-"):
        raise _Unlike(f"asked for byte {first:,} on, it sends {span or 'it does not say which'}")
