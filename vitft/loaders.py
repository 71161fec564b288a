"""From rows of the index to batches on the device, the same ones however they are made.

    order     permutation(n, seed, epoch)
    view      transform of an image, drawn from (seed, epoch, sha256 of the image)
    mixing    mixup and cutmix, drawn from (seed, epoch, step)

Nothing else has a say: not the number of workers, not where an epoch was resumed, not the batch
size (mixing apart), not what the training loop drew in between.
"""

import hashlib
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data.mixup import Mixup
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vitft import images
from vitft.console import warn
from vitft.errors import DataError, Fault, MachineError, VitftError
from vitft.images import DecodeSpec
from vitft.inputs import (
    Transform,
    TransformSpec,
    derive_seed,
    epoch_rows,
    erase,
    normalise,
    seeded,
)
from vitft.pictures import Pictures
from vitft.ranks import ALONE, Ranks
from vitft.resize import Picture, as_array

POLL = 2  # seconds between looks at the workers while a batch is awaited
TIMEOUT = 120.0  # seconds without a batch before the workers are given up
MAX_WORKERS = 8
AGAIN = 2**31  # epochs between the views of a photograph that an epoch shows more than once
PREFETCH = 2  # batches that each worker holds ready

Key = tuple[int, int]  # (epoch, row)
Sample = tuple[Tensor, int, int]  # uint8 [3, S, S], label, row
Batch = tuple[Tensor, Tensor, Tensor]  # float32 [B, 3, S, S], [B] or [B, C], [B]


# ---- one image ----------------------------------------------------------------------------------


class Photos(Dataset[Sample]):
    """Photographs of one split, decoded and transformed one by one.

    Args:
        files: One path per row.
        labels: int [N].
        sha256: Of each file as it was scanned; a file that reads differently is an error. It also
            seeds the file's views, so that renaming or reordering changes no picture.
        decode: How files become pictures.
        transform: How pictures become inputs.
        seed: Of the run.
        keep: Room for what stays in memory: of a plain transform its inputs, else the pictures.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: NDArray[np.int64],
        sha256: Sequence[str],
        *,
        decode: DecodeSpec,
        transform: TransformSpec,
        seed: int,
        keep: Pictures | None = None,
    ) -> None:
        self.files = tuple(files)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.sha256 = tuple(sha256)
        self.decode, self.transform, self.seed = decode, transform, seed
        self.keep = keep
        self.pixels = Transform(transform)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: Key) -> Sample:
        """One sample.

        Args:
            key: Epoch (or number of the view) and row.

        Returns:
            uint8 [3, S, S] before erasing and normalising, label, row.

        Raises:
            DataError: The file is not readable, not a photograph, or not the one scanned.
        """
        epoch, row = key
        label = int(self.labels[row])
        if self.transform.kind == "plain":
            x = self._kept(row, lambda: self.pixels(self._picture(row)).numpy())
            return torch.from_numpy(as_array(x)), label, row
        picture = self._kept(row, lambda: self._picture(row))
        return self.pixels.view(picture, self.view_seed(epoch, row)), label, row

    def view_seed(self, epoch: int, row: int, purpose: str = "view") -> int:
        """What an image's randomness in an epoch depends on: run, epoch, content."""
        return derive_seed(self.seed, purpose, epoch, self.sha256[row])

    def _kept(self, row: int, make: Callable[[], Picture]) -> Picture:
        """What is in memory, or made now; the same pixels."""
        if self.keep is None:
            return make()
        found: Picture | None = self.keep.get(row)
        if found is None:
            found = make()
            self.keep.put(row, as_array(found))
        return found

    def _picture(self, row: int) -> Picture:
        return images.decoded(self._bytes(row), self.files[row], self.decode)

    def _bytes(self, row: int) -> bytes:
        path = self.files[row]
        data = images.read_bytes(path)
        if hashlib.sha256(data).hexdigest() != self.sha256[row]:
            text = f"changed since the scan ({len(data):,} bytes now)"
            fix = "restore the file, or start a new run, which scans again"
            raise DataError.of("data.changed", path, text, fix)
        return data


# ---- batches ------------------------------------------------------------------------------------


