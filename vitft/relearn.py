"""Heads learned again on cached features, for what one head cannot say of itself.

    head_fit     a head solved on any rows         -> curves, wrong labels
    held_out     heads that never saw a photograph -> logits to fit a temperature on
    head_seeds   the same head from other seeds    -> the band beside the accuracy

Features come from a frozen backbone, so a head costs moments. The product is not touched.

N photographs, D feature width, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
from numpy.typing import NDArray
from torch import nn

from vitft import evaluate, suspects
from vitft.evaluate import Predictions
from vitft.features import Features
from vitft.inputs import derive_seed
from vitft.learn import (
    Hooks,
    Ints,
    Learned,
    Rows,
    begin,
    extract,
    fit,
    head_predictions,
    of_head,
    some,
    view_batches,
)
from vitft.prepare import Prepared

MIDDLE = 1e-2  # strength where none was chosen: on flowers within the plateau of the path
ENOUGH = 500  # photographs of val from which they alone give as good a temperature as folds do
FOLDS = 5
UNSEEN = "each judged by a head that never saw it"

Floats = NDArray[np.float64]
Fit = Callable[[Rows, Ints, Rows], Floats]
Groups = Callable[[], Ints]
Judge = Callable[[Ints, Ints], NDArray[np.floating]]  # rows to learn, rows to judge -> logits


# -- one head -------------------------------------------------------------------------------------


def head_fit(
    p: Prepared, learned: Learned, kind: str = "logistic", *, steps: int | None = None
) -> Fit:
    """(x, y, other x) -> logits of the other rows, from a linear head solved on (x, y).

    The strength is the one that val chose for a head of that kind, otherwise a middle one. With
    `steps` the solver ends there at the latest: where classes can be told apart without a mistake,
    its loss falls for hundreds of steps more, and no answer changes.
    """
    from vitft import probe

    limit = p.recipe.probe.max_iter
    chosen = learned.best.get("strength", MIDDLE) if learned.solved == kind else MIDDLE
    solve = {"logistic": probe.logistic_path, "ridge": probe.ridge_path}[kind]

    def fit_rows(x: Rows, y: Ints, others: Rows) -> Floats:
        solved = solve(
            x,
            y,
            x[:1],
            y[:1],
            classes=len(p.index.classes),
            strengths=(float(chosen),),
            tol=1e-4,
            max_iter=limit if steps is None else min(steps, limit),
            device=p.device,
        )
        return np.asarray(others @ solved.weight.T + solved.bias, dtype=np.float64)

    return fit_rows


def _trained(
    p: Prepared, learned: Learned, views: Features, seed: int, rows: Ints | None = None
) -> nn.Module:
    """A head trained once more on the views, or on some of their rows, from another seed.

    It begins as the run's own does; a probe that it begins from knows the same rows as it will.
    """
    head = nn.Linear(views.x.shape[2], len(p.index.classes)).to(p.device)
    batches, val = view_batches(p, views, seed, rows), learned.features["val"]
    begin(p, head, seed, lambda: (some(views, rows), val))
    fit(p, head, batches, Hooks(), predict=of_head(p, val))
    return head


# -- judged by heads that never saw them ----------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """Photographs judged by a head that never saw them.

    Attributes:
        logits: [N, C].
        labels: [N] int64.
        on: Which photographs these are, in words after their number.
    """

    logits: NDArray[np.floating]
    labels: Ints
    on: str


def val_is_known(p: Prepared, learned: Learned) -> bool:
    """Whether the head has learned from val, so that nothing chosen there can be promised."""
    return p.recipe.probe.refit and bool(learned.solved)


def held_out(
    p: Prepared,
    learned: Learned,
    val: Predictions,
    x: Rows | None,
    groups: Groups,
) -> HeldOut:
    """What a temperature can be fitted on.

    A few dozen photographs of val may all be harder or easier than usual, and then mislead. Over 20
    splits of 250 photographs of flowers (EfficientNet-Lite0, the rest for testing) the log loss
    stayed 0.007 above the best possible with 45 photographs of val and 0.003 with folds of all;
    with no temperature 0.048. From about 500 photographs of val on neither is better, and val costs
    nothing. A head that was solved again with val has seen it, and val would ask for far too much
    certainty.

    Args:
        p: The run's data and model.
        learned: What is judged.
        val: Its answers on val.
        x: [N, D] plain features of all photographs; None where the backbone was trained.
        groups: Gives [N] codes; photographs of one group are never on both sides of a fold. Asked
            only where there are folds.
    """
    plain = HeldOut(val.logits, val.labels, "photographs of val")
    enough = len(val.labels) >= ENOUGH and p.test_split != "val"  # what is scored stays out
    if x is None or (enough and not val_is_known(p, learned)):
        return plain
    if learned.solved:
        judge = _judge_of_rows(p, learned, x)
        if enough:
            logits = judge(p.index.rows("train"), p.index.rows("val"))
            on = "photographs of val, judged by a head of the train photographs alone"
            return HeldOut(logits, val.labels, on)
        splits = ("train",) if p.test_split == "val" else ("train", "val")
        nobody = HeldOut(val.logits[:0], val.labels[:0], "photographs, as the head knows them all")
        spare = nobody if val_is_known(p, learned) else plain
        return _folded(p, splits, groups, judge) or spare
    if learned.train_views is None:
        return plain
    judge = _judge_of_views(p, learned, learned.train_views, x)
    found = _folded(p, ("train",), groups, judge)
    if found is None or p.test_split == "val":
        return found or plain
    return _joined(found, plain)


def _judge_of_rows(p: Prepared, learned: Learned, x: Rows) -> Judge:
    """Solves a head like the product's on some photographs, judges others."""
    solve = head_fit(p, learned, learned.solved)

    def judge(known: Ints, others: Ints) -> NDArray[np.floating]:
        return solve(x[known], p.index.labels[known], x[others])

    return judge


