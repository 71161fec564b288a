"""The three modes, each ending in the same thing: a model that was learned from train and val.

    probe   features of the plain transform -> a solved linear head, its strength chosen on val
    head    features of V augmented views   -> the training loop over the head alone
    full    photographs                     -> the training loop over all, or the last K blocks

What comes after (evaluation, report, export, prediction) never asks which one it was. The test
photographs are not learned from.

Several ranks share the features of all modes. What is solved or trained on features alone is the
first rank's work; where photographs run through the model being trained, all make its steps.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vitft import boundary, evaluate, features, model, train, tune
from vitft.checkpoint import Snapshot
from vitft.console import say, warn
from vitft.errors import VitftError
from vitft.evaluate import Predictions
from vitft.features import Features
from vitft.inputs import derive_seed
from vitft.photos import Photos
from vitft.prepare import (
    Prepared,
    batch_size,
    class_weight,
    frozen_cnn,
    kept_views,
    trains_model,
)
from vitft.regime import set_train_mode

Rows = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Learned:
    """What was learned and how.

    Attributes:
        history: One record per epoch, or per strength tried.
        best: The record that val chose.
        features: Split -> plain features [1, N, D] where the mode computed them.
        backbone_frozen: The backbone's hash was equal before and after; None in mode full.
        train_views: Features [V, N, D] the head was trained on, where it was.
        rungs: Records of a ladder's steps.
        solved: `logistic` or `ridge`, where the head was solved rather than trained.
        trained: How many parameters were trained, and of how many, in words.
        probe_start: Share of val that the probe named rightly with which training began, if so.
    """

    history: tuple[dict[str, Any], ...]
    best: dict[str, Any]
    features: dict[str, Features]
    backbone_frozen: bool | None
    train_views: Features | None = None
    rungs: tuple[dict[str, Any], ...] = ()
    solved: str = ""
    trained: str = ""
    probe_start: float | None = None


@dataclass(frozen=True)
class Hooks:
    """The run's side of training.

    Attributes:
        on_record: Takes each record as it is made.
        save: Keeps a snapshot; None where there is nothing worth keeping.
        resume: What to go on from.
        listen: While the loop is in this context, signals are not obeyed at once but told by the
            function it gives, so that a step is finished and saved; elsewhere they end the run.
    """

    on_record: Callable[[dict[str, Any]], None] = lambda record: None
    save: Callable[[Snapshot], None] | None = None
    resume: Snapshot | None = None
    listen: Callable[[], AbstractContextManager[Callable[[], int | None]]] = lambda: nullcontext(
        lambda: None
    )


def share_features(p: Prepared) -> Prepared:
    """Leaves the first rank alone with the features of every split, where these are all it needs.

    Returns:
        The run that goes on; the process of any other rank ends here.
    """
    if p.ranks.world == 1 or trains_model(p.recipe):
        return p
    model.freeze_backbone(p.net)
    views = kept_views(p.recipe)
    for split in ("train", "val", "test"):
        if len(p.index.rows(split)):
            extract(p, split)
    if views > 1:
        extract(p, "train", views=views)
    return replace(p, ranks=p.ranks.alone())


def learn(p: Prepared, hooks: Hooks) -> Learned:
    """Trains or solves what the recipe's mode says; the result is in `p.net`.

    Raises:
        DivergedError: Loss or weights are not finite.
        Stopped: A signal came; a checkpoint was saved.
        VitftError: `train.not_frozen`: a frozen backbone changed (a bug of ours; never seen).
    """
    if p.recipe.mode == "full":
        return fine_tune(p, hooks)
    solve = p.recipe.mode == "probe"
    kind = p.recipe.probe.kind
    return require_frozen(p, lambda: solve_head(p, hooks, kind) if solve else train_head(p, hooks))


def require_frozen(p: Prepared, work: Callable[[], Learned]) -> Learned:
    """Does the work with a frozen backbone and proves that it stayed as it was."""
    model.freeze_backbone(p.net)
    before = model.backbone_fingerprint(p.net)
    learned = work()
    if model.backbone_fingerprint(p.net) != before:
        raise _changed(p, "the frozen backbone's")
    return replace(learned, backbone_frozen=True, trained=tune.sentence(p.net, "head"))


def _changed(p: Prepared, whose: str) -> VitftError:
    text = f"{whose} sha256 changed during training"
    return VitftError.of("train.not_frozen", p.recipe.model.name, text, "report this as a bug")


def solve_head(p: Prepared, hooks: Hooks, kind: str) -> Learned:
    """A linear head on plain features, by `logistic` regression or `ridge`."""
    from vitft import probe

    spec, classes = p.recipe.probe, len(p.index.classes)
    seen = {split: extract(p, split) for split in ("train", "val")}
    x, y = seen["train"].x[0], seen["train"].y
    x_val, y_val = seen["val"].x[0], seen["val"].y
    solve = {"logistic": probe.logistic_path, "ridge": probe.ridge_path}[kind]
    solved = solve(
        x,
        y,
        x_val,
        y_val,
        classes=classes,
        strengths=spec.strengths,
        tol=spec.tol,
        max_iter=spec.max_iter,
        refit=spec.refit,
        device=p.device,
    )
    head = model.classifier(p.net)
    model.set_head(head, torch.as_tensor(solved.weight), torch.as_tensor(solved.bias))
    history = tuple({**r, "chosen": r["strength"] == solved.strength} for r in solved.table)
    for record in history:
        hooks.on_record(record)
    best = next(r for r in history if r["chosen"])
    say(f"{kind}: strength {solved.strength:.3g}, val accuracy {100 * best['val_accuracy']:.1f} %")
    return Learned(history, best, seen, None, solved=kind)


def train_head(p: Prepared, hooks: Hooks) -> Learned:
    """The head through the training loop, on cached views or through the backbone."""
    if p.recipe.head.views == "online":
        start = _init_head(p, lambda: extract(p, "train"))
        result = _fit_photos(p, hooks)
        _tell_kept(p, result, start)
        return Learned(result.history, result.best, {}, None, probe_start=start)
    seen = {"val": extract(p, "val")}
    views = int(p.recipe.head.views)
    cached = extract(p, "train", views=views)
    if views == 1:
        seen["train"] = cached
    rows = view_batches(p, cached, p.recipe.seed)
    start = _init_head(p, lambda: cached)
    result = fit(p, model.classifier(p.net), rows, hooks, predict=of_head(p, seen["val"]))
    _tell_kept(p, result, start)
    return Learned(result.history, result.best, seen, None, cached, probe_start=start)


def some(cached: Features, rows: Ints | None) -> Features:
    """Views of some of its photographs; None is all."""
    if rows is None:
        return cached
    return replace(cached, x=cached.x[:, rows], y=cached.y[rows])


def view_batches(
    p: Prepared, cached: Features, seed: int, rows: Ints | None = None
) -> features.Views:
    """Cached views of train, or of some of its rows, as the training loop takes them."""
    files = p.photos("train").files
    if rows is not None:
        files = tuple(files[i] for i in rows)
    return features.Views(
        some(cached, rows),
        batch_size=batch_size(p.recipe.train, p.device),
        seed=seed,
        device=p.device,
        names=files,
        balanced=p.recipe.train.sampling == "balanced",
    )


def fine_tune(p: Prepared, hooks: Hooks) -> Learned:
    """All parameters, the last K blocks, or few (`train.tune`); the rest is proven unchanged."""
    spec = p.recipe.train
    model.choose_trained(p.net, spec.blocks, frozen_cnn=frozen_cnn(p.recipe))
    if spec.grad_checkpointing:
        cast(Any, p.net).set_grad_checkpointing(True)
    if spec.patch_drop:
        model.drop_patches(p.net, spec.patch_drop)
    tail = spec.views != "online" and spec.blocks is not None
    if tail:
        p.ranks.agreed(lambda: boundary.check_budget(p, int(spec.views)))
    start = _init_head(p, lambda: extract(p, "train"))
    trained = _choose_trained(p)
    frozen = model.frozen_fingerprint(p.net)
    result = _fit_tail(p, hooks, int(spec.views)) if tail else _fit_photos(p, hooks)
    p.net.eval()
    if model.frozen_fingerprint(p.net) != frozen:
        raise _changed(p, "the frozen part's")
    _tell_kept(p, result, start)
    _merge(p)
    return Learned(result.history, result.best, {}, None, trained=trained, probe_start=start)


def _tell_kept(p: Prepared, result: train.Result, start: float | None) -> None:
    """Which epoch's weights the model has, and whether training was worth more than its start."""
    kept = f"the model is that of epoch {result.best['epoch']} of {len(result.history)}, "
    kept += "its averaged weights, " * (result.weights == "ema")
    say(f"{kept}val accuracy {100 * result.best['val_accuracy']:.1f} %")
    if start is not None and result.best["val_accuracy"] < start:
        text = f"no epoch came up to the linear probe that training began from, {100 * start:.1f} %"
        warn(f"{text} of val: lower train.lr, or be content with mode: probe")


