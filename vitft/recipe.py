"""A recipe: strict YAML in, frozen sections out, and every fault at once.

    load(path, overrides) -> Recipe     a file, with `a.b=c` overrides from the command line
    parse(text, ...)      -> Recipe     the same for text
    dump(recipe)          -> str        resolved YAML; loading it gives an equal Recipe
    describe()            -> str        every key, its rule, default and meaning (Markdown)

Each fault names `file:line:col: key` (or `command line: key`), the rule, the value met and a
remedy. Relative paths in the file start at the file's folder, those on the command line at the
current one; the Recipe holds absolute paths. The keys themselves are declared in `vitft.schema`.
"""

import difflib
import os
import re
import stat
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from vitft import conflicts, strict_yaml
from vitft.errors import Fault, RecipeError
from vitft.schema import (
    SCHEMA_VERSION,
    Origin,
    Section,
    all_keys,
    leaves,
    rule,
    section_at,
    section_of,
)
from vitft.schema import DataSpec as DataSpec
from vitft.schema import EmbedSpec as EmbedSpec
from vitft.schema import ExportSpec as ExportSpec
from vitft.schema import HeadSpec as HeadSpec
from vitft.schema import LadderSpec as LadderSpec
from vitft.schema import ModelSpec as ModelSpec
from vitft.schema import OfflineSpec as OfflineSpec
from vitft.schema import ProbeSpec as ProbeSpec
from vitft.schema import Recipe as Recipe
from vitft.schema import ReportSpec as ReportSpec
from vitft.schema import TrainSpec as TrainSpec
from vitft.schema import TrustSpec as TrustSpec
from vitft.strict_yaml import KeyPath, dotted, write

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
LOOKED_UP = 50  # faults that get a remedy of their own; a file with more is no recipe
ELSEWHERE = {  # what other trainers call our keys and values
    "learning_rate": "train.lr",
    "optimizer": "train.opt",
    "scheduler": "train.sched",
    "num_epochs": "train.epochs",
    "dropout": "model.drop_rate",
    "drop_path": "model.drop_path_rate",
    "arch": "model.name",
    "pretrained": "model.weights",
    "checkpoint": "model.weights",
    "dataset": "data.root",
    "data_dir": "data.root",
    "img_size": "data.image_size",
    "num_workers": "train.workers",
    "output_dir": "output",
    "gpu": "device",
}
_NOT_PATHS = {  # words with a meaning of their own
    "data.root": re.compile(r"sample:.*|flower_photos|[A-Za-z][A-Za-z0-9+.-]*://.*"),
    "offline.data.root": re.compile(r"sample:.*|flower_photos"),
    "data.split": re.compile(r".*(?<!\.csv)(?<!\.CSV)", re.DOTALL),
    "data.fixes": re.compile(r".*(?<!\.csv)(?<!\.CSV)", re.DOTALL),
}
_FILE_LIKE = re.compile(r".*[/\\\\].*|~.*|\..*|.*\.(pth|pt|bin|ckpt|npz|safetensors|tar|zip|onnx)")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file.

    Args:
        path: A UTF-8 YAML file of at most 1 MB.
        overrides: Such as `train.lr=1e-4`; the last of several for one key counts.

    Raises:
        RecipeError: With every fault found.
    """
    path = Path(path)
    return parse(_read(path), str(path), path.parent, overrides, path=path)


def of_run(run: Path) -> Recipe:
    """What a run's folder says that it was; what may go together has changed since, perhaps.

    Raises:
        RecipeError: With every fault found.
    """
    path = run / "recipe.resolved.yaml"
    return parse(_read(path), str(path), path.parent, path=path, past=True)


def parse(
    text: str,
    name: str = "recipe.yaml",
    base_dir: str | Path = ".",
    overrides: Sequence[str] = (),
    *,
    path: Path | None = None,
    past: bool = False,
) -> Recipe:
    """Reads a recipe from text.

    Args:
        text: YAML.
        name: What faults call the file; its stem names the run unless the recipe has a name.
        base_dir: Where relative paths in the text start.
        overrides: As for `load`.
        path: The file it came from, for `Recipe.path`.
        past: It has been run: keys that no longer go together are let through.

    Raises:
        RecipeError: With every fault found.
    """
    draft = _draft(text, name, Path(base_dir))
    for override in overrides:
        draft.override(override)
    _check_version(draft)
    _resolve_paths(draft)
    draft.data.setdefault("name", _slug(Path(name).stem))
    recipe = _validated(draft)
    places = {dotted(key): spot.place for key, spot in draft.spots.items()}
    whole = None if path is None else Path(os.path.abspath(path))  # noqa: PTH100  (no link lost)
    recipe._origin = Origin(text, whole, tuple(overrides), places)
    faults = [] if past else list(conflicts.found(recipe))
    if faults:
        raise RecipeError(faults)
    return recipe


def data_of(run: Path) -> tuple[Path, ...]:
    """The folder or CSV file that a finished run learned from, where nothing may be written.

    Args:
        run: Its folder.

    Returns:
        None or one that is there: no recipe, and data that came with a name (`sample:flowers`,
        `flower_photos`) are nobody's folder.
    """
    try:
        root = of_run(run).data.root
    except RecipeError:
        return ()
    return (Path(root),) if os.path.exists(root) else ()  # noqa: PTH110  (False where not allowed)


# --- from the file to a draft -----------------------------------------------------------------


@dataclass(frozen=True)
class _Spot:
    """Where a value was given, what was written, where its relative path starts."""

    place: str
    raw: str
    base: Path
    order: tuple[int, int, int]


@dataclass
class _Draft:
    """Values before the check, their spots, and the faults so far."""

    data: dict[str, Any]
    spots: dict[KeyPath, _Spot] = field(default_factory=dict)
    faults: list[tuple[tuple[int, int, int], Fault]] = field(default_factory=list)
    overrides: int = 0

    def blame(self, key: KeyPath, id: str, text: str, fix: str) -> None:
        """Adds a fault at the nearest spot known."""
        near = next(key[:n] for n in range(len(key), -1, -1) if key[:n] in self.spots or n == 0)
        spot = self.spots.get(near, _Spot(dotted(key), "", Path(), (2, 0, 0)))
        self.faults.append((spot.order, Fault(f"recipe.{id}", spot.place, text, fix)))

    def override(self, override: str) -> None:
        """Sets one `a.b=c`."""
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
            self.spots[key] = _Spot(place, raw, Path.cwd(), order)
            for inner, at in document.places.items():
                inside = f"command line: {dotted(key + inner)}"
                self.spots[key + inner] = _Spot(inside, at.raw, Path.cwd(), order)

    def _section(
        self, key: tuple[str, ...], place: str, order: tuple[int, int, int]
    ) -> dict[str, Any] | None:
        section = self.data
        for n, part in enumerate(key[:-1], 1):
            if section.get(part) is None and not _is_value(key[:n]):
                section[part] = {}
                self.spots[key[:n]] = _Spot(place, "a section", Path.cwd(), order)
            if not isinstance(section.get(part), dict):
                text, fix = f"{'.'.join(key[:n])} is a value, not a section", "shorten the key"
                self.faults.append((order, Fault("recipe.unknown_key", place, text, fix)))
                return None
            section = section[part]
        return section

    def _forget(self, key: KeyPath) -> None:
        for old in [k for k in self.spots if k[: len(key)] == key]:
            del self.spots[old]


def _read(path: Path) -> str:
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


def _draft(text: str, name: str, base: Path) -> _Draft:
    """What the file says, with every fault of the text itself."""
    document = strict_yaml.read(text)
    value, draft = document.value, _Draft({})
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
        draft.spots[key] = _Spot(place, at.raw, base, (0, at.line, at.column))
    return draft


def _check_version(draft: _Draft) -> None:
    """A recipe for a later vitft gets this one fault: its other keys cannot be judged."""
    from vitft import __version__

    version = draft.data.get("schema_version")
    if type(version) is int and version > SCHEMA_VERSION:
        draft.faults.clear()
        text = f"must be at most {SCHEMA_VERSION} for vitft {__version__}, got {version}"
        fix = "upgrade vitft (pip install -U vitft), or use a recipe made for this version"
        draft.blame(("schema_version",), "schema_version", text, fix)
        raise RecipeError([fault for _, fault in draft.faults])


# --- paths --------------------------------------------------------------------------------------


def is_path(key: str, value: str) -> bool:
    """Whether a value of `data.root`, `model.weights`... means a file or folder.

    `sample:flowers`, `flower_photos`, `bundled`, `none`, `hf-hub:...` and timm tags do not; write
    `./flower_photos` for a folder of that name.
    """
    if key.endswith("weights"):
        return not value.startswith("hf-hub:") and _FILE_LIKE.fullmatch(value) is not None
    return key not in _NOT_PATHS or _NOT_PATHS[key].fullmatch(value) is None


def _resolve_paths(draft: _Draft) -> None:
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


def _slug(stem: str) -> str:
    """A folder name from a file name."""
    plain = re.sub(r"[^\w.+-]+", "-", stem)[:100]
    return plain if re.match(r"\w", plain) else "recipe"


# --- the check ----------------------------------------------------------------------------------


def _validated(draft: _Draft) -> Recipe:
    for name, info in Recipe.model_fields.items():  # an empty section means its defaults
        if info.annotation is section_of(info.annotation) and draft.data.get(name, 0) is None:
            del draft.data[name]
    recipe = None
    try:
        recipe = Recipe.model_validate(draft.data)
    except ValidationError as error:
        groups: dict[KeyPath, set[str]] = {}
        for e in error.errors(include_url=False, include_input=False, include_context=False):
            groups.setdefault(_known_part(e["loc"], draft.data), set()).add(e["type"])
        for key, kinds in groups.items():
            _blame(draft, key, kinds)
    if draft.faults or recipe is None:
        raise RecipeError([fault for _, fault in sorted(draft.faults, key=lambda f: f[0])])
    return recipe


def _known_part(loc: KeyPath, data: object) -> KeyPath:
    """The part of a validator's location that the recipe really has (it adds type names)."""
    for n, part in enumerate(loc):
        inside = isinstance(data, dict) and part in data
        inside |= isinstance(data, list) and isinstance(part, int) and part < len(data)
        if not inside:
            return loc[:n]
        data = data[part]  # type: ignore[index]
    return loc


