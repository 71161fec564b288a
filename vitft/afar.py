"""Files on a web server, read where they lie: in pieces, each kept while there is room.

    data.root  https://host/plants/{train-{00..31},val-{00..03}}.tar  or  hf://datasets/OWNER/NAME
    CACHE/afar/host-1f0c93ab/train-00.tar   stand-in of a file: its address, size and mark
    CACHE/afar/pieces/8d2e01f7-17.bytes     its bytes from 17 * 16 MiB on

A stand-in is a path like any other, so whoever reads photographs need not know where they come
from. The mark is what the server promises to change with the content (ETag, else the date). Every
answer must carry it, so that no file is half old and half new.
"""

import io as streams
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from vitft import addresses, io, wire
from vitft.errors import BusyError, DataError, Fault, MachineError
from vitft.wire import Far

PIECE = 2**24  # bytes fetched at once
ROOM = 2**32  # bytes of pieces that stay on the disk
CONNECTIONS = 8  # at once, while files are looked up
PATIENCE = 300.0  # seconds to wait for who fetches the same; then it is fetched twice
NAMES, ARRIVED, ENDING = "classes.txt", "arrived.json", ".bytes"
TAIL = 8  # bytes at the end of a piece: its own length, so that one cut off is none


# -- stand-ins ------------------------------------------------------------------------------------


def place(root: str) -> Path:
    """The folder of the stand-ins of an address; no network is touched.

    Raises:
        RecipeError: `data.address`.
    """
    return _home() / f"{addresses.host(root)}-{sha256(root.encode()).hexdigest()[:8]}"


def arrive(root: str) -> tuple[Path, tuple[Far, ...]]:
    """Looks up every file of an address and leaves its stand-in.

    Where the environment forbids the network, what an earlier run looked up stands as it is.

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
    if wire.offline():
        return folder, _earlier(root, folder)
    urls = addresses.urls(root)
    above = os.path.commonpath([PurePosixPath(urlsplit(url).path).parent for url in urls])
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        found = list(pool.map(wire.look_up, urls))
    faults = [fault for fault in found if isinstance(fault, Fault)]
    if faults:
        machine = all(fault.id.startswith("env.") for fault in faults)
        raise (MachineError if machine else DataError)(faults)
    files = [far for far in found if isinstance(far, Far)]
    kept = sum(size for _, _, size in _kept_files())
    io.require_space(_home(), min(ROOM, sum(far.size for far in files)) - kept)
    paths = [PurePosixPath(unquote(urlsplit(far.url).path)) for far in files]
    names = [str(path.relative_to(unquote(above))) for path in paths]
    _fetch_names(urls[0], above, folder)
    known = tuple(_stand_in(folder / name, far) for name, far in zip(names, files, strict=True))
    for file in {*stand_ins(folder)} - {folder / name for name in names}:
        io.remove(file)  # it was there when the hub was asked before
    if _arrived(folder) != names:
        io.write_json(folder / ARRIVED, names)
    return folder, known


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


def _stand_in(file: Path, far: Far) -> Far:
    """What is known of a file stays as long as it is the same one."""
    with suppress(DataError, OSError):
        known = meant(file)
        if (known.url, known.size) == (far.url, far.size) and known.same(far.mark, far.date):
            return known
    io.write_json(file, asdict(far))
    return far


def stand_ins(folder: Path) -> list[Path]:
    """The files that an address names, as they stand in a folder of it."""
    return [p for p in folder.rglob("*") if p.suffix.lower() in addresses.KINDS and p.is_file()]


def _arrived(folder: Path) -> list[str]:
    """The stand-ins of the last time that all of them were there."""
    try:
        found = json.loads((folder / ARRIVED).read_bytes())
    except (OSError, ValueError):
        return []
    return [str(name) for name in found] if isinstance(found, list) else []


def _earlier(root: str, folder: Path) -> tuple[Far, ...]:
    names = _arrived(folder)
    if not names or not all((folder / name).is_file() for name in names):
        text = "the network is switched off by the environment, and no earlier run looked it up"
        fix = "unset HF_HUB_OFFLINE and VITFT_OFFLINE"
        raise MachineError.of("env.unreachable", root, text, fix)
    return tuple(meant(folder / name) for name in names)


def _fetch_names(url: str, above: str, folder: Path) -> None:
    """Class names beside the files; a page instead of them is a server's way to say no."""
    parts = urlsplit(url)
    beside = parts._replace(path=f"{above.rstrip('/')}/{NAMES}").geturl()
    data = wire.small(beside)
    if data is None or data.lstrip().startswith(b"<"):
        io.remove(folder / NAMES)
    else:
        io.write_bytes(folder / NAMES, data)


