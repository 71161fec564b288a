"""How sure a number is: intervals, paired comparison of two classifiers, sample size.

Counts and arrays in, plain numbers out. Nothing here knows about images, models or files.
Every random draw comes from a seed that is passed in, so a report can be made again.

Which method where, and why:
    a share of images (accuracy, recall)    Wilson; right at 0 and 1 and for small n
    a mean of such shares, one a class      of_mean: their intervals joined, which know that two
                                            photographs, both right, may yet not always be
    a mean of losses                        of_losses: Student's t on its logarithm, and with one
                                            photograph more that was merely guessed
    a mean difference of losses             student
    a function of the confusion matrix      bootstrap_confusion: one multinomial draw per row
    any other number of a test set          bootstrap: images redrawn within their class
    two classifiers on the same images      difference: exact McNemar and a paired bootstrap

Arrays: N images, R redraws, C classes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, exp, inf, sqrt
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

FLOOR = float(np.finfo(np.float64).eps)  # of probabilities in a log loss, as in scikit-learn's
LEVEL = 0.95
POWER = 0.8  # chance of seeing a true difference that `needed_n` plans for
BLOCK = 2_000_000  # drawn row numbers held at once: 16 MB, whatever N and R are
NO_CHANCE = -30.0  # log probability below which a number only says "never"
FEW = 30  # images below which a share is a first impression
FEW_IN_STRATUM = 8  # images below which redraws within it vary too little; of one, not at all
FEW_DISCORDANT = 10  # below it a paired bootstrap has too few distinct outcomes to be an interval

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """A confidence interval, in the unit of its number (a share is 0-1, never percent)."""

    low: float
    high: float

    def percent(self, decimals: int = 1) -> str:
        """The interval of a share as people read it: `[92.5, 96.3]`."""
        return f"[{100 * self.low:.{decimals}f}, {100 * self.high:.{decimals}f}]"

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Difference:
    """Classifier B against classifier A on the same images.

    Attributes:
        n: Images.
        only_a: Images that A alone has right.
        only_b: Images that B alone has right.
        estimate: Accuracy of B minus accuracy of A, in [-1, 1].
        interval: Of the estimate.
        p: Two-sided p of the exact McNemar test; it decides `distinguishable`.
        needed: Images for 80 % power at the observed discordance; None when the two are level.
        level: Of the interval; 1 - level is the threshold for p.
    """

    n: int
    only_a: int
    only_b: int
    estimate: float
    interval: Interval
    p: float
    needed: int | None
    level: float

    @property
    def distinguishable(self) -> bool:
        """Whether the exact test tells the two apart at this level."""
        return self.p < 1 - self.level

    def sentence(self, a: str = "A", b: str = "B") -> str:
        """The result as one line, naming the two classifiers `a` and `b`."""
        return _sentence(self, a, b)


def checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Ints]:
    """Scores as [N, C] float64 and labels as [N] int64.

    Raises:
        ValueError: Shapes disagree, a score is not finite, or a label is outside [0, C).
    """
    s, y = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if s.ndim != 2 or y.shape != s.shape[:1]:
        raise ValueError(f"scores [N, C] and labels [N] disagree: {s.shape} and {y.shape}")
    if not np.isfinite(s).all():
        raise ValueError(f"scores must be finite, {int((~np.isfinite(s)).sum())} are not")
    if y.size and (y.min() < 0 or y.max() >= s.shape[1]):
        raise ValueError(f"labels must lie in [0, {s.shape[1]}), got {y.min()} to {y.max()}")
    return s, y


def log_softmax(logits: ArrayLike, temperature: float = 1.0) -> Floats:
    """[N, C] logits -> [N, C] float64 log probabilities at a temperature."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    shifted = scaled - scaled.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def softmax(logits: ArrayLike, temperature: float = 1.0) -> Floats:
    """[N, C] logits -> [N, C] float64 probabilities at a temperature."""
    return np.exp(log_softmax(logits, temperature))


