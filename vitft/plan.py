"""What a run would do and cost, told before it starts: `vitft run --plan`.

In: everything prepared. Out: text, with a speed measured on this machine over a few photographs and
the minutes that follow from it. The model is left as it was.
"""

import time
from contextlib import nullcontext
from typing import Any, cast

import torch

from vitft import model, tune
from vitft.prepare import Prepared, chosen, frozen_cnn, kept_views

MEASURED = 32  # photographs whose forward is timed


def plan(prepared: Prepared) -> str:
    """What would happen: classes, split sizes, trainable parameters, measured speed, minutes."""
    index, recipe = prepared.index, prepared.recipe
    sizes = {split: len(index.rows(split)) for split in ("train", "val", "test")}
    forward, step = _speed(prepared)
    seconds = _seconds(prepared, sizes, forward, step)
    counts = index.ledger.counts
    table = [
        f"  {name:<24} {counts[name].get('train', 0):>7} {counts[name].get('val', 0):>7} "
        f"{counts[name].get('test', 0):>7}"
        for name in index.classes
    ]
    everything = sum(p.numel() for p in prepared.net.parameters())
    return "\n".join(
        [
            f"plan for {recipe.name} (mode {recipe.mode}, seed {recipe.seed})",
            f"  {'class':<24} {'train':>7} {'val':>7} {'test':>7}",
            *table,
            f"  {'all ' + str(len(index.classes)):<24} {sizes['train']:>7} {sizes['val']:>7} "
            f"{sizes['test']:>7}",
            f"model: {recipe.model.name}, weights {recipe.model.weights}, "
            f"input {prepared.config.size}",
            f"trainable parameters: {_trainable(prepared):,} of {everything:,}",
            f"measured on {MEASURED} photographs on {prepared.device}: {forward:.1f} images/s "
            "forward" + (f", {step:.1f} images/s training" if step else ""),
            f"expected: {seconds / 60:.1f} minutes without cached features",
        ]
    )


def _trainable(prepared: Prepared) -> int:
    """How many parameters training will change; the model is left as it is."""
    recipe, net = prepared.recipe, prepared.net
    if recipe.mode != "full":
        return sum(p.numel() for p in model.classifier(net).parameters())
    if recipe.train.tune != "all":
        return tune.planned(net, recipe.train, frozen_cnn=frozen_cnn(recipe))
    with chosen(prepared, recipe.train.blocks):
        return model.trainable(net)


def _speed(prepared: Prepared) -> tuple[float, float]:
    """Images/s forward, decode included, and of a training step (0 where none runs over images)."""
    photos = prepared.photos("train")
    batch = next(iter(prepared.batches(photos).epoch(0)))[0][: min(MEASURED, len(photos))]
    started = time.perf_counter()
    batch = next(iter(prepared.batches(photos).epoch(0)))[0][: len(batch)]
    prepared.net.eval()
    with torch.inference_mode():
        prepared.net(batch)
    forward = len(batch) / (time.perf_counter() - started)
    online = prepared.recipe.mode == "head" and prepared.recipe.head.views == "online"
    if prepared.recipe.mode != "full" and not online:
        return forward, 0.0
    started = time.perf_counter()
    with nullcontext() if online else chosen(prepared, prepared.recipe.train.blocks):
        prepared.net(batch).sum().backward()
    prepared.net.zero_grad(set_to_none=True)
    return forward, len(batch) / (time.perf_counter() - started)


def _seconds(prepared: Prepared, sizes: dict[str, int], forward: float, step: float) -> float:
    """Of the passes over photographs, from images/s as `_speed` gives them."""
    recipe, spec = prepared.recipe, prepared.recipe.train
    rest = sizes["val"] + sizes["test"]
    if not step:
        return (sizes["train"] * kept_views(recipe) + rest) / forward
    once = sizes["test"] / forward
    if spec.init_head == "probe":
        once += (sizes["train"] + sizes["val"]) / forward
    part = 1.0  # of the model that an epoch runs through
    if recipe.mode == "full" and spec.blocks is not None and spec.views != "online":
        once += (sizes["train"] * spec.views + sizes["val"]) / forward
        below = (1 - spec.blocks / len(cast(Any, prepared.net).blocks)) / forward
        step, part = (
            1 / max(1 / step - below, 1e-9),
            spec.blocks / len(cast(Any, prepared.net).blocks),
        )
    return once + spec.epochs * (sizes["train"] / step + part * sizes["val"] / forward)
