"""Files on a web server, read where they lie: in pieces, each kept while there is room.

    data.root  https://host/plants/{train-{00..31},val-{00..03}}.tar  or  hf://datasets/OWNER/NAME
    CACHE/afar/host-1f0c93ab/train-00.tar   stand-in of a file: its address, size and mark
    CACHE/afar/pieces/8d2e01f7-17/data      its bytes from 17 * 16 MiB on

A stand-in is a path like any other, so whoever reads photographs need not know where they come
from. The mark is what the server promises to change with the content (ETag, else the date). Every
answer must carry it, so that no file is half old and half new.
"""

import io as streams
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import Any, cast
from urllib.parse import quote, unquote, urlsplit

from vitft import io
from vitft.errors import BusyError, DataError, Fault, MachineError, RecipeError
from vitft.folders import SPLIT_FOLDERS

PIECE = 2**24  # bytes fetched at once
ROOM = 2**32  # bytes of pieces that stay on the disk
TRIES = 4  # attempts at one answer
PAUSE = 0.5  # seconds before the second attempt, doubled each time
CONNECTIONS = 8  # at once, while files are looked up
TIMEOUT = 20.0  # seconds without a byte
MOST = 100_000  # files of one address
WEB = ("http", "https")
TRUE = {"1", "on", "yes", "true"}
NAMES = "classes.txt"  # fetched too, where it lies beside the files
SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
HUB_ADDRESS = re.compile(
    r"hf://datasets/(?P<repo>[^/@{}]+/[^/@{}]+)(@(?P<revision>[^/]+))?(/(?P<path>.+))?",
    re.IGNORECASE,
)
BRACES = re.compile(r"(?P<a>\d+)\.\.(?P<b>\d+)")
BAD_ADDRESS = "write such as https://host/plants/train-{0000..0031}.tar"


@dataclass(frozen=True)
class Far:
    """A file elsewhere.

    Attributes:
        url: Where it is.
        size: Bytes.
        mark: What changes when its content does.
    """

    url: str
    size: int
    mark: str


def is_far(root: str) -> bool:
    """Whether `data.root` is an address, of whatever kind."""
    return SCHEME.match(root) is not None


def offline() -> bool:
    """Whether the environment forbids the network."""
    return any(os.environ.get(v, "").lower() in TRUE for v in ("HF_HUB_OFFLINE", "VITFT_OFFLINE"))


def place(root: str) -> Path:
    """The folder of the stand-ins of an address; no network is touched.

    Raises:
        RecipeError: `data.address`.
    """
    host = urlsplit(_hub() if _scheme(root) == "hf" else _expanded(root)[0]).hostname or ""
    return _home() / f"{host}-{sha256(root.encode()).hexdigest()[:8]}"


def arrive(root: str) -> tuple[Path, tuple[Far, ...]]:
    """Looks up every file of an address and leaves its stand-in.

    Args:
        root: An address as `data.root` has it; braces expand as in a shell.

    Returns:
        The folder of the stand-ins, and what they stand for.

    Raises:
        RecipeError: `data.address`: of another kind, or not well formed.
        DataError: For every file that cannot be used: `data.root_missing`, `data.root_permission`,
            `data.shard` (empty, or the server sends whole files only).
        MachineError: `env.unreachable`, `env.disk_full`.
    """
    folder = place(root)
    if offline():
        text, fix = "the network is switched off by the environment", "unset HF_HUB_OFFLINE"
        raise MachineError.of("env.unreachable", root, text, fix)
    urls = _urls(root)
    above = os.path.commonpath([PurePosixPath(urlsplit(url).path).parent for url in urls])
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        found = list(pool.map(_look_up, urls))
    faults = [fault for fault in found if isinstance(fault, Fault)]
    if faults:
        machine = all(fault.id.startswith("env.") for fault in faults)
        raise (MachineError if machine else DataError)(faults)
    files = tuple(far for far in found if isinstance(far, Far))
    io.require_space(_home(), min(ROOM, sum(far.size for far in files)))
    for far in files:
        path = unquote(urlsplit(far.url).path)
        _stand_in(folder / PurePosixPath(path).relative_to(unquote(above)), far)
    _fetch_names(urls[0], above, folder)
    return folder, files


