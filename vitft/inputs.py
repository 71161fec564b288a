"""What a photograph becomes on its way into a network, and where its randomness comes from.

The pixels are those of timm's transforms, which the tests hold beside ours. A random crop draws
from generators of its own and may be made in any thread. timm's policies draw from the global
generators of `random`, numpy and torch: these are lent a seed for one image at a time and given
back as they were, which is safe in one thread only.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
from numpy.random import mtrand
from numpy.typing import NDArray
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms import Compose

from vitft.errors import RecipeError
from vitft.resize import FAST, Picture, as_image, centred, random_box, resized, size_of


@dataclass(frozen=True)
class InputConfig:
    """What a model wants to be fed, as its weights were trained.

    Attributes:
        size: Height and width in pixels.
        mean: Per channel, 0 to 1.
        std: Per channel, 0 to 1.
        interpolation: `bilinear`, `bicubic`, ...
        crop_pct: Share of the resized short side that the centre crop keeps.
        crop_mode: timm's `center`, `squash` or `border`.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"


@dataclass(frozen=True)
class TransformSpec:
    """Every parameter between a decoded picture and the network; part of cache keys and exports.

    Attributes:
        kind: `plain` (resize, centre crop) or `augmented` (random crop, flip, and what follows).
        size: Height and width in pixels.
        mean: Per channel, 0 to 1.
        std: Per channel, 0 to 1.
        interpolation: Of every resize.
        crop_pct: Of the plain centre crop.
        crop_mode: Of the plain crop.
        scale: Share of the picture's area that a random crop takes, from and to.
        ratio: Width over height of a random crop, from and to.
        hflip: Probability of mirroring.
        auto_augment: timm's policy text, such as `rand-m9-mstd0.5-inc1`; None for none.
        erase: Probability of erasing one rectangle with noise.
        resize: `pillow`, or `fast` by torch (see `vitft.resize` for how far they differ).
    """

    kind: str
    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    crop_pct: float = 0.875
    crop_mode: str = "center"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    auto_augment: str | None = None
    erase: float = 0.0
    resize: str = "pillow"

    def key(self) -> str:
        """Canonical JSON of all that can change an input; the reference goes without saying."""
        fields = asdict(self)
        if self.resize == "pillow":
            del fields["resize"]
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))


class Augmentation(Protocol):
    """The part of the recipe's `train` section that makes views."""

    @property
    def augment(self) -> str:
        """`tutorial`, `plain`, or timm's policy text."""
        ...

    @property
    def reprob(self) -> float:
        """Probability of random erasing."""
        ...


def plain(config: InputConfig, transform: str = "timm", resize: str = "pillow") -> TransformSpec:
    """The transform of evaluation and prediction.

    Args:
        config: Of the model.
        transform: `timm` (also `auto`) does what the model's data config says; `tutorial` resizes
            to 8/7 of the size (256 for 224) and crops the centre, bilinear. Mean and standard
            deviation always belong to the weights.
        resize: `pillow` or `fast`.

    Raises:
        RecipeError: `recipe.value`: there is no fast way to what the model wants.
    """
    bilinear = transform == "tutorial"
    spec = TransformSpec(
        kind="plain",
        size=config.size,
        mean=config.mean,
        std=config.std,
        interpolation="bilinear" if bilinear else config.interpolation,
        crop_pct=0.875 if bilinear else config.crop_pct,
        crop_mode="center" if bilinear else config.crop_mode,
        resize=resize,
    )
    if resize == "fast" and not _has_fast_way(spec):
        text = f"got fast, which knows neither crop mode {spec.crop_mode} of {spec.size} px nor "
        text += f"{spec.interpolation} beside centre crops of squares, {' and '.join(FAST)}"
        raise RecipeError.of("recipe.value", "data.resize", text, "set data.resize: pillow")
    return spec


def _has_fast_way(spec: TransformSpec) -> bool:
    square = spec.size[0] == spec.size[1]
    mode = spec.crop_mode == "squash" or (spec.crop_mode == "center" and square)
    return mode and spec.interpolation in FAST


