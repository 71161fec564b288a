"""The account of a data set: every file is used, refused, ignored or dropped, and it adds up."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from vitft.errors import DataError, escape
from vitft.split import SPLITS

SHOWN = 10  # rows of one kind on the console; all are in the stored ledger


@dataclass(frozen=True)
class Refusal:
    """One file that cannot be used: the fault's id, text and remedy."""

    path: str
    id: str
    text: str
    fix: str


@dataclass(frozen=True)
class Dropped:
    """One usable file left out on request."""

    path: str
    reason: str


@dataclass(frozen=True)
class Ledger:
    """What became of every file.

    Attributes:
        found: Files met; `check` proves that the other numbers sum to it.
        used: Files in the index.
        refused: Files that cannot be read as a photograph.
        ignored: Reason -> files that nobody asked for (hidden, other extensions).
        dropped: Files left out by fixes.csv or `data.duplicates`.
        not_entered: Reason -> folders left out; their files are not in `found`.
        counts: Class -> split -> files used.
        formats: Format by content -> files used.
        noted: What is special about files used -> how many (profiles, transparency, 16 bits ...).
        duplicates_within: Groups of used paths with equal bytes and equal label.
        duplicates_across: Groups of used paths with equal bytes and contradicting labels.
        leaks: Groups of used paths with equal bytes on more than one side of the split.
        empty_classes: Classes that keep their number and hold nothing.
        damaged: (path, what the decoder's library complained about); deep check only.
        relabelled: Files whose label fixes.csv changed.
        warnings: One sentence each.
    """

    found: int
    used: int
    refused: tuple[Refusal, ...]
    ignored: dict[str, int]
    dropped: tuple[Dropped, ...]
    not_entered: dict[str, int]
    counts: dict[str, dict[str, int]]
    formats: dict[str, int]
    noted: dict[str, int]
    duplicates_within: tuple[tuple[str, ...], ...] = ()
    duplicates_across: tuple[tuple[str, ...], ...] = ()
    leaks: tuple[tuple[str, ...], ...] = ()
    empty_classes: tuple[str, ...] = ()
    damaged: tuple[tuple[str, str], ...] = ()
    relabelled: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())

    def check(self) -> "Ledger":
        """Returns itself if the sums add up.

        Raises:
            DataError: `data.ledger`; this would be our own bug, and the run stops on it.
        """
        sums = {
            "files found": (
                self.found,
                self.used + len(self.refused) + sum(self.ignored.values()) + len(self.dropped),
            ),
            "files used, by class": (self.used, sum(self.total(s) for s in SPLITS)),
            "files used, by format": (self.used, sum(self.formats.values())),
        }
        for what, (left, right) in sums.items():
            if left != right:
                text = f"{what}: {left:,}, but the parts sum to {right:,}"
                raise DataError.of("data.ledger", "ledger", text, "report this as a bug of vitft")
        return self

    def total(self, split: str) -> int:
        """Files used in one split."""
        return sum(count[split] for count in self.counts.values())

    def majority(self, split: str) -> tuple[str, float]:
        """The most frequent class of a split and its share in [0, 1]: what guessing would score."""
        most = max(self.counts, key=lambda name: self.counts[name][split])
        return most, self.counts[most][split] / max(1, self.total(split))

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON, the majority baseline of each split included."""
        plain = asdict(self)
        baseline = {s: self.majority(s) for s in SPLITS if self.total(s)}
        plain["majority"] = {s: {"class": c, "share": share} for s, (c, share) in baseline.items()}
        return plain

    def lines(self) -> list[str]:
        """The ledger for the console."""
        return [escape(line) for line in self._lines()]

    def _lines(self) -> Iterator[str]:
        yield (
            f"{self.found:,} files found = {self.used:,} used + {len(self.refused):,} refused + "
            f"{sum(self.ignored.values()):,} ignored + {len(self.dropped):,} dropped"
        )
        yield from self._table()
        for split in SPLITS:
            if self.total(split):
                name, share = self.majority(split)
                yield f"always answering {name!r} would score {share:.1%} on {split}"
        yield from _counted("ignored", self.ignored)
        yield from _counted("folders not entered", self.not_entered)
        yield from _counted("formats", self.formats)
        yield from _counted("noted", self.noted)
        yield from _some("refused", [f"{r.path}: {r.text} [{r.id}]" for r in self.refused])
        yield from _some("dropped", [f"{d.path}: {d.reason}" for d in self.dropped])
        yield from _some("equal bytes, one class", [" = ".join(g) for g in self.duplicates_within])
        yield from _some(
            "equal bytes, contradicting labels", [" = ".join(g) for g in self.duplicates_across]
        )
        yield from _some("equal bytes across the split", [" = ".join(g) for g in self.leaks])
        yield from _some("damaged", [f"{path}: {text}" for path, text in self.damaged])
        yield from (f"warning: {text}" for text in self.warnings)

    def _table(self) -> Iterator[str]:
        """Counts per class; the largest and smallest where there are too many to read."""
        names = sorted(self.counts, key=lambda n: (-sum(self.counts[n].values()), n))
        shown = list(self.counts)
        if len(names) > 2 * SHOWN:
            shown = [*names[:SHOWN], *names[-SHOWN:]]
        width = max([len("class"), *(len(escape(n)) for n in shown)])
        yield f"{'class':<{width}}  {'train':>7}  {'val':>7}  {'test':>7}"
        for name in shown:
            c = self.counts[name]
            row = "  ".join(f"{c[s]:>7,}" for s in SPLITS)
            yield f"{escape(name):<{width}}  {row}"
        if len(shown) < len(names):
            yield f"({len(names):,} classes; the {SHOWN} largest and {SHOWN} smallest are shown)"
        yield f"{'all':<{width}}  " + "  ".join(f"{self.total(s):>7,}" for s in SPLITS)


def _counted(what: str, counts: dict[str, int]) -> Iterator[str]:
    if counts:
        top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        yield f"{what}: " + ", ".join(f"{name} {n:,}" for name, n in top)


def _some(what: str, rows: list[str]) -> Iterator[str]:
    if rows:
        yield f"{what}: {len(rows):,}"
        yield from (f"  {row}" for row in rows[:SHOWN])
    if len(rows) > SHOWN:
        yield f"  ... and {len(rows) - SHOWN:,} more"
