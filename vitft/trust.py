"""What a probability is worth: temperature, calibration error, Brier score, seed band.

Logits and labels of unseen images in, frozen dataclasses of plain numbers out; a door stores
the temperature in the model file and measures calibration on the test split.

Arrays: N images, C classes, R redraws. Logits are unnormalised, probabilities sum to 1 in a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitft.stats import (
    FLOOR,
    NO_CHANCE,
    Interval,
    bootstrap,
    checked,
    log_softmax,
    of_losses,
    wilson,
)

COLDEST, HOTTEST = 0.005, 20.0  # a free search on separable data runs to 0, or past it
PRIOR = 0.5  # deviation of the log of a temperature before any image is seen: a factor of 1.6
RULED_OUT = 3.841  # chi squared of one degree of freedom, at 95 %
BINS = 15

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Temperature:
    """A temperature fitted on logits of images that the head had not seen.

    Attributes:
        value: Divide logits by it before the softmax; 1 changes nothing, above 1 is less sure.
        n: Images it was fitted on.
        before: Their mean log loss at temperature 1, in nats.
        after: The same at `value`.
        interval: 95 %, of the value.
        on: Which images, in words that follow their number.
    """

    value: float
    n: int
    before: float
    after: float
    interval: Interval
    on: str = "photographs of val"

    def sentence(self) -> str:
        """The temperature, what it was fitted on, and whether it can be told from none."""
        low, high = self.interval.low, self.interval.high
        text = f"temperature {self.value:.2f} [{low:.2f}, {high:.2f}], fitted on {self.n:,}"
        text += f" {self.on}"
        return f"{text}; it cannot be told from 1, none at all" if low <= 1 <= high else text


@dataclass(frozen=True)
class Bin:
    """One point of the reliability plot.

    Attributes:
        low: Least confidence in the bin.
        high: Greatest confidence in the bin.
        n: Images.
        confidence: Mean confidence.
        accuracy: Share that is right.
        interval: Wilson interval of the share.
    """

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float
    interval: Interval


@dataclass(frozen=True)
class Calibration:
    """How far probabilities can be believed.

    Attributes:
        n: Images.
        ece: Expected calibration error of the top class, 0-1.
        ece_interval: See `calibration`.
        ece_floor: Mean ECE that perfectly calibrated probabilities would show on as many images.
        brier: Mean squared distance to the one-hot label, 0-2.
        brier_interval: See `stats.of_losses`.
        log_loss: In nats.
        log_loss_interval: See `stats.of_losses`.
        bins: The reliability plot, from least to most confident.
    """

    n: int
    ece: float
    ece_interval: Interval
    ece_floor: float
    brier: float
    brier_interval: Interval
    log_loss: float
    log_loss_interval: Interval
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class SeedBand:
    """The spread of an accuracy over repetitions that differ in the seed only.

    Attributes:
        what: That differed, such as `head seeds`.
        deviation: Standard deviation.
    """

    count: int
    mean: float
    low: float
    high: float
    deviation: float
    what: str = "head seeds"

    def sentence(self) -> str:
        """The band as one line, in percent and points."""
        return (
            f"{self.count} {self.what}: {100 * self.low:.1f} to {100 * self.high:.1f} %"
            f" (standard deviation {100 * self.deviation:.2f} points)"
        )


def fit_temperature(
    logits: ArrayLike, labels: ArrayLike, on: str = "photographs of val"
) -> Temperature:
    """Finds the temperature under which the labels are most likely.

    A few images say little, so they have to speak against 1: the log of the temperature has a
    normal prior of mean 0 and deviation `PRIOR`, which fades beside many. Without it, images that
    are all right ask for a temperature of 0, and every later answer would claim 100 %. Platt's
    smoothed targets, the usual remedy, pull upwards instead: on 50 images of a head whose
    probabilities are right and that is right nine times in ten they found 1.66 (median; 0.034
    nats lost on others), the prior 0.95 (0.007). The value is kept where it cannot be told from 1:
    going back to 1 then cost 0.036 nats on flowers. The search is bounded.

    Args:
        logits: [N, C], finite; the head must not have learned from these images.
        labels: [N] int, each in [0, C).
        on: Which images these are, in words that follow their number.

    Returns:
        Temperature; 1 when there are no images or only one class.

    Raises:
        ValueError: A logit is not finite, or the lengths disagree.

    Source: C. Guo et al., On calibration of modern neural networks, 2017; J. Platt 1999 (smoothed
        targets). The prior is ours.
    """
    scores, y = checked(logits, labels)
    n, classes = scores.shape
    if n == 0 or classes < 2:
        return Temperature(1.0, n, 0.0, 0.0, Interval(COLDEST, HOTTEST), on)

    def loss(log_temperature: float) -> float:
        log_p = log_softmax(scores, exp(log_temperature))[np.arange(n), y]
        prior = (log_temperature / PRIOR) ** 2 / 2
        return prior - float(np.maximum(log_p, NO_CHANCE).sum())

    from scipy.optimize import minimize_scalar

    found = minimize_scalar(loss, bounds=(log(COLDEST), log(HOTTEST)), method="bounded")
    value = float(np.exp(found.x))
    losses = _log_loss(scores, y, 1.0), _log_loss(scores, y, value)
    return Temperature(value, n, *losses, _spread(scores, y, value), on)


def _spread(logits: Floats, labels: Ints, value: float) -> Interval:
    """Every temperature that these images do not speak against, at 95 %.

    Two ways to err are joined. The sandwich of slopes and curvature of the log loss along the log
    of the temperature holds whether or not a temperature can make the probabilities right
    (P. Huber, 1967). Where nearly all images are right there is next to no slope, and the prior,
    not the images, holds the value: there the likelihood ratio (S. Wilks, 1938) tells how little is
    known, since each temperature below fits as well.
    """
    scaled, p = logits / value, np.exp(log_softmax(logits, value))
    mean = (p * scaled).sum(axis=1)  # [N]
    slope = scaled[np.arange(len(labels)), labels] - mean
    curvature = float((p * (scaled - mean[:, None]) ** 2).sum())
    error = float(np.sqrt((slope**2).sum())) / max(curvature, np.finfo(np.float64).tiny)
    reach = min(1.96 * error, log(HOTTEST / COLDEST))
    low, high = _as_likely(logits, labels)
    ends = np.clip([min(value * exp(-reach), low), max(value * exp(reach), high)], COLDEST, HOTTEST)
    return Interval(float(ends[0]), float(ends[1]))


def _as_likely(logits: Floats, labels: Ints) -> tuple[float, float]:
    """The least and the greatest temperature that the likelihood ratio does not rule out."""
    from scipy.optimize import brentq, minimize_scalar

    def loss(log_temperature: float) -> float:
        log_p = log_softmax(logits, exp(log_temperature))[np.arange(len(labels)), labels]
        return -float(np.maximum(log_p, NO_CHANCE).sum())

    ends = log(COLDEST), log(HOTTEST)
    best = float(minimize_scalar(loss, bounds=ends, method="bounded").x)
    limit = loss(best) + RULED_OUT / 2
    low, high = (
        brentq(lambda t: loss(t) - limit, end, best, xtol=1e-3) if loss(end) > limit else end
        for end in ends
    )
    return exp(low), exp(high)


def ece(probs: ArrayLike, labels: ArrayLike, bins: int = BINS) -> float:
    """Expected calibration error of the top class over bins of equal mass.

    Equal mass, because a good classifier puts nine images in ten into the last bin of equal width
    and leaves a handful in each of the others, whose gaps are then noise.

    Args:
        probs: [N, C], rows sum to 1.
        labels: [N] int.
        bins: Bins; fewer when there are fewer images.

    Returns:
        Mean absolute gap between confidence and accuracy, weighted by images; nan without images.
    """
    p, y = checked(probs, labels)
    if len(p) == 0:
        return float("nan")
    confidence, gap = _gaps(p, y)
    of = _bin_of(confidence, bins)
    return float(np.abs(np.bincount(of, gap)).sum() / len(p))


def calibration(
    probs: ArrayLike,
    labels: ArrayLike,
    *,
    bins: int = BINS,
    count: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Calibration:
    """Measures how far probabilities can be believed, each number with its interval.

    ECE is biased upwards: even perfect probabilities show `ece_floor`. Its percentile bootstrap is
    biased twice and covers the truth in less than half of all cases at 430 images, so the interval
    is the reflected one (2 * ece - quantile), and its low end is 0 where the ECE is one that
    perfect probabilities would show too.

    Args:
        probs: [N, C], rows sum to 1.
        labels: [N] int.
        bins: Bins of the ECE and of the reliability plot.
        count: Redraws R.
        seed: Of the draws.
        level: Confidence.
    """
    p, y = checked(probs, labels)
    n = len(p)
    squares = ((p - np.eye(p.shape[1])[y]) ** 2).sum(axis=1)  # [N]
    losses = -np.log(np.maximum(p[np.arange(n), y], FLOOR))
    value = ece(p, y, bins)
    interval, floor = _ece_interval(p, y, value, bins=bins, count=count, seed=seed, level=level)
    return Calibration(
        n=n,
        ece=value,
        ece_interval=interval,
        ece_floor=floor,
        brier=float(squares.mean()) if n else float("nan"),
        brier_interval=of_losses(squares, chance=1 - 1 / p.shape[1], most=2.0, level=level),
        log_loss=float(losses.mean()) if n else float("nan"),
        log_loss_interval=log_loss_interval(losses, p.shape[1], level),
        bins=reliability(p, y, bins),
    )


def log_loss_interval(losses: ArrayLike, classes: int, level: float = 0.95) -> Interval:
    """Of the mean of [N] log losses in nats, between so many classes."""
    return of_losses(losses, chance=log(classes), most=-log(FLOOR), level=level)


def reliability(probs: ArrayLike, labels: ArrayLike, bins: int = BINS) -> tuple[Bin, ...]:
    """The reliability plot as data: bins of equal mass, from least to most confident."""
    p, y = checked(probs, labels)
    confidence, gap = _gaps(p, y)
    of = _bin_of(confidence, bins)
    points = []
    for b in range(of.max() + 1 if len(of) else 0):
        inside = confidence[of == b]
        n, right = len(inside), round(float((confidence - gap)[of == b].sum()))
        mean = float(inside.mean())
        ends = float(inside.min()), float(inside.max())
        points.append(Bin(*ends, n, mean, right / n, wilson(right, n)))
    return tuple(points)


def seed_band(accuracies: Sequence[float], what: str = "head seeds") -> SeedBand:
    """The spread of accuracies (0-1) over repetitions.

    Args:
        accuracies: One of each repetition.
        what: That differed between them, in the plural.

    Raises:
        ValueError: There is none.
    """
    values = np.asarray(accuracies, dtype=np.float64)
    if values.size == 0:
        raise ValueError("a seed band needs at least one accuracy, got none")
    deviation = float(values.std(ddof=1)) if values.size > 1 else 0.0
    ends = float(values.min()), float(values.max())
    return SeedBand(values.size, float(values.mean()), *ends, deviation, what)


def _log_loss(logits: Floats, labels: Ints, temperature: float) -> float:
    return float(-log_softmax(logits, temperature)[np.arange(len(labels)), labels].mean())


def _gaps(p: Floats, y: Ints) -> tuple[Floats, Floats]:
    """[N] confidence, and [N] confidence minus right (0 or 1)."""
    if len(p) == 0:
        return np.zeros(0), np.zeros(0)
    confidence = p.max(axis=1)
    return confidence, confidence - (p.argmax(axis=1) == y)


def _bin_of(confidence: Floats, bins: int) -> Ints:
    """[N] bin of each image; sizes differ by at most one."""
    n = len(confidence)
    of = np.empty(n, np.int64)
    of[np.argsort(confidence, kind="stable")] = np.arange(n) * min(bins, n) // max(n, 1)
    return of


def _ece_interval(
    p: Floats, y: Ints, value: float, *, bins: int, count: int, seed: int, level: float
) -> tuple[Interval, float]:
    """The interval of an ECE and the ECE that perfect probabilities would show."""
    n = len(p)
    if n == 0:
        return Interval(float("nan"), float("nan")), float("nan")
    confidence, gap = _gaps(p, y)
    of = _bin_of(confidence, bins)
    width = int(of.max()) + 1

    def redrawn(rows: Ints) -> Floats:  # [r, N] -> [r]
        cells = of[rows] + width * np.arange(len(rows))[:, None]
        sums = np.bincount(cells.ravel(), gap[rows].ravel(), minlength=width * len(rows))
        return np.asarray(np.abs(sums.reshape(-1, width)).sum(axis=1) / n)

    drawn = bootstrap(redrawn, y, count=count, seed=seed, level=level)
    perfect = _perfect_ece(confidence, of, count, seed)
    low = max(0.0, 2 * value - drawn.high)
    if value <= np.quantile(perfect, (1 + level) / 2):
        low = 0.0
    high = max(value, 2 * value - drawn.low)
    return Interval(low, high), float(perfect.mean())


def _perfect_ece(confidence: Floats, of: Ints, count: int, seed: int) -> Floats:
    """[R] ECE when each image is right with exactly its confidence."""
    generator, n = np.random.default_rng(seed), len(confidence)
    return np.asarray(
        [
            np.abs(np.bincount(of, confidence - (generator.random(n) < confidence))).sum() / n
            for _ in range(min(count, 500))
        ]
    )
