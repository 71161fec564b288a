"""Several processes as one run: who takes which rows, and how they stay of one mind.

    torchrun --standalone --nproc-per-node 4 -m vitft.run RECIPE

Each process is a rank. `train.batch_size` is that of the whole run: every rank draws the same order
and takes its share of each batch, so that the result is that of one process up to the rounding of
sums. What ranks must agree on (an error, a signal, that a batch does not fit) is told over a group
of its own on the host, so that no rank makes a collective call that another one does not.

Rank 0 owns the run folder and stdout; the others are silent and leave when only its work is left.
"""

import os
import pickle
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from vitft.errors import MachineError, VitftError

PATIENCE = timedelta(days=7)  # while rank 0 scans, others wait; a rank that dies is noticed at once

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One process's place among those of a run; the default is a run of one process.

    Attributes:
        rank: From 0.
        world: Processes of the run.
        local: Number of this process on its machine, from 0.
        here: Processes on this machine.
        talk: Group on the host over which objects and small numbers go.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    here: int = 1
    talk: Any = field(default=None, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def share(self, count: int, *, pairs: bool = False) -> NDArray[np.int64]:
        """Positions of this rank within a batch; all ranks together have each position once.

        Args:
            count: Rows of the batch.
            pairs: Keep the k-th row and the k-th last on one rank, in mirrored places: mixing joins
                a batch with itself reversed, so that mixing shares is sharing the mixed batch.

        Returns:
            int64, ascending; empty where there are more ranks than rows.
        """
        mine = np.array_split(np.arange(count // 2 if pairs else count), self.world)[self.rank]
        if not pairs:
            return mine
        even = count - count % 2
        odd = np.arange(even, count) if self.rank == self.world - 1 else mine[:0]
        return np.concatenate([mine, even - 1 - mine[::-1], odd])

    # -- on the host --

    def agreed(self, work: Callable[[], T]) -> T:
        """Each rank does its own work; the error of one ends all, told once.

        Raises:
            Exception: On rank 0 that of the lowest rank that failed; elsewhere SystemExit.
        """
        if self.world == 1:
            return work()
        result, error = _attempt(work)
        self._raise_first(self.gather(error))
        return result  # type: ignore[return-value]

    def first_does(self, work: Callable[[], T]) -> T:
        """Rank 0 does the work and hands its result, or its error, to all."""
        if self.world == 1:
            return work()
        parcel: list[Any] = [_attempt(work) if self.first else None]
        self._told(lambda: distributed.broadcast_object_list(parcel, src=0, group=self.talk))
        result, error = parcel[0]
        self._raise_first([error])
        return result  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        self._told(lambda: distributed.all_gather_object(values, value, group=self.talk))
        return values

    def meet(self, amount: int = 0, *, leave: bool = False, error: Exception | None = None) -> int:
        """Before each update: has every rank a batch?

        Args:
            amount: Rows this rank brings.
            leave: It was told to stop, and brings none.
            error: Or it failed.

        Returns:
            Rows of all ranks together; -1 where one of them leaves.
        """
        if self.world == 1:
            if error is not None:
                raise error
            return -1 if leave else amount
        seen = self._numbers(amount, int(leave), int(error is not None))  # [W, 3]
        if seen[:, 2].any():
            self._raise_first(self.gather(error))
        return -1 if seen[:, 1].any() else int(seen[:, 0].sum())

    def greatest(self, number: int) -> int:
        """The greatest number that a rank brings."""
        return number if self.world == 1 else int(self._numbers(number).max())

    def _numbers(self, *numbers: int) -> Tensor:
        mine = torch.tensor(numbers, dtype=torch.int64)
        rows = [torch.empty_like(mine) for _ in range(self.world)]
        self._told(lambda: distributed.all_gather(rows, mine, group=self.talk))
        return torch.stack(rows)  # [W, K]

    def _told(self, talk: Callable[[], object]) -> None:
        with self.together():
            talk()

    def _raise_first(self, errors: list[Any]) -> None:
        errors = [error for error in errors if error is not None]
        if errors:
            raise self.voiced(errors[0])

    def voiced(self, error: BaseException) -> BaseException:
        """What to raise for an error that every rank has: the first tells it, the others end."""
        return error if self.first else SystemExit(_code(error))

    # -- on the device --

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over ranks, in place; on CUDA without waiting for it."""
        if self.world > 1:
            distributed.all_reduce(numbers)
        return numbers

    # -- coming and going --

    @contextmanager
    def together(self) -> Iterator[None]:
        """Turns the death of another rank, as torch tells it, into words or a silent end."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not _is_lost(error):
                raise
            self._lost()

    def _lost(self) -> NoReturn:
        if not self.first:
            raise SystemExit(MachineError.exit_code)
        raise MachineError.of(
            "env.rank_lost",
            f"rank 0 of {self.world}",
            "another process of this run has ended",
            "its own words say why; without any, look for an out-of-memory kill; then go on with "
            "--resume auto",
        ) from None

    def alone(self) -> "Ranks":
        """Ends every rank but the first, which goes on as a run of one process.

        They part together, and only when what each has queued on its GPU is done: whoever left
        earlier would tear down a group that another still exchanges with.
        """
        if self.world == 1:
            return self
        if torch.cuda.is_available():
            torch.cuda.synchronize(self.local)
        self._told(lambda: distributed.barrier(group=self.talk))
        distributed.destroy_process_group()
        if not self.first:
            raise SystemExit(0)
        return ALONE


ALONE = Ranks()


def shares(count: int, world: int, *, pairs: bool = False) -> list[NDArray[np.int64]]:
    """Of each rank, as `Ranks.share`."""
    return [Ranks(rank, world).share(count, pairs=pairs) for rank in range(world)]


def launched() -> bool:
    """Whether torchrun, or what speaks its language, started this process beside others.

    SLURM_NTASKS alone is no sign: every command typed inside an allocation sees it.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process's place, for as long as the run lasts.

    Raises:
        MachineError: `env.no_device`: more processes on this machine than GPUs.
    """
    if not launched():
        yield ALONE
        return
    from timm.utils.distributed import init_distributed_device_so

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 0 < gpus < here:
        text = f"{here} processes were started on a machine with {gpus} GPUs"
        fix = f"start torchrun with --nproc-per-node {gpus}"
        raise MachineError.of("env.no_device", "torchrun", text, fix)
    # what DDP says of tensors with a dimension of 1 is neither wrong nor of use
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view", UserWarning)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    place = init_distributed_device_so("cuda" if gpus else "cpu", dist_backend=backend)
    talk = distributed.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield Ranks(place["global_rank"], place["world_size"], place["local_rank"], here, talk)
    except BaseException:
        if gpus:
            _abandon()
        raise
    finally:
        if distributed.is_initialized():  # else they have parted: `Ranks.alone`
            with suppress(RuntimeError):
                distributed.destroy_process_group()


def _abandon() -> None:
    """After an error: destroying waits for exchanges that the other ranks may never join."""
    group = distributed.group.WORLD
    with suppress(RuntimeError, AttributeError):  # the error itself is what is to be told
        if group is not None:
            group._get_backend(torch.device("cuda")).abort()


def _attempt(work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """The result or the error, which must survive its way to another process."""
    try:
        return work(), None
    except (Exception, SystemExit) as error:
        if not isinstance(error, VitftError | SystemExit):
            error.add_note("".join(traceback.format_exception(error)))
        try:
            pickle.loads(pickle.dumps(error))  # noqa: S301
        except Exception:
            return None, RuntimeError(f"{type(error).__name__}: {error}")
        return None, error


def _code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return error.exit_code if isinstance(error, VitftError) else VitftError.exit_code


def _is_lost(error: RuntimeError) -> bool:
    """gloo and NCCL have no class of their own for it in every version."""
    words = ("gloo", "NCCL", "ProcessGroup", "Connection closed by peer", "Connection reset")
    return isinstance(error, distributed.DistError) or any(w in str(error) for w in words)
