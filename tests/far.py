"""A web server for tests: a folder, in parts, with a choice of bad manners."""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Server(ThreadingHTTPServer):
    """Attributes are read at each request, so that a test may change its mind."""

    daemon_threads = True
    folder: Path
    ranges = True  # answers Range with a part
    marks = True  # sends ETag
    salt = ""  # changes every mark
    date = ""  # sends it as Last-Modified
    cut: int | None = None  # bytes after which a connection ends
    failures = 0  # so many requests are answered 503
    refuse: int | None = None  # answers everything so
    elsewhere = ""  # sends everyone to this server
    shift = 0  # sends a part that begins so many bytes late
    more = 0  # sends so many bytes more than were asked for
    whole = 0  # so many requests are answered with the whole file
    headers: dict[str, str]  # sent too
    drip: float | None = None  # seconds between two bytes of what it sends
    drip_headers: float | None = None  # and of what it sends before
    broken = ""  # resets the connection: at "once", or behind its "headers"
    answers: dict[str, int]  # status by path
    asked: list[tuple[str, str]]  # path and Range of each request
    tokens: list[str | None]

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range", "")
        server.asked.append((self.path, asked))
        server.tokens.append(self.headers.get("Authorization"))
        file = server.folder / unquote(urlsplit(self.path).path).lstrip("/")
        if server.failures:
            server.failures -= 1
            self.send_error(503)
        elif refuse := server.answers.get(self.path) or server.refuse:
            self.send_error(refuse)
        elif server.broken == "once":
            self._reset()
        elif server.elsewhere:
            self.send_response(302)
            self.send_header("Location", server.elsewhere + self.path)
            self.end_headers()
        elif not file.is_file():
            self.send_error(404)
        else:
            self._send(file.read_bytes(), asked)

    def flush_headers(self) -> None:
        wait, buffer = self.server.drip_headers, getattr(self, "_headers_buffer", [])
        for byte in b"".join(buffer) if wait is not None else b"":
            self.wfile.write(bytes([byte]))
            time.sleep(wait or 0)
        if wait is not None:
            buffer.clear()
        super().flush_headers()

    def _send(self, data: bytes, asked: str) -> None:
        server, first, last = self.server, 0, len(data) - 1
        server.whole -= (whole := server.whole > 0 and asked != "bytes=0-0")
        if asked and server.ranges and not whole:
            a, _, b = asked.removeprefix("bytes=").partition("-")
            first, last = int(a) + server.shift, min(int(b or last) + server.more, last)
            if first > last:
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        else:
            self.send_response(200)
        if server.marks:
            self.send_header("ETag", f'"{sha256(data).hexdigest()[:8]}{server.salt}"')
        if server.date:
            self.send_header("Last-Modified", server.date)
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if server.broken == "headers":
            return self._reset()
        return self._write(data[first : last + 1][: server.cut])

    def _write(self, body: bytes) -> None:
        if self.server.drip is None:
            self.wfile.write(body)
            return
        for k in range(len(body)):
            self.wfile.write(body[k : k + 1])
            time.sleep(self.server.drip)

    def _reset(self) -> None:
        """So that the other side does not read an end, but an error."""
        self.wfile.flush()
        now = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
        self.connection.close()


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """The folder on a port of its own."""
    server = Server(("127.0.0.1", 0), Handler)
    server.folder, server.asked, server.tokens = folder, [], []
    server.headers, server.answers = {}, {}
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
