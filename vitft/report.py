"""Scores, predictions, history and ledger -> report.html, confusion_matrix.csv, predictions.csv.

The page says the result first, in words for a person who has photographs and no statistics; then
what to do next; then the evidence. Other rooms add a part by passing a `Section` in `Page.extras`:
the templates need no change for it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import log
from pathlib import Path
from statistics import median

import numpy as np

from vitft import gallery, io, sections
from vitft.encode import csv_cell
from vitft.evaluate import Scores
from vitft.gallery import Answers, Source
from vitft.ledger import Ledger
from vitft.pages import Gallery, Link, Photo, Section, percent, render
from vitft.sections import History
from vitft.stats import Interval, in_words, wilson

DENSE = 1000  # classes; above it confusion_matrix.csv lists the cells that are not 0


@dataclass(frozen=True)
class Page:
    """Everything a report says.

    Attributes:
        title: Of the run, such as the recipe's name.
        classes: C names; the order of all rows and columns.
        scores: Of `answers`.
        answers: The model's answer for each photograph of `split`.
        source: Where thumbnails, overlays and neighbours come from.
        ledger: What became of every file.
        history: One record for each epoch (epoch, train_loss, val_loss, val_accuracy, lr, seconds)
            or each tried strength (strength, val_accuracy, maybe `chosen`).
        told: What was trained and which epoch is the model, in sentences.
        reproduce: `command` and names -> values; a mapping inside is flattened.
        split: Which photographs were scored, in the reader's words.
        subtitle: Small print beside the title: date, model.
        warnings: Shown above everything else, such as that stand-in weights were used.
        notes: Sentences below the headline, such as the band of ten seeds.
        intervals: Of `balanced_accuracy`, `macro_f1`, `log_loss`, where they were computed.
        figures: Further (name, value, meaning) beside the accuracy.
        steps: What to do next, before what the report itself suggests.
        extras: Parts of other rooms, shown after the mistakes.
        mistakes: Photographs in the gallery of mistakes at most.
        max_images: Photographs in the page at most, extras not counted.
    """

    title: str
    classes: tuple[str, ...]
    scores: Scores
    answers: Answers
    source: Source
    ledger: Ledger
    history: History = ()
    told: str = ""
    reproduce: Mapping[str, object] = field(default_factory=dict)
    split: str = "test"
    subtitle: str = ""
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    figures: tuple[tuple[str, str, str], ...] = ()
    steps: tuple[Link, ...] = ()
    extras: tuple[Section, ...] = ()
    mistakes: int = 24
    max_images: int = 500


@dataclass(frozen=True)
class Headline:
    """The result in words; `low`, `high`, `at` and `base` are shares for the strip below it."""

    figure: str
    what: str
    interval: str
    low: float
    high: float
    at: float
    base: float
    sentences: tuple[str, ...]


def write(folder: Path, page: Page, *, csv_safe: bool = False) -> Path:
    """Writes report.html, confusion_matrix.csv and predictions.csv.

    Args:
        folder: Exists.
        page: What they say.
        csv_safe: Text in the CSV files that a spreadsheet would compute starts with `'`.

    Returns:
        The path of report.html.

    Raises:
        ValueError: Scores and answers are not of the same photographs, or a block of the extras
            is not consistent.
        MachineError: The disk is full or the folder cannot be written.
    """
    path = folder / "report.html"
    io.write_text(path, html(page))
    write_confusion(
        folder / "confusion_matrix.csv", page.classes, page.scores.confusion, csv_safe=csv_safe
    )
    write_predictions(folder / "predictions.csv", page.classes, page.answers, csv_safe=csv_safe)
    return path


def html(page: Page) -> str:
    """The report as one self-contained HTML document.

    Raises:
        ValueError: As `write`.
    """
    answers, count = page.answers, len(page.classes)
    answers.check(count)
    table = page.scores.confusion
    if table.sum() != len(answers.paths) or any(table[c] != n for c, n in answers.cells().items()):
        raise ValueError("scores and answers disagree: they are not of the same photographs")
    rows = gallery.shown(answers, first=page.mistakes, limit=page.max_images)
    budget = gallery.BUDGET - sum(_images(part) for part in page.extras)
    made = gallery.photographs(
        answers, page.classes, rows, page.source, budget=budget, twice=page.mistakes
    )
    cells = sections.opening(page.scores)
    drawers = gallery.drawers(answers, page.classes, cells, made)
    return render(
        page.title,
        tuple(_sections(page, made)),
        template="report.html",
        subtitle=page.subtitle,
        warnings=page.warnings,
        drawers=drawers,
        headline=headline(page),
        figures=_figures(page),
        steps=steps(page),
    )


def write_confusion(
    path: Path, classes: Sequence[str], confusion: gallery.Ints, *, csv_safe: bool = False
) -> None:
    """Writes counts, a row for each label and a column for each answer.

    With more than `DENSE` classes: one row (label, prediction, count) for each cell that is not 0.
    """
    names = [csv_cell(name, csv_safe) for name in classes]
    if len(names) <= DENSE:
        rows = ([name, *row.tolist()] for name, row in zip(names, confusion, strict=True))
        io.write_csv(path, ["label \\ prediction", *names], rows)
        return
    cells = zip(*np.nonzero(confusion), strict=True)
    io.write_csv(
        path,
        ["label", "prediction", "count"],
        ([names[i], names[j], int(confusion[i, j])] for i, j in cells),
    )


def write_predictions(
    path: Path, classes: Sequence[str], answers: Answers, *, csv_safe: bool = False
) -> None:
    """Writes path, label, prediction, confidence and `p:<class>` of each photograph.

    A probability has the fewest digits that give the same number of its dtype again.
    """
    names = [csv_cell(name, csv_safe) for name in classes]
    confidence = answers.confidence()

    def rows() -> Iterator[list[object]]:
        for i, file in enumerate(answers.paths):
            said = [names[answers.labels[i]], names[answers.guesses[i]], str(confidence[i])]
            yield [csv_cell(file, csv_safe), *said, *map(str, answers.probabilities[i])]

    header = ["path", "label", "prediction", "confidence", *(f"p:{name}" for name in classes)]
    io.write_csv(path, header, rows())


def headline(page: Page) -> Headline:
    """Says the accuracy, what it means, and what guessing would score."""
    s = page.scores
    low, high = s.accuracy_interval.low, s.accuracy_interval.high
    common = page.classes[int(s.confusion.sum(axis=1).argmax())]
    sentences = [
        f"On new photographs like these, expect between {percent(low)} and {percent(high)} right "
        f"(95 % interval): with {_several(s.n, 'photograph', 'photographs')} to measure on, chance "
        "alone can move the number that far.",
        f"Always answering “{common}”, the commonest class, would score {percent(s.majority)}."
        + (" The model cannot yet be told apart from that." if low <= s.majority else ""),
    ]
    few = in_words(s.n)
    if few:
        sentences.insert(1, f"{few[0].upper()}{few[1:]}.")
    one = f"{page.split} photograph"
    return Headline(
        figure=percent(s.accuracy),
        what=f"of {_several(s.n, one, one + 's')} named correctly",
        interval=f"{percent(low)} to {percent(high)}",
        low=low,
        high=high,
        at=s.accuracy,
        base=s.majority,
        sentences=(*sentences, *page.notes),
    )


def steps(page: Page) -> tuple[Link, ...]:
    """What to do next: the caller's steps, then what the numbers themselves suggest."""
    return (*page.steps, *_suggestions(page))


