"""One update of the weights: the gradients of a batch, in as many parts as memory asks for.

The generator is seeded anew for each update, so that dropout and drop path depend on (seed, step)
alone. Of several ranks each has its share of the batch: gradients are exchanged during the last
part, and what all must agree on, the number of parts, is settled before.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from timm.task import ClassificationTask
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn

from vitft import pace
from vitft.console import say, warn
from vitft.errors import MachineError, VitftError
from vitft.inputs import derive_seed
from vitft.kernels import fast_linear
from vitft.progress import Moving, State
from vitft.ranks import ALONE, Ranks
from vitft.recipe import TrainSpec
from vitft.regime import (
    batch_norms,
    compiles,
    make_optimizer,
    make_scheduler,
    precision,
    set_train_mode,
)

GAIN = 0.2  # share of an update's time that compiled code saves: timm's ViT-B/16 on an H100
REHEARSED = 2  # updates of several ranks tried alone first: the second one finds the moments there

Batch = tuple[Tensor, Tensor, Tensor]


class Stepper:
    """Makes the updates of one run; `gradients`, then `apply`.

    Args:
        net: Model or head; what requires a gradient is trained.
        spec: The recipe's `train` section.
        state: Of the run; its `step` and `splits` are counted here.
        seed: Of the run.
        batch_size: Rows of a whole batch, of all ranks.
        updates: Per epoch.
        single: An epoch is one batch, most often smaller than a whole one.
        soft: Targets are [B, C] probabilities (mixup, cutmix), not class numbers.
        class_weight: [C] float32 loss weights, or None.
        ranks: The processes of this run; all of them make the same updates.
    """

    def __init__(
        self,
        net: nn.Module,
        spec: TrainSpec,
        state: State,
        *,
        seed: int,
        batch_size: int,
        updates: int,
        single: bool = False,
        soft: bool = False,
        class_weight: Tensor | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.net, self.spec, self.state, self.seed = net, spec, state, seed
        self.single, self.soft, self.ranks = single, soft, ranks
        self.share = len(ranks.share(batch_size, pairs=soft))
        self.device = next(net.parameters()).device
        self.optimizer = make_optimizer(net, spec)
        self.scheduler = make_scheduler(self.optimizer, spec, updates)
        self.class_weight = None if soft else class_weight
        criterion = nn.CrossEntropyLoss(weight=class_weight, label_smoothing=spec.label_smoothing)
        self.task = ClassificationTask(net, criterion, device=self.device, verbose=False)
        if spec.ema is not None:
            self.task.setup_ema(decay=spec.ema, use_warmup=True)
        self.updates = updates * spec.epochs
        self.compiled = compiles(spec, net, self.device, self.updates, ranks.world)
        self.on_trial = False  # compiled by our own choice, and not seen to work yet
        self.watch = pace.Watch(self.device, GAIN)
        self.watch.watching &= spec.compile == "auto" and ranks.world == 1
        self.watch.watching &= not isinstance(net, nn.Linear)
        if self.compiled:
            self._compile_as_asked()
        if ranks.world > 1:
            self._join()
        self.rehearsals = REHEARSED if ranks.world > 1 else 0
        self.precision = precision(spec, self.device)
        half = self.precision is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.scaled = False  # whether the gradients still are

    def _compile_as_asked(self) -> None:
        try:
            self._compile()
        except Exception as error:
            raise self._not_compiled(error) from error

    def _not_compiled(self, error: Exception) -> VitftError:
        return pace.not_compiled(self.device, "the model", error, asked=not self.on_trial)

    def _compile(self) -> None:
        """The model; not the loss, and not the update."""
        graphs = self.spec.compile == "reduce-overhead"
        # the shape is static: after a batch was halved torch would else take sizes for unknown
        self.task.compile(mode="reduce-overhead" if graphs else None, dynamic=False)
        self.compiled = True

    def _join(self) -> None:
        """Gradients of all ranks become one."""
        ids = [self.device.index or 0] if self.device.type == "cuda" else None
        with warnings.catch_warnings():  # of the next line's word, which torch is renaming
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            # buffers are equal anyway, and who runs out of memory would miss one exchange
            self.task.prepare_distributed(device_ids=ids, broadcast_buffers=False)

    @property
    def moving(self) -> Moving:
        """What an update moves."""
        ema: Any = self.task.get_eval_model(ema=True)
        average = None if ema is None else ema.module
        return Moving(self.net, average, self.optimizer, self.scaler)

    # -- the gradients --

    def gradients(self, pending: list[Batch], count: int) -> tuple[Tensor, Tensor]:
        """Leaves them in the parameters; running out of memory halves the parts, never the batch.

        Args:
            pending: Batches of this rank.
            count: Photographs in them, over all ranks.

        Returns:
            Sum of the losses and number of hits over this rank's photographs, float32 0-d.

        Raises:
            MachineError: `env.gpu_memory`: single images do not fit, or the batch must stay whole.
                `env.not_compiled`: it was asked for, and failed.
        """
        if self.single:
            self.share = len(pending[0][0])
        if self.rehearsals:
            self._rehearse(pending)
        with self.watch.timed(rested=self.state.batch <= len(pending)):  # the first of its epoch
            found = self._fitting(pending, count)
        left = self.updates - self.state.step - 1
        if self.watch.pays(left):
            self._try_compiled(left)
        return found

    def _try_compiled(self, left: int) -> None:
        """From here on, unless that fails; torch may refuse at once, or with the next batch."""
        say(pace.compiling("the model", left, "updates"))
        self.on_trial = True
        try:
            self._compile()
        except Exception as error:
            self._uncompile(error)

    def _fitting(self, pending: list[Batch], count: int) -> tuple[Tensor, Tensor]:
        """In as many parts as memory asks for."""
        while (found := self._tried(pending, count)) is None:
            if self.ranks.world > 1:  # others wait for these gradients, and cannot begin anew
                raise _late_no_memory(self.device)
            self._halve(pending)
        return found

    def _rehearse(self, pending: list[Batch]) -> None:
        """Finds the parts that fit on every rank, before any gradient is exchanged."""
        self.rehearsals -= 1
        while self.ranks.greatest(int(not self._fits_here(pending))):
            self._halve(pending)

    def _fits_here(self, pending: list[Batch]) -> bool:
        for norm in batch_norms(self.net):  # their statistics are to see a batch once, and together
            norm.eval()
        with self._no_exchange():
            count = sum(len(x) for x, _, _ in pending) or 1
            fits = self._tried(pending, count, alone=True) is not None
        set_train_mode(self.net)
        return fits

    def _tried(
        self, pending: list[Batch], count: int, *, alone: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        """As `_gradients`; None where memory ran out, be it a compiler that needed it.

        One that nobody asked for is let go first: what it needed may have been there without it.
        Once this has returned, the error is gone, and with it the activations that its traceback
        held; only then does emptying the cache free them.
        """
        statistics = self._statistics() if self.on_trial else []
        try:
            return self._gradients(pending, count, alone=alone)
        except Exception as error:
            if not self.on_trial and _ran_out(error):
                return None
            if not self.on_trial and self.compiled and _is_of_compiler(error):
                raise self._not_compiled(error) from error
            if not self.on_trial:
                raise
            self._uncompile(error)
        for buffer, before in statistics:
            buffer.copy_(before)
        return self._tried(pending, count, alone=alone)

    def _statistics(self) -> list[tuple[Tensor, Tensor]]:
        """What a forward pass changes, and what it was: a backward that fails comes too late."""
        buffers = (buffer for norm in batch_norms(self.net) for buffer in norm.buffers())
        return [(buffer, buffer.clone()) for buffer in buffers]

    def _uncompile(self, error: Exception) -> None:
        """Goes on without, where a compiler that nobody asked for has failed."""
        warn(str(self._not_compiled(error)))
        self.task.trainable_module = self.task.eval_model = self.net
        self.compiled = self.on_trial = False

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
        self.scaled = True
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
            self.on_trial &= not self._is_usual(len(x))
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

    def gradient_norm(self) -> float:
        """Of what the last batch left, before it was clipped or after."""
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients)) if gradients else 0.0
        return norm / self.scaler.get_scale() if self.scaled else norm

    # -- the update --

    def apply(self) -> None:
        """Clips, moves the weights and their average, counts the step."""
        s = self.state
        self.scheduler.step_update(s.step)
        if self.spec.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.net.parameters(), self.spec.clip_grad, mode="norm")
        self.scaler.step(self.optimizer)
        self.scaled = False
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
        if not self.compiled or self._is_usual(size):
            return nullcontext()
        eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return eager

    def _is_usual(self, size: int) -> bool:
        """Whether a part is as large as most."""
        return size == math.ceil(self.share / self.state.splits)


def _ran_out(error: BaseException | None) -> bool:
    """Whether memory is what was missing; torch's compiler wraps what it met."""
    while error is not None and not isinstance(error, torch.cuda.OutOfMemoryError):
        error = getattr(error, "inner_exception", None) or error.__cause__
    return error is not None


