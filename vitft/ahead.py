"""Photographs afar: an order that reads each piece of a file once, and pieces fetched in time.

    order     windows of pieces drawn at random; within a window photographs in random order
    fetching  in the order in which the pieces are wanted, a bounded way ahead of the model

A random order over everything would fetch a piece of a file anew for nearly every photograph of it.
A stream shuffles a buffer that slides along the file. A window holds whole pieces from all over
the data set instead: every photograph comes exactly once an epoch, the order is a pure function of
seed and epoch, and may be entered at any step. What fits into one window is in full random order,
the one it would have on a disk.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitft import afar, containers
from vitft.errors import VitftError
from vitft.inputs import derive_seed

WINDOW = 64  # pieces shuffled together: 1 GiB
AHEAD = 96  # pieces fetched before they are wanted: 1.5 GiB, of `afar.ROOM`
CONNECTIONS = 4

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Pieces:
    """Which piece of which file each photograph starts in.

    Attributes:
        of: int64 [N]: number of the piece, in the order of files and of their bytes.
        where: File and piece number in it, of each piece.
    """

    of: Rows
    where: tuple[tuple[Path, int], ...]


def pieces(files: Sequence[Path]) -> Pieces | None:
    """The pieces of photographs; None where they lie here.

    Args:
        files: [N] paths of photographs, of one root.
    """
    if not files or not afar.holds(files[0]):
        return None
    found = [containers.piece(file) for file in files]
    where = tuple(sorted(set(found)))
    number = {place: k for k, place in enumerate(where)}
    return Pieces(np.array([number[place] for place in found], np.int64), where)


def in_windows(order: Rows, held: Pieces, seed: int, epoch: int) -> Rows:
    """An epoch's order, so rearranged that each piece is wanted within one window.

    Args:
        order: int64 [n], rows; may name one twice.
        held: The pieces of all rows.
        seed: Of the run.
        epoch: From 0.

    Returns:
        int64 [n]: the same rows.
    """
    draw = np.random.Generator(np.random.PCG64(derive_seed(seed, "pieces", epoch)))
    window = draw.permutation(len(held.where)) // WINDOW  # [pieces]
    return order[np.argsort(window[held.of[order]], kind="stable")]


@contextmanager
def fetching(held: Pieces, steps: Sequence[Rows]) -> Iterator[Callable[[int], None]]:
    """While it is entered, pieces come in in the order in which the steps want them.

    What goes wrong is left to whoever reads the photograph: it fetches the piece itself, and says.

    Args:
        held: The pieces of all rows.
        steps: The rows of each step.

    Yields:
        To be called with the number of the step that was reached.
    """
    plan, wanted = _plan(held, steps)
    room = threading.Semaphore(0)
    ended = threading.Event()
    released = 0

    def reached(step: int) -> None:
        nonlocal released
        allowed = int(np.searchsorted(wanted, step, side="right")) + AHEAD
        for _ in range(allowed - released):
            room.release()
        released = max(released, allowed)

    def fetch() -> None:
        for file, number in iter(lambda: _next(plan, room, ended), None):
            try:
                afar.fetch(file, number)
            except (VitftError, OSError):
                return

    reached(-1)
    with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="vitft-afar") as pool:
        for _ in range(CONNECTIONS):
            pool.submit(fetch)
        try:
            yield reached
        finally:
            ended.set()
            room.release(CONNECTIONS)


def _plan(held: Pieces, steps: Sequence[Rows]) -> tuple[Iterator[tuple[Path, int]], Rows]:
    """Pieces in the order of first use, and the step of each first use."""
    counts = np.array([len(rows) for rows in steps], np.int64)
    wanted = held.of[np.concatenate([np.zeros(0, np.int64), *steps])]
    step = np.repeat(np.arange(len(steps)), counts)
    _, first = np.unique(wanted, return_index=True)
    first.sort()
    return iter([held.where[k] for k in wanted[first]]), step[first]


def _next(
    plan: Iterator[tuple[Path, int]], room: threading.Semaphore, ended: threading.Event
) -> tuple[Path, int] | None:
    room.acquire()
    return None if ended.is_set() else next(plan, None)
