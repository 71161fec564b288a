"""A web server for tests: a folder, in parts, with a choice of bad manners."""

import threading
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
    cut: int | None = None  # bytes after which a connection ends
    failures = 0  # so many requests are answered 503
    refuse: int | None = None  # answers everything so
    elsewhere = ""  # sends everyone to this server
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
            return self.send_error(503)
        if server.refuse:
            return self.send_error(server.refuse)
        if server.elsewhere:
            self.send_response(302)
            self.send_header("Location", server.elsewhere + self.path)
            return self.end_headers()
        if not file.is_file():
            return self.send_error(404)
        data = file.read_bytes()
        first, last = 0, len(data) - 1
        if asked and server.ranges:
            a, _, b = asked.removeprefix("bytes=").partition("-")
            first, last = int(a), min(int(b or last), last)
            if first > last:
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        else:
            self.send_response(200)
        if server.marks:
            self.send_header("ETag", f'"{sha256(data).hexdigest()[:8]}{server.salt}"')
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        self.wfile.write(data[first : last + 1][: server.cut])
        return None


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """The folder on a port of its own."""
    server = Server(("127.0.0.1", 0), Handler)
    server.folder, server.asked, server.tokens = folder, [], []
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