def _choose_trained(p: Prepared) -> str:
    """Adapters, biases or norms, and a hybrid's CNN or not; says how much that is."""
    spec = p.recipe.train
    if spec.tune != "all":
        tune.apply(p.net, spec, seed=derive_seed(p.recipe.seed, "lora"))
        if frozen_cnn(p.recipe):
            model.freeze_cnn(p.net)
    trained = tune.sentence(p.net, f"train.tune {spec.tune}")
    if spec.blocks is not None:
        trained += f", in the last {spec.blocks} of {len(cast(Any, p.net).blocks)} blocks"
        trained += " and behind them"
    say(trained)
    return trained


def _merge(p: Prepared) -> None:
    """After this the model has the names of any other, whatever was trained."""
    generator = torch.Generator().manual_seed(p.recipe.seed)
    images = torch.randn(2, 3, *p.config.size, generator=generator).to(p.device)
    gap = tune.merge(p.net, images)
    if p.recipe.train.tune == "lora":
        say(f"adapters merged into the weights; logits differ by {gap:.1e} at most (relative)")


def _fit_photos(p: Prepared, hooks: Hooks) -> train.Result:
    batches = p.batches(p.photos("train", augment=True, keep=True), train=True)
    return fit(p, p.net, batches, hooks)


def _fit_tail(p: Prepared, hooks: Hooks, views: int) -> train.Result:
    """The last blocks on activations that were computed once."""
    kept, val = boundary.keep(p, "train", views=views), boundary.keep(p, "val", views=1)
    part = boundary.tail(p.net, int(p.recipe.train.blocks or 0))
    return fit(
        p,
        part,
        boundary.batches(p, kept),
        hooks,
        predict=_shared(p, "val", lambda net, rows: boundary.predict(net, val, p.device, rows)),
    )


