"""Scores, history and ledger -> the sections of a report: what the reader sees, block by block."""

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite

import numpy as np

from vitft.charts import Chart, Series
from vitft.evaluate import Scores
from vitft.ledger import Ledger
from vitft.pages import (
    Block,
    Bullets,
    Code,
    Facts,
    Figure,
    Link,
    Matrix,
    Section,
    Share,
    Table,
    percent,
)
from vitft.split import SPLITS
from vitft.summary import few_words

MATRIX = 30  # classes; above it the page lists confusions, not a matrix
CONFUSIONS = 50  # rows of that list
CLASS_ROWS = 300  # rows of the per-class table
CLASS_BARS = 20  # largest and smallest classes drawn, where there are more than twice as many
LISTED = 100  # rows of one kind in the ledger

History = Sequence[Mapping[str, object]]


def photographs(ledger: Ledger) -> Section:
    """Photographs of each class and split; the largest and smallest where there are many."""
    names = list(ledger.counts)
    caption = f"{ledger.used:,} photographs in {len(names):,} classes."
    if len(names) > 2 * CLASS_BARS:
        names.sort(key=lambda name: -sum(ledger.counts[name].values()))
        names = [*names[:CLASS_BARS], *names[-CLASS_BARS:]]
        caption += f" Shown: the {CLASS_BARS} largest and the {CLASS_BARS} smallest."
    used = [split for split in SPLITS if ledger.total(split)]
    series = tuple(Series(s, [float(ledger.counts[n][s]) for n in names]) for s in used)
    chart = Chart(
        "Photographs of each class",
        series,
        kind="bars",
        names=tuple(names),
        x_label="class",
        y_label="photographs",
        caption=caption,
    )
    return Section("photographs", "The photographs", blocks=(chart,), folded=False)


def training(history: History, told: str = "") -> Section:
    """Curves over epochs, or accuracy over the strengths tried; no blocks without records.

    Args:
        history: As `report.Page` has it.
        told: What was trained and which epoch is the model, in sentences.
    """
    if any("strength" in record for record in history):
        strengths = (_strengths(history),)
        return Section("training", "Choosing the strength", told, strengths, folded=False)
    accuracy = _accuracies(history)
    losses = [
        _curve(history, "epoch", "train_loss", "training"),
        _curve(history, "epoch", "val_loss", "validation"),
    ]
    charts = []
    if any(s.y for s in losses):
        series = tuple(s for s in losses if s.y)
        charts.append(Chart("Loss", series, x_label="epoch"))
    if accuracy[0].y:
        best = _curve([r for r in history if r.get("chosen")], "epoch", "val_accuracy", "chosen")
        charts.append(
            Chart(
                "Accuracy on validation photographs",
                accuracy,
                x_label="epoch",
                percent=True,
                mark=(best.x[0], best.y[0]) if best.y else None,
                caption="The circle is the model." if best.y else "",
            )
        )
    blocks = (Figure(tuple(charts)),) if charts else ()
    return Section("training", "Training", told, blocks, folded=False)


def _accuracies(history: History) -> tuple[Series, ...]:
    """Of the weights as they are and, where it was kept, of their average."""
    if not any("val_accuracy_ema" in record for record in history):
        return (_curve(history, "epoch", "val_accuracy", "validation"),)
    names = (("val_accuracy_plain", "plain weights"), ("val_accuracy_ema", "averaged weights"))
    return tuple(_curve(history, "epoch", key, name) for key, name in names)


def _strengths(history: History) -> Chart:
    """Validation accuracy against the strength of the penalty, the chosen one marked."""
    curve = _curve(history, "strength", "val_accuracy", "validation")
    best = _curve([r for r in history if r.get("chosen")], "strength", "val_accuracy", "chosen")
    if not best.y:
        top = max(range(len(curve.y)), key=lambda i: curve.y[i], default=None)
        mark = None if top is None else (curve.x[top], curve.y[top])
    else:
        mark = (best.x[0], best.y[0])
    said = f"The circle is the one used: {mark[0]:.3g}, {percent(mark[1])}." if mark else ""
    return Chart(
        "Accuracy on validation photographs",
        (curve,),
        x_label="strength",
        x_log=True,
        percent=True,
        mark=mark,
        caption=f"{len(curve.y)} strengths were tried. {said}",
    )


def _curve(history: History, x: str, y: str, name: str) -> Series:
    """The records in which both are finite numbers."""
    points = [
        (float(a), float(b))
        for a, b in ((record.get(x), record.get(y)) for record in history)
        if isinstance(a, int | float) and isinstance(b, int | float) and isfinite(a) and isfinite(b)
    ]
    return Series(name, x=[a for a, _ in points], y=[b for _, b in points])


def confusions(scores: Scores) -> list[tuple[int, int]]:
    """Cells off the diagonal that are not 0, the largest first."""
    rows, columns = np.nonzero(scores.confusion)
    off = rows != columns
    rows, columns = rows[off], columns[off]
    order = np.argsort(-scores.confusion[rows, columns], kind="stable")
    return [(int(rows[k]), int(columns[k])) for k in order]


def opening(scores: Scores) -> list[tuple[int, int]]:
    """Cells that open: all that hold a photograph, or those of the list of confusions."""
    if len(scores.confusion) > MATRIX:
        return confusions(scores)[:CONFUSIONS]
    return [(int(i), int(j)) for i, j in zip(*np.nonzero(scores.confusion), strict=True)]