def _z(level: float) -> float:
    """The two-sided normal quantile of a confidence level."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    return NormalDist().inv_cdf(0.5 + level / 2)


def wilson(k: int, n: int, level: float = LEVEL) -> Interval:
    """The Wilson score interval of a share.

    Args:
        k: Successes, 0 <= k <= n.
        n: Trials; with none the interval is [0, 1].
        level: Confidence, between 0 and 1.

    Raises:
        ValueError: k is outside [0, n], or level outside (0, 1).

    Source: E. B. Wilson 1927; equals scipy.stats.binomtest(k, n).proportion_ci(method="wilson").
    """
    if not 0 <= k <= n:
        raise ValueError(f"wilson needs 0 <= k <= n, got k={k}, n={n}")
    z = _z(level)
    if n == 0:
        return Interval(0.0, 1.0)
    share, spread = k / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    # The ends are exact at k = 0 and k = n; rounding would leave 1e-17 or 1 - 1e-16 there.
    return Interval(
        0.0 if k == 0 else max(0.0, middle - half), 1.0 if k == n else min(1.0, middle + half)
    )


def of_mean(values: ArrayLike, each: Sequence[Interval]) -> Interval:
    """The interval of the mean of independent numbers, from the interval of each.

    Args:
        values: [C], each within its interval.
        each: C intervals of one level, which is the mean's, too.

    Returns:
        Interval; its ends are nan without numbers.

    Source: MOVER, Zou and Donner 2008 (Statistics in Medicine 27:1693), for a sum of C terms.
    """
    v = np.asarray(values, dtype=np.float64)
    if v.size == 0:
        return Interval(float("nan"), float("nan"))
    below = float(np.linalg.norm(v - [i.low for i in each])) / len(v)
    above = float(np.linalg.norm([i.high for i in each] - v)) / len(v)
    return Interval(float(v.mean()) - below, float(v.mean()) + above)


def of_losses(values: ArrayLike, *, chance: float, most: float, level: float = LEVEL) -> Interval:
    """The interval of the mean of losses: none below 0, most of them small, a few large.

    Student's t on the logarithm of the mean, which is less skewed, by the delta method; joined with
    the same of one photograph more that was merely guessed, as a few that all went well do not say
    what a mistake would cost. Redrawing photographs within their class made intervals of no width
    from one of each.

    Args:
        values: [N] losses.
        chance: Loss of an answer that holds all classes for equally likely.
        most: The largest loss there is.
        level: Confidence.

    Returns:
        Interval around the mean; its ends are nan without losses.
    """
    v = np.asarray(values, dtype=np.float64)
    if v.size == 0:
        return Interval(float("nan"), float("nan"))
    ends = [end for sample in (v, np.append(v, chance)) for end in _on_logarithm(sample, level)]
    return Interval(min(ends), min(max(ends), most))


def _on_logarithm(v: Floats, level: float) -> tuple[float, float]:
    """Ends of the interval of a positive mean; the mean itself of one number, or of zeros."""
    mean = float(v.mean())
    if len(v) < 2 or mean == 0:
        return mean, mean
    factor = exp(min(_half(v, level) / mean, 99.0))
    return mean / factor, mean * factor


def student(values: ArrayLike, level: float = LEVEL) -> Interval:
    """Student's interval of the mean of [N] numbers of either sign.

    It is endless with one of them; its ends are nan without any.
    """
    v = np.asarray(values, dtype=np.float64)
    if v.size == 0:
        return Interval(float("nan"), float("nan"))
    mean, half = float(v.mean()), _half(v, level) if v.size > 1 else inf
    return Interval(mean - half, mean + half)


def _half(v: Floats, level: float) -> float:
    """Half the width of Student's interval, of two numbers or more."""
    from scipy.special import stdtrit

    return float(stdtrit(len(v) - 1, 0.5 + level / 2)) * float(v.std(ddof=1)) / sqrt(len(v))


