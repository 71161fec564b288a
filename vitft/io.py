"""The only door to the disk: every byte vitft keeps is written here, whole or not at all.

A file is written beside its target, forced to the disk, then renamed over it; a folder is filled
under a temporary name, sealed with a manifest of sizes and sha256, then renamed. Whatever happens
between (kill, power cut, full disk), a reader meets the old one or the new one, never a mixture.

    files      write_bytes  write_text  write_json  write_csv  write_tensors  staged_file
    logs       append_line  read_lines  trim_lines  open_log   appending  read_json
    folders    staged_dir  verify_dir  newest_whole  keep_newest  make_dir  scratch_dir
    names      remove  move  move_aside  link_latest  sweep
    machine    lock  locked_dir  require_free  require_space  require_writable  require_outside
               lies_in  cache_dir

Temporary names are `.<name>.<8 hex digits>.tmp`, hidden from every pattern that does not start with
a dot, and locked by their writer, so that `sweep` can tell a dead one from a live one.

Limits: rename and fsync are as good as the file system (NFS and FUSE may promise less); Windows has
no directory fsync, and there a lock left by a killed process must be removed by hand.
"""

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any

from vitft import encode
from vitft.errors import BusyError, MachineError, RecipeError, VitftError

if TYPE_CHECKING:
    from vitft.encode import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
LOCK = "run.lock"
CHUNK = 1 << 24  # bytes per write call and per hash step
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # three ways to say: no room
UNABLE = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}  # not on this file system
TEMP = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.(?P<kind>tmp|old)(\.\w+)?")
CLUTTER = re.compile(r"\.DS_Store|Thumbs\.db|\._.*|\.nfs.*")  # left by file browsers and NFS


def _exchange(one: Path, other: Path) -> None:
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
    exchange=_exchange,
    mkdir=os.mkdir,
    unlink=os.unlink,
    rmdir=os.rmdir,
    symlink=os.symlink,
    truncate=os.truncate,
)


# --- sums ---


def sha256_bytes(data: bytes) -> str:
    """The sha256 of bytes, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """The sha256 of a file's content, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- files ---


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces a file whole; parent folders are made.

    Raises:
        MachineError: `env.disk_full` or `env.write_failed`; the earlier file is then unchanged.
    """
    _replace(Path(path), [data], len(data))


def write_text(path: Path, text: str) -> None:
    """Replaces a text file: UTF-8; file names that are not UTF-8 come out as on disk."""
    text = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text)  # not from a file name
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: Path, obj: object) -> None:
    """Replaces a JSON file; NaN and infinity become null, arrays lists, dataclasses objects."""
    write_bytes(path, (encode.json_text(obj, indent=1) + "\n").encode())


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Replaces a CSV file; values are quoted where they need it."""
    write_text(path, encode.csv_text(header, rows))


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> None:
    """Replaces a safetensors file, without a second copy of the tensors in memory.

    Equal tensors and metadata give equal bytes. Tensors that share storage are each written out.

    Args:
        path: The target.
        tensors: torch tensors on any device, or numpy arrays; views are made contiguous.
        metadata: Text that travels in the header.

    Raises:
        MachineError: As `write_bytes`.
        TypeError: A dtype that safetensors cannot hold.

    Source: https://github.com/huggingface/safetensors#format
    """
    size, chunks = encode.tensor_chunks(tensors, metadata)
    _replace(Path(path), chunks, size)


@contextmanager
def staged_file(final: Path) -> Iterator[Path]:
    """For writers that insist on a path of their own (an ONNX exporter): a temporary one to fill.

    When the block ends well, the file is forced to the disk and renamed to `final`.
    """
    make_dir(final.parent)
    temp = _temp(final, ".tmp" + final.suffix)
    with _explained(final), _discarding(temp):
        yield temp
        _sync_file(temp)
        CALLS.replace(temp, final)
        _sync_folder(final.parent)


def _replace(path: Path, chunks: "Iterable[bytes | memoryview]", size: int) -> None:
    make_dir(path.parent)
    temp = _temp(path)
    with _explained(path, size), _discarding(temp):
        with CALLS.open(temp, "xb", buffering=0) as file:
            _hold(file.fileno())
            for chunk in chunks:
                _write(file, chunk)
            if not _is_staged(path):
                CALLS.fsync(file.fileno())
        CALLS.replace(temp, path)
        _sync_folder(path.parent)


