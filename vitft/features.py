"""A frozen backbone -> features [V, N, D], each photograph and view computed once, ever.

Rows come from the store where they are there; the rest go through the backbone in batches of one
fixed shape (the last one padded), so that a row does not depend on which others were missing. The
backbone is in eval mode; `vitft.pace` says in which precision it runs; rows come out as float32.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitft import __version__, pace
from vitft.console import say, track
from vitft.errors import VitftError
from vitft.evaluate import fixed_batch, in_fixed_shape
from vitft.inputs import derive_seed, epoch_rows
from vitft.loaders import Batches
from vitft.photos import Photos
from vitft.ranks import ALONE, Ranks
from vitft.store import Key, Space, make_key
from vitft.workers import worker_count

Check = Callable[[Tensor, bool], None]
FLUSH = 2.0  # seconds of work that a kill may lose


@dataclass(frozen=True)
class Features:
    """Features of one split, rows in the split's order.

    Attributes:
        x: [V, N, D] float32, what the head reads.
        y: [N] int64.
        computed: Rows that went through the backbone now.
        reused: Rows that were there already.
        seconds: Time the call took.
    """

    x: NDArray[np.float32]
    y: NDArray[np.int64]
    computed: int
    reused: int
    seconds: float


def extract(
    net: nn.Module,
    photos: Photos,
    *,
    views: int,
    device: torch.device,
    backbone_key: str,
    dtype: str = "float32",
    precision: str = "auto",
    workers: int | str = "auto",
    root: Path | None = None,
    ranks: Ranks = ALONE,
) -> Features:
    """Features of every photograph, from the store or computed and stored.

    Args:
        net: On `device`, with timm's `forward_features`, `forward_head`, `get_classifier`.
        photos: V = 1: with the plain transform; V > 1: with an augmented one.
        views: V; view v is a pure function of (seed, v, the photograph's content).
        device: Where the backbone runs.
        backbone_key: Changes with the backbone's weights, name and pooling.
        dtype: As stored, `float32` or `float16`.
        precision: As computed, `auto`, `float32` or `bfloat16`.
        workers: Of the loader.
        root: Of the store; default the user's cache.
        ranks: Share what is missing among them.

    Raises:
        VitftError: `model.features`: the head on these features would not be the model.
    """
    started = time.monotonic()
    space, computed = fill(
        backbone_of(net.eval()),
        photos,
        views=views,
        device=device,
        backbone_key=backbone_key,
        dtype=dtype,
        precision=precision,
        check=lambda x, half: _check(net, x, half),
        workers=workers,
        root=root,
        ranks=ranks,
    )
    if computed and ranks.first:
        space.merge()
    keys = [[make_key(s, v) for s in photos.sha256] for v in range(views)]
    x = np.stack([np.stack([space.get(k) for k in row]) for row in keys])  # [V, N, D]
    seconds = time.monotonic() - started
    reused = views * len(photos) - computed
    say(f"features: {computed:,} computed, {reused:,} reused, {seconds:.1f} s")
    return Features(x, photos.labels, computed, reused, seconds)


def fill(
    forward: Callable[[Tensor], Tensor],
    photos: Photos,
    *,
    views: int,
    device: torch.device,
    backbone_key: str,
    dtype: str = "float32",
    precision: str = "auto",
    check: Check | None = None,
    workers: int | str = "auto",
    root: Path | None = None,
    what: str = "features",
    ranks: Ranks = ALONE,
) -> tuple[Space, int]:
    """A store that holds a row for every photograph and view, and how many were computed now.

    Args:
        forward: Images [B, 3, S, S] -> [B, ...], each row the photograph's own.
        photos: As for `extract`, and so are the arguments that are not told here.
        views: V.
        device: Where `forward` computes.
        backbone_key: Changes with everything that `forward` is.
        dtype: As stored.
        precision: As computed.
        check: Sees the first two images, and whether they are computed in bfloat16, beforehand.
        workers: Of the loader.
        root: Of the store.
        what: The word for the progress line.
        ranks: Each computes every n-th missing row; whoever cannot see what another wrote, since
            they have no cache folder in common, computes that too.
    """
    computing = pace.precision(device, precision)

    def opened() -> tuple[Space, dict[int, NDArray[np.int64]], int]:
        space = Space(_about(photos, backbone_key, computing), dtype, root)
        missing = {v: _missing(space, photos, v) for v in range(views)}
        ranks.meet()  # nobody writes, or merges, before all have looked
        return space, missing, sum(len(rows) for rows in missing.values())

    def compute(space: Space, missing: dict[int, NDArray[np.int64]]) -> None:
        with torch.inference_mode(), pace.in_precision(computing, device):
            _compute(space, forward, photos, missing, device, check, workers, what, ranks.here)

    space, missing, total = opened()
    if ranks.world > 1 and ranks.greatest(total):
        share = {v: rows[ranks.rank :: ranks.world] for v, rows in missing.items()}
        ranks.agreed(lambda: compute(space, share))
        space, missing, left = opened()
        if left:
            compute(space, missing)
    elif total:
        compute(space, missing)
    return space, total


def _about(photos: Photos, backbone_key: str, computing: torch.dtype) -> dict[str, str | int]:
    """Everything a row depends on besides the photograph and the number of its view."""
    about: dict[str, str | int] = {
        "backbone": backbone_key,
        "transform": photos.transform.key(),
        "decode": photos.decode.key(),
        "precision": str(computing).removeprefix("torch."),
    }
    about.update(library_versions())
    if photos.transform.kind != "plain":
        about["seed"] = photos.seed
    return about


@cache
def library_versions() -> dict[str, str]:
    """Everything whose next version may decode, resize or compute a little differently."""
    names = ("timm", "torchvision", "pillow", "numpy")
    own = {"vitft": __version__, "torch": torch.__version__}
    return {name: version(name) for name in names} | own


def _missing(space: Space, photos: Photos, view: int) -> NDArray[np.int64]:
    """One row of each photograph that has no features yet; equal files are computed once."""
    first: dict[Key, int] = {}
    for row, sha in enumerate(photos.sha256):
        key = make_key(sha, view)
        if key not in space:
            first.setdefault(key, row)
    return np.array(sorted(first.values()), dtype=np.int64)


def _compute(
    space: Space,
    forward: Callable[[Tensor], Tensor],
    photos: Photos,
    missing: dict[int, NDArray[np.int64]],
    device: torch.device,
    check: Check | None,
    workers: int | str,
    what: str,
    here: int,
) -> None:
    if not any(len(rows) for rows in missing.values()):
        return
    batches = Batches(
        photos,
        batch_size=fixed_batch(device),
        seed=photos.seed,
        shuffle=False,
        device=device,
        workers=worker_count(workers, device, here),
    )
    count = sum(-(-len(rows) // batches.batch_size) for rows in missing.values())
    paced = pace.Paced(forward, device, count)
    waiting: dict[Key, NDArray[np.float32]] = {}
    last, total = time.monotonic(), sum(len(rows) for rows in missing.values())
    steps = (b for v, rows in missing.items() if len(rows) for b in _views(batches, v, rows))
    for view, x, rows in track(steps, total, what, size=lambda batch: len(batch[1])):
        if check is not None:
            check(x[:2], torch.is_autocast_enabled(device.type))
            check = None
        out = in_fixed_shape(paced, x).float().flatten(1).cpu().numpy()
        for row, values in zip(rows.tolist(), out, strict=True):
            waiting[make_key(photos.sha256[row], view)] = values
        if time.monotonic() - last >= FLUSH:
            space.put(waiting)
            waiting, last = {}, time.monotonic()
    space.put(waiting)


def _views(
    batches: Batches, view: int, rows: NDArray[np.int64]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    for x, _, which in batches.epoch(view, rows=rows):
        yield view, x, which


def backbone_of(net: Any) -> Callable[[Tensor], Tensor]:
    """Images -> what the head of a timm model reads."""
    short = getattr(net, "forward_class_token", None)
    return lambda x: _read(net, short, x)


def _read(net: Any, short: Callable[[Tensor], Tensor] | None, x: Tensor) -> Tensor:
    if short is not None:
        return short(x)
    out: Tensor = net.forward_head(net.forward_features(x), pre_logits=True)
    return out


def _check(net: Any, x: Tensor, half: bool) -> None:
    """The head on the features must be the model, or a head trained on them is of no use."""
    rows = backbone_of(net)(x)
    whole, parts = net(x).float(), net.get_classifier()(rows).float()
    scale = float(whole.abs().max()) + 1e-6
    gap = float((whole - parts).abs().max()) / scale
    limit = 2e-2 if half else 1e-4  # bfloat16, float32
    if not gap <= limit:
        text = f"its head on its features is not the model (relative difference {gap:.1e})"
        fix = "use mode: full, or another timm model"
        raise VitftError.of("model.features", type(net).__name__, text, fix)


@torch.inference_mode()
def head_logits(
    head: nn.Module, x: NDArray[np.float32], device: torch.device
) -> NDArray[np.float32]:
    """A head over features [N, D] -> logits [N, C] float32, in batches of the fixed shape."""
    head.eval()
    parts = torch.split(torch.as_tensor(x), fixed_batch(device))
    out = [in_fixed_shape(lambda b: head(b).float(), part.to(device)).cpu() for part in parts]
    return np.asarray(torch.cat(out).numpy())


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On its way to the device; on CUDA from pinned memory, so that nobody waits for it."""
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


class Views:
    """Cached features as batches for the training loop: each epoch draws one view per photograph.

    Args:
        cached: [V, N, D].
        batch_size: Rows per batch.
        seed: Order and views are pure functions of (seed, epoch).
        device: Where the batches go; the whole table is kept there.
        names: Rows -> files, for error texts.
        ranks: Each gets its share of every batch.
        balanced: Every class equally often in an epoch.
    """

    def __init__(
        self,
        cached: Features,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        names: Sequence[Path],
        ranks: Ranks = ALONE,
        balanced: bool = False,
    ) -> None:
        self.ranks, self.balanced = ranks, balanced
        self.x = torch.as_tensor(cached.x).to(device)  # [V, N, D]
        self.y = torch.as_tensor(cached.y).to(device)
        self.labels, self.views = cached.y, len(self.x)
        self.batch_size, self.seed, self.files = batch_size, seed, names

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches of one epoch from the `start`-th on.

        Nothing is read back from the device: on CUDA that would wait for every step in the queue.

        Yields:
            x [B, D] and y [B] on the device, rows [B] on the host.
        """
        views, rows = self.plan(epoch)
        placed = sent(views, self.y.device), sent(rows, self.y.device)
        for own in self.shares(len(rows), start):
            yield *self.take(placed[0][own], placed[1][own]), rows[own]

    def plan(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The views and rows of an epoch in their order, int64 [n] each, on the host."""
        rows = torch.as_tensor(epoch_rows(self.labels, self.seed, epoch, balanced=self.balanced))
        return self.drawn(epoch)[rows], rows

    def shares(self, count: int, start: int) -> Iterator[slice]:
        """Where this rank's part of each batch lies among so many rows, from a batch on."""
        for first in range(start * self.batch_size, count, self.batch_size):
            share = first + self.ranks.share(min(self.batch_size, count - first))
            yield slice(share[0], share[-1] + 1) if len(share) else slice(0)  # shares are runs

    def drawn(self, epoch: int) -> Tensor:
        """The view of each photograph in this epoch, int64 [N]."""
        rng = np.random.default_rng(derive_seed(self.seed, "view", epoch))
        return torch.as_tensor(rng.integers(self.views, size=len(self.labels)))

    def take(self, views: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[B, D] and [B] of some rows, each in its view."""
        return self.x[views, rows], self.y[rows]

    def names(self, rows: Tensor) -> list[str]:
        """The files behind some rows."""
        return [str(self.files[int(row)]) for row in rows]