def _blame(draft: _Draft, key: KeyPath, kinds: set[str]) -> None:
    """One fault for one key, whatever the validator said about it."""
    few = len(draft.faults) < LOOKED_UP
    if "extra_forbidden" in kinds:
        typed = key in draft.spots and draft.spots[key].place.startswith("command line")
        fix = _suggest_key(key, whole=typed) if few else "remove it"
        return draft.blame(key, "unknown_key", "unknown key", fix)
    spot = next(draft.spots[key[:n]] for n in range(len(key), 0, -1) if key[:n] in draft.spots)
    allowed, default = _rule_at(key)
    fix = _remedy(spot, allowed, default) if few else "correct the value"
    text = f"must be {allowed}, got {spot.raw or 'nothing'}"
    draft.blame(key, _fault_id(kinds), text, fix)


def _fault_id(kinds: set[str]) -> str:
    text = " ".join(kinds)
    if any(word in text for word in ("than", "finite", "too_short", "too_long")):
        return "range"
    if any(word in text for word in ("literal", "pattern", "value_error")):
        return "choice"
    return "type"


def _remedy(spot: _Spot, allowed: str, default: str) -> str:
    """What to write instead: the nearest choice, other quotes, or the default as an example."""
    word = spot.raw.strip('"')
    value = _scalar_or_text(word)
    if spot.raw.startswith('"') and not isinstance(value, str):
        return f"take the quotes away: {word}"
    if allowed.startswith("text") and not isinstance(value, str):
        shell = "; in a shell inside single quotes" if spot.order[0] else ""
        return f'put it in quotes: "{word}"{shell}'
    near = nearest("cuda" if word == "gpu" else word, _choices(allowed))
    if near is not None:
        return f"did you mean {near}?"
    if default == "null":
        return "correct the value, or write null"
    return f"write a value such as {default}" if 0 < len(default) < 60 else "correct the value"


