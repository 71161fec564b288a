"""Labels, content hashes and groups in -> `train`, `val` or `test` for every row, out.

A split here is a pure function of (seed, contents): file names, their order, and the machine do not
matter. Rows that share bytes or a group are one unit, and a unit is never cut. No files are read.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from hashlib import sha256
from typing import TypeVar

SPLITS = ("train", "val", "test")
Sizes = dict[str, int]
Class = TypeVar("Class", int, str)


def sizes(n: int, val: float, test: float) -> Sizes:
    """How many of a class's `n` rows each split gets: largest remainder, exact in sum.

    Training always has one. A split that is wanted (fraction above 0) and would get none takes one
    from the largest, test before val, as long as training keeps its one.

    Raises:
        ValueError: A fraction is negative, or both together leave nothing to train on.
    """
    shares = {"val": Fraction(str(val)), "test": Fraction(str(test))}
    shares["train"] = 1 - shares["val"] - shares["test"]
    if min(shares.values()) < 0 or shares["train"] == 0:
        raise ValueError(f"val {val} and test {test} must be >= 0 and together below 1")
    count = {s: int(shares[s] * n) for s in SPLITS}
    rest = sorted(SPLITS, key=lambda s: (count[s] - shares[s] * n, SPLITS.index(s)))
    for s in rest[: n - sum(count.values())]:
        count[s] += 1
    for s in ("train", "test", "val"):
        donor = max(SPLITS, key=lambda d: (count[d], d == "train"))
        spare = count[donor] > 1 or (s == "train" and n > 0)
        if count[s] == 0 and shares[s] > 0 and spare:
            count[donor] -= 1
            count[s] += 1
    return count


def sizes_by_class(rows: Mapping[Class, int], val: float, test: float) -> dict[Class, Sizes]:
    """`sizes` for every class; worked out once per distinct number of rows."""
    known = {n: sizes(n, val, test) for n in set(rows.values())}
    return {c: known[n] for c, n in rows.items()}


def stratified(
    labels: Sequence[int],
    contents: Sequence[str],
    groups: Sequence[str],
    *,
    val: float,
    test: float,
    seed: int,
) -> list[str]:
    """Splits every class by the same fractions.

    Args:
        labels: [N] class of each row.
        contents: [N] content hash of each row; equal ones stay together.
        groups: [N] group of each row, empty for none; equal ones stay together.
        val: Fraction of each class for validation, in [0, 1).
        test: Fraction of each class for the test, in [0, 1).
        seed: Another seed gives another split of the same sizes.

    Returns:
        [N] of `train`, `val`, `test`. Per class the counts are those of `sizes`, but where a unit
        of several rows fits nowhere whole.
    """
    want = sizes_by_class(Counter(labels), val, test)
    out = [""] * len(labels)
    units = [_Unit.of(rows, labels, contents, seed) for rows in _units(contents, groups)]
    large = sorted((u for u in units if len(u.rows) > 1), key=lambda u: (-len(u.rows), u.key))
    room = _Room(want)
    side = {unit.key: room.place(unit) for unit in large}
    _give_train_one(large, side, set(want) - {u.label for u in units if len(u.rows) == 1})
    for unit in large:
        for row in unit.rows:
            out[row] = side[unit.key]
    placed = Counter((label, s) for label, s in zip(labels, out, strict=True) if s)
    singles: dict[int, list[_Unit]] = defaultdict(list)
    for unit in sorted((u for u in units if len(u.rows) == 1), key=lambda u: u.key):
        singles[unit.label].append(unit)
    for label, mine in singles.items():
        left = {s: want[label][s] - placed[label, s] for s in SPLITS}
        for unit, s in zip(mine, _sides(left, len(mine)), strict=True):
            out[unit.rows[0]] = s
    return out


def tutorial(files: Sequence[Sequence[str]]) -> list[list[str]]:
    """The well-known flower tutorial's split: one fifth of each class for validation, no test set.

    Args:
        files: For each class in order of its name, its file names in sorted order.

    Returns:
        For each class, `train` or `val` of each file.
    """
    dice = random.Random(0)  # noqa: S311  (one generator for all classes, as the tutorial has it)
    out = []
    for names in files:
        chosen = set(dice.sample(range(len(names)), k=int(0.2 * len(names))))
        out.append(["val" if i in chosen else "train" for i in range(len(names))])
    return out


@dataclass(frozen=True)
class _Unit:
    """Rows that go together; `key` orders units by chance, by seed and content alone."""

    rows: tuple[int, ...]
    label: int  # of the first row; units of several rows may hold several
    by_label: Counter[int]
    key: str

    @classmethod
    def of(
        cls, rows: list[int], labels: Sequence[int], contents: Sequence[str], seed: int
    ) -> "_Unit":
        name = min(contents[r] for r in rows)
        key = sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).hexdigest()
        return cls(tuple(rows), labels[rows[0]], Counter(labels[r] for r in rows), key)


@dataclass
class _Room:
    """What each split may still take of each class, while units of several rows are placed."""

    want: dict[int, Sizes]
    used: Counter[tuple[int, str]] = field(default_factory=Counter)

    def place(self, unit: _Unit) -> str:
        best = min(SPLITS, key=lambda s: (self._overflow(unit, s), -self._need(unit, s)))
        self.used.update({(c, best): n for c, n in unit.by_label.items()})
        return best

    def _left(self, label: int, split: str) -> int:
        return self.want[label][split] - self.used[label, split]

    def _overflow(self, unit: _Unit, split: str) -> int:
        return sum(max(0, n - self._left(c, split)) for c, n in unit.by_label.items())

    def _need(self, unit: _Unit, split: str) -> Fraction:
        """The share of its wish that the split still lacks, over the unit's classes."""
        return sum(
            (
                Fraction(n * self._left(c, split), max(1, self.want[c][split]))
                for c, n in unit.by_label.items()
            ),
            Fraction(),
        )


def _units(contents: Sequence[str], groups: Sequence[str]) -> list[list[int]]:
    """Rows joined by equal bytes or an equal group, directly or through others (union-find)."""
    parent = list(range(len(contents)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, (content, group) in enumerate(zip(contents, groups, strict=True)):
        for tie in [("content", content)] + [("group", group)] * bool(group):
            parent[root(i)] = root(first.setdefault(tie, i))
    units: dict[int, list[int]] = defaultdict(list)
    for i in range(len(contents)):
        units[root(i)].append(i)
    return list(units.values())


def _give_train_one(large: list[_Unit], side: dict[str, str], only_large: set[int]) -> None:
    """A class made of large units alone must not end with nothing to train on."""
    for label in sorted(only_large):
        mine = [u for u in large if label in u.by_label]
        if not any(side[u.key] == "train" for u in mine):
            side[min(mine, key=lambda u: (len(u.rows), u.key)).key] = "train"


def _sides(left: Sizes, n: int) -> list[str]:
    """Sides for `n` single rows, given what is left to fill.

    Where large units took more of a split than it wanted, the others get less: the fullest first,
    the last training row never.
    """
    left = {s: max(0, k) for s, k in left.items()}
    while sum(left.values()) > n:
        left[max(SPLITS, key=lambda s: left[s] - (s == "train" and left[s] == 1))] -= 1
    return ["test"] * left["test"] + ["val"] * left["val"] + ["train"] * left["train"]