def augmented(
    config: InputConfig, train: Augmentation, transform: str = "timm", resize: str = "pillow"
) -> TransformSpec:
    """The transform of training.

    Args:
        config: Of the model.
        train: `augment: tutorial` is a random crop (8 to 100 % of the area, aspect 3/4 to 4/3) and
            a mirror image half of the time; a policy text puts timm's policy on top; `plain`
            leaves only the erasing, if any.
        transform: As for `plain`; `tutorial` resizes bilinearly.
        resize: As for `plain`.

    Raises:
        RecipeError: `recipe.value`: timm knows no such policy; as `plain`.
    """
    policy = None if train.augment in ("tutorial", "plain") else train.augment
    fields = asdict(plain(config, transform, resize)) | {"erase": train.reprob}
    if train.augment != "plain":
        fields |= {"kind": "augmented", "auto_augment": policy}
    spec = TransformSpec(**fields)
    try:
        Transform(spec)
    except Exception as error:  # timm asserts, indexes and looks up
        fix = "use tutorial, plain, or a timm policy such as rand-m9-mstd0.5-inc1"
        text = f"got {train.augment!r}, which timm does not know ({error or type(error).__name__})"
        raise RecipeError.of("recipe.value", "train.augment", text, fix) from None
    return spec


def pixels(spec: TransformSpec) -> Callable[[Picture], Tensor]:
    """RGB picture -> uint8 [3, S, S]; a random transform draws from the global generators."""
    return Transform(spec)


class Transform:
    """A transform as a function: picture -> uint8 [3, S, S].

    Args:
        spec: What to do.

    Attributes:
        any_thread: `view` may be called in several threads at once.
    """

    def __init__(self, spec: TransformSpec) -> None:
        self.spec, self.fast = spec, spec.resize == "fast"
        self.any_thread = spec.auto_augment is None
        self._timm = _timm(spec)

    def __call__(self, picture: Picture) -> Tensor:
        """The input; what is random is drawn from the global generators."""
        if self.spec.kind == "augmented":
            return self._augmented(picture, random, torch.default_generator)
        if self.fast:
            s = self.spec
            return centred(
                picture, s.size, s.crop_pct, s.interpolation, squash=s.crop_mode != "center"
            )
        return self._timm(as_image(picture))

    def view(self, picture: Picture, seed: int) -> Tensor:
        """The input; what is random depends on the seed alone, in the draws that timm makes."""
        if self.spec.kind == "plain":
            return self(picture)
        if self.any_thread:
            generator = torch.Generator().manual_seed(seed)
            return self._augmented(picture, random.Random(seed), generator)
        with seeded(seed):
            return self(picture)

    def _augmented(
        self, picture: Picture, draw: random.Random | ModuleType, coin: torch.Generator
    ) -> Tensor:
        spec = self.spec
        box = random_box(*size_of(picture), spec.scale, spec.ratio, draw)
        out = resized(
            picture,
            spec.size,
            spec.interpolation,
            fast=self.fast,
            box=box,
            mirrored=float(torch.rand(1, generator=coin)) < spec.hflip,
        )
        if spec.auto_augment is None:
            return out
        return self._timm(Image.fromarray(out.permute(1, 2, 0).numpy()))


def _timm(spec: TransformSpec) -> Callable[[Image.Image], Tensor]:
    """The part that stays timm's: all of a plain transform, the policy of an augmented one."""
    whole = create_transform(
        input_size=(3, *spec.size),
        is_training=spec.kind == "augmented",
        color_jitter=None,  # type: ignore[arg-type]  # timm means "none" by it
        auto_augment=spec.auto_augment,
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
        use_prefetcher=True,  # leaves uint8; normalising is the device's work
        separate=spec.kind == "augmented",
    )
    if spec.kind == "plain":
        return whole  # type: ignore[no-any-return]
    _, policy, final = whole
    return Compose([policy, final])  # type: ignore[no-any-return]