def _is_of_compiler(error: Exception) -> bool:
    """Whether torch's compiler says that it failed."""
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


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
    used, free, total = _gpu_memory(device)
    text = f"a batch of {batch} images does not fit ({used:.1f} GiB in use by this run, {free:.1f} "
    text += f"of {total:.1f} GiB free), and {norms} batch-normalisation layers that are trained "
    text += "would give other results on its parts"
    fix = f"set train.batch_size: {half[0]} and train.accumulate: {half[1]}, or "
    fix += "train.grad_checkpointing: true, or free the GPU"
    return MachineError.of("env.gpu_memory", str(device), text, fix)


def _no_memory(batch: int, device: torch.device) -> VitftError:
    """After a batch was cut down to single images, and these do not fit either."""
    used, free, total = _gpu_memory(device)
    text = f"one image of a batch of {batch} does not fit: {used:.1f} GiB in use by this run, "
    text += f"{free:.1f} of {total:.1f} GiB free"
    fix = "set train.grad_checkpointing: true, a smaller data.image_size or model, or free the GPU"
    return MachineError.of("env.gpu_memory", str(device), text, fix)


def _late_no_memory(device: torch.device) -> VitftError:
    """Parts fitted when they were tried, and later one rank had less room."""
    used, free, total = _gpu_memory(device)
    text = f"out of memory after parts were settled between ranks: {used:.1f} GiB in use by this "
    text += f"process, {free:.1f} of {total:.1f} GiB free"
    fix = "go on with --resume auto --resume-anyway train.grad_checkpointing=true, or start "
    fix += "anew with a smaller train.batch_size and more train.accumulate"
    return MachineError.of("env.gpu_memory", str(device), text, fix)


def _gpu_memory(device: torch.device) -> tuple[float, float, float]:
    """GiB used by this process, free, and there in all."""
    if device.type != "cuda":
        return 0.0, 0.0, 0.0
    used, (free, total) = torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)
    return used / 2**30, free / 2**30, total / 2**30
