"""The strict CSV reader: what stands there comes out, and of errors none but our own."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vitft.assign import Fixes, read_fixes
from vitft.errors import DataError
from vitft.folders import Entry, Listing
from vitft.recipe import DataSpec
from vitft.sources import read_csv
from vitft.table import read_table

CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
NAME = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("csv") / "t.csv"


def put(file: Path, text: str) -> Path:
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    return file


def test_rows_keep_their_line_numbers_across_quoted_newlines_and_blank_lines(table):
    put(table, 'path,label\n"a\nb.jpg",x\n\nc.jpg,y\n')
    rows = read_table(table, required=("path", "label"))
    assert [(r.line, r.get("path"), r.get("label")) for r in rows] == [
        (2, "a\nb.jpg", "x"),
        (5, "c.jpg", "y"),
    ]


def test_columns_may_stand_in_any_order_and_further_ones_are_read_over(table):
    put(table, "note,label,path\nhello,x,./a//b.jpg\n")
    (row,) = read_table(table, required=("path", "label"), optional=("split",))
    assert (row.get("path"), row.get("label"), row.get("split")) == ("a/b.jpg", "x", "")


def test_a_missing_file_is_our_error(tmp_path):
    with pytest.raises(DataError, match=r"data\.csv_missing.*No such file") as caught:
        read_table(tmp_path / "no.csv", required=("path",))
    assert caught.value.exit_code == 3


def test_a_thousand_faults_of_one_table_are_kept_and_ten_shown(table):
    put(table, "path,label\n" + ",x\n" * 3000)
    with pytest.raises(DataError, match=r"\.\.\. and 990 more") as caught:
        read_table(table, required=("path", "label"))
    assert len(caught.value.faults) == 1000


@given(st.lists(st.tuples(NAME.filter(lambda n: n.strip() and n not in (".", "..")), CELL)))
def test_every_table_written_by_the_csv_module_reads_back(table, rows):
    rows = list({path: (path, label) for path, label in rows}.values())
    text = io.StringIO()
    csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(
        [("path", "label"), *rows]
    )
    put(table, text.getvalue())
    if rows:
        got = read_table(table, required=("path", "label"))
        assert [(r.get("path"), r.get("label")) for r in got] == rows
    else:
        with pytest.raises(DataError, match=r"data\.csv_empty"):
            read_table(table, required=("path", "label"))


HEADS = st.sampled_from(["path,label\n", "path,label,split,group\n", "path,action,label\n", ""])
BITS = st.sampled_from([*',"\n\r;\t\0', "\ufeff", "a.jpg", "cat", "train", "relabel", "../", "é"])
TEXTS = st.lists(BITS | st.text(max_size=3), max_size=30).map("".join)


@given(HEADS, TEXTS, st.binary(max_size=4))
@settings(max_examples=400)
@example("", "", b"\xff\xfe")
@example("path,label\n", '"' + "x" * 200_000, b"")
@example("path,label\n", "a\rb,c\r", b"")
@example("path,label\n", "a.jpg,cat\n\0,cat\n", b"")
def test_whatever_stands_in_a_csv_only_our_error_comes_out(table, head, text, tail):
    table.write_bytes(head.encode() + text.encode("utf-8", "surrogatepass") + tail)
    listing = Listing(table.parent, (Entry("a.jpg", "cat"),), ("cat", "dog"), 1)
    for read in (
        lambda: read_csv(table, DataSpec(root=str(table))),
        lambda: read_fixes(table, listing),
    ):
        try:
            got = read()
        except DataError as error:
            assert all(f.id.startswith("data.") and f.fix for f in error.faults)  # noqa: PT017
        else:
            assert isinstance(got, Listing | Fixes)