def _init_head(p: Prepared, train_features: Callable[[], Features]) -> float | None:
    """The model's own head where it begins; a family of timm's that draws it well is left alone.

    Returns:
        Share of val that the probe names rightly; None without one.
    """
    head = model.classifier(p.net)
    if p.recipe.train.init_head == "fresh" and not model.starts_wide(head):
        return None
    seed = derive_seed(p.recipe.seed, "head")
    right = begin(p, head, seed, lambda: (train_features(), extract(p, "val")))
    if right is not None:
        say(f"the head starts from a linear probe: val accuracy {100 * right:.1f} %")
    return right


def begin(
    p: Prepared, head: nn.Linear, seed: int, rows: Callable[[], tuple[Features, Features]]
) -> float | None:
    """`fresh`: at random, narrow; `zero` clears it; `probe`: from the linear probe (LP-FT).

    Args:
        p: The run, whose `train.init_head` counts.
        head: Changed in place.
        seed: Of what is drawn.
        rows: Gives what a probe is solved on, in its first view, and val, which chooses.

    Returns:
        Share of val that the probe names rightly; None without one.
    """
    kind, spec = p.recipe.train.init_head, p.recipe.probe
    if kind == "fresh":
        model.start_head(head, seed)
    if kind == "zero":
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    if kind != "probe":
        return None
    from vitft import probe

    known, val = rows()
    solved = p.ranks.first_does(
        lambda: probe.logistic_path(
            known.x[0],
            known.y,
            val.x[0],
            val.y,
            classes=len(p.index.classes),
            strengths=spec.strengths,
            tol=spec.tol,
            max_iter=spec.max_iter,
            device=p.device,
        )
    )
    model.set_head(head, torch.as_tensor(solved.weight), torch.as_tensor(solved.bias))
    right: float = next(r for r in solved.table if r["strength"] == solved.strength)["val_accuracy"]
    return right


def fit(
    p: Prepared,
    net: nn.Module,
    batches: train.Batches,
    hooks: Hooks,
    *,
    predict: Callable[[nn.Module], Predictions] | None = None,
) -> train.Result:
    """The training loop over a model, a part of it or a head, as the recipe says.

    Args:
        p: The run's data and model.
        net: What is trained, in place.
        batches: That it learns from.
        hooks: The run's side.
        predict: Its answers on val; by default of a whole model.
    """
    spec = p.recipe.train
    with hooks.listen() as stop:
        trainer = train.Trainer(
            net,
            batches,
            spec,
            seed=p.recipe.seed,
            validate=_validation(predict or _of_model(p)),
            soft=net is p.net and bool(spec.mixup or spec.cutmix),
            class_weight=class_weight(p),
            on_record=hooks.on_record,
            save=hooks.save,
            stop=stop,
            ranks=p.ranks,
        )
        return trainer.fit(hooks.resume)


def _validation(predict: Callable[[nn.Module], Predictions]) -> train.Validate:
    """Accuracy and log loss on val."""

    def validate(net: nn.Module) -> tuple[float, float]:
        predictions = predict(net)
        set_train_mode(net)
        return evaluate.accuracy(predictions), evaluate.log_loss(predictions)

    return validate


def _of_model(p: Prepared) -> Callable[[nn.Module], Predictions]:
    """A whole model's answers on the photographs of val."""
    return _answers(p, "val", p.photos("val", keep=True))


def predictions(p: Prepared, net: nn.Module, split: str) -> Predictions:
    """A whole model's answers on a split, one for each photograph."""
    return _answers(p, split, p.photos(split))(net)


def _answers(p: Prepared, split: str, photos: Photos) -> Callable[[nn.Module], Predictions]:
    def predict(net: nn.Module, rows: Ints) -> Predictions:
        return evaluate.predict(net, p.batches(photos).epoch(0, rows=rows), autocast=p.half)

    return _shared(p, split, predict)


def _shared(
    p: Prepared, split: str, predict: Callable[[nn.Module, Ints], Predictions]
) -> Callable[[nn.Module], Predictions]:
    """Each rank asks the model about its rows; all get all answers, and so decide alike."""
    count = len(p.index.rows(split))
    rows = p.ranks.share(count)

    def ask(net: nn.Module) -> Predictions:
        own = p.ranks.agreed(lambda: predict(net, rows) if len(rows) else None)
        parts = [part for part in p.ranks.gather(own) if part is not None]
        logits = np.concatenate([part.logits for part in parts])
        return Predictions(logits, np.concatenate([part.labels for part in parts]))

    return ask


def of_head(p: Prepared, val: Features) -> Callable[[nn.Module], Predictions]:
    """A head's answers on the cached features of val."""
    return lambda head: head_predictions(head, val, p.device)


def extract(p: Prepared, split: str, *, views: int = 1) -> Features:
    """Features of a split through the frozen backbone, from the cache where they are there."""
    return features.extract(
        p.net,
        p.photos(split, augment=views > 1),
        views=views,
        device=p.device,
        backbone_key=f"{p.recipe.model.name} {model.backbone_fingerprint(p.net)}",
        dtype=p.recipe.head.feature_dtype,
        precision=p.recipe.head.precision,
        workers=p.recipe.train.workers,
        ranks=p.ranks,
    )


def head_predictions(head: nn.Module, rows: Features, device: torch.device) -> Predictions:
    """A head over plain features, as prediction computes it."""
    return Predictions(features.head_logits(head, rows.x[0], device), rows.y)