def confusion(scores: Scores, classes: tuple[str, ...]) -> Section:
    """The matrix, or with many classes the commonest confusions; each cell opens its drawer."""
    counts, names = scores.confusion, classes
    if len(names) <= MATRIX:
        keys = frozenset(f"{i}-{j}" for i, j in opening(scores))
        block: Block = Matrix(names, tuple(tuple(row) for row in counts.tolist()), keys)
        says = (
            "Rows are labels, columns what the model said; the diagonal is right. Press a cell to "
            "see its photographs. A stronger colour is a larger share of the row; the scale is a "
            "square root, so that rare confusions show."
        )
        return Section("confusion", "What is taken for what", says, (block,), folded=False)
    cells, support = confusions(scores), counts.sum(axis=1)
    rows = tuple(
        (
            Link(f"{names[i]} → {names[j]}", f"#cell-{i}-{j}"),
            int(counts[i, j]),
            Share(float(counts[i, j] / support[i])),
        )
        for i, j in cells[:CONFUSIONS]
    )
    says = (
        f"{len(names):,} classes are too many for a matrix. These are the commonest confusions, "
        f"{len(rows):,} of {len(cells):,}; confusion_matrix.csv has all. Press one to see it."
    )
    header = ("label → answer", "photographs", "share of the label")
    blocks: tuple[Block, ...] = (Table(header, rows, sortable=True),) if rows else ()
    return Section("confusion", "What is taken for what", says, blocks, folded=False)


def per_class(scores: Scores) -> Section:
    """Recall, precision and F1 with intervals; the lowest recalls where classes are many."""
    rows = sorted(scores.per_class, key=lambda c: c.recall)[:CLASS_ROWS]
    if len(rows) == len(scores.per_class):
        rows = list(scores.per_class)
    table = Table(
        ("class", "recall", "precision", "F1", "photographs"),
        tuple(
            (
                c.name,
                Share(c.recall, c.recall_interval.low, c.recall_interval.high),
                Share(c.precision, c.precision_interval.low, c.precision_interval.high),
                Share(c.f1),
                c.support,
            )
            for c in rows
        ),
        sortable=True,
    )
    says = (
        "Recall: of the photographs with this label, how many were found. Precision: of those "
        "called so, how many have the label. F1 joins the two. Small print: 95 % intervals."
    )
    if len(rows) < len(scores.per_class):
        says += f" Shown: the {len(rows):,} lowest recalls of {len(scores.per_class):,} classes."
    few = few_words(scores)
    if few:
        says += f" {few[0].upper()}{few[1:]}."
    return Section("per-class", "Class by class", says, (table,), folded=False)


def account(ledger: Ledger) -> Section:
    """The ledger: the sum, the counts, and every list that is not empty."""
    says = (
        f"{ledger.found:,} files found: {ledger.used:,} used, {len(ledger.refused):,} refused, "
        f"{sum(ledger.ignored.values()):,} ignored, {len(ledger.dropped):,} dropped."
    )
    used = [split for split in SPLITS if ledger.total(split)]
    counts = Table(
        ("class", *used),
        tuple((name, *(count[s] for s in used)) for name, count in ledger.counts.items()),
        sortable=True,
    )
    tallies = {
        "formats": ledger.formats,
        "noted": ledger.noted,
        "ignored": ledger.ignored,
        "folders not entered": ledger.not_entered,
    }
    facts = Facts(tuple((what, _tally(counted)) for what, counted in tallies.items() if counted))
    lists = {
        "Refused": [f"{r.path}: {r.text}" for r in ledger.refused],
        "Dropped": [f"{d.path}: {d.reason}" for d in ledger.dropped],
        "The same photograph in two classes": _groups(ledger.duplicates_across),
        "The same photograph on two sides of the split": _groups(ledger.leaks),
        "The same photograph twice in one class": _groups(ledger.duplicates_within),
        "Damaged, but used": [f"{path}: {text}" for path, text in ledger.damaged],
        "Relabelled": list(ledger.relabelled),
        "Classes without photographs": list(ledger.empty_classes),
        "Warnings": list(ledger.warnings),
    }
    listed = [b for what, rows in lists.items() if rows for b in _listed(what, rows)]
    blocks = (counts, *((facts,) if facts.rows else ()), *listed)
    return Section("ledger", "What became of every file", says, blocks)


def _listed(what: str, rows: list[str]) -> tuple[Block, ...]:
    rest = f" The first {LISTED} are shown." if len(rows) > LISTED else ""
    return f"{what}: {len(rows):,}.{rest}", Bullets(tuple(rows[:LISTED]))


def _groups(groups: Sequence[Sequence[str]]) -> list[str]:
    return [" = ".join(group) for group in groups]


def _tally(counts: Mapping[str, int]) -> str:
    top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {n:,}" for name, n in top)


def reproduction(values: Mapping[str, object]) -> Section:
    """The command to copy, then names and values; a mapping inside is flattened."""
    facts = tuple(_flat({k: v for k, v in values.items() if k != "command"}))
    command = values.get("command")
    code: tuple[Block, ...] = (Code(str(command)),) if command else ()
    blocks = (*code, *((Facts(facts),) if facts else ()))
    says = "The command, the seed, and what it ran on." if blocks else ""
    return Section("reproduce", "How to reproduce this", says, blocks)


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", str(value)
