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