def _write(file: IO[bytes], data: "bytes | memoryview") -> None:
    left = memoryview(data).cast("B")
    while left:  # a write may take less than it was given, near a limit
        left = left[CALLS.write(file.fileno(), left[:CHUNK]) :]


def _sync_file(path: Path) -> None:
    with CALLS.open(path, "r+b", buffering=0) as file:  # Windows forces only what is open to write
        CALLS.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    if not _is_staged(path / "x"):  # that is forced to the disk once, when it is sealed
        _force_folder(path)


def _force_folder(path: Path) -> None:
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


def _is_staged(path: Path) -> bool:
    return any(TEMP.fullmatch(parent.name) for parent in path.parents)


def _temp(path: Path, kind: str = ".tmp") -> Path:
    # The name is cut, so that a target of 255 bytes still has a temporary neighbour.
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}{kind}")


@contextmanager
def _discarding(temp: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _discard(temp)
        raise


def _discard(path: Path) -> None:
    with suppress(OSError):  # the first error is the one to tell; `sweep` takes what stays
        _delete(path)


# --- logs that grow ---


def append_line(path: Path, record: Mapping[str, object]) -> None:
    """Adds one JSON line and forces it to the disk; when this returns, the line stays.

    A half line that a killed process left is cut off first. After a failure the file is as before.
    """
    data = (encode.json_text(record) + "\n").encode()
    make_dir(path.parent)
    fresh = not path.exists()
    with _explained(path, len(data)):
        size = 0 if fresh else _whole_size(path)
        if not fresh and size < path.stat().st_size:
            CALLS.truncate(path, size)
        try:
            with CALLS.open(path, "ab", buffering=0) as file:
                _write(file, data)
                CALLS.fsync(file.fileno())
            if fresh:
                _sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                CALLS.unlink(path) if fresh else CALLS.truncate(path, size)
            raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON lines file; a half last line is dropped, a missing file is empty.

    Raises:
        MachineError: `env.damaged`: a line before the last is not a JSON object.
    """
    records = []
    for number, line in enumerate(_whole_lines(path), 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise MachineError.of(
                "env.damaged",
                f"{path}:{number}",
                f"is not a JSON object ({len(line):,} bytes)",
                "remove that line, or restore the file from a copy",
            )
        records.append(record)
    return records


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        MachineError: `env.damaged`: missing, unreadable, no JSON, or something else than an object.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
        problem = f"holds {type(found).__name__} where an object belongs"
    except OSError as error:
        found, problem = None, f"cannot be read ({_errno_name(error)})"
    except (ValueError, RecursionError) as error:
        found, problem = None, f"is no JSON ({type(error).__name__}: {str(error)[:100]})"
    if isinstance(found, dict):
        return found
    fix = "restore the file from a copy, or make it again"
    raise MachineError.of("env.damaged", path, problem, fix)


def trim_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drops the records that `keep` says no to; the file is replaced whole, if it changes."""
    lines = _whole_lines(path)
    kept = [line for line, record in zip(lines, read_lines(path), strict=True) if keep(record)]
    data = b"".join(kept)
    if path.exists() and len(data) != path.stat().st_size:
        write_bytes(path, data)


@contextmanager
def appending(path: Path) -> Iterator[Callable[[bytes], None]]:
    """A file that grows over a long time (a download); what was written stays, whatever happens.

    Yields:
        The function that adds bytes. They are forced to the disk when the block ends.
    """
    make_dir(path.parent)
    with ExitStack() as stack:
        with _explained(path):
            file = stack.enter_context(CALLS.open(path, "ab", buffering=0))

        def add(data: bytes) -> None:
            with _explained(path, len(data)):
                _write(file, data)

        yield add
        with _explained(path):
            CALLS.fsync(file.fileno())
            _sync_folder(path.parent)


def open_log(path: Path) -> logging.Handler:
    """A log file as a logging handler; a full disk silences it with one line, and ends nothing."""
    make_dir(path.parent)
    with _explained(path):
        return _LogFile(path, encoding="utf-8", errors="backslashreplace")


class _LogFile(logging.FileHandler):
    _told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if not self._told:
            self._told = True
            with suppress(OSError, ValueError):
                sys.stderr.write(f"{self.baseFilename}: {sys.exc_info()[1]}; the log has gaps\n")


def _whole_lines(path: Path) -> list[bytes]:
    with _explained(path):
        data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1].splitlines(keepends=True)


