"""How a model is trained, from a recipe's `train` section: what moves, at which rates, how exactly.

timm brings optimizer and schedule; that layer-wise rates really reach the parameters is proven when
they are made.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from timm.layers.patch_dropout import PatchDropout
from timm.optim._optim_factory import create_optimizer_v2
from timm.scheduler.scheduler_factory import create_scheduler_v2
from torch import nn

from vitft.errors import RecipeError
from vitft.recipe import TrainSpec

FUSED = ("adam", "adamw", "sgd", "nesterov", "momentum")  # torch's own: one kernel for all tensors

LONG = 2000  # updates of several ranks that win back a minute of compiling, at 150 ms each


# -- what moves -----------------------------------------------------------------------------------


def set_train_mode(net: nn.Module) -> None:
    """Train mode where something is trained and for patch dropout; what is frozen stays in eval.

    Inside a block of which only adapters, biases or norms are trained, dropout and stochastic
    depth are active too.
    """
    parameters = list(net.parameters())
    net.train()
    if all(p.requires_grad for p in parameters):
        return
    net.eval()
    for module in net.modules():
        own = list(module.parameters())
        if (own and all(p.requires_grad for p in own)) or isinstance(module, PatchDropout):
            module.train()
    if isinstance(drop := getattr(net, "head_drop", None), nn.Dropout):
        drop.train()  # before a head, which is always trained
    for block in getattr(net, "blocks", None) or ():
        if any(p.requires_grad for p in block.parameters()):
            for module in block.modules():
                module.training |= next(module.parameters(), None) is None


def batch_norms(net: nn.Module) -> list[nn.Module]:
    """The batch normalisation of a model that stands in train mode: it mixes a batch's images."""
    kind = nn.modules.batchnorm._BatchNorm
    return [m for m in net.modules() if isinstance(m, kind) and m.training]


def trained_names(net: nn.Module) -> set[str]:
    """Names that training can change: trainable parameters, and buffers outside frozen modules."""
    names = {name for name, p in net.named_parameters() if p.requires_grad}
    for prefix, module in net.named_modules():
        own = list(module.parameters())
        if not own or any(p.requires_grad for p in own):
            names |= {f"{prefix}.{k}".lstrip(".") for k, _ in module.named_buffers(recurse=False)}
    return names


# -- at which rates -------------------------------------------------------------------------------


def make_optimizer(net: nn.Module, spec: TrainSpec) -> torch.optim.Optimizer:
    """timm's, with layer-wise decay.

    Raises:
        RecipeError: `train.layer_decay`: timm sees no layers in this model.
    """
    own: dict[str, Any] = {"fused": True} if spec.opt in FUSED else {}
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        net,
        opt=spec.opt,
        lr=spec.lr,
        weight_decay=spec.weight_decay,
        momentum=spec.momentum,
        layer_decay=spec.layer_decay,
        **own,
    )
    scales = {group.get("lr_scale", 1.0) for group in optimizer.param_groups}
    parts = [m for m in net.modules() if list(m.parameters(recurse=False))]  # a head alone is one
    if spec.layer_decay not in (None, 1.0) and len(scales) < 2 and len(parts) > 1:
        text = f"is {spec.layer_decay:g}, but timm sees no layers in {type(net).__name__}"
        fix = "set train.layer_decay: null, or choose another timm model"
        raise RecipeError.of("train.layer_decay", "train.layer_decay", text, fix)
    return optimizer


def make_scheduler(optimizer: torch.optim.Optimizer, spec: TrainSpec, updates: int) -> Any:
    """A per-update schedule, and the proof that layer-wise scales reach the learning rates."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=spec.sched,
        num_epochs=spec.epochs,
        min_lr=spec.lr * spec.min_lr_ratio,
        warmup_epochs=cast(int, spec.warmup_epochs),  # fractions work: it counts updates
        warmup_lr=spec.lr * spec.min_lr_ratio,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    scheduler.step_update(0)
    rates = {g["lr"] / g.get("lr_scale", 1.0) for g in optimizer.param_groups}
    if max(rates) - min(rates) > 1e-9 * max(rates):
        raise ValueError(f"schedule {spec.sched} does not apply the layer-wise scales: {rates}")
    return scheduler


# -- how exactly, how fast ------------------------------------------------------------------------


def precision(spec: TrainSpec, device: torch.device) -> torch.dtype | None:
    """bfloat16 on CUDA that has it, float16 on CUDA that has not, float32 elsewhere."""
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}
    if spec.amp != "auto":
        return named[spec.amp]
    if device.type != "cuda":
        return None
    # without the argument it says yes to a T4, which only emulates it
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def compiles(
    spec: TrainSpec, net: nn.Module, device: torch.device, updates: int, world: int = 1
) -> bool:
    """Whether training begins compiled.

    With `auto` one process times its first updates, and may compile then (`vitft.step`). Several
    must choose alike, and do so by the number of updates. A head alone is one product: there is
    nothing to join, and its whole training takes a second.
    """
    if spec.compile != "auto":
        return bool(spec.compile)
    long = world > 1 and updates >= LONG
    return long and device.type == "cuda" and not isinstance(net, nn.Linear)


@contextmanager
def fast_convolutions(device: torch.device) -> Iterator[None]:
    """On CUDA cuDNN tries what is fastest, once for each shape, as in timm's scripts."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
