"""Every number leaves with its interval, and small numbers of photographs say so."""

import numpy as np
import pytest

from vitft import evaluate, summary, trust
from vitft.evaluate import Predictions
from vitft.stats import Interval, wilson

INTERVALS = {
    "macro_f1": Interval(0.5, 0.9),
    "balanced_accuracy": Interval(0.4, 0.8),
    "log_loss": Interval(0.25, 0.75),
}


def scored(sizes, wrong=()):
    """Scores and calibration of classes with so many photographs; `wrong` rows go one class on."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    logits = np.zeros((len(labels), len(sizes)), np.float32)
    said = labels.copy()
    said[list(wrong)] = (said[list(wrong)] + 1) % len(sizes)
    logits[np.arange(len(labels)), said] = 3.0
    predictions = Predictions(logits, labels)
    scores = evaluate.score(predictions, [f"class{k}" for k in range(len(sizes))])
    return scores, trust.calibration(predictions.probabilities(), labels, count=50)


def test_every_headline_number_has_its_interval():
    scores, calibration = scored([40, 60], wrong=[0, 1])
    told = summary.headline(scores, INTERVALS, calibration)
    assert told["accuracy"] == 0.98
    assert told["accuracy_interval"] == vars(wilson(98, 100))
    assert told["macro_f1_interval"] == {"low": 0.5, "high": 0.9}
    assert told["calibration_error_interval"] == vars(calibration.ece_interval)
    assert told["calibration_error_floor"] == calibration.ece_floor
    single = {"n", "majority", "top_k", "calibration_error_floor"}
    numbers = {k for k in told if not k.endswith("_interval")} - single
    assert {f"{k}_interval" for k in numbers} == {k for k in told if k.endswith("_interval")}


def test_the_console_tells_every_class_with_both_intervals():
    scores, calibration = scored([40, 60], wrong=[0, 1])
    first, daisy, other = summary.lines(scores, INTERVALS, calibration)
    assert first.startswith("macro F1 ")
    assert "[50.0, 90.0], balanced accuracy 97.5 % [40.0, 80.0], log loss " in first
    assert "[0.250, 0.750], calibration error " in first
    floor = f"{100 * calibration.ece_floor:.1f}"
    assert first.endswith(f"], where perfect probabilities would show {floor}")
    recall, precision = wilson(38, 40).percent(), wilson(38, 38).percent()
    assert daisy == f"  class0  recall 95.0 % {recall}  precision 100.0 % {precision}  (40)"
    assert other.endswith("(60)")


def test_of_many_classes_the_weakest_are_told():
    scores, calibration = scored([40] * 30, wrong=range(40, 60))  # half of class1
    lines = list(summary.lines(scores, INTERVALS, calibration))
    assert lines[1] == "the 20 weakest of 30 classes; metrics.json has all:"
    assert lines[2].startswith("  class1   recall 50.0 %")
    assert len(lines) == 22


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ([10, 10], "only 20 images: one image is 5.0 points; a first impression, not a"),
        ([35, 35], "70 images: one image is 1.4 points"),
        (
            [200, 9],
            "1 class has fewer than 30 photographs to measure on (class1: only 9 images: one image "
            "is 11 points; a first impression, not a measurement)",
        ),
        ([200, 0, 9], "2 classes have fewer than 30 photographs to measure on (class1: no images"),
    ],
)
def test_small_numbers_say_so_in_words(sizes, words):
    *_, last = summary.lines(*scored(sizes)[:1], INTERVALS, scored(sizes)[1])
    assert last.startswith(words)


def test_large_numbers_need_no_words():
    scores, calibration = scored([60, 60])
    assert summary.few_words(scores) == ""
    assert len(list(summary.lines(scores, INTERVALS, calibration))) == 3