def worker_count(workers: int | str, device: torch.device, here: int = 1) -> int:
    """How many processes decode.

    Args:
        workers: A number, or `auto`: none where a model computes on two cores or fewer (each would
            take its core), else one per core up to 8.
        device: Where the model computes.
        here: Ranks that share the cores of this machine.
    """
    if workers != "auto":
        return int(workers)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = (cores or 1) // here
    if device.type == "cpu" and cores <= 2:
        return 0
    return min(max(cores, 1), MAX_WORKERS)


def thread_count(workers: int, photos: Photos) -> int:
    """How many threads of this process decode a batch: as many as torch computes with.

    Batches are made between the steps of the model, when its threads are idle, so no core is taken
    from it. Workers decode in one thread each, and so do policies, which draw from generators that
    all threads share.
    """
    return 1 if workers or not photos.pixels.any_thread else torch.get_num_threads()


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
    ) -> None:
        self.photos, self.batch_size, self.seed = photos, batch_size, seed
        self.shuffle, self.device, self.drop_last = shuffle, device, drop_last
        self.balanced = balanced
        self.transform = photos.transform
        self.workers = worker_count(workers, device, ranks.here)
        self.timeout = timeout
        self._mixup = _mixup(mixup, cutmix, classes)
        self._steps = _Steps(ranks, pairs=self._mixup is not None)
        with torch.inference_mode(False):  # threads write to it, and are in no caller's mode
            self._busy = torch.full((max(self.workers, 1),), -1, dtype=torch.int64)
        if self.workers:
            self._busy.share_memory_()  # type: ignore[no-untyped-call]
            _require_shared_memory(self.workers, batch_size, self.transform)
        self._side = _side_stream(device)
        self._loader: DataLoader[Any] | None = None
        self._iterator: Iterator[Any] = iter(())
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
        for step, (x, y, which) in enumerate(self._ahead(self._host_batches()), start):
            yield self._finish(x, y, which, epoch, step)

    def names(self, rows: Tensor) -> list[str]:
        """The files behind some rows, for error texts."""
        return [str(self.photos.files[int(row)]) for row in rows]

    def close(self) -> None:
        """Ends the workers; the next epoch starts new ones."""
        self._iterator = iter(())
        self._loader = None

    def _count(self, n: int) -> int:
        return n // self.batch_size if self.drop_last else math.ceil(n / self.batch_size)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        n = len(self.photos)
        if not self.shuffle:
            return np.arange(n, dtype=np.int64)
        return epoch_rows(self.photos.labels, self.seed, epoch, balanced=self.balanced)

    # -- from the workers --

    def _host_batches(self) -> Iterator[Batch]:
        """uint8 [B, 3, S, S], labels, rows, in host memory; errors of workers raised here.

        A death of workers is outlived once an epoch: what they had in hand is made again in this
        process, to the same bits, and new workers go on behind it.
        """
        self._start()
        done, outlived = 0, False
        while True:
            try:
                item = self._next()
            except MachineError as error:
                if outlived or error.faults[0].id != "env.worker_died":
                    raise
                warn(f"{error.faults[0].text}; trying these batches once more without workers")
                outlived = True
            else:
                if item is None:
                    return
                done += 1
                yield self._sound(item)
                continue
            yield from self._without_workers(done)
            self._start()

    def _sound(self, item: "Batch | VitftError") -> Batch:
        if isinstance(item, VitftError):
            self.close()
            raise item
        return item

    def _without_workers(self, done: int) -> Iterator[Batch]:
        """The batches that dead workers may have had in hand, behind `done` steps of the plan."""
        self._steps.skip(done)
        tasks = _Tasks(self.photos, self._busy)
        for keys in islice(self._steps, PREFETCH * self.workers):
            yield self._sound(_collate(self.transform.size, [tasks[key] for key in keys]))
        self._steps.skip(PREFETCH * self.workers)

    def _start(self) -> None:
        with _quiet_sigchld():
            if self._loader is not None:
                # fails where workers died since, or are still busy with an epoch left early
                with suppress(RuntimeError):
                    self._iterator = iter(self._loader)
                    return
                self.close()
            self._busy.fill_(-1)
            self._loader = self._new_loader()
            self._iterator = iter(self._loader)

    def _new_loader(self) -> DataLoader[Any]:
        return DataLoader(
            _Tasks(self.photos, self._busy, thread_count(self.workers, self.photos)),
            batch_sampler=self._steps,
            num_workers=self.workers,
            collate_fn=partial(_collate, self.transform.size),
            pin_memory=self.device.type == "cuda",
            timeout=POLL if self.workers else 0,
            prefetch_factor=PREFETCH if self.workers else None,
            persistent_workers=self.workers > 0,
            worker_init_fn=_leave_signals_to_the_run,
            # its iterator would draw a seed from the caller's generator otherwise
            generator=torch.Generator(),
        )

    def _next(self) -> Any:
        """The next item, None at the end; waits in short turns, and looks at the workers each."""
        started = time.monotonic()
        while True:
            failure = None
            try:
                return next(self._iterator, None)
            except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
                waited = time.monotonic() - started
                if "timed out" not in str(error) or waited >= self.timeout:
                    failure = self._failure(error, waited)
                    if failure is None:
                        raise
            if failure is not None:
                self.close()  # here, where torch's error and what hangs on it are gone
                raise failure

    def _failure(self, error: Exception, waited: float) -> MachineError | None:
        """torch's complaint about its workers, with the files they held in hand."""
        held = [str(self.photos.files[row]) for row in self._busy.tolist() if row >= 0]
        files = ", ".join(held) or "no file"
        if "timed out" in str(error):
            text = f"no batch for {waited:.0f} s; the loader's workers are reading {files}"
            fix = "look at the disk or network share of these files, or set train.workers: 0"
            return MachineError([Fault("env.worker_hangs", "train.workers", text, fix)])
        # a batch is fetched through a socket of its worker, which may have died since
        unfetched = not isinstance(error, RuntimeError) or "ancillary" in str(error)
        if unfetched or re.search(r"DataLoader worker .* (exited|killed)", str(error)):
            died = "a worker exited unexpectedly before its batch was fetched"
            text = f"{died if unfetched else error}; the workers held {files}{_shared_memory()}"
            fix = "look for an out-of-memory kill, lower train.batch_size, or set train.workers: 0"
            return MachineError([Fault("env.worker_died", "train.workers", text, fix)])
        return None

    # -- on the device --

    def _ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Moves to the device; on CUDA the next batch travels while this one is worked on."""
        side = self._side
        if side is None:
            for batch in batches:
                yield _moved(batch, self.device)
            return
        waiting: Batch | None = None
        for batch in batches:
            with torch.cuda.stream(side):
                moved = _moved(batch, self.device)
            if waiting is not None:
                yield _handed_over(waiting, side, self.device)
            waiting = moved
        if waiting is not None:
            yield _handed_over(waiting, side, self.device)

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


def _handed_over(batch: Batch, side: torch.cuda.Stream, device: torch.device) -> Batch:
    """Makes the consumer's stream wait for the copy, and the memory wait for the consumer."""
    current = torch.cuda.current_stream(device)
    current.wait_stream(side)
    for part in batch[:2]:
        part.record_stream(current)
    return batch


