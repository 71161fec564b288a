"""Photographs that are had by pieces: an order that takes each piece once, and pieces in time.

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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitft import containers
from vitft.containers import Piece
from vitft.errors import VitftError
from vitft.inputs import derive_seed

WINDOW = 2**30  # bytes of pieces shuffled together
AHEAD = 3 * 2**29  # bytes of pieces fetched before they are wanted; both of `afar.ROOM`
CONNECTIONS = 4

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Pieces:
    """Which piece of which file each photograph starts in.

    Attributes:
        of: int64 [N]: number of the piece, in the order of files and of their bytes.
        where: The pieces.
    """

    of: Rows
    where: tuple[Piece, ...]


def pieces(files: Sequence[Path]) -> Pieces | None:
    """The pieces of photographs; None where they are had one by one.

    Args:
        files: [N] paths of photographs, of one root.
    """
    if not files or not containers.in_pieces(files[0]):
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
    drawn = draw.permutation(len(held.where))
    window = np.empty(len(drawn), np.int64)  # [pieces]
    window[drawn] = (np.cumsum(_sizes(held)[drawn]) - 1) // WINDOW
    return order[np.argsort(window[held.of[order]], kind="stable")]


@contextmanager
def fetching(held: Pieces, steps: Sequence[Rows]) -> Iterator[Callable[[int], None]]:
    """While it is entered, pieces come in in the order in which the steps want them.

    What goes wrong is left to whoever reads the photograph: it fetches the piece itself, and says.
    The next piece may come in all the same, so a network that was gone for a while slows a run down
    for a while.

    Args:
        held: The pieces of all rows.
        steps: The rows of each step.

    Yields:
        To be called with the number of the step that was reached.
    """
    pieces, wanted = _plan(held, steps)
    ends, plan = np.cumsum(_sizes(held)[pieces]), iter([held.where[k] for k in pieces])
    room = threading.Semaphore(0)
    ended = threading.Event()
    released = 0

    def reached(step: int) -> None:
        nonlocal released
        begun = int(np.searchsorted(wanted, step, side="right"))
        far = (int(ends[begun - 1]) if begun else 0) + AHEAD
        allowed = max(begun, int(np.searchsorted(ends, far, side="right")))
        for _ in range(allowed - released):
            room.release()
        released = max(released, allowed)

    def fetch() -> None:
        for piece in iter(lambda: _next(plan, room, ended), None):
            with suppress(VitftError, OSError):
                containers.fetch(piece)

    reached(-1)
    with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="vitft-afar") as pool:
        for _ in range(CONNECTIONS):
            pool.submit(fetch)
        try:
            yield reached
        finally:
            ended.set()
            room.release(CONNECTIONS)


def _sizes(held: Pieces) -> Rows:
    return np.array([piece.size for piece in held.where], np.int64)


def _plan(held: Pieces, steps: Sequence[Rows]) -> tuple[Rows, Rows]:
    """Pieces in the order of first use, and the step of each first use."""
    counts = np.array([len(rows) for rows in steps], np.int64)
    wanted = held.of[np.concatenate([np.zeros(0, np.int64), *steps])]
    step = np.repeat(np.arange(len(steps)), counts)
    _, first = np.unique(wanted, return_index=True)
    first.sort()
    return wanted[first], step[first]


def _next(plan: Iterator[Piece], room: threading.Semaphore, ended: threading.Event) -> Piece | None:
    room.acquire()
    return None if ended.is_set() else next(plan, None)
