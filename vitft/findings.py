"""What a run can say about its own numbers: doubt, leaks, wrong labels, calibration.

Everything rests on what the run computed anyway: logits of val and test, and the plain features of
a frozen backbone. Train and val choose (temperature, thresholds), test is only measured. Where the
backbone was trained there are no features that the labels have not shaped, and the parts that need
them are left out and said to be.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitft import audit, curve, doubt, evaluate, io, stats, suspects, trust
from vitft.console import say
from vitft.evaluate import Predictions
from vitft.learn import Learned, extract
from vitft.prepare import Prepared
from vitft.relearn import head_fit, head_seeds, held_out, val_is_known
from vitft.split import SPLITS

ERRORS = (0.01, 0.02, 0.05)  # targets told where the recipe names none
SMALLEST_CLASS = 16  # train photographs of a class from which a curve can be drawn
NEIGHBOURS = 3  # train photographs shown beside a mistake
BLOCK = 256  # scored photographs compared at once
CURVE_STEPS = 300  # of a solve whose answers alone are asked for, not how sure they are
LEAST_TO_KNOW = 4  # train photographs for a distance to them to mean anything
LEAST_PER_FOLD = 4  # photographs of the rarest class for a fold to mean anything
UNSURE = (
    "whether thresholds and the limit for foreign pictures hold: probe.refit let the "
    "head learn from val, where they were chosen; set probe.refit: false to rely on them"
)
SAME = (
    "how the temperature does on other photographs: there is no test split, and the photographs "
    "that are scored chose it; set data.test to see"
)

Linked = Callable[[], audit.Links]  # copies among all photographs, looked for when first asked


@dataclass(frozen=True)
class Findings:
    """Numbers about the numbers; None where a part was switched off or not possible.

    Attributes:
        temperature: Stored in the product and applied to what the report shows.
        before: Calibration of the scored split without it.
        after: The same with it.
        abstain: Threshold chosen on val for the recipe's `trust.max_error`.
        accepted: What that threshold does on the scored split.
        offers: Target error -> threshold chosen on val and what it does on the scored split.
        foreign: What ordinary photographs look like, for predict.
        alarms: Scored photographs that it calls foreign.
        nearest: [n, 3] rows of the index: the train photographs closest to each scored one.
        links: Copies and near-copies among all photographs, where the report tells of them.
        honest: Accuracy with and without linked photographs.
        doubted: Labels that look wrong, over all photographs.
        clean: Accuracy without the scored photographs whose label is doubted.
        growth: Accuracy against the number of training photographs, measured on val.
        gains: What half of each class's photographs is worth, the most valuable first.
        band: Spread of the accuracy over head seeds.
        intervals: Of macro-F1, balanced accuracy and log loss.
        left_out: Why a part is missing, one sentence each.
        seconds: What each part cost.
    """

    temperature: trust.Temperature | None
    before: trust.Calibration
    after: trust.Calibration | None
    abstain: doubt.Abstain | None
    accepted: doubt.Accepted | None
    offers: dict[float, tuple[doubt.Abstain, doubt.Accepted]]
    foreign: doubt.Foreign | None
    alarms: audit.Share | None
    nearest: NDArray[np.int64] | None
    links: audit.Links | None
    honest: audit.Honest | None
    doubted: suspects.Suspects | None
    clean: audit.Share | None
    growth: curve.Curve | None
    gains: tuple[curve.ClassGain, ...]
    band: trust.SeedBand | None
    intervals: dict[str, stats.Interval]
    left_out: tuple[str, ...]
    seconds: dict[str, float]

    @property
    def applied(self) -> float:
        """What logits are divided by wherever a probability is told; 1 where none was fitted."""
        return self.temperature.value if self.temperature else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `metrics.json`; arrays of the size of the data are counted only."""
        out: dict[str, Any] = {
            "temperature": _plain(self.temperature),
            "calibration_before": _plain(self.before),
            "calibration_after": _plain(self.after),
            "abstain": _plain(self.abstain),
            "accepted": _plain(self.accepted),
            "offers": {
                str(k): {"threshold": a.threshold, "promised": a.promised, **asdict(got)}
                for k, (a, got) in self.offers.items()
            },
            "foreign_alarms": _plain(self.alarms),
            "honest": _plain(self.honest),
            "clean": _plain(self.clean),
            "learning_curve": _plain(self.growth),
            "class_gains": [asdict(g) for g in self.gains],
            "seed_band": _plain(self.band),
            "intervals": {k: asdict(v) for k, v in self.intervals.items()},
            "left_out": list(self.left_out),
            "seconds": self.seconds,
        }
        if self.links is not None:
            out["linked_pairs"] = self.links.found
        if self.doubted is not None:
            out["suspects"] = {"found": len(self.doubted.rows), "share": self.doubted.share}
        return out


