"""A folder or a CSV file, perhaps with corrections -> the `Listing` of photographs and labels.

path,label[,split,group]      the CSV of photographs; paths relative to the CSV's folder
path,action,label             fixes.csv; action is keep, relabel or drop
"""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from vitft import shards
from vitft.errors import DataError, Fault
from vitft.folders import Entry, Listing, check_root, closest, empty_class, read_folders
from vitft.recipe import DataSpec
from vitft.split import SPLITS
from vitft.table import Row, read_table

SEPARATORS = re.compile(r"[,;|]")


def list_photographs(spec: DataSpec) -> Listing:
    """Lists what `data.root` names, checks classes, and adds groups.

    Raises:
        DataError: What `read_folders` and `read_table` raise; `data.unknown_class`,
            `data.one_class`, `data.group`, `data.csv_row`, `data.no_split`, `data.no_val`.
    """
    root = Path(spec.root)
    source = shards.kind(root) if spec.source == "auto" else spec.source
    if source in ("wds", "hfds"):
        listing = _shards(root, source, spec)
    else:
        listing = read_csv(root, spec) if root.suffix.lower() == ".csv" else _folder(root, spec)
    _check_classes(listing)
    return _with_groups(listing, spec.group)


def read_csv(file: Path, spec: DataSpec) -> Listing:
    """Lists the photographs that a CSV names; its labels stay the text they are."""
    if not file.is_file():
        check_root(file)
        raise DataError.of("data.root_file", file, "is a folder", "name the .csv inside it")
    if spec.split == "tutorial":
        fix = "name the folder of photographs instead, or set data.split: stratified"
        raise DataError.of("data.no_split", file, "the tutorial splits a folder, not a CSV", fix)
    by_column = spec.split in ("auto", "folders")
    rows = read_table(
        file,
        required=("path", "label"),
        optional=("split", "group"),
        check=lambda row: _wrong_in_row(row, file.parent, by_column),
    )
    if by_column:
        _check_split_column(file, rows, required=spec.split == "folders")
    _check_floats(file, rows)
    entries = [
        Entry(r.get("path"), r.get("label"), r.get("split") * by_column, r.get("group"))
        for r in sorted(rows, key=lambda r: r.get("path"))
    ]
    classes = sorted({e.label for e in entries if e.split in ("", "train")})
    warnings = _label_warnings([e.label for e in entries])
    return Listing(file.parent, tuple(entries), tuple(classes), len(entries), warnings=warnings)


def _folder(root: Path, spec: DataSpec) -> Listing:
    return read_folders(
        root,
        split=spec.split,
        class_from=spec.class_from,
        extensions=spec.extensions,
        follow_links=spec.follow_links,
        allow_empty=spec.allow_empty,
    )


def _shards(root: Path, source: str, spec: DataSpec) -> Listing:
    listing = shards.read_shards(root, source, split=spec.split, extensions=spec.extensions)
    used = {e.label for e in listing.entries if e.split in ("", "train")}
    empty = [name for name in listing.classes if name not in used]
    if empty and not spec.allow_empty:
        raise DataError([empty_class(root, name) for name in empty])
    return listing


# ---- classes ------------------------------------------------------------------------------------


def _check_classes(listing: Listing) -> None:
    """Classes come from training alone; what val or test have beyond them has no number."""
    place = str(listing.root)
    strange = Counter((e.split, e.label) for e in listing.entries if e.label not in listing.classes)
    faults = [
        Fault(
            "data.unknown_class",
            place,
            f"class {label!r} has {n:,} photographs in {split} and none in train"
            f"{closest(label, listing.classes)}",
            "rename it, or add training photographs of it",
        )
        for (split, label), n in sorted(strange.items())
    ]
    if len(listing.classes) < 2 and not faults:
        name = listing.classes[0] if listing.classes else "none"
        text = f"only one class, {name!r}: there is nothing to tell apart"
        faults.append(Fault("data.one_class", place, text, "add photographs of another class"))
    if faults:
        raise DataError(faults)


