"""What a person sees while they wait: one line of news, one warning, one progress bar.

Rich on a terminal; elsewhere (a pipe, CI) a plain line at most every few seconds. All of it goes
to stderr through the `vitft` logger: stdout carries results alone, a log file can listen.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from vitft import io
from vitft.errors import escape

T = TypeVar("T")
EVERY = 5.0  # seconds between progress lines where there is no terminal

logger = logging.getLogger("vitft")


def say(text: str) -> None:
    """One line of news."""
    logger.info("%s", text)


def warn(text: str) -> None:
    """One line that must not be missed."""
    logger.warning("%s", text)


def track(
    items: Iterable[T], total: int, what: str, size: Callable[[T], int] = lambda item: 1
) -> Iterator[T]:
    """Hands the items on and shows how far it is.

    Args:
        items: Anything; not consumed ahead.
        total: How many will come, counted by `size`.
        what: Such as `features`, shown before the count.
        size: What an item counts for, such as the length of a batch.
    """
    if logger.disabled:
        yield from items
    elif sys.stderr.isatty() and total > 1:
        yield from _bar(items, total, what, size)
    else:
        yield from _lines(items, total, what, size)


def _bar(items: Iterable[T], total: int, what: str, size: Callable[[T], int]) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            bar.advance(task, size(item))


def _lines(items: Iterable[T], total: int, what: str, size: Callable[[T], int]) -> Iterator[T]:
    start = last = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += size(item)
        now = time.monotonic()
        if now - last >= EVERY:
            last, rate = now, done / (now - start)
            left = (total - done) / rate
            say(f"{what}: {done:,} of {total:,}, {rate:.1f} per second, {left:.0f} s left")


def setup(level: int = logging.INFO, log_file: Path | None = None) -> None:
    """Attaches the console and, once the run folder exists, the log file; called by doors only."""
    logger.setLevel(level)
    logger.propagate = False
    if not any(isinstance(h, _Stderr) for h in logger.handlers):
        logger.addHandler(_Stderr())
    if log_file is not None:
        handler = io.open_log(log_file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)


def hush() -> list[tuple[logging.Handler, int]]:
    """Keeps news, but no warning, off the screen, not off log files; returns the levels before."""
    screens = [h for h in logger.handlers if not isinstance(h, logging.FileHandler)]
    before = [(handler, handler.level) for handler in screens]
    for handler in screens:
        handler.setLevel(max(handler.level, logging.WARNING))
    return before


@contextmanager
def hushed() -> Iterator[None]:
    """`hush` for a while, as for the runs of a study."""
    before = hush()
    try:
        yield
    finally:
        for handler, level in before:
            handler.setLevel(level)


def silence() -> None:
    """For the processes of a run that are not to speak: no line and no bar."""
    logger.disabled = True


def close_log() -> None:
    """Detaches log files, so that a second run in one process writes to its own alone."""
    for handler in list(logger.handlers):
        if isinstance(handler, logging.FileHandler):
            handler.close()
            logger.removeHandler(handler)


class _Stderr(logging.Handler):
    """Plain lines on stderr; a closed terminal ends the talk, not the run."""

    def emit(self, record: logging.LogRecord) -> None:
        mark = "" if record.levelno < logging.WARNING else "WARNING: "
        try:
            print(mark + escape(record.getMessage()), file=sys.stderr, flush=True)  # noqa: T201
        except (BrokenPipeError, ValueError, OSError):
            logger.removeHandler(self)
