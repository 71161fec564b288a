"""Each number against scipy, scikit-learn or an answer worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, ttest_1samp
from scipy.stats import bootstrap as scipy_bootstrap
from sklearn.metrics import f1_score

from vitft import stats
from vitft.stats import Interval


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5000), st.floats(0, 1), st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_equals_scipy(n, share, level):
    k = round(share * n)
    reference = binomtest(k, n).proportion_ci(level, method="wilson")
    interval = stats.wilson(k, n, level)
    assert interval.low == pytest.approx(reference.low, abs=1e-12)
    assert interval.high == pytest.approx(reference.high, abs=1e-12)


def test_wilson_by_hand():
    # 8 of 10, z = 1.959964: middle (.8 + .384146 / 2) / 1.384146 = .716742
    assert stats.wilson(8, 10).percent(2) == "[49.02, 94.33]"


def test_wilson_at_the_edges():
    assert stats.wilson(0, 0) == Interval(0.0, 1.0)
    assert stats.wilson(0, 7).low == 0.0
    assert stats.wilson(7, 7).high == 1.0
    assert 0.6 < stats.wilson(7, 7).low < 1
    for k, n in [(-1, 5), (6, 5)]:
        with pytest.raises(ValueError, match=r"0 <= k <= n, got k="):
            stats.wilson(k, n)
    with pytest.raises(ValueError, match="level must lie between 0 and 1, got 95"):
        stats.wilson(1, 5, 95)


def test_wilson_covers_as_often_as_it_says():
    n = 50
    for share in (0.05, 0.5, 0.9):
        k = np.arange(n + 1)
        inside = [share in stats.wilson(int(i), n) for i in k]
        assert 0.92 < binom.pmf(k, n, share)[inside].sum() < 0.98


@pytest.mark.parametrize("block", [1, 57, 10**6])
def test_redraws_keep_the_size_of_every_stratum(block, monkeypatch):
    monkeypatch.setattr(stats, "BLOCK", block)
    strata = np.array([2, 0, 0, 5, 2, 0])
    rows = np.concatenate(list(stats.redraws(strata, count=40, seed=3)))
    assert rows.shape == (40, 6)
    assert (np.sort(strata[rows], axis=1) == np.sort(strata)).all()
    assert len({tuple(row) for row in rows}) > 20


def bootstrap_mean(values, strata, **kwargs):
    return stats.bootstrap(lambda rows: values[rows].mean(axis=1), strata, **kwargs)


def test_bootstrap_of_a_mean_equals_scipy_up_to_the_draws():
    values = np.random.default_rng(0).exponential(size=300)
    ours = bootstrap_mean(values, np.zeros(300, int), count=20_000, seed=1)
    theirs = scipy_bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=2
    ).confidence_interval
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.05 * width
    assert abs(ours.high - theirs.high) < 0.05 * width


def test_bootstrap_is_made_again_from_its_seed():
    values, strata = np.arange(30.0), np.arange(30) % 3
    first = bootstrap_mean(values, strata, seed=5)
    assert first == bootstrap_mean(values, strata, seed=5)
    assert first != bootstrap_mean(values, strata, seed=6)


def test_strata_take_the_variance_between_them_away():
    strata = np.repeat([0, 1], 50)
    values = strata * 10.0  # within a stratum nothing varies
    assert bootstrap_mean(values, strata) == Interval(5.0, 5.0)
    plain = bootstrap_mean(values, np.zeros(100, int))
    assert plain.high - plain.low > 1


def test_the_interval_of_a_mean_joins_those_of_its_numbers():
    """Three and four points of distance, squared and added, are five, halved for the mean."""
    each = [Interval(0.5, 0.66), Interval(0.75, 0.87)]
    joined = stats.of_mean([0.53, 0.79], each)
    assert joined.low == pytest.approx(0.66 - 0.05 / 2)
    assert joined.high == pytest.approx(0.66 + np.hypot(0.13, 0.08) / 2)
    one = stats.wilson(3, 4)
    assert stats.of_mean([0.75], [one]).low == pytest.approx(one.low)
    assert np.isnan(stats.of_mean([], []).high)


def test_the_interval_of_losses_by_hand():
    """Mean 1, deviation 0.5, t(0.975, 3) = 3.182446; guessed is 1 too, which narrows nothing."""
    values = [0.5, 0.5, 1.5, 1.5]
    found = stats.of_losses(values, chance=1.0, most=30.0)
    factor = np.exp(3.182446 * (1 / 3) ** 0.5 / 4**0.5)
    assert (found.low, found.high) == pytest.approx((1 / factor, factor), rel=1e-6)
    # five of 0 and one guessed at 1.2: mean 0.2, standard error of the mean 0.2, of its logarithm 1
    found = stats.of_losses([0.0] * 5, chance=1.2, most=30.0)
    assert (found.low, found.high) == pytest.approx((0.0, 0.2 * np.exp(2.570582)), rel=1e-6)
    assert stats.of_losses([0.0] * 5, chance=1.2, most=2.0).high == 2.0


def test_students_interval_equals_scipy():
    values = np.random.default_rng(0).normal(size=7)
    theirs = ttest_1samp(values, 0).confidence_interval(0.9)
    ours = stats.student(values, 0.9)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert stats.student([3.0]) == Interval(-np.inf, np.inf)


@given(st.lists(st.floats(0, 36), min_size=1, max_size=12), st.floats(0.5, 0.9999))
def test_the_interval_of_losses_holds_their_mean_and_ends_where_losses_do(values, level):
    found = stats.of_losses(values, chance=1.1, most=36.1, level=level)
    assert 0 <= found.low <= np.mean(values) + 1e-12
    assert np.mean(values) - 1e-12 <= found.high <= 36.1
    assert found.high > found.low or values == [1.1]


def macro_f1(confusion):
    hit = np.diagonal(confusion, axis1=1, axis2=2)
    return (2 * hit / np.maximum(confusion.sum(1) + confusion.sum(2), 1)).mean(axis=1)


def test_confusion_bootstrap_equals_redrawing_images():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 200)
    guesses = np.where(generator.random(200) < 0.8, labels, generator.integers(0, 4, 200))
    confusion = np.zeros((4, 4), int)
    np.add.at(confusion, (labels, guesses), 1)
    assert macro_f1(confusion[None])[0] == pytest.approx(f1_score(labels, guesses, average="macro"))
    fast = stats.bootstrap_confusion(macro_f1, confusion, count=20_000)

    def slow_statistic(rows):
        out = np.zeros((len(rows), 4, 4), int)
        np.add.at(out, (np.arange(len(rows))[:, None], labels[rows], guesses[rows]), 1)
        return macro_f1(out)

    slow = stats.bootstrap(slow_statistic, labels, count=20_000, seed=9)
    width = slow.high - slow.low
    assert abs(fast.low - slow.low) < 0.05 * width
    assert abs(fast.high - slow.high) < 0.05 * width


def test_a_class_without_images_stays_without():
    confusion = np.array([[5, 1, 0], [0, 0, 0], [1, 0, 4]])
    seen = []
    stats.bootstrap_confusion(lambda m: seen.append(m) or macro_f1(m), confusion, count=50)
    assert (seen[0].sum(axis=2) == [6, 0, 5]).all()


def test_nothing_measured_gives_nan_and_not_a_number():
    for interval in (
        bootstrap_mean([], []),
        stats.student([]),
        stats.of_losses([], chance=1.0, most=2.0),
        stats.bootstrap_confusion(macro_f1, np.zeros((2, 2))),
        stats.percentile([float("nan"), float("inf")]),
    ):
        assert np.isnan(interval.low)
        assert np.isnan(interval.high)
    assert stats.percentile([1.0, 1.0, float("nan")]) == Interval(1.0, 1.0)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_equals_the_exact_binomial_test(a, b):
    expected = binomtest(a, a + b, 0.5).pvalue if a + b else 1.0
    assert stats.mcnemar(a, b) == pytest.approx(expected, abs=1e-12)


def test_mcnemar_by_hand():
    assert stats.mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 64)  # 14 / 64


def exact_power(n, share_a, share_b):
    """Chance that McNemar's exact test rejects, summed over every outcome."""
    total, share = np.arange(n + 1), share_a + share_b
    chance = binom.pmf(total, n, share)
    power = 0.0
    for m in total[chance > 1e-9]:
        low = np.arange(m + 1)
        p = np.minimum(1, 2 * binom.cdf(np.minimum(low, m - low), m, 0.5))
        power += chance[m] * binom.pmf(low, m, share_a / share)[p < 0.05].sum()
    return power