def holds(path: Path) -> bool:
    """Whether a path is one of stand-ins, or of a folder of them."""
    return path.is_relative_to(_home())


def meant(file: Path) -> Far:
    """The file that a stand-in stands for."""
    status = file.stat()
    return _meant(file, status.st_mtime_ns, status.st_size)


def identity(file: Path) -> str:
    """24 hex digits that tell a file elsewhere, as it was looked up, from every other."""
    return _name(meant(file))


def opened(file: Path, *, keep: bool = True) -> streams.BufferedReader:
    """A file elsewhere, as if it were open here.

    Args:
        file: Its stand-in.
        keep: Read by pieces, as `read` does; else exactly what is asked for, and keep nothing.
    """
    return streams.BufferedReader(_Stream(file, keep), 2**20)


def read(file: Path, start: int, length: int) -> bytes:
    """Some bytes of a file elsewhere; fewer where it ends.

    The piece in which they start is fetched whole, for the neighbours. Of what goes on into the
    next piece only the bytes that are wanted are, where it is not here yet: its neighbours may be
    wanted at quite another time.

    Raises:
        DataError: `data.changed`: it is not the file any more that was looked up.
        MachineError: `env.unreachable`, `env.disk_full`.
    """
    far = meant(file)
    end, parts, first = min(start + length, far.size), [], start // PIECE
    while start < end:
        number, stop = start // PIECE, min(end, (start // PIECE + 1) * PIECE)
        if number == first or stop - start == PIECE or piece_file(file, number).is_file():
            parts.append(_of_piece(file, number, start - number * PIECE, stop - start))
        else:
            parts.append(_receive(far, start, stop))
        start = stop
    return b"".join(parts)


def piece_file(file: Path, number: int) -> Path:
    """Where a piece of a file is kept."""
    return kept_file(f"{_name(meant(file))}-{number}")


def fetch(file: Path, number: int) -> None:
    """Brings a piece here, if it is not.

    Raises:
        DataError, MachineError: As `read`.
    """
    far = meant(file)
    start, end = number * PIECE, min((number + 1) * PIECE, far.size)
    keep(f"{_name(far)}-{number}", lambda: _receive(far, start, end))


# -- pieces on the disk ---------------------------------------------------------------------------


def pieces_dir() -> Path:
    """The store of pieces."""
    return _home() / "pieces"


def kept_file(name: str) -> Path:
    """The file under a name in the store of pieces, whether it is there or not."""
    return pieces_dir() / name / "data"


def keep(name: str, make: Any) -> Path:
    """The file under a name, made by whoever is first of all threads and processes.

    Args:
        name: Of letters, digits and dashes.
        make: Gives its bytes.
    """
    file = kept_file(name)
    while not file.is_file():
        try:
            with io.lock(file.parent, "fetch"):
                if not file.is_file():
                    data = make()
                    _make_room(len(data))
                    io.write_bytes(file, data)
        except BusyError:
            time.sleep(0.02)
    return file


def _make_room(need: int) -> None:
    """Lets go of what has been here longest."""
    found = []
    for folder in pieces_dir().iterdir():
        try:
            status = (folder / "data").stat()
        except OSError:  # under way, or just let go of by another
            continue
        found.append((status.st_mtime_ns, folder, status.st_size))
    total = need + sum(size for _, _, size in found)
    for _, folder, size in sorted(found):
        if total <= ROOM:
            return
        io.remove(folder)
        total -= size


def _of_piece(file: Path, number: int, start: int, length: int) -> bytes:
    while True:
        fetch(file, number)
        try:
            with piece_file(file, number).open("rb") as handle:
                handle.seek(start)
                return handle.read(length)
        except FileNotFoundError:  # let go of in between
            continue


