"""Shards -> the `Listing` of their pictures: tar files as webdataset writes them, or Arrow tables.

    wds     train-0000.tar, val-0000.tar ...; a sample is files of one key: 17.jpg, 17.cls, 17.json
    hfds    what `datasets.save_to_disk` wrote: train/data-00000-of-00002.arrow, dataset_dict.json;
            or what `push_to_hub` did: train-00000-of-00002.parquet

One pass over the headers and labels gives every picture a path of its own (`vitft.containers`), and
from there on shards are a folder: each picture is hashed and decoded once, split exactly, drawn in
any order and named in every error. A stream has none of that: it shuffles within a window, rounds
its epochs, and passes over what it cannot decode. The price is the pass, and random reads; afar
(`vitft.afar`) the reads are not quite random (`vitft.ahead`).
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from vitft import afar, columns, containers, io
from vitft.addresses import KINDS
from vitft.errors import DataError, Fault
from vitft.folders import EXTENSIONS, SHARDS, SPLIT_FOLDERS, Entry, Listing, check_root

NAMES = "classes.txt"  # one name a line, for shards whose labels are numbers
MAX_LABEL = 65_536  # bytes of a .cls or .json
JSON_KEYS = ("label", "cls")
OTHERS = "folder, link or other special member of a tar"
PARTS = "label or other part of a sample"


@dataclass(frozen=True)
class _Shard:
    """What one file holds.

    Attributes:
        samples: Name and label of each picture.
        names: The classes that it declares.
        ignored: What else is in it, by kind.
    """

    samples: tuple[tuple[str, str], ...]
    names: tuple[str, ...] = ()
    ignored: dict[str, int] = field(default_factory=dict)


def kind(root: Path) -> str:
    """`wds` or `hfds` where a root can be nothing else; empty for a folder or a CSV.

    A root that may not be looked into is left to the reader of folders, which says so.
    """
    if afar.holds(root):
        return "hfds" if _ending(root, ".parquet") else "wds"
    with suppress(PermissionError):
        if single := _single(root):
            return single
        if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
            return "hfds"
    return ""


def _single(root: Path) -> str:
    """The source of one file that is a data set on its own; empty where it is none."""
    ending = root.suffix.lower()
    return SHARDS[ending] if ending in KINDS and root.is_file() else ""


def read_shards(root: Path, source: str, *, split: str, extensions: Sequence[str] = ()) -> Listing:
    """Lists the pictures of shards.

    Args:
        root: The folder of the shards, or a single tar.
        source: `wds` or `hfds`.
        split: `auto` and `folders` go by the shards' names (`train-0001.tar`, `val/0001.tar`) or
            the data set's splits; all else reads them as one.
        extensions: Endings of pictures beside the known ones, in lower case.

    Raises:
        DataError: `data.shard` for every file that is broken; `data.sample` for samples without
            one picture and one label; `data.no_split`, `data.layout`, `data.no_val`,
            `data.empty_class`, `data.root_*`.
        MachineError: `env.extra`.
    """
    if split == "tutorial":
        fix = "name a folder of photographs, or set data.split: stratified"
        raise DataError.of("data.no_split", root, "the tutorial splits a folder, not shards", fix)
    if not root.is_dir() and _single(root) != source:
        check_root(root)
    files = _files(root, source)
    by_name = split in ("auto", "folders")
    sides = _sides(root, files, required=split == "folders") if by_name else {}
    faults: list[Fault] = []
    ignored: Counter[str] = Counter()
    entries: list[Entry] = []
    names = own = _class_names(root)
    base = root if root.is_dir() else root.parent
    for file in files:
        relative = file.relative_to(base).as_posix()
        try:
            shard = (_far if afar.holds(file) else _look)(file, (*EXTENSIONS, *extensions))
            names = own or _agreed(file, names, shard.names)
            ignored.update(shard.ignored)
            for name, label in shard.samples:
                entries.append(Entry(f"{relative}/{name}", label, sides.get(file, "")))
        except DataError as error:
            faults += error.faults
        except OSError as error:
            faults.append(Fault("data.shard", str(file), f"{error.strerror}", "make it readable"))
    if faults:
        raise DataError(faults)
    return _listing(base, entries, names, ignored)


def _listing(
    base: Path, entries: list[Entry], names: tuple[str, ...], ignored: Counter[str]
) -> Listing:
    if names:
        entries = [_named(base, entry, names) for entry in entries]
        classes, numbers = names, False
    else:
        found = {e.label for e in entries if e.split in ("", "train")}
        numbers = all(label.isdecimal() for label in found)
        classes = tuple(sorted(found, key=int if numbers else None))
    warnings = tuple(
        f"class {name!r} has no photograph"
        for name in sorted(set(classes) - {e.label for e in entries})
    )
    if numbers:
        warnings += (
            f"classes are numbers; {NAMES} beside the shards, one name a line, names them",
        )
    entries.sort(key=lambda e: e.path)
    total = len(entries) + ignored.total()
    return Listing(base, tuple(entries), classes, total, dict(ignored), warnings=warnings)


def _named(base: Path, entry: Entry, names: tuple[str, ...]) -> Entry:
    """A label that is a number is the place of a name, even where names are numbers."""
    if entry.label in names and not entry.label.isdecimal():
        return entry
    if not entry.label.isdecimal() or int(entry.label) >= len(names):
        text = f"label {entry.label!r} is none of {len(names):,} classes"
        fix = f"correct the label, or {NAMES} beside the shards"
        raise DataError.of("data.sample", base / entry.path, text, fix)
    return Entry(entry.path, names[int(entry.label)], entry.split)


def _agreed(file: Path, names: tuple[str, ...], declared: tuple[str, ...]) -> tuple[str, ...]:
    """The one list of classes that label numbers of every file are places in."""
    if names and declared and names != declared:
        text = f"declares classes {list(declared)[:5]}, a file before it {list(names)[:5]}"
        fix = "give all splits the same classes in the same order, and save_to_disk again"
        raise DataError.of("data.sample", file, text, fix)
    return names or declared


def _class_names(root: Path) -> tuple[str, ...]:
    file = (root if root.is_dir() else root.parent) / NAMES
    if not file.is_file():
        return ()
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        text = f"is no UTF-8 text ({error.reason} at byte {error.start:,})"
        raise DataError.of("data.sample", file, text, "save it as UTF-8") from None
    names = tuple(line.strip() for line in lines if line.strip())
    if len(set(names)) < len(names):
        raise DataError.of("data.sample", file, "names a class twice", "name each class once")
    return names


# -- files and sides ------------------------------------------------------------------------------


def _files(root: Path, source: str) -> list[Path]:
    if source == "hfds":
        return _tables(root)
    if root.is_file():
        return [root]
    files = _ending(root, ".tar")
    if not files:
        packed = sorted(p.name for p in root.rglob("*.tar.*"))
        told = f"; {packed[0]} is compressed, which allows no reading by position" if packed else ""
        fix = "name the folder of the shards; unpack them to .tar where they are compressed"
        raise DataError.of("data.root_empty", root, f"no .tar in this folder{told}", fix)
    return files


def _ending(root: Path, ending: str) -> list[Path]:
    found = (p for p in root.rglob("*") if p.suffix.lower() == ending and p.is_file())
    return sorted(p for p in found if not p.name.startswith("."))


def _tables(root: Path) -> list[Path]:
    """In the order that the data set says: its row numbers follow it."""
    described = (root / "dataset_dict.json", root / "state.json")
    parquet = [root] if root.is_file() else _ending(root, ".parquet")
    if parquet and not any(file.is_file() for file in described):
        return parquet
    try:
        parts = [root]
        if (root / "dataset_dict.json").is_file():
            described = json.loads((root / "dataset_dict.json").read_text("utf-8"))
            parts = [root / str(name) for name in described["splits"]]
        return [
            part / PurePosixPath(str(f["filename"])).name
            for part in parts
            for f in json.loads((part / "state.json").read_text("utf-8"))["_data_files"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = f"is not what datasets.save_to_disk writes ({type(error).__name__}: {error})"
        fix = "save it so: datasets.load_dataset(...).save_to_disk(FOLDER), or name .parquet files"
        raise DataError.of("data.root_empty", root, text, fix) from None


def _sides(root: Path, files: list[Path], *, required: bool) -> dict[Path, str]:
    """train, val or test of each file by a word of its name or folder; none where no name says."""
    sides = {file: side for file in files if (side := _side(root, file))}
    have = set(sides.values())
    if not have and not required:
        return {}
    fix = "name every shard so, or set data.split: stratified to ignore the names"
    if len(sides) < len(files):
        odd = next(file for file in files if file not in sides)
        text = f"{odd.name} says neither train, val nor test, unlike {len(sides):,} others"
        raise DataError.of("data.layout", root, text, fix)
    if "train" not in have:
        raise DataError.of("data.no_train", root, f"only {', '.join(sorted(have))} here", fix)
    if have == {"train"} and required:
        text = "neither val nor test is here: nothing would be left to measure on"
        raise DataError.of("data.no_val", root, text, "set data.split: stratified")
    return sides if have != {"train"} else {}


def _side(root: Path, file: Path) -> str:
    within = file.relative_to(root).as_posix() if root.is_dir() else file.name
    words = re.split(r"[^a-z]+", within.lower())
    return next((SPLIT_FOLDERS[word] for word in words if word in SPLIT_FOLDERS), "")


# -- samples --------------------------------------------------------------------------------------


def _look(file: Path, accept: Sequence[str]) -> _Shard:
    return _rows(file) if columns.holds(file) else _samples(file, accept)


def _far(file: Path, accept: Sequence[str]) -> _Shard:
    """As `_look`, kept beside the stand-in: labels lie all over a tar, between its pictures."""
    kept, of = file.with_name(f"{file.name}.samples.json"), [afar.identity(file), *accept]
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(kept.read_bytes())
        if found.pop("of") == of:
            samples = tuple((str(name), str(label)) for name, label in found["samples"])
            return _Shard(samples, tuple(found["names"]), dict(found["ignored"]))
    shard = _look(file, accept)
    io.write_json(kept, {"of": of} | asdict(shard))
    return shard


def _samples(file: Path, accept: Sequence[str]) -> _Shard:
    """Picture and label of each sample of a tar.

    The key of a sample is its path up to the first dot of the name, as webdataset has it. Its label
    is the text of `.cls`, `label` or `cls` of `.json`, or the folder it lies in.
    """
    tar = containers.members(file)
    found, ignored = [], Counter({OTHERS: tar.others} if tar.others else {})
    samples: dict[str, dict[str, str]] = defaultdict(dict)
    for name in tar.spans:
        folder, _, last = name.rpartition("/")
        stem, _, ending = last.partition(".")
        parts = samples[f"{folder}/{stem}"]
        if "." + ending.lower() in parts:
            text = f"sample {stem} has {parts['.' + ending.lower()]} and {name}"
            raise DataError.of("data.sample", file, text, "give one of the two another key")
        parts["." + ending.lower()] = name
    for key, parts in samples.items():
        pictures = [n for ending, n in parts.items() if ending in accept]
        others = len(parts) - len(pictures)
        if others:
            ignored[PARTS] += others
        if not pictures:
            continue
        label = _label(file, parts)
        if len(pictures) > 1 or label is None:
            what = f"{len(pictures)} pictures" if label is not None else "no label"
            text = f"sample {key.lstrip('/')} has {what}"
            fix = "give each sample one picture and a .cls, a .json with `label`, or a folder"
            raise DataError.of("data.sample", file, text, fix)
        found.append((pictures[0], label))
    return _Shard(tuple(found), (), dict(ignored))


def _label(file: Path, parts: dict[str, str]) -> str | None:
    if ".cls" in parts:
        return _text(file, parts[".cls"]).strip() or None
    if ".json" in parts:
        try:
            found: Any = json.loads(_text(file, parts[".json"]))
            label = next((found[k] for k in JSON_KEYS if k in found), None)
        except (ValueError, TypeError, RecursionError):
            label = None
        if isinstance(label, int | str) and not isinstance(label, bool):
            return str(label).strip() or None
    folder = PurePosixPath(next(iter(parts.values()))).parent.name
    return folder or None


def _text(file: Path, name: str) -> str:
    data = containers.read(file, name, MAX_LABEL)
    return "" if data is None else data.decode("utf-8", "replace")


# -- tables ---------------------------------------------------------------------------------------


def _features(file: Path, schema: Any) -> dict[str, Any]:
    """What the data set says of its columns."""
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = about.get("info", {}).get("features", {})
        return dict(features)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        text = f"its huggingface metadata cannot be read ({type(error).__name__}: {error})"
        raise DataError.of("data.sample", file, text, "save it again by save_to_disk") from None


def _rows(file: Path) -> _Shard:
    """Row numbers with labels, and the class names that the file declares."""
    schema = columns.schema(file)
    features = _features(file, schema)
    classes = [k for k, f in features.items() if isinstance(f, dict) and "names" in f]
    fix = "rename the columns to image and label, keep one of each, and save_to_disk again"
    try:
        columns.picture_column(schema)
    except ValueError as error:
        raise DataError.of("data.sample", file, str(error), fix) from None
    column = classes[0] if len(classes) == 1 else "label"
    if column not in schema.names:
        text = f"columns with a label: {', '.join(classes) or 'none'} of {schema.names}"
        raise DataError.of("data.sample", file, text, fix)
    names = tuple(str(n) for n in features.get(column, {}).get("names", ()))
    labels = columns.values(file, column)
    missing = [
        k for k, label in enumerate(labels) if label is None or str(label).strip() in ("", "-1")
    ]
    if missing:
        text = f"{len(missing):,} rows have no label, the first is {missing[0]:,}"
        raise DataError.of("data.sample", file, text, "leave these rows out")
    odd = next((label for label in labels if not isinstance(label, int | str)), None)
    if odd is not None:
        text = f"labels in {column} are of type {schema.field(column).type}, such as {odd!r}"[:200]
        fix = "give each row one label, a whole number or a text"
        raise DataError.of("data.sample", file, text, fix)
    width = len(str(max(len(labels) - 1, 0)))
    return _Shard(tuple((f"{k:0{width}d}", str(label)) for k, label in enumerate(labels)), names)
