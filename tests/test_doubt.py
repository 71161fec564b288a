"""The promise is tested where the truth is known: how often it is broken, and what it costs."""

import numpy as np
import pytest

from vitft import doubt


def pictures(n, seed, noise=0.0):
    """Two-class probabilities and labels; the top class is wrong with a known chance."""
    generator = np.random.default_rng(seed)
    confidence = np.maximum(1 / (1 + np.exp(-generator.normal(3.5, 2.0, n))), 0.5)
    wrong = generator.random(n) > confidence * (1 - noise)
    return np.stack([confidence, 1 - confidence], axis=1), wrong.astype(int)


@pytest.mark.parametrize(("n", "max_error", "noise"), [(520, 0.05, 0.0), (900, 0.05, 0.02)])
def test_the_promise_is_kept_as_often_as_it_says(n, max_error, noise):
    many, truth = pictures(200_000, seed=999, noise=noise)
    broken, promised, coverage = 0, 0, []
    for seed in range(150):
        result = doubt.abstain(*pictures(n, seed, noise), max_error)
        if result.promised:
            outside = doubt.accepted(many, truth, result.threshold)
            broken += outside.error > max_error
            coverage.append(outside.coverage)
            promised += 1
    assert broken / 150 <= 0.10
    assert promised > 100
    assert np.mean(coverage) > 0.6  # a promise kept by refusing everything would be worthless


def test_accepted_by_hand():
    probs = np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])
    result = doubt.accepted(probs, [0, 1, 1, 1], 0.7)
    assert (result.n, result.accepted, result.wrong) == (4, 3, 1)
    assert result.coverage == 0.75
    assert result.error == pytest.approx(1 / 3)
    assert result.coverage in result.coverage_interval
    assert result.error in result.error_interval


def test_a_perfect_classifier_accepts_everything():
    labels = np.arange(600) % 3
    probs = np.full((600, 3), 0.05) + np.eye(3)[labels] * 0.85
    result = doubt.abstain(probs, labels, 0.02)
    assert result.promised
    assert result.validation.accepted == 600
    assert result.words == (
        "with 90 % confidence at most 2 % of the accepted images from the same source are wrong; "
        "0 of 600 accepted validation images wrong, 600 of 600 accepted"
    )


def test_the_least_number_of_images_is_the_exact_one():
    # 0.98 ** 148 > 0.05 >= 0.98 ** 149
    def perfect(n):
        return np.tile([0.9, 0.1], (n, 1)), np.zeros(n, int)

    assert not doubt.abstain(*perfect(148), 0.02).promised
    assert doubt.abstain(*perfect(149), 0.02).promised


def test_too_few_images_give_a_best_guess_and_say_so():
    confidence = np.linspace(0.99, 0.5, 50)
    probs = np.stack([confidence, 1 - confidence], axis=1)
    labels = (np.arange(50) >= 30).astype(int)  # the 20 least sure are wrong
    result = doubt.abstain(probs, labels, 0.02)
    assert not result.promised
    assert confidence[30] < result.threshold < confidence[29]
    assert result.validation.accepted == 30
    assert result.words.startswith(
        "a best guess, not a promise: 50 validation images cannot show 2 % with 90 % confidence "
        "(149 accepted without a mistake would be the least); 0 of 30 accepted"
    )


def test_one_sure_mistake_does_not_end_the_search():
    probs, labels = np.tile([0.9, 0.1], (1000, 1)), np.zeros(1000, int)
    probs[:, 0] += np.linspace(0.09, 0, 1000)
    probs[:, 1] = 1 - probs[:, 0]
    labels[0] = 1
    result = doubt.abstain(probs, labels, 0.02)
    assert result.promised
    assert result.validation.accepted == 1000


def test_where_the_surest_images_are_wrong_nothing_is_accepted():
    probs = np.array([[0.9, 0.1], [0.8, 0.2]])
    result = doubt.abstain(probs, [1, 1], 0.05)
    assert result.threshold == np.inf
    assert result.validation.accepted == 0
    assert np.isnan(result.validation.error)
    assert result.words == "no threshold keeps to 5 % on the 2 validation images: accept nothing"


