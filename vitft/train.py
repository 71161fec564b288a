"""The only training loop: a head on cached features, the last blocks, or every parameter.

It is handed batches that are pure functions of (seed, epoch, position), and `vitft.step` seeds the
generator anew at each update, so that order, augmentation, dropout and drop path depend on nothing
else: not on workers, not on where a run was killed and resumed. `vitft.progress` is what is kept.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vitft import progress
from vitft.checkpoint import Snapshot
from vitft.console import say
from vitft.errors import DivergedError, MachineError, VitftError
from vitft.progress import State, rank
from vitft.ranks import ALONE, Ranks
from vitft.recipe import TrainSpec
from vitft.regime import fast_convolutions, set_train_mode
from vitft.step import Batch, Stepper

CHECK_EVERY = 25  # steps between looks at the loss on CUDA, where each look stops the queue
QUICK = 1.0  # seconds; a checkpoint that takes less is written after every epoch
SHARE = 0.05  # of the time, at most, for those that take longer

Validate = Callable[[nn.Module], tuple[float, float]]  # -> accuracy 0 to 1, log loss in nats


class Batches(Protocol):
    """What the loop eats: `vitft.loaders.Batches` over images, `vitft.features.Views` over rows.

    Of several ranks each gets its share of every batch, which may be empty.
    """

    batch_size: int  # of all batches but an epoch's last

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from the `start`-th on."""
        ...

    def names(self, rows: Tensor) -> list[str]:
        """The files behind some rows, for error texts."""
        ...


