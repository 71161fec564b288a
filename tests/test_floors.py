"""The house has floors: a room uses only rooms below it. No function fills more than a screen."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

VITFT = Path(__file__).resolve().parents[1] / "vitft"
ROOMS = sorted(path.stem for path in VITFT.glob("*.py") if path.stem != "__init__")

FLOORS = (
    # words, numbers and plain values
    "errors stats kernels encode kinds layouts strict_yaml charts figures split threads resize",
    # the keys of a recipe
    "schema",
    # pixels in patches, keys beside keys, tensors by name, wrong words
    "patches positions blocks kin conflicts anatomy eigenbasis remedies",
    # a recipe as it was given
    "draft",
    # the disk, behind its door
    "disk",
    "files wire",
    "logs moves",
    "seals locks",
    # files and what they hold
    "io ranks convert adapt advice tensorfile inputs folders table ledger recipe pages doubt "
    "trust evaluate suspects hybrid trials",
    # files elsewhere, files in files
    "addresses",
    "afar",
    "columns",
    "containers",
    "raw",
    "console images pictures tally checkpoint gallery unpack summary shards regime",
    "sources photos progress ahead weights pace",
    "workers step fitting",
    "hosted",
    # data, models and arrays
    "fetch store contents assign loaders vit model tune maps train sections cli answers",
    "lbfgs neighbours audit curve graph card vitflower",
    "data probe features product offline report cache hubpage inspection",
    # a whole run
    "prepare proof near compare twin",
    "boundary variants plan",
    "learn explain",
    "relearn ladder",
    "findings",
    "chapters",
    "writeup keep",
    # doors
    "run predict check",
    "verify export demo study",
    # the package as a command
    "__main__",
)
LEVEL = {room: level for level, names in enumerate(FLOORS) for room in names.split()}


def tree(room: str) -> ast.AST:
    return ast.parse((VITFT / f"{room}.py").read_text("utf-8"))


def imported(room: str) -> set[str]:
    """The rooms that a room imports, at the top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(tree(room)):
        if isinstance(node, ast.ImportFrom) and node.module == "vitft":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vitft."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {name[1] for name in names if name[0] == "vitft" and len(name) > 1}
    return found & set(ROOMS)


def packages(room: str) -> set[str]:
    """The top-level names of everything a room imports."""
    found: set[str] = set()
    for node in ast.walk(tree(room)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).split(".")[0])
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_stands_on_a_floor_and_imports_from_below(room):
    assert room in LEVEL, f"give {room} a floor in {Path(__file__).name}"
    upward = {other for other in imported(room) if LEVEL.get(other, -1) >= LEVEL[room]}
    assert upward == set(), f"{room} stands on floor {LEVEL[room]}"


def test_no_room_stands_on_two_floors():
    names = " ".join(FLOORS).split()
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("room", ROOMS)
def test_no_function_is_longer_than_forty_lines(room):
    found = [n for n in ast.walk(tree(room)) if isinstance(n, ast.FunctionDef)]
    lines = {n.name: body_lines(n) for n in found}
    assert {name: count for name, count in lines.items() if count > 40} == {}


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its head and its docstring."""
    told = ast.get_docstring(function) is not None
    body = function.body[1:] if told else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("room", ROOMS)
def test_only_the_graph_knows_onnx(room):
    assert room == "graph" or not packages(room) & {"onnx", "onnxruntime", "onnxscript"}


def test_the_front_hall_imports_the_model_and_its_names():
    found = ast.parse((VITFT / "__init__.py").read_text("utf-8"))
    lines = [ast.unparse(n) for n in ast.walk(found) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert lines == [
        "import gc",
        "from vitft import vitflower as vitflower",
        "from vitft.vit import VisionTransformer as VisionTransformer",
    ]


@pytest.mark.parametrize("collects", [True, False])
def test_importing_leaves_pythons_collector_as_it_was(collects):
    """On or off, nothing set aside, and what was made on the way is old already."""
    code = (
        f"import gc; gc.{'enable' if collects else 'disable'}(); import vitft;"
        "print(gc.isenabled(), gc.get_freeze_count(), gc.get_count()[0] < 1000)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{collects} 0 True\n"


def test_what_a_host_froze_stays_frozen():
    code = (
        "import gc; gc.freeze(); frozen = gc.get_freeze_count; before = frozen(); import vitft;"
        "print(before > 1000, frozen() > 0.9 * before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"


@pytest.mark.parametrize("room", ["recipe", "io", "errors", "table", "split"])
def test_rooms_that_need_no_model_load_without_torch(room):
    code = f"import standalone, sys, vitft.{room}; print({{'torch', 'timm'}} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert done.stdout == "set()\n"
