"""Where a training run stands: what changes while it runs, into a checkpoint and back again.

The best epoch by val is part of it: accuracy first, then log loss; of the plain weights and their
average (EMA) the better ones count.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitft import tally
from vitft.checkpoint import Snapshot, flatten_optimizer, restore_optimizer, under
from vitft.errors import WeightsError
from vitft.regime import trained_names

# What a checkpoint keeps of it besides tensors, records and places.
NUMBERS = {
    "loss_sum": float, "hits": float, "seen": int, "splits": int, "since_best": int, "scaler": dict
}  # fmt: skip


@dataclass
class State:
    """What changes while the loop runs, besides the tensors of `Moving`."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sum: Any = 0.0  # on CUDA a tensor, read only where it is needed
    hits: Any = 0.0
    seen: int = 0
    splits: int = 1
    since_best: int = 0
    best: dict[str, Any] | None = None
    best_tensors: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def offer(self, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Keeps an epoch's record and its trained tensors if no epoch before was better."""
        now = rank(record["val_accuracy"], record["val_loss"])
        if self.best is not None and now >= rank(self.best["val_accuracy"], self.best["val_loss"]):
            self.since_best += 1
            return
        self.best, self.since_best = record, 0
        self.best_tensors = {k: v.clone() for k, v in tensors.items()}


@dataclass(frozen=True)
class Moving:
    """What an update moves.

    Attributes:
        net: Whose trained tensors are saved.
        average: Its exponential moving average, or None.
        optimizer: With a moment or two of each trained parameter.
        scaler: Of float16; elsewhere it does nothing.
    """

    net: nn.Module
    average: nn.Module | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def trained(self, net: nn.Module | None = None) -> dict[str, Tensor]:
        """Of the model, or of a copy of it, what training can change."""
        names, of = trained_names(self.net), self.net if net is None else net
        return {k: v for k, v in of.state_dict().items() if k in names}


def rank(accuracy: float, loss: float) -> tuple[float, float]:
    """Smaller is better; NaN is never best."""
    bad = math.inf
    return (bad if math.isnan(accuracy) else -accuracy, bad if math.isnan(loss) else loss)


# -- there and back -------------------------------------------------------------------------------


def snapshot(state: State, moving: Moving) -> Snapshot:
    """The whole state; tensors are copied, so that training may go on while it is written."""
    s = state
    tensors = {f"model/{k}": v for k, v in moving.trained().items()}
    if moving.average is not None:
        tensors |= {f"ema/{k}": v for k, v in moving.trained(moving.average).items()}
    tensors |= flatten_optimizer(moving.optimizer)
    tensors |= {f"best/{k}": v for k, v in s.best_tensors.items()}
    numbers = {
        "loss_sum": float(s.loss_sum),
        "hits": float(s.hits),
        "seen": s.seen,
        "splits": s.splits,
        "since_best": s.since_best,
        "best": s.best,
        "history": s.history,
        "scaler": moving.scaler.state_dict(),
    }
    copies = {k: v.detach().to("cpu", copy=True) for k, v in tensors.items()}
    return Snapshot(s.step, s.epoch, s.batch, copies, numbers)


def restore(snapshot: Snapshot, state: State, moving: Moving, *, epochs: int) -> None:
    """The way back.

    Raises:
        WeightsError: A trained tensor is missing or has another shape, or `ckpt.state`: the
            numbers are not those of a run of so many epochs.
    """
    t, n, s = snapshot.tensors, snapshot.numbers, state
    _require_fit(snapshot, moving, epochs)
    restore_optimizer(moving.optimizer, t)
    moving.net.load_state_dict(under("model", t), strict=False)
    if moving.average is not None:
        moving.average.load_state_dict(under("ema", t), strict=False)
    if n["scaler"]:  # none was kept where the GPU before this one had bfloat16
        moving.scaler.load_state_dict(n["scaler"])
    s.step, s.epoch, s.batch = snapshot.step, snapshot.epoch, snapshot.batch
    s.loss_sum, s.hits, s.seen, s.splits = n["loss_sum"], n["hits"], n["seen"], n["splits"]
    s.since_best, s.best, s.history = n["since_best"], n["best"], list(n["history"])
    s.best_tensors = under("best", t)


def _require_fit(snapshot: Snapshot, moving: Moving, epochs: int) -> None:
    """Every trained tensor is there in its shape, since what is missing would stay fresh."""
    tensors, n = snapshot.tensors, snapshot.numbers
    wrong = [key for key, kind in NUMBERS.items() if type(n.get(key)) is not kind]
    if min(snapshot.step, snapshot.epoch, snapshot.batch) < 0 or snapshot.epoch > epochs:
        wrong.append(f"epoch {snapshot.epoch:,} of {epochs:,}")
    if wrong:
        text, fix = f"its state does not fit this run: {', '.join(wrong)}", "start anew"
        raise WeightsError.of("ckpt.state", "the checkpoint", text, fix)
    own = moving.trained()
    parts = ["model"] + ["ema"] * (moving.average is not None)
    parts += ["best"] * any(name.startswith("best/") for name in tensors)
    for part in parts:
        tally.check(under(part, tensors), own, place=f"the checkpoint's {part}")
