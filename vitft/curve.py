"""How many more photographs? A learning curve on cached features, and what may be read from it.

Heads are fitted on nested stratified parts of the training features, several draws of each size,
and measured on photographs that none of them saw. The error is taken to fall as a power law with a
floor, error(n) = floor + scale * n ** -rate, which is then asked where it reaches a smaller error.
Extrapolation is a guess; the band says how far photographs and draws alone can move that guess.

Which class first is not read from the curve but tried: with half of one class's photographs left
out, how much is lost?

Arrays: N training photographs, M for measuring, D feature width, C classes, S sizes, K draws,
B redraws.
Source: J. Hestness et al., Deep learning scaling is predictable, empirically, 2017 (the law).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitft.stats import Interval, percentile

PARTS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
DRAWS = 5
HALVINGS = 3  # draws of each class's left-out half
TRIED = 20  # classes of which half is left out, where there are more
LEVEL = 0.8  # of the band: a planning number
REDRAWS = 500
FAR = 10.0  # times the photographs there are; a law says nothing beyond
RATES = np.geomspace(0.05, 2.0, 40)
LEAST = 0.005  # error below which a size does not get more weight

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Rows = NDArray[np.float32]
Fit = Callable[[Rows, Ints, Rows], ArrayLike]  # x [n, D], y [n], x_eval [m, D] -> logits [m, C]


@dataclass(frozen=True)
class Law:
    """error(n) = floor + scale * n ** -rate."""

    scale: float
    rate: float
    floor: float

    def error(self, n: float) -> float:
        """The error with n training photographs."""
        return float(self.floor + self.scale * n**-self.rate)

    def reaches(self, error: float) -> float:
        """The photographs that bring the error down to this; inf where none do."""
        if error <= self.floor or self.scale <= 0:
            return inf
        try:
            return float((self.scale / (error - self.floor)) ** (1 / self.rate))
        except OverflowError:
            return inf


@dataclass(frozen=True)
class Point:
    """One size of the curve.

    Attributes:
        n: Training photographs.
        accuracy: Mean over the draws.
        draws: Accuracy of each draw; a single one at full size.
        recall: C means over the draws; nan for a class that is not measured.
        fitted: Accuracy by the law.
        band: Of the law's accuracy.
    """

    n: int
    accuracy: float
    draws: tuple[float, ...]
    recall: tuple[float, ...]
    fitted: float
    band: Interval


@dataclass(frozen=True)
class More:
    """What more photographs would bring, in photographs per class beyond those there are.

    Attributes:
        gain: Wanted gain in accuracy, such as 0.02.
        now: Accuracy by the law with all photographs.
        per_class: More photographs per class for it; inf where the law never gets there.
        band: Of `per_class`; its high end may be inf.
        doubled: Accuracy by the law with twice the photographs.
        doubled_band: Of `doubled`.
        limit: More photographs per class beyond which nothing is claimed.
    """

    gain: float
    now: float
    per_class: float
    band: Interval
    doubled: float
    doubled_band: Interval
    limit: float

    def sentence(self) -> str:
        """The answer as one line."""
        points = f"+{100 * self.gain:g} points"
        doubled = (
            f"twice as many would bring about {100 * (self.doubled - self.now):+.1f} points"
            f" {_shifted(self.doubled_band, self.now).percent()}"
        )
        if 1 - self.now <= self.gain:
            return f"{points} are not there to be had at {100 * self.now:.1f} %; {doubled}"
        if self.per_class > self.limit:
            return f"{points} are out of sight of this curve; {doubled}"
        low, high = (
            f"{_rounded(n):,}" if n <= self.limit else "no end"
            for n in (self.band.low, self.band.high)
        )
        return (
            f"about {_rounded(self.per_class):,} more photographs per class for {points}"
            f" ({100 * LEVEL:g} % band: {low} to {high}); {doubled}"
        )


@dataclass(frozen=True)
class Curve:
    """A learning curve: its points from small to large, its law, and the plan read from it."""

    points: tuple[Point, ...]
    law: Law
    more: More
    fits: int


@dataclass(frozen=True)
class ClassGain:
    """What one class's photographs are worth.

    Attributes:
        name: Of the class.
        n: Its training photographs.
        loss: Balanced accuracy lost when half of them are left out.
        interval: Of the loss.
        recall: Recall of the class lost by it.
    """

    name: str
    n: int
    loss: float
    interval: Interval
    recall: float


def learning_curve(
    x: ArrayLike,
    y: ArrayLike,
    x_eval: ArrayLike,
    y_eval: ArrayLike,
    *,
    fit: Fit,
    classes: int,
    gain: float = 0.02,
    draws: int = DRAWS,
    seed: int = 0,
    known: Mask | None = None,
) -> Curve:
    """Draws the curve and fits the law.

    Args:
        x: [N, D] training features.
        y: [N] int labels, each in [0, C).
        x_eval: [M, D] features that train nothing, such as the validation split's.
        y_eval: [M] int labels.
        fit: Fits a head and gives logits; called for every size and draw.
        classes: C.
        gain: The gain in accuracy to plan for.
        draws: Draws of each part.
        seed: Of draws and redraws.
        known: What `whole` gives for the same photographs and `fit`, to be spared that solve.

    Raises:
        ValueError: Lengths disagree, or a side is empty.
    """
    train, measure = _checked(x, y), _checked(x_eval, y_eval)
    sizes, wrong = _measure(train, measure, fit, draws, seed, known)
    errors = np.array([w.mean() for w in wrong])
    law = fit_law(sizes, errors)
    luck = _luck(wrong)
    redrawn = _redrawn_errors(wrong, measure[1], luck, seed)  # [B, S]
    laws = [fit_law(sizes, e, errors) for e in redrawn]
    points = tuple(
        Point(
            n=int(n),
            accuracy=float(1 - w.mean()),
            draws=tuple(float(v) for v in 1 - w.mean(axis=1)),
            recall=_recall(w, measure[1], classes),
            fitted=1 - law.error(float(n)),
            band=percentile([1 - one.error(float(n)) for one in laws], LEVEL),
        )
        for n, w in zip(sizes, wrong, strict=True)
    )
    present = len(np.unique(train[1]))
    noise = np.random.default_rng([seed, 4]).normal(0, sqrt(2) * luck, REDRAWS)
    more = _more(law, laws, n=int(sizes[-1]), classes=present, gain=gain, noise=noise)
    return Curve(points, law, more, sum(len(w) for w in wrong))


def whole(x: ArrayLike, y: ArrayLike, x_eval: ArrayLike, y_eval: ArrayLike, *, fit: Fit) -> Mask:
    """[M] whether a head of all training photographs is right: the curve's end, the gains' start.

    Arguments as in `learning_curve`.
    """
    train, measure = _checked(x, y), _checked(x_eval, y_eval)
    return _right(fit, train, measure, np.ones(len(train[1]), bool))


def class_gains(
    x: ArrayLike,
    y: ArrayLike,
    x_eval: ArrayLike,
    y_eval: ArrayLike,
    *,
    fit: Fit,
    classes: Sequence[str],
    draws: int = HALVINGS,
    most: int = TRIED,
    seed: int = 0,
    known: Mask | None = None,
) -> tuple[ClassGain, ...]:
    """Finds out which class's photographs matter most, by leaving half of each class out.

    Arguments as in `learning_curve`, except for `classes`, which are names, and `most`: of more
    classes only those with the most mistakes are tried, since a class without a mistake has nothing
    to gain. `fit` is called draws * min(C, most) times, and once more where `known` is not.

    Returns:
        The classes, the one that loses most first; classes of fewer than two training photographs,
        or none to measure, are left out.
    """
    train, measure = _checked(x, y), _checked(x_eval, y_eval)
    labels, truth = train[1], measure[1]
    full = whole(x, y, x_eval, y_eval, fit=fit) if known is None else known  # [M]
    mistakes = np.bincount(truth[~full], minlength=len(classes))
    found = []
    for c in np.argsort(-mistakes, kind="stable")[:most].tolist():
        rows = np.flatnonzero(labels == c)
        if len(rows) < 2 or not (truth == c).any():
            continue
        halved = np.stack(
            [
                _right(fit, train, measure, _without_half(labels, rows, seed + k))
                for k in range(draws)
            ]
        )
        lost = full[None].astype(np.float64) - halved  # [K, M]
        counts = np.bincount(truth, minlength=len(classes))
        weights = 1 / (counts[truth] * np.count_nonzero(counts))  # sums to 1
        loss = float((lost * weights).sum(axis=1).mean())
        drawn = _redraw(lost, truth, seed, weights)
        recall = float(lost[:, truth == c].mean())
        found.append(ClassGain(classes[c], len(rows), loss, percentile(drawn, 0.95), recall))
    return tuple(sorted(found, key=lambda g: -g.loss))


def fit_law(sizes: ArrayLike, errors: ArrayLike, spread: ArrayLike | None = None) -> Law:
    """Least squares over the rates of a grid, scale and floor at least 0.

    Args:
        sizes: [S] photographs.
        errors: [S] error, 0-1.
        spread: [S] errors whose binomial variance weighs the sizes; default `errors`.
    """
    n, e = np.asarray(sizes, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    p = np.clip(e if spread is None else np.asarray(spread, dtype=np.float64), LEAST, 1 - LEAST)
    w = 1 / (p * (1 - p))
    u = n[None] ** -RATES[:, None]  # [rates, S]
    mean_u, mean_e = (u * w).sum(axis=1) / w.sum(), float((e * w).sum() / w.sum())
    du, de = u - mean_u[:, None], e - mean_e
    variance = (w * du**2).sum(axis=1)
    scale = (w * du * de).sum(axis=1) / np.where(variance > 0, variance, 1)
    floor = mean_e - scale * mean_u
    # On a border of scale >= 0, floor >= 0 the best fit has one parameter only.
    through_zero = (w * u * e).sum(axis=1) / (w * u**2).sum(axis=1)
    scale, floor = np.where(floor < 0, through_zero, scale), np.maximum(floor, 0)
    scale, floor = np.maximum(scale, 0), np.where(scale < 0, mean_e, floor)
    residual = (w * (e - floor[:, None] - scale[:, None] * u) ** 2).sum(axis=1)
    best = int(residual.argmin())
    return Law(float(scale[best]), float(RATES[best]), float(floor[best]))


Side = tuple[Rows, Ints]


def _checked(x: ArrayLike, y: ArrayLike) -> Side:
    rows, labels = np.asarray(x, dtype=np.float32), np.asarray(y, dtype=np.int64)
    if len(rows) != len(labels) or len(rows) == 0:
        raise ValueError(
            f"a curve needs as many labels as features, got {len(labels)}, {len(rows)}"
        )
    return rows, labels


def _measure(
    train: Side, measure: Side, fit: Fit, draws: int, seed: int, known: Mask | None
) -> tuple[Ints, list[Mask]]:
    """[S] sizes, and for each of them [K, M] whether a draw's head is wrong."""
    ranks = [_ranks(train[1], seed + k) for k in range(draws)]
    sizes: list[int] = []
    wrong = []
    for part in PARTS:
        used = [rank <= part for rank in ranks[: 1 if part == 1 else draws]]
        if sizes and used[0].sum() == sizes[-1]:
            continue  # so few photographs that two parts are the same
        sizes.append(int(used[0].sum()))
        if part == 1 and known is not None:
            wrong.append(~known[None])
        else:
            wrong.append(np.stack([~_right(fit, train, measure, use) for use in used]))
    return np.asarray(sizes), wrong


