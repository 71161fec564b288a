"""Pictures in a column of a table: Arrow files of Hugging Face data sets, and Parquet of the hub.

    plants/train/data-00000-of-00002.arrow/17   what `save_to_disk` writes: mapped, any row at once
    plants/train-00000-of-00002.parquet/17      what `push_to_hub` writes: compressed by row groups

A row of a Parquet file costs its whole group. So a group is unpacked into the cache when the first
of its pictures is wanted, and its rows are read together (`vitft.ahead`).

pyarrow comes with the extra `hfds`, and is imported in this room alone.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np

from vitft import afar
from vitft.errors import DataError, Fault, MachineError, VitftError

KINDS = (".arrow", ".parquet")
COPY_AGAIN = "copy the file again, or write it anew"
MISSING = -1  # the length of no picture


def holds(file: Path) -> bool:
    """Whether a file is a table, by its name."""
    return file.suffix.lower() in KINDS


def in_groups(file: Path) -> bool:
    """Whether its rows are had by groups."""
    return file.suffix.lower() == ".parquet"


def schema(file: Path) -> Any:
    """Names, types and metadata of the columns, as pyarrow has them.

    Raises:
        OSError: The file cannot be opened.
        DataError: `data.shard`.
        MachineError: `env.extra`: pyarrow is missing.
    """
    return _footer(file).schema.to_arrow_schema() if in_groups(file) else _table(file).schema


def values(file: Path, column: str) -> list[Any]:
    """All rows of a column.

    Raises:
        OSError, DataError, MachineError: As `schema`.
    """
    if not in_groups(file):
        rows: list[Any] = _table(file).column(column).to_pylist()
        return rows
    with _opened(file) as parquet:
        found: list[Any] = parquet.read(columns=[column]).column(0).to_pylist()
        return found


def has(file: Path, name: str) -> bool:
    """Whether there is a row of this number."""
    count = _footer(file).num_rows if in_groups(file) else len(_table(file))
    return name.isdecimal() and int(name) < count


def read(file: Path, name: str, limit: int) -> bytes | None:
    """The bytes of the picture in a row; None where they are more than `limit`.

    Raises:
        OSError: No such row, or the file cannot be opened.
        DataError: `data.shard`.
        MachineError: `env.extra`, `env.unreachable`.
    """
    if not has(file, name):
        raise FileNotFoundError(2, "no such row", name)
    look = _of_group if in_groups(file) else _mapped
    size, data = look(file, int(name), limit)
    if size == MISSING:
        raise _bad(file, f"row {name} holds no picture, only the path of one")
    return data if size <= limit else None


def picture_column(kinds: Any) -> str:
    """The name of the column that holds pictures, a struct of bytes and path.

    Args:
        kinds: A schema.

    Raises:
        ValueError: There is not one such column.
    """
    import pyarrow as pa

    structs = {str(f.name): f.type for f in kinds if pa.types.is_struct(f.type)}
    found = [n for n, t in structs.items() if t.get_field_index("bytes") > -1]
    if len(found) != 1:
        named = ", ".join(found) or "none"
        raise ValueError(f"columns with pictures: {named} of {list(kinds.names)}")
    return found[0]


# -- Parquet --------------------------------------------------------------------------------------


def group(file: Path, name: str) -> tuple[int, int]:
    """Number and bytes of the row group that a row lies in.

    Raises:
        FileNotFoundError: No such row.
    """
    if not has(file, name):
        raise FileNotFoundError(2, "no such row", name)
    number = int(np.searchsorted(_ends(file), int(name), side="right"))
    return number, int(_footer(file).row_group(number).total_byte_size)


def unpacked(file: Path, number: int) -> Path:
    """The pictures of a row group one after another, behind their places; kept in the cache.

    int64 n, n times (first byte, length), the bytes.
    """
    return afar.keep(f"{_identity(file)}-g{number}", lambda: _unpack(file, number))


def _unpack(file: Path, number: int) -> bytes:
    with _opened(file) as parquet:
        column = f"{picture_column(schema(file))}.bytes"
        rows = parquet.read_row_group(number, columns=[column])
    pictures = [p.as_buffer() if (p := row["bytes"]).is_valid else None for row in rows.column(0)]
    lengths = np.array([MISSING if p is None else p.size for p in pictures], np.int64)
    ends = 8 + 16 * len(lengths) + np.cumsum(np.maximum(lengths, 0))
    places = np.stack([ends - np.maximum(lengths, 0), lengths], axis=1)  # [n, 2]
    head = np.concatenate([[len(lengths)], places.ravel()]).astype("<i8").tobytes()
    return b"".join([head, *(memoryview(p) for p in pictures if p is not None)])


def _of_group(file: Path, row: int, limit: int) -> tuple[int, bytes]:
    """Size of the picture in a row, and its bytes where they are not more than `limit`."""
    number, _ = group(file, str(row))
    first = int(_ends(file)[number - 1]) if number else 0
    while True:
        try:
            with unpacked(file, number).open("rb") as handle:
                handle.seek(8 + 16 * (row - first))
                start, size = np.frombuffer(handle.read(16), "<i8").tolist()
                handle.seek(start)
                return size, handle.read(size) if 0 < size <= limit else b""
        except FileNotFoundError:  # let go of in between
            continue


def _identity(file: Path) -> str:
    if afar.holds(file):
        return afar.identity(file)
    status = file.stat()
    text = f"{file.absolute()}\n{status.st_size}\n{status.st_mtime_ns}"
    return sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _ends(file: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Rows up to the end of each group, int64 [groups]."""
    footer = _footer(file)
    return np.cumsum([footer.row_group(k).num_rows for k in range(footer.num_row_groups)])


