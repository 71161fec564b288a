"""The timed map: order, errors in place, and items that never end."""

import threading
import time

import pytest

from vitft.threads import timed_map


def run(work, items, *, seconds=10.0, threads=2):
    late = lambda item: f"late {item}"  # noqa: E731
    return timed_map(work, items, threads=threads, seconds=seconds, late=late)


def test_results_come_in_the_order_of_the_items():
    def work(x):
        time.sleep(0.002 * (x % 3))
        return x * x

    assert list(run(work, range(50), threads=4)) == [x * x for x in range(50)]


def test_no_items_give_no_results():
    assert list(run(str, [])) == []


@pytest.mark.timeout(20)
def test_items_that_hang_are_answered_for_and_the_rest_goes_on():
    for_ever = threading.Event()

    def work(x):
        if x in (1, 2, 5):  # more than there are threads
            for_ever.wait(60)
        return x

    got = list(run(work, range(8), seconds=0.2))
    assert got == [0, "late 1", "late 2", 3, 4, "late 5", 6, 7]
    for_ever.set()


def test_an_error_is_raised_in_its_place_and_work_ends():
    seen = []

    def work(x):
        seen.append(x)
        if x == 3:
            raise KeyError("x")
        time.sleep(0.002)
        return x

    results = run(work, range(1000))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError):
        next(results)
    time.sleep(0.05)
    count = len(seen)
    time.sleep(0.05)
    assert len(seen) == count < 1000


def test_a_reader_who_leaves_stops_the_work():
    seen = []
    results = run(lambda x: (time.sleep(0.002), seen.append(x)), range(1000))
    next(results)
    results.close()
    time.sleep(0.05)
    count = len(seen)
    time.sleep(0.05)
    assert len(seen) == count < 1000