def _plain(value: Any) -> Any:
    return None if value is None else asdict(value)


def find(p: Prepared, learned: Learned, predictions: Predictions, val: Predictions) -> Findings:
    """Looks for everything the recipe's `trust` section asks for.

    Args:
        p: The run's data and model.
        learned: With plain features where the backbone is frozen.
        predictions: Of the scored split.
        val: Of val.
    """
    spec, clock = p.recipe.trust, _Clock()
    known = val_is_known(p, learned)
    left_out = [UNSURE] if known else []
    x = clock("features", lambda: all_features(p, learned, left_out))
    linked = cache(lambda: clock("leaks", lambda: copies(p, x)))  # for whoever asks first
    links = linked() if spec.audit else None
    fitted = clock("temperature", lambda: _temperature(p, learned, val, x, linked, left_out))
    t = fitted.value if fitted else 1.0
    before = clock("calibration", lambda: _calibration(p, predictions, 1.0))
    after = clock("calibration", lambda: _calibration(p, predictions, t)) if fitted else None
    offers = clock("abstaining", lambda: _offers(spec.max_error, predictions, val, t, known))
    chosen = offers.pop(spec.max_error) if spec.max_error else (None, None)
    doubted = clock("suspects", lambda: _suspects(p, learned, x, linked, left_out))
    growth, gains = clock("learning curve", lambda: _growth(p, learned, x, left_out))
    band = clock("seed band", lambda: _band(p, learned))
    intervals = clock("intervals", lambda: _intervals(p, predictions, t))
    foreign = clock("foreign pictures", lambda: _foreign(p, x, val, left_out))
    nearest = clock("nearest", lambda: _nearest(p, x))
    say(f"what the findings cost: {cost(clock.seconds)}")
    return Findings(
        temperature=fitted,
        before=before,
        after=after,
        abstain=chosen[0],
        accepted=chosen[1],
        offers=offers,
        foreign=foreign,
        alarms=_alarms(p, x, foreign, predictions),
        nearest=nearest,
        links=links,
        honest=_honest(p, links, predictions.right),
        doubted=doubted,
        clean=_clean(p, doubted, predictions.right),
        growth=growth,
        gains=gains,
        band=band,
        intervals=intervals,
        left_out=tuple(left_out),
        seconds=clock.seconds,
    )


