"""Predictions -> the photographs a page shows: which of them, in which order, with which words.

A page holds a bounded number of photographs and bytes. First come the most confident mistakes,
then the other mistakes (each confusion in turn), then the least confident right answers of each
class (each class in turn). Every place that shows fewer than there are says so.

Arrays: N photographs, C classes.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vitft.pages import Drawer, Gallery, Photo, percent

if TYPE_CHECKING:
    from PIL import Image

PER_CELL = 12  # right answers of one class that a page holds
TOP = 3  # probabilities below a photograph
BUDGET = 8_000_000  # characters of base64; the whole page stays below 10 MB

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Answers:
    """What the model said of each photograph of a split.

    Attributes:
        paths: N paths as they are in the index.
        labels: [N] int64, each in [0, C).
        guesses: [N] int64, each in [0, C).
        probabilities: [N, C] float; rows sum to 1.
    """

    paths: Sequence[str]
    labels: Ints
    guesses: Ints
    probabilities: NDArray[np.floating]

    def confidence(self) -> NDArray[np.floating]:
        """[N] probability of the class that was said."""
        picked = np.take_along_axis(self.probabilities, self.guesses[:, None], axis=1)
        return np.asarray(picked[:, 0])

    def check(self, classes: int) -> None:
        """Refuses what no model could have said.

        Raises:
            ValueError: Lengths disagree, a class is outside [0, C), a probability outside [0, 1].
        """
        n = len(self.paths)
        shapes = (self.labels.shape, self.guesses.shape, self.probabilities.shape)
        if shapes != ((n,), (n,), (n, classes)):
            raise ValueError(f"{n} paths and {classes} classes do not fit the shapes {shapes}")
        for what, values in (("label", self.labels), ("guess", self.guesses)):
            if n and not 0 <= values.min() <= values.max() < classes:
                raise ValueError(f"a {what} is outside [0, {classes}): {values.max()}")
        p = self.probabilities
        if not ((p >= 0) & (p <= 1 + 1e-6)).all():  # NaN is neither
            raise ValueError("a probability is not a number between 0 and 1")

    def cells(self) -> dict[tuple[int, int], int]:
        """(label, guess) -> photographs, for each pair that occurs."""
        pairs = zip(self.labels.tolist(), self.guesses.tolist(), strict=True)
        return dict(Counter(pairs))


@dataclass(frozen=True)
class Source:
    """Where pictures come from; each function takes the row of a photograph.

    Attributes:
        thumbnail: JPEG or PNG bytes, or None where there is none.
        overlay: The same picture with a map drawn over it.
        near: The nearest training photographs.
    """

    thumbnail: Callable[[int], bytes | None]
    overlay: Callable[[int], bytes | None] | None = None
    near: Callable[[int], tuple[Photo, ...]] | None = None


def shrink(image: "Image.Image", side: int = 160) -> bytes:
    """A thumbnail as JPEG bytes, its longer side at most `side` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = BytesIO()
    small.save(buffer, "JPEG", quality=80, optimize=True)
    return buffer.getvalue()


def worst(answers: Answers) -> list[int]:
    """Rows of all mistakes, the most confident first; equal ones in the order of rows."""
    wrong = np.flatnonzero(answers.labels != answers.guesses)
    order = np.argsort(-answers.confidence()[wrong], kind="stable")
    return [int(i) for i in wrong[order]]


def shown(answers: Answers, *, first: int, limit: int) -> list[int]:
    """Rows whose photographs a page holds, the most wanted first.

    Args:
        answers: N photographs.
        first: Most confident mistakes that come before everything else.
        limit: Rows at most.
    """
    mistakes = worst(answers)
    right = np.flatnonzero(answers.labels == answers.guesses)
    right = right[np.argsort(answers.confidence()[right], kind="stable")]
    rest = _in_turn(mistakes[first:], answers)
    sure = _in_turn([int(i) for i in right], answers, at_most=PER_CELL)
    return [*mistakes[:first], *rest, *sure][:limit]