def test_equal_confidences_are_never_parted():
    probs = np.repeat([[0.99, 0.01], [0.9, 0.1]], 300, axis=0)
    labels = np.repeat([0, 1], 300)
    result = doubt.abstain(probs, labels, 0.02)
    assert result.promised
    assert result.validation.accepted == 300
    tied = doubt.abstain(np.tile([0.9, 0.1], (10, 1)), np.arange(10) % 2, 0.02)
    assert tied.validation.accepted == 0


def test_no_images_promise_nothing():
    assert doubt.abstain(np.zeros((0, 2)), [], 0.05).threshold == np.inf


def test_a_target_outside_its_range_is_refused():
    for target in (0.0, 1.0, 2):
        with pytest.raises(ValueError, match="must lie between 0 and 1, got"):
            doubt.abstain(*pictures(5, 0), target)


def clouds(n, seed, *, centre=3.0, width=24):
    """Features around one direction; a foreign cloud points elsewhere."""
    rows = np.random.default_rng(seed).normal(0, 1, (n, width))
    rows[:, 0] += centre
    return rows.astype(np.float32)


def test_distance_by_hand():
    """Unit rows at four compass points: mean 0, variance 1/2 each way; every point lies alike."""
    known = doubt.fit_foreign([[2.0, 0], [0, 3.0], [-5.0, 0], [0, -1.0]])
    # (1 / (1/2 + .01 / 2) + 0) / 2 directions, under the root; anywhere on the circle
    expected = np.sqrt(1 / 0.505 / 2)
    assert known.distance([[7.0, 0], [1.0, 1.0]]) == pytest.approx(expected, rel=1e-5)
    squeezed = doubt.fit_foreign([[4.0, 1], [4.0, -1], [4.0, 1], [4.0, -1]])
    near, far = squeezed.distance([[4.0, 0.9], [0.0, 1.0]])
    assert near < 1.5
    assert far > 10


@pytest.mark.parametrize("directions", [256, 8])
def test_distances_equal_scipy(directions, monkeypatch):
    from scipy.spatial.distance import mahalanobis

    monkeypatch.setattr(doubt, "DIRECTIONS", directions)
    train, new = clouds(300, 0), clouds(20, 1)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, new)]
    covariance = np.cov(unit[0].T, bias=True)
    values, vectors = np.linalg.eigh(covariance)
    if directions < 24:
        values[:-directions] = values[:-directions].mean()
    inverse = np.linalg.inv((vectors * (values + 0.01 * np.trace(covariance) / 24)) @ vectors.T)
    expected = [mahalanobis(row, unit[0].mean(axis=0), inverse) / np.sqrt(24) for row in unit[1]]
    assert doubt.fit_foreign(train).distance(new) == pytest.approx(expected, rel=1e-3)


def test_more_directions_than_pictures():
    known = doubt.fit_foreign(clouds(20, 0), clouds(50, 1))
    assert known.is_foreign(clouds(50, 2, centre=-6.0)).mean() > 0.9


def logits(n, seed, *, sure=6.0, classes=3):
    """One class speaks for each ordinary picture."""
    rng = np.random.default_rng(seed)
    said = np.eye(classes)[rng.integers(0, classes, n)] * sure
    return (said + rng.normal(0, 1, (n, classes))).astype(np.float32)


@pytest.mark.parametrize("alarms", [0.01, 0.05])
def test_as_many_ordinary_pictures_are_called_foreign_as_allowed(alarms):
    rates, energetic = [], []
    for s in range(8):
        known = doubt.fit_foreign(clouds(500, s), clouds(300, s + 100), alarms=alarms)
        rates.append(known.is_foreign(clouds(2000, 7)).mean())
        both = clouds(500, s), clouds(300, s + 100), logits(300, s)
        known = doubt.fit_foreign(*both, alarms=alarms)
        energetic.append(known.is_foreign(clouds(2000, 7), logits(2000, 8)).mean())
    assert np.mean(rates) == pytest.approx(alarms, rel=0.5)
    assert np.mean(energetic) == pytest.approx(alarms, rel=0.5)
    alone = doubt.fit_foreign(clouds(500, 0), alarms=alarms).is_foreign(clouds(2000, 7)).mean()
    assert alone == pytest.approx(alarms, rel=0.9)


