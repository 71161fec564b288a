"""Batches in host memory, made by worker processes, or by this one between the model's steps.

An error comes out with the files that were in hand; a death of workers is outlived once an epoch.
How many decode, and in which order they finish, has no say in what a batch holds.
"""

import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vitft.console import warn
from vitft.errors import DataError, Fault, MachineError, VitftError
from vitft.inputs import TransformSpec
from vitft.photos import Key, Photos, Sample
from vitft.ranks import Ranks

POLL = 2  # seconds between looks at the workers while a batch is awaited
MOST = 8  # workers; on a CPU the model wants cores too
MOST_OF_CUDA = 16  # 14 of an H100's machine gave ViT-B/16 2,156 photographs/s, of 3,823 it can take
AGAIN = 2**31  # epochs between the views of a photograph that an epoch shows more than once
PREFETCH = 2  # batches that each worker holds ready

Batch = tuple[Tensor, Tensor, Tensor]  # uint8 [B, 3, S, S], labels [B], rows [B]


# ---- how many -----------------------------------------------------------------------------------


def worker_count(workers: int | str, device: torch.device, here: int = 1) -> int:
    """How many processes decode.

    Args:
        workers: A number, or `auto`: none where a model computes on two cores or fewer (each would
            take its core), else one per core up to 8, with a GPU up to 16.
        device: Where the model computes.
        here: Ranks that share the cores of this machine.
    """
    if workers != "auto":
        return int(workers)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = (cores or 1) // here
    if device.type == "cpu" and cores <= 2:
        return 0
    return min(max(cores, 1), MOST_OF_CUDA if device.type == "cuda" else MOST)


def fitting(workers: int, batch_size: int, spec: TransformSpec) -> int:
    """As many of the workers that `auto` chose as shared memory has room for; told where fewer.

    Half of it is theirs, the other half belongs to photographs that stay decoded.
    """
    free = shared_memory_free(default=2 * _shared_need(workers, batch_size, spec))
    room = max(0, (free // 2 // _shared_need(0, batch_size, spec) - 1) // PREFETCH)
    if room >= workers:
        return workers
    _tell(
        f"train.workers: auto is {room} instead of {workers}, as /dev/shm is too "
        "small for more; give the container more of it (docker run --shm-size=4g)"
    )
    return room


@cache
def _tell(text: str) -> None:
    """Once, not for every split."""
    warn(text)


def thread_count(workers: int, photos: Photos) -> int:
    """How many threads of this process decode a batch: as many as torch computes with.

    Batches are made between the steps of the model, when its threads are idle, so no core is taken
    from it. Workers decode in one thread each, and so do policies, which draw from generators that
    all threads share.
    """
    return 1 if workers or not photos.pixels.any_thread else torch.get_num_threads()


# ---- the pool -----------------------------------------------------------------------------------


class Pool:
    """Makes the batches of one plan after another; the workers stay between epochs.

    Args:
        photos: What to load.
        batch_size: Images per step, of all ranks.
        workers: Processes that decode; 0 for this one.
        timeout: Seconds without a batch from the workers before they are given up.
        steps: What is to be made, batch by batch.
        pin: Leave batches in memory that a GPU reads without waiting.

    Raises:
        MachineError: `env.shared_memory`: too little of it for the workers' batches.
    """

    def __init__(
        self,
        photos: Photos,
        *,
        batch_size: int,
        workers: int,
        timeout: float,
        steps: "Steps",
        pin: bool,
    ) -> None:
        self.photos, self.workers, self.timeout = photos, workers, timeout
        self.size, self.pin, self._steps = photos.transform.size, pin, steps
        with torch.inference_mode(False):  # threads write to it, and are in no caller's mode
            self._busy = torch.full((max(workers, 1),), -1, dtype=torch.int64)
        if workers:
            self._busy.share_memory_()  # type: ignore[no-untyped-call]
            _require_shared_memory(workers, batch_size, photos.transform)
        self._loader: DataLoader[Any] | None = None
        self._iterator: Iterator[Any] = iter(())

    def close(self) -> None:
        """Ends the workers; the next epoch starts new ones."""
        self._iterator = iter(())
        self._loader = None

    def batches(self) -> Iterator[Batch]:
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
            yield self._sound(_collate(self.size, [tasks[key] for key in keys]))
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
            collate_fn=partial(_collate, self.size),
            pin_memory=self.pin,
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


# ---- inside the workers -------------------------------------------------------------------------


class Steps:
    """Batches of keys for torch's DataLoader, which keeps it while the plan changes.

    Args:
        ranks: Each gets its share of a batch.
        pairs: Shares are of pairs.
        joins_last: A last photograph that would be a batch of its own belongs to the one before.
    """

    def __init__(self, ranks: Ranks, *, pairs: bool, joins_last: bool = False) -> None:
        self._ranks, self._pairs, self._joins_last = ranks, pairs, joins_last
        self._plan: tuple[int, NDArray[np.int64], int, range] = (
            0,
            np.zeros(0, np.int64),
            1,
            range(0),
        )
        self._again = np.zeros(0, np.int64)

    def plan(self, epoch: int, order: NDArray[np.int64], size: int, steps: range) -> None:
        """What comes next: these steps of an epoch, in batches of so many rows in this order."""
        self._plan = epoch, order, size, steps
        self._again = times_before(order)

    def count(self, rows: int, size: int) -> int:
        """Batches of a whole epoch of so many rows."""
        return -(-rows // size) - self._joined(rows, size)

    def _joined(self, rows: int, size: int) -> int:
        return int(self._joins_last and rows > size > 1 and rows % size == 1)

    def skip(self, count: int) -> None:
        """Leaves out the first steps of the plan."""
        epoch, order, size, steps = self._plan
        self._plan = epoch, order, size, steps[count:]

    def __len__(self) -> int:
        return len(self._plan[3])

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order, size, steps = self._plan
        last = self.count(len(order), size) - 1
        for step in steps:
            end = min((step + 1) * size, len(order)) if step < last else len(order)
            batch = np.arange(step * size, end)
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
    need = _shared_need(workers, batch_size, spec)
    free = shared_memory_free(default=need)
    if free < need:
        text = f"{workers} workers need {need / 2**20:,.0f} MiB of /dev/shm, "
        text += f"{free / 2**20:,.0f} MiB are free"
        fix = "set train.workers: 0, or give the container more (docker run --shm-size=2g)"
        raise MachineError([Fault("env.shared_memory", "train.workers", text, fix)])


def _shared_need(workers: int, batch_size: int, spec: TransformSpec) -> int:
    """Bytes of the batches that workers hold ready, and of the one that is taken."""
    height, width = spec.size
    return (PREFETCH * workers + 1) * batch_size * 3 * height * width


def _shared_memory() -> str:
    """For the text about a dead worker."""
    free = shared_memory_free(default=-1)
    return "" if free < 0 else f"; /dev/shm has {free / 2**20:,.0f} MiB free"


def shared_memory_free(*, default: int) -> int:
    """Bytes of shared memory, where batches travel (64 MB in many containers)."""
    with suppress(OSError):
        return shutil.disk_usage("/dev/shm").free
    return default
