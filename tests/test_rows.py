"""No row of the bad-input matrix is lost: each of the 156 ids stands in the name of a test."""

import ast
import re
from pathlib import Path

ROWS = {"I": 36, "D": 23, "R": 21, "C": 33, "X": 30, "P": 13}
TESTS = Path(__file__).resolve().parent


def every_row() -> list[str]:
    return [f"{letter}{number}" for letter, last in ROWS.items() for number in range(1, last + 1)]


def rows_tested(*, nightly: bool = True) -> dict[str, list[str]]:
    """Row -> the tests whose names begin with it; read, not imported."""
    found: dict[str, list[str]] = {row: [] for row in every_row()}
    for path in sorted(TESTS.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                if not nightly and "pytest.mark.nightly" in map(ast.unparse, node.decorator_list):
                    continue
                for row in re.match(r"test((_[IDRCXP]\d+)*)", node.name)[1].split("_")[1:]:
                    found[row].append(f"{path.name}::{node.name}")  # KeyError: no such row
    return found


def test_the_matrix_has_156_rows():
    assert len(every_row()) == 156


def test_every_row_is_in_the_name_of_a_test_that_always_runs():
    assert [row for row, tests in rows_tested(nightly=False).items() if not tests] == []
    assert rows_tested(nightly=False) != rows_tested()
