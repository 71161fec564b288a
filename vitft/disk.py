"""The system's calls behind `io`: each change to the disk, forced, and told when it fails.

Every change to the disk is one of `CALLS`. Around them stands what all writers share: the hidden
temporary name that a file or folder is made under, the lock that says its writer lives, the forcing
of bytes and names to the disk, and the words for what the system refused.

Only the rooms behind `io` may import this one.
"""

import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO

from vitft.errors import MachineError, VitftError

try:
    import fcntl as fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CHUNK = 1 << 24  # bytes per write call and per hash step
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # three ways to say: no room
UNABLE = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}  # not on this file system
TEMP = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<kind>tmp|old)(\.\w+)?")


def exchange(one: Path, other: Path) -> None:
    """Swaps two names in one step, which Python's os has no call for."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    a, b = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "darwin":
            failed = libc.renamex_np(a, b, 2)  # RENAME_SWAP
        else:
            failed = libc.renameat2(-100, a, -100, b, 2)  # AT_FDCWD, RENAME_EXCHANGE
    except AttributeError:
        raise OSError(errno.ENOSYS, "no call to exchange two names", str(other)) from None
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(other))


# Every change to the disk is one of these calls; the fault tests put a failing one in its place.
CALLS = SimpleNamespace(
    open=open,
    write=os.write,
    fsync=os.fsync,
    replace=os.replace,
    exchange=exchange,
    mkdir=os.mkdir,
    unlink=os.unlink,
    rmdir=os.rmdir,
    symlink=os.symlink,
    truncate=os.truncate,
)


# --- bytes and names, forced to the disk ---


def write(file: IO[bytes], data: "bytes | memoryview") -> None:
    """Hands all bytes to the system, which may take fewer than it was given, near a limit."""
    left = memoryview(data).cast("B")
    while left:
        left = left[CALLS.write(file.fileno(), left[:CHUNK]) :]


def sync_file(path: Path) -> None:
    """Forces a finished file's bytes to the disk."""
    with CALLS.open(path, "r+b", buffering=0) as file:  # Windows forces only what is open to write
        CALLS.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Forces a folder's names to the disk; a staged one's only once, when it is sealed."""
    if not is_staged(path / "x"):
        force_folder(path)


def force_folder(path: Path) -> None:
    """Forces a folder's names to the disk, where the system has a call for it."""
    if os.name == "nt":
        return  # has no such call
    handle = os.open(path, os.O_RDONLY)
    try:
        CALLS.fsync(handle)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:  # file systems without it
            raise
    finally:
        os.close(handle)


def make_dir(path: Path) -> None:
    """Makes a folder and its parents; an existing one is left alone.

    Raises:
        MachineError: `env.write_failed`.
    """
    path = Path(path)
    if path.is_dir():
        return
    if path.parent != path:
        make_dir(path.parent)
    with explained(path):
        try:
            CALLS.mkdir(path)
        except FileExistsError:
            if not path.is_dir():  # else another process was faster
                raise
        sync_folder(path.parent)


# --- temporary names ---


def is_staged(path: Path) -> bool:
    """Whether a path lies in a folder that has not got its name yet."""
    return any(TEMP.fullmatch(parent.name) for parent in path.parents)


def temp_name(path: Path, kind: str = ".tmp") -> Path:
    """A hidden neighbour to write under; cut, so that a target of 255 bytes still has one."""
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}{kind}")


@contextmanager
def discarding(temp: Path) -> Iterator[None]:
    """Removes the temporary when the block fails."""
    try:
        yield
    except BaseException:
        discard(temp)
        raise


def discard(path: Path) -> None:
    """Removes what is there, if it can; what stays is for `sweep`, the first error to be told."""
    with suppress(OSError):
        delete(path)


def delete(path: Path) -> None:
    """Removes a file, a link or a whole tree; links are never followed."""
    if path.is_symlink() or not path.is_dir():
        CALLS.unlink(path)
        return
    for child in list(path.iterdir()):
        delete(child)
    CALLS.rmdir(path)


def hold(handle: int) -> None:
    """Marks an open temporary as that of a living process, where the file system has locks."""
    if fcntl is not None:
        with suppress(OSError):  # without locks age alone decides
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def hold_folder(folder: Path) -> Callable[[], None]:
    """The same for a folder; returns what lets go of it."""
    if fcntl is None:
        return lambda: None
    handle = os.open(folder, os.O_RDONLY)
    hold(handle)
    return lambda: os.close(handle)


# --- errors ---


@contextmanager
def explained(path: Path, need: int | None = None, *, only_full: bool = False) -> Iterator[None]:
    """Turns the system's errors into ours; `only_full` passes the rest on, as the caller's."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise no_room(path, need, errno_name(error)) from error
        if only_full:
            raise
        raise MachineError.of(
            "env.write_failed",
            _shown(path),
            f"cannot be written: {error.strerror or error} ({errno_name(error)})",
            "check the folder and your permissions there, or choose another output folder",
        ) from error


def no_room(path: Path, need: int | None, name: str) -> VitftError:
    """The error of a disk, quota or file size limit that is full."""
    wanted = "" if need is None else f"need {_size(need)}, "
    return MachineError.of(
        "env.disk_full",
        _shown(path),
        f"{wanted}{_size(free(path))} free ({name}); what was there before is unchanged",
        "make room or raise the quota, or choose an output folder on another disk",
    )


def _shown(path: Path) -> Path:
    """The path as it will be called when it is finished."""
    parts = ((match["name"] if (match := TEMP.fullmatch(p)) else p) for p in path.parts)
    return Path(*parts)


def free(path: Path) -> int:
    """Bytes free where a path is, or will be."""
    for folder in (path, *path.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return 0


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def errno_name(error: OSError) -> str:
    """Such as `ENOSPC`."""
    return errno.errorcode.get(error.errno or 0, type(error).__name__)