def _whole_size(path: Path) -> int:
    """Bytes up to and with the last newline; reads backwards, so that long logs cost nothing."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 4096)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


# --- folders ---


@contextmanager
def staged_dir(final: Path) -> Iterator[Path]:
    """A temporary folder to fill; when the block ends well it is sealed and becomes `final`.

    An existing `final` is swapped out in the same step (where the file system cannot swap, in two
    steps, undone by `sweep` after a kill). After any failure it is unchanged, the temporary gone.

    Raises:
        MachineError: `env.disk_full` or `env.write_failed`.
    """
    make_dir(final.parent)
    temp = _temp(final)
    with ExitStack() as stack, _discarding(temp):
        with _explained(final):
            CALLS.mkdir(temp)
            stack.callback(_hold_folder(temp))
        with _explained(final, only_full=True):
            yield temp
        with _explained(final):
            _seal(temp)
            _install(temp, final)


@contextmanager
def scratch_dir() -> Iterator[Path]:
    """A folder in the system's place for them, removed with all it holds in the end."""
    with tempfile.TemporaryDirectory(prefix="vitft-") as name:
        yield Path(name)


def verify_dir(path: Path) -> tuple[str, ...]:
    """Compares a sealed folder with its manifest, byte for byte.

    Returns:
        One text per problem: missing, extra, wrong size, changed content; empty when all is whole.
    """
    try:
        text = (path / MANIFEST).read_bytes().decode()  # read_text would hide a changed newline
        listed = json.loads(text)["files"]
        {name: (entry["size"] + 0, entry["sha256"] + "") for name, entry in listed.items()}
        if text != _manifest(listed):
            return (f"{MANIFEST}: changed since it was written",)
    except FileNotFoundError:
        return (f"{MANIFEST}: missing",)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return (f"{MANIFEST}: unreadable ({type(error).__name__})",)
    found = set(_files(path)) - {MANIFEST}
    problems = [f"{name}: missing" for name in listed if name not in found]
    problems += [f"{name}: not in the manifest" for name in sorted(found - set(listed))]
    problems += [p for name in listed if name in found and (p := _compare(path, name, listed))]
    return tuple(problems)


def newest_whole(
    folder: Path,
    pattern: str,
    on_broken: Callable[[Path, tuple[str, ...]], None] | None = None,
) -> Path | None:
    """The newest sealed folder that verifies; newest is the highest number in the name.

    Args:
        folder: Where to look.
        pattern: Such as `step-*`.
        on_broken: Called with each newer folder that does not verify, and its problems.
    """
    for path in reversed(_numbered(folder, pattern)):
        problems = verify_dir(path)
        if not problems:
            return path
        if on_broken is not None:
            on_broken(path, problems)
    return None


def keep_newest(folder: Path, pattern: str, count: int) -> tuple[Path, ...]:
    """Removes all but the newest `count` (at least 1) folders; returns what was removed."""
    old = tuple(_numbered(folder, pattern)[: -max(1, count)])
    for path in old:
        remove(path)
    return old


def _numbered(folder: Path, pattern: str) -> list[Path]:
    def key(path: Path) -> tuple[list[int], str]:
        return [int(n) for n in re.findall(r"\d+", path.name)], path.name

    return sorted((p for p in folder.glob(pattern) if p.is_dir() and not p.is_symlink()), key=key)


def _seal(folder: Path) -> None:
    listed = {}
    for name in _files(folder):
        path = folder / name
        _sync_file(path)
        listed[name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    write_bytes(folder / MANIFEST, _manifest(listed).encode())
    _sync_file(folder / MANIFEST)
    for root, _, _ in os.walk(folder, topdown=False):
        _force_folder(Path(root))


def _manifest(listed: object) -> str:
    # One spelling only: `verify_dir` writes it again, so no byte of the manifest can change unseen.
    return encode.json_text({"manifest": 1, "files": listed}, indent=1) + "\n"


def _files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if not (path.is_dir() and not path.is_symlink()) and not CLUTTER.fullmatch(path.name)
    )


