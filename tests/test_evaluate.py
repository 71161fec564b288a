"""Scores against hand-computed answers and scikit-learn; predictions in order, complete."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from sklearn import metrics

from vitft import evaluate
from vitft.evaluate import (
    Predictions,
    accuracy,
    balanced_interval,
    log_loss,
    macro_f1_interval,
    predict,
    score,
    whole_floats,
)
from vitft.stats import softmax, wilson

CLASSES = ("a", "b", "c", "empty")


def hand_made():
    """Six photographs; a: 2 right, 1 as b; b: 1 right, 1 as c; c: 1 right; `empty` has none."""
    labels = np.array([0, 0, 0, 1, 1, 2])
    guesses = np.array([0, 0, 1, 1, 2, 2])
    logits = np.full((6, 4), -1.0, dtype=np.float32)
    logits[np.arange(6), guesses] = 2.0
    return Predictions(logits, labels)


def test_scores_equal_the_hand_computed_ones():
    s = score(hand_made(), CLASSES)
    assert s.n == 6
    assert s.confusion.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert s.accuracy == 4 / 6
    assert s.accuracy_interval == wilson(4, 6)
    assert s.majority == 3 / 6
    assert s.balanced_accuracy == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    a, b, c, empty = s.per_class
    assert (a.precision, a.recall, a.support) == (1.0, 2 / 3, 3)
    assert a.f1 == pytest.approx(0.8)
    assert (b.precision, b.recall) == (0.5, 0.5)
    assert (c.precision, c.recall) == (0.5, 1.0)
    assert (empty.precision, empty.recall, empty.f1, empty.support) == (0, 0, 0, 0)
    assert b.recall_interval == wilson(1, 2)
    assert s.macro_f1 == pytest.approx((0.8 + 0.5 + 2 / 3 + 0) / 4)


def test_per_class_numbers_equal_scikit_learns():
    rng = np.random.default_rng(0)
    p = Predictions(rng.normal(size=(200, 4)).astype(np.float32), rng.integers(0, 4, 200))
    s = score(p, CLASSES)
    guess = p.logits.argmax(1)
    expected = metrics.precision_recall_fscore_support(p.labels, guess, labels=range(4))
    got = [[getattr(c, k) for c in s.per_class] for k in ("precision", "recall", "f1", "support")]
    np.testing.assert_allclose(got, expected)
    assert s.log_loss == pytest.approx(metrics.log_loss(p.labels, p.probabilities()))
    assert log_loss(p) == pytest.approx(s.log_loss)
    warm = score(p, CLASSES, 2.0)
    assert warm.log_loss == pytest.approx(metrics.log_loss(p.labels, p.probabilities(2.0)))
    assert warm.log_loss != pytest.approx(s.log_loss)
    assert accuracy(p) == s.accuracy
    assert s.top_k[3] == pytest.approx(
        metrics.top_k_accuracy_score(p.labels, p.logits, k=3, labels=range(4))
    )


def test_top_k_is_only_told_where_it_says_something():
    two = Predictions(np.eye(2, dtype=np.float32), np.array([0, 1]))
    assert score(two, ("a", "b")).top_k == {}
    assert set(score(hand_made(), CLASSES).top_k) == {3}


def test_probabilities_sum_to_one_and_a_temperature_flattens_them():
    logits = np.array([[1000.0, 0.0, -1000.0], [1.0, 2.0, 3.0]], dtype=np.float32)
    p = softmax(logits)
    np.testing.assert_allclose(p.sum(1), 1)
    assert softmax(logits, 10.0)[1].max() < p[1].max()


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (np.zeros((2, 3), np.float32), np.array([0, 1])),
        (np.zeros((2, 4), np.float32), np.array([0, 4])),
        (np.zeros((2, 4), np.float32), np.array([-1, 0])),
        (np.zeros((0, 4), np.float32), np.array([], dtype=np.int64)),
    ],
)
def test_what_does_not_fit_the_classes_is_refused(logits, labels):
    with pytest.raises(ValueError, match="not 4 classes"):
        score(Predictions(logits, labels), CLASSES)


def test_predictions_keep_order_and_number():
    net = torch.nn.Linear(2, 3)
    x = torch.randn(7, 2)
    batches = [(x[i : i + 3], torch.arange(i, min(i + 3, 7)) % 3, None) for i in (0, 3, 6)]
    p = predict(net.train(), batches)
    np.testing.assert_allclose(p.logits, net(x).detach().numpy(), rtol=1e-4, atol=1e-6)
    assert p.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert not net.training


# -- intervals over classes -----------------------------------------------------------------------


def test_all_right_on_few_photographs_is_not_certain():
    """A bootstrap would say 100 to 100 %, for it never draws a mistake."""
    confusion = np.diag([9, 4, 2, 1])
    gaps = [1 - wilson(n, n).low for n in (9, 4, 2, 1)]
    found = balanced_interval(confusion)
    assert found.low == pytest.approx(1 - np.sqrt(np.square(gaps).sum()) / 4)
    assert found.high == 1
    f1 = macro_f1_interval(confusion, count=100, seed=0)
    assert 0.5 < f1.low < 0.95
    assert f1.high == 1


def test_classes_without_photographs_count_as_in_the_scores():
    confusion = np.array([[5, 1, 0, 0], [0, 0, 0, 0], [1, 0, 4, 0], [0, 0, 0, 0]])
    two = balanced_interval(confusion)
    assert two == balanced_interval(np.array([[5, 1], [1, 4]]))
    f1 = macro_f1_interval(confusion, count=500, seed=0)
    assert f1.low < (10 / 12 + 0 + 8 / 9 + 0) / 4 < f1.high <= 3 / 4  # of four, one never counts


@pytest.mark.parametrize(("sizes", "least"), [([3] * 5, 85), ([9, 4, 2, 1], 85), ([40] * 4, 88)])
def test_the_intervals_hold_the_truth_as_often_as_they_say(sizes, least):
    """95 % of all tests, but for the noise of 150; a bootstrap alone holds it in 36 to 95 %."""
    draws, c, held = np.random.default_rng(0), len(sizes), np.zeros(2)
    truth = np.full((c, c), 0.1 / (c - 1)) + np.eye(c) * (0.9 - 0.1 / (c - 1))
    wanted = np.array(sizes)[:, None] * truth
    f1 = (2 * np.diag(wanted) / (wanted.sum(0) + wanted.sum(1))).mean()
    for seed in range(150):
        seen = np.stack([draws.multinomial(n, row) for n, row in zip(sizes, truth, strict=True)])
        found = balanced_interval(seen), macro_f1_interval(seen, count=200, seed=seed)
        held += [0.9 in found[0], f1 in found[1]]
    assert (100 * held / 150 >= least).all(), held / 150


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("device", "kept"), [("cpu", True), ("cuda", False)])
def test_on_cuda_float32_convolutions_are_not_rounded_while_something_is_measured(
    monkeypatch, before, device, kept
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", before)
    with whole_floats(torch.device(device)):
        assert torch.backends.cudnn.allow_tf32 is (before and kept)
    assert torch.backends.cudnn.allow_tf32 is before


def test_where_a_host_chose_for_convolutions_alone_a_cpu_is_not_concerned():
    """Torch then refuses to say what it does for all of cuDNN."""
    convolutions = torch.backends.cudnn.conv
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    try:
        with pytest.raises(RuntimeError, match="TF32"):
            torch.backends.cudnn.allow_tf32  # noqa: B018
        assert evaluate.in_fixed_shape(lambda x: x, torch.zeros(2, 3)).shape == (2, 3)
    finally:
        convolutions.fp32_precision = before


def test_every_forward_that_is_compared_runs_so(monkeypatch):
    entered = []

    @contextmanager
    def noted(device):
        entered.append(device.type)
        yield

    monkeypatch.setattr(evaluate, "whole_floats", noted)
    evaluate.in_fixed_shape(lambda x: x, torch.zeros(2, 3))
    assert entered == ["cpu"]
