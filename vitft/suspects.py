"""Which labels are probably wrong: confident learning on cached features, in three rounds.

Each photograph is judged by heads that never saw it. One round of that is what cleanlab does, and
the wrong labels themselves spoil those heads; so what the first round doubts is left out when the
heads of the second are fitted, and likewise for a third:

    1  out-of-fold probabilities -> the classes' own thresholds mark the doubtful (confident joint)
    2  fitted without those, all photographs judged again, calibrated on the undoubted ones
    3  once more; the geometric mean of 2 and 3 is calibrated

The chance that a label is wrong weighs those probabilities against the share of wrong labels in the
whole folder, which is estimated from the same numbers. A reader who looks through a list wants most
of the wrong ones in it: a label is a suspect from a chance of three in ten. Where wrong labels are
few that share is estimated too low (heads learn some of them), so a label that is less than 5 %
likely is a suspect in any case.

Features and labels in, ranked rows out. What a row means for the folder is the reader's decision:
`Suspects.fixes` are proposals for fixes.csv.

Arrays: N photographs, D feature width, C classes.
Source: C. Northcutt et al., Confident learning, 2021 (round 1; the further rounds are ours).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitft.stats import NO_CHANCE, log_softmax

CHANCE = 0.3  # a label is a suspect from this chance of being wrong
BELOW = 0.05  # or when it is less likely than this
FOLDS = 5
SURE = 0.9  # a proposal relabels when another class is at least this likely, else it drops
START, TINY, ROUNDS = 0.05, 1e-6, 200  # of the expectation maximisation
COLDEST, HOTTEST = 0.05, 20.0

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Rows = NDArray[np.float32]
Fit = Callable[[Rows, Ints, Rows], ArrayLike]  # x [n, D], y [n], x_eval [m, D] -> logits [m, C]


@dataclass(frozen=True)
class Suspects:
    """Labels ranked by doubt.

    Attributes:
        probs: [N, C] calibrated out-of-fold probabilities.
        wrong: [N] chance that the label a photograph carries is wrong.
        share: Estimated share of wrong labels, the mean of `wrong`; rather too low, since wrong
            labels that follow a pattern are learned.
        suggested: [N] int64, the likeliest class.
        rows: [K] int64, the suspects, the most doubtful first.
    """

    probs: Floats
    wrong: Floats
    share: float
    suggested: Ints
    rows: Ints

    def fixes(
        self, paths: Sequence[str], sha256: Sequence[str], classes: Sequence[str]
    ) -> list[tuple[str, str, str, str]]:
        """Proposals for fixes.csv: (path, action, label, sha256), the most doubtful first.

        The action is `relabel` where another class is at least 90 % likely and `drop` where no
        class is; a reader turns either into `keep`.

        Args:
            paths: N relative paths.
            sha256: N content hashes.
            classes: C names.
        """
        out = []
        for i in self.rows.tolist():
            k = int(self.suggested[i])
            sure = self.probs[i, k] >= SURE
            label = classes[k] if sure else ""
            out.append((paths[i], "relabel" if sure else "drop", label, sha256[i]))
        return out


def find(
    x: ArrayLike,
    y: ArrayLike,
    *,
    fit: Fit,
    classes: int,
    groups: ArrayLike | None = None,
    folds: int = FOLDS,
    seed: int = 0,
    chance: float = CHANCE,
) -> Suspects:
    """Ranks labels by doubt.

    Args:
        x: [N, D] features of all photographs.
        y: [N] int labels, each in [0, C).
        fit: Fits a head on rows and labels and gives the logits of other rows; called 3 * folds
            times, sometimes without any row of a rare class.
        classes: C.
        groups: [N] names; photographs of one group (duplicates, one plant, one burst) are never on
            both sides of a fold, where they would vouch for each other's wrong label.
        folds: Folds of each round.
        seed: Of the folds.
        chance: Suspects are labels with at least this chance of being wrong, and those less likely
            than `BELOW`; another class must be likelier.

    Raises:
        ValueError: Lengths disagree, or there are fewer photographs than folds.
    """
    rows, labels = np.asarray(x, dtype=np.float32), np.asarray(y, dtype=np.int64)
    names = np.arange(len(labels)) if groups is None else np.asarray(groups)
    if not len(rows) == len(labels) == len(names) or len(rows) < folds:
        raise ValueError(
            f"{len(rows)} features, {len(labels)} labels and {len(names)} groups for {folds} folds"
        )
    codes = np.unique(names, return_inverse=True)[1]

    def judge(use: Mask, turn: int) -> Floats:
        """[N, C] log probabilities from heads fitted on the other folds' rows in `use`."""
        fold = split(labels, codes, folds=folds, seed=seed + turn)
        return log_softmax(out_of_fold(rows, labels, fold, use, fit=fit, classes=classes))

    everything = np.ones(len(labels), bool)
    trusted = _trusted(labels, ~confident(np.exp(judge(everything, 0)), labels))
    second = judge(trusted, 1)
    trusted = _trusted(labels, ~_doubted(_calibrated(second, labels, trusted), labels, chance))
    third = judge(trusted, 2)
    probs = _calibrated(log_softmax((second + third) / 2), labels, trusted)
    wrong, suggested = chances(probs, labels), probs.argmax(axis=1)
    listed = np.flatnonzero(_doubted(probs, labels, chance))
    order = np.argsort(-wrong[listed], kind="stable")
    return Suspects(probs, wrong, float(wrong.mean()), suggested, listed[order])