def _judge_of_views(p: Prepared, learned: Learned, views: Features, x: Rows) -> Judge:
    """Trains on views of some train photographs, judges others as they are."""
    train, seed = p.index.rows("train"), derive_seed(p.recipe.seed, "folds")

    def judge(known: Ints, others: Ints) -> NDArray[np.floating]:
        head = _trained(p, learned, views, seed, np.searchsorted(train, known))
        rows = Features(x[None, others], p.index.labels[others], 0, len(others), 0.0)
        return head_predictions(head, rows, p.device).logits

    return judge


def _folded(p: Prepared, splits: Sequence[str], groups: Groups, judge: Judge) -> HeldOut | None:
    """Every photograph judged without its fold; None where a fold leaves one class or none.

    A class that a fold holds alone is left out there: no head can know it.
    """
    rows = np.concatenate([p.index.rows(split) for split in splits])
    y = p.index.labels[rows]
    fold = suspects.split(y, groups()[rows], folds=FOLDS, seed=p.recipe.seed)
    logits = np.empty((len(rows), len(p.index.classes)))
    known = np.zeros(len(rows), bool)
    for k in np.unique(fold):
        held = fold == k
        if len(np.unique(y[~held])) < 2:
            return None
        logits[held] = judge(rows[~held], rows[held])
        known[held] = np.isin(y[held], y[~held])
    on = f"photographs of {' and '.join(splits)}, {UNSEEN}"
    return HeldOut(logits[known], y[known], on)


def _joined(folds: HeldOut, val: HeldOut) -> HeldOut:
    """Folds of train beside val, which the product's own head has not learned from."""
    logits = np.concatenate([folds.logits, val.logits])
    on = f"photographs of train and val, {UNSEEN}"
    return HeldOut(logits, np.concatenate([folds.labels, val.labels]), on)


# -- from other seeds -----------------------------------------------------------------------------


def head_seeds(p: Prepared, learned: Learned) -> tuple[str, list[float]]:
    """What differed, and the accuracies on the scored split of as many heads; none where none can.

    Cached features make it cheap. A trained head has a seed of its own (its start, its order, its
    views). A solved one has none: there the seed decides which photographs train, so train and val
    are drawn anew within each class, as large as they were. A trained backbone is trained once.
    """
    seeds, views = range(1, p.recipe.trust.head_seeds + 1), learned.train_views
    drawn = learned.backbone_frozen and {"train", "val"} <= learned.features.keys()
    if not seeds or (views is None and not drawn):
        return "", []
    scored = learned.features.get(p.test_split) or extract(p, p.test_split)
    if views is not None:
        return "head seeds", [_seeded(p, learned, views, scored, k) for k in seeds]
    return "draws of the training photographs", [_redrawn(p, learned, scored, k) for k in seeds]


def _seeded(p: Prepared, learned: Learned, views: Features, scored: Features, k: int) -> float:
    """Accuracy of a head trained once more, from another seed."""
    head = _trained(p, learned, views, derive_seed(p.recipe.seed, "band", k))
    return evaluate.accuracy(head_predictions(head, scored, p.device))


def _redrawn(p: Prepared, learned: Learned, scored: Features, k: int) -> float:
    """Accuracy of a head solved on another draw of train and val together."""
    train, val = learned.features["train"], learned.features["val"]
    if p.test_split == "val":  # what is scored must not train
        x, y = train.x[0], train.y
    else:
        x, y = np.concatenate([train.x[0], val.x[0]]), np.concatenate([train.y, val.y])
    rng = np.random.default_rng(derive_seed(p.recipe.seed, "band", k))
    share = len(train.y) / (len(train.y) + len(val.y))
    rows = np.concatenate(
        [
            rng.permutation(np.flatnonzero(y == c))[: ceil(share * (y == c).sum())]
            for c in np.unique(y)
        ]
    )
    logits = head_fit(p, learned, learned.solved or "logistic")(x[rows], y[rows], scored.x[0])
    return float((logits.argmax(axis=1) == scored.y).mean())
