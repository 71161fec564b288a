"""Folders held by one process, so that two runs never write into one; the kernel frees them.

A lock is a file with the holder's pid, host and start, locked by the kernel; where the file system
has no locks, whoever created the file holds it. Only the rooms behind `io` may import this one;
everyone else calls `io`.
"""

import errno
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from vitft import disk, encode
from vitft.disk import (
    CALLS,
    TEMP,
    UNABLE,
    discard,
    discarding,
    explained,
    hold_folder,
    make_dir,
    sync_folder,
    temp_name,
    write,
)
from vitft.errors import BusyError, VitftError
from vitft.moves import bury, is_dead, sweep

LOCK = "run.lock"


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
            discard(path)  # still held, so nobody else's lock can be meant


@contextmanager
def in_turn(folder: Path, purpose: str, *, patience: float = 60.0) -> Iterator[None]:
    """Holds a folder for the moment of a choice in it; who comes meanwhile waits for its turn.

    Nothing is swept: others may be making folders in it, which need no turn.

    Args:
        folder: Made if missing.
        purpose: As for `lock`.
        patience: Seconds to wait.

    Raises:
        BusyError: `env.busy`, when patience is over.
    """
    make_dir(folder)
    path = folder / LOCK
    with _acquire(path, time.monotonic() + patience, waits=True) as file:
        try:
            _sign(file, path, purpose)
            yield
        finally:
            discard(path)


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
        if TEMP.fullmatch(path.name) and is_dead(path, 60.0):
            bury(path)
    temp = temp_name(left[0])
    with ExitStack() as stack, discarding(temp):
        with explained(left[0]):
            CALLS.mkdir(temp)
            stack.callback(hold_folder(temp))
        file = stack.enter_context(_acquire(temp / LOCK, time.monotonic()))
        _sign(file, temp / LOCK, purpose)
        if disk.fcntl is None:
            file.close()  # Windows renames no folder with an open file; there the name is the lock
        with explained(left[0]):
            folder = next((name for name in left if _took(temp, name)), None)
            if folder is None:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            sync_folder(folder.parent)
        try:
            yield folder
        finally:
            discard(folder / LOCK)


def _sign(file: IO[bytes], path: Path, purpose: str) -> None:
    """Says in the lock file who holds it."""
    with explained(path):
        CALLS.truncate(path, 0)
        write(file, encode.json_text(_holder() | {"purpose": purpose}).encode())


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


def _acquire(path: Path, deadline: float, *, waits: bool = False) -> IO[bytes]:
    """Until the deadline it waits for what a dead holder left, with `waits` for a living one."""
    while True:
        with explained(path):
            file, state = _try_lock(path)
        if state == "held":
            return file
        file.close()
        holder = _read_holder(path)
        hopeful = (waits or _has_left(holder)) and time.monotonic() < deadline
        if state == "busy" and not hopeful:
            raise _busy(path, holder)
        time.sleep(0.05)


def _try_lock(path: Path) -> tuple[IO[bytes], str]:
    """Opens the lock file and says `held`, `busy` or `again`."""
    try:
        file, created = CALLS.open(path, "xb", buffering=0), True
    except FileExistsError:
        file, created = CALLS.open(path, "ab", buffering=0), False
    if disk.fcntl is None:
        return file, "held" if created else "busy"
    try:
        disk.fcntl.flock(file, disk.fcntl.LOCK_EX | disk.fcntl.LOCK_NB)
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
