"""Photographs that can be read -> corrected, split and free of what was not wanted.

    fixes.csv (path,action,label)  ->  split  ->  `data.duplicates`

The split is drawn by seed and content, or is the tutorial's, or is given: by folders, by a CSV
column, or by the split.csv of an earlier run, which must name the same bytes.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from vitft.errors import DataError, Fault
from vitft.folders import Listing, closest
from vitft.images import Header
from vitft.recipe import DataSpec
from vitft.split import SPLITS, sizes_by_class, stratified, tutorial
from vitft.table import Row, read_table

ACTIONS = ("keep", "relabel", "drop")
COLUMNS = ("path", "sha256", "label", "split", "group")
NAMED_SPLITS = ("auto", "stratified", "folders", "tutorial")


@dataclass(frozen=True)
class Photo:
    """One readable photograph on its way into the index.

    Attributes:
        path: Relative to the root.
        label: Class name.
        split: `train`, `val`, `test`, or empty where still open.
        group: Empty for none.
        sha256: Of the file's bytes.
        header: What the file says about itself.
        peak: Largest stored value of a 16-bit picture, else None.
        damage: What the deep check found, or None.
    """

    path: str
    label: str
    split: str
    group: str
    sha256: str
    header: Header
    peak: int | None = None
    damage: str | None = None


@dataclass(frozen=True)
class Fixes:
    """Corrections to a listing.

    Attributes:
        labels: Path -> the label it shall have.
        drop: Paths to leave out.
        sha256: Path -> the content the correction was made for, where the table says so.
    """

    labels: dict[str, str]
    drop: frozenset[str]
    sha256: dict[str, str]


NO_FIXES = Fixes({}, frozenset(), {})


@dataclass(frozen=True)
class Settled:
    """What became of the photographs.

    Attributes:
        photos: Those to use, each with its side.
        dropped: (path, reason) of those left out on request.
        relabelled: Paths whose label fixes.csv changed.
        unlisted: How many the given split.csv does not name.
        remarks: What a person should know about the split.
    """

    photos: list[Photo]
    dropped: list[tuple[str, str]]
    relabelled: tuple[str, ...]
    unlisted: int
    remarks: list[str]


def settle(
    spec: DataSpec, listing: Listing, photos: list[Photo], fixes: Fixes, seed: int
) -> Settled:
    """Applies corrections, then the split, then `data.duplicates`.

    Raises:
        DataError: `data.fixes`, `data.split_mismatch`, `data.no_val`, `data.contradiction`,
            `data.leak`: all faults of a step at once.
    """
    right = _corrected(photos, fixes, spec.fixes)
    moved = tuple(b.path for a, b in zip(photos, right, strict=True) if a.label != b.label)
    dropped = [(p.path, "fixes.csv") for p in right if p.path in fixes.drop]
    right = [p for p in right if p.path not in fixes.drop]
    split, unlisted, remarks = _with_split(spec, listing, right, fixes, seed)
    kept = _without_copies(spec, split)
    stay = {p.path for p in kept}
    dropped += [(p.path, "same bytes in val or test") for p in split if p.path not in stay]
    return Settled(kept, dropped, moved, unlisted, remarks)


def check_fractions(spec: DataSpec) -> None:
    """Raises before anything is read when the shares leave nothing to train or measure on."""
    if spec.split in ("folders", "tutorial") or spec.split not in NAMED_SPLITS:
        return
    got = f"got val {spec.val:g} and test {spec.test:g}"
    if spec.val + spec.test >= 1:
        text = f"val and test must each be in [0, 1) and together below 1, {got}"
        raise DataError.of("data.fractions", "data.val", text, "leave a share for training")
    if spec.val == spec.test == 0:
        text = f"nothing would be left to measure on, {got}; training photographs never serve"
        raise DataError.of("data.no_val", "data.val", text, "set data.val: 0.15")


def alike(photos: Iterable[Photo]) -> list[list[Photo]]:
    """Sets of photographs with equal bytes."""
    same: dict[str, list[Photo]] = defaultdict(list)
    for p in photos:
        same[p.sha256].append(p)
    return [group for group in same.values() if len(group) > 1]


def counts(photos: Iterable[Photo], classes: Iterable[str] = ()) -> dict[str, dict[str, int]]:
    """Class -> split -> photographs."""
    table = {c: dict.fromkeys(SPLITS, 0) for c in classes}
    for p in photos:
        table.setdefault(p.label, dict.fromkeys(SPLITS, 0))[p.split] += 1
    return table


def few(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# ---- corrections --------------------------------------------------------------------------------


def read_fixes(file: Path, listing: Listing) -> Fixes:
    """Reads corrections, each of which must name a listed photograph and a known class.

    Raises:
        DataError: What `read_table` raises; every bad line is listed.
    """
    known = {e.path for e in listing.entries}

    def wrong(row: Row) -> str | None:
        if row.get("path") not in known:
            return f"{row.get('path')!r} is not among the {len(known):,} photographs"
        if row.get("action") not in ACTIONS:
            return f"action must be keep, relabel or drop, got {row.get('action')!r}"
        if row.get("action") == "relabel" and row.get("label") not in listing.classes:
            near = closest(row.get("label"), listing.classes)
            return f"label {row.get('label')!r} is no class{near}"
        return None

    rows = read_table(file, required=("path", "action", "label"), optional=("sha256",), check=wrong)
    return Fixes(
        labels={r.get("path"): r.get("label") for r in rows if r.get("action") == "relabel"},
        drop=frozenset(r.get("path") for r in rows if r.get("action") == "drop"),
        sha256={r.get("path"): r.get("sha256") for r in rows if r.get("sha256")},
    )


def _corrected(photos: list[Photo], fixes: Fixes, file: str | None) -> list[Photo]:
    other = [p for p in photos if fixes.sha256.get(p.path, p.sha256) != p.sha256]
    if other:
        raise DataError([_made_for_others(file, p, fixes.sha256[p.path]) for p in other])
    return [replace(p, label=fixes.labels.get(p.path, p.label)) for p in photos]


def _made_for_others(file: str | None, photo: Photo, there: str) -> Fault:
    text = f"made for other bytes: sha256 {there[:12]} there, {photo.sha256[:12]} here"
    fix = "make fixes.csv again from a run on these files"
    return Fault("data.fixes", f"{file}: {photo.path}", text, fix)


# ---- split --------------------------------------------------------------------------------------


def _with_split(
    spec: DataSpec, listing: Listing, photos: list[Photo], fixes: Fixes, seed: int
) -> tuple[list[Photo], int, list[str]]:
    """Photographs with their side, how many the split file does not name, and remarks."""
    if spec.split not in NAMED_SPLITS:
        return _given(Path(spec.split), listing, photos, fixes.drop)
    if spec.split == "tutorial":
        remark = "the tutorial's split has no test set: its accuracy is that of val"
        return _tutorial(listing, photos), 0, [remark]
    have = {p.split for p in photos}
    if have == {""}:
        split = _stratified(photos, spec.val, spec.test, seed)
        return split, 0, _split_remarks(split, spec)
    remarks = []
    if "val" not in have:
        train = [p for p in photos if p.split == "train"]
        if spec.val == 0:
            text = "no val photographs, and data.val is 0"
            raise DataError.of("data.no_val", listing.root, text, "set data.val: 0.15")
        photos = [p for p in photos if p.split != "train"] + _stratified(train, spec.val, 0, seed)
        photos.sort(key=lambda p: p.path)
        remarks.append(f"no val photographs were given: {spec.val:.0%} of train serve as val")
    if "test" not in have:
        remarks.append("no test photographs were given: val chooses and reports, so it flatters")
    return photos, 0, remarks


def _stratified(photos: list[Photo], val: float, test: float, seed: int) -> list[Photo]:
    number = {name: k for k, name in enumerate(sorted({p.label for p in photos}))}
    sides = stratified(
        [number[p.label] for p in photos],
        [p.sha256 for p in photos],
        [p.group for p in photos],
        val=val,
        test=test,
        seed=seed,
    )
    return [replace(p, split=s) for p, s in zip(photos, sides, strict=True)]


def _split_remarks(photos: list[Photo], spec: DataSpec) -> list[str]:
    """Where whole groups did not fit a class's shares, and where a share was too small for one."""
    bent, raised = [], []
    table = counts(photos)
    totals = {name: sum(have.values()) for name, have in table.items()}
    wanted = sizes_by_class(totals, spec.val, spec.test)
    for name, have in table.items():
        n, want = totals[name], wanted[name]
        bent += [f"{name!r} {s} {have[s]:,} for {want[s]:,}" for s in SPLITS if have[s] != want[s]]
        rounds_to_none = (spec.val * n < 0.5 and want["val"], spec.test * n < 0.5 and want["test"])
        raised += [f"{name!r} ({n:,})"] * any(rounds_to_none)
    remarks = []
    if bent:
        remarks.append(f"equal files and groups stay whole, so some counts differ: {few(bent)}")
    if raised:
        remarks.append(
            f"{len(raised):,} classes are so small that a share rounds to 0; val or test got 1 of "
            f"each all the same: {few(raised)}"
        )
    return remarks


def _tutorial(listing: Listing, photos: list[Photo]) -> list[Photo]:
    """Drawn from the folder as it lies, before anything is refused or corrected."""
    names: dict[str, list[str]] = defaultdict(list)
    for e in listing.entries:
        names[e.label].append(e.path)
    files = [sorted(names[c], key=lambda p: PurePosixPath(p).name) for c in sorted(names)]
    sides = {
        path: side
        for paths, mine in zip(files, tutorial(files), strict=True)
        for path, side in zip(paths, mine, strict=True)
    }
    return [replace(p, split=sides[p.path]) for p in photos]


def _given(
    file: Path, listing: Listing, photos: list[Photo], dropped: frozenset[str]
) -> tuple[list[Photo], int, list[str]]:
    """The split of a split.csv: path and sha256 must both be those of the file."""
    rows = read_table(file, required=COLUMNS[:4], optional=COLUMNS[4:], check=_wrong_split)
    here = {p.path: p for p in photos}
    listed = {e.path: e.label for e in listing.entries}
    faults = [
        Fault("data.split_mismatch", f"{file}:{r.line}", wrong, "scan again for a new split.csv")
        for r in rows
        if r.get("path") not in dropped and (wrong := _differs(r, here.get(r.get("path")), listed))
    ]
    if faults:
        raise DataError(faults)
    side = {r.get("path"): r for r in rows}
    kept = [
        replace(p, split=side[p.path].get("split"), group=side[p.path].get("group") or p.group)
        for p in photos
        if p.path in side
    ]
    left = [p.path for p in photos if p.path not in side]
    remark = f"{len(left):,} photographs are not in {file} and are left out: {few(left)}"
    return kept, len(left), [remark] if left else []


