"""A recipe before its check: values as given, where each was given, and the faults so far.

In: a file, or its text, and `a.b=c` overrides. Out: a `Draft`, of which every relative path has
become absolute: those in the file start at its folder, those on the command line at the current
one.
"""

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

from vitft import strict_yaml
from vitft.errors import Fault, RecipeError
from vitft.remedies import is_value, nearest
from vitft.strict_yaml import KeyPath, dotted

MAX_BYTES = 1_000_000
PATHS: tuple[tuple[str, ...], ...] = (
    ("output",),
    ("data", "root"),
    ("data", "split"),
    ("data", "fixes"),
    ("model", "weights"),
    ("model", "embed", "weights"),
    ("offline", "data", "root"),
    ("offline", "model", "weights"),
)
_NOT_PATHS = {  # words with a meaning of their own
    "data.root": re.compile(r"sample:.*|flower_photos|[A-Za-z][A-Za-z0-9+.-]*://.*"),
    "offline.data.root": re.compile(r"sample:.*|flower_photos"),
    "data.split": re.compile(r".*(?<!\.csv)(?<!\.CSV)", re.DOTALL),
    "data.fixes": re.compile(r".*(?<!\.csv)(?<!\.CSV)", re.DOTALL),
}
_FILE_LIKE = re.compile(r".*[/\\\\].*|~.*|\..*|.*\.(pth|pt|bin|ckpt|npz|safetensors|tar|zip|onnx)")


@dataclass(frozen=True)
class Spot:
    """Where a value was given, what was written, where its relative path starts."""

    place: str
    raw: str
    base: Path
    order: tuple[int, int, int]


def key_of(override: str) -> str:
    """What an `a.b=c` sets."""
    return override.partition("=")[0].strip()


@dataclass
class Draft:
    """Values before the check, their spots, and the faults so far."""

    data: dict[str, Any]
    spots: dict[KeyPath, Spot] = field(default_factory=dict)
    faults: list[tuple[tuple[int, int, int], Fault]] = field(default_factory=list)
    overrides: int = 0

    def blame(self, key: KeyPath, id: str, text: str, fix: str) -> None:
        """Adds a fault at the nearest spot known."""
        near = next(key[:n] for n in range(len(key), -1, -1) if key[:n] in self.spots or n == 0)
        spot = self.spots.get(near, Spot(dotted(key), "", Path(), (2, 0, 0)))
        self.faults.append((spot.order, Fault(f"recipe.{id}", spot.place, text, fix)))

    def override(self, overrides: Sequence[str]) -> None:
        """Sets one `a.b=c` after the other; the last of several for one key counts.

        Not of several addresses: a shell makes them of `data.root=https://host/{0..31}.tar`.
        """
        for override in overrides:
            self._set(override)
        roots = [o.partition("=")[2].strip() for o in overrides if key_of(o) == "data.root"]
        far = [root for root in roots if "://" in root]
        if len(far) > 1:
            text = f"{len(far):,} addresses, {far[0]} the first: a shell expands braces"
            fix = "put the address in quotes: 'data.root=https://host/train-{0000..0031}.tar'"
            order = (1, self.overrides, 1)
            self.faults.append((order, Fault("data.address", "data.root", text, fix)))

    def _set(self, override: str) -> None:
        name, equals, raw = override.partition("=")
        key = tuple(name.strip().split("."))
        self.overrides += 1
        order = (1, self.overrides, 0)
        place = f"command line: {name.strip() or override}"
        if not equals or not all(key):
            fix = "write key=value, such as train.lr=1e-4"
            if not equals and Path(override).is_dir():
                fix = f"write data.root={override} if these are the photographs"
            self.faults.append((order, Fault("recipe.override", place, f"got {override}", fix)))
            return
        document = strict_yaml.read(raw)
        problems = [(p.id, p.text, p.fix) for p in document.problems]
        single = not isinstance(document.value, list | dict) and raw.strip()[:1] not in ("'", '"')
        if single and re.search(r"(^|\s)#", raw):
            problems.append(("ambiguous", f"# starts a comment, got {raw}", "put it in quotes"))
        for id, text, fix in problems:
            self.faults.append((order, Fault(f"recipe.{id}", place, text, fix)))
        section = self._section(key, place, order)
        if section is not None and not problems:
            section[str(key[-1])] = document.value
            self._forget(key)
            self.spots[key] = Spot(place, raw, Path.cwd(), order)
            for inner, at in document.places.items():
                inside = f"command line: {dotted(key + inner)}"
                self.spots[key + inner] = Spot(inside, at.raw, Path.cwd(), order)

    def _section(
        self, key: tuple[str, ...], place: str, order: tuple[int, int, int]
    ) -> dict[str, Any] | None:
        section = self.data
        for n, part in enumerate(key[:-1], 1):
            if section.get(part) is None and not is_value(key[:n]):
                section[part] = {}
                self.spots[key[:n]] = Spot(place, "a section", Path.cwd(), order)
            if not isinstance(section.get(part), dict):
                text, fix = f"{'.'.join(key[:n])} is a value, not a section", "shorten the key"
                self.faults.append((order, Fault("recipe.unknown_key", place, text, fix)))
                return None
            section = section[part]
        return section

    def _forget(self, key: KeyPath) -> None:
        for old in [k for k in self.spots if k[: len(key)] == key]:
            del self.spots[old]