def redraws(strata: ArrayLike, *, count: int, seed: int) -> Iterator[Ints]:
    """Draws rows with replacement within each stratum, some redraws at a time.

    Args:
        strata: [N] integers; every redraw holds as many rows of each value as the data.
        count: Redraws in all.
        seed: The same seed gives the same rows.

    Yields:
        [r, N] int64 row numbers, grouped by stratum; the r of all blocks add up to `count`.
    """
    sizes = np.unique(np.asarray(strata), return_counts=True)[1]
    order = np.argsort(np.asarray(strata), kind="stable")
    n, generator = len(order), np.random.default_rng(seed)
    per_block = max(1, BLOCK // max(n, 1))
    for done in range(0, count, per_block):
        r = min(per_block, count - done)
        rows, start = np.empty((r, n), np.int64), 0
        for size in sizes:
            inside = order[start : start + size]
            rows[:, start : start + size] = inside[generator.integers(0, size, (r, size))]
            start += size
        yield rows


def bootstrap(
    statistic: Callable[[Ints], ArrayLike],
    strata: ArrayLike,
    *,
    count: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """Percentile interval of any statistic of N images, redrawn within their stratum.

    Args:
        statistic: Takes rows [r, N] int64 and gives [r] numbers, one for each redraw
            (`lambda rows: losses[rows].mean(axis=1)`).
        strata: [N] integers, usually the true labels; zeros for a plain bootstrap.
        count: Redraws.
        seed: Of the draws.
        level: Confidence.

    Returns:
        Interval; its ends are nan without images. Redraws that are not finite are left out.
    """
    labels = np.asarray(strata)
    if labels.size == 0:
        return Interval(float("nan"), float("nan"))
    blocks = redraws(labels, count=count, seed=seed)
    return percentile(np.concatenate([np.asarray(statistic(rows)) for rows in blocks]), level)


def bootstrap_confusion(
    statistic: Callable[[Ints], ArrayLike],
    confusion: ArrayLike,
    *,
    count: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """Percentile interval of a function of the confusion matrix, such as macro-F1.

    Redrawing the images of one true class and counting their predictions is one multinomial draw
    of that row, so this is the bootstrap stratified by label at a cost that does not grow with N.

    Args:
        statistic: Takes matrices [R, C, C] int64 and gives [R] numbers.
        confusion: [C, C] counts, rows true, columns predicted.
        count: Redraws R.
        seed: Of the draws.
        level: Confidence.
    """
    counts = np.asarray(confusion, dtype=np.int64)
    if counts.sum() == 0:
        return Interval(float("nan"), float("nan"))
    sizes = counts.sum(axis=1)
    shares = counts / np.maximum(sizes, 1)[:, None]
    shares[sizes == 0, 0] = 1.0  # a row without images stays without: a draw of size 0
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(sizes, shares, size=(count, len(counts)))  # [R, C, C]
    return percentile(np.asarray(statistic(drawn)), level)


def percentile(draws: ArrayLike, level: float = LEVEL) -> Interval:
    """The central interval of the finite draws; nan at both ends when there is none."""
    finite = np.asarray(draws, dtype=np.float64).ravel()
    finite = finite[np.isfinite(finite)]
    if finite.size == 0:
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of the exact McNemar test.

    Args:
        only_a: Images that A alone has right.
        only_b: Images that B alone has right.

    Returns:
        p in (0, 1]; 1 when the two never differ.

    Source: equals scipy.stats.binomtest(only_a, only_a + only_b, 0.5).pvalue.
    """
    from scipy.special import bdtr

    total = only_a + only_b
    return 1.0 if total == 0 else min(1.0, 2 * float(bdtr(min(only_a, only_b), total, 0.5)))


def needed_n(
    only_a: int, only_b: int, n: int, *, power: float = POWER, level: float = LEVEL
) -> int | None:
    """Images for McNemar's test to see the observed difference, if it is the true one.

    Args:
        only_a: Images that A alone has right, among n.
        only_b: Images that B alone has right, among n.
        n: Images compared.
        power: Chance of seeing the difference.
        level: 1 - level is the two-sided threshold.

    Returns:
        The number of images; None when the two are level, since no number would be enough.

    Source: R. J. Connor, Sample size for testing differences in proportions for the paired-sample
        design, Biometrics 43, 1987.
    """
    if n == 0 or only_a == only_b:
        return None
    discordant, gap = (only_a + only_b) / n, abs(only_a - only_b) / n
    z_power = NormalDist().inv_cdf(power)
    root = _z(level) * sqrt(discordant) + z_power * sqrt(max(0.0, discordant - gap * gap))
    return ceil((root / gap) ** 2)


def paired_interval(only_a: int, only_b: int, n: int, level: float = LEVEL) -> Interval:
    """A closed interval of a paired difference that holds with few or no discordant images.

    Source: D. G. Bonett and R. M. Price, Adjusted Wald confidence interval for a difference of
        binomial proportions based on paired data, J. Educ. Behav. Stat. 37, 2012.
    """
    a, b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = _z(level) * sqrt((a + b - (b - a) ** 2) / (n + 2))
    return Interval(max(-1.0, b - a - half), min(1.0, b - a + half))


def difference(
    right_a: ArrayLike,
    right_b: ArrayLike,
    *,
    strata: ArrayLike | None = None,
    count: int = 10_000,
    seed: int = 0,
    level: float = LEVEL,
) -> Difference:
    """Compares two classifiers on the same images.

    The interval is a paired percentile bootstrap within each stratum, those of fewer than
    `FEW_IN_STRATUM` images taken together: B minus A of an image is -1, 0 or 1, so one redraw is a
    multinomial draw for each stratum. With fewer than `FEW_DISCORDANT` images on which one alone is
    right it is `paired_interval`; a bootstrap would claim [0, 0] for two classifiers that happen to
    agree.

    Args:
        right_a: [N] bool, whether A has each image right.
        right_b: [N] bool, the same images in the same order.
        strata: [N] integers, usually the labels; None for one stratum.
        count: Redraws.
        seed: Of the draws.
        level: Confidence.

    Raises:
        ValueError: The lengths differ, or there is no image.
    """
    a, b = np.asarray(right_a, dtype=bool), np.asarray(right_b, dtype=bool)
    kinds = np.zeros(len(a), np.int64) if strata is None else np.asarray(strata)
    if not len(a) == len(b) == len(kinds) or len(a) == 0:
        raise ValueError(
            f"a comparison needs equal lengths, got {len(a)}, {len(b)} and {len(kinds)}"
        )
    n, only_a, only_b = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    if only_a + only_b < FEW_DISCORDANT:
        interval = paired_interval(only_a, only_b, n, level)
    else:
        interval = percentile(_paired_draws(a, b, kinds, count, seed), level)
    return Difference(
        n=n,
        only_a=only_a,
        only_b=only_b,
        estimate=(only_b - only_a) / n,
        interval=interval,
        p=mcnemar(only_a, only_b),
        needed=needed_n(only_a, only_b, n, level=level),
        level=level,
    )


def _paired_draws(
    a: NDArray[np.bool_], b: NDArray[np.bool_], strata: NDArray[np.int64], count: int, seed: int
) -> Floats:
    """[R] redrawn differences of accuracy, B minus A."""
    generator, total = np.random.default_rng(seed), np.zeros(count)
    _, of, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    strata = np.where(sizes[of] < FEW_IN_STRATUM, -1, of)  # the small ones are one
    for kind in np.unique(strata):
        gain = b[strata == kind].astype(np.int64) - a[strata == kind]  # -1, 0 or 1
        size = len(gain)
        shares = np.bincount(gain + 1, minlength=3) / size
        drawn = generator.multinomial(size, shares, size=count)  # [R, 3]
        total += drawn[:, 2] - drawn[:, 0]
    return total / len(a)


def _sentence(d: Difference, a: str, b: str) -> str:
    """`B better than A by 1.3 points [-0.2, 2.8]: not distinguishable on 430 images; about ...`."""
    images = f"{d.n:,} image{'s' if d.n != 1 else ''}"
    better, worse = (b, a) if d.estimate >= 0 else (a, b)
    i = d.interval if d.estimate >= 0 else Interval(-d.interval.high, -d.interval.low)
    points = f"{100 * abs(d.estimate):.1f} points {i.percent()}"
    if d.only_a == d.only_b:
        return f"{a} and {b} are level: 0.0 points {i.percent()} on {images}"
    tail = f"distinguishable on {images} ({p_text(d.p)})"
    said = f"{better} better than {worse} by {points}"
    if d.distinguishable:
        return f"{said}: {tail}"
    return f"{said}: not {tail}; about {rounded(d.needed or 0):,} would be needed"


def p_text(p: float) -> str:
    """A p-value for people: `p = 0.031`, never 0."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def rounded(n: int) -> int:
    """A planning number for people: two leading digits, rounded up."""
    step: int = 10 ** max(0, len(str(n)) - 2)
    return -(-n // step) * step


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Holm's step-down adjustment: the chance of any false claim among all stays below the level.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    raw = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(raw, kind="stable")
    stepped = np.maximum.accumulate(raw[order] * np.arange(len(raw), 0, -1))
    adjusted = np.empty_like(raw)
    adjusted[order] = np.minimum(stepped, 1.0)
    return tuple(float(p) for p in adjusted)


def in_words(n: int) -> str:
    """What a reader should know about a share measured on n images; empty when n is large."""
    if n <= 0:
        return "no images, so nothing is known"
    step = f"one image is {100 / n:.{0 if n < 10 else 1}f} points"
    if n < FEW:
        return (
            f"only {n} image{'s' if n > 1 else ''}: {step}; a first impression, not a measurement"
        )
    return f"{n} images: {step}" if n < 100 else ""