def _choices(allowed: str) -> list[str]:
    """The words to choose from in a rule such as `one of cosine, poly` or `auto, cpu or cuda`."""
    if "one of" not in allowed and "auto" not in allowed and "tutorial" not in allowed:
        return []
    return re.findall(r"[a-z_0-9]+", allowed.replace("one of", ""))


def _scalar_or_text(word: str) -> object:
    try:
        return strict_yaml.scalar(word)
    except ValueError:
        return word


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word`, or None when none is near."""
    found = difflib.get_close_matches(word[:100].lower(), list(known), 1, 0.6)
    return found[0] if found else None


def nearest_sizes(size: int, patch: int) -> tuple[int, int]:
    """The multiples of the patch size on both sides of an image size, at least one patch."""
    low = max(size // patch, 1) * patch
    return low, low if low >= size else low + patch


def _suggest_key(key: KeyPath, *, whole: bool = False) -> str:
    """The key that was meant: here first, then anywhere, then what other trainers call it."""
    word, section = str(key[-1]), section_at(key[:-1])
    here = list(section.model_fields) if section else []
    known = ELSEWHERE | {k.rpartition(".")[2]: k for k in reversed(all_keys())}
    if word in known:
        return f"did you mean {known[word]}?"
    near = nearest(word, here)
    if near is not None:
        return f"did you mean {dotted((*key[:-1], near)) if whole else near}?"
    near = nearest(word, known)
    if near is not None:
        return f"did you mean {known[near]}?"
    return f"remove it; keys here are {', '.join(here)}"


def _is_value(key: KeyPath) -> bool:
    """Whether the key is known and holds no keys of its own."""
    section = section_at(key[:-1])
    info = section.model_fields.get(str(key[-1])) if section else None
    return info is not None and not section_of(info.annotation) and key[-1] != "options"


def _rule_at(key: KeyPath) -> tuple[str, str]:
    """The rule for a key (or for an item of its list) and its default, both in words."""
    for n in range(len(key), 0, -1):
        section = section_at(key[: n - 1])
        info = section.model_fields.get(str(key[n - 1])) if section else None
        if info is None:
            continue
        if n == len(key):
            default = "{}" if section_of(info.annotation) else write(info.default)
            return rule(info.annotation, info.metadata), default
        item = get_args(info.annotation)[1 if get_origin(info.annotation) is dict else 0]
        return rule(item), ""
    return "a mapping of keys", ""


# --- out ----------------------------------------------------------------------------------------


def dump(recipe: Recipe, *, explain: bool = False) -> str:
    """Resolved YAML; `load` of it gives an equal recipe.

    Args:
        recipe: Any.
        explain: With meaning, rule and default of every key as comments (`--print-config`).
    """
    return "\n".join(_lines(recipe, "", explain)) + "\n"


def _lines(section: Section, indent: str, explain: bool) -> Iterator[str]:
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if explain and (indent or not isinstance(value, Section)):
            yield from _comment(_meaning(info), indent)
        if isinstance(value, Section):
            if explain and not indent:
                yield from ("", f"# {type(value).__doc__}")
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ", explain)
        else:
            yield f"{indent}{name}: {write(value)}"


def _meaning(info: FieldInfo) -> str:
    if section_of(info.annotation):
        return info.description or ""
    return f"{info.description} [{rule(info.annotation, info.metadata)}; {_default(info)}]"


def _default(info: FieldInfo) -> str:
    default = write(info.default)
    return f"default {default}" if len(default) < 60 else f"{len(info.default)} defaults"


def _comment(text: str, indent: str) -> list[str]:
    lead = f"{indent}# "
    return textwrap.wrap(text, 100, initial_indent=lead, subsequent_indent=lead)


def describe() -> str:
    """Every key with rule, default and meaning, as Markdown tables."""
    top = [(key, info) for key, info in leaves(Recipe) if "." not in key]
    parts = ["## Recipe keys\n", _table("Top level", "What to do, and where.", top)]
    for name, info in Recipe.model_fields.items():
        section = section_of(info.annotation)
        if section is not None:
            keys = leaves(section, f"{name}.")
            parts.append(_table(f"`{name}`", section.__doc__ or "", keys))
    return "\n".join(parts)


def _table(title: str, about: str, keys: Iterable[tuple[str, FieldInfo]]) -> str:
    head = ["| key | value | default | meaning |", "|---|---|---|---|"]
    lines = [f"### {title}\n", f"{about}\n", *head]
    for key, info in keys:
        allowed = rule(info.annotation, info.metadata)
        default = _default(info).removeprefix("default ")
        cells = (f"`{key}`", allowed, f"`{default}`", info.description or "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    """Prints the reference; it takes no arguments."""
    sys.stdout.write(describe())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