class _Stream(streams.RawIOBase):
    def __init__(self, file: Path, keep: bool) -> None:
        self.file, self.far, self.kept, self.at = file, meant(file), keep, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(0, (0, self.at, self.far.size)[whence] + offset)
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        """Where pieces are kept, at most up to the end of one, for none is fetched in part."""
        if self.kept:
            data = read(self.file, self.at, min(len(buffer), PIECE - self.at % PIECE))
        else:
            end = min(self.at + len(buffer), self.far.size)
            data = _receive(self.far, self.at, end) if self.at < end else b""
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


# -- stand-ins ------------------------------------------------------------------------------------


def _home() -> Path:
    return io.cache_dir() / "afar"


def _name(far: Far) -> str:
    return sha256(f"{far.url}\n{far.size}\n{far.mark}".encode()).hexdigest()[:24]


@cache
def _meant(file: Path, changed: int, size: int) -> Far:
    try:
        return Far(**json.loads(file.read_bytes()))
    except (ValueError, TypeError) as error:
        text = f"is no stand-in of a file elsewhere ({type(error).__name__})"
        raise DataError.of("data.shard", file, text, "remove it and run again") from None


def _stand_in(file: Path, far: Far) -> None:
    if not file.is_file() or meant(file) != far:
        io.write_json(file, asdict(far))


def _fetch_names(url: str, above: str, folder: Path) -> None:
    parts = urlsplit(url)
    beside = parts._replace(path=f"{above.rstrip('/')}/{NAMES}").geturl()
    try:
        with connect(beside) as answer:
            data = answer.read(2**24)
    except (OSError, HTTPException) as error:
        _let_go(error)
        io.remove(folder / NAMES)
        return
    io.write_bytes(folder / NAMES, data)


# -- addresses ------------------------------------------------------------------------------------


def _scheme(root: str) -> str:
    scheme = root.partition("://")[0].lower()
    if scheme not in (*WEB, "hf"):
        text = f"{scheme}:// is not read; http, https and hf are"
        fix = "name its https address, mount it as a folder, or copy it"
        raise RecipeError.of("data.address", root, text, fix)
    if "@" in urlsplit(root).netloc:
        fix = "leave them out: the address is written into reports"
        raise RecipeError.of("data.address", "data.root", "it holds a user or password", fix)
    return scheme


def _expanded(root: str) -> list[str]:
    """The files of a web address."""
    rest = root.partition("://")[2]
    return _sound(root, [f"{_scheme(root)}://{one}" for one in expand(rest, root)])


def _urls(root: str) -> list[str]:
    """The files of an address; what lies in a repository of the hub is asked there."""
    if _scheme(root) != "hf":
        return _expanded(root)
    found = HUB_ADDRESS.fullmatch(root)
    if found is None:
        fix = "write hf://datasets/OWNER/NAME, or hf://datasets/OWNER/NAME/train-{0000..0031}.tar"
        raise RecipeError.of("data.address", root, "names no data set of the hub", fix)
    repo, revision, path = found["repo"], found["revision"] or "main", found["path"] or ""
    named = PurePosixPath(path).suffix
    paths = expand(path, root) if named else _of_repository(root, repo, revision, path)
    base = f"{_hub()}/datasets/{repo}/resolve/{quote(revision, safe='')}"
    return _sound(root, [f"{base}/{quote(one)}" for one in paths])


def _sound(root: str, urls: list[str]) -> list[str]:
    paths = [PurePosixPath(unquote(urlsplit(url).path)) for url in urls]
    kinds = {path.suffix.lower() for path in paths}
    if kinds not in ({".tar"}, {".parquet"}):
        named = ", ".join(sorted(kind or "no ending" for kind in kinds))
        text = f"shards are uncompressed .tar or .parquet files, this names {named}"
        raise RecipeError.of("data.address", root, text, BAD_ADDRESS)
    if len(set(paths)) < len(paths) or any(".." in path.parts for path in paths):
        text = "names a file twice, or leads upwards (..)"
        raise RecipeError.of("data.address", root, text, BAD_ADDRESS)
    return urls