def test_a_picture_that_no_class_speaks_for_is_foreign_wherever_it_lies():
    known = doubt.fit_foreign(clouds(500, 0), clouds(300, 1), logits(300, 2))
    ordinary, silent = clouds(200, 3), np.zeros((200, 3))
    assert known.is_foreign(ordinary, logits(200, 4)).mean() < 0.12
    assert known.is_foreign(ordinary, silent).mean() > 0.95
    with pytest.raises(ValueError, match="200 distances need as many rows of logits"):
        known.is_foreign(ordinary)


def test_strangeness_by_hand():
    """Deviations above the mean of each part are added, those below it do not count."""
    known = doubt.fit_foreign(clouds(500, 0), clouds(300, 1), logits(300, 2))
    new, said = clouds(5, 3), logits(5, 4)
    far, energy = known.distance(new), -np.log(np.exp(said.astype(float)).sum(axis=1))
    held, spoke = (
        known.distance(clouds(300, 1)),
        -np.log(np.exp(logits(300, 2).astype(float)).sum(axis=1)),
    )
    expected = np.maximum((far - held.mean()) / held.std(), 0)
    expected += np.maximum((energy - spoke.mean()) / spoke.std(), 0)
    assert known.score(new, said) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_model_file_without_scales_knows_the_distance_alone():
    known = doubt.fit_foreign(clouds(500, 0), clouds(300, 1), logits(300, 2))
    older = {k: v for k, v in known.tensors().items() if k != "foreign.scales"}
    back = doubt.Foreign.from_tensors(older)
    assert (back.score(clouds(9, 3)) == back.distance(clouds(9, 3))).all()


def test_pictures_of_another_kind_are_foreign():
    known = doubt.fit_foreign(clouds(500, 0), clouds(300, 1))
    other = clouds(100, 2, centre=-3.0)
    assert known.is_foreign(other).all()
    assert known.farther_than(other).min() > 0.99
    middle = known.farther_than(clouds(1000, 3))
    assert 0.2 < (middle > 0.5).mean() < 0.6
    assert (middle > 0.95).mean() < 0.1


def test_the_halves_follow_the_seed():
    limits = [doubt.fit_foreign(clouds(300, 0), seed=s).limit for s in (0, 0, 1)]
    assert limits[0] == limits[1] != limits[2]


def test_the_model_file_gives_the_same_answers():
    known = doubt.fit_foreign(clouds(200, 0), clouds(100, 1), logits(100, 2))
    back = doubt.Foreign.from_tensors({k: v.copy() for k, v in known.tensors().items()})
    new = clouds(30, 5)
    said = logits(30, 6)
    assert (back.score(new, said) == known.score(new, said)).all()
    assert (back.is_foreign(new, said) == known.is_foreign(new, said)).all()
    with pytest.raises(KeyError, match="foreign.mean"):
        doubt.Foreign.from_tensors({})


def test_features_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="needs four of them, got 3"):
        doubt.fit_foreign(clouds(3, 0))
    with pytest.raises(ValueError, match=r"finite and \[N, D\], got shape \(1, 2\)"):
        doubt.fit_foreign(clouds(5, 0, width=2)).score([[np.nan, 1.0]])
    assert np.isfinite(doubt.fit_foreign(np.zeros((4, 4))).score(np.zeros((1, 4)))).all()


def test_a_chain_that_failed_stays_ended():
    """Five sure mistakes end the first chain; what it would pass later on is not promised."""
    confidence = np.linspace(0.99, 0.6, 1000)
    wrong = (np.arange(1000) < 5) | (np.arange(1000) >= 570)
    probs = np.stack([confidence, 1 - confidence], axis=1)
    result = doubt.abstain(probs, wrong.astype(int), 0.02)
    assert not result.promised
    assert result.validation.accepted > 500  # the best guess