@pytest.mark.parametrize(("a", "b"), [(4, 12), (10, 16), (20, 40)])
def test_needed_n_has_the_promised_power(a, b):
    n = stats.needed_n(a, b, 430)
    assert 0.74 < exact_power(n, a / 430, b / 430) < 0.84


def test_needed_n_by_hand():
    # 20 discordant of 400, gap 8 of 400: (1.96 sqrt(.05) + .8416 sqrt(.0496))^2 / .02^2 = 31.285^2
    assert stats.needed_n(6, 14, 400) == 979
    assert stats.needed_n(14, 6, 400) == 979
    assert stats.needed_n(5, 5, 400) is None
    assert stats.needed_n(0, 0, 0) is None


def rights(n, both, only_a, only_b):
    a, b = np.zeros(n, bool), np.zeros(n, bool)
    a[: both + only_a] = True
    b[:both] = True
    b[both + only_a : both + only_a + only_b] = True
    return a, b


def test_difference_counts_and_tests():
    a, b = rights(430, 380, 10, 16)
    d = stats.difference(a, b)
    assert (d.n, d.only_a, d.only_b) == (430, 10, 16)
    assert d.estimate == pytest.approx(b.mean() - a.mean())
    assert d.p == pytest.approx(binomtest(10, 26, 0.5).pvalue)
    assert d.sentence() == (
        f"B better than A by 1.4 points {d.interval.percent()}: not distinguishable on 430 images "
        f"(p = 0.33); about 2,500 would be needed"
    )


