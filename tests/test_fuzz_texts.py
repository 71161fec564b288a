"""Mutated recipes, tables and logs: read, or refused by our own errors in bounded time."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_fuzz_images import mutate

from vitft import io, recipe, table
from vitft.errors import DataError, MachineError, RecipeError, VitftError

SHORT, LONG = 200, 2000
RECIPES = Path(recipe.__file__).resolve().parents[1] / "recipes"
TABLE = (
    b"\xef\xbb\xbfpath,label,split,group\r\n"
    b'a/1.jpg,cat,train,g1\n"b, c/2.jpg","x ""y""",val,\n'
    b'"new\nline.jpg",dog,test,g2\nd/\xff\xfe.jpg,NA,train,1e3\n'
)
LOG = b'{"epoch":1,"loss":0.5}\n{"epoch":2,"loss":null}\n{"epoch":3,"lo'


def read_recipe(path: Path) -> object:
    found = recipe.load(path, [])
    assert recipe.parse(recipe.dump(found), "again.yaml", path.parent, []) == found
    return found


def read_table(path: Path) -> object:
    return table.read_table(path, required=("path", "label"), optional=("split", "group"))


READERS: dict[str, tuple[str, Callable[[Path], object], type[VitftError]]] = {
    "recipes": ("r.yaml", read_recipe, RecipeError),
    "tables": ("t.csv", read_table, DataError),
    "logs": ("l.jsonl", io.read_lines, MachineError),
}


def seeds(kind: str) -> list[bytes]:
    if kind == "recipes":
        return [path.read_bytes() for path in sorted(RECIPES.glob("*.yaml"))]
    return [TABLE] if kind == "tables" else [LOG]


def fuzz(kind: str, folder: Path, count: int, seed: str) -> tuple[int, int]:
    """How many cases were read, and how many refused; any other end is a failure."""
    name, read, wanted = READERS[kind]
    path, corpus, read_well, slowest = folder / name, seeds(kind), 0, 0.0
    for i in range(count):
        dice = random.Random(f"{seed} {i}")
        path.write_bytes(mutate(dice.choice(corpus), dice))
        started = time.process_time()
        try:
            read(path)
            read_well += 1
        except wanted:
            pass
        except Exception as error:
            raise AssertionError(f"case {seed} {i}") from error
        slowest = max(slowest, time.process_time() - started)
    assert slowest < 2
    return read_well, count - read_well


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("count", [SHORT, pytest.param(LONG, marks=pytest.mark.nightly)])
def test_a_mutated_text_is_read_or_refused(tmp_path, kind, count):
    read_well, refused = fuzz(kind, tmp_path, count, kind)
    assert read_well > 0
    assert refused > count / 20
