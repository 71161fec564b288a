"""Rows of features on disk, found again by what they are: nothing here is trusted unchecked.

A space is a folder for one backbone, transform and type; in it lie write-once shards, each written
whole under a name made from its content, with a checksum that is verified before any row is used.
A killed run keeps every shard it finished; two processes may fill one space; a damaged shard is
said once, removed and its rows are computed again. Many small shards are merged into one.

    shard = "VITFTF01" | sha256 of all that follows | n, width, itemsize | n keys | n rows

A key is the image's sha256 and the number of the view, so that a renamed or moved photograph, in
another split or recipe, finds its row, and an edited one does not.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitft import io
from vitft.console import warn
from vitft.errors import MachineError

MAGIC = b"VITFTF01"
HEAD = struct.Struct("<III")  # rows, width, bytes per value
KEY = 36  # bytes: sha256 of the image, view as little-endian u32
MERGE_AT = 16  # shards in a space before they are merged into one

Key = bytes


@dataclass(frozen=True)
class Shard:
    """An open shard: where each key's row lies in its memory map."""

    path: Path
    keys: tuple[Key, ...]
    rows: NDArray[Any]


class Space:
    """All rows of one backbone, transform and type.

    Args:
        about: What distinguishes this space from all others; any change of it is another space.
        dtype: `float32` or `float16`, as stored.
        root: Of all spaces; default below `vitft.io.cache_dir()`.
    """

    def __init__(self, about: Mapping[str, Any], dtype: str, root: Path | None = None) -> None:
        text = json.dumps(dict(about) | {"dtype": dtype, "format": 1}, sort_keys=True)
        name = io.sha256_bytes(text.encode())[:32]
        self.folder = (root or features_dir()) / name
        self.dtype = np.dtype(dtype)
        self._about = text
        self._at: dict[Key, tuple[int, int]] = {}
        self._shards: list[Shard] = []
        self._open_all()

    def __contains__(self, key: Key) -> bool:
        return key in self._at

    def get(self, key: Key) -> NDArray[np.float32]:
        """The row of a key, [D] float32."""
        shard, row = self._at[key]
        return np.asarray(self._shards[shard].rows[row], dtype=np.float32)

    def put(self, rows: Mapping[Key, NDArray[np.float32]]) -> None:
        """Writes rows as one shard; once this returns they survive a kill."""
        if not rows:
            return
        if not self.folder.is_dir():
            io.make_dir(self.folder)
            io.write_text(self.folder / "about.json", self._about)
        values = np.stack([np.asarray(r, dtype=self.dtype) for r in rows.values()])
        data = _pack(tuple(rows), values)
        path = self.folder / f"{io.sha256_bytes(data)[:32]}.shard"
        io.write_bytes(path, data)
        self._add(path)

    def merge(self) -> None:
        """Many small shards become one; the old ones go only when the new one is whole."""
        if len(self._shards) < MERGE_AT:
            return
        old = [shard.path for shard in self._shards]
        self.put({key: self.get(key) for key in sorted(self._at)})
        new = self._shards[-1].path
        self._at, self._shards = {}, []
        self._add(new)
        for path in old:
            if path != new:
                io.remove(path)

    def _open_all(self) -> None:
        for path in sorted(self.folder.glob("*.shard")):
            self._add(path)

    def _add(self, path: Path) -> None:
        shard = _open(path, self.dtype)
        if shard is None:
            return
        self._shards.append(shard)
        for row, key in enumerate(shard.keys):
            self._at.setdefault(key, (len(self._shards) - 1, row))


def make_key(image_sha256: str, view: int) -> Key:
    """The 36 bytes a row is found by."""
    return bytes.fromhex(image_sha256) + view.to_bytes(4, "little")


def features_dir() -> Path:
    """Where spaces lie."""
    return io.cache_dir() / "features"


@dataclass(frozen=True)
class Info:
    """One space: its folder, what it is about, shards, rows and bytes on disk."""

    folder: Path
    about: dict[str, Any]
    shards: int
    rows: int
    size: int


def spaces(root: Path | None = None) -> tuple[Info, ...]:
    """Every space with its size, for `vitft cache info`."""
    root = root or features_dir()
    return tuple(_info(f) for f in sorted(root.glob("*")) if f.is_dir())


def _info(folder: Path) -> Info:
    shards = sorted(folder.glob("*.shard"))
    rows = 0
    for shard in shards:
        with shard.open("rb") as file:
            head = file.read(len(MAGIC) + 32 + HEAD.size)
        if len(head) == len(MAGIC) + 32 + HEAD.size:
            rows += HEAD.unpack(head[-HEAD.size :])[0]
    try:
        about = io.read_json(folder / "about.json")
    except MachineError:
        about = {}
    return Info(folder, about, len(shards), rows, sum(s.stat().st_size for s in shards))


# -- one shard ------------------------------------------------------------------------------------


def _pack(keys: tuple[Key, ...], values: NDArray[Any]) -> bytes:
    n, width = values.shape
    body = HEAD.pack(n, width, values.itemsize) + b"".join(keys) + values.tobytes()
    return MAGIC + hashlib.sha256(body).digest() + body


def _open(path: Path, dtype: np.dtype[Any]) -> Shard | None:
    """Memory-maps a shard after its checksum held; None (said and removed) where it did not."""
    try:
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except FileNotFoundError:  # merged away by another process
        return None
    except (OSError, ValueError):  # ValueError: an empty file
        return _damaged(path)
    start = len(MAGIC) + 32
    whole = len(data) >= start + HEAD.size and data[: len(MAGIC)].tobytes() == MAGIC
    if (
        not whole
        or hashlib.sha256(data[start:].data).digest() != data[len(MAGIC) : start].tobytes()
    ):
        return _damaged(path)
    n, width, itemsize = HEAD.unpack(data[start : start + HEAD.size].tobytes())
    at = start + HEAD.size
    if itemsize != dtype.itemsize or len(data) != at + n * KEY + n * width * itemsize:
        return _damaged(path)
    packed = data[at : at + n * KEY].tobytes()
    keys = tuple(packed[i : i + KEY] for i in range(0, n * KEY, KEY))
    rows = data[at + n * KEY :].view(dtype).reshape(n, width)  # of this map: the file may be gone
    return Shard(path, keys, rows)


def _damaged(path: Path) -> Shard | None:
    warn(f"cached features {path} are damaged; computing these rows again")
    io.remove(path)
    return None