def test_paired_bootstrap_equals_scipy_up_to_the_draws():
    a, b = rights(430, 380, 10, 16)
    ours = stats.difference(a, b, count=20_000).interval
    theirs = scipy_bootstrap(
        (a, b),
        lambda x, y, axis=-1: y.mean(axis) - x.mean(axis),
        paired=True,
        vectorized=True,
        n_resamples=5_000,
        method="percentile",
        rng=1,
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.0025)  # one image is .0023
    assert ours.high == pytest.approx(theirs.high, abs=0.0025)


def test_difference_turns_round_when_a_is_better():
    a, b = rights(430, 340, 60, 20)
    d, back = stats.difference(a, b), stats.difference(b, a)
    assert d.estimate == -back.estimate
    assert d.sentence("small", "large").startswith("small better than large by 9.3 points [5.")
    assert "distinguishable on 430 images (p = < 0.0001)" in d.sentence().replace(
        "(p < ", "(p = < "
    )


def test_strata_narrow_the_paired_interval():
    a, b = rights(400, 300, 0, 100)  # the 100 that only B has right are one class
    strata = np.repeat([0, 1], [300, 100])
    assert stats.difference(a, b, strata=strata).interval == Interval(0.25, 0.25)


@pytest.mark.parametrize("each", [1, 7])
def test_strata_of_few_images_are_drawn_together(each):
    """One image of each class redrawn within it is always the same."""
    a, b = rights(140, 100, 8, 22)
    few = stats.difference(a, b, strata=np.arange(140) // each, seed=3)
    assert few.interval == stats.difference(a, b, seed=3).interval
    assert few.interval.high - few.interval.low > 0.1
    mixed = np.minimum(np.arange(140), 3)  # three classes of one, and a large one
    assert stats.difference(a, b, strata=mixed).interval.high > few.estimate


def test_two_that_agree_everywhere_are_not_claimed_equal():
    a, b = rights(430, 400, 0, 0)
    d = stats.difference(a, b)
    assert d.p == 1.0
    assert d.interval.low < 0 < d.interval.high
    # (1 / 432 + 1 / 432) / 432 under the root, times 1.96
    assert d.interval.high == pytest.approx(1.959964 * np.sqrt(2 / 432 / 432))
    assert d.sentence() == "A and B are level: 0.0 points [-0.6, 0.6] on 430 images"


def test_few_discordant_images_get_an_interval_that_covers():
    n, share_a, share_b = 200, 0.01, 0.015
    generator = np.random.default_rng(0)
    draws = generator.multinomial(n, [share_a, share_b, 1 - share_a - share_b], size=2000)
    inside = [share_b - share_a in stats.paired_interval(x, y, n) for x, y, _ in draws]
    assert np.mean(inside) > 0.94


def test_a_comparison_needs_the_same_images():
    with pytest.raises(ValueError, match="equal lengths, got 3, 2 and 3"):
        stats.difference([1, 0, 1], [1, 0])
    with pytest.raises(ValueError, match="equal lengths, got 0"):
        stats.difference([], [])


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    assert stats.holm([0.5, 0.6]) == pytest.approx((1.0, 1.0))
    assert stats.holm([]) == ()


def test_small_samples_are_said_in_words():
    assert stats.in_words(0) == "no images, so nothing is known"
    assert stats.in_words(1).startswith("only 1 image: one image is 100 points; a first impression")
    assert stats.in_words(12).startswith("only 12 images: one image is 8.3 points; a first")
    assert stats.in_words(64) == "64 images: one image is 1.6 points"
    assert stats.in_words(430) == ""


def test_planning_numbers_are_round():
    assert [stats.rounded(n) for n in (7, 99, 101, 1841, 20000)] == [7, 99, 110, 1900, 20000]
    assert stats.p_text(1e-9) == "p < 0.0001"
    assert stats.p_text(0.0312) == "p = 0.031"
