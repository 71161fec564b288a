"""The only training loop: a head on cached features, the last blocks, or every parameter.

It is handed batches that are pure functions of (seed, epoch, position) and seeds the generator anew
at each step, so that order, augmentation, dropout and drop path depend on nothing else: not on
workers, not on where a run was killed and resumed. timm brings task, optimizer, schedule and EMA.
"""

import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from timm.layers.patch_dropout import PatchDropout
from timm.optim._optim_factory import create_optimizer_v2
from timm.scheduler.scheduler_factory import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn

from vitft import weights
from vitft.checkpoint import Snapshot, flatten_optimizer, restore_optimizer, under
from vitft.console import say, warn
from vitft.errors import DivergedError, MachineError, RecipeError, VitftError, WeightsError
from vitft.inputs import derive_seed
from vitft.kernels import fast_linear
from vitft.ranks import ALONE, Ranks
from vitft.recipe import TrainSpec

FUSED = ("adam", "adamw", "sgd", "nesterov", "momentum")  # torch's own: one kernel for all tensors
CHECK_EVERY = 25  # steps between looks at the loss on CUDA, where each look stops the queue
REHEARSED = 2  # updates of several ranks tried alone first: the second one finds the moments there

Batch = tuple[Tensor, Tensor, Tensor]
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


@dataclass
class _State:
    """What changes while the loop runs."""

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