def _compare(folder: Path, name: str, listed: Mapping[str, Any]) -> str | None:
    path, want = folder / name, listed[name]
    try:
        size = path.stat().st_size
        if not path.is_file():
            return f"{name}: not a regular file"
        if size != want["size"]:
            return f"{name}: {size:,} bytes, should be {want['size']:,}"
        if sha256_file(path) != want["sha256"]:
            return f"{name}: content changed (sha256 differs)"
    except OSError as error:
        return f"{name}: unreadable ({_errno_name(error)})"
    return None


def _install(temp: Path, final: Path) -> None:
    if not os.path.lexists(final):
        CALLS.replace(temp, final)
        _sync_folder(final.parent)
        return
    old = temp
    try:
        CALLS.exchange(temp, final)
    except OSError as error:
        if error.errno not in UNABLE:
            raise
        old = _swap_in_two_steps(temp, final)
    _sync_folder(final.parent)
    _discard(old)


def _swap_in_two_steps(temp: Path, final: Path) -> Path:
    old = final.with_name(f".{final.name}.{secrets.token_hex(4)}.old")
    CALLS.replace(final, old)
    try:
        CALLS.replace(temp, final)
    except BaseException:
        CALLS.replace(old, final)
        raise
    return old


# --- names ---


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
    with _explained(path):
        try:
            CALLS.mkdir(path)
        except FileExistsError:
            if not path.is_dir():  # else another process was faster
                raise
        _sync_folder(path.parent)


def remove(path: Path) -> None:
    """Removes a file, a link or a whole tree; missing is fine. Links are never followed.

    Another process may be faster with the same. A tree first loses its name, so that
    a kill half-way leaves no half tree under it.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return
    with _explained(path), suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            temp = _temp(path)
            CALLS.replace(path, temp)
            _delete(temp)
        else:
            CALLS.unlink(path)
        _sync_folder(path.parent)


def move(source: Path, target: Path) -> None:
    """Renames a finished file over another, both forced to the disk."""
    make_dir(target.parent)
    with _explained(target):
        _sync_file(source)
        CALLS.replace(source, target)
        _sync_folder(target.parent)


def move_aside(path: Path) -> Path:
    """Gives a file or folder the next free name `<name>.old-<n>`, and returns that."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.old-{number}")):
        number += 1
    with _explained(path):
        CALLS.replace(path, aside)
        _sync_folder(path.parent)
    return aside


def link_latest(folder: Path, name: str = "latest") -> Path:
    """Points `<parent>/<name>` to the folder: a relative link, or a text file without links."""
    link = folder.parent / name
    temp = _temp(link)
    try:
        CALLS.symlink(folder.name, temp, target_is_directory=True)
    except OSError as error:
        if error.errno not in UNABLE | {errno.EPERM}:  # Windows without the privilege; FAT
            with _explained(link):
                raise
        write_text(link, folder.name + "\n")
        return link
    with _explained(link), _discarding(temp):
        CALLS.replace(temp, link)
        _sync_folder(link.parent)
    return link


def sweep(folder: Path, *, older_than: float = 60.0) -> tuple[Path, ...]:
    """Removes what killed writers left below a folder, and finishes a swap they left half done.

    Args:
        folder: Searched with everything below.
        older_than: Seconds; younger leftovers stay, as their writer may not hold them yet.

    Returns:
        The temporary names found dead.
    """
    dead = []
    for root, folders, files in os.walk(folder):
        hits = [name for name in (*folders, *files) if TEMP.fullmatch(name)]
        folders[:] = [name for name in folders if name not in hits]
        dead += [path for name in hits if _is_dead(path := Path(root, name), older_than)]
    for path in dead:
        _bury(path)
    return tuple(dead)


def _bury(path: Path) -> None:
    match = TEMP.fullmatch(path.name)
    if match and match["kind"] == "old":
        final = path.with_name(match["name"])
        if not os.path.lexists(final):
            with _explained(final):
                CALLS.replace(path, final)
                _sync_folder(final.parent)
            return
    _discard(path)