def _remedy(weak: str, counts: Mapping[str, Mapping[str, int]]) -> str:
    """More photographs help a class that has few; one that has most is confused for a reason."""
    have = {name: count.get("train", 0) for name, count in counts.items()}
    if have.get(weak, 0) > median(have.values() or [0]):
        return f"Look at the mistakes among {weak}"
    return f"Add photographs of {weak}"


def _suggestions(page: Page) -> Iterator[Link]:
    s, ledger = page.scores, page.ledger
    confusions = sections.confusions(s)
    if confusions:
        i, j = confusions[0]
        n, a, b = int(s.confusion[i, j]), page.classes[i], page.classes[j]
        yield Link(
            f"Look at the commonest confusion: {n:,} labelled {a} and called {b}. "
            "Is the label wrong, or the photograph unclear?",
            f"#cell-{i}-{j}",
        )
        # By the upper end: a class that is surely found seldom, not one with three photographs.
        weak = min((c for c in s.per_class if c.support), key=lambda c: c.recall_interval.high)
        low, high = weak.recall_interval.low, weak.recall_interval.high
        found = (
            f"only {percent(weak.recall)} of them are found ({percent(low)} to {percent(high)}, "
        )
        yield Link(
            f"{_remedy(weak.name, ledger.counts)}: {found}measured on {weak.support:,}).",
            "#per-class",
        )
    if s.n < 100:
        yield Link("Test on more photographs: with a hundred or more the number gets steadier.")
    if ledger.duplicates_across:
        n = len(ledger.duplicates_across)
        yield Link(
            f"Decide which label is right: {_several(n, 'photograph stands', 'photographs stand')} "
            "in two classes at once.",
            "#ledger",
        )
    if ledger.refused:
        yield Link(
            f"Replace or remove {_several(len(ledger.refused), 'file', 'files')} that could not "
            "be read.",
            "#ledger",
        )