class _Clock:
    """Calls a part and keeps what it cost, less what a part within it cost."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, part: Callable[[], Any]) -> Any:
        started, told = time.monotonic(), sum(self.seconds.values())
        out = part()
        within = sum(self.seconds.values()) - told
        took = time.monotonic() - started - within
        self.seconds[name] = self.seconds.get(name, 0.0) + took
        return out


def cost(seconds: Mapping[str, float]) -> str:
    """What each part took, in words; parts that took no time are not named."""
    told = (f"{name} {s:.1f} s" for name, s in seconds.items() if s >= 0.05)
    return ", ".join(told) or "less than 0.1 s each"


# -- the parts ------------------------------------------------------------------------------------


def _calibration(p: Prepared, predictions: Predictions, temperature: float) -> trust.Calibration:
    return trust.calibration(
        predictions.probabilities(temperature),
        predictions.labels,
        count=p.recipe.trust.bootstrap,
        seed=p.recipe.seed,
    )


def _temperature(
    p: Prepared,
    learned: Learned,
    val: Predictions,
    x: NDArray[np.float32] | None,
    linked: Linked,
    left_out: list[str],
) -> trust.Temperature | None:
    """Copies stay in one fold, or they would vouch for each other."""
    if not p.recipe.trust.calibrate:
        return None
    unseen = held_out(p, learned, val, x, lambda: linked().group)
    if unseen.logits is val.logits and p.test_split == "val":
        left_out.append(SAME)
    found = trust.fit_temperature(unseen.logits, unseen.labels, unseen.on)
    say(found.sentence())
    return found


def _offers(
    wanted: float | None,
    predictions: Predictions,
    val: Predictions,
    temperature: float,
    known: bool,
) -> dict[float, tuple[doubt.Abstain, doubt.Accepted]]:
    """For the error that the recipe wants, and for those that the report offers besides."""
    targets = [e for e in (wanted or 0.0, *ERRORS) if e]
    return {e: _offer(predictions, val, temperature, e, known) for e in targets}


def _offer(
    predictions: Predictions, val: Predictions, temperature: float, max_error: float, known: bool
) -> tuple[doubt.Abstain, doubt.Accepted]:
    chosen = doubt.abstain(val.probabilities(temperature), val.labels, max_error)
    if known:
        words = "a best guess, not a promise: probe.refit let the head learn from val"
        chosen = replace(chosen, promised=False, words=words)
    probabilities = predictions.probabilities(temperature)
    return chosen, doubt.accepted(probabilities, predictions.labels, chosen.threshold)


def all_features(p: Prepared, learned: Learned, left_out: list[str]) -> NDArray[np.float32] | None:
    """Plain features [N, D] of every photograph, in the index's order; why not, where none."""
    if not learned.backbone_frozen:
        left_out.append(
            "wrong labels, near-copies by content and foreign pictures need a frozen backbone: "
            "its features are not shaped by these labels"
        )
        return None
    x: NDArray[np.float32] | None = None
    for split in SPLITS:
        rows = p.index.rows(split)
        if len(rows):
            part = learned.features.get(split) or extract(p, split)
            if x is None:
                x = np.empty((len(p.index.labels), part.x.shape[2]), np.float32)
            x[rows] = part.x[0]
    return x


def copies(p: Prepared, x: NDArray[np.float32] | None) -> audit.Links:
    """Copies and near-copies among all photographs."""
    files = [p.index.file(i) for i in range(len(p.index.paths))]
    prints = audit.fingerprints(files, p.index.sha256, p.decode, cache=io.cache_dir() / "prints")
    return audit.link(p.index.sha256, prints, x)


def _honest(
    p: Prepared, links: audit.Links | None, right: NDArray[np.bool_]
) -> audit.Honest | None:
    """Linked here: a copy or near-copy in another split than the scored one."""
    if links is None:
        return None
    rows = p.index.rows(p.test_split)
    elsewhere = np.ones(len(p.index.labels), bool)
    elsewhere[rows] = False
    known = set(links.group[elsewhere].tolist())
    return audit.honest(right, [int(g) in known for g in links.group[rows]])


def _suspects(
    p: Prepared,
    learned: Learned,
    x: NDArray[np.float32] | None,
    linked: Linked,
    left_out: list[str],
) -> suspects.Suspects | None:
    """Copies stay in one fold here as well, whether the report tells of them or not."""
    if x is None or not p.recipe.trust.suspects:
        return None
    counts = np.bincount(p.index.labels, minlength=len(p.index.classes))
    if counts.min() < LEAST_PER_FOLD:
        left_out.append(
            f"wrong labels: the smallest class has {counts.min()} photographs, too few to judge "
            "a label by the others"
        )
        return None
    return suspects.find(
        x,
        p.index.labels,
        fit=head_fit(p, learned),
        classes=len(p.index.classes),
        groups=linked().group,
        seed=p.recipe.seed,
    )