def _footer(file: Path) -> Any:
    """Metadata of a Parquet file."""
    return _metadata(file, _identity(file), os.getpid())


@cache
def _metadata(file: Path, identity: str, process: int) -> Any:
    import_pyarrow(file)
    import pyarrow.parquet as pq

    with _source(file) as source, _sound(file):
        return pq.read_metadata(source)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A ParquetFile, for one thread; whatever is wrong with its bytes is said of it."""
    import pyarrow.parquet as pq

    footer = _footer(file)
    with _source(file) as source, _sound(file):
        yield pq.ParquetFile(source, metadata=footer)


def _source(file: Path) -> IO[bytes]:
    return afar.opened(file, keep=False) if afar.holds(file) else file.open("rb")


@contextmanager
def _sound(file: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except VitftError:
        raise
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's, not the decoder's
            raise
        raise _bad(file, f"is no whole Parquet file ({error})") from None


def _bad(file: Path, text: str) -> DataError:
    return DataError([Fault("data.shard", str(file), text, COPY_AGAIN)])


# -- Arrow ----------------------------------------------------------------------------------------


def import_pyarrow(file: Path) -> Any:
    """pyarrow, or what to install.

    Raises:
        MachineError: `env.extra`.
    """
    try:
        import pyarrow as pa
    except ImportError:
        text, fix = "pyarrow is not installed", "pip install 'vitft[hfds]'"
        raise MachineError.of("env.extra", file, text, fix) from None
    return pa


def _table(file: Path) -> Any:
    """The rows of an Arrow file, mapped, not loaded."""
    status = file.stat()
    return _mapping(file, status.st_size, status.st_mtime_ns, os.getpid())


@cache
def _mapping(file: Path, size: int, changed: int, process: int) -> Any:
    """Of each process its own: what pyarrow holds is not for a fork."""
    pa = import_pyarrow(file)
    try:
        return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
    except (pa.ArrowException, ValueError) as error:
        raise _bad(file, f"is no whole Arrow file of {size:,} bytes ({error})") from None


def _mapped(file: Path, row: int, limit: int) -> tuple[int, bytes]:
    """As `_of_group`."""
    rows = _table(file)
    value = rows.column(picture_column(rows.schema))[row]
    data = value["bytes"].as_buffer() if value.is_valid and value["bytes"].is_valid else None
    if data is None:
        return MISSING, b""
    return data.size, bytes(data) if data.size <= limit else b""