def photographs(
    answers: Answers,
    classes: Sequence[str],
    rows: Sequence[int],
    source: Source,
    *,
    budget: int,
    twice: int = 0,
) -> dict[int, Photo]:
    """Makes the photographs of `rows`, in that order, until the budget is spent.

    Args:
        answers: N photographs.
        classes: C names.
        rows: As `shown` gives them.
        source: Where pictures come from; asked for these rows only.
        budget: Bytes of page.
        twice: The first of the rows, which stand in the page twice: as mistakes and in a drawer.
    """
    made: dict[int, Photo] = {}
    for k, i in enumerate(rows):
        photo = _photo(answers, classes, i, source)
        budget -= photo.size() * (2 if k < twice else 1)
        if budget < 0:
            break
        made[i] = photo
    return made


def mistakes(
    answers: Answers, classes: Sequence[str], made: dict[int, Photo], count: int
) -> Gallery:
    """The most confident mistakes, as far as their photographs were made."""
    order = worst(answers)

    def words(i: int) -> str:
        return f"labelled {classes[answers.labels[i]]}, called {classes[answers.guesses[i]]}"

    photos = tuple(replace(made[i], title=words(i)) for i in order[:count] if i in made)
    return Gallery(photos, total=len(order), caption="The most confident come first.")


def drawers(
    answers: Answers,
    classes: Sequence[str],
    cells: Iterable[tuple[int, int]],
    made: dict[int, Photo],
) -> tuple[Drawer, ...]:
    """One drawer for each cell (label, guess) of the confusion matrix that holds a photograph."""
    sizes = answers.cells()
    support = np.bincount(answers.labels, minlength=len(classes))
    inside: dict[tuple[int, int], list[int]] = defaultdict(list)
    confidence = answers.confidence()
    for i in made:
        inside[int(answers.labels[i]), int(answers.guesses[i])].append(i)
    result = []
    for cell in cells:
        label, guess = cell
        sign = 1 if label == guess else -1  # least or most confident first
        rows = sorted(inside[cell], key=lambda i: (sign * confidence[i], i))
        photos = tuple(made[i] for i in rows)
        result.append(_drawer(cell, classes, sizes[cell], int(support[label]), photos))
    return tuple(result)


def _in_turn(rows: Sequence[int], answers: Answers, at_most: int | None = None) -> list[int]:
    """Sorted rows -> one of each cell, then the second of each, ...; order inside a cell kept."""
    seen: dict[tuple[int, int], int] = defaultdict(int)
    ranked = []
    for i in rows:
        cell = (int(answers.labels[i]), int(answers.guesses[i]))
        ranked.append((seen[cell], i))
        seen[cell] += 1
    return [
        i for rank, i in sorted(ranked, key=lambda r: r[0]) if at_most is None or rank < at_most
    ]


def _photo(answers: Answers, classes: Sequence[str], i: int, source: Source) -> Photo:
    label, guess = classes[answers.labels[i]], classes[answers.guesses[i]]
    p = answers.probabilities[i]
    likeliest = np.argsort(-p, kind="stable")[:TOP]
    return Photo(
        image=source.thumbnail(i),
        alt=f"Photograph labelled {label}, called {guess}",
        top=tuple((classes[k], float(p[k])) for k in likeliest),
        label=label,
        path=answers.paths[i],
        overlay=source.overlay(i) if source.overlay else None,
        near=source.near(i) if source.near else (),
    )


def _drawer(
    cell: tuple[int, int], classes: Sequence[str], n: int, total: int, photos: tuple[Photo, ...]
) -> Drawer:
    label, guess = cell
    first = "least" if label == guess else "most"
    rest = " All are in predictions.csv." if n > len(photos) else ""
    return Drawer(
        id=f"cell-{label}-{guess}",
        title=f"Labelled {classes[label]}, called {classes[guess]}",
        photos=photos,
        total=n,
        note=f"{n:,} of {total:,} photographs with this label ({percent(n / total)}). "
        f"The {first} confident come first.{rest}",
    )