# ---- inside the workers -------------------------------------------------------------------------


class _Steps:
    """Batches of keys for torch's DataLoader, which keeps it while the plan changes."""

    def __init__(self, ranks: Ranks, *, pairs: bool) -> None:
        self._ranks, self._pairs = ranks, pairs
        self._plan: tuple[int, NDArray[np.int64], int, range] = (
            0,
            np.zeros(0, np.int64),
            1,
            range(0),
        )
        self._again = np.zeros(0, np.int64)

    def plan(self, epoch: int, order: NDArray[np.int64], size: int, steps: range) -> None:
        self._plan = epoch, order, size, steps
        self._again = times_before(order)

    def skip(self, count: int) -> None:
        """Leaves out the first steps of the plan."""
        epoch, order, size, steps = self._plan
        self._plan = epoch, order, size, steps[count:]

    def __len__(self) -> int:
        return len(self._plan[3])

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order, size, steps = self._plan
        for step in steps:
            batch = np.arange(step * size, min((step + 1) * size, len(order)))
            mine = batch[self._ranks.share(len(batch), pairs=self._pairs)]
            views = epoch + AGAIN * self._again[mine]  # drawn twice in an epoch: two views
            yield [(int(view), int(row)) for view, row in zip(views, order[mine], strict=True)]