def twins(classes: Iterable[str]) -> list[tuple[str, ...]]:
    """Class names that people would read as one: they differ in case, blanks or Unicode form."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        folded = unicodedata.normalize("NFKC", name).casefold()
        alike["".join(folded.split())].append(name)
    return [tuple(names) for names in alike.values() if len(names) > 1]


# ---- CSV ----------------------------------------------------------------------------------------


def _wrong_in_row(row: Row, folder: Path, by_column: bool) -> str | None:
    label, split = row.get("label"), row.get("split")
    if not label.strip():
        return "label is blank"
    if any(ord(c) < 32 for c in label):
        return f"label {label!r} holds a line break or another control character"
    if by_column and split not in ("", *SPLITS):
        return f"split must be train, val or test, got {split!r}"
    path = row.get("path")
    if any("\udc80" <= c <= "\udcff" for c in path) and not os.path.lexists(folder / path):
        return f"path {path!r} is not UTF-8; is the file saved as Latin-1 or Windows-1252?"
    return None


def _check_split_column(file: Path, rows: Sequence[Row], *, required: bool) -> None:
    blank = [r.line for r in rows if not r.get("split")]
    used = {r.get("split") for r in rows} - {""}
    if used and blank:
        text = f"split is blank on {len(blank):,} lines (first: {blank[0]}) and given on others"
        fix = "fill the column, or set data.split: stratified to ignore it"
        raise DataError.of("data.no_split", file, text, fix)
    if required and not used:
        fix = "add it, or set data.split: stratified"
        raise DataError.of("data.no_split", file, "data.split: folders needs a split column", fix)
    if used and "train" not in used:
        text = f"no line has split train; splits here: {', '.join(sorted(used))}"
        raise DataError.of("data.no_train", file, text, "mark the training photographs")
    if used == {"train"}:
        text = "every line has split train: nothing would be left to measure on"
        fix = "mark val and test photographs, or set data.split: stratified"
        raise DataError.of("data.no_val", file, text, fix)


def _check_floats(file: Path, rows: Sequence[Row]) -> None:
    """`1` and `1.0` in one column: a spreadsheet or pandas made two classes of one."""
    labels = {r.get("label") for r in rows}
    split_up = [r for r in rows if re.fullmatch(r"\d+\.0+", r.get("label"))]
    faults = [
        Fault(
            "data.csv_row",
            f"{file}:{r.line}",
            f"label {r.get('label')!r} beside label {r.get('label').split('.')[0]!r}: one class?",
            "write both alike",
        )
        for r in split_up
        if r.get("label").split(".")[0] in labels
    ]
    if faults:
        raise DataError(faults)


def _label_warnings(labels: Sequence[str]) -> tuple[str, ...]:
    several = sum(bool(SEPARATORS.search(label)) for label in labels)
    if several <= 0.3 * len(labels):
        return ()
    example = next(label for label in labels if SEPARATORS.search(label))
    return (
        f"{several:,} of {len(labels):,} labels hold a separator, such as {example!r}: each such "
        "text is one class of its own; vitft gives a photograph one label",
    )


# ---- groups -------------------------------------------------------------------------------------


def _with_groups(listing: Listing, group: str | None) -> Listing:
    """Adds the group that a path spells; a group column of a CSV goes before."""
    if group is None:
        return listing
    entries = [e if e.group else replace(e, group=_group(e.path, group)) for e in listing.entries]
    alone = sum(not e.group for e in entries)
    if alone == len(entries):
        text = f"{group!r} matches none of {alone:,} paths, such as {entries[0].path!r}"
        raise DataError.of("data.group", listing.root, text, "correct data.group")
    warnings = listing.warnings
    if alone:
        warnings += (f"data.group matches no part of {alone:,} paths; each stands alone",)
    sides: dict[str, set[str]] = defaultdict(set)
    for e in entries:
        sides[e.label].add(e.group or e.path)
    whole = [label for label, names in sides.items() if len(names) == 1]
    if len(whole) == len(sides):
        text = f"every class is a single group, such as {entries[0].group!r}: none can be split"
        fix = "choose a finer data.group, or leave it out"
        raise DataError.of("data.group", listing.root, text, fix)
    return replace(listing, entries=tuple(entries), warnings=warnings)


def _group(path: str, group: str) -> str:
    if group == "parent":
        return str(PurePosixPath(path).parent)
    found = re.search(group, path)
    return (found["g"] or "") if found else ""