def split(labels: Ints, groups: Ints, *, folds: int, seed: int) -> Ints:
    """[N] fold of each photograph: classes spread evenly, groups kept whole.

    A group counts as the class of its first member; within a class the groups go round the folds
    from the largest to the smallest, in a seeded order among equals.
    """
    _, first, member, sizes = np.unique(
        groups, return_index=True, return_inverse=True, return_counts=True
    )
    shuffled = np.random.default_rng(seed).permutation(len(first))
    order = shuffled[np.lexsort((-sizes[shuffled], labels[first][shuffled]))]
    fold = np.empty(len(first), np.int64)
    fold[order] = np.arange(len(first)) % folds
    return fold[member]


def out_of_fold(x: Rows, y: Ints, fold: Ints, use: Mask, *, fit: Fit, classes: int) -> Floats:
    """[N, C] logits of each row from a head fitted on the rows in `use` of the other folds."""
    logits = np.empty((len(y), classes))
    for f in np.unique(fold):
        train, held = use & (fold != f), fold == f
        logits[held] = fit(x[train], y[train], x[held])
    return logits


def confident(probs: Floats, labels: Ints) -> Mask:
    """[N] whether another class than the label is confidently predicted.

    A class is confident for a photograph when it is at least as likely as on average for the
    photographs that carry it; of several confident classes the likeliest counts.
    """
    counts = np.bincount(labels, minlength=probs.shape[1])
    own = np.bincount(labels, probs[np.arange(len(labels)), labels], minlength=probs.shape[1])
    bar = np.where(counts > 0, own / np.maximum(counts, 1), np.inf)
    passing = np.where(probs >= bar, probs, -1.0)
    return np.asarray((passing.max(axis=1) >= 0) & (passing.argmax(axis=1) != labels))


def chances(probs: Floats, labels: Ints) -> Floats:
    """[N] chance that each label is wrong, given what the true class probably is.

    A share e of labels is taken to be replaced by another class at random; e is found by
    expectation maximisation from the probabilities themselves.

    Args:
        probs: [N, C] calibrated probabilities of the true class, C >= 2.
        labels: [N] int, as carried.
    """
    right = np.maximum(probs[np.arange(len(labels)), labels], np.exp(NO_CHANCE))  # [N]
    other = (1 - right) / (probs.shape[1] - 1)  # chance that a random other label is this one
    share, wrong = START, np.zeros(len(labels))
    for _ in range(ROUNDS):
        wrong = share * other / (share * other + (1 - share) * right)
        share = float(np.clip(wrong.mean(), TINY, 1 - TINY))
    return np.asarray(wrong)


def _doubted(probs: Floats, labels: Ints, chance: float) -> Mask:
    """[N] whether a label is a suspect."""
    own = probs[np.arange(len(labels)), labels]
    unlikely = (chances(probs, labels) >= chance) | (own < BELOW)
    return np.asarray(unlikely & (probs.argmax(axis=1) != labels))


def _trusted(labels: Ints, undoubted: Mask) -> Mask:
    """Rows to fit on: the undoubted, and all of a class of which more than half would go."""
    total = np.bincount(labels)
    left = np.bincount(labels[undoubted], minlength=len(total))
    return undoubted | (2 * left < total)[labels]


def _calibrated(log_probs: Floats, labels: Ints, trusted: Mask) -> Floats:
    """[N, C] probabilities at the temperature that suits the trusted rows."""
    from scipy.optimize import minimize_scalar

    known, y = log_probs[trusted], labels[trusted]

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(known / np.exp(log_temperature))
        return float(-np.maximum(scaled[np.arange(len(y)), y], NO_CHANCE).mean())

    limits = (float(np.log(COLDEST)), float(np.log(HOTTEST)))
    found = minimize_scalar(loss, bounds=limits, method="bounded")
    return np.exp(log_softmax(log_probs / float(np.exp(found.x))))
