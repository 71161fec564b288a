"""A parallel map with a time limit for every item; nothing that hangs can hold up the rest.

A thread cannot be killed, so an item that overruns is answered for, its thread is written off, and
a fresh one takes its place. Threads are daemons: one that hangs for ever ends with the process.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def timed_map(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    threads: int,
    seconds: float,
    late: Callable[[Item], Result],
) -> Iterator[Result]:
    """Works on items in threads and hands the results on in order.

    Args:
        work: Called once per item; what it raises is raised here, in the item's place.
        items: Taken in order.
        threads: How many work at a time.
        seconds: Wall time that one item may take.
        late: Gives the result of an item that took longer.
    """
    crew = _Crew(work, items)
    for _ in range(min(threads, len(items))):
        crew.hire()
    try:
        for number, item in enumerate(items):
            yield crew.wait(number, seconds, lambda item=item: late(item))  # type: ignore[misc]
    finally:
        crew.dismiss()


_HERE = threading.local()  # the crew and the item of this thread


@contextmanager
def unhurried() -> Iterator[None]:
    """Within it the clock of the item at hand stands still, and starts anew behind it.

    For waiting that has limits of its own, such as those of a network.
    """
    crew: _Crew[Any, Any] | None = getattr(_HERE, "crew", None)
    if crew is None:
        yield
        return
    crew.set_clock(_HERE.number, math.inf)
    try:
        yield
    finally:
        crew.set_clock(_HERE.number, time.monotonic())


class _Crew(Generic[Item, Result]):
    def __init__(self, work: Callable[[Item], Result], items: Sequence[Item]) -> None:
        self.work = work
        self.items = items
        self.next = 0
        self.started: dict[int, float] = {}
        self.done: dict[int, Result | BaseException] = {}
        self.changed = threading.Condition()

    def hire(self) -> None:
        threading.Thread(target=self._loop, name="vitft-scan", daemon=True).start()

    def set_clock(self, number: int, start: float) -> None:
        with self.changed:
            if number in self.started:  # else it is given up on
                self.started[number] = start

    def dismiss(self) -> None:
        with self.changed:
            self.next = len(self.items)

    def wait(self, number: int, seconds: float, late: Callable[[], Result]) -> Result:
        with self.changed:
            while number not in self.done:
                self.changed.wait(min(seconds, 1.0) / 4)
                if time.monotonic() - self.started.get(number, time.monotonic()) > seconds:
                    del self.started[number]
                    self.hire()
                    return late()
            result = self.done.pop(number)
        if isinstance(result, BaseException):
            raise result
        return result

    def _loop(self) -> None:
        while (number := self._take()) is not None:
            _HERE.crew, _HERE.number = self, number
            try:
                result: Result | BaseException = self.work(self.items[number])
            except BaseException as error:  # raised where the result is asked for
                result = error
            with self.changed:
                if number not in self.started:
                    return  # given up on; another thread has this one's place
                del self.started[number]
                self.done[number] = result
                self.changed.notify_all()

    def _take(self) -> int | None:
        with self.changed:
            if self.next >= len(self.items):
                return None
            number, self.next = self.next, self.next + 1
            self.started[number] = time.monotonic()
            return number
