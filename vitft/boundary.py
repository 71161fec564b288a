"""The last K blocks on activations kept where the freezing ends: `train.blocks`, `train.views`.

    front   patches, positions and all blocks but the last K: frozen, so run once per view and kept
    tail    the last K blocks, the final norm and the head: what the loop trains, on kept tokens

The tail is the model itself with another `forward`: it shares every tensor and its name with the
model, so that optimizer groups, checkpoints and products know nothing of the cut. That tail after
front is the whole model is proven on two photographs before anything is kept.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitft import features, model
from vitft.console import say
from vitft.errors import RecipeError, VitftError
from vitft.evaluate import Predictions, fixed_batch, in_fixed_shape
from vitft.features import Views
from vitft.photos import Photos
from vitft.prepare import Prepared, batch_size
from vitft.ranks import ALONE, Ranks
from vitft.store import Space, make_key

AHEAD = 1  # batches that are read while one is learned from
LIMIT = 1e-4  # relative difference of logits, above which the cut is not clean


class Cut(Exception):
    """Carries the tokens that were about to enter the last K blocks."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens


def front(net: nn.Module, blocks: int) -> Callable[[Tensor], Tensor]:
    """Images [B, 3, S, S] -> tokens [B, T, D] before the last `blocks` blocks."""
    first: nn.Module = _blocks(net)[-blocks]

    def leave(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        raise Cut(inputs[0])

    def forward(x: Tensor) -> Tensor:
        handle = first.register_forward_pre_hook(leave)
        try:
            net(x)
        except Cut as cut:
            return cut.tokens
        finally:
            handle.remove()
        raise RuntimeError("the model never reached its last blocks")

    return forward


def tail(net: nn.Module, blocks: int) -> nn.Module:
    """Tokens [B, T, D] -> logits [B, C]: the model's own tensors under their own names."""

    def forward(self: Any, tokens: Tensor) -> Tensor:
        for block in self.blocks[-blocks:-1]:
            tokens = block(tokens)
        last = self.blocks[-1]
        short = hasattr(self, "forward_class_token") and self.global_pool == "token"
        tokens = last.first_token(tokens) if short else last(tokens)
        out: Tensor = self.forward_head(self.norm(tokens))
        return out

    part = copy.copy(net)  # its tables of parameters and modules are the model's
    part.__class__ = type("Tail", (type(net),), {"forward": forward})
    return part


def _blocks(net: nn.Module) -> Sequence[Any]:
    blocks: Sequence[Any] = net.blocks  # type: ignore[assignment]
    return blocks


@dataclass(frozen=True)
class Kept:
    """Activations of one split, read from the store as they are needed.

    Attributes:
        space: Rows of T * D values.
        photos: Whose they are.
        shape: (T, D).
        views: V, each a row per photograph.
    """

    space: Space
    photos: Photos
    shape: tuple[int, int]
    views: int

    def tokens(self, rows: Sequence[int], views: Sequence[int], device: torch.device) -> Tensor:
        """[B, T, D] float32 of some rows, each in its view; on its way to the device."""
        here = self.room(len(rows), device)
        self.read(here, rows, views)
        return here.to(device, non_blocking=True)

    def room(self, count: int, device: torch.device) -> Tensor:
        """Memory for so many rows, [B, T, D].

        For CUDA it can be read without waiting. torch hands that out again when the copy is done,
        so that after the first steps nothing is allocated.
        """
        return torch.empty(count, *self.shape, pin_memory=device.type == "cuda")

    def read(self, room: Tensor, rows: Sequence[int], views: Sequence[int]) -> None:
        """Fills it from the store; in any thread."""
        for place, row, view in zip(room.flatten(1).numpy(), rows, views, strict=True):
            place[:] = self.space.get(make_key(self.photos.sha256[row], view))


class Tokens(Views):
    """Kept activations as batches for the loop; each epoch draws one view per photograph.

    While one batch is learned from, a thread reads the next. With one block of ViT-S/14 and batch
    16 on one core, 21 of a step's 237 ms went by waiting for rows that memory does not hold, with
    the thread 2; rows that it holds take 2 to 4 ms, and gain nothing there.
    """

    def __init__(
        self,
        kept: Kept,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        ranks: Ranks = ALONE,
        balanced: bool = False,
    ) -> None:
        self.ranks, self.balanced = ranks, balanced
        self.kept, self.views, self.device = kept, kept.views, device
        self.labels = kept.photos.labels
        self.batch_size, self.seed, self.files = batch_size, seed, kept.photos.files

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """As of `Views`: x [B, T, D], y [B] and rows [B]."""
        views, rows = self.plan(epoch)
        waiting: deque[tuple[Future[None], Tensor, Tensor]] = deque()
        with ThreadPoolExecutor(1) as reader:
            for own in self.shares(len(rows), start):
                here = self.kept.room(len(rows[own]), self.device)
                read = reader.submit(self.kept.read, here, rows[own].tolist(), views[own].tolist())
                waiting.append((read, here, rows[own]))
                if len(waiting) > AHEAD:
                    yield self._arrived(*waiting.popleft())
            while waiting:
                yield self._arrived(*waiting.popleft())

    def _arrived(
        self, read: "Future[None]", here: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        read.result()
        labels = features.sent(torch.as_tensor(self.labels)[rows], self.device)
        return here.to(self.device, non_blocking=True), labels, rows


def keep(p: Prepared, split: str, *, views: int) -> Kept:
    """Computes what is missing of a split's activations.

    Raises:
        RecipeError: `train.boundary`: the model cannot be cut before its last blocks.
    """
    blocks = int(p.recipe.train.blocks or 0)
    photos = p.photos(split, augment=views > 1)
    p.net.eval()
    shape = checked_shape(p, blocks)
    space, computed = features.fill(
        front(p.net, blocks),
        photos,
        views=views,
        device=p.device,
        backbone_key=f"{p.recipe.model.name} {model.frozen_fingerprint(p.net)} before {blocks}",
        dtype=p.recipe.head.feature_dtype,
        precision=p.recipe.head.precision,
        workers=p.recipe.train.workers,
        what="activations",
        ranks=p.ranks,
    )
    reused = views * len(photos) - computed
    say(f"activations before the last {blocks} blocks: {computed:,} computed, {reused:,} reused")
    return Kept(space, photos, shape, views)


@torch.inference_mode()
def checked_shape(p: Prepared, blocks: int) -> tuple[int, int]:
    """(T, D), after the parts gave what the whole model gives, in eval mode."""
    p.net.eval()
    side = p.config.size
    generator = torch.Generator().manual_seed(p.recipe.seed)
    x = torch.randn(2, 3, *side, generator=generator).to(p.device)
    try:
        tokens = in_fixed_shape(front(p.net, blocks), x)
        parts = in_fixed_shape(tail(p.net, blocks), tokens).float()
        whole = in_fixed_shape(p.net, x).float()
        gap = float((parts - whole).abs().max()) / (float(whole.abs().max()) + 1e-6)
        clean = tokens.dim() == 3 and gap <= LIMIT
    except (RuntimeError, TypeError, AttributeError) as error:
        raise _not_clean(p, f"{type(error).__name__}: {error}") from None
    if not clean:
        raise _not_clean(p, f"relative difference {gap:.1e}")
    return int(tokens.shape[1]), int(tokens.shape[2])


def _not_clean(p: Prepared, what: str) -> VitftError:
    text = f"{p.recipe.model.name} cannot be cut before its last blocks ({what[:200]})"
    fix = "set train.views: online"
    return RecipeError.of("train.boundary", p.recipe.place("train.views"), text, fix)


def check_budget(p: Prepared, views: int) -> None:
    """Before anything is computed: the activations of train and val must fit the budget.

    Raises:
        RecipeError: `train.activations`.
    """
    spec = p.recipe.train
    tokens, width = checked_shape(p, int(spec.blocks or 0))
    item = np.dtype(p.recipe.head.feature_dtype).itemsize
    count = views * len(p.index.rows("train")) + len(p.index.rows("val"))
    need = count * tokens * width * item / 1e9
    if need <= spec.activations_gb:
        say(f"activations: {need:.2f} GB in the cache (python -m vitft.cache clear removes them)")
        return
    text = f"{count:,} activations of {tokens} x {width} values need {need:.2f} GB of disk, "
    text += f"train.activations_gb allows {spec.activations_gb:g}"
    fix = "raise train.activations_gb, lower train.views, or set train.views: online"
    raise RecipeError.of("train.activations", p.recipe.place("train.views"), text, fix)


def batches(p: Prepared, kept: Kept) -> Tokens:
    """The training batches."""
    size = batch_size(p.recipe.train, p.device)
    balanced = p.recipe.train.sampling == "balanced"
    return Tokens(
        kept,
        batch_size=size,
        seed=p.recipe.seed,
        device=p.device,
        ranks=p.ranks,
        balanced=balanced,
    )


@torch.inference_mode()
def predict(
    net: nn.Module, kept: Kept, device: torch.device, rows: NDArray[np.int64] | None = None
) -> Predictions:
    """What a tail says of a split, or of some of its rows, as the whole model would."""
    net.eval()
    wanted = np.arange(len(kept.photos)) if rows is None else rows
    parts = []
    for start in range(0, len(wanted), fixed_batch(device)):
        some = wanted[start : start + fixed_batch(device)].tolist()
        tokens = kept.tokens(some, [0] * len(some), device)
        parts.append(in_fixed_shape(net, tokens).float().cpu())
    return Predictions(torch.cat(parts).numpy(), kept.photos.labels[wanted])
