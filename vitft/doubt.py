"""When to say "I don't know": too unsure to answer, or a picture from elsewhere.

Two questions, two answers. `abstain` chooses the confidence below which a picture of a known kind
is better left to a person; `Foreign` tells that a picture is unlike everything the model was
trained on, where the confidence means nothing. Both are chosen without the test split, stored in
the model file and applied by predict.

Arrays: N images, C classes, D feature width.
"""

from dataclasses import dataclass
from math import ceil, log

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitft.stats import Interval, checked, wilson

PROMISE = 0.90  # confidence of the abstain threshold
STEPS = 40  # thresholds tried

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Accepted:
    """The images a threshold lets through.

    Attributes:
        n: Images shown.
        accepted: Images with confidence of at least the threshold.
        wrong: Wrong ones among the accepted.
        coverage: accepted / n.
        coverage_interval: Wilson.
        error: wrong / accepted; nan when none is accepted.
        error_interval: Wilson.
    """

    n: int
    accepted: int
    wrong: int
    coverage: float
    coverage_interval: Interval
    error: float
    error_interval: Interval


@dataclass(frozen=True)
class Abstain:
    """When to say "I don't know".

    Attributes:
        threshold: Accept confidence >= threshold; inf accepts nothing.
        max_error: The target share of wrong answers among accepted images.
        level: Confidence of the promise.
        promised: Whether the promise below holds; otherwise the threshold is a best guess.
        validation: What the threshold does on the images it was chosen on.
        words: What is promised, or why nothing is, as one sentence.
    """

    threshold: float
    max_error: float
    level: float
    promised: bool
    validation: Accepted
    words: str


def accepted(probs: ArrayLike, labels: ArrayLike, threshold: float) -> Accepted:
    """Measures a threshold on labelled images, such as those of the test split."""
    p, y = checked(probs, labels)
    through = p.max(axis=1, initial=0.0) >= threshold
    n, k = len(p), int(through.sum())
    wrong = int((p[through].argmax(axis=1) != y[through]).sum()) if k else 0
    return Accepted(
        n=n,
        accepted=k,
        wrong=wrong,
        coverage=k / n if n else float("nan"),
        coverage_interval=wilson(k, n),
        error=wrong / k if k else float("nan"),
        error_interval=wilson(wrong, k),
    )


def abstain(
    probs: ArrayLike, labels: ArrayLike, max_error: float, *, level: float = PROMISE
) -> Abstain:
    """Chooses the confidence below which the answer should be "I don't know".

    Promise: over validation sets drawn as this one was, in at least `level` of them no more than
    `max_error` of the accepted images from the same source are wrong. It says nothing about images
    from elsewhere. Where too few validation images are there for it, the threshold is the lowest
    one that kept to the target on them, and `promised` is False.

    Thresholds are tested from strict to loose by the exact binomial test of "the error is above
    max_error", in two chains that share 1 - level (one from the strictest threshold that can pass,
    one from half way, so that a single confident mistake does not end the search); the loosest
    threshold that passed is taken.

    Args:
        probs: [N, C] of the validation split, with the temperature already applied.
        labels: [N] int.
        max_error: Target, between 0 and 1.
        level: Confidence of the promise.

    Raises:
        ValueError: max_error or level is outside (0, 1).

    Source: A. Angelopoulos et al., Learn then test, 2021 (fixed-sequence testing); B. Wiens 2003
        (fallback between chains).
    """
    if not (0 < max_error < 1 and 0 < level < 1):
        raise ValueError(
            f"max_error and level must lie between 0 and 1, got {max_error} and {level}"
        )
    p, y = checked(probs, labels)
    confidence, wrong = p.max(axis=1, initial=0.0), p.argmax(axis=1) != y
    order = np.argsort(-confidence, kind="stable")
    ranked, errors = confidence[order], np.cumsum(wrong[order])
    least = ceil(log((1 - level) / 2) / log(1 - max_error))  # images without one error
    count = _promised_count(ranked, errors, least, max_error, 1 - level)
    promised = count is not None
    if count is None:
        count = _best_count(ranked, errors, max_error)
    threshold = _threshold(ranked, count)
    validation = accepted(p, y, threshold)
    words = _promise(validation, max_error, level, least, promised)
    return Abstain(threshold, max_error, level, promised, validation, words)


def _promised_count(
    ranked: Floats, errors: Ints, least: int, max_error: float, risk: float
) -> int | None:
    """The most images that can be accepted with the promise; None when no count can."""
    from scipy.special import bdtr

    cuts = _cuts(ranked)
    if least > len(ranked):
        return None
    wanted = np.linspace(least, len(ranked), STEPS).round()
    tried = np.unique(cuts[np.searchsorted(cuts, wanted)])
    starts = {int(tried[0]), int(tried[len(tried) // 2])}
    budget, best = 0.0, None
    for m in tried:
        budget += risk / len(starts) if int(m) in starts else 0.0
        if budget and bdtr(errors[m - 1], m, max_error) <= budget:
            best = int(m)
        else:
            budget = 0.0
    return best


def _best_count(ranked: Floats, errors: Ints, max_error: float) -> int:
    """The most images that kept to the target on the images themselves; 0 when none did."""
    cuts = _cuts(ranked)
    kept = cuts[errors[cuts - 1] <= max_error * cuts]
    return int(kept.max(initial=0))


def _cuts(ranked: Floats) -> Ints:
    """How many images thresholds can accept: equal confidences stay together, all is the last."""
    return np.flatnonzero(np.append(ranked[:-1] > ranked[1:], len(ranked) > 0)) + 1


def _threshold(ranked: Floats, m: int) -> float:
    """Half way between the last image accepted and the first one refused."""
    if m == 0:
        return float("inf")
    return 0.0 if m == len(ranked) else float((ranked[m - 1] + ranked[m]) / 2)


def _promise(v: Accepted, max_error: float, level: float, least: int, promised: bool) -> str:
    """One sentence: what the threshold promises, or why it promises nothing."""
    seen = f"{v.wrong:,} of {v.accepted:,} accepted validation images wrong"
    target = f"{100 * max_error:g} %"
    if promised:
        return (
            f"with {100 * level:g} % confidence at most {target} of the accepted images from the"
            f" same source are wrong; {seen}, {v.accepted:,} of {v.n:,} accepted"
        )
    if v.accepted == 0:
        return f"no threshold keeps to {target} on the {v.n:,} validation images: accept nothing"
    return (
        f"a best guess, not a promise: {v.n:,} validation images cannot show {target} with"
        f" {100 * level:g} % confidence ({least:,} accepted without a mistake would be the least);"
        f" {seen}, {v.accepted:,} of {v.n:,} accepted"
    )
