"""Names that go or change: removed, renamed, put aside, linked; and leftovers of the killed, swept.

Only the rooms behind `io` may import this one; everyone else calls `io`.
"""

import errno
import os
import time
from contextlib import suppress
from pathlib import Path

from vitft import disk
from vitft.disk import (
    CALLS,
    TEMP,
    UNABLE,
    delete,
    discard,
    discarding,
    explained,
    make_dir,
    sync_file,
    sync_folder,
    temp_name,
)
from vitft.files import write_text


def remove(path: Path) -> None:
    """Removes a file, a link or a whole tree; missing is fine. Links are never followed.

    Another process may be faster with the same. A tree first loses its name, so that
    a kill half-way leaves no half tree under it.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return
    with explained(path), suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            temp = temp_name(path)
            CALLS.replace(path, temp)
            delete(temp)
        else:
            CALLS.unlink(path)
        sync_folder(path.parent)


def move(source: Path, target: Path) -> None:
    """Renames a finished file over another, both forced to the disk."""
    make_dir(target.parent)
    with explained(target):
        sync_file(source)
        CALLS.replace(source, target)
        sync_folder(target.parent)


def move_aside(path: Path) -> Path:
    """Gives a file or folder the next free name `<name>.old-<n>`, and returns that."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.old-{number}")):
        number += 1
    with explained(path):
        CALLS.replace(path, aside)
        sync_folder(path.parent)
    return aside


def link_latest(folder: Path, name: str = "latest") -> Path:
    """Points `<parent>/<name>` to the folder: a relative link, or a text file without links."""
    link = folder.parent / name
    temp = temp_name(link)
    try:
        CALLS.symlink(folder.name, temp, target_is_directory=True)
    except OSError as error:
        if error.errno not in UNABLE | {errno.EPERM}:  # Windows without the privilege; FAT
            with explained(link):
                raise
        write_text(link, folder.name + "\n")
        return link
    with explained(link), discarding(temp):
        CALLS.replace(temp, link)
        sync_folder(link.parent)
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
        dead += [path for name in hits if is_dead(path := Path(root, name), older_than)]
    for path in dead:
        bury(path)
    return tuple(dead)


def bury(path: Path) -> None:
    """Removes a leftover, or gives it back the name that a killed swap took from it."""
    match = TEMP.fullmatch(path.name)
    if match and match["kind"] == "old":
        final = path.with_name(match["name"])
        if not os.path.lexists(final):
            with explained(final):
                CALLS.replace(path, final)
                sync_folder(final.parent)
            return
    discard(path)


def is_dead(path: Path, older_than: float) -> bool:
    """Whether the writer of a temporary is gone; seconds of age where no lock can tell."""
    try:
        if time.time() - path.lstat().st_mtime < older_than:
            return False
        if path.is_symlink() or disk.fcntl is None:
            return True
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False  # gone meanwhile, or not ours to touch
    try:
        disk.fcntl.flock(handle, disk.fcntl.LOCK_EX | disk.fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True
