"""Folders, filled under a temporary name, sealed with a manifest, and put in place in one step.

The manifest lists every file with its size and sha256, so that a folder can say years later whether
it is still whole. Only the rooms behind `io` may import this one; everyone else calls `io`.
"""

import json
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from vitft import encode
from vitft.disk import (
    CALLS,
    UNABLE,
    discard,
    discarding,
    errno_name,
    explained,
    force_folder,
    hold_folder,
    make_dir,
    sync_file,
    sync_folder,
    temp_name,
)
from vitft.files import sha256_file, write_bytes
from vitft.moves import remove

MANIFEST = "manifest.json"
CLUTTER = re.compile(r"\.DS_Store|Thumbs\.db|\._.*|\.nfs.*")  # left by file browsers and NFS


@contextmanager
def staged_dir(final: Path) -> Iterator[Path]:
    """A temporary folder to fill; when the block ends well it is sealed and becomes `final`.

    An existing `final` is swapped out in the same step (where the file system cannot swap, in two
    steps, undone by `sweep` after a kill). After any failure it is unchanged, the temporary gone.

    Raises:
        MachineError: `env.disk_full` or `env.write_failed`.
    """
    make_dir(final.parent)
    temp = temp_name(final)
    with ExitStack() as stack, discarding(temp):
        with explained(final):
            CALLS.mkdir(temp)
            stack.callback(hold_folder(temp))
        with explained(final, only_full=True):
            yield temp
        with explained(final):
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
        sync_file(path)
        listed[name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    write_bytes(folder / MANIFEST, _manifest(listed).encode())
    sync_file(folder / MANIFEST)
    for root, _, _ in os.walk(folder, topdown=False):
        force_folder(Path(root))


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
        return f"{name}: unreadable ({errno_name(error)})"
    return None


def _install(temp: Path, final: Path) -> None:
    if not os.path.lexists(final):
        CALLS.replace(temp, final)
        sync_folder(final.parent)
        return
    old = temp
    try:
        CALLS.exchange(temp, final)
    except OSError as error:
        if error.errno not in UNABLE:
            raise
        old = _swap_in_two_steps(temp, final)
    sync_folder(final.parent)
    discard(old)


def _swap_in_two_steps(temp: Path, final: Path) -> Path:
    old = final.with_name(f".{final.name}.{secrets.token_hex(4)}.old")
    CALLS.replace(final, old)
    try:
        CALLS.replace(temp, final)
    except BaseException:
        CALLS.replace(old, final)
        raise
    return old