class Stopped(BaseException):
    """A signal asked the loop to end; the state was saved first. Carries the signal's number."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        super().__init__(signum)


@dataclass(frozen=True)
class Result:
    """What a training run leaves behind, besides the weights in the model itself.

    Attributes:
        history: One record per epoch; accuracies 0 to 1, losses in nats, seconds.
        best: The record whose weights the model now holds.
        weights: `plain` or `ema`, whichever was better on val.
        splits: Parts each batch was cut into after running out of memory (1 = never).
    """

    history: tuple[dict[str, Any], ...]
    best: dict[str, Any]
    weights: str
    splits: int


@dataclass(frozen=True)
class _Unread:
    """The loss of a step that nobody has looked at yet: of all ranks, of this one, and its rows."""

    step: int
    total: Tensor
    own: Tensor
    rows: list[Tensor]


class Trainer:
    """One run of the loop over one model; `fit` is the whole story.

    Args:
        net: Model or head; what requires a gradient is trained, all else stays in eval mode.
        batches: Training batches, on the model's device.
        spec: The recipe's `train` section.
        seed: Of the run.
        validate: Called after each epoch.
        soft: The batches' targets are [B, C] probabilities (mixup, cutmix), not class numbers.
        class_weight: [C] float32 loss weights, or None.
        on_record: Receives each epoch's record as it is made.
        save: Receives a Snapshot when it is time to keep one; None keeps none.
        stop: Polled after each update; a signal number ends the run after saving.
        ranks: The processes of this run; all of them make the same steps.
    """

    def __init__(
        self,
        net: nn.Module,
        batches: Batches,
        spec: TrainSpec,
        *,
        seed: int,
        validate: Validate,
        soft: bool = False,
        class_weight: Tensor | None = None,
        on_record: Callable[[dict[str, Any]], None] = lambda record: None,
        save: Callable[[Snapshot], None] | None = None,
        stop: Callable[[], int | None] = lambda: None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.net, self.batches, self.spec = net, batches, spec
        self.validate, self.on_record, self.save, self.stop = validate, on_record, save, stop
        self.device = next(net.parameters()).device
        self.soft = soft
        self.state = State()
        self.stepper = Stepper(
            net,
            spec,
            self.state,
            seed=seed,
            batch_size=batches.batch_size,
            updates=math.ceil(len(batches) / spec.accumulate),
            single=len(batches) == 1,
            soft=soft,
            class_weight=class_weight,
            ranks=ranks,
        )
        self.unread: list[_Unread] = []
        self.saved, self.cost = time.monotonic(), 0.0  # of the newest checkpoint, seconds
        self.kept = False  # whether there is a checkpoint to go on from
        self.queues = self.device.type == "cuda"  # reading a number there would stop the queue

    # -- the story ------------------------------------------------------------------------------

    def fit(self, resume: Snapshot | None = None) -> Result:
        """Trains to the end and leaves the best weights (by val) in the model.

        Args:
            resume: A checkpoint's snapshot to go on from; the result is then that of the
                undisturbed run, on CPU bit for bit.

        Raises:
            DivergedError: `train.diverged`, before anything not finite was saved.
            MachineError: `env.gpu_memory`: not even one image of a batch fits.
            Stopped: A signal came; the state was saved.
        """
        if resume is not None:
            progress.restore(resume, self.state, self.stepper.moving, epochs=self.spec.epochs)
            self.kept = True
        devices = _generator_devices(self.device)
        with torch.random.fork_rng(devices), fast_convolutions(self.device):
            for epoch in range(self.state.epoch, self.spec.epochs):
                self.state.epoch = epoch
                self._epoch()
                if self._patience_is_over():
                    break
        return self._finish()

    def _epoch(self) -> None:
        s, started = self.state, time.monotonic()
        set_train_mode(self.net)
        pending: list[Batch] = []
        for batch in self._rest_of_the_epoch():
            pending.append(batch)
            s.batch += 1
            if len(pending) < self.spec.accumulate and s.batch < len(self.batches):
                continue
            count = self.ranks.meet(sum(len(x) for x, _, _ in pending))
            if count < 0:
                break
            self._update(pending, count)
            pending = []
            signum = self._signal()
            due = bool(self.ranks.greatest(int(self._since_saved() > self._apart)))
            if (due or signum is not None) and s.batch < len(self.batches):
                self._keep()
            if signum is not None and s.batch < len(self.batches):
                raise Stopped(signum)
        if pending or s.batch < len(self.batches):
            self._leave(unused=len(pending))
        self._close_epoch(started)

    def _rest_of_the_epoch(self) -> Iterator[Batch]:
        """Batches from where the state stands; a signal that took the workers along ends them."""
        try:
            yield from self.batches.epoch(self.state.epoch, self.state.batch)
        except VitftError as error:
            if isinstance(error, MachineError) and self.stop() is not None:
                self.ranks.meet(leave=True)
            else:
                self.ranks.meet(error=error)

    def _signal(self) -> int | None:
        """The signal that this or another rank was sent."""
        return self.ranks.greatest(self.stop() or 0) or None

    def _leave(self, unused: int) -> None:
        """Saves in the midst of an epoch and goes; `unused` batches were not learned from yet."""
        self.state.batch -= unused
        self._keep()
        raise Stopped(self.stop() or signal.SIGTERM)

    def _keep(self) -> None:
        """Saves, where anything is saved, what every rank has found finite."""
        self._raise_if_diverged()
        self._save()

    def _save(self) -> None:
        """Every rank notes when, and the one that writes how long it took."""
        started = time.monotonic()
        if self.save:
            self.save(progress.snapshot(self.state, self.stepper.moving))
            self.kept = True
        self.saved = time.monotonic()
        self.cost = self.saved - started

    def _since_saved(self) -> float:
        """Seconds."""
        return time.monotonic() - self.saved

    @property
    def _apart(self) -> float:
        """Seconds between checkpoints inside an epoch."""
        return self.spec.checkpoint_minutes * 60

    def _worth_saving(self) -> bool:
        """At an epoch's end, unless writing takes long, and a twentieth of the time since the last.

        Then `checkpoint_minutes` go by first. The last epoch is always kept, as what comes after
        training may be killed, too.
        """
        last = self.state.epoch == self.spec.epochs or self._no_patience_left()
        cheap = self.cost < QUICK or self.cost < SHARE * self._since_saved()
        return last or cheap or self._since_saved() > self._apart

    def _close_epoch(self, started: float) -> None:
        s = self.state
        self._raise_if_diverged()  # waits for what is queued, which belongs to the epoch's time
        record = self._record(time.monotonic() - started)
        s.history.append(record)
        self.on_record(record)
        s.epoch, s.batch, s.loss_sum, s.hits, s.seen = s.epoch + 1, 0, 0.0, 0.0, 0
        signum = self._signal()
        if signum is not None or self._worth_saving():
            self._save()
        if signum is not None and s.epoch < self.spec.epochs:
            raise Stopped(signum)

    # -- one update -----------------------------------------------------------------------------

    def _update(self, pending: list[Batch], count: int) -> None:
        """One update, and what it adds to the epoch's sums.

        Args:
            pending: Batches of this rank.
            count: Photographs in them, over all ranks.
        """
        own, hits = self.stepper.gradients(pending, count)
        s, sums = self.state, self.ranks.sum(torch.stack([own, hits]))
        loss_sum, right = sums.unbind() if self.queues else sums.tolist()
        self.unread.append(_Unread(s.step + 1, sums[0], own, [rows for _, _, rows in pending]))
        if not self.queues or (s.step + 1) % CHECK_EVERY == 0:
            self._raise_if_not_finite()
        self.stepper.apply()
        s.loss_sum, s.hits, s.seen = s.loss_sum + loss_sum, s.hits + right, s.seen + count

    # -- what is finite, what is best -----------------------------------------------------------

    def _raise_if_not_finite(self) -> None:
        """Names the first step whose loss was not, and the photographs of the ranks that had it."""
        unread, self.unread = self.unread, []
        if not unread or bool(torch.stack([u.total for u in unread]).isfinite().all()):
            return
        first = next(u for u in unread if not math.isfinite(float(u.total)))
        mine = [] if math.isfinite(float(first.own)) else first.rows
        found = self.ranks.gather([name for rows in mine for name in self.batches.names(rows)])
        names = [name for files in found for name in files]
        raise self._diverged(first.step, f"loss {float(first.total)}", ", ".join(names[:8]))

    def _raise_if_diverged(self) -> None:
        """Before anything is saved: the losses and every trained tensor must be finite."""
        self._raise_if_not_finite()
        if not math.isfinite(float(self.state.loss_sum)):
            raise self._diverged(self.state.step, f"loss {float(self.state.loss_sum)}", "unknown")
        trained = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        for name in _not_finite(trained):
            raise self._diverged(self.state.step, f"{name} is not finite", "unknown")

    def _diverged(self, step: int, what: str, files: str) -> BaseException:
        lr, norm = self._rate(), self.stepper.gradient_norm()
        kept = "the last checkpoint is finite" if self.kept else "nothing had been saved yet"
        error = DivergedError.of(
            "train.diverged",
            f"epoch {self.state.epoch + 1}, step {step}",
            f"{what} at learning rate {lr:.3g}, gradient norm {norm:.3g}; photographs of this "
            f"step: {files}",
            f"lower train.lr or set train.clip_grad: 1.0; {kept}",
        )
        return self.ranks.voiced(error)

    def _record(self, seconds: float) -> dict[str, Any]:
        s = self.state
        record: dict[str, Any] = {
            "epoch": s.epoch + 1,
            "train_loss": float(s.loss_sum) / s.seen,
            "train_accuracy": None if self.soft else float(s.hits) / s.seen,
        }
        moving = self.stepper.moving
        candidates = {"plain": self.net}
        if moving.average is not None:
            candidates["ema"] = moving.average
        scored = {name: self.validate(net) for name, net in candidates.items()}
        weights = min(scored, key=lambda name: rank(*scored[name]))
        accuracy, loss = scored[weights]
        record |= {"val_accuracy": accuracy, "val_loss": loss, "weights": weights}
        record |= {f"val_accuracy_{name}": a for name, (a, _) in scored.items() if len(scored) > 1}
        record |= {"lr": self._rate(), "step": s.step, "seconds": seconds}
        s.offer(record, moving.trained(candidates[weights]))
        return record

    def _rate(self) -> float:
        """Of the first group of parameters."""
        rate: float = self.stepper.optimizer.param_groups[0]["lr"]
        return rate

    def _patience_is_over(self) -> bool:
        if not self._no_patience_left():
            return False
        say(f"no better epoch in {self.spec.patience}: stopping after epoch {self.state.epoch}")
        return True

    def _no_patience_left(self) -> bool:
        return self.spec.patience is not None and self.state.since_best >= self.spec.patience

    def _finish(self) -> Result:
        s = self.state
        if s.best is None:
            raise ValueError("no epoch was trained")
        self.net.load_state_dict(s.best_tensors, strict=False)
        self.net.eval()
        return Result(tuple(s.history), s.best, s.best["weights"], s.splits)


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that hold NaN or infinity; one look at the device where none does."""
    norms = torch.stack(torch._foreach_norm(list(tensors.values())))  # of large numbers infinite
    doubted = [name for name, ok in zip(tensors, norms.isfinite().tolist(), strict=True) if not ok]
    return [name for name in doubted if not bool(torch.isfinite(tensors[name]).all())]


def _generator_devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []
