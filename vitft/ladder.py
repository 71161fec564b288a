"""From cheap to dear, as long as it is worth it: `mode: ladder`.

Each step is measured on val against the step before, photograph by photograph. The ladder stops at
the first gain that cannot be told from luck, and keeps the cheaper step; only then is the test
split looked at, once. Neighbours can be a step but not the product: they are no linear head.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from vitft import evaluate, model, stats
from vitft.console import say
from vitft.evaluate import Predictions
from vitft.learn import (
    Hooks,
    Learned,
    extract,
    fine_tune,
    head_predictions,
    require_frozen,
    solve_head,
    train_head,
)
from vitft.prepare import Prepared

LINEAR = ("ridge", "logistic")


@dataclass(frozen=True)
class Rung:
    """One step.

    Attributes:
        name: As in the recipe.
        accuracy: On val, 0 to 1.
        interval: Wilson.
        gain: Over the step that was kept before; None for the first.
        seconds: What the step cost, beyond what earlier ones had computed already.
        kept: Whether it is the best so far.
    """

    name: str
    accuracy: float
    interval: stats.Interval
    gain: stats.Difference | None
    seconds: float
    kept: bool

    def sentence(self, before: str | None) -> str:
        """The step as one line."""
        line = f"{self.name}: val {100 * self.accuracy:.1f} % {self.interval.percent()}"
        line += f", {self.seconds:.1f} s"
        if self.gain is None or before is None:
            return line
        return f"{line}; {self.gain.sentence(before, self.name)}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for metrics."""
        return asdict(self) | {"step": self.name}


@dataclass(frozen=True)
class _Tried:
    """A step's answers on val and, where it is a model, the way to have it."""

    predictions: Predictions
    learned: Learned | None
    state: dict[str, Tensor] | None


def climb(p: Prepared, hooks: Hooks) -> Learned:
    """Tries the recipe's steps in order; the model holds the kept one at the end.

    Returns:
        The kept step's Learned, with every step tried in `rungs`.
    """
    unseen = replace(p, recipe=_without_val(p))
    ways: dict[str, Callable[[], _Tried]] = {
        "knn": lambda: _neighbours(p),
        **{kind: lambda kind=kind: _solved(unseen, hooks, kind) for kind in LINEAR},  # type: ignore[misc]
        "head": lambda: _trained(p, hooks),
        "blocks": lambda: _tuned(p, hooks),
        "full": lambda: _tuned(replace(p, recipe=_all_blocks(p)), hooks),
    }
    start = {k: v.clone() for k, v in p.net.state_dict().items()}
    kept: _Tried | None = None
    name = ""
    rungs: list[Rung] = []
    for step in p.recipe.ladder.steps:
        p.net.load_state_dict(start)
        began = time.monotonic()
        tried = ways[step]()
        rung = _measure(step, tried, kept, time.monotonic() - began)
        rungs.append(rung)
        hooks.on_record(rung.as_dict())
        say(rung.sentence(name or None))
        better = rung.gain is None or (rung.gain.distinguishable and rung.gain.estimate > 0)
        only_neighbours = kept is None or kept.learned is None
        if better or only_neighbours:
            kept, name = tried, step
        if not better and p.recipe.ladder.stop and kept is not None and kept.learned is not None:
            said = f"the gain of {step} cannot be told from luck: the ladder ends, {name} is kept"
            left = step != p.recipe.ladder.steps[-1]
            say(f"{said}; ladder.stop=false would try the rest too" if left else said)
            break
    return _keep(p, kept, rungs, name)


def _keep(p: Prepared, kept: _Tried | None, rungs: list[Rung], name: str) -> Learned:
    if kept is None or kept.learned is None or kept.state is None:
        say("neighbours are no linear head: logistic regression becomes the model")
        kept, name = _solved(p, Hooks(), "logistic"), "logistic"
    if kept.learned is None or kept.state is None:
        raise ValueError("a solved step has a model")
    p.net.load_state_dict(kept.state)
    learned = kept.learned
    if p.recipe.probe.refit and (kind := learned.solved):
        learned = require_frozen(p, lambda: solve_head(p, Hooks(), kind))
    marked = [replace(r, kept=r.name == name).as_dict() for r in rungs]
    return replace(learned, rungs=tuple(marked))


def _measure(step: str, tried: _Tried, before: _Tried | None, seconds: float) -> Rung:
    right = tried.predictions.right
    k, n = int(right.sum()), len(right)
    gain = None
    if before is not None:
        labels = tried.predictions.labels
        gain = stats.difference(before.predictions.right, right, strata=labels)
    return Rung(step, k / n, stats.wilson(k, n), gain, seconds, False)


def _neighbours(p: Prepared) -> _Tried:
    from vitft import neighbours

    train, val = extract(p, "train"), extract(p, "val")
    found = neighbours.knn(
        train.x[0],
        train.y,
        val.x[0],
        val.y,
        val.x[0],
        classes=len(p.index.classes),
        device=p.device,
    )
    scores = np.log(np.maximum(found.scores, np.finfo(np.float32).tiny))
    return _Tried(Predictions(scores, val.y), None, None)


def _solved(p: Prepared, hooks: Hooks, kind: str) -> _Tried:
    quiet = replace(hooks, on_record=lambda record: None)
    learned = require_frozen(p, lambda: solve_head(p, quiet, kind))
    return _kept(p, learned)


def _trained(p: Prepared, hooks: Hooks) -> _Tried:
    quiet = replace(hooks, on_record=lambda record: None, save=None)
    return _kept(p, require_frozen(p, lambda: train_head(p, quiet)))


def _tuned(p: Prepared, hooks: Hooks) -> _Tried:
    quiet = replace(hooks, on_record=lambda record: None, save=None)
    return _kept(p, fine_tune(p, quiet))


def _kept(p: Prepared, learned: Learned) -> _Tried:
    if learned.backbone_frozen:
        predictions = head_predictions(model.classifier(p.net), extract(p, "val"), p.device)
    else:
        batches = p.batches(p.photos("val")).epoch(0)
        predictions = evaluate.predict(p.net, batches, autocast=p.half)
    state = {k: v.detach().clone() for k, v in p.net.state_dict().items()}
    return _Tried(predictions, learned, state)


def _without_val(p: Prepared) -> Any:
    """A head that has learned from val cannot be measured there against one that has not."""
    return p.recipe.model_copy(update={"probe": p.recipe.probe.model_copy(update={"refit": False})})


def _all_blocks(p: Prepared) -> Any:
    return p.recipe.model_copy(update={"train": p.recipe.train.model_copy(update={"blocks": None})})