# What a checkpoint keeps of it besides tensors, records and places.
NUMBERS = {
    "loss_sum": float, "hits": float, "seen": int, "splits": int, "since_best": int, "scaler": dict
}  # fmt: skip


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
        self.net, self.batches, self.spec, self.seed = net, batches, spec, seed
        self.validate, self.on_record, self.save, self.stop = validate, on_record, save, stop
        self.device = next(net.parameters()).device
        self.soft = soft
        self.updates_per_epoch = math.ceil(len(batches) / spec.accumulate)
        self.optimizer = _optimizer(net, spec)
        self.scheduler = _scheduler(self.optimizer, spec, self.updates_per_epoch)
        self.class_weight = None if soft else class_weight
        criterion = nn.CrossEntropyLoss(weight=class_weight, label_smoothing=spec.label_smoothing)
        self.task = ClassificationTask(net, criterion, device=self.device, verbose=False)
        if spec.ema is not None:
            self.task.setup_ema(decay=spec.ema, use_warmup=True)
        self.compiled = _compiles(spec, self.device, self.updates_per_epoch * spec.epochs)
        if self.compiled:
            graphs = spec.compile == "reduce-overhead"
            # the shape is static: after a batch was halved torch would else take sizes for unknown
            self.task.compile(mode="reduce-overhead" if graphs else None, dynamic=False)
        if ranks.world > 1:
            ids = [self.device.index or 0] if self.device.type == "cuda" else None
            with warnings.catch_warnings():  # of the next line's word, which torch is renaming
                warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
                # buffers are equal anyway, and who runs out of memory would miss one exchange
                self.task.prepare_distributed(device_ids=ids, broadcast_buffers=False)
        self.unread: list[_Unread] = []
        self.rehearsals = REHEARSED if ranks.world > 1 else 0
        self.precision = _precision(spec, self.device)
        self.scaler = torch.amp.GradScaler(enabled=self.precision is torch.float16)
        self.queues = self.device.type == "cuda"  # reading a number there would stop the queue
        self.state = _State()

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
            self._restore(resume)
        with torch.random.fork_rng(_generator_devices(self.device)):
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
        last_save = time.monotonic()
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
            due = time.monotonic() - last_save > self.spec.checkpoint_minutes * 60
            due = bool(self.ranks.greatest(int(due)))
            if (due or signum is not None) and s.batch < len(self.batches):
                self._keep()
                last_save = time.monotonic()
            if signum is not None and s.batch < len(self.batches):
                raise Stopped(signum)
        if pending or s.batch < len(self.batches):
            self._leave(unused=len(pending))
        self._close_epoch(time.monotonic() - started)

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
        if self.save:
            self.save(self.snapshot())

    def _close_epoch(self, seconds: float) -> None:
        s = self.state
        self._raise_if_diverged()
        record = self._record(seconds)
        s.history.append(record)
        self.on_record(record)
        s.epoch, s.batch, s.loss_sum, s.hits, s.seen = s.epoch + 1, 0, 0.0, 0.0, 0
        if self.save:
            self.save(self.snapshot())
        signum = self._signal()
        if signum is not None and s.epoch < self.spec.epochs:
            raise Stopped(signum)

    # -- one update -----------------------------------------------------------------------------

    def _update(self, pending: list[Batch], count: int) -> None:
        """One optimizer step; running out of memory halves the parts, never the batch.

        Args:
            pending: Batches of this rank.
            count: Photographs in them, over all ranks.
        """
        if self.rehearsals:
            self._rehearse(pending)
        while (found := self._tried(pending, count)) is None:
            if self.ranks.world > 1:  # others wait for these gradients, and cannot begin anew
                raise _late_no_memory(self.device)
            self._halve(pending)
        own, hits = found
        s, sums = self.state, self.ranks.sum(torch.stack([own, hits]))
        loss_sum, right = sums.unbind() if self.queues else sums.tolist()
        self.unread.append(_Unread(s.step + 1, sums[0], own, [rows for _, _, rows in pending]))
        if not self.queues or (s.step + 1) % CHECK_EVERY == 0:
            self._raise_if_not_finite()
        self._step()
        s.loss_sum, s.hits, s.seen = s.loss_sum + loss_sum, s.hits + right, s.seen + count

    def _rehearse(self, pending: list[Batch]) -> None:
        """Finds the parts that fit on every rank, before any gradient is exchanged."""
        self.rehearsals -= 1
        while self.ranks.greatest(int(not self._fits_here(pending))):
            self._halve(pending)

    def _fits_here(self, pending: list[Batch]) -> bool:
        for module in self.net.modules():  # their statistics are to see a batch once, and together
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        with self._no_exchange():
            count = sum(len(x) for x, _, _ in pending) or 1
            fits = self._tried(pending, count, alone=True) is not None
        set_train_mode(self.net)
        return fits

    def _tried(
        self, pending: list[Batch], count: int, *, alone: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        """As `_gradients`; None where memory ran out.

        Once this has returned, the error is gone, and with it the activations that its traceback
        held; only then does emptying the cache free them.
        """
        try:
            return self._gradients(pending, count, alone=alone)
        except torch.cuda.OutOfMemoryError:
            return None

    def _halve(self, pending: list[Batch]) -> None:
        """Makes room, and parts half as large, on every rank; where that would change nothing."""
        self.optimizer.zero_grad(set_to_none=True)
        largest = self.ranks.greatest(_largest(pending))
        if self.state.splits >= largest:
            raise self.ranks.voiced(_no_memory(largest, self.device))
        if norms := batch_norms(self.net):
            half = self.ranks.world * max(1, largest // 2), 2 * self.spec.accumulate
            raise self.ranks.voiced(_no_parts(largest, len(norms), half, self.device))
        self.state.splits *= 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        part = math.ceil(largest / self.state.splits)
        warn(f"out of memory: going on with parts of {part} images, same effective batch")

    def _gradients(
        self, pending: list[Batch], count: int, *, alone: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Of the mean loss over all ranks' photographs; exchanged during the last part.

        Returns:
            Sum of the losses and number of hits over this rank's photographs, float32 0-d.
        """
        torch.manual_seed(self._step_seed())
        if self.compiled:
            _begin_step()
        self.optimizer.zero_grad(set_to_none=True)
        total = self._total([y for _, y, _ in pending], count, alone)
        sums = torch.zeros(2, device=self.device)
        parts = [part for x, y, _ in pending for part in _parts(x, y, self.state.splits)]
        for k, (x, y, real) in enumerate(parts):
            waits = k < len(parts) - 1
            with self._no_exchange() if waits else nullcontext():
                with self._autocast(), self._stance(len(x)):
                    out = self.task(x, y)
                share = self._mass(y) * (real * (1 if alone else self.ranks.world)) / total
                self.scaler.scale(out["loss"] * share).backward()
            sums[0] += out["loss"].detach() * (len(x) * real)
            if not self.soft:
                sums[1] += (out["output"].detach().argmax(1) == y).sum() * real
        return sums[0], sums[1]

    def _no_exchange(self) -> AbstractContextManager[Any]:
        """Gradients stay this rank's own."""
        return cast(AbstractContextManager[Any], cast(Any, self.task).no_sync())

    def _step_seed(self) -> int:
        """Of dropout and drop path, which must differ between ranks."""
        rank = (self.ranks.rank,) if self.ranks.rank else ()
        return derive_seed(self.seed, "step", self.state.step, *rank)

    def _mass(self, y: Tensor) -> Any:
        """What the mean over these targets divides by."""
        return len(y) if self.class_weight is None else self.class_weight[y].sum()

    def _total(self, targets: list[Tensor], count: int, alone: bool) -> Any:
        """The mass of all ranks' targets."""
        if self.class_weight is None:
            return count
        own = sum((self._mass(y) for y in targets), torch.zeros((), device=self.device))
        return own if alone else self.ranks.sum(own)

    def _step(self) -> None:
        s = self.state
        self.scheduler.step_update(s.step)
        if self.spec.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.net.parameters(), self.spec.clip_grad, mode="norm")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        s.step += 1
        self.task.update_ema(step=s.step)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision is not None:
            return torch.autocast(self.device.type, self.precision)
        # gradient checkpointing computes again in the backward pass, where no mode reaches it
        plain = self.compiled or self.spec.grad_checkpointing
        return nullcontext() if plain else fast_linear(self.device)

    def _stance(self, size: int) -> AbstractContextManager[Any]:
        """Compiled code serves one shape: an epoch's smaller last batch runs without it.

        Else torch would compile once more, and for sizes unknown, which is slower in every step.
        """
        if not self.compiled:
            return nullcontext()
        share = len(self.ranks.share(self.batches.batch_size, pairs=self.soft))
        if size == math.ceil(share / self.state.splits):
            return nullcontext()
        eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return eager

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
        for name, p in self.net.named_parameters():
            if p.requires_grad and not bool(torch.isfinite(p).all()):
                raise self._diverged(self.state.step, f"{name} is not finite", "unknown")

    def _diverged(self, step: int, what: str, files: str) -> BaseException:
        lr = self.optimizer.param_groups[0]["lr"]
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients)) if gradients else 0.0
        error = DivergedError.of(
            "train.diverged",
            f"epoch {self.state.epoch + 1}, step {step}",
            f"{what} at learning rate {lr:.3g}, gradient norm {norm:.3g}; photographs of this "
            f"step: {files}",
            "lower train.lr or set train.clip_grad: 1.0; the last checkpoint is finite",
        )
        return self.ranks.voiced(error)

    def _record(self, seconds: float) -> dict[str, Any]:
        s = self.state
        record: dict[str, Any] = {
            "epoch": s.epoch + 1,
            "train_loss": float(s.loss_sum) / s.seen,
            "train_accuracy": None if self.soft else float(s.hits) / s.seen,
        }
        candidates: dict[str, nn.Module] = {"plain": self.net}
        if self.task.has_ema():
            candidates["ema"] = self._average()
        scored = {name: self.validate(net) for name, net in candidates.items()}
        weights = min(scored, key=lambda name: _rank(*scored[name]))
        accuracy, loss = scored[weights]
        record |= {"val_accuracy": accuracy, "val_loss": loss, "weights": weights}
        record |= {f"val_accuracy_{name}": a for name, (a, _) in scored.items() if len(scored) > 1}
        record |= {"lr": self.optimizer.param_groups[0]["lr"], "step": s.step, "seconds": seconds}
        self._keep_best(record, candidates[weights])
        return record

    def _keep_best(self, record: dict[str, Any], net: nn.Module) -> None:
        s, now = self.state, _rank(record["val_accuracy"], record["val_loss"])
        if s.best is not None and now >= _rank(s.best["val_accuracy"], s.best["val_loss"]):
            s.since_best += 1
            return
        s.best, s.since_best = record, 0
        trained = _trained(self.net)
        s.best_tensors = {k: v.clone() for k, v in net.state_dict().items() if k in trained}

    def _average(self) -> nn.Module:
        average: nn.Module = cast(Any, self.task.get_eval_model(ema=True)).module
        return average

    def _patience_is_over(self) -> bool:
        patience = self.spec.patience
        if patience is None or self.state.since_best < patience:
            return False
        say(f"no better epoch in {patience}: stopping after epoch {self.state.epoch}")
        return True

    def _finish(self) -> Result:
        s = self.state
        if s.best is None:
            raise ValueError("no epoch was trained")
        self.net.load_state_dict(s.best_tensors, strict=False)
        self.net.eval()
        return Result(tuple(s.history), s.best, s.best["weights"], s.splits)

    # -- there and back -------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """The whole state, tensors cloned so that training may go on while it is written."""
        s, trained = self.state, _trained(self.net)
        tensors = {f"model/{k}": v for k, v in self.net.state_dict().items() if k in trained}
        if self.task.has_ema():
            average = self._average().state_dict()
            tensors |= {f"ema/{k}": v for k, v in average.items() if k in trained}
        tensors |= flatten_optimizer(self.optimizer)
        tensors |= {f"best/{k}": v for k, v in s.best_tensors.items()}
        numbers = {
            "loss_sum": float(s.loss_sum),
            "hits": float(s.hits),
            "seen": s.seen,
            "splits": s.splits,
            "since_best": s.since_best,
            "best": s.best,
            "history": s.history,
            "scaler": self.scaler.state_dict(),
        }
        copies = {k: v.detach().cpu().clone() for k, v in tensors.items()}
        return Snapshot(s.step, s.epoch, s.batch, copies, numbers)

    def _restore(self, snapshot: Snapshot) -> None:
        t, n, s = snapshot.tensors, snapshot.numbers, self.state
        self._require_fit(snapshot)
        restore_optimizer(self.optimizer, t)
        self.net.load_state_dict(under("model", t), strict=False)
        if self.task.has_ema():
            self._average().load_state_dict(under("ema", t), strict=False)
        self.scaler.load_state_dict(n["scaler"])
        s.step, s.epoch, s.batch = snapshot.step, snapshot.epoch, snapshot.batch
        s.loss_sum, s.hits, s.seen, s.splits = n["loss_sum"], n["hits"], n["seen"], n["splits"]
        s.since_best, s.best, s.history = n["since_best"], n["best"], list(n["history"])
        s.best_tensors = under("best", t)

    def _require_fit(self, snapshot: Snapshot) -> None:
        """Every trained tensor is there in its shape, since what is missing would stay fresh.

        Raises:
            WeightsError: That, or `ckpt.state`: its numbers are not those of this loop.
        """
        tensors, n, epochs = snapshot.tensors, snapshot.numbers, self.spec.epochs
        wrong = [key for key, kind in NUMBERS.items() if type(n.get(key)) is not kind]
        if min(snapshot.step, snapshot.epoch, snapshot.batch) < 0 or snapshot.epoch > epochs:
            wrong.append(f"epoch {snapshot.epoch:,} of {epochs:,}")
        if wrong:
            text, fix = f"its state does not fit this run: {', '.join(wrong)}", "start anew"
            raise WeightsError.of("ckpt.state", "the checkpoint", text, fix)
        trained = _trained(self.net)
        own = {k: v for k, v in self.net.state_dict().items() if k in trained}
        parts = ["model"] + ["ema"] * self.task.has_ema()
        parts += ["best"] * any(name.startswith("best/") for name in tensors)
        for part in parts:
            weights.check(under(part, tensors), own, place=f"the checkpoint's {part}")


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


