"""The bytes of a stranger's file: reading them safely, naming the format, wording the faults."""

import errno
import io
import os
import re
import stat
from pathlib import Path

from PIL import Image

from vitft import containers
from vitft.errors import DataError, Fault, MachineError, VitftError, escape

SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
MAX_BYTES = 512 * 2**20  # of one file
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
READS = "vitft reads " + ", ".join(FORMATS)
COPY_AGAIN = "copy the file again, or set data.on_bad: skip"
# Never wait for a pipe's writer; read bytes as they are. Each system has one of the two or both.
OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)

# What else people keep in image folders, by its first bytes: (pattern, name, help).
FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (rb"....ftyp(heic|heix|hevc|heim|heis|mif1|msf1)", "HEIC", "pillow-heif or ImageMagick"),
    (rb"....ftyp(avif|avis)", "AVIF", "Pillow or ImageMagick"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "JPEG XL", "djxl or ImageMagick"),
    (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000", "ImageMagick"),
    (rb"%!PS|\xc5\xd0\xd3\xc6|%PDF", "PostScript or PDF", "a PDF viewer's export"),
    (rb"\xd7\xcd\xc6\x9a|\x01\x00\x00\x00.{36} EMF", "Windows metafile", "an office program"),
    (rb"8BPS", "Photoshop", "Photoshop or GIMP"),
    (rb"\x00\x00[\x01\x02]\x00", "Windows icon", "ImageMagick"),
    (rb"P[1-7fF]\s", "Netpbm", "ImageMagick"),
    (rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", "video", "ffmpeg, frame by frame"),
)
# Files that are no pictures at all: (pattern, what it looks like).
STRANGERS: tuple[tuple[bytes, str], ...] = (
    (rb"version https://git-lfs", "a git-lfs pointer: run `git lfs pull`"),
    (rb"(?i)\s*<(!doctype html|html|head|body)", "a web page"),
    (rb"\s*<svg|\s*<\?xml.{0,200}<svg", "an SVG drawing"),
    (rb"\s*<\?xml|\s*<", "XML"),
    (rb"\s*[\[{]", "JSON"),
    (rb"PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf", "an archive"),
)


class BadImage(DataError):
    """One file that cannot be used as a photograph; carries exactly one fault."""


def read_bytes(path: Path) -> bytes:
    """All bytes of a regular file, or of a picture in a shard (`vitft.containers`).

    A pipe, socket or device is never read: the type is asked before opening, and again of the open
    file, because the name may have changed hands in between (the open itself cannot block).

    Raises:
        BadImage: `data.missing`, `data.broken_link`, `data.permission`, `data.not_regular`,
            `data.empty`, `data.too_large`, `data.unreadable`.
        MachineError: `env.no_handles`: the machine cannot, whatever the file.
    """
    try:
        _require_regular(path, path.stat())
        handle = os.open(path, OPEN_FLAGS)
        with io.FileIO(handle) as file:
            status = os.fstat(handle)
            _require_regular(path, status)
            data = _read_all(file, status.st_size)
    except NotADirectoryError as error:
        data = _contained(path, error)
    except OSError as error:
        if error.errno in SHORTAGES:
            raise _out_of(path, error) from None
        raise _unopenable(path, error) from None
    if not data:
        raise bad("data.empty", path, "0 bytes", COPY_AGAIN)
    return data


def _contained(path: Path, error: OSError) -> bytes:
    """A path that goes on behind a file, where the file holds pictures."""
    try:
        place = containers.locate(path)
        if place is None:
            raise error
        data = containers.read(*place, MAX_BYTES)
    except OSError as fault:
        if fault.errno in SHORTAGES:
            raise _out_of(path, fault) from None
        raise _unopenable(path, fault) from None
    except DataError as fault:
        raise BadImage(fault.faults) from None
    if data is None:
        raise bad("data.too_large", path, f"more than {MAX_BYTES:,} bytes", "make it smaller")
    return data


def kind_of(data: bytes, place: object) -> str:
    """The format, by the first bytes; the file's name plays no part.

    Raises:
        BadImage: `data.empty`, `data.format` (a picture of another kind), `data.not_image`.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if data.startswith(b"BM") and len(data) >= 18:
        return "BMP"
    raise _foreign(data, place)


def _foreign(data: bytes, place: object) -> BadImage:
    """Says what the bytes are instead."""
    if not data:
        return bad("data.empty", place, "0 bytes", COPY_AGAIN)
    for pattern, name, tool in FOREIGN:
        if re.match(pattern, data, re.DOTALL):
            return bad("data.format", place, f"{name} file; {READS}", f"convert it, with {tool}")
    start = escape(data[:24].decode("latin-1"))
    names = (name for pattern, name in STRANGERS if re.match(pattern, data[:512], re.DOTALL))
    name = next(names, "damaged from its first byte")
    text = f"{len(data):,} bytes that start with '{start}' ({name}?); {READS}"
    return bad("data.not_image", place, text, "replace or remove the file")


def bad(id: str, place: object, text: str, fix: str) -> BadImage:
    """One file, one fault."""
    return BadImage([Fault(id, str(place), text, fix)])


def undecodable(kind: str, data: bytes, place: object, error: Exception) -> BadImage:
    """Pillow's complaint in our words; what it says is kept, where it says anything."""
    said = str(error).strip() or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return bad("data.too_large", place, f"{kind}: {said}", "make the picture smaller")
    if isinstance(error, MemoryError):
        return bad("data.too_large", place, f"{kind} does not fit in memory", "make it smaller")
    if left := re.search(r"\((\d+) bytes not processed\)", said):
        text = f"{kind} stops early ({len(data):,} bytes, decoder left {left[1]} unread)"
        return bad("data.truncated", place, text, COPY_AGAIN)
    if "truncated" in said.lower() or _ends_early(kind, data):
        return bad("data.truncated", place, f"{kind} stops early ({len(data):,} bytes)", COPY_AGAIN)
    return bad("data.damaged", place, f"{kind} of {len(data):,} bytes: {said}", COPY_AGAIN)


def _ends_early(kind: str, data: bytes) -> bool:
    """Whether the file's own end mark or length is missing."""
    if kind == "PNG":
        return b"IEND" not in data[-64:]
    if kind == "WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if kind == "BMP":
        return len(data) < int.from_bytes(data[2:6], "little")
    return kind == "JPEG" and b"\xff\xd9" not in data[-64:]


def _require_regular(path: Path, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        if status.st_size > MAX_BYTES:
            text = f"{status.st_size:,} bytes > {MAX_BYTES:,}"
            raise bad("data.too_large", path, text, "make the picture smaller")
        return
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
    raise bad("data.not_regular", path, f"{kind}, not a regular file", "remove it from the folder")


def _read_all(file: io.FileIO, size: int) -> bytes:
    """Reads to the end; a file that grows while it is read stops at `MAX_BYTES`."""
    parts = [file.read(size + 1)]
    while parts[-1] and sum(map(len, parts)) <= MAX_BYTES:
        parts.append(file.read(2**20))
    return b"".join(part for part in parts if part)


def _unopenable(path: Path, error: OSError) -> BadImage:
    """The system's refusal in our words."""
    if isinstance(error, PermissionError):
        return bad("data.permission", path, _permissions(path), "make it readable: chmod u+r")
    if error.errno == errno.ELOOP:
        return bad("data.broken_link", path, "a link that leads to itself", "remove the link")
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        text = f"broken link -> {path.readlink()}"
        return bad("data.broken_link", path, text, "restore its target, or remove the link")
    if isinstance(error, FileNotFoundError):
        return bad("data.missing", path, "no such file", "restore it, or scan the folder again")
    return bad("data.unreadable", path, f"the system says: {error.strerror}", COPY_AGAIN)


def _out_of(path: Path, error: OSError) -> VitftError:
    """A shortage of the machine, which must never count against a photograph."""
    text = f"cannot be opened: {error.strerror} ({errno.errorcode[error.errno or 0]})"
    fix = "close other programs, raise the limit (ulimit -n), or lower train.workers"
    return MachineError.of("env.no_handles", path, text, fix)


def _permissions(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return "a folder above it may not be entered"
    return f"not readable: owner uid {status.st_uid}, mode {stat.filemode(status.st_mode)}"