def read(path: Path) -> str:
    """The file's text, after its size and kind are known to be sane."""
    fix = "give the path of a recipe, such as recipes/flowers_head.yaml"
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            fix += f" data.root={path}" if stat.S_ISDIR(found.st_mode) else ""
            raise RecipeError.of("recipe.not_file", path, "not a regular file", fix)
        if found.st_size > MAX_BYTES:
            text = f"{found.st_size:,} bytes, at most {MAX_BYTES:,}"
            raise RecipeError.of("recipe.too_large", path, text, "put long lists into files")
        data = path.read_bytes()
    except FileNotFoundError:
        near = nearest(path.name, _neighbours(path))
        fix = f"did you mean {path.parent / near}?" if near else fix
        raise RecipeError.of("recipe.missing", path, "no such file", fix) from None
    except RecipeError:
        raise
    except (OSError, ValueError) as error:
        text = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise RecipeError.of("recipe.unreadable", path, text, fix) from None
    return _decode(data, path)


def _neighbours(path: Path) -> list[str]:
    try:
        return [p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    except OSError:
        return []


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        text = f"not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start:,}"
        fix = "save the file as UTF-8"
        raise RecipeError.of("recipe.encoding", f"{path}:{line}:{column}", text, fix) from None


def drafted(text: str, name: str, base: Path) -> Draft:
    """What the file says, with every fault of the text itself."""
    document = strict_yaml.read(text)
    value, draft = document.value, Draft({})
    for p in document.problems:
        where = f"{name}:{p.line}:{p.column}" + (f": {dotted(p.path)}" if p.path else "")
        fault = Fault(f"recipe.{p.id}", where, p.text, p.fix)
        draft.faults.append(((0, p.line, p.column), fault))
    fix = "write keys such as mode: head, as in recipes/"
    if value is None and not draft.faults:
        raise RecipeError.of("recipe.empty", f"{name}:1:1", "the recipe is empty", fix)
    if not isinstance(value, dict):
        if draft.faults:
            raise RecipeError([fault for _, fault in draft.faults])
        kind = "a list" if isinstance(value, list) else "a single value"
        text = f"must be a mapping of keys at the top, got {kind}"
        raise RecipeError.of("recipe.not_mapping", f"{name}:1:1", text, fix)
    draft.data = value
    for key, at in document.places.items():
        place = f"{name}:{at.line}:{at.column}: {dotted(key)}"
        draft.spots[key] = Spot(place, at.raw, base, (0, at.line, at.column))
    return draft


# --- paths --------------------------------------------------------------------------------------


def is_path(key: str, value: str) -> bool:
    """Whether a value of `data.root`, `model.weights`... means a file or folder.

    `sample:flowers`, `flower_photos`, `bundled`, `none`, `hf-hub:...` and timm tags do not; write
    `./flower_photos` for a folder of that name.
    """
    if key.endswith("weights"):
        return not value.startswith("hf-hub:") and _FILE_LIKE.fullmatch(value) is not None
    return key not in _NOT_PATHS or _NOT_PATHS[key].fullmatch(value) is None


def resolve_paths(draft: Draft) -> None:
    """Makes every path absolute, in place; a fault for each that cannot be."""
    for key in PATHS:
        section = reduce(_child, key[:-1], draft.data)
        value = _child(section, key[-1])
        if isinstance(value, str) and value and is_path(dotted(key), value):
            spot = draft.spots[key]
            try:
                section[key[-1]] = absolute(value, spot.base)
            except ValueError as error:
                draft.blame(key, "path", f"{error}, got {value}", "write the path out")
                del section[key[-1]]


def _child(value: Any, key: str | int) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def absolute(text: str, base: Path) -> str:
    """`~` expanded, made absolute from `base`; `..` taken as the file system takes it.

    Raises:
        ValueError: An unknown `~user`, or a variable, which only a shell expands.
    """
    if re.search(r"\$(\w|\{)", text):
        raise ValueError("variables such as $HOME are not expanded")
    try:
        path = Path(os.path.abspath(base), Path(text).expanduser())  # noqa: PTH100
    except RuntimeError:
        raise ValueError("no home folder for ~") from None
    if ".." in path.parts:
        cut = len(path.parts) - path.parts[::-1].index("..")
        path = Path(os.path.realpath(Path(*path.parts[:cut])), *path.parts[cut:])
    return str(path)