def _of_repository(root: str, repo: str, revision: str, folder: str) -> list[str]:
    """The Parquet files of a repository, else its tars, of one configuration."""
    from huggingface_hub import HfApi

    try:
        listed = HfApi(endpoint=_hub()).list_repo_files(
            repo, repo_type="dataset", revision=revision, token=_token(_hub()) != {}
        )
    except Exception as error:  # of the hub's library, or of the one under it
        code = getattr(getattr(error, "response", None), "status_code", None)
        if code in (401, 403, 404):
            raise DataError([_refused(root, code, "")]) from None
        fix = "look at the network and the address, and run again"
        raise MachineError.of("env.unreachable", root, f"{error}".splitlines()[0], fix) from None
    within = [path for path in listed if path.startswith(f"{folder}/" if folder else "")]
    kinds = ([p for p in within if p.endswith(kind)] for kind in (".parquet", ".tar"))
    paths = next((found for found in kinds if found), [])
    folders = sorted({str(PurePosixPath(path).parent) for path in paths})
    several = [name for name in folders if PurePosixPath(name).name not in SPLIT_FOLDERS]
    if len(several) > 1:
        text = f"holds several sets: {', '.join(several[:8])}"
        raise RecipeError.of("data.address", root, text, f"name one: {root}/{several[0]}")
    if not paths:
        text, fix = "holds neither .parquet nor .tar files", "download it, and name its folder"
        raise RecipeError.of("data.address", root, text, fix)
    return paths


def _hub() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def expand(text: str, place: str) -> list[str]:
    """Braces as a shell expands them: `{a,b}`, `{00..12}`, one in another.

    Raises:
        RecipeError: `data.address`: a brace is left open, or too many names come out.
    """
    opening = text.find("{")
    if opening < 0:
        if "}" in text:
            raise RecipeError.of("data.address", place, "a brace is closed twice", BAD_ADDRESS)
        return [text]
    depth, commas = 0, [opening]
    for at in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if text[at] == "," and depth == 1:
            commas.append(at)
        if depth == 0:
            break
    else:
        raise RecipeError.of("data.address", place, "a brace is left open", BAD_ADDRESS)
    ends = [*commas[1:], at]
    choices = [text[a + 1 : b] for a, b in zip(commas, ends, strict=True)]
    if len(choices) == 1 and (span := BRACES.fullmatch(choices[0])):
        choices = _numbers(span["a"], span["b"], place)
    inner = [name for choice in choices for name in expand(choice, place)]
    rests = expand(text[at + 1 :], place)
    if len(inner) * len(rests) > MOST:
        text = f"names {len(inner) * len(rests):,} files, at most {MOST:,}"
        raise RecipeError.of("data.address", place, text, "make larger shards")
    return [text[:opening] + name + rest for name in inner for rest in rests]


def _numbers(first: str, last: str, place: str) -> list[str]:
    low, high = int(first), int(last)
    if not low <= high < low + MOST:
        text = f"{{{first}..{last}}} names no file, or more than {MOST:,}"
        raise RecipeError.of("data.address", place, text, BAD_ADDRESS)
    padded = any(len(end) > 1 and end.startswith("0") for end in (first, last))
    width = max(len(first), len(last)) if padded else 0
    return [str(n).zfill(width) for n in range(low, high + 1)]