def _is_dead(path: Path, older_than: float) -> bool:
    try:
        if time.time() - path.lstat().st_mtime < older_than:
            return False
        if path.is_symlink() or fcntl is None:
            return True
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False  # gone meanwhile, or not ours to touch
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def _delete(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        CALLS.unlink(path)
        return
    for child in list(path.iterdir()):
        _delete(child)
    CALLS.rmdir(path)


def _hold(handle: int) -> None:
    if fcntl is not None:
        with suppress(OSError):  # no locks on this file system: age alone decides then
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _hold_folder(folder: Path) -> Callable[[], None]:
    if fcntl is None:
        return lambda: None
    handle = os.open(folder, os.O_RDONLY)
    _hold(handle)
    return lambda: os.close(handle)


# --- machine ---


@contextmanager
def lock(folder: Path, purpose: str, *, patience: float = 10.0) -> Iterator[None]:
    """Holds a folder for one process; the kernel frees it when that process dies, kill -9 included.

    Leftovers of killed writers below the folder are swept, since none of them can be alive.

    Args:
        folder: Made if missing.
        purpose: Such as `train`, told to whoever is refused.
        patience: Seconds to wait when the holder itself is dead but its workers are still leaving.

    Raises:
        BusyError: `env.busy` with pid, host and start time of the holder.
    """
    make_dir(folder)
    path = folder / LOCK
    with _acquire(path, time.monotonic() + patience) as file:
        try:
            _sign(file, path, purpose)
            sweep(folder, older_than=0.0)
            yield
        finally:
            _discard(path)  # still held, so nobody else's lock can be meant


@contextmanager
def locked_dir(names: Iterable[Path], purpose: str) -> Iterator[Path]:
    """Makes a folder under the first free name and holds it as `lock` does.

    It is made and locked under a temporary name and renamed, so that nobody ever meets it without
    its lock, and two processes that ask for the same names get two folders.

    Args:
        names: To be tried, of one parent.
        purpose: As for `lock`.

    Raises:
        MachineError: `env.write_failed`, also when no name is free.
    """
    left = list(names)
    make_dir(left[0].parent)
    for path in left[0].parent.iterdir():  # what a process left that was killed in between
        if TEMP.fullmatch(path.name) and _is_dead(path, 60.0):
            _bury(path)
    temp = _temp(left[0])
    with ExitStack() as stack, _discarding(temp):
        with _explained(left[0]):
            CALLS.mkdir(temp)
            stack.callback(_hold_folder(temp))
        file = stack.enter_context(_acquire(temp / LOCK, time.monotonic()))
        _sign(file, temp / LOCK, purpose)
        if fcntl is None:
            file.close()  # Windows renames no folder with an open file; there the name is the lock
        with _explained(left[0]):
            folder = next((name for name in left if _took(temp, name)), None)
            if folder is None:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            _sync_folder(folder.parent)
        try:
            yield folder
        finally:
            _discard(folder / LOCK)


def _sign(file: IO[bytes], path: Path, purpose: str) -> None:
    """Says in the lock file who holds it."""
    with _explained(path):
        CALLS.truncate(path, 0)
        _write(file, encode.json_text(_holder() | {"purpose": purpose}).encode())


def _took(temp: Path, name: Path) -> bool:
    """Renames a folder that is not empty, unless the name is taken."""
    if os.path.lexists(name):
        return False
    try:
        CALLS.replace(temp, name)
    except OSError:
        if os.path.lexists(name):  # a faster process took it, between the two lines
            return False
        raise
    return True


def require_free(folder: Path) -> None:
    """Refuses a folder that a living process holds; one whose holder was killed is free.

    Raises:
        BusyError: As `lock`.
    """
    if os.path.lexists(folder / LOCK):
        with lock(folder, "look"):
            pass


def require_space(folder: Path, need: int) -> None:
    """Refuses work whose output has no room.

    Args:
        folder: Where it will be written; need not exist yet.
        need: Bytes.

    Raises:
        MachineError: `env.disk_full`.
    """
    if _free(folder) < need:
        raise _no_room(folder, need, "ENOSPC")


def require_writable(folder: Path) -> None:
    """Tries a real write, rename and removal, before hours of work depend on them.

    Raises:
        MachineError: `env.write_failed` or `env.disk_full`.
    """
    trial = _temp(Path(folder) / "trial")
    write_bytes(trial, b"vitft")
    remove(trial)


def lies_in(path: Path, folder: Path) -> bool:
    """Whether what is written under a name lands in a folder, or replaces it."""
    landing = Path(os.path.realpath(path.parent), path.name)  # a link to a file is replaced itself
    if os.path.isdir(path):  # noqa: PTH112  (False, not an error, where it may not be seen)
        landing = Path(os.path.realpath(path))
    return landing.is_relative_to(os.path.realpath(folder))


def require_outside(out: Path, inputs: Iterable[Path]) -> None:
    """Refuses an output that would replace one of the inputs, or lie in a folder of them.

    Raises:
        RecipeError: `cli.out_in_data`.
    """
    for given in inputs:
        if given.is_dir() and lies_in(out, given):
            text = f"lies below the data {given}, where vitft never writes"
        elif os.path.realpath(out) == os.path.realpath(given):
            text = f"is {given}, which is read and never written"
        else:
            continue
        raise RecipeError.of("cli.out_in_data", out, text, "name a place elsewhere")


def cache_dir() -> Path:
    """Where things that can be made again are kept: $VITFT_CACHE, else the user's cache folder."""
    if own := os.environ.get("VITFT_CACHE"):
        return Path(own).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "vitft"


def _acquire(path: Path, deadline: float) -> IO[bytes]:
    while True:
        with _explained(path):
            file, state = _try_lock(path)
        if state == "held":
            return file
        file.close()
        holder = _read_holder(path)
        if state == "busy" and not (_has_left(holder) and time.monotonic() < deadline):
            raise _busy(path, holder)
        time.sleep(0.05)


def _try_lock(path: Path) -> tuple[IO[bytes], str]:
    """Opens the lock file and says `held`, `busy` or `again`."""
    try:
        file, created = CALLS.open(path, "xb", buffering=0), True
    except FileExistsError:
        file, created = CALLS.open(path, "ab", buffering=0), False
    if fcntl is None:
        return file, "held" if created else "busy"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNABLE:  # a file system without locks: who created the file holds it
            return file, "held" if created else "busy"
        return file, "busy"
    try:  # the former holder removes the name before it lets go: then this is nobody's lock
        same = os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        same = False
    return file, "held" if same else "again"


def _holder() -> dict[str, object]:
    start = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"pid": os.getpid(), "host": socket.gethostname(), "start": start}