def _sections(page: Page, made: dict[int, Photo]) -> Iterator[Section]:
    """All parts in their order; one without anything to say is left out."""
    wrong = gallery.mistakes(page.answers, page.classes, made, page.mistakes)
    parts = [
        sections.photographs(page.ledger),
        sections.training(page.history, page.told),
        sections.confusion(page.scores, page.classes),
        sections.per_class(page.scores),
        Section(
            "mistakes",
            "The most confident mistakes",
            "Each is worth a look: the label may be wrong, the photograph unclear, or the model.",
            (wrong,) if wrong.total else (),
            folded=False,
        ),
        *page.extras,
        sections.account(page.ledger),
        sections.reproduction(page.reproduce),
    ]
    yield from (part for part in parts if part.blocks)


def _figures(page: Page) -> list[tuple[str, str, str]]:
    """(name, value, meaning) of the numbers that stand beside the accuracy."""
    s = page.scores

    def share(key: str, value: float) -> str:
        i = page.intervals.get(key)
        return percent(value) + (f" {i.percent()}" if i else "")

    loss = page.intervals.get("log_loss")
    band = f" [{loss.low:.3f}, {loss.high:.3f}]" if loss else ""
    return [
        (
            "Balanced accuracy",
            share("balanced_accuracy", s.balanced_accuracy),
            "every class counts the same",
        ),
        ("Macro F1", share("macro_f1", s.macro_f1), "precision and recall, mean of the classes"),
        *(
            (
                f"Top {k}",
                f"{percent(v)} {wilson(round(v * s.n), s.n).percent()}",
                f"the label is among the {k} likeliest",
            )
            for k, v in sorted(s.top_k.items())
        ),
        (
            "Log loss",
            f"{s.log_loss:.3f}{band}",
            f"0 is perfect; knowing nothing gives {log(max(len(page.classes), 1)):.3f}",
        ),
        *page.figures,
    ]


def _images(part: Section) -> int:
    """Bytes that the photographs of a section take in the page."""
    return sum(p.size() for b in part.blocks if isinstance(b, Gallery) for p in b.photos)


def _several(n: int, one: str, many: str) -> str:
    return f"{n:,} {one if n == 1 else many}"