# -- the wire -------------------------------------------------------------------------------------


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
        if new is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
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

    Raises:
        OSError, HTTPException: As urllib.
        ValueError: Another kind of address.
    """
    if urlsplit(url).scheme not in WEB:
        raise ValueError(f"not a web address: {url}")
    request = urllib.request.Request(
        url, headers={"User-Agent": "vitft"} | _token(url) | (headers or {}), method=method
    )
    opener = urllib.request.build_opener(_Redirects())
    return cast(HTTPResponse, opener.open(request, timeout=timeout))


def _token(url: str) -> dict[str, str]:
    """For the hub, and for nobody else."""
    if urlsplit(url).netloc != urlsplit(_hub()).netloc:
        return {}
    from huggingface_hub import get_token

    token = get_token()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _look_up(url: str) -> Far | Fault:
    """One byte tells size and mark, and that the server sends parts of a file."""
    for wait in _waits():
        try:
            with connect(url, {"Range": "bytes=0-0"}) as answer:
                return _far(url, answer)
        except urllib.error.HTTPError as error:
            _let_go(error)
            if error.code < 500 and error.code != 429:
                return _refused(url, error.code, str(error.reason))
            problem: Exception = error
        except (OSError, HTTPException) as error:
            problem = error
        time.sleep(wait)
    fix = "look at the network and the address, and run again"
    return Fault("env.unreachable", url, f"no answer in {TRIES} attempts: {problem}", fix)


def _let_go(error: Exception) -> None:
    """An answer that is an error holds its connection open."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()


def _waits() -> Iterator[float]:
    yield from (PAUSE * 2**n for n in range(TRIES - 1))
    yield 0.0


def _far(url: str, answer: HTTPResponse) -> Far | Fault:
    if answer.status != 206:
        text = "the server sends whole files only, no parts (it ignores Range)"
        return Fault("data.shard", url, text, "download the shards, or use another server")
    total = answer.headers.get("Content-Range", "").rpartition("/")[2]
    if not total.isdecimal():
        text = "the server does not say how large it is"
        return Fault("data.shard", url, text, "download the shards, or use another server")
    return Far(url, int(total), _mark(answer.headers) or f"looked up at {time.time_ns()}")


def _mark(headers: HTTPMessage) -> str:
    return str(headers.get("ETag") or headers.get("Last-Modified") or "")


def _refused(url: str, code: int, reason: str) -> Fault:
    text = f"the server answers {code} {reason}"
    if code in (401, 403):
        fix = "make it readable; for hf:// log in (hf auth login) or set HF_TOKEN"
        return Fault("data.root_permission", url, text, fix)
    if code == 416:
        return Fault("data.shard", url, f"{text}: is it empty?", "leave it out")
    return Fault("data.root_missing", url, text, "correct data.root")


def _receive(far: Far, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file, over as many connections as it takes."""
    data = b""
    problem: object = "the connection ended early"
    for wait in _waits():
        try:
            span = f"bytes={start + len(data)}-{end - 1}"
            with connect(far.url, {"Range": span}) as answer:
                _require_same(far, answer)
                data += _at_most(answer, end - start - len(data))
        except (OSError, HTTPException) as error:
            _let_go(error)
            problem = error
        if len(data) == end - start:
            return data
        time.sleep(wait)
    text = f"{len(data):,} of {end - start:,} bytes from {start:,} on arrived, then: {problem}"
    fix = "look at the network; --resume auto goes on where the run stopped"
    raise MachineError.of("env.unreachable", far.url, text, fix)


def _at_most(answer: HTTPResponse, length: int) -> bytes:
    data = bytearray()
    try:
        while len(data) < length and (part := answer.read(min(2**20, length - len(data)))):
            data += part
    except (OSError, HTTPException):  # what came so far is good
        pass
    return bytes(data)


def _require_same(far: Far, answer: HTTPResponse) -> None:
    total = answer.headers.get("Content-Range", "").rpartition("/")[2]
    mark = _mark(answer.headers)
    if answer.status == 206 and total == str(far.size) and mark in ("", far.mark):
        return
    text = f"is another file by now: {total or '?'} bytes, {mark or 'no mark'} (was {far.size:,}, "
    fix = "start a new run, which looks at it again"
    raise DataError.of("data.changed", far.url, f"{text}{far.mark})", fix)