def normalise(images: Tensor, transform: TransformSpec) -> Tensor:
    """What the network eats, computed where the images are, in float32 and in timm's order.

    Args:
        images: uint8 [B, 3, S, S].
        transform: Its mean and standard deviation are used.

    Returns:
        float32 [B, 3, S, S].
    """
    mean = _channels(transform.mean, images.device)
    std = _channels(transform.std, images.device)
    return images.to(torch.float32).sub_(mean).div_(std)


@cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[1, 3, 1, 1], in units of uint8; kept, since sending it anew would make CUDA wait."""
    scaled = [value * 255 for value in values]
    return torch.tensor(scaled, dtype=torch.float32, device=device).view(1, -1, 1, 1)


# ---- randomness ---------------------------------------------------------------------------------


def derive_seed(seed: int, *parts: int | str) -> int:
    """A seed of 63 bits that is a pure function of its arguments, equal on every machine.

    Example:
        >>> derive_seed(0, "order", 3) == derive_seed(0, "order", 3)
        True
    """
    text = json.dumps([int(seed), *parts], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def permutation(n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of an epoch, [n]; a pure function of its arguments."""
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "order", epoch)))
    return generator.permutation(n).astype(np.int64)


def epoch_rows(
    labels: NDArray[np.int64], seed: int, epoch: int, *, balanced: bool = False
) -> NDArray[np.int64]:
    """The rows of an epoch in their order, [n]; a pure function of its arguments.

    Args:
        labels: int [n].
        seed: Of the run.
        epoch: From 0.
        balanced: Every class equally often (to one photograph), whatever its size: rows of small
            classes come again and again, of large ones some stay away until a later epoch.
    """
    if not balanced:
        return permutation(len(labels), seed, epoch)
    draw = np.random.Generator(np.random.PCG64(derive_seed(seed, "balanced", epoch)))
    present = draw.permutation(np.unique(labels))
    shares = np.full(len(present), len(labels) // len(present))
    shares[: len(labels) % len(present)] += 1
    drawn = []
    for label, share in zip(present, shares, strict=True):
        own = np.flatnonzero(labels == label)
        rounds = [draw.permutation(own) for _ in range(math.ceil(share / len(own)))]
        drawn.append(np.concatenate([own[:0], *rounds])[:share])
    return draw.permutation(np.concatenate(drawn)).astype(np.int64)


@cache
def _scratch() -> np.random.MT19937:
    """The generator that numpy's global functions draw from while they are lent a seed."""
    return np.random.MT19937(0)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Lends a seed to the global CPU generators of `random`, numpy and torch, for this thread only.

    numpy's generator is swapped as a whole: copying its state takes 30 times longer, and so does
    making a new one. CUDA's generators are not touched, as `torch.manual_seed` would.
    """
    python, torch_state = random.getstate(), torch.get_rng_state()
    numpy_generator = mtrand.get_bit_generator()
    try:
        mtrand.set_bit_generator(_scratch())
        np.random.seed(seed & 0xFFFFFFFF)
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        mtrand.set_bit_generator(numpy_generator)
        torch.set_rng_state(torch_state)
        random.setstate(python)


def erase(image: Tensor, probability: float, seed: int) -> None:
    """Fills one rectangle of a normalised image with unit noise, in place, or leaves it.

    Args:
        image: float32 [3, H, W]; 2 to 33 % of its area, aspect 0.3 to 3.3.
        probability: Of doing anything.
        seed: Decides all; the noise is drawn on the CPU, so it is the same on every device.

    Source: Zhong et al., Random Erasing Data Augmentation, 2017; areas as in timm.
    """
    draw = random.Random(seed)
    if draw.random() >= probability:
        return
    channels, height, width = image.shape
    for _ in range(10):
        area = draw.uniform(0.02, 1 / 3) * height * width
        aspect = math.exp(draw.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = draw.randint(0, height - h), draw.randint(0, width - w)
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn((channels, h, w), generator=generator)
            if image.device.type == "cuda":  # else the copy would make the host wait
                noise = noise.pin_memory()
            there = noise.to(image.device, non_blocking=True)
            image[:, top : top + h, left : left + w] = there
            return
