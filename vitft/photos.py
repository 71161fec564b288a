"""One photograph of a split as the model's input: read, proven, decoded, transformed.

    view      transform of an image, drawn from (seed, epoch, sha256 of the image)

What lies in memory (`vitft.pictures`) changes how long it takes, and no pixel.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from vitft import containers, images
from vitft.errors import DataError
from vitft.images import DecodeSpec
from vitft.inputs import Transform, TransformSpec, derive_seed
from vitft.pictures import Pictures
from vitft.resize import Picture, as_array

Key = tuple[int, int]  # (epoch, row)
Sample = tuple[Tensor, int, int]  # uint8 [3, S, S], label, row


class Photos(Dataset[Sample]):
    """Photographs of one split, decoded and transformed one by one.

    Args:
        files: One path per row.
        labels: int [N].
        sha256: Of each file as it was scanned; a file that reads differently is an error. It also
            seeds the file's views, so that renaming or reordering changes no picture.
        decode: How files become pictures.
        transform: How pictures become inputs.
        seed: Of the run.
        keep: Room for what stays in memory: of a plain transform its inputs, else the pictures.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: NDArray[np.int64],
        sha256: Sequence[str],
        *,
        decode: DecodeSpec,
        transform: TransformSpec,
        seed: int,
        keep: Pictures | None = None,
    ) -> None:
        self.files = tuple(files)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.sha256 = tuple(sha256)
        self.decode, self.transform, self.seed = decode, transform, seed
        self.keep = keep
        self.pixels = Transform(transform)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: Key) -> Sample:
        """One sample.

        Args:
            key: Epoch (or number of the view) and row.

        Returns:
            uint8 [3, S, S] before erasing and normalising, label, row.

        Raises:
            DataError: The file is not readable, not a photograph, or not the one scanned.
        """
        epoch, row = key
        label = int(self.labels[row])
        if self.transform.kind == "plain":
            x = self._kept(row, lambda: self.pixels(self._picture(row)).numpy())
            return torch.from_numpy(as_array(x)), label, row
        picture = self._kept(row, lambda: self._picture(row))
        return self.pixels.view(picture, self.view_seed(epoch, row)), label, row

    def view_seed(self, epoch: int, row: int, purpose: str = "view") -> int:
        """What an image's randomness in an epoch depends on: run, epoch, content."""
        return derive_seed(self.seed, purpose, epoch, self.sha256[row])

    def _kept(self, row: int, make: Callable[[], Picture]) -> Picture:
        """What is in memory, or made now; the same pixels."""
        if self.keep is None:
            return make()
        found: Picture | None = self.keep.get(row)
        if found is None:
            found = make()
            self.keep.put(row, as_array(found))
        return found

    def _picture(self, row: int) -> Picture:
        return images.decoded(self._bytes(row), self.files[row], self.decode)

    def _is(self, data: bytes, row: int) -> bool:
        return hashlib.sha256(data).hexdigest() == self.sha256[row]

    def _bytes(self, row: int) -> bytes:
        path = self.files[row]
        data = images.read_bytes(path)
        if not self._is(data, row) and containers.forget(path):  # the cache's fault, it may be
            data = images.read_bytes(path)
        if not self._is(data, row):
            text = f"changed since the scan ({len(data):,} bytes now)"
            fix = "restore the file, or start a new run, which scans again"
            raise DataError.of("data.changed", path, text, fix)
        return data
