"""A CSV file -> rows of text, or one error that lists every bad line.

The reader is strict and guesses nothing: commas only, UTF-8 only (a byte-order mark is fine), every
cell stays the text it is (`NA`, `yes` and `1.0` are names). Bytes that are not UTF-8 survive as
surrogates, so that a file name with such bytes, written by vitft itself, reads back as it was.
"""

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path, PurePosixPath

from vitft.errors import DataError, Fault

SHOWN_LINES = 1000  # faults kept of one table; a file with the wrong separator has one per line


@dataclass(frozen=True)
class Row:
    """One record.

    Attributes:
        line: The line of the file on which it starts, counted from 1.
        cells: Column name -> text; columns that the table lacks are absent.
    """

    line: int
    cells: dict[str, str]

    def get(self, column: str) -> str:
        """The cell, or empty text where the table lacks the column."""
        return self.cells.get(column, "")


def read_table(
    path: Path,
    *,
    required: Sequence[str],
    optional: Sequence[str] = (),
    check: Callable[[Row], str | None] = lambda row: None,
) -> list[Row]:
    """Reads a table whose rows each name a file.

    Args:
        path: The CSV file; its first line names the columns.
        required: Columns that must be there; `path` is always one of them.
        optional: Columns that may be there; any further one is read over.
        check: Says what is wrong with a row, or None.

    Returns:
        At least one row; `path` cells are normalised, unique and never lead out of a folder.

    Raises:
        DataError: `data.csv_missing`, `data.csv_encoding`, `data.csv_columns`, `data.csv_empty`, or
            one `data.csv_row` for every bad line.
    """
    records = _records(_decode(path))
    header = next(records, (1, []))[1]
    if isinstance(header, str):
        raise DataError([_row_fault(path, 1, header)])
    _check_header(path, header, required, optional)
    faults: list[Fault] = []
    rows: list[Row] = []
    first: dict[str, Row] = {}
    for line, record in records:
        row = record if isinstance(record, str) else _row(line, header, record)
        wrong = row if isinstance(row, str) else _repeats(row, first) or check(row)
        if wrong is not None:
            faults.append(_row_fault(path, line, wrong))
        elif isinstance(row, Row):
            rows.append(row)
            first[row.get("path")] = row
    if faults:
        raise DataError(faults[:SHOWN_LINES])
    if not rows:
        text = f"has a header ({','.join(header)}) and no rows"
        raise DataError.of("data.csv_empty", path, text, "add one line per photograph")
    return rows


def _decode(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        text = f"cannot be read: {error.strerror}"
        raise DataError.of("data.csv_missing", path, text, "check the path") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = f"is UTF-16 ({len(data):,} bytes), not UTF-8"
        raise DataError.of("data.csv_encoding", path, text, "save it as 'CSV UTF-8'")
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


def _records(text: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yields (line on which it starts, cells); or what is wrong, and then nothing more."""
    reader = csv.reader(StringIO(text, newline=""), strict=True)
    line = 1
    while True:
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f'not CSV ({error}); close every quote, write a quote inside a cell as ""'
            return
        if record:
            yield line, record
        line = reader.line_num + 1


def _check_header(
    path: Path, header: list[str], required: Sequence[str], optional: Sequence[str]
) -> None:
    missing = [c for c in required if c not in header]
    twice = sorted({c for c in header if c in (*required, *optional) and header.count(c) > 1})
    if not missing and not twice:
        return
    fix = f"the first line must name the columns: {','.join(required)}"
    if optional:
        fix += f" (and may name {', '.join(optional)})"
    what = f"column {twice[0]!r} twice" if twice else f"no column {', '.join(map(repr, missing))}"
    text = f"{what}; columns here: {', '.join(map(repr, header[:10])) or 'none'}"
    split_by = next((s for s in ";\t|" if len(header) == 1 and s in header[0]), None)
    if split_by is not None:
        text += f"; the separator looks like {split_by!r}"
        fix = "save it with commas as separators"
    raise DataError.of("data.csv_columns", path, text, fix)


def _row(line: int, header: list[str], record: list[str]) -> Row | str:
    """The row, or what is wrong with it."""
    if len(record) != len(header):
        return f"{len(record)} cells where the header names {len(header)}"
    cells = dict(zip(header, record, strict=True))
    for name, cell in cells.items():
        if name != "path" and not cell.isascii() and not _is_utf8(cell):
            return f"{name} {cell!r} is not UTF-8; is the file saved as Latin-1 or Windows-1252?"
    path = cells["path"]
    pure = PurePosixPath(path)
    if not path.strip():
        return "path is blank"
    if pure.is_absolute() or ".." in pure.parts or "\0" in path:
        there = (
            "write paths from that folder on, and save the table beside or above the photographs"
        )
        return f"path {path!r} leads outside the folder of the table; {there}"
    return Row(line, {**cells, "path": str(pure)})


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _repeats(row: Row, first: dict[str, Row]) -> str | None:
    before = first.get(row.get("path"))
    if before is None:
        return None
    if before.get("label") == row.get("label"):
        return f"{row.get('path')!r} stands on line {before.line} already"
    return (
        f"{row.get('path')!r} has label {row.get('label')!r} here and {before.get('label')!r} on "
        f"line {before.line}"
    )


def _row_fault(path: Path, line: int, wrong: str) -> Fault:
    return Fault("data.csv_row", f"{path}:{line}", wrong, "correct or remove the line")
