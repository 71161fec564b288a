"""Pictures inside large files, read where they lie: here, or afar (`vitft.afar`).

    shards/train-0000.tar/daisy_17.jpg         a member of a tar, found by its name
    plants/train/data-00000-of-00002.arrow/17  a row of a table (`vitft.columns`), by its number

Such a path is a photograph's path everywhere else: nothing is unpacked, and reading is by position,
in any order. Headers are read once per process and file; a process that forks hands them on. Those
of a file afar are read once and for all.
"""

import json
import tarfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from vitft import afar, columns, io
from vitft.errors import DataError, Fault
from vitft.wire import Far

KINDS = (".tar", *columns.KINDS)
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
# What hostile headers bring out of the standard library besides its own error.
BROKEN = (tarfile.TarError, ValueError, EOFError, MemoryError, OverflowError, RecursionError)
COPY_AGAIN = "copy the shard again, or write it anew"


@dataclass(frozen=True)
class Tar:
    """Where the members of a tar lie.

    Attributes:
        spans: Name -> first byte and length; regular files alone, in the order of the tar.
        others: Members of another kind: folders, links, devices, sparse files.
    """

    spans: dict[str, tuple[int, int]]
    others: int


def locate(path: Path) -> tuple[Path, str] | None:
    """The file that holds a picture, and the picture's name in it; None where there is none."""
    for parent in path.parents:
        if parent.suffix.lower() in KINDS and parent.is_file():
            return parent, path.relative_to(parent).as_posix()
    return None


def read(file: Path, name: str, limit: int) -> bytes | None:
    """The bytes of a picture; None where they are more than `limit`.

    Raises:
        OSError: As of a file of its own: missing, or not readable.
        DataError: `data.shard`.
    """
    if columns.holds(file):
        return columns.read(file, name, limit)
    span = members(file).spans.get(name)
    if span is None:
        raise FileNotFoundError(2, "no such member", name)
    if span[1] > limit:
        return None
    if afar.holds(file):
        return afar.read(file, *span)
    with file.open("rb") as handle:
        handle.seek(span[0])
        return handle.read(span[1])


def exists(path: Path) -> bool:
    """Whether a photograph is there, as a file or in one."""
    if path.is_file():
        return True
    found = locate(path)
    if found is None:
        return False
    file, name = found
    return columns.has(file, name) if columns.holds(file) else name in members(file).spans


@dataclass(frozen=True, order=True)
class Piece:
    """Bytes that are fetched at once, with many pictures in them.

    Attributes:
        file: A tar afar, or a Parquet file anywhere.
        number: Of the piece within it.
        size: Bytes.
    """

    file: Path
    number: int
    size: int


def in_pieces(path: Path) -> bool:
    """Whether the pictures of a path's file are had by pieces, not one by one."""
    found = locate(path)
    return found is not None and (afar.holds(path) or columns.in_groups(found[0]))


def piece(path: Path) -> Piece:
    """The piece in which a picture starts.

    Raises:
        FileNotFoundError: No such picture.
    """
    found = locate(path)
    if found is None:
        raise FileNotFoundError(2, "no such picture", str(path))
    file, name = found
    if columns.holds(file):
        return Piece(file, *columns.group(file, name))
    if name not in members(file).spans:
        raise FileNotFoundError(2, "no such member", name)
    return Piece(file, members(file).spans[name][0] // afar.PIECE, afar.PIECE)


def fetch(wanted: Piece) -> None:
    """Brings a piece into the cache, if it is not there.

    Raises:
        DataError, MachineError: As `read`.
    """
    if columns.holds(wanted.file):
        columns.unpacked(wanted.file, wanted.number).close()
    else:
        afar.fetch(wanted.file, wanted.number)


def forget(path: Path) -> bool:
    """Lets go of the pieces that a picture lies in; whether there were any.

    A disk may spoil what it keeps. What its owner knows better is fetched anew.
    """
    if not in_pieces(path):
        return False
    first = piece(path)
    if columns.holds(first.file):
        return afar.forget([columns.kept_name(first.file, first.number)])
    start, length = members(first.file).spans[path.relative_to(first.file).as_posix()]
    last = max(start, start + length - 1) // afar.PIECE
    return afar.forget(afar.piece_name(first.file, k) for k in range(first.number, last + 1))


def mark(path: Path) -> str:
    """What tells a picture afar and its bytes from every other; empty for one that is here."""
    found = locate(path) if afar.holds(path) else None
    return f"{afar.identity(found[0])}:{found[1]}" if found else ""


def members(file: Path) -> Tar:
    """The members of an uncompressed tar.

    Raises:
        OSError: It cannot be opened.
        DataError: `data.shard`: no tar, cut off, damaged in its midst, two tars in one file, a name
            twice, or one that leads out of it.
    """
    if afar.holds(file):
        return _far_members(file, afar.meant(file))
    status = file.stat()
    return _members(file, status.st_size, status.st_mtime_ns)


@cache
def _far_members(file: Path, far: Far) -> Tar:
    """Kept beside the stand-in: to read the headers of a tar is to read all of it."""
    kept = file.with_name(f"{file.name}.members.json")
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(kept.read_bytes())
        if found["far"] == asdict(far):
            spans = {str(name): (int(a), int(b)) for name, (a, b) in found["spans"].items()}
            return Tar(spans, int(found["others"]))
    tar = _members(file, far.size, 0)
    io.write_json(kept, {"far": far, "spans": tar.spans, "others": tar.others})
    return tar


def _open(file: Path) -> IO[bytes]:
    return afar.opened(file) if afar.holds(file) else file.open("rb")


@cache
def _members(file: Path, size: int, changed: int) -> Tar:
    spans: dict[str, tuple[int, int]] = {}
    others = 0
    try:
        with _open(file) as handle, tarfile.open(fileobj=handle, mode="r:") as tar:
            for member in tar:
                cast(Any, tar).members = []  # it would keep every header
                if member.type not in REGULAR or member.issparse():
                    others += 1
                    continue
                name = _safe(file, member.name)
                if name in spans:
                    raise _bad(file, f"holds {name} twice")
                spans[name] = (member.offset_data, member.size)
            read_to = cast(Any, tar).offset
    except BROKEN as error:
        if isinstance(error, DataError):
            raise
        text = f"is no whole uncompressed tar of {size:,} bytes ({type(error).__name__}: {error})"
        raise _bad(file, text) from None
    end = max((start + length for start, length in spans.values()), default=0)
    if end > size:
        raise _bad(file, f"is cut off: {size:,} bytes, and its last member ends at {end:,}")
    _require_end(file, read_to)
    return Tar(spans, others)


def _require_end(file: Path, start: int) -> None:
    """Only zeros may follow where reading stopped: tarfile stops at a damaged header in silence."""
    with _open(file) as handle:
        handle.seek(start)
        while block := handle.read(2**20):
            if block.strip(b"\0"):
                text = (
                    f"has more behind byte {start:,}, where reading ends: a damaged header, or a "
                )
                raise _bad(file, text + "second tar")


def _safe(file: Path, name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise _bad(file, f"holds {name!r}, which would lead out of it")
    return path.as_posix()


def _bad(file: Path, text: str) -> DataError:
    return DataError([Fault("data.shard", str(file), text, COPY_AGAIN)])
