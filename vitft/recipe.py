"""A recipe: strict YAML in, frozen sections out, and every fault at once.

    load(path, overrides) -> Recipe     a file, with `a.b=c` overrides from the command line
    parse(text, ...)      -> Recipe     the same for text
    dump(recipe)          -> str        resolved YAML; loading it gives an equal Recipe
    describe()            -> str        every key, its rule, default and meaning (Markdown)

Each fault names `file:line:col: key` (or `command line: key`), the rule, the value met and a
remedy. Relative paths in the file start at the file's folder, those on the command line at the
current one; the Recipe holds absolute paths. The keys themselves are declared in
`vitft.schema`; `draft` reads, `remedies` helps.
"""

import os
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from vitft import conflicts
from vitft.draft import Draft, drafted, read, resolve_paths
from vitft.errors import RecipeError
from vitft.kinds import Section, rule, section_of
from vitft.remedies import fault_id, remedy, rule_at, suggest_key
from vitft.schema import SCHEMA_VERSION, Origin, leaves
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

LOOKED_UP = 50  # faults that get a remedy of their own; a file with more is no recipe


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file.

    Args:
        path: A UTF-8 YAML file of at most 1 MB.
        overrides: Such as `train.lr=1e-4`; the last of several for one key counts.

    Raises:
        RecipeError: With every fault found; `data.address`: several addresses for data.root, as a
            shell makes them of braces without quotes.
    """
    path = Path(path)
    return parse(read(path), str(path), path.parent, overrides, path=path)


def of_run(run: Path) -> Recipe:
    """What a run's folder says that it was; what may go together has changed since, perhaps.

    Raises:
        RecipeError: With every fault found.
    """
    path = run / "recipe.resolved.yaml"
    return parse(read(path), str(path), path.parent, path=path, past=True)


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
    draft = drafted(text, name, Path(base_dir))
    draft.override(overrides)
    _check_version(draft)
    resolve_paths(draft)
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


# --- the check ----------------------------------------------------------------------------------


def _check_version(draft: Draft) -> None:
    """A recipe for a later vitft gets this one fault: its other keys cannot be judged."""
    from vitft import __version__

    version = draft.data.get("schema_version")
    if type(version) is int and version > SCHEMA_VERSION:
        draft.faults.clear()
        text = f"must be at most {SCHEMA_VERSION} for vitft {__version__}, got {version}"
        fix = "upgrade vitft (pip install -U vitft), or use a recipe made for this version"
        draft.blame(("schema_version",), "schema_version", text, fix)
        raise RecipeError([fault for _, fault in draft.faults])


def _slug(stem: str) -> str:
    """A folder name from a file name."""
    plain = re.sub(r"[^\w.+-]+", "-", stem)[:100]
    return plain if re.match(r"\w", plain) else "recipe"


def _validated(draft: Draft) -> Recipe:
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


def _blame(draft: Draft, key: KeyPath, kinds: set[str]) -> None:
    """One fault for one key, whatever the validator said about it."""
    few = len(draft.faults) < LOOKED_UP
    if "extra_forbidden" in kinds:
        typed = key in draft.spots and draft.spots[key].place.startswith("command line")
        fix = suggest_key(key, whole=typed) if few else "remove it"
        return draft.blame(key, "unknown_key", "unknown key", fix)
    spot = next(draft.spots[key[:n]] for n in range(len(key), 0, -1) if key[:n] in draft.spots)
    typed, (allowed, default) = spot.order[0] > 0, rule_at(key)
    fix = remedy(spot.raw, allowed, default, typed=typed) if few else "correct the value"
    text = f"must be {allowed}, got {spot.raw or 'nothing'}"
    draft.blame(key, fault_id(kinds), text, fix)


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
