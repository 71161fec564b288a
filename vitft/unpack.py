"""A gzipped tar file from the network -> a sealed folder, or a refusal of the whole of it.

Only regular files and folders, each name once, none leading out of the folder, and no more bytes or
files than were announced: neither a traversal nor a bomb gets further than a temporary folder.
"""

import gzip
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from vitft import io
from vitft.errors import DataError, VitftError


@dataclass(frozen=True)
class Bounds:
    """What an archive may hold.

    Attributes:
        top: A folder that must be inside.
        bytes: At most, unpacked, the tar format's own bytes included.
        files: At most, folders included.
    """

    top: str
    bytes: int
    files: int


def unpack(file: Path, final: Path, bounds: Bounds) -> None:
    """Unpacks a gzipped tar file into a sealed folder, or refuses it whole.

    Raises:
        DataError: `data.archive`: a path that leaves the folder, anything but files and folders, a
            name twice, more bytes or files than announced, or damage.
    """
    try:
        with (
            io.staged_dir(final) as folder,
            gzip.open(file) as plain,
        ):
            stream = _Bounded(plain, bounds.bytes, file)
            _write_all(stream, folder, file, bounds)
            while stream.read(1 << 16):  # to the checksum that ends a gzip file
                pass
            if not (folder / bounds.top).is_dir():
                raise _refused(file, f"holds no folder {bounds.top}")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _refused(file, f"cannot be unpacked: {error}") from error


def _write_all(stream: "_Bounded", folder: Path, file: Path, bounds: Bounds) -> None:
    seen: set[str] = set()
    with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|") as tar:
        for member in tar:
            _admit(member, folder, seen, file, bounds)
            _write(tar, member, folder)


def _admit(
    member: tarfile.TarInfo, folder: Path, seen: set[str], file: Path, bounds: Bounds
) -> None:
    path = PurePosixPath(member.name)
    problem = None
    if not (member.isfile() or member.isdir()):
        problem = "is neither a file nor a folder"
    elif path.is_absolute() or ".." in path.parts or "\\" in member.name or ":" in member.name:
        problem = "would leave the folder"
    elif str(path) in seen:
        problem = "is there twice"
    elif len(seen) >= bounds.files:
        problem = f"is one more than the {bounds.files:,} files announced"
    elif hasattr(tarfile, "data_filter"):  # Python 3.11.4; ours are the stricter rules
        try:
            tarfile.data_filter(member, str(folder))
        except tarfile.FilterError as error:
            problem = str(error)
    if problem:
        raise _refused(file, f"member {member.name!r} {problem}")
    seen.add(str(path))


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    if member.isdir():
        io.make_dir(folder / member.name)
        return
    content = tar.extractfile(member)
    if content is not None:
        io.write_bytes(folder / member.name, content.read())


class _Bounded:
    """A stream that ends in an error when more comes out than was announced: a bomb."""

    def __init__(self, stream: gzip.GzipFile, limit: int, file: Path) -> None:
        self._stream, self._left, self._file = stream, limit, file

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise _refused(self._file, "unpacks to more bytes than announced")
        return data


def _refused(file: Path, text: str) -> VitftError:
    return DataError.of("data.archive", file, text, "remove it, and download it again")
