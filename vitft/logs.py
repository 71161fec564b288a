"""Files that grow: JSON lines, downloads and log files, of which a crash costs the last line.

Only the rooms behind `io` may import this one; everyone else calls `io`.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from vitft import encode
from vitft.disk import CALLS, errno_name, explained, make_dir, sync_folder, write
from vitft.errors import MachineError
from vitft.files import write_bytes


def append_line(path: Path, record: Mapping[str, object]) -> None:
    """Adds one JSON line and forces it to the disk; when this returns, the line stays.

    A half line that a killed process left is cut off first. After a failure the file is as before.
    """
    data = (encode.json_text(record) + "\n").encode()
    make_dir(path.parent)
    fresh = not path.exists()
    with explained(path, len(data)):
        size = 0 if fresh else _whole_size(path)
        if not fresh and size < path.stat().st_size:
            CALLS.truncate(path, size)
        try:
            with CALLS.open(path, "ab", buffering=0) as file:
                write(file, data)
                CALLS.fsync(file.fileno())
            if fresh:
                sync_folder(path.parent)
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
        found, problem = None, f"cannot be read ({errno_name(error)})"
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
        with explained(path):
            file = stack.enter_context(CALLS.open(path, "ab", buffering=0))

        def add(data: bytes) -> None:
            with explained(path, len(data)):
                write(file, data)

        yield add
        with explained(path):
            CALLS.fsync(file.fileno())
            sync_folder(path.parent)


def open_log(path: Path) -> logging.Handler:
    """A log file as a logging handler; a full disk silences it with one line, and ends nothing."""
    make_dir(path.parent)
    with explained(path):
        return _LogFile(path, encoding="utf-8", errors="backslashreplace")


class _LogFile(logging.FileHandler):
    _told = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if not self._told:
            self._told = True
            with suppress(OSError, ValueError):
                sys.stderr.write(f"{self.baseFilename}: {sys.exc_info()[1]}; the log has gaps\n")


def _whole_lines(path: Path) -> list[bytes]:
    with explained(path):
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
