"""In which precision a backbone is run, and whether compiling it, or training, pays for itself.

On CPU nothing is compiled: ViT-S/14 in float32, one thread of a busy Zen 5 core, images per second
of processor time, in turns: timm eager 6.2, timm compiled 6.3, oneDNN products (`vitft.kernels`)
with the class token alone in the last block 7.1, those compiled 7.0; compiling took over a minute.
On CUDA work is timed as it goes: a backbone's forward, or an update of the weights (`vitft.step`).
Once what is left would win back the time that compiling takes, it is compiled, in mid-pass.
Compiled and eager rows differ in the last bits of bfloat16, as they do between GPUs, and share a
store.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitft.console import say, warn
from vitft.errors import MachineError, VitftError

COST = 60.0  # seconds that compiling a ViT takes, about
GAIN = 0.12  # share of the forward saved: timm's tables, ViT-B on an RTX 4090, 13 % more images/s
WARM = 3  # times before work is at its speed
TIMED = 8  # times that are timed
NATIVE = {"avx512_bf16", "amx_bf16", "bf16"}  # what Linux calls it, on x86 and on ARM

Forward = Callable[[Tensor], Tensor]


def precision(device: torch.device, wanted: str = "auto") -> torch.dtype:
    """float32 or bfloat16.

    Args:
        device: Where the backbone runs.
        wanted: `auto`: bfloat16 on CUDA that computes in it, float32 elsewhere, since on CPU the
            features are promised to be exact; or either by name.

    Raises:
        MachineError: `env.no_bfloat16`: asked for where it would be emulated, slower than float32.
    """
    native = has_bfloat16(device)
    if wanted == "bfloat16" and not native:
        text = f"{device} does not compute in bfloat16; it would be slower than float32"
        raise MachineError.of("env.no_bfloat16", "head.precision", text, "set head.precision: auto")
    if wanted == "auto":
        return torch.bfloat16 if native and device.type == "cuda" else torch.float32
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def as_measured(device: torch.device, precision_then: str) -> torch.dtype:
    """What a product computes in: what it was measured in, or float32 where that is emulated here.

    Args:
        device: Where it runs now.
        precision_then: `float32`, `bfloat16`, or `auto` where its Card does not say.
    """
    able = precision_then != "bfloat16" or has_bfloat16(device)
    return precision(device, precision_then if able else "float32")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16, rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(NATIVE & cpu_flags())


@cache
def cpu_flags() -> frozenset[str]:
    """What the processor says it can; empty where Linux does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return frozenset()
    told = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(told, "").split())


def in_precision(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to bfloat16, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16)


def pays(device: torch.device, times: int, seconds: float, waited: float, gain: float) -> bool:
    """Whether compiling now ends the work sooner.

    Args:
        device: Where it is done.
        times: It will be done yet.
        seconds: It takes once.
        waited: Seconds between two of them; where the device waits for photographs more than half
            the time, a faster one waits longer.
        gain: Share of the time that compiled code saves.
    """
    return device.type == "cuda" and waited <= seconds and times * seconds * gain > COST


class Watch:
    """Times work that is done again and again; `pays` says, once, that it should be compiled.

    Args:
        device: Where it is done; elsewhere than on CUDA nothing is timed.
        gain: Share of the time that compiled code saves.
    """

    def __init__(self, device: torch.device, gain: float) -> None:
        self.device, self.gain = device, gain
        self.watching = device.type == "cuda"
        self.times: list[tuple[float, float]] = []  # (waited, worked) of each, seconds
        self.ended = time.perf_counter()

    @contextmanager
    def timed(self, *, rested: bool = False) -> Iterator[None]:
        """Around the work; what is timed waits for the device.

        Args:
            rested: Something else than waiting for photographs came before, such as validation.
        """
        started = time.perf_counter()
        self.ended = started if rested else self.ended
        yield
        if not self.watching:
            return
        self._synchronize()
        ended = time.perf_counter()
        self.times.append((started - self.ended, ended - started))
        self.ended = ended

    def pays(self, left: int) -> bool:
        """After some times, with so many yet to come; never again afterwards."""
        if not self.watching or len(self.times) < WARM + TIMED:
            return False
        self.watching = False
        waited, seconds = (sum(part) / TIMED for part in zip(*self.times[WARM:], strict=True))
        return pays(self.device, left, seconds, waited, self.gain)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Paced:
    """A forward that is compiled once that pays; called with batches of one shape.

    Args:
        forward: Images [B, 3, S, S] -> rows.
        device: Where it runs.
        batches: How many will come.
    """

    def __init__(self, forward: Forward, device: torch.device, batches: int) -> None:
        self.forward, self.device, self.left = forward, device, batches
        self.watch = Watch(device, GAIN)

    def __call__(self, x: Tensor) -> Tensor:
        """One batch."""
        self.left -= 1
        with self.watch.timed():
            out = self.forward(x)
        if self.watch.pays(self.left):
            self._compile(x)
        return out

    def _compile(self, x: Tensor) -> None:
        say(compiling("the backbone", self.left, "batches"))
        try:
            compiled = torch.compile(self.forward, dynamic=False)
            compiled(x)
        except Exception as error:  # whatever a compiler may raise: the eager forward is there
            warn(str(not_compiled(self.device, "the backbone", error)))
            return
        self.forward = compiled


def compiling(what: str, left: int, of: str) -> str:
    """What is said before."""
    return f"compiling {what} for {left:,} more {of}, about {COST:.0f} s"


def not_compiled(
    device: torch.device, what: str, error: Exception, *, asked: bool = False
) -> VitftError:
    """What is said where it failed; an error where nothing else was `asked` for."""
    said = " ".join(str(error).split()) or "without a word"
    text = f"{what} {'cannot be' if asked else 'was not'} compiled"
    text += ": " if asked else ", and goes on as before, slower: "
    other = "set train.compile: false" if asked else "leave it as it is"
    fix = f"give this torch what it compiles with (Triton, a C++ compiler), or {other}"
    text += f"{type(error).__name__}: {said[:300]}"
    return MachineError.of("env.not_compiled", device, text, fix)
