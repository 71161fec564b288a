"""Is one run better than another, and how surely: finished run folders in, one plain answer out.

    python -m vitft.compare RUN_A RUN_B [...] [--html FILE]

Runs are compared photograph by photograph, which sees far smaller differences than two accuracies
side by side; that only means something on the same photographs with the same labels, so runs whose
test splits differ by content are refused. Reads predictions.csv, split.csv and metrics.json of
each run; the pictures of the page come from where the recipe says the photographs lie.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from string import ascii_uppercase

import numpy as np
from numpy.typing import NDArray

from vitft import console, gallery, images, io, offline, recipe, stats
from vitft.console import say
from vitft.errors import DataError, MachineError, RecipeError, escape
from vitft.folders import no_run
from vitft.pages import Bullets, Gallery, Photo, Section, Table, percent, render
from vitft.pages import Share as Cell
from vitft.stats import Difference, Interval
from vitft.table import Row, read_table

THUMBNAIL = 160  # pixels
SHOWN = 200  # photographs in each part of the page
NEEDED = ("predictions.csv", "split.csv")
ON_VAL = "compared on val, which also chose epochs and settings: optimistic"
LEAST = 1e-15  # of a probability inside a logarithm
FIX = "name a finished run folder, such as runs/flowers_head/latest"

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Run:
    """What a finished run said of its test photographs, in the order of their content hashes.

    Attributes:
        letter: A, B, ... as on the command line.
        folder: The run's folder.
        name: The recipe's name.
        split: `test`, or `val` where the data had no test split.
        paths: N relative paths.
        sha256: N content hashes.
        labels: N class names.
        guesses: N class names.
        confidence: [N] probability of the guess.
        own: [N] probability of the label.
        trained: Content hashes of the photographs trained on.
    """

    letter: str
    folder: Path
    name: str
    split: str
    paths: tuple[str, ...]
    sha256: tuple[str, ...]
    labels: tuple[str, ...]
    guesses: tuple[str, ...]
    confidence: Floats
    own: Floats
    trained: frozenset[str]

    @property
    def right(self) -> Mask:
        """[N] whether each photograph was named as its label says."""
        return np.asarray(np.asarray(self.labels) == np.asarray(self.guesses), bool)

    @property
    def losses(self) -> Floats:
        """[N] log loss of each photograph, in nats."""
        return np.asarray(-np.log(np.maximum(self.own, LEAST)))


@dataclass(frozen=True)
class Versus:
    """Run b against run a; `difference.p` is adjusted when more than two runs are compared.

    Attributes:
        a: Letter of one run.
        b: Letter of the other.
        difference: Of the accuracies, b minus a.
        loss: Log loss of b minus that of a, in nats; below 0 is better for b.
        loss_interval: Student's, of the photographs' differences.
    """

    a: str
    b: str
    difference: Difference
    loss: float
    loss_interval: Interval

    def sentence(self) -> str:
        """The answer as one line."""
        return self.difference.sentence(self.a, self.b)


@dataclass(frozen=True, eq=False)
class Comparison:
    """All runs, every pair of them, and what a reader must know beside the numbers."""

    runs: tuple[Run, ...]
    pairs: tuple[Versus, ...]
    notes: tuple[str, ...]


def read_run(folder: Path, letter: str) -> Run:
    """Reads a finished run.

    Raises:
        DataError: `compare.not_a_run`, `compare.inside`, or a CSV file that is not whole.
    """
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        text = f"is no finished run: it has no {', '.join(missing)}"
        raise DataError.of("compare.not_a_run", folder, *no_run(folder, text, FIX))
    split = {row.get("path"): row for row in _table(folder / "split.csv", "sha256", "split")}
    said = _table(folder / "predictions.csv", "label", "prediction", "confidence")
    lost = [row.get("path") for row in said if row.get("path") not in split]
    if lost:
        text = f"predicts {len(lost):,} photographs that split.csv lacks, such as {lost[0]}"
        raise DataError.of("compare.inside", folder / "predictions.csv", text, FIX)
    rows = sorted(said, key=lambda row: (split[row.get("path")].get("sha256"), row.get("path")))
    names = [row.get("path") for row in rows]
    predictions = folder / "predictions.csv"
    return Run(
        letter=letter,
        folder=folder,
        name=str(_json(folder / "metrics.json").get("recipe") or folder.resolve().parent.name),
        split=split[names[0]].get("split"),
        paths=tuple(names),
        sha256=tuple(split[name].get("sha256") for name in names),
        labels=tuple(row.get("label") for row in rows),
        guesses=tuple(row.get("prediction") for row in rows),
        confidence=_numbers(rows, lambda row: row.get("confidence"), predictions),
        own=_numbers(rows, lambda row: row.get(f"p:{row.get('label')}"), predictions),
        trained=frozenset(
            row.get("sha256") for row in split.values() if row.get("split") == "train"
        ),
    )


def compare(runs: Sequence[Run], *, seed: int = 0) -> Comparison:
    """Compares runs pair by pair on the photographs that they share.

    Args:
        runs: At least two.
        seed: Of the bootstrap draws.

    Raises:
        DataError: `compare.other_test`, `compare.other_labels`: the runs were not tested alike.
    """
    for other in runs[1:]:
        _require_same(runs[0], other)
    strata = np.unique(runs[0].labels, return_inverse=True)[1]
    found = []
    for a, b in combinations(runs, 2):
        gap = b.losses - a.losses
        found.append(
            Versus(
                a=a.letter,
                b=b.letter,
                difference=stats.difference(a.right, b.right, strata=strata, seed=seed),
                loss=float(gap.mean()),
                loss_interval=stats.student(gap),
            )
        )
    adjusted = stats.holm([pair.difference.p for pair in found])
    pairs = tuple(
        replace(pair, difference=replace(pair.difference, p=p))
        for pair, p in zip(found, adjusted, strict=True)
    )
    return Comparison(tuple(runs), pairs, _notes(runs, len(pairs)))


def text(result: Comparison) -> str:
    """The answer for a terminal."""
    width = max(len(escape(run.name)) for run in result.runs)
    lines = []
    for run in result.runs:
        k, n = int(run.right.sum()), len(run.right)
        lines.append(
            f"{run.letter}  {escape(run.name):{width}}  {100 * k / n:5.1f} %"
            f" {stats.wilson(k, n).percent()}  ({k:,}/{n:,} {run.split})"
            f"  log loss {run.losses.mean():.3f}  {escape(run.folder)}"
        )
    lines += [pair.sentence() for pair in result.pairs]
    return "\n".join([*lines, *(f"note: {note}" for note in result.notes)])


def page(result: Comparison) -> str:
    """The answer as a self-contained HTML page with the photographs on which runs disagree."""
    names = [f"{run.letter} ({run.name})" for run in result.runs]
    answer = Section(
        "answer",
        "Which is better?",
        blocks=(
            Bullets(tuple(pair.sentence() + "." for pair in result.pairs)),
            _standings(result),
            *((_pairs(result),) if len(result.pairs) > 1 else ()),
            *((Bullets(result.notes),) if result.notes else ()),
        ),
        folded=False,
    )
    title = " against ".join(names) if len(names) == 2 else f"{len(names)} runs compared"
    return render(title, (answer, *_disagreements(result)), subtitle="vitft compare")


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m vitft.compare`."""
    p = argparse.ArgumentParser(
        prog="vitft compare",
        description="Says whether one run is better than another, and how surely.",
        epilog="example: python -m vitft.compare runs/flowers_head/latest runs/flowers_full/latest",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished run folders")
    p.add_argument("--html", type=Path, metavar="FILE", help="write a page with the disagreements")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the answer; refuses runs that were not tested on the same photographs."""
    args = parser().parse_args(argv)
    console.setup()
    if not 2 <= len(args.runs) <= len(ascii_uppercase):
        rule = f"takes 2 to {len(ascii_uppercase)} run folders, got {len(args.runs)}"
        raise RecipeError.of("compare.runs", "vitft compare", rule, "name one folder for each run")
    runs = [read_run(f, letter) for f, letter in zip(args.runs, ascii_uppercase, strict=False)]
    if args.html:
        _require_elsewhere(args.html, runs)
    result = compare(runs)
    print(text(result))  # noqa: T201
    if args.html:
        io.write_text(args.html, page(result))
        say(f"page: {args.html}")
    return 0


# ---- reading -------------------------------------------------------------------------------------


def _json(path: Path) -> dict[str, object]:
    """A JSON object; empty where the file is missing or is something else."""
    try:
        return io.read_json(path)
    except MachineError:
        return {}


def _table(path: Path, *columns: str) -> list[Row]:
    return read_table(path, required=("path", *columns))


def _numbers(rows: Sequence[Row], cell: Callable[[Row], str], path: Path) -> Floats:
    """[N] the probabilities of a column."""
    try:
        values = np.array([float(cell(row)) for row in rows])
    except ValueError as error:
        raise DataError.of("compare.inside", path, f"a probability is {error}", FIX) from None
    if not ((values >= 0) & (values <= 1 + 1e-6)).all():
        raise DataError.of("compare.inside", path, "a probability is outside [0, 1]", FIX)
    return values


def _require_elsewhere(out: Path, runs: Sequence[Run]) -> None:
    """Refuses a page below the data of a run, or in place of what it read."""
    for run in runs:
        kept = [run.folder / "model", *(run.folder / name for name in NEEDED)]
        io.require_outside(out, [*recipe.data_of(run.folder), *kept])
        root = _root(run.folder)
        if root is not None and out.exists():  # photographs of a CSV, or behind links, lie anywhere
            rows = _table(run.folder / "split.csv")
            io.require_outside(out, (root / row.get("path") for row in rows))


def _require_same(a: Run, b: Run) -> None:
    """Refuses two runs that were not tested on the same photographs with the same labels."""
    if a.sha256 != b.sha256:
        only_a, only_b = set(a.sha256) - set(b.sha256), set(b.sha256) - set(a.sha256)
        both = len(set(a.sha256) & set(b.sha256))
        seen = len(set(a.sha256) & b.trained) + len(set(b.sha256) & a.trained)
        what = (
            f"was tested on {len(b.sha256):,} photographs, {a.letter} ({a.folder}) on"
            f" {len(a.sha256):,}; {both:,} are the same by content, {len(only_a):,} only in"
            f" {a.letter}, {len(only_b):,} only in {b.letter}"
        )
        if seen:
            what += f"; {seen:,} test photographs of one were trained on by the other"
        fix = f"run one again with data.split={a.folder / 'split.csv'}"
        if not both:
            fix = "run one again on the photographs of the other: data.root and data.split"
        raise DataError.of("compare.other_test", b.folder, what, fix)
    other = [i for i, (x, y) in enumerate(zip(a.labels, b.labels, strict=True)) if x != y]
    if other:
        i = other[0]
        what = (
            f"labels {len(other):,} of the same {len(a.labels):,} photographs otherwise than"
            f" {a.letter} ({a.folder}): {b.paths[i]} is {b.labels[i]!r}, not {a.labels[i]!r}"
        )
        fix = "give both runs the same data.fixes, or run one again"
        raise DataError.of("compare.other_labels", b.folder, what, fix)


def _notes(runs: Sequence[Run], pairs: int) -> tuple[str, ...]:
    notes = []
    few = stats.in_words(len(runs[0].labels))
    if few:
        notes.append(few)
    if pairs > 1:
        notes.append(
            f"p is adjusted for {pairs} comparisons (Holm); intervals are not, and the best of"
            f" {len(runs)} runs looks better on this split than it will elsewhere"
        )
    if any(run.split != "test" for run in runs):
        notes.append(ON_VAL)
    unlike = [run.letter for run in runs if run.trained != runs[0].trained]
    if unlike:
        others = ", ".join(unlike)
        notes.append(f"{others} and {runs[0].letter} were trained on different photographs")
    return tuple(notes)


# ---- page ----------------------------------------------------------------------------------------


def _standings(result: Comparison) -> Table:
    rows = []
    for run in result.runs:
        k, n = int(run.right.sum()), len(run.right)
        i = stats.wilson(k, n)
        loss = f"{run.losses.mean():.3f}"
        rows.append((run.letter, run.name, Cell(k / n, i.low, i.high), loss, str(run.folder)))
    n = len(result.runs[0].labels)
    caption = f"{n:,} {result.runs[0].split} photographs; 95 % intervals"
    return Table(("run", "recipe", "accuracy", "log loss", "folder"), tuple(rows), caption)


def _pairs(result: Comparison) -> Table:
    header = (
        "pair",
        "points",
        "95 % interval",
        "p (Holm)",
        "log loss",
        "only first",
        "only second",
    )
    rows = []
    for v in result.pairs:
        d, i = v.difference, v.loss_interval
        loss = f"{v.loss:+.3f} [{i.low:+.3f}, {i.high:+.3f}]"
        points = (f"{100 * d.estimate:+.1f}", d.interval.percent(), f"{d.p:.2g}")
        rows.append((f"{v.b} minus {v.a}", *points, loss, d.only_a, d.only_b))
    return Table(header, tuple(rows), "Second minus first; the last columns count photographs.")


def _disagreements(result: Comparison) -> tuple[Section, ...]:
    """Photographs that not all runs have right, but some do."""
    right = np.stack([run.right for run in result.runs])  # [runs, N]
    if len(result.runs) == 2:
        a, b = result.runs
        parts = [
            (f"only-{a.letter.lower()}", f"Only {a.letter} is right", right[0] & ~right[1]),
            (f"only-{b.letter.lower()}", f"Only {b.letter} is right", right[1] & ~right[0]),
        ]
    else:
        mixed = right.any(axis=0) & ~right.all(axis=0)
        parts = [("mixed", "Some runs are right", mixed)]
    pictures = _Pictures(result.runs)
    return tuple(_section(result.runs, pictures, *part) for part in parts)


def _section(
    runs: Sequence[Run], pictures: "_Pictures", id: str, title: str, mask: Mask
) -> Section:
    rows = np.flatnonzero(mask)
    doubt = np.abs(np.ptp(np.stack([run.own for run in runs]), axis=0))[rows]  # how far apart
    order = rows[np.argsort(-doubt, kind="stable")][:SHOWN]
    photos = tuple(_photo(runs, pictures, int(i)) for i in order)
    count = f"{len(rows):,} photograph{'' if len(rows) == 1 else 's'}"
    if not photos:
        return Section(id, title, "No photograph.")
    caption = "The one on which the runs differ most comes first."
    return Section(id, title, count + ".", (Gallery(photos, len(rows), caption),), folded=False)


def _photo(runs: Sequence[Run], pictures: "_Pictures", i: int) -> Photo:
    said = [f"{r.letter}: {r.guesses[i]} {percent(float(r.confidence[i]), 0)}" for r in runs]
    label, path = runs[0].labels[i], runs[0].paths[i]
    alt = f"{path}, labelled {label}; {'; '.join(said)}"
    return Photo(pictures(i), alt, f"labelled {label}", path=path, tags=tuple(said))


class _Pictures:
    """Thumbnails by row, from the first run whose photographs are still there, byte for byte."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.sources = [(run, root) for run in runs if (root := _root(run.folder)) is not None]
        self.left = gallery.BUDGET

    def __call__(self, i: int) -> bytes | None:
        if self.left <= 0:
            return None
        for run, root in self.sources:
            small = _thumbnail(root / run.paths[i], run.sha256[i])
            if small is not None:
                self.left -= len(small) * 4 // 3
                return small
        return None


def _root(folder: Path) -> Path | None:
    """Where a run's photographs lie, by its recipe; None where they do not any more."""
    try:
        root = recipe.of_run(folder).data.root
    except RecipeError:
        return None
    return offline.base(root) if offline.is_here(root) else None


def _thumbnail(path: Path, sha256: str) -> bytes | None:
    """A small picture of a photograph, if it still has the bytes that were predicted."""
    try:
        data = images.read_bytes(path)
        if io.sha256_bytes(data) != sha256:
            return None
        picture = images.decode(data, path, images.DecodeSpec(), short_side=THUMBNAIL)
        return gallery.shrink(picture, THUMBNAIL)
    except images.BadImage:
        return None


if __name__ == "__main__":
    from vitft.cli import door

    sys.exit(door(main))
