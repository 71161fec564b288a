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
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from vitft import afar
from vitft.errors import DataError, Fault, MachineError, VitftError

KINDS = (".arrow", ".parquet")
COPY_AGAIN = "copy the file again, or write it anew"
MISSING = -1  # the length of no picture
ROWS = 64  # unpacked at once
BUFFER = 2**24  # bytes of a column read at once

Numbers = NDArray[np.int64]


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
    groups = _groups(file)
    if not name.isdecimal() or not int(name) < sum(groups.ends[-1:]):
        raise FileNotFoundError(2, "no such row", name)
    number = int(np.searchsorted(groups.ends, int(name), side="right"))
    return number, int(groups.sizes[number])


def unpacked(file: Path, number: int) -> IO[bytes]:
    """The pictures of a row group one after another, and their places; kept in the cache.

    The bytes, then for each row int64 first byte and length, then what `afar.keep` adds.
    """
    size = int(_groups(file).sizes[number])
    return afar.keep(kept_name(file, number), size, lambda: _unpack(file, number))


def kept_name(file: Path, number: int) -> str:
    """What a row group is called in the store of pieces."""
    return f"{_identity(file)}-g{number}"


def _unpack(file: Path, number: int) -> Iterator[bytes | memoryview]:
    """A few rows at a time: neither a group nor a column of it has to fit into memory."""
    places, end = [], 0
    columns = [f"{picture_column(schema(file))}.bytes"]
    try:
        with _opened(file) as parquet:
            for batch in parquet.iter_batches(ROWS, row_groups=[number], columns=columns):
                for picture in _pictures(file, batch.column(0)):
                    places.append((end, MISSING if picture is None else picture.size))
                    if picture is not None:
                        yield memoryview(picture)
                        end += picture.size
    except OSError as error:  # of reading; who writes has a word for his own
        raise _bad(file, f"cannot be read: {error.strerror}") from None
    yield np.array(places, "<i8").tobytes()


def _pictures(file: Path, structs: Any) -> Iterator[Any]:
    """The bytes of each struct as a buffer of Arrow; None where it or they are null."""
    import pyarrow as pa

    found = structs.flatten()[structs.type.get_field_index("bytes")]
    if pa.types.is_dictionary(found.type):
        found = found.dictionary_decode()
    if not (pa.types.is_binary(found.type) or pa.types.is_large_binary(found.type)):
        raise _bad(file, f"has pictures of type {found.type}, where binary is read")
    for value in found:
        yield value.as_buffer() if value.is_valid else None


def _of_group(file: Path, row: int, limit: int) -> tuple[int, bytes]:
    """Size of the picture in a row, and its bytes where they are not more than `limit`."""
    number, _ = group(file, str(row))
    behind = int(_groups(file).ends[number]) - row  # this row's and those after it
    with unpacked(file, number) as handle:
        handle.seek(-16 * behind - afar.TAIL, os.SEEK_END)
        start, size = np.frombuffer(handle.read(16), "<i8").tolist()
        handle.seek(start)
        return size, handle.read(size) if 0 < size <= limit else b""


def _identity(file: Path) -> str:
    if afar.holds(file):
        return afar.identity(file)
    status = file.stat()
    text = f"{file.absolute()}\n{status.st_size}\n{status.st_mtime_ns}"
    return sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]


@dataclass(frozen=True, eq=False)
class _Groups:
    """Row groups of a file: rows up to the end of each, and bytes of each, int64 [groups]."""

    ends: Numbers
    sizes: Numbers


def _groups(file: Path) -> _Groups:
    return _measured(file, _identity(file))


@cache
def _measured(file: Path, identity: str) -> _Groups:
    footer = _footer(file)
    groups = [footer.row_group(k) for k in range(footer.num_row_groups)]
    sizes = np.array([g.total_byte_size for g in groups], np.int64)
    return _Groups(np.cumsum([g.num_rows for g in groups], dtype=np.int64), sizes)


def _footer(file: Path) -> Any:
    """Metadata of a Parquet file."""
    return _metadata(file, _identity(file), os.getpid())


@cache
def _metadata(file: Path, identity: str, process: int) -> Any:
    _pyarrow(file)
    import pyarrow.parquet as pq

    with _source(file) as source, _sound(file):
        return pq.read_metadata(source)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A ParquetFile, for one thread; whatever is wrong with its bytes is said of it."""
    import pyarrow.parquet as pq

    footer = _footer(file)
    with _source(file) as source, _sound(file):
        yield pq.ParquetFile(source, metadata=footer, buffer_size=BUFFER)


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
        what = "is no whole Parquet file"
        if isinstance(error, pa.ArrowNotImplementedError) or "crypt" in str(error):
            what = f"is Parquet that pyarrow {pa.__version__} cannot read by itself"
        raise _bad(file, f"{what} ({error})") from None


def _bad(file: Path, text: str) -> DataError:
    return DataError([Fault("data.shard", str(file), text, COPY_AGAIN)])


# -- Arrow ----------------------------------------------------------------------------------------


def _pyarrow(file: Path) -> Any:
    """pyarrow, or what to install."""
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
    pa = _pyarrow(file)
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
