"""Laws are found where they are known, and the plan follows by hand; heads here are made up."""

from math import inf, sqrt

import numpy as np
import pytest

from vitft import curve
from vitft.curve import Law


def data(n, classes=4, seed=0):
    """Features whose first column is the photograph's difficulty in [0, 1), labels in turn."""
    x = np.random.default_rng(seed).random((n, 3)).astype(np.float32)
    return x, np.arange(n) % classes


def head(error, classes=4):
    """A head that is wrong on the photographs harder than its training set allows.

    error: from (labels trained on, [m] class of each row) to the chance of a mistake.
    """

    def fit(x, y, x_eval):
        truth = np.arange(len(x_eval)) % classes
        wrong = x_eval[:, 0] < error(y, truth)
        return np.eye(classes)[np.where(wrong, (truth + 1) % classes, truth)]

    return fit


def power(law):
    return lambda y, truth: law.error(len(y))


@pytest.mark.parametrize("rate", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_a_known_law_is_found(rate, floor):
    law = Law(1.5, float(curve.RATES[np.abs(curve.RATES - rate).argmin()]), floor)
    sizes = np.array([50, 100, 200, 400, 800])
    found = curve.fit_law(sizes, [law.error(n) for n in sizes])
    assert found.rate == law.rate
    assert found.scale == pytest.approx(law.scale)
    assert found.floor == pytest.approx(law.floor, abs=1e-9)


def test_scale_and_floor_are_never_negative():
    sizes = np.array([10, 20, 40])
    rising = curve.fit_law(sizes, [0.1, 0.2, 0.3])
    assert rising.scale == 0.0
    assert 0.1 < rising.floor < 0.3
    steep = curve.fit_law(sizes, [0.5, 0.05, 0.0])
    assert steep.floor == 0.0
    assert steep.error(40) >= 0


def test_a_law_says_where_it_reaches_an_error():
    law = Law(1.0, 0.5, 0.1)
    assert law.error(100) == pytest.approx(0.2)
    assert law.reaches(0.2) == pytest.approx(100)
    assert law.reaches(0.1) == inf
    assert law.reaches(0.05) == inf
    assert Law(0.0, 0.5, 0.0).reaches(0.1) == inf
    assert Law(1.0, 0.05, 0.0).reaches(1e-17) == inf  # beyond any float


def test_parts_are_nested_and_hold_every_class():
    labels = np.array([0] * 40 + [1] * 8 + [2] * 1)
    ranks = curve._ranks(labels, seed=1)
    for part, counts in [(1 / 16, [2, 1, 1]), (1 / 4, [10, 2, 1]), (1.0, [40, 8, 1])]:
        assert np.bincount(labels[ranks <= part]).tolist() == counts
    assert (ranks != curve._ranks(labels, seed=2)).any()


def test_the_plan_of_a_known_law():
    law = Law(1.0, float(curve.RATES[25]), 0.02)
    assert law.rate == pytest.approx(0.533, abs=0.001)
    x, y = data(1600)
    x_eval, y_eval = data(8000, seed=1)
    found = curve.learning_curve(x, y, x_eval, y_eval, fit=head(power(law)), classes=4, gain=0.005)
    assert [p.n for p in found.points] == [100, 200, 400, 800, 1200, 1600]
    assert [len(p.draws) for p in found.points] == [5, 5, 5, 5, 5, 1]
    assert found.fits == 26
    for p in found.points:
        assert p.accuracy == pytest.approx(1 - law.error(p.n), abs=0.01)
        assert p.recall == pytest.approx((p.accuracy,) * 4, abs=0.03)
        assert p.fitted in p.band
    expected = (law.reaches(law.error(1600) - 0.005) - 1600) / 4
    assert found.more.per_class == pytest.approx(expected, rel=0.35)
    assert found.more.per_class in found.more.band
    assert found.more.doubled == pytest.approx(1 - law.error(3200), abs=0.003)
    assert found.more.sentence().startswith("about ")
    assert "more photographs per class for +0.5 points (80 % band:" in found.more.sentence()


def test_the_same_seed_gives_the_same_curve():
    sides = (*data(200), *data(300, seed=1))
    fit = head(power(Law(1.0, 0.5, 0.0)))
    curves = [curve.learning_curve(*sides, fit=fit, classes=4, seed=s) for s in (0, 0, 1)]
    assert curves[0] == curves[1]
    assert curves[0].more != curves[2].more


def test_luck_widens_the_band():
    """Heads whose error jumps with the draw give a wider band than heads that agree."""
    sides = (*data(400), *data(1000, seed=1))
    calm = head(power(Law(1.0, 0.5, 0.05)))

    def jumpy(x, y, x_eval):
        lucky = float(x[:, 1].sum()) * 1000 % 1 * 0.12  # by the photographs drawn
        return head(lambda y, truth: 0.05 + len(y) ** -0.5 + lucky)(x, y, x_eval)

    widths = []
    for fit in (calm, jumpy):
        band = curve.learning_curve(*sides, fit=fit, classes=4).more.doubled_band
        widths.append(band.high - band.low)
    assert widths[1] > 2 * widths[0]


def more(**keys):
    wanted = {
        "gain": 0.02,
        "now": 0.9,
        "per_class": 37.2,
        "band": curve.Interval(15.0, 204.0),
        "doubled": 0.912,
        "doubled_band": curve.Interval(0.905, 0.921),
        "limit": 500.0,
    }
    return curve.More(**(wanted | keys)).sentence()


def test_the_plan_in_words():
    doubled = "; twice as many would bring about +1.2 points [0.5, 2.1]"
    said = "about 38 more photographs per class for +2 points (80 % band: 15 to 210)"
    assert more() == said + doubled
    assert "15 to no end" in more(band=curve.Interval(15.0, inf))
    assert more(per_class=501.0) == "+2 points are out of sight of this curve" + doubled
    assert more(per_class=inf).startswith("+2 points are out of sight")
    assert more(now=0.985, doubled=0.99).startswith("+2 points are not there to be had at 98.5 %")


def test_few_photographs_give_fewer_sizes():
    sides = (*data(8), *data(40, seed=1))
    found = curve.learning_curve(*sides, fit=head(power(Law(1.0, 0.5, 0.0))), classes=4)
    assert [p.n for p in found.points] == [4, 8]
    assert found.more.sentence()


def test_a_class_that_is_not_measured_has_no_recall():
    x, y = data(80)
    found = curve.learning_curve(
        x, y, x[:20], np.zeros(20, int), fit=head(power(Law(1, 0.5, 0))), classes=4
    )
    assert np.isnan(found.points[0].recall[1:]).all()


def test_the_class_that_misses_its_photographs_most_comes_first():
    def error(y, truth):  # class 2 needs its photographs, class 1 a little, the others not
        counts = np.bincount(y, minlength=4)
        return 0.02 + 0.3 * (truth == 2) * (counts[2] < 50) + 0.1 * (truth == 1) * (counts[1] < 50)

    sides = (*data(200), *data(2000, seed=1))
    found = curve.class_gains(*sides, fit=head(error), classes=["a", "b", "c", "d"])
    assert [g.name for g in found][:2] == ["c", "b"]
    assert found[0].n == 50
    assert found[0].recall == pytest.approx(0.3, abs=0.05)
    assert found[0].loss == pytest.approx(0.075, abs=0.015)  # of four classes' mean recall
    assert found[0].loss in found[0].interval
    # one class's share p = .3 of 500: sqrt(p (1 - p) / 500) / 4, times 2 * 1.96
    width = found[0].interval.high - found[0].interval.low
    assert width == pytest.approx(2 * 1.96 * sqrt(0.3 * 0.7 / 500) / 4, rel=0.2)
    assert found[2].loss == 0.0


def test_of_many_classes_those_with_the_most_mistakes_are_tried():
    fits = []

    def error(y, truth):
        fits.append(len(y))
        return np.array([0.0, 0.3, 0.01, 0.2])[truth]

    sides = (*data(200), *data(2000, seed=1))
    found = curve.class_gains(*sides, fit=head(error), classes=list("abcd"), draws=3, most=2)
    assert {g.name for g in found} == {"b", "d"}
    assert len(fits) == 1 + 3 * 2


def test_curve_and_gains_share_the_head_of_all_photographs():
    sizes = []

    def error(y, truth):
        sizes.append(len(y))
        return np.array([0.01, 0.3, 0.02, 0.2])[truth] + len(y) ** -0.5

    sides, fit = (*data(200), *data(400, seed=1)), head(error)
    known = curve.whole(*sides, fit=fit)
    assert sizes == [200]
    growth = curve.learning_curve(*sides, fit=fit, classes=4, known=known)
    gains = curve.class_gains(*sides, fit=fit, classes=list("abcd"), known=known)
    assert sizes.count(200) == 1
    assert growth == curve.learning_curve(*sides, fit=fit, classes=4)
    assert gains == curve.class_gains(*sides, fit=fit, classes=list("abcd"))
    assert growth.points[-1].accuracy == pytest.approx(known.mean())


def test_balanced_means_that_rare_classes_count_alike():
    x, _ = data(100)
    y = np.array([0] * 90 + [1] * 10)
    truth = np.array([0] * 90 + [1] * 10)

    def fit(x_train, labels, x_eval):  # with half of class 1 gone, its photographs are all lost
        lost = (labels == 1).sum() < 10
        return np.eye(2)[np.where(truth == 1, 0 if lost else 1, 0)]

    found = curve.class_gains(x, y, x, truth, fit=fit, classes=["many", "few"])
    assert found[0].name == "few"
    assert found[0].loss == pytest.approx(0.5)


def test_classes_without_photographs_are_left_out():
    x, y = data(40, classes=2)
    found = curve.class_gains(x, y, x, y, fit=head(power(Law(1, 0.5, 0)), 2), classes=list("abc"))
    assert {g.name for g in found} == {"a", "b"}


def test_empty_sides_are_refused():
    x, y = data(4)
    for sides in ((x[:0], y[:0], x, y), (x, y, x[:0], y[:0]), (x, y[:3], x, y)):
        with pytest.raises(ValueError, match="as many labels as features"):
            curve.learning_curve(*sides, fit=head(power(Law(1, 0.5, 0))), classes=4)


def test_all_photographs_can_be_drawn_in_one_way_only():
    truth = np.arange(100) % 2
    wrong = [np.zeros((5, 100), bool), np.ones((1, 100), bool)]
    wrong[1][0, :50] = False
    still = curve._redrawn_errors(wrong, np.zeros(100, int), 0.0, seed=0)
    lucky = curve._redrawn_errors(wrong, truth, 0.2, seed=0)
    assert still.shape == (curve.REDRAWS, 2)
    assert (lucky[:, 0] == 0).all()  # several draws speak for themselves
    assert still[:, 1].std() == pytest.approx(0.05, rel=0.1)  # sqrt(.5 * .5 / 100)
    assert lucky[:, 1].std() == pytest.approx(0.2, rel=0.15)