def _rank(accuracy: float, loss: float) -> tuple[float, float]:
    """Smaller is better; NaN is never best."""
    bad = math.inf
    return (bad if math.isnan(accuracy) else -accuracy, bad if math.isnan(loss) else loss)


def _trained(net: nn.Module) -> set[str]:
    """Names that training can change: trainable parameters, and buffers outside frozen modules."""
    names = {name for name, p in net.named_parameters() if p.requires_grad}
    for prefix, module in net.named_modules():
        own = list(module.parameters())
        if not own or any(p.requires_grad for p in own):
            names |= {f"{prefix}.{k}".lstrip(".") for k, _ in module.named_buffers(recurse=False)}
    return names


def _largest(pending: list[Batch]) -> int:
    return max(len(x) for x, _, _ in pending)


def _begin_step() -> None:
    """Tells CUDA graphs that the tensors of the last step may be overwritten."""
    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]


def _parts(x: Tensor, y: Tensor, splits: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """A batch in parts, each with the factor 1; a blank image with 0 where a rank's share is empty.

    The gradient exchange wants a backward pass from every rank.
    """
    if not len(x):
        yield x.new_zeros(1, *x.shape[1:]), y.new_zeros(1, *y.shape[1:]), 0
        return
    for part_x, part_y in zip(x.chunk(splits), y.chunk(splits), strict=True):
        yield part_x, part_y, 1


def _no_parts(batch: int, norms: int, half: tuple[int, int], device: torch.device) -> VitftError:
    """Where batch normalisation is trained, cutting a batch changes what each image is made of."""
    used, free, total = (n / 2**30 for n in _gpu_memory(device))
    text = f"a batch of {batch} images does not fit ({used:.1f} GiB in use by this run, {free:.1f} "
    text += f"of {total:.1f} GiB free), and {norms} batch-normalisation layers that are trained "
    text += "would give other results on its parts"
    fix = f"set train.batch_size: {half[0]} and train.accumulate: {half[1]}, or "
    fix += "train.grad_checkpointing: true, or free the GPU"
    return MachineError.of("env.gpu_memory", str(device), text, fix)


def _no_memory(batch: int, device: torch.device) -> VitftError:
    """After a batch was cut down to single images, and these do not fit either."""
    used, free, total = (n / 2**30 for n in _gpu_memory(device))
    text = f"one image of a batch of {batch} does not fit: {used:.1f} GiB in use by this run, "
    text += f"{free:.1f} of {total:.1f} GiB free"
    fix = "set train.grad_checkpointing: true, a smaller data.image_size or model, or free the GPU"
    return MachineError.of("env.gpu_memory", str(device), text, fix)


def _late_no_memory(device: torch.device) -> VitftError:
    """Parts fitted when they were tried, and later one rank had less room."""
    used, free, total = (n / 2**30 for n in _gpu_memory(device))
    text = f"out of memory after parts were settled between ranks: {used:.1f} GiB in use by this "
    text += f"process, {free:.1f} of {total:.1f} GiB free"
    fix = "go on with --resume auto and a smaller train.batch_size with more train.accumulate"
    return MachineError.of("env.gpu_memory", str(device), text, fix)


def _gpu_memory(device: torch.device) -> tuple[int, int, int]:
    """Bytes used by this process, free, and there in all."""
    if device.type != "cuda":
        return 0, 0, 0
    return torch.cuda.memory_allocated(device), *torch.cuda.mem_get_info(device)


def _optimizer(net: nn.Module, spec: TrainSpec) -> torch.optim.Optimizer:
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


def _scheduler(optimizer: torch.optim.Optimizer, spec: TrainSpec, updates: int) -> Any:
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


def _precision(spec: TrainSpec, device: torch.device) -> torch.dtype | None:
    """bfloat16 on CUDA that has it, float16 on CUDA that has not, float32 elsewhere."""
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}
    if spec.amp != "auto":
        return named[spec.amp]
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _compiles(spec: TrainSpec, device: torch.device, updates: int) -> bool:
    """Compiling takes about a minute; on CUDA that is won back over some hundred updates."""
    if spec.compile == "auto":
        return device.type == "cuda" and updates >= 500
    return bool(spec.compile)


def _generator_devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []
