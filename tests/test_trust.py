"""Calibration against scikit-learn, an answer by hand, or worlds whose truth is known."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from sklearn.metrics import brier_score_loss, log_loss

from vitft import trust
from vitft.stats import Interval, softmax


def world(n, *, classes=4, sharp=1.0, seed=0, spread=2.0):
    """Logits whose right temperature is `sharp`: labels are drawn from softmax(logits / sharp)."""
    generator = np.random.default_rng(seed)
    true = generator.normal(0, spread, (n, classes))
    chances = softmax(true)
    labels = (generator.random(n)[:, None] > chances.cumsum(axis=1)).sum(axis=1)
    return true * sharp, np.minimum(labels, classes - 1)


def right_or_wrong(n, confidence, rights):
    """Two classes; the top class is 0 with `confidence`, and right for the first `rights`."""
    probs = np.tile([confidence, 1 - confidence], (n, 1))
    return probs, (np.arange(n) >= rights).astype(int)


def test_softmax_is_stable_and_sums_to_one():
    probs = softmax([[1000.0, 0.0], [-1000.0, -1000.0]])
    assert probs == pytest.approx(np.array([[1, 0], [0.5, 0.5]]))
    # logits 2 and 0 at temperature 2: e / (e + 1)
    assert softmax([[2.0, 0.0]], 2.0)[0, 0] == pytest.approx(0.731058578)


@pytest.mark.parametrize("sharp", [0.3, 1.0, 4.0])
def test_the_temperature_of_a_known_world_is_found(sharp):
    logits, labels = world(20_000, sharp=sharp)
    found = trust.fit_temperature(logits, labels)
    assert found.value == pytest.approx(sharp, rel=0.04)
    assert found.n == 20_000
    assert found.after <= found.before + 1e-12
    assert found.after == pytest.approx(log_loss(labels, softmax(logits, found.value)))
    assert found.before == pytest.approx(log_loss(labels, softmax(logits)))


def test_the_search_equals_a_plain_one_where_that_is_safe():
    logits, labels = world(500, sharp=2.0, seed=3)
    plain = minimize_scalar(
        lambda t: log_loss(labels, softmax(logits, t)), bounds=(0.05, 20), method="bounded"
    )
    assert trust.fit_temperature(logits, labels).value == pytest.approx(plain.x, rel=0.03)


def test_images_that_are_all_right_do_not_ask_for_certainty():
    labels = np.arange(100) % 3
    logits = np.eye(3)[labels] * 5 + np.random.default_rng(0).normal(0, 0.3, (100, 3))
    found = trust.fit_temperature(logits, labels)
    assert 0.6 < found.value < 1  # as sure as it was, or somewhat more
    sure = softmax(logits, found.value).max(axis=1).mean()
    assert 0.985 < sure < 0.999  # 100 right answers are no evidence for 99.9 %


@pytest.mark.parametrize("n", [20, 50, 100, 500])
@pytest.mark.parametrize("spread", [2.0, 4.0, 8.0])
def test_right_probabilities_are_left_alone_however_few_images_there_are(n, spread):
    """Labels are drawn from the softmax itself; the accuracy is 65, 81 and 90 %."""
    found = [
        trust.fit_temperature(*world(n, classes=5, seed=seed, spread=spread)).value
        for seed in range(40)
    ]
    assert np.median(found) == pytest.approx(1, abs=0.1)


def platt(logits, labels):
    """The temperature under smoothed targets: the label (n + 1) / (n + 2), others the rest."""
    n, classes = logits.shape
    targets = np.full((n, classes), 1 / (n + 2) / (classes - 1))
    targets[np.arange(n), labels] = (n + 1) / (n + 2)

    def loss(t):
        return -(targets * np.log(np.maximum(softmax(logits, t), 1e-300))).sum()

    return minimize_scalar(loss, bounds=(0.005, 20), method="bounded").x


@pytest.mark.parametrize("spread", [2.0, 4.0, 8.0])
def test_what_50_images_say_costs_others_less_than_with_smoothed_targets(spread):
    """Mean over heads that are right, twice as sure and half as sure as they should be."""
    lost = {"prior": [], "platt": []}
    for sharp in (0.5, 1.0, 2.0):
        others, labels = world(4_000, classes=5, sharp=sharp, seed=999, spread=spread)
        for seed in range(15):
            few = world(50, classes=5, sharp=sharp, seed=seed, spread=spread)
            for way, t in (("prior", trust.fit_temperature(*few).value), ("platt", platt(*few))):
                lost[way].append(log_loss(labels, softmax(others, t)))
    assert np.mean(lost["prior"]) < np.mean(lost["platt"]) + (0.002 if spread == 2 else -0.002)


def test_the_search_is_bounded():
    labels = np.random.default_rng(0).integers(0, 3, 4_000)
    noise = np.random.default_rng(1).normal(0, 100, (4_000, 3))  # sure and without any information
    assert trust.fit_temperature(noise, labels).value == pytest.approx(trust.HOTTEST, rel=0.01)
    faint = np.eye(3)[labels] * 1e-2
    assert trust.fit_temperature(faint, labels).value == pytest.approx(trust.COLDEST, rel=0.01)


def test_the_interval_holds_the_right_temperature():
    inside, reach = [], []
    for seed in range(100):
        logits, labels = world(250, sharp=2.0, seed=seed)
        found = trust.fit_temperature(logits, labels)
        inside.append(2.0 in found.interval)
        reach.append(found.interval.high / found.interval.low)
    assert 0.9 <= np.mean(inside) <= 0.99
    few = trust.fit_temperature(*world(40, sharp=2.0)).interval
    assert few.high / few.low > 1.5 * np.mean(reach)


@pytest.mark.parametrize("spread", [4.0, 8.0])
def test_a_few_images_of_a_good_head_do_not_rule_out_what_is_true(spread):
    """Labels are drawn from the softmax itself; 40 images, of which nearly all are right."""
    inside = []
    for seed in range(60):
        logits, labels = world(40, classes=3, seed=seed, spread=spread)
        inside.append(1.0 in trust.fit_temperature(logits, labels).interval)
    assert np.mean(inside) > 0.9


def test_images_that_are_all_right_leave_open_how_sure_one_may_be():
    labels = np.arange(20) % 2
    found = trust.fit_temperature(np.eye(2)[labels] * 6, labels)
    # at 1 and below all 20 have a log loss under 0.05 in sum, so nothing speaks against it
    assert found.interval.low == pytest.approx(trust.COLDEST)
    assert found.value < found.interval.high < trust.HOTTEST
    assert found.sentence().endswith("it cannot be told from 1, none at all")


def test_a_class_that_the_head_cannot_name_does_not_move_the_temperature():
    logits, labels = world(300, sharp=2.0)
    absent = np.column_stack([logits, np.full(300, -1e4)])
    found, without = trust.fit_temperature(absent, labels), trust.fit_temperature(logits, labels)
    assert found.value == pytest.approx(without.value, rel=0.02)
    assert found.interval.high == pytest.approx(without.interval.high, rel=0.02)


def test_the_sentence_says_when_a_temperature_cannot_be_told_from_none():
    found = trust.Temperature(1.2, 40, 0.9, 0.8, Interval(0.9, 1.6), "photographs of val")
    said = "temperature 1.20 [0.90, 1.60], fitted on 40 photographs of val"
    assert found.sentence() == f"{said}; it cannot be told from 1, none at all"
    clear = trust.Temperature(1.2, 1234, 0.9, 0.8, Interval(1.1, 1.3), "others")
    assert clear.sentence() == "temperature 1.20 [1.10, 1.30], fitted on 1,234 others"


def test_no_images_or_one_class_change_nothing():
    assert trust.fit_temperature(np.zeros((0, 3)), []).value == 1.0
    assert trust.fit_temperature([[2.0]], [0]).value == 1.0


def test_ece_by_hand():
    # 10 images at 0.9, 7 right: one bin, |0.9 - 0.7|
    assert trust.ece(*right_or_wrong(10, 0.9, 7), bins=1) == pytest.approx(0.2)
    # two bins of two: (0.6, 0.6 right) gap .4 each way, then (0.9 right, 0.9 wrong) gap .4
    probs = np.array([[0.6, 0.4], [0.6, 0.4], [0.9, 0.1], [0.9, 0.1]])
    assert trust.ece(probs, [0, 0, 0, 1], bins=2) == pytest.approx((2 * 0.4 + 2 * 0.4) / 4)


def test_bins_hold_equal_mass():
    logits, labels = world(437)
    bins = trust.reliability(softmax(logits), labels)
    assert len(bins) == 15
    assert {b.n for b in bins} == {29, 30}
    assert sum(b.n for b in bins) == 437
    assert all(b.high <= after.low for b, after in zip(bins, bins[1:], strict=False))
    assert all(b.low <= b.confidence <= b.high and b.accuracy in b.interval for b in bins)
    assert sum(b.n * b.accuracy for b in bins) == pytest.approx((logits.argmax(1) == labels).sum())
    weighted = sum(b.n * abs(b.confidence - b.accuracy) for b in bins) / 437
    assert weighted == pytest.approx(trust.ece(softmax(logits), labels))


def test_fewer_images_than_bins():
    probs, labels = right_or_wrong(3, 0.8, 2)
    assert [b.n for b in trust.reliability(probs, labels)] == [1, 1, 1]


def test_scores_equal_scikit_learn():
    logits, labels = world(300, classes=5)
    probs = softmax(logits)
    result = trust.calibration(probs, labels, count=200)
    assert result.brier == pytest.approx(brier_score_loss(labels, probs, labels=range(5)))
    assert result.log_loss == pytest.approx(log_loss(labels, probs))
    assert result.brier in result.brier_interval
    assert result.log_loss in result.log_loss_interval
    assert result.ece == trust.ece(probs, labels)
    assert result.n == 300


@pytest.mark.parametrize("each", [1, 2, 4, 40])
@pytest.mark.parametrize(("classes", "sharp"), [(3, 3.0), (5, 6.0)])
def test_intervals_of_losses_cover_with_one_photograph_of_each_class(classes, sharp, each):
    """Redrawn within classes they covered 0, about 60 and about 80 % with the first three."""
    rng = np.random.default_rng(each)
    logits = rng.normal(0, sharp, (100_000, classes))
    probs = softmax(logits)
    labels = (probs.cumsum(1) < rng.random((len(probs), 1))).sum(1).clip(0, classes - 1)
    rows = [np.flatnonzero(labels == c) for c in range(classes)]
    told = [trust.calibration(probs[r], labels[r], count=1) for r in rows]
    truth = np.mean([[c.log_loss, c.brier] for c in told], axis=0)
    covers = []
    for _ in range(300):
        drawn = np.concatenate([rng.choice(r, each) for r in rows])
        found = trust.calibration(probs[drawn], labels[drawn], count=1)
        intervals = (found.log_loss_interval, found.brier_interval)
        covers.append([t in i for t, i in zip(truth, intervals, strict=True)])
    assert (np.mean(covers, axis=0) > 0.92).all()


def test_perfect_probabilities_are_not_called_miscalibrated():
    covers, floors, values = [], [], []
    for seed in range(60):
        logits, labels = world(430, seed=seed)
        result = trust.calibration(softmax(logits), labels, count=200, seed=seed)
        covers.append(result.ece_interval.low == 0)
        floors.append(result.ece_floor)
        values.append(result.ece)
    assert np.mean(covers) > 0.9
    assert np.mean(floors) == pytest.approx(np.mean(values), rel=0.1)


def test_the_ece_interval_covers_a_known_error():
    sharp = 2.5
    many = softmax(world(400_000, sharp=sharp, seed=99)[0])
    chances = softmax(np.log(many) / sharp)
    top = many.argmax(axis=1)
    rows = np.arange(len(top))
    truth = np.abs(many[rows, top] - chances[rows, top]).mean()
    covers = []
    for seed in range(60):
        logits, labels = world(430, sharp=sharp, seed=seed)
        result = trust.calibration(softmax(logits), labels, count=200, seed=seed)
        covers.append(truth in result.ece_interval)
        assert result.ece_interval.low > 0
    assert np.mean(covers) > 0.85


def test_calibration_after_the_temperature_is_better():
    logits, labels = world(2_000, sharp=3.0)
    before = trust.calibration(softmax(logits), labels, count=100)
    value = trust.fit_temperature(logits, labels).value
    after = trust.calibration(softmax(logits, value), labels, count=100)
    assert after.ece < 0.3 * before.ece
    assert after.brier < before.brier
    assert after.ece_interval.high < before.ece_interval.low


def test_no_images_give_nan():
    result = trust.calibration(np.zeros((0, 3)), [])
    assert result.n == 0
    assert result.bins == ()
    assert np.isnan([result.ece, result.brier, result.log_loss, result.ece_interval.low]).all()


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"disagree: \(2, 2\) and \(3,\)"):
        trust.ece(np.zeros((2, 2)), [0, 1, 0])
    with pytest.raises(ValueError, match="must be finite, 1 are not"):
        trust.fit_temperature([[0.0, np.nan]], [0])
    with pytest.raises(ValueError, match=r"must lie in \[0, 2\), got 2 to 2"):
        trust.ece([[0.5, 0.5]], [2])


def test_seed_band_by_hand():
    band = trust.seed_band([0.94, 0.95, 0.96])
    assert (band.count, band.low, band.high) == (3, 0.94, 0.96)
    assert band.mean == pytest.approx(0.95)
    assert band.deviation == pytest.approx(0.01)
    assert band.sentence() == "3 head seeds: 94.0 to 96.0 % (standard deviation 1.00 points)"
    assert trust.seed_band([0.9]).deviation == 0.0
    with pytest.raises(ValueError, match="at least one accuracy"):
        trust.seed_band([])


def test_the_ece_interval_is_reflected(monkeypatch):
    monkeypatch.setattr(trust, "bootstrap", lambda *args, **keys: Interval(0.18, 0.32))
    probs, labels = right_or_wrong(200, 0.9, 140)
    result = trust.calibration(probs, labels, bins=1, count=200)
    assert result.ece == pytest.approx(0.2)
    assert result.ece_interval.low == pytest.approx(2 * 0.2 - 0.32)
    assert result.ece_interval.high == pytest.approx(2 * 0.2 - 0.18)
