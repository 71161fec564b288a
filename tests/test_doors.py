"""One door to the disk: only the rooms behind `vitft/io.py` may hold a call that changes it."""

import ast
import re
from pathlib import Path

import pytest

VITFT = Path(__file__).resolve().parents[1] / "vitft"
ROOMS = sorted(VITFT.rglob("*.py"))
BEHIND = {"disk", "files", "logs", "moves", "seals", "locks"}  # all others go through `io`

WRITING_MODE = re.compile(r"(?=.*[wax+])[rwaxbt+]{1,4}")
# Forbidden as a method or function of anything: these names mean the disk wherever they occur.
ANYWHERE = {
    "write_text", "write_bytes", "mkdir", "makedirs", "unlink", "rmdir", "removedirs", "rename",
    "renames", "touch", "symlink_to", "hardlink_to", "rmtree", "copyfile", "copyfileobj",
    "copytree",
    "copy2", "copymode", "copystat", "unpack_archive", "make_archive", "save_file", "save_model",
    "savez", "savez_compressed", "savetxt", "tofile", "open_memmap", "savefig", "to_csv",
    "to_pickle", "FileHandler", "RotatingFileHandler", "TimedRotatingFileHandler", "mkstemp",
    "mkdtemp", "NamedTemporaryFile", "TemporaryDirectory", "extractall", "urlretrieve",
    "lchmod", "chmod", "chown", "mkfifo", "mknod",
}  # fmt: skip
# Forbidden on these modules only: the same words are harmless on a list, a str, an array.
OF_MODULE = {
    "os": {"replace", "remove", "truncate", "link", "symlink", "write", "pwrite", "utime"},
    "shutil": {"copy", "move"},
    "torch": {"save"},
    "np": {"save"},
    "numpy": {"save"},
    "json": {"dump"},
    "pickle": {"dump"},
    "marshal": {"dump"},
    "joblib": {"dump"},
}  # fmt: skip


def violations(source: str) -> list[str]:
    """Every call in a source text that changes the disk without the door, as `line: call`."""
    tree = ast.parse(source)
    ours = imported_from_us(tree)
    memory = memory_files(tree)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        f"{call.lineno}: {ast.unparse(call.func)}"
        for call in calls
        if not (ours & {receiver(call), bare(call)}) and writes(call, memory)
    ]


def imported_from_us(tree: ast.AST) -> set[str]:
    """Rooms and functions that `from vitft... import ...` brought in; not the system's calls."""
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "vitft"
        for alias in node.names
        if alias.name != "CALLS"
    }


def entered(source: str) -> set[str]:
    """Rooms behind the door that a source text imports, wherever and however."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "vitft":
            found |= {f"vitft.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {room for room in BEHIND if f"vitft.{room}" in found}


def memory_files(tree: ast.AST) -> set[str]:
    """Names that hold a BytesIO or StringIO."""
    held = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            if called(node.value) in {"BytesIO", "StringIO"}:
                held |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.withitem) and isinstance(node.context_expr, ast.Call):
            name = node.optional_vars
            if called(node.context_expr) in {"BytesIO", "StringIO"} and isinstance(name, ast.Name):
                held.add(name.id)
    return held


def called(call: ast.Call) -> str:
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def bare(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def receiver(call: ast.Call) -> str:
    value = call.func.value if isinstance(call.func, ast.Attribute) else None
    return value.id if isinstance(value, ast.Name) else ""


def writes(call: ast.Call, memory: set[str]) -> bool:
    name, module = called(call), receiver(call)
    if name in ANYWHERE or name in OF_MODULE.get(module, ()):
        return True
    if name in {"open", "fdopen"}:
        return opens_for_writing(call)
    if (
        name == "replace"
    ):  # Path.replace(target); str.replace and dataclasses.replace look different
        return isinstance(call.func, ast.Attribute) and len(call.args) == 1 and not call.keywords
    if name == "save":  # Image.save into memory is fine
        to = call.args[0] if call.args and module != "self" else None
        return to is not None and not (isinstance(to, ast.Name) and to.id in memory)
    if name == "memmap":
        return not any(k.arg == "mode" and ast.unparse(k.value) == "'r'" for k in call.keywords)
    if name == "extract":  # of an archive
        return isinstance(call.func, ast.Attribute) and module != "self"
    return name == "basicConfig" and any(k.arg == "filename" for k in call.keywords)


def opens_for_writing(call: ast.Call) -> bool:
    if call.args and ast.unparse(call.args[0]) == "os.devnull":
        return False
    values = [*call.args, *(k.value for k in call.keywords if k.arg in {"mode", "flags"})]
    texts = [v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]
    flags = {node.attr for v in values for node in ast.walk(v) if isinstance(node, ast.Attribute)}
    if flags & {"O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC", "O_APPEND"}:
        return True
    # The first argument of a bare open is the path; that of path.open is the mode.
    first = 0 if isinstance(call.func, ast.Attribute) else 1
    unknown = [
        k for k in call.keywords if k.arg == "mode" and not isinstance(k.value, ast.Constant)
    ]
    return bool(unknown) or any(
        WRITING_MODE.fullmatch(text) for text in texts[max(0, first - (len(values) - len(texts))) :]
    )


BAD = """
open("a.txt", "w")
open(path, mode="ab")
open(path, mode=how)
path.open("x")
path.open(mode="r+")
os.open(path, os.O_RDWR | os.O_CREAT)
gzip.open(path, "wb")
path.write_text("x")
path.parent.mkdir(parents=True)
path.unlink(missing_ok=True)
path.rename(other)
path.replace(other)
os.replace(a, b)
os.remove(a)
path.touch()
link.symlink_to(x)
shutil.rmtree(folder)
shutil.copy(a, b)
shutil.copytree(a, b)
safetensors.torch.save_file(state, path)
save_file(state, path)
torch.save(state, path)
np.save(path, array)
np.savez_compressed(path, a=array)
np.memmap(path, mode="w+")
json.dump(obj, file)
picture.save(path)
picture.save(folder / "a.png")
logging.FileHandler(path)
logging.basicConfig(filename="x")
tempfile.NamedTemporaryFile()
tempfile.mkdtemp()
archive.extractall(folder, filter="data")
archive.extract(member, folder, filter="data")
from vitft.io import CALLS; CALLS.unlink(path)
from vitft import io; io.CALLS.mkdir(path)
""".strip().splitlines()

GOOD = """
open(path)
open("w")
path.open("rb")
path.open()
Image.open(path, formats=["JPEG"])
os.open(path, os.O_RDONLY)
tarfile.open(path, "r:gz")
text.replace("a", "b")
dataclasses.replace(spec, seed=1)
names.remove("x")
json.dumps(obj)
path.read_text()
buffer = BytesIO(); picture.save(buffer, "JPEG")
from vitft import checkpoint; checkpoint.save(folder, snapshot)
from vitft import io; io.write_text(path, "x")
sys.stdout.write("x")
os.open(os.devnull, os.O_WRONLY)
np.memmap(path, dtype=np.uint8, mode="r")
extract(photos, "train")
from vitft.checkpoint import save; save(folder, snapshot)
self.save(snapshot)
""".strip().splitlines()


@pytest.mark.parametrize("line", BAD)
def test_the_search_finds(line):
    assert violations(line), line


@pytest.mark.parametrize("line", GOOD)
def test_the_search_lets_pass(line):
    assert violations(line) == [], line


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: str(path.relative_to(VITFT)))
def test_no_room_changes_the_disk_but_through_the_door(path):
    found = violations(path.read_text("utf-8"))
    if path.parent == VITFT and path.stem in BEHIND:
        assert found, "the search itself has gone blind"
        return
    assert found == []


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: str(path.relative_to(VITFT)))
def test_no_room_goes_behind_the_door(path):
    within = path.parent == VITFT and path.stem in {"io", *BEHIND}
    assert within or entered(path.read_text("utf-8")) == set()


@pytest.mark.parametrize(
    "line",
    ["import vitft.disk", "from vitft import disk", "from vitft.disk import CALLS as c"],
)
def test_every_way_behind_the_door_is_seen(line):
    assert entered(f"def late():\n    {line}") == {"disk"}