def times_before(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each entry has come before, [n]: 7 7 2 7 gives 0 1 0 2."""
    places = np.argsort(order, kind="stable")
    first = np.searchsorted(order[places], order[places])  # of its kind, among the sorted
    times = np.empty(len(order), np.int64)
    times[places] = np.arange(len(order)) - first
    return times


class _Tasks(Dataset["Sample | VitftError"]):
    """Photos for workers: errors come back as values, and each worker says what it holds.

    torch would rebuild a worker's exception from its traceback text, which ours does not survive.
    """

    def __init__(self, photos: Photos, busy: Tensor, threads: int = 1) -> None:
        self.photos, self.busy, self.threads = photos, busy, threads

    def __getitems__(self, keys: list[Key]) -> "list[Sample | VitftError]":
        """A batch; in threads where this process has them to itself."""
        if self.threads == 1 or len(keys) == 1:
            return [self[key] for key in keys]
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(self.__getitem__, keys))

    def __getitem__(self, key: Key) -> "Sample | VitftError":
        worker = get_worker_info()
        slot = 0 if worker is None else worker.id
        self.busy[slot] = key[1]
        try:
            return self.photos[key]
        except VitftError as error:
            return error
        except Exception as error:  # a transform's own failure must still name the file
            text = f"cannot be made into an input: {type(error).__name__}: {error}"
            return DataError.of(
                "data.transform", self.photos.files[key[1]], text, "remove the file"
            )
        finally:
            self.busy[slot] = -1


def _collate(size: tuple[int, int], samples: "list[Sample | VitftError]") -> "Batch | VitftError":
    """Stacks samples, of which a rank's share may hold none; any errors become one."""
    if not samples:
        none = torch.empty(0, dtype=torch.int64)
        return torch.empty(0, 3, *size, dtype=torch.uint8), none, none
    errors = [sample for sample in samples if isinstance(sample, VitftError)]
    if errors:
        return DataError([fault for error in errors for fault in error.faults])
    good = [sample for sample in samples if not isinstance(sample, VitftError)]
    x, y, rows = zip(*good, strict=True)
    return torch.stack(x), torch.tensor(y), torch.tensor(rows)


@contextmanager
def _quiet_sigchld() -> Iterator[None]:
    """Keeps torch from raising a worker's death out of whatever line the main thread is at.

    Without its signal handler the death is found at the next turn of waiting for a batch, where it
    can be told with its files.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "SIGCHLD"):
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C and a closed terminal reach every process of a group, and only the run may answer.

    Its batch is wanted to the end; when the run ends, torch ends its workers. SIGTERM works as it
    does in any process, because that is how torch ends a worker that does not listen.
    """
    for name, what in (("SIGINT", signal.SIG_IGN), ("SIGHUP", signal.SIG_IGN)):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), what)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _require_shared_memory(workers: int, batch_size: int, spec: TransformSpec) -> None:
    """Workers that run out of it die of a bus error, which tells nobody why."""
    height, width = spec.size
    need = (PREFETCH * workers + 1) * batch_size * 3 * height * width
    free = shared_memory_free(default=need)
    if free < need:
        text = f"{workers} workers need {need / 2**20:,.0f} MiB of /dev/shm, "
        text += f"{free / 2**20:,.0f} MiB are free"
        fix = "set train.workers: 0, or give the container more (docker run --shm-size=2g)"
        raise MachineError([Fault("env.shared_memory", "train.workers", text, fix)])


def _shared_memory() -> str:
    """For the text about a dead worker."""
    free = shared_memory_free(default=-1)
    return "" if free < 0 else f"; /dev/shm has {free / 2**20:,.0f} MiB free"


def shared_memory_free(*, default: int) -> int:
    """Bytes of shared memory, where batches travel (64 MB in many containers)."""
    with suppress(OSError):
        return shutil.disk_usage("/dev/shm").free
    return default
