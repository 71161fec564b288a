"""When to say "I don't know": too unsure to answer, or a picture from elsewhere.

Two questions, two answers. `abstain` chooses the confidence below which a picture of a known kind
is better left to a person; `Foreign` tells that a picture is unlike everything the model was
trained on, where the confidence means nothing. Both are chosen without the test split, stored in
the model file and applied by predict.

Arrays: N images, C classes, D feature width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, log, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitft.stats import Interval, checked, wilson

PROMISE = 0.90  # confidence of the abstain threshold
STEPS = 40  # thresholds tried
DIRECTIONS = 256  # principal directions kept; the others share one variance
SHRINK = 0.01  # of the mean variance, added to each; 0.003 to 0.03 measured alike
ALARMS = 0.05  # share of ordinary pictures that may be called foreign
TIMES = "foreign.times"  # the name in the model file
PLAIN = (0.0, 1.0, 0.0, np.inf)  # scales that leave a distance as it is, and energy out

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Rows = NDArray[np.float32]


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


@dataclass(frozen=True)
class Foreign:
    """Remembers what training pictures look like, and how strange ordinary pictures are.

    Two kinds of strangeness, each in standard deviations above the mean of ordinary pictures and
    nothing below it, are added. The distance is Mahalanobis' on features of length 1, with one mean
    and one covariance for all classes; the energy says how little any class speaks for a picture.
    Either misses what the other sees. The sum was chosen among about thirty scores on flowers and
    72 pictures of other subjects, so these say nothing of it. Of 358 others, named before one was
    scored (a few of the 55 photographs among them may have been of the 72), it calls 99 % foreign
    under a convolutional network and 76 % under a ViT, with 5 % of flowers allowed and found;
    distance alone 99 and 58 %, energy alone 34 and 30 %. Flowers of other kinds are hard: 28 and
    44 % (tools/bench/foreign.py).

    Attributes:
        mean: [D] float32.
        basis: [R, D] float32, principal directions divided by their standard deviations.
        rest: 1 / standard deviation of everything outside of them.
        ordinary: [Q] float32, ascending scores of ordinary pictures (evenly spaced quantiles).
        limit: A picture with a higher score is called foreign.
        scales: Mean and deviation of ordinary distances, then of energies; a deviation of inf
            leaves its part out.
        times: What logits are multiplied by before their energy is taken: 1, or the temperature
            by which an export has divided the head.

    Source: K. Lee et al., A simple unified framework for detecting out-of-distribution samples,
        2018, with one Gaussian for all classes as in J. Ren et al. 2021's background score; W. Liu
        et al., Energy-based out-of-distribution detection, 2020. The sum is ours.
    """

    mean: Rows
    basis: Rows
    rest: float
    ordinary: Rows
    limit: float
    scales: tuple[float, float, float, float] = PLAIN
    times: float = 1.0

    def distance(self, features: ArrayLike) -> Rows:
        """[N, D] features -> [N] float32 distances; about 1 for ordinary pictures."""
        return _distances(_unit(features), self.mean, self.basis, self.rest)

    def score(self, features: ArrayLike, logits: ArrayLike | None = None) -> Rows:
        """[N, D] features and [N, C] logits -> [N] float32 strangeness, 0 or more.

        Raises:
            ValueError: The energy counts here, and no logits were given.
        """
        own = None if logits is None else np.asarray(logits, np.float64) * self.times
        return _scores(self.distance(features), own, self.scales)

    def farther_than(self, features: ArrayLike, logits: ArrayLike | None = None) -> Floats:
        """[N, D] features, [N, C] logits -> [N] share of ordinary pictures less strange, 0-1."""
        less = np.searchsorted(self.ordinary, self.score(features, logits))
        return np.asarray(less / len(self.ordinary), np.float64)

    def is_foreign(self, features: ArrayLike, logits: ArrayLike | None = None) -> NDArray[np.bool_]:
        """[N, D] features, [N, C] logits -> [N] whether each is unlike the training pictures."""
        return self.score(features, logits) > self.limit

    def tensors(self) -> dict[str, Rows]:
        """The arrays for the model file."""
        return {
            "foreign.mean": self.mean,
            "foreign.basis": self.basis,
            "foreign.rest": np.asarray([self.rest], np.float32),
            "foreign.ordinary": self.ordinary,
            "foreign.limit": np.asarray([self.limit], np.float32),
            "foreign.scales": np.asarray(self.scales, np.float32),
            TIMES: np.asarray([self.times], np.float32),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, ArrayLike]) -> "Foreign":
        """What `tensors` gave, from the model file; older ones know the distance alone.

        Raises:
            KeyError: An array is missing.
            ValueError: There are not four scales.
        """
        mean, basis, rest, ordinary, limit = (
            np.asarray(tensors[f"foreign.{name}"], np.float32)
            for name in ("mean", "basis", "rest", "ordinary", "limit")
        )
        scales = np.asarray(tensors.get("foreign.scales", PLAIN), np.float32).ravel()
        a, b, c, d = (float(v) for v in scales)
        times = np.asarray(tensors.get(TIMES, 1.0), np.float32)
        one = [float(v.ravel()[0]) for v in (rest, limit, times)]
        return cls(mean, basis, one[0], ordinary, one[1], (a, b, c, d), one[2])


def fit_foreign(
    train: ArrayLike,
    held_out: ArrayLike | None = None,
    logits: ArrayLike | None = None,
    *,
    alarms: float = ALARMS,
    seed: int = 0,
) -> Foreign:
    """Learns what an ordinary picture is.

    On average over draws of `held_out` about `alarms` of ordinary pictures will be called foreign,
    when these trained nothing and come from the same source.

    Args:
        train: [N, D] training features, N >= 4.
        held_out: [n, D] features of other ordinary pictures, such as the validation split. Without
            them each half of the training features is measured against the other, which is too
            strict when the backbone was trained on them.
        logits: [n, C] of the same held-out pictures; without them energy does not count.
        alarms: That share, between 0 and 1.
        seed: Of the halves.

    Raises:
        ValueError: Fewer than four training rows, a feature that is not finite, or lengths that
            disagree.
    """
    unit = _unit(train)
    if len(unit) < 4:
        raise ValueError(f"a distance to training pictures needs four of them, got {len(unit)}")
    gaussian = _gaussian(unit)
    energies = None
    if held_out is None or len(np.asarray(held_out)) == 0:
        a, b = np.array_split(np.random.default_rng(seed).permutation(len(unit)), 2)
        halves = [_distances(unit[x], *_gaussian(unit[y])) for x, y in ((a, b), (b, a))]
        distances = np.concatenate(halves)
    else:
        distances, energies = _distances(_unit(held_out), *gaussian), logits
    scales = (*_scale(distances), *(PLAIN[2:] if energies is None else _scale(_energy(energies))))
    scores = _scores(distances, energies, scales)
    limit = limit_of(scores, alarms)
    ordinary = np.quantile(scores, np.linspace(0, 1, 201)).astype(np.float32)
    return Foreign(*gaussian, ordinary, limit, scales)


def limit_of(scores: Floats | Rows, alarms: float = ALARMS) -> float:
    """The score [N] that a new ordinary picture exceeds with at most this probability.

    Where N is too small for that, the largest score.
    """
    rank = min(ceil((1 - alarms) * (len(scores) + 1)), len(scores))
    return float(np.sort(scores)[rank - 1])


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


def _unit(features: ArrayLike) -> Rows:
    """[N, D] features scaled to length 1; a row of zeros stays zero."""
    rows = np.asarray(features, dtype=np.float32)
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise ValueError(f"features must be finite and [N, D], got shape {rows.shape}")
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1), np.float32)


def _gaussian(unit: Rows) -> tuple[Rows, Rows, float]:
    """Mean [D], principal directions over their deviations [R, D], 1 / deviation of the rest."""
    width, mean = unit.shape[1], unit.mean(axis=0, dtype=np.float64)
    centred = unit - mean
    variance, directions = np.linalg.eigh(centred.T @ centred / len(unit))  # ascending
    variance = np.maximum(variance, 0)
    floor = max(SHRINK * float(variance.mean()), float(np.finfo(np.float32).tiny))
    kept = min(DIRECTIONS, width, len(unit) - 1)
    rest = float(variance[:-kept].mean()) if kept < width else 0.0
    # In the order that a file gives back: another one rounds otherwise.
    basis = np.ascontiguousarray((directions[:, -kept:] / np.sqrt(variance[-kept:] + floor)).T)
    return (
        mean.astype(np.float32),
        basis.astype(np.float32),
        float(np.float32(1 / sqrt(rest + floor))),
    )


def _distances(unit: Rows, mean: Rows, basis: Rows, rest: float) -> Rows:
    """[N] root mean square, over the D directions, of deviations from the mean."""
    centred = unit - mean
    inside = centred @ basis.T  # [N, R], in deviations
    lengths = np.linalg.norm(basis, axis=1)
    outside = (centred**2).sum(axis=1) - ((inside / lengths) ** 2).sum(axis=1)
    total = (inside**2).sum(axis=1) + np.maximum(outside, 0) * rest**2
    return np.asarray(np.sqrt(total / unit.shape[1]), np.float32)


def _energy(logits: ArrayLike) -> Floats:
    """[N, C] logits -> [N]: high where no class speaks for a picture."""
    rows = np.asarray(logits, dtype=np.float64)
    top = rows.max(axis=1)
    return np.asarray(-top - np.log(np.exp(rows - top[:, None]).sum(axis=1)))


def _scale(values: ArrayLike) -> tuple[float, float]:
    """Mean and deviation as a file keeps them; all equal values tell nothing."""
    v = np.asarray(values, dtype=np.float64)
    deviation = float(np.float32(v.std()))
    return float(np.float32(v.mean())), deviation if deviation > 0 else float("inf")


def _scores(
    distances: Rows, logits: ArrayLike | None, scales: tuple[float, float, float, float]
) -> Rows:
    """[N] the sum of what each part has above its ordinary mean, in its deviations."""
    middle, deviation, energy, energy_deviation = scales
    total = np.maximum((distances.astype(np.float64) - middle) / deviation, 0)
    if np.isfinite(energy_deviation):
        if logits is None or len(np.asarray(logits)) != len(distances):
            raise ValueError(f"{len(distances)} distances need as many rows of logits")
        total = total + np.maximum((_energy(logits) - energy) / energy_deviation, 0)
    return np.asarray(total, np.float32)


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
