"""A model to try out in a browser, on this computer and for nobody else.

    python -m vitft.demo MODEL [--port 8000]

Drop a photograph on the page: it shows the calibrated probabilities, what predict would say about
doubt, where the network looked, and the training photographs that are most alike.

It is plain http.server and one page instead of gradio, which would bring some fifty packages, a
service to share models with the internet and its own telemetry; four routes need none of it. The
server listens on the loopback address alone and answers no other host's name (DNS rebinding), takes
photographs up to a bound, decodes them with the guarded decoder, and writes nothing to the disk.
The page's policy allows nothing from elsewhere, and everything a stranger named reaches it as text.
"""

import argparse
import base64
import ipaddress
import json
import socket
import sys
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from vitft import console, encode, gallery, images, near
from vitft.answers import top
from vitft.console import say
from vitft.errors import MachineError, RecipeError, VitftError, escape
from vitft.explain import Looker
from vitft.images import BadImage
from vitft.predict import Predictor, doubts

LIMIT = 30_000_000  # bytes of one photograph
PORT = 8000
TOP, NEIGHBOURS = 5, 6
SIDE, SMALL = 640, 160  # px of pictures in the answer
PATIENCE = 20.0  # seconds for a client to send
TEMPLATES = Path(__file__).with_name("templates")
FILES = {"/demo.css": "text/css; charset=utf-8", "/demo.js": "text/javascript; charset=utf-8"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
MAPS = {"gradient": "What spoke for it", "rollout": "Attention"}


class Desk:
    """The model behind the page; asked about one photograph at a time.

    Args:
        model: Run folder, `model/` folder or file.
        device: As in a recipe.
        nearest: Whether to look for like training photographs.
    """

    def __init__(self, model: Path, device: str = "auto", *, nearest: bool = True) -> None:
        self.predictor = Predictor(model, device)
        p = self.predictor
        self.card = p.card
        self.looker = Looker(p.net, p.transform, p.device)
        self.nearest = near.of_run(model, p.net, p.card, p.device) if nearest else None
        self._turn = threading.Lock()

    def ask(self, data: bytes) -> dict[str, Any]:
        """Everything the page shows of one photograph, as JSON values.

        Raises:
            BadImage: The decoder refuses the bytes.
        """
        started = time.perf_counter()
        picture = images.decode(data, "the photograph", self.predictor.decode)
        with self._turn:
            answer = self.predictor.of_picture(picture)
            shown = [{"name": n, "p": p} for n, p in top(answer, self.card.classes, TOP)]
            return {
                "top": shown,
                "doubts": doubts(answer),
                "size": f"{picture.width} x {picture.height} px",
                "pictures": self._pictures(picture),
                "near": self._near(picture),
                "seconds": time.perf_counter() - started,
            }

    def _pictures(self, picture: Image.Image) -> list[dict[str, str]]:
        """The photograph and the maps over it that this network has."""
        out = [{"title": "Photograph", "source": _source(picture, SIDE)}]
        small = picture.copy()
        small.thumbnail((SIDE, SIDE))
        x = self.looker.input(picture)
        for method, title in MAPS.items():
            try:
                (values,) = self.looker.look(x, method)
            except RecipeError:  # no such map for this kind of network
                continue
            out.append({"title": title, "source": _source(self.looker.draw(small, values), SIDE)})
        return out

    def _near(self, picture: Image.Image) -> list[dict[str, Any]]:
        if self.nearest is None:
            return []
        out = []
        for file, label, cosine in self.nearest(self.predictor.features(picture), NEIGHBOURS):
            try:
                found = images.decode(images.read_bytes(file), file, self.predictor.decode)
            except BadImage:  # gone since the start
                continue
            source = _source(found, SMALL)
            out.append({"name": label, "file": file.name, "cosine": cosine, "source": source})
        return out

    def page(self) -> str:
        """The page's HTML; names are escaped by the template."""
        loader = jinja2.FileSystemLoader(TEMPLATES)
        surroundings = jinja2.Environment(loader=loader, autoescape=True)
        return surroundings.get_template("demo.html").render(
            architecture=escape(self.card.architecture),
            classes=[escape(c) for c in self.card.classes],
            accuracy=_accuracy(self.card.metrics),
            calibrated=self.card.temperature is not None,
            nearest=self.nearest is not None,
            limit=LIMIT,
        )


def _source(picture: Image.Image, side: int) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(gallery.shrink(picture, side)).decode()


def _accuracy(metrics: dict[str, Any]) -> str:
    """In words, with its interval; empty where the Card does not say."""
    try:
        bounds = metrics["accuracy_interval"]
        low, high = 100 * bounds["low"], 100 * bounds["high"]
        text = f"{100 * metrics['accuracy']:.1f} % ({low:.1f} to {high:.1f})"
        return f"{text} on {metrics['n']:,} {metrics['split']} photographs"
    except (KeyError, TypeError, ValueError):
        return ""


# --- the server ----------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """One desk behind a loopback address."""

    daemon_threads = True

    def __init__(self, desk: Desk, host: str, port: int) -> None:
        require_loopback(host)
        self.desk, self.html = desk, desk.page()
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            text = f"cannot be used ({error.strerror})"
            fix = "name another with --port"
            raise MachineError.of("demo.port", f"port {port}", text, fix) from None
        port = self.server_port
        self.names = {f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}"}
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves early is no news."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def require_loopback(host: str) -> None:
    """The page is for this computer alone.

    Raises:
        RecipeError: `demo.host`.
    """
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not local:
        text = f"must be 127.0.0.1, ::1 or localhost, got {host}; the page has no passwords"
        fix = "leave --host out; from elsewhere, use ssh -L 8000:127.0.0.1:8000"
        raise RecipeError.of("demo.host", "--host", text, fix)


class Handler(BaseHTTPRequestHandler):
    """Four routes: the page, its style, its script, and the question."""

    timeout = PATIENCE
    server: Server
    server_version, sys_version = "vitft", ""
    error_content_type = "text/plain; charset=utf-8"
    error_message_format = "%(code)d %(message)s\n"

    def do_GET(self) -> None:
        """The page and its two files."""
        if not self._is_for_us():
            return
        if self.path == "/":
            self._send(HTTPStatus.OK, "text/html; charset=utf-8", self.server.html.encode())
        elif self.path in FILES:
            data = (TEMPLATES / self.path[1:]).read_bytes()
            self._send(HTTPStatus.OK, FILES[self.path], data)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")

    def do_POST(self) -> None:
        """One photograph as the body; what there is to say as JSON."""
        if not self._is_for_us() or not self._is_from_us():
            return
        if self.path != "/ask":
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")
            return
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "the size must be said first")
        elif int(length) > LIMIT:
            text = f"{int(length):,} bytes > {LIMIT:,} that one photograph may have"
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)
        else:
            self._answer(self.rfile.read(int(length)))

    def _answer(self, data: bytes) -> None:
        try:
            said = self.server.desk.ask(data)
        except VitftError as error:
            fault = error.faults[0]
            self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, f"{fault.text}. {fault.fix}.")
        else:
            self._send(HTTPStatus.OK, "application/json", encode.json_text(said).encode())

    def _is_for_us(self) -> bool:
        """A page elsewhere that points its own name at this computer is not answered."""
        if self.headers.get("Host", "") in self.server.names:
            return True
        self._refuse(HTTPStatus.MISDIRECTED_REQUEST, "this server answers for this computer only")
        return False

    def _is_from_us(self) -> bool:
        """Only the page itself sends this header; a page elsewhere would have to ask, in vain."""
        origin = self.headers.get("Origin")
        same = origin is None or origin.removeprefix("http://") in self.server.names
        if same and self.headers.get("X-Vitft") == "ask":
            return True
        self._refuse(HTTPStatus.FORBIDDEN, "only the page itself may ask")
        return False

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        self.close_connection = True  # whatever else was sent is not read
        data = json.dumps({"error": escape(text)}).encode()
        self._send(status, "application/json", data)

    def _send(self, status: HTTPStatus, kind: str, data: bytes) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what is shown here stays here."""


# --- the command line ----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m vitft.demo`."""
    p = argparse.ArgumentParser(
        prog="vitft demo",
        description="Tries a model in a browser.",
        epilog="example: python -m vitft.demo runs/flowers_head/latest",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", type=Path, metavar="MODEL", help="run folder or model.safetensors")
    p.add_argument("--port", type=int, default=PORT, help=f"default {PORT}; 0 for any free one")
    p.add_argument("--host", default="127.0.0.1", help="a loopback address; others are refused")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--no-nearest", action="store_true", help="no training photographs")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the address and serves until Ctrl-C."""
    args = parser().parse_args(argv)
    console.setup()
    require_loopback(args.host)
    if not 0 <= args.port <= 65535:
        text = f"must be 0 to 65535, got {args.port}"
        raise RecipeError.of("demo.port", "--port", text, "leave it out")
    desk = Desk(args.model, args.device, nearest=not args.no_nearest)
    with Server(desk, args.host, args.port) as server:
        print(server.url, flush=True)  # noqa: T201
        say("open it in a browser on this computer; Ctrl-C ends it")
        server.serve_forever()
    return 0


if __name__ == "__main__":
    from vitft.cli import door

    sys.exit(door(main))
