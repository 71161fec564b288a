"""Decoded photographs that stay in memory, for all processes that decode.

One block of bytes holds a place for each photograph, in their order, as far as the budget reaches.
Whoever decodes a photograph first fills its place; two who do so at once write the same bytes. The
shape is written last, so that a place left half filled by a process that died counts as empty.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from vitft.resize import Pixels


class Pictures:
    """Places for the arrays of rows 0, 1, ... within a budget.

    Args:
        sizes: Bytes that each row may take.
        budget: Bytes for all; rows that would go past it have no place.
        shared: Worker processes see one block, in shared memory.

    Attributes:
        count: Rows that have a place.
        room: Bytes of all places.
    """

    def __init__(self, sizes: Sequence[int], budget: int, *, shared: bool) -> None:
        ends = np.cumsum(np.asarray(sizes, dtype=np.int64))
        self.count = int(np.searchsorted(ends, budget, side="right"))
        self.room = int(ends[self.count - 1]) if self.count else 0
        self._starts = ends - np.asarray(sizes, dtype=np.int64)
        self._shapes = torch.zeros(self.count, 3, dtype=torch.int32)
        # neither kind takes memory before it is written to
        if shared:
            self._shapes.share_memory_()  # type: ignore[no-untyped-call]
            storage = torch.UntypedStorage._new_shared(max(self.room, 1))  # type: ignore[no-untyped-call]
            self._block = torch.empty(0, dtype=torch.uint8).set_(storage)
        else:
            self._block = torch.empty(self.room, dtype=torch.uint8)

    def get(self, row: int) -> Pixels | None:
        """The row's array, not to be written to; None where it has no place or was not put yet."""
        if row >= self.count:
            return None
        shape = self._shapes[row].tolist()
        if not all(shape):
            return None
        place = self._block.numpy()[self._starts[row] :][: math.prod(shape)]
        return place.reshape(shape)

    def put(self, row: int, array: Pixels) -> None:
        """Keeps a row's array [.., .., ..] uint8 if it has a place that is large enough."""
        if row >= self.count or array.size > self._size(row):
            return
        self._block.numpy()[self._starts[row] :][: array.size] = array.reshape(-1)
        self._shapes[row] = torch.tensor(array.shape, dtype=torch.int32)

    def _size(self, row: int) -> int:
        end = self._starts[row + 1] if row + 1 < len(self._starts) else self.room
        return int(min(end, self.room) - self._starts[row])
