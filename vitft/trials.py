"""Is one way of training better than another, over photographs and over seeds?

A study trains each arm with several seeds and tests all on the same photographs. Two things make
its numbers uncertain: other photographs would have been tested, and other seeds drawn. Both are
measured and added; neither may be left out, or luck is called a finding.

Arrays: S seeds, N photographs of the test.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vitft.stats import LEVEL, Interval, holm, mcnemar, p_text, wilson

FEW = 25  # photographs that differ, from which their mean is near enough to normal

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and photographs.

    Attributes:
        estimate: Of S x N values.
        interval: Of what other seeds and other photographs would give.
        p: Two-sided, that the true mean is 0.
        seeds: S; with one seed its luck is not in the interval.
        photographs: N.
    """

    estimate: float
    interval: Interval
    p: float
    seeds: int
    photographs: int


def mean(values: ArrayLike, level: float = LEVEL) -> Mean:
    """Mean of [S, N] values with the interval of Student's t.

    The variance of the mean over photographs (each averaged over seeds) and that over seeds (each
    averaged over photographs) are added, with the degrees of freedom of Welch and Satterthwaite.
    The first holds some of the second, so that the interval errs on the wide side.

    Args:
        values: [S, N]; S = 1 leaves the seeds' part out.
        level: Confidence.

    Raises:
        ValueError: Not two axes, or fewer than two photographs.

    Source: F. Satterthwaite, An approximate distribution of estimates of variance components, 1946.
    """
    from scipy import stats as sp

    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 2 or x.shape[0] < 1 or x.shape[1] < 2:
        raise ValueError(f"needs [seeds, photographs], at least [1, 2], got {list(x.shape)}")
    seeds, photographs = x.shape
    parts = [(float(x.mean(axis=0).var(ddof=1)) / photographs, photographs - 1)]
    if seeds > 1:
        parts.append((float(x.mean(axis=1).var(ddof=1)) / seeds, seeds - 1))
    total = sum(v for v, _ in parts)
    centre = float(x.mean())
    if total == 0.0:  # all alike, as a next photograph need not be
        other = wilson(0, photographs, level).high
        near = Interval(centre - other, centre + other)
        return Mean(centre, near, float(centre == 0.0), seeds, photographs)
    freedom = total**2 / sum(v**2 / f for v, f in parts)
    half = float(sp.t.ppf(0.5 + level / 2, freedom)) * sqrt(total)
    p = 2 * float(sp.t.sf(abs(centre) / sqrt(total), freedom))
    return Mean(centre, Interval(centre - half, centre + half), p, seeds, photographs)


@dataclass(frozen=True)
class Contrast:
    """Arm b against arm a; `difference.p` is adjusted for all pairs that were looked at."""

    a: str
    b: str
    difference: Mean
    level: float = LEVEL

    @property
    def distinguishable(self) -> bool:
        """Whether photographs and seeds together tell the two apart."""
        return self.difference.p < 1 - self.level

    def sentence(self) -> str:
        """Such as `2-D better than none by 3.1 points [1.0, 5.2]: distinguishable (p = 0.01)`."""
        d = self.difference
        better, worse = (self.b, self.a) if d.estimate >= 0 else (self.a, self.b)
        i = d.interval if d.estimate >= 0 else Interval(-d.interval.high, -d.interval.low)
        i = Interval(max(-1.0, i.low), min(1.0, i.high))  # of two seeds Student's t knows no end
        points = f"{100 * abs(d.estimate):.1f} points {i.percent()}"
        of = f"{d.seeds} seed{'s' * (d.seeds > 1)} and {d.photographs:,} photographs"
        if abs(d.estimate) < 5e-4:
            return f"{self.a} and {self.b} are level: {points}, {of}"
        if self.distinguishable:
            how = "distinguishable" if d.seeds > 1 else "distinguishable for this seed"
            return f"{better} better than {worse} by {points}: {how}, {p_text(d.p)}, {of}"
        return f"{better} and {worse} are {points} apart: not distinguishable, {p_text(d.p)}, {of}"


def contrasts(right: Mapping[str, ArrayLike]) -> tuple[Contrast, ...]:
    """Every pair of arms, Holm-adjusted.

    Args:
        right: Arm -> [S, N] bool, the same seeds and photographs in the same order.

    Raises:
        ValueError: Two arms have other shapes.
    """
    arrays = {k: np.asarray(v, dtype=np.float64) for k, v in right.items()}
    if len({a.shape for a in arrays.values()}) > 1:
        raise ValueError(f"arms differ in shape: { ({k: a.shape for k, a in arrays.items()}) }")
    found = [Contrast(a, b, _difference(arrays[a], arrays[b])) for a, b in combinations(arrays, 2)]
    adjusted: Sequence[float] = holm([c.difference.p for c in found])
    return tuple(
        replace(c, difference=replace(c.difference, p=p))
        for c, p in zip(found, adjusted, strict=True)
    )


def _difference(a: Floats, b: Floats) -> Mean:
    """b minus a; where they differ on few photographs, Student alone would claim too much.

    Four photographs on which b is always right and a never give p = 0.046 by Student, though a
    fair coin falls four times alike in 0.125 of all cases. So p is then at least that of the signs
    of the photographs, each summed over the seeds; with one seed that is McNemar's test.
    """
    found = mean(b - a)
    side = (b - a).sum(axis=0)
    lost, gained = int((side < 0).sum()), int((side > 0).sum())
    if len(a) == 1:
        return replace(found, p=mcnemar(lost, gained))
    if lost + gained >= FEW:
        return found
    return replace(found, p=max(found.p, mcnemar(lost, gained)))