def _growth(
    p: Prepared, learned: Learned, x: NDArray[np.float32] | None, left_out: list[str]
) -> tuple[curve.Curve | None, tuple[curve.ClassGain, ...]]:
    """The curve on val: the test photographs stay out of planning."""
    if x is None or not p.recipe.trust.learning_curve:
        return None, ()
    train, val = p.index.rows("train"), p.index.rows("val")
    y = p.index.labels
    counts = np.bincount(y[train], minlength=len(p.index.classes))
    if counts.min() < SMALLEST_CLASS:
        left_out.append(
            f"the learning curve: the smallest class has {counts.min()} train photographs, "
            f"{SMALLEST_CLASS} are needed"
        )
        return None, ()
    sides = (x[train], y[train], x[val], y[val])
    fit, seed = head_fit(p, learned, steps=CURVE_STEPS), p.recipe.seed
    known = curve.whole(*sides, fit=fit)
    growth = curve.learning_curve(*sides, fit=fit, classes=len(counts), seed=seed, known=known)
    gains = curve.class_gains(*sides, fit=fit, classes=p.index.classes, seed=seed, known=known)
    return growth, tuple(sorted(gains, key=lambda g: -g.loss))


def _clean(
    p: Prepared, doubted: suspects.Suspects | None, right: NDArray[np.bool_]
) -> audit.Share | None:
    """Accuracy on the scored photographs whose label is not doubted."""
    if doubted is None:
        return None
    rows = p.index.rows(p.test_split)
    trusted = ~np.isin(rows, doubted.rows)
    k, n = int(right[trusted].sum()), int(trusted.sum())
    return audit.Share(k, n, k / n if n else float("nan"), stats.wilson(k, n))


def _nearest(p: Prepared, x: NDArray[np.float32] | None) -> NDArray[np.int64] | None:
    """By cosine of the features, the closest first, in blocks so that memory stays flat."""
    if x is None:
        return None
    train, scored = p.index.rows("train"), p.index.rows(p.test_split)
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    known = unit[train].T  # [D, n_train]
    k = min(NEIGHBOURS, len(train))
    blocks = np.array_split(scored, max(1, len(scored) // BLOCK))
    return np.concatenate(
        [train[np.argsort(-(unit[b] @ known), axis=1, kind="stable")[:, :k]] for b in blocks]
    )


def _foreign(
    p: Prepared, x: NDArray[np.float32] | None, val: Predictions, left_out: list[str]
) -> doubt.Foreign | None:
    """Strangeness against train, its limit from val."""
    if x is None:
        return None
    train, rows = p.index.rows("train"), p.index.rows("val")
    if len(train) < LEAST_TO_KNOW:
        left_out.append(
            f"foreign pictures: {len(train)} train photographs are too few to be unlike them"
        )
        return None
    alarms, seed = p.recipe.trust.foreign_alarms, p.recipe.seed
    return doubt.fit_foreign(x[train], x[rows], val.logits, alarms=alarms, seed=seed)


def _alarms(
    p: Prepared,
    x: NDArray[np.float32] | None,
    foreign: doubt.Foreign | None,
    predictions: Predictions,
) -> audit.Share | None:
    """Scored photographs that are called foreign, all by mistake as far as is known."""
    if x is None or foreign is None:
        return None
    called = foreign.is_foreign(x[p.index.rows(p.test_split)], predictions.logits)
    k, n = int(called.sum()), len(called)
    return audit.Share(k, n, k / n, stats.wilson(k, n))


def _band(p: Prepared, learned: Learned) -> trust.SeedBand | None:
    what, accuracies = head_seeds(p, learned)
    if not accuracies:
        return None
    band = trust.seed_band(accuracies, what)
    say(band.sentence())
    return band


def _intervals(
    p: Prepared, predictions: Predictions, temperature: float
) -> dict[str, stats.Interval]:
    """Of the numbers that stand beside the accuracy."""
    count, seed = p.recipe.trust.bootstrap, p.recipe.seed
    guess = predictions.logits.argmax(axis=1)
    c = len(p.index.classes)
    confusion = np.bincount(predictions.labels * c + guess, minlength=c * c).reshape(c, c)
    losses = -np.log(
        np.maximum(
            predictions.probabilities(temperature)[np.arange(len(guess)), predictions.labels],
            stats.FLOOR,  # of the value told beside it
        )
    )
    return {
        "macro_f1": evaluate.macro_f1_interval(confusion, count=count, seed=seed),
        "balanced_accuracy": evaluate.balanced_interval(confusion),
        "log_loss": trust.log_loss_interval(losses, c),
    }