def _read_holder(path: Path) -> dict[str, Any]:
    try:
        holder = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # it is writing its name just now, or has just left
    return holder if isinstance(holder, dict) else {}


def _has_left(holder: Mapping[str, Any]) -> bool:
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _busy(path: Path, holder: Mapping[str, Any]) -> VitftError:
    who = ", ".join(f"{key} {value}" for key, value in holder.items()) or "another process"
    return BusyError.of(
        "env.busy",
        path.parent,
        f"is in use by {who}",
        f"wait for it, stop it, or choose another output folder (if it is surely gone: rm {path})",
    )


# --- errors ---


@contextmanager
def _explained(path: Path, need: int | None = None, *, only_full: bool = False) -> Iterator[None]:
    """Turns the system's errors into ours; `only_full` passes the rest on, as the caller's."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise _no_room(path, need, _errno_name(error)) from error
        if only_full:
            raise
        raise MachineError.of(
            "env.write_failed",
            _shown(path),
            f"cannot be written: {error.strerror or error} ({_errno_name(error)})",
            "check the folder and your permissions there, or choose another output folder",
        ) from error


def _no_room(path: Path, need: int | None, name: str) -> VitftError:
    wanted = "" if need is None else f"need {_size(need)}, "
    return MachineError.of(
        "env.disk_full",
        _shown(path),
        f"{wanted}{_size(_free(path))} free ({name}); what was there before is unchanged",
        "make room or raise the quota, or choose an output folder on another disk",
    )


def _shown(path: Path) -> Path:
    """The path as it will be called when it is finished."""
    parts = ((match["name"] if (match := TEMP.fullmatch(p)) else p) for p in path.parts)
    return Path(*parts)


def _free(path: Path) -> int:
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


def _errno_name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, type(error).__name__)