# -- reading --------------------------------------------------------------------------------------


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
        here = number == first or kept_file(piece_name(file, number)).is_file()
        if here or stop - start == PIECE:
            with _piece(file, number) as handle:
                handle.seek(start - number * PIECE)
                parts.append(handle.read(stop - start))
        else:
            parts.append(wire.receive(far, start, stop))
        start = stop
    return b"".join(parts)


def piece_name(file: Path, number: int) -> str:
    """What a piece of a file is called in the store of pieces."""
    return f"{_name(meant(file))}-{number}"


def fetch(file: Path, number: int) -> None:
    """Brings a piece here, if it is not.

    Raises:
        DataError, MachineError: As `read`.
    """
    _piece(file, number).close()


def _piece(file: Path, number: int) -> IO[bytes]:
    far = meant(file)
    start, end = number * PIECE, min((number + 1) * PIECE, far.size)
    name = piece_name(file, number)
    return keep(name, end - start, lambda: [wire.receive(far, start, end)])


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
        """At most up to the end of a piece, for none is fetched in part; else a piece's worth."""
        if self.kept:
            data = read(self.file, self.at, min(len(buffer), PIECE - self.at % PIECE))
        else:
            end = min(self.at + min(len(buffer), PIECE), self.far.size)
            data = wire.receive(self.far, self.at, end) if self.at < end else b""
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


# -- pieces on the disk ---------------------------------------------------------------------------


def pieces_dir() -> Path:
    """The store of pieces."""
    return _home() / "pieces"


def kept_file(name: str) -> Path:
    """The file under a name in the store of pieces, whether it is there or not."""
    return pieces_dir() / f"{name}{ENDING}"


def keep(name: str, size: int, make: Callable[[], Iterable[bytes | memoryview]]) -> IO[bytes]:
    """What is kept under a name, made by whoever is first of all threads and processes.

    It is given open, for another may let go of it at any time. Who makes it holds one of a few
    locks that lie elsewhere, and no name goes with what is let go of.

    Args:
        name: Of letters, digits and dashes.
        size: Bytes for which room is made.
        make: Gives them, part by part.

    Returns:
        A file whose last 8 bytes tell its length, and are not of what was made.

    Raises:
        DataError, MachineError: As `make`; `env.disk_full`, `env.write_failed`.
    """
    file, began = kept_file(name), time.monotonic()
    guard = _home() / "locks" / sha256(name.encode()).hexdigest()[:2]
    while True:
        if found := _whole(file):
            return found
        try:
            with io.lock(guard, "fetch"):
                if found := _whole(file):
                    return found
                _make_room(size + TAIL)
                io.write_parts(file, _with_tail(make()), size + TAIL)
        except BusyError:
            if time.monotonic() - began > PATIENCE:  # its holder may be gone without a word
                io.remove(guard / io.LOCK)
                began = time.monotonic()
            time.sleep(0.02)


def forget(names: Iterable[str]) -> bool:
    """Lets go of what is kept under names; whether there was any."""
    files = [file for name in names if (file := kept_file(name)).is_file()]
    for file in files:
        io.remove(file)
    return bool(files)


def _with_tail(parts: Iterable[bytes | memoryview]) -> Iterable[bytes | memoryview]:
    length = TAIL
    for part in parts:
        length += len(part)
        yield part
    yield length.to_bytes(TAIL, "little")


def _whole(file: Path) -> IO[bytes] | None:
    """Opens what is kept, at its start; None where it is not, or cut off."""
    try:
        handle = file.open("rb")
    except FileNotFoundError:
        return None
    length = handle.seek(0, 2)
    handle.seek(max(0, length - TAIL))
    if length >= TAIL and int.from_bytes(handle.read(TAIL), "little") == length:
        handle.seek(0)
        return handle
    handle.close()
    io.remove(file)
    return None


def _kept_files() -> list[tuple[int, str, int]]:
    """When, under which name and how large; the oldest first. There may be thousands."""
    found, left = [], False
    with suppress(FileNotFoundError), os.scandir(pieces_dir()) as entries:
        for entry in entries:
            if not entry.name.endswith(ENDING):
                left = left or io.TEMP.fullmatch(entry.name) is not None
                continue
            with suppress(FileNotFoundError):
                status = entry.stat()
                found.append((status.st_mtime_ns, entry.name, status.st_size))
    if left:
        io.sweep(pieces_dir())
    return sorted(found)


def _make_room(need: int) -> None:
    """Lets go of what has been here longest; whoever fetches beside this one may go past it."""
    kept = _kept_files()
    total = need + sum(size for _, _, size in kept)
    for _, name, size in kept:
        if total <= ROOM:
            return
        io.remove(pieces_dir() / name)
        total -= size
