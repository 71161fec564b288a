"""Scores and their intervals -> the same numbers everywhere: metrics.json, the Card, the console.

Nothing is measured here. A number without its interval is not a number yet, so they leave together.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from vitft.errors import escape
from vitft.evaluate import ClassScore, Scores
from vitft.stats import FEW, Interval, in_words
from vitft.trust import Calibration

LISTED = 20  # classes told on the console; of more, the weakest


def headline(
    scores: Scores, intervals: Mapping[str, Interval], calibration: Calibration
) -> dict[str, Any]:
    """The headline numbers, each with `<name>_interval`; fractions 0 to 1.

    A few photographs show a calibration error however right the probabilities are: how large it
    would be is `calibration_error_floor`.

    Args:
        scores: Of the scored split, the log loss with the temperature that predict applies.
        intervals: Of `balanced_accuracy`, `macro_f1` and `log_loss`.
        calibration: Of the probabilities that predictions.csv holds.
    """
    spread = {f"{name}_interval": asdict(interval) for name, interval in intervals.items()}
    return {
        "n": scores.n,
        "accuracy": scores.accuracy,
        "accuracy_interval": asdict(scores.accuracy_interval),
        "balanced_accuracy": scores.balanced_accuracy,
        "macro_f1": scores.macro_f1,
        "log_loss": scores.log_loss,
        "calibration_error": calibration.ece,
        "calibration_error_interval": asdict(calibration.ece_interval),
        "calibration_error_floor": calibration.ece_floor,
        **spread,
        "majority": scores.majority,
        "top_k": {str(k): v for k, v in scores.top_k.items()},
    }


def lines(
    scores: Scores, intervals: Mapping[str, Interval], calibration: Calibration
) -> Iterator[str]:
    """What the console says beside the accuracy: every number with its 95 % interval."""
    f1, balanced, loss = (intervals[k] for k in ("macro_f1", "balanced_accuracy", "log_loss"))
    yield (
        f"macro F1 {_percent(scores.macro_f1, f1)}, balanced accuracy"
        f" {_percent(scores.balanced_accuracy, balanced)}, log loss {scores.log_loss:.3f}"
        f" [{loss.low:.3f}, {loss.high:.3f}], calibration error"
        f" {100 * calibration.ece:.1f} points {calibration.ece_interval.percent()}, where perfect"
        f" probabilities would show {100 * calibration.ece_floor:.1f}"
    )
    # By the upper end: a class that is surely found seldom, not one with three photographs.
    ranked = sorted(scores.per_class, key=lambda c: c.recall_interval.high)
    shown = scores.per_class if len(ranked) <= LISTED else ranked[:LISTED]
    if len(ranked) > LISTED:
        yield f"the {LISTED} weakest of {len(ranked):,} classes; metrics.json has all:"
    width = max(len(escape(c.name)) for c in shown)
    yield from (_class(c, width) for c in shown)
    words = in_words(scores.n)
    if words:
        yield words
    elif few_words(scores):
        yield few_words(scores)


def few_words(scores: Scores) -> str:
    """What a reader should know about classes with few photographs; empty where none has."""
    few = [c for c in scores.per_class if c.support < FEW]
    if not few:
        return ""
    least = min(few, key=lambda c: c.support)
    has = "1 class has" if len(few) == 1 else f"{len(few):,} classes have"
    return (
        f"{has} fewer than {FEW} photographs to measure on"
        f" ({escape(least.name)}: {in_words(least.support)})"
    )


def _class(c: ClassScore, width: int) -> str:
    return (
        f"  {escape(c.name):{width}}  recall {_percent(c.recall, c.recall_interval)}"
        f"  precision {_percent(c.precision, c.precision_interval)}  ({c.support:,})"
    )


def _percent(value: float, interval: Interval) -> str:
    return f"{100 * value:.1f} % {interval.percent()}"
