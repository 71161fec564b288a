"""Training steps of vitft and of timm's own `train.py` in turn, on the same batches and weights.

timm's side is `train_one_epoch` of a checkout's `train.py`, whose options are parsed by its own
parser, around the task, optimizer and autocast that its `main` makes. Without a checkout it is a
loop of timm's pieces that does the same per step: task, backward, optimizer, `loss.item()`. ours is
`vitft.train.Trainer`. Both start from one set of weights, with AdamW at a constant rate.
"""

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import timm
import torch
from timm.optim._optim_factory import create_optimizer_v2, optimizer_kwargs
from timm.task import ClassificationTask
from torch import Tensor, nn

import vitft  # noqa: F401  (registers the models)
from vitft.recipe import TrainSpec
from vitft.train import Trainer

RATE, DECAY, CLASSES = 1e-4, 0.05, 5
DISTINCT = 4  # synthetic batches; a round takes them again and again
PAIRS = {  # ours -> timm's, weights of one serving the other
    "vitflower_ti16": "vit_tiny_patch16_224",
    "vitflower_s16": "vit_small_patch16_224",
    "vitflower_b16": "vit_base_patch16_224",
    "vitflower_l16": "vit_large_patch16_224",
}
Batch = tuple[Tensor, Tensor, Tensor]


class Way(Protocol):
    """One way to train."""

    def round(self) -> tuple[float, float]:
        """A round of steps: seconds, and the mean loss."""
        ...


class Synthetic:
    """Batches that lie ready on the device, the same ones each epoch; both sides take them."""

    def __init__(self, count: int, size: int, side: int, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(0)
        self.batch_size = size
        drawn: list[Batch] = []
        for k in range(min(count, DISTINCT)):
            y = torch.randint(CLASSES, (size,), generator=draw)
            x = torch.randn(size, 3, side, side, generator=draw) + y.view(-1, 1, 1, 1) / CLASSES
            rows = torch.arange(k * size, (k + 1) * size)
            drawn.append((x.to(device), y.to(device), rows))
        self.ready = [drawn[k % len(drawn)] for k in range(count)]

    def __len__(self) -> int:
        return len(self.ready)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """As the loop asks for them."""
        return iter(self.ready[start:])

    def names(self, rows: Tensor) -> list[str]:
        """For error texts."""
        return [f"row {int(row)}" for row in rows]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """As timm's loop asks for them."""
        return ((x, y) for x, y, _ in self.ready)


class Ours:
    """vitft's loop; each round is one more epoch of the same run."""

    def __init__(self, net: nn.Module, batches: Any, *, compile: Any = False, amp: Any = "none"):
        spec = TrainSpec(
            epochs=1,
            opt="adamw",
            lr=RATE,
            weight_decay=DECAY,
            sched="constant",
            compile=compile,
            amp=amp,
        )
        self.device = next(net.parameters()).device
        self.trainer = Trainer(net, batches, spec, seed=0, validate=self._validate)
        self.epochs = 0

    def _validate(self, net: nn.Module) -> tuple[float, float]:
        """Each epoch is better than the one before, so that the loop goes on from its weights."""
        return 0.0, -float(self.epochs)

    def round(self) -> tuple[float, float]:
        """One epoch."""
        self.epochs += 1
        self.trainer.spec = self.trainer.spec.model_copy(update={"epochs": self.epochs})
        seconds, result = timed(self.trainer.fit, self.device)
        return seconds, float(result.history[-1]["train_loss"])


class Timm:
    """timm's loop, of the checkout or, without one, of its pieces."""

    def __init__(
        self,
        net: nn.Module,
        loader: Any,
        *,
        script: ModuleType | None,
        amp: str = "none",
        compile: bool = False,
    ) -> None:
        self.net, self.loader, self.script, self.epochs = net, loader, script, 0
        self.device = next(net.parameters()).device
        self.task = ClassificationTask(
            net, nn.CrossEntropyLoss(), device=self.device, verbose=False
        )
        options = ["--opt", "adamw", "--lr", str(RATE), "--weight-decay", str(DECAY)]
        self.args = None if script is None else _arguments(script, options)
        given = (
            {"opt": "adamw", "lr": RATE, "weight_decay": DECAY}
            if self.args is None
            else optimizer_kwargs(cfg=self.args)  # type: ignore[no-untyped-call]
        )
        self.optimizer = create_optimizer_v2(net, **given)
        if compile:
            self.task.compile(backend="inductor", mode=None)
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if amp == "bf16":
            self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16)

    def round(self) -> tuple[float, float]:
        """One epoch."""
        self.epochs += 1
        seconds, metrics = timed(self._epoch, self.device)
        return seconds, float(metrics["loss"])

    def _epoch(self) -> Any:
        if self.script is None:
            return self._minimal()
        return self.script.train_one_epoch(
            self.epochs - 1,
            self.task.get_trainable_module(),
            self.loader,
            self.optimizer,
            self.args,
            task=self.task,
            device=self.device,
            amp_autocast=self.autocast,
        )

    def _minimal(self) -> dict[str, float]:
        total = seen = 0.0
        self.net.train()
        self.optimizer.zero_grad()
        for x, y in self.loader:
            with self.autocast():
                loss = self.task(x, y)["loss"]
            loss.backward()
            self.optimizer.step()
            total, seen = total + loss.item() * len(x), seen + len(x)
            self.optimizer.zero_grad()
        return {"loss": total / seen}


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds until the device has done all, and what came of it."""
    _wait(device)
    started = time.perf_counter()
    result = work()
    _wait(device)
    return time.perf_counter() - started, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def script(checkout: Path | None) -> ModuleType | None:
    """timm's `train.py` of a checkout, as a module; the installed timm serves it."""
    if checkout is None:
        return None
    spec = importlib.util.spec_from_file_location("timm_train", checkout / "train.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{checkout} holds no train.py of timm")
    module = importlib.util.module_from_spec(spec)
    sys.modules["timm_train"] = module
    spec.loader.exec_module(module)
    return module


def _arguments(module: ModuleType, options: list[str]) -> Any:
    """Its options as its own parser reads them, with what its `main` adds for one device."""
    args = module.parser.parse_args(options)
    args.prefetcher, args.distributed, args.rank, args.world_size = True, False, 0, 1
    args.grad_accum_steps = max(1, args.grad_accum_steps)
    return args


def told(script: ModuleType | None) -> str:
    """What timm's side is, for table and record."""
    return "a loop of timm's pieces" if script is None else "timm's train.py"


def nets(name: str, side: int, device: torch.device, *, drop: float = 0.0) -> list[nn.Module]:
    """Ours, timm's and, with `drop`, ours leaving out patches; equal weights, on the device."""
    torch.manual_seed(0)
    ours = timm.create_model(name, num_classes=CLASSES, img_size=side)
    theirs = timm.create_model(PAIRS[name], num_classes=CLASSES, img_size=side)
    made = [ours, theirs]
    if drop:
        keywords: dict[str, Any] = {
            "num_classes": CLASSES,
            "img_size": side,
            "patch_drop_rate": drop,
        }
        made.append(timm.create_model(name, **keywords))
    for net in made[1:]:
        net.load_state_dict(ours.state_dict())
    return [net.to(device).train() for net in made]


def gap(a: list[float], b: list[float]) -> float:
    """Largest relative difference of two loss curves; below 0.1 nats to that, not to nothing."""
    return max(abs(x - y) / max(abs(x), abs(y), 0.1) for x, y in zip(a, b, strict=True))