def _wrong_split(row: Row) -> str | None:
    split = row.get("split")
    return None if split in SPLITS else f"split must be train, val or test, got {split!r}"


def _differs(row: Row, photo: Photo | None, listed: dict[str, str]) -> str | None:
    """How a row of split.csv differs from the file it names."""
    path = row.get("path")
    if path not in listed:
        return f"{path!r} is not in the data"
    if photo is None:
        return f"{path!r} cannot be read as a photograph any more"
    if photo.sha256 != row.get("sha256"):
        there = row.get("sha256")[:12]
        return f"{path!r} has other bytes: sha256 {there} in the table, {photo.sha256[:12]} here"
    if row.get("label") not in (photo.label, listed[path]):
        return f"{path!r} has label {row.get('label')!r} in the table and {photo.label!r} here"
    return None


# ---- duplicates ---------------------------------------------------------------------------------


def _without_copies(spec: DataSpec, photos: list[Photo]) -> list[Photo]:
    """Applies `data.duplicates`: drop training copies, or refuse contradictions and leaks."""
    if spec.duplicates == "drop_from_train":
        held_out = {p.sha256 for p in photos if p.split != "train"}
        return [p for p in photos if p.split != "train" or p.sha256 not in held_out]
    if spec.duplicates == "error":
        faults = [f for group in alike(photos) for f in _duplicate_faults(spec, group)]
        if faults:
            raise DataError(faults)
    return photos


def _duplicate_faults(spec: DataSpec, group: list[Photo]) -> Iterator[Fault]:
    paths = ", ".join(p.path for p in group)
    place = str(Path(spec.root) / group[0].path)
    labels = sorted({p.label for p in group})
    sides = sorted({p.split for p in group})
    if len(labels) > 1:
        text = f"contradicting labels {', '.join(map(repr, labels))} for the same bytes: {paths}"
        fix = "remove all but the right one, or relabel or drop it in data.fixes"
        yield Fault("data.contradiction", place, text, fix)
    if len(sides) > 1:
        text = f"the same bytes stand in {' and '.join(sides)}: {paths}"
        fix = "remove the copies, or set data.duplicates: drop_from_train"
        yield Fault("data.leak", place, text, fix)