def _ranks(labels: Ints, seed: int) -> Floats:
    """[N] the part of its class at which a photograph comes in; the first one is always in."""
    generator, ranks = np.random.default_rng(seed), np.empty(len(labels))
    for c in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == c))
        ranks[rows] = np.arange(len(rows)) / len(rows)  # 0 for the first: smaller than any part
        ranks[rows[1:]] = (np.arange(1, len(rows)) + 1) / len(rows)
    return ranks


def _right(fit: Fit, train: Side, measure: Side, use: Mask) -> Mask:
    """[M] whether a head fitted on the rows in `use` names each photograph correctly."""
    logits = np.asarray(fit(train[0][use], train[1][use], measure[0]))
    return np.asarray(logits.argmax(axis=1) == measure[1], bool)


def _without_half(labels: Ints, rows: Ints, seed: int) -> Mask:
    use = np.ones(len(labels), bool)
    use[np.random.default_rng(seed).permutation(rows)[: len(rows) // 2]] = False
    return use


def _recall(wrong: Mask, truth: Ints, classes: int) -> tuple[float, ...]:
    """C recalls, averaged over the draws."""
    right, counts = 1 - wrong.mean(axis=0), np.bincount(truth, minlength=classes)
    sums = np.bincount(truth, right, minlength=classes)
    return tuple(float(s / n) if n else float("nan") for s, n in zip(sums, counts, strict=True))


def _luck(wrong: Sequence[Mask]) -> float:
    """How far another training set of the same size would move the accuracy (standard deviation).

    From the draws of the largest part whose draws differ enough to tell: half or less, since the
    draws of a larger part share most of their photographs.
    """
    several = [w.mean(axis=1).std(ddof=1) for w in wrong[:-2] if len(w) > 1]
    return float(several[-1]) if several else 0.0


def _redrawn_errors(wrong: Sequence[Mask], truth: Ints, luck: float, seed: int) -> Floats:
    """[B, S] errors with photographs (the same for all sizes) and draws drawn again.

    All photographs can be drawn in one way only; there, luck stands in for the draws.
    """
    equal = np.full(len(truth), 1 / len(truth))
    drawn = np.stack([_redraw(w, truth, seed, equal) for w in wrong], axis=1)
    single = np.array([len(w) == 1 for w in wrong])
    noise = np.random.default_rng([seed, 3]).normal(0, luck, drawn.shape)
    return np.clip(drawn + np.where(single, noise, 0), 0, 1)


def _redraw(values: ArrayLike, truth: Ints, seed: int, weights: Floats) -> Floats:
    """[B] weighted sums of [K, M] values, K averaged, with draws and photographs drawn again.

    Photographs are drawn within their class; equal seeds draw the same photographs.
    """
    v = np.asarray(values, dtype=np.float64)
    k, m = v.shape
    times = np.zeros((REDRAWS, m))  # how often each photograph is drawn
    generator = np.random.default_rng([seed, 1])
    for c in np.unique(truth):
        rows = np.flatnonzero(truth == c)
        times[:, rows] = generator.multinomial(
            len(rows), np.full(len(rows), 1 / len(rows)), REDRAWS
        )
    chosen = np.random.default_rng([seed, 2]).multinomial(k, np.full(k, 1 / k), REDRAWS) / k
    return np.asarray(((chosen @ v) * times * weights).sum(axis=1))


def _more(
    law: Law, laws: Sequence[Law], *, n: int, classes: int, gain: float, noise: Floats
) -> More:
    def per_class(one: Law) -> float:
        return max(0.0, (one.reaches(one.error(n) - gain) - n) / classes)

    needed = np.sort([per_class(one) for one in laws])
    low, high = (
        float(needed[round((len(needed) - 1) * q)]) for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    )
    # The photographs there are were drawn by luck, and so are those to come.
    now = 1 - law.error(n)
    steps = np.array([one.error(n) - one.error(2 * n) for one in laws])
    doubled = percentile(now + steps + noise, LEVEL)
    return More(
        gain=gain,
        now=now,
        per_class=per_class(law),
        band=Interval(low, high),
        doubled=1 - law.error(2 * n),
        doubled_band=doubled,
        limit=FAR * n / classes,
    )


def _shifted(interval: Interval, by: float) -> Interval:
    return Interval(interval.low - by, interval.high - by)


def _rounded(n: float) -> int:
    """A planning number: two leading digits."""
    whole = int(np.ceil(n))
    step: int = 10 ** max(0, len(str(whole)) - 2)
    return -(-whole // step) * step
