"""`data:` of a recipe -> an `Index`: every usable photograph with label, content hash and split.

    list (sources) -> read and decode once (contents) -> refuse (here) -> correct and split (assign)

Nothing is substituted, nothing is guessed, nothing is written below the data, and every file met
is accounted for in the ledger or the scan stops.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from vitft import io
from vitft.assign import (
    COLUMNS,
    NO_FIXES,
    Photo,
    Settled,
    alike,
    check_fractions,
    counts,
    few,
    read_fixes,
    settle,
)
from vitft.console import track
from vitft.contents import PATIENCE, Content, examine
from vitft.errors import DataError, Fault, RecipeError
from vitft.folders import Listing
from vitft.images import TINY, DecodeSpec
from vitft.ledger import Dropped, Ledger, Refusal
from vitft.recipe import DataSpec
from vitft.sources import list_photographs, twins
from vitft.split import SPLITS

MAX_BAD_OF_CLASS = 0.10
SUFFIXES = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".bmp", ".dib"), "BMP"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **{".webp": "WEBP", ".gif": "GIF", ".heic": "HEIC", ".avif": "AVIF", ".jxl": "JPEG XL"},
}
Progress = Callable[[Iterable[Content], int, str], Iterator[Content]]


@dataclass(frozen=True, eq=False)
class Index:
    """The usable photographs; row order is the order of everything that follows.

    Attributes:
        root: What paths are relative to.
        classes: C names; the label of `classes[k]` is k.
        paths: [N] sorted, with forward slashes.
        labels: [N] int64 in [0, C).
        sha256: [N] of the file's bytes, 64 hex digits.
        split: [N] `train`, `val` or `test`.
        group: [N] empty for none.
        pixels: [N] int64, width times height as the headers say.
        ledger: What became of every file met.
    """

    root: Path
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: np.ndarray
    sha256: tuple[str, ...]
    split: tuple[str, ...]
    group: tuple[str, ...]
    pixels: np.ndarray
    ledger: Ledger

    def rows(self, split: str) -> np.ndarray:
        """[n] int64: the rows of one split, ascending."""
        return np.flatnonzero(np.asarray(self.split) == split).astype(np.int64)

    def file(self, row: int) -> Path:
        """Where the photograph of a row lies."""
        return self.root / self.paths[row]


def scan(
    spec: DataSpec,
    *,
    seed: int,
    progress: Progress = track,
    deep: bool = False,
    seconds: float = PATIENCE,
) -> Index:
    """Reads every photograph of a data set once and settles label and split of each.

    Args:
        spec: The recipe's `data` section; `root` is a folder or a CSV file.
        seed: Of the stratified split.
        progress: Shows how far the reading is.
        deep: Also look for silent damage (slower); found in `ledger.damaged`.
        seconds: Wall time that one file may take before it is refused as `data.slow`.

    Raises:
        DataError: All faults of one step at once: those of the listing; `data.too_many_bad` with
            every unreadable file; `data.fixes`, `data.split_mismatch`, `data.no_val`,
            `data.contradiction`, `data.leak`, `data.ledger`.

    Source: `data.split: tutorial` follows the flower tutorial's read_split_data as described in
        `split.tutorial`.
    """
    check_fractions(spec)
    _require_cache_elsewhere(Path(spec.root))
    listing = list_photographs(spec)
    fixes = read_fixes(Path(spec.fixes), listing) if spec.fixes else NO_FIXES
    paths = [e.path for e in listing.entries]
    reading = examine(listing.root, paths, decode_spec(spec), deep=deep, seconds=seconds)
    contents = list(progress(reading, len(listing.entries), "scan"))
    refused = _refuse(spec, listing, contents)
    settled = settle(spec, listing, _photos(listing, contents), fixes, seed)
    ledger = _account(listing, settled, refused).check()
    return _index(listing, settled.photos, ledger)


def _require_cache_elsewhere(root: Path) -> None:
    """A CSV only names files, and owns no folder."""
    if root.is_dir() and io.lies_in(io.cache_dir(), root):
        text = f"the cache would be written below the data {root}, where vitft never writes"
        fix = "set VITFT_CACHE to a folder elsewhere"
        raise RecipeError.of("cli.out_in_data", io.cache_dir(), text, fix)


def decode_spec(spec: DataSpec) -> DecodeSpec:
    """The part of `data` that decides about pixels."""
    return DecodeSpec(
        max_pixels=spec.max_pixels,
        max_aspect=spec.max_aspect,
        background=spec.background,
        bit_range=spec.bit_range,
        icc=spec.icc,
        frames=spec.frames,
        decoder=spec.decoder,
    )


def write_split(index: Index, path: Path) -> None:
    """Writes split.csv, which `data.split` accepts back: path, sha256, label, split, group."""
    names = [index.classes[k] for k in index.labels]
    rows = zip(index.paths, index.sha256, names, index.split, index.group, strict=True)
    io.write_csv(path, COLUMNS, rows)


def class_indices(index: Index) -> dict[str, str]:
    """The content of class_indices.json: `{"0": "daisy", ...}`."""
    return {str(k): name for k, name in enumerate(index.classes)}


# ---- refuse -------------------------------------------------------------------------------------


def _refuse(spec: DataSpec, listing: Listing, contents: Sequence[Content]) -> tuple[Refusal, ...]:
    """The unreadable files; an error where they are not wanted or too many."""
    bad = [(c, c.fault) for c in contents if c.fault is not None]
    faults = [fault for _, fault in bad]
    if bad and spec.on_bad == "error":
        raise DataError(faults)
    label = {e.path: e.label for e in listing.entries}
    beyond = _too_many(spec, listing, Counter(label[c.path] for c, _ in bad))
    if beyond:
        raise DataError([*beyond, *faults])
    return tuple(Refusal(c.path, f.id, f.text, f.fix) for c, f in bad)


def _too_many(spec: DataSpec, listing: Listing, bad: Counter[str]) -> list[Fault]:
    place, n = str(listing.root), len(listing.entries)
    fix = "repair or remove the files listed, or raise data.max_bad"
    faults = []
    if bad.total() > spec.max_bad * n:
        text = (
            f"{bad.total():,} of {n:,} photographs ({bad.total() / n:.1%}) cannot be used; "
            f"data.max_bad allows {spec.max_bad:.1%}"
        )
        faults.append(Fault("data.too_many_bad", place, text, fix))
    allowed = max(MAX_BAD_OF_CLASS, spec.max_bad)
    for name, total in Counter(e.label for e in listing.entries).items():
        if bad[name] > allowed * total or bad[name] == total:
            text = f"class {name!r} loses {bad[name]:,} of {total:,} photographs"
            faults.append(Fault("data.too_many_bad", place, f"{text} (at most {allowed:.0%})", fix))
    return faults


# ---- ledger -------------------------------------------------------------------------------------


def _photos(listing: Listing, contents: Sequence[Content]) -> list[Photo]:
    return [
        Photo(e.path, e.label, e.split, e.group, c.sha256, v.header, v.peak, v.damage)
        for e, c in zip(listing.entries, contents, strict=True)
        if (v := c.verdict) is not None
    ]


def _index(listing: Listing, photos: list[Photo], ledger: Ledger) -> Index:
    number = {name: k for k, name in enumerate(listing.classes)}
    return Index(
        root=listing.root,
        classes=listing.classes,
        paths=tuple(p.path for p in photos),
        labels=np.array([number[p.label] for p in photos], np.int64),
        sha256=tuple(p.sha256 for p in photos),
        split=tuple(p.split for p in photos),
        group=tuple(p.group for p in photos),
        pixels=np.array([p.header.width * p.header.height for p in photos], np.int64),
        ledger=ledger,
    )


def _account(listing: Listing, settled: Settled, refused: tuple[Refusal, ...]) -> Ledger:
    photos = settled.photos
    table = counts(photos, listing.classes)
    same = alike(photos)
    unlisted = {"not in the split file": settled.unlisted} if settled.unlisted else {}
    ledger = Ledger(
        found=listing.found,
        used=len(photos),
        refused=refused,
        ignored={**listing.ignored, **unlisted},
        dropped=tuple(Dropped(path, reason) for path, reason in settled.dropped),
        not_entered=listing.not_entered,
        counts=table,
        formats=dict(Counter(p.header.format for p in photos).most_common()),
        noted={k: n for k, n in _noted(photos).items() if n},
        duplicates_within=_paths(g for g in same if len({p.label for p in g}) == 1),
        duplicates_across=_paths(g for g in same if len({p.label for p in g}) > 1),
        leaks=_paths(g for g in same if len({p.split for p in g}) > 1),
        empty_classes=tuple(c for c, n in table.items() if not any(n.values())),
        damaged=tuple((p.path, p.damage) for p in photos if p.damage),
        relabelled=settled.relabelled,
    )
    found = _warnings(listing, photos, ledger)
    return replace(ledger, warnings=(*listing.warnings, *settled.remarks, *found))


def _paths(groups: Iterable[list[Photo]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(p.path for p in group) for group in groups)


def _noted(photos: list[Photo]) -> dict[str, int]:
    """What is special about files that are used all the same."""
    heads = [p.header for p in photos]
    suffixes = [PurePosixPath(p.path).suffix.lower() for p in photos]
    return {
        "turned by EXIF": sum(h.orientation > 1 for h in heads),
        "unreadable EXIF": sum(h.orientation == 0 for h in heads),
        "colour profile": sum(h.has_icc for h in heads),
        "transparent": sum(h.has_alpha for h in heads),
        "animated or several pages, first used": sum(h.frames > 1 for h in heads),
        "CMYK": sum(h.mode == "CMYK" for h in heads),
        "16 or 32 bits": sum(h.bits > 8 for h in heads),
        f"side under {TINY} pixels": sum(min(h.width, h.height) < TINY for h in heads),
        "extension of another format": sum(
            SUFFIXES.get(s, h.format) != h.format for s, h in zip(suffixes, heads, strict=True)
        ),
    }


def _warnings(listing: Listing, photos: list[Photo], ledger: Ledger) -> Iterator[str]:
    """What a person should look at before trusting a number."""
    for names in twins(listing.classes):
        yield f"classes that read alike: {', '.join(map(repr, names))}"
    yield from _count_warnings(ledger)
    moved, left = len(ledger.relabelled), sum(d.reason == "fixes.csv" for d in ledger.dropped)
    if moved or left:
        yield (
            f"data.fixes relabelled {moved:,} and dropped {left:,} photographs of whichever split: "
            "unless a person looked at each, accuracy flatters, since a model chose them"
        )
    yield from _set_warnings(ledger.duplicates_across, "with contradicting labels")
    yield from _set_warnings(ledger.leaks, "on both sides of the split")
    cut = _cut_groups(photos)
    if cut:
        yield f"{len(cut):,} group{'s' * (len(cut) > 1)} on both sides of the split: {few(cut)}"
    if ledger.damaged:
        yield f"{len(ledger.damaged):,} files are damaged but decode; look at them"
    peaks = [p.peak for p in photos if p.peak is not None]
    if peaks and max(peaks) <= 65535 // 4:
        top = 2 ** max(peaks).bit_length() - 1
        yield (
            f"{len(peaks):,} pictures of 16 bits reach only {max(peaks):,} of 65,535 and turn out "
            f"dark: use data.bit_range: [0, {top}]"
        )


def _count_warnings(ledger: Ledger) -> Iterator[str]:
    totals = {c: sum(n.values()) for c, n in ledger.counts.items()}
    single = [c for c, n in totals.items() if n == 1]
    if single:
        yield f"{len(single):,} classes have 1 photograph, used for training only: {few(single)}"
    for split in SPLITS:
        missing = [c for c, n in ledger.counts.items() if not n[split] and totals[c] > 1]
        if missing and ledger.total(split):
            told = f"{len(missing):,} classes have no photograph in {split} (support 0)"
            yield f"{told}: {few(missing)}"
    sizes = sorted(n for n in totals.values() if n)
    if sizes and sizes[-1] >= 100 * sizes[0]:
        yield (
            f"classes are uneven, {sizes[0]:,} to {sizes[-1]:,} photographs: read balanced "
            "accuracy first"
        )


def _cut_groups(photos: list[Photo]) -> list[str]:
    sides: dict[str, set[str]] = defaultdict(set)
    for p in photos:
        if p.group:
            sides[p.group].add(p.split)
    return sorted(g for g, s in sides.items() if len(s) > 1)


def _set_warnings(sets: Sequence[Sequence[str]], what: str) -> Iterator[str]:
    if sets:
        many = f"{len(sets):,} set{'s' * (len(sets) > 1)} of equal files"
        yield f"{many} {what}: {few([' = '.join(s) for s in sets])}"
