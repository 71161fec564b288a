"""From rows of the index to batches on the device, the same ones however they are made.

    order     permutation(n, seed, epoch)
    view      transform of an image, drawn from (seed, epoch, sha256 of the image)
    mixing    mixup and cutmix, drawn from (seed, epoch, step)

Of photographs afar the order also goes by the pieces of their files (`vitft.ahead`). Nothing else
has a say: not the number of workers, not where an epoch was resumed, not the batch size (mixing
apart), not what the training loop drew in between.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data.mixup import Mixup
from torch import Tensor

from vitft import ahead
from vitft.errors import DataError
from vitft.inputs import derive_seed, epoch_rows, erase, normalise, seeded
from vitft.photos import Photos
from vitft.ranks import ALONE, Ranks
from vitft.workers import Batch, Pool, Steps, fitting, worker_count

TIMEOUT = 120.0  # seconds without a batch before the workers are given up
SLOW_LINE = 10  # times that, where a batch may wait for a network that has limits of its own


class Batches:
    """Normalised batches on the device, epoch by epoch.

    Args:
        photos: What to load.
        batch_size: Images per step; the last step may have fewer.
        seed: Of the run; orders and mixes.
        shuffle: A new order each epoch, or that of the rows.
        balanced: With `shuffle`: every class equally often in an epoch.
        device: Where batches go.
        workers: Processes that decode, 0 for this one, or `auto`.
        mixup: Alpha of the beta distribution; 0 is off.
        cutmix: Alpha of the beta distribution; 0 is off.
        classes: C, needed for mixing: targets become float32 [B, C].
        drop_last: Leave out a last step that is not full.
        joins_last: A last photograph that would be a step of its own belongs to the one before, as
            batch normalisation makes nothing of it.
        timeout: Seconds without a batch from the workers before they are given up.
        ranks: Each gets its share of every batch; where it mixes, of pairs that belong together.

    Raises:
        DataError: `data.no_batches`: not a single step.
        MachineError: `env.shared_memory`: too little of it for the workers' batches.
    """

    def __init__(
        self,
        photos: Photos,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        device: torch.device,
        workers: int | str = "auto",
        mixup: float = 0.0,
        cutmix: float = 0.0,
        classes: int = 0,
        drop_last: bool = False,
        timeout: float = TIMEOUT,
        ranks: Ranks = ALONE,
        balanced: bool = False,
        joins_last: bool = False,
    ) -> None:
        self.photos, self.batch_size, self.seed = photos, batch_size, seed
        self.shuffle, self.device, self.drop_last = shuffle, device, drop_last
        self.balanced = balanced
        self.transform = photos.transform
        self.workers = worker_count(workers, device, ranks.here)
        if workers == "auto":
            self.workers = fitting(self.workers, batch_size, self.transform)
        self._mixup = _mixup(mixup, cutmix, classes)
        self._steps = Steps(ranks, pairs=self._mixup is not None, joins_last=joins_last)
        self._afar = ahead.pieces(photos.files)
        self._pool = Pool(
            photos,
            batch_size=batch_size,
            workers=self.workers,
            timeout=timeout if self._afar is None else SLOW_LINE * timeout,
            steps=self._steps,
            pin=device.type == "cuda",
        )
        self._side = _side_stream(device)
        if not len(self):
            text = f"{len(photos)} images make no batch of {batch_size}"
            raise DataError.of("data.no_batches", "data.root", text, "lower train.batch_size")

    def __len__(self) -> int:
        """Steps of a whole epoch."""
        return self._count(len(self.photos))

    def __iter__(self) -> Iterator[Batch]:
        """Epoch 0, which is all there is where nothing is random."""
        return self.epoch(0)

    def epoch(
        self, epoch: int, start: int = 0, rows: NDArray[np.int64] | None = None
    ) -> Iterator[Batch]:
        """The batches of one epoch.

        Args:
            epoch: From 0; for cached features the number of the view.
            start: First step; nothing before it is decoded.
            rows: Only these rows, in this order; all in the epoch's order where None.

        Yields:
            x float32 [B, 3, S, S] normalised, y int64 [B] (float32 [B, C] where mixed), rows
            int64 [B]; x and y on the device, rows on the host, where they are read.

        Raises:
            DataError: The file named cannot be used any more.
            MachineError: `env.worker_died`, `env.worker_hangs`.
        """
        order = self._order(epoch) if rows is None else np.asarray(rows, dtype=np.int64)
        self._steps.plan(epoch, order, self.batch_size, range(start, self._count(len(order))))
        with ExitStack() as stack:
            reached: Callable[[int], None] | None = None
            for step, (x, y, which) in enumerate(self._ahead(self._pool.batches()), start):
                if self._afar is not None:  # with the first batch here, workers have been forked
                    reached = reached or stack.enter_context(self._fetching(self._afar))
                    reached(step - start)
                yield self._finish(x, y, which, epoch, step)

    def _fetching(self, held: ahead.Pieces) -> AbstractContextManager[Callable[[int], None]]:
        steps = [np.array([row for _, row in keys], np.int64) for keys in self._steps]
        return ahead.fetching(held, steps)

    def names(self, rows: Tensor) -> list[str]:
        """The files behind some rows, for error texts."""
        return [str(self.photos.files[int(row)]) for row in rows]

    def close(self) -> None:
        """Ends the workers; the next epoch starts new ones."""
        self._pool.close()

    def _count(self, n: int) -> int:
        if self.drop_last:
            return n // self.batch_size
        return self._steps.count(n, self.batch_size)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        n = len(self.photos)
        if not self.shuffle:
            return np.arange(n, dtype=np.int64)
        order = epoch_rows(self.photos.labels, self.seed, epoch, balanced=self.balanced)
        if self._afar is None:
            return order
        return ahead.in_windows(order, self._afar, self.seed, epoch)

    # -- on the device --

    def _ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Moves to the device; on CUDA the next batch travels while this one is worked on."""
        side = self._side
        if side is None:
            for batch in batches:
                yield _moved(batch, self.device)
            return
        waiting: tuple[Batch, torch.cuda.Event] | None = None
        for batch in batches:
            with torch.cuda.stream(side):
                moved = _moved(batch, self.device)
            copied = side.record_event()
            if waiting is not None:
                yield _handed_over(*waiting, self.device)
            waiting = moved, copied
        if waiting is not None:
            yield _handed_over(*waiting, self.device)

    def _finish(self, x: Tensor, y: Tensor, rows: Tensor, epoch: int, step: int) -> Batch:
        """Normalises as timm does, erases, mixes."""
        inputs = normalise(x, self.transform)  # [B, 3, S, S]
        share = self.transform.erase
        if share > 0:
            for image, row in zip(inputs, rows.tolist(), strict=True):
                erase(image, share, self.photos.view_seed(epoch, row, "erase"))
        if self._mixup is None:
            return inputs, y, rows
        with seeded(derive_seed(self.seed, "mix", epoch, step)):
            return inputs, _mix(self._mixup, inputs, y), rows


def _mixup(mixup: float, cutmix: float, classes: int) -> Mixup | None:
    if mixup <= 0 and cutmix <= 0:
        return None
    return Mixup(  # type: ignore[no-untyped-call]
        mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.0, num_classes=classes
    )


def _mix(mixup: Mixup, x: Tensor, y: Tensor) -> Tensor:
    """Mixes x in place and returns targets [B, C]; an odd last image stays as it is."""
    targets = torch.nn.functional.one_hot(y, mixup.num_classes).to(torch.float32)
    even = len(x) - len(x) % 2  # timm pairs the images
    if even:
        _, targets[:even] = mixup(x[:even], y[:even])
    return targets


def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """One for all epochs: the allocator keeps a pool of memory for every stream it has seen."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _moved(batch: Batch, device: torch.device) -> Batch:
    x, y, rows = batch
    return x.to(device, non_blocking=True), y.to(device, non_blocking=True), rows


def _handed_over(batch: Batch, copied: torch.cuda.Event, device: torch.device) -> Batch:
    """Makes the consumer's stream wait for this copy alone, and the memory for the consumer."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for part in batch[:2]:
        part.record_stream(current)
    return batch
