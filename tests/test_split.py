"""The split as arithmetic: sizes by hand, then its promises over thousands of random data sets."""

import random
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitft.split import SPLITS, sizes, stratified, tutorial

SHARES = st.sampled_from([0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 1 / 3, 0.45])


@pytest.mark.parametrize(
    ("n", "val", "test", "want"),
    [
        (100, 0.15, 0.15, (70, 15, 15)),
        (10, 0.15, 0.15, (7, 2, 1)),  # the two halves tie, val comes first
        (593, 0.15, 0.15, (415, 89, 89)),  # 415.1, 88.95, 88.95
        (7, 0.15, 0.15, (5, 1, 1)),
        (3, 0.15, 0.15, (1, 1, 1)),
        (2, 0.15, 0.15, (1, 0, 1)),
        (1, 0.15, 0.15, (1, 0, 0)),
        (1, 0.8, 0.1, (1, 0, 0)),
        (2, 0.8, 0.0, (1, 1, 0)),
        (0, 0.15, 0.15, (0, 0, 0)),
        (10, 0.2, 0.0, (8, 2, 0)),
        (10, 0.0, 0.3, (7, 0, 3)),
    ],
)
def test_sizes_are_those_worked_out_by_hand(n, val, test, want):
    assert tuple(sizes(n, val, test)[s] for s in SPLITS) == want


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0.1), (0.5, 0.5), (0.9, 0.2)])
def test_shares_that_leave_nothing_are_refused(val, test):
    with pytest.raises(ValueError, match="together below 1"):
        sizes(10, val, test)


@given(st.integers(0, 5000), SHARES, SHARES)
def test_sizes_sum_to_n_stay_within_one_of_the_share_and_keep_training(n, val, test):
    got = sizes(n, val, test)
    assert sum(got.values()) == n
    assert got["train"] >= min(n, 1)
    assert all(got[s] >= 1 for s, share in (("val", val), ("test", test)) if share and n >= 3)
    if all(share * n >= 1 for share in (val, test) if share):
        for s, share in {"val": val, "test": test, "train": 1 - val - test}.items():
            assert abs(got[s] - share * n) < 1


@st.composite
def data_sets(draw, alone: bool = False):
    """Rows of (class, content, group): some contents and groups occur again and again."""
    n = draw(st.integers(2, 120))
    dice = random.Random(draw(st.integers(0, 2**32)))
    labels = [dice.randrange(draw(st.integers(1, 4))) for _ in range(n)]
    if alone:
        return [(k, f"c{i}", "") for i, k in enumerate(labels)]
    twin = draw(st.sampled_from([0.0, 0.05, 0.5]))
    group = draw(st.sampled_from([0.0, 0.2, 1.0]))
    return [
        (
            k,
            f"c{dice.randrange(n)}" if dice.random() < twin else f"c{n + i}",
            f"g{dice.randrange(max(1, n // 5))}" if dice.random() < group else "",
        )
        for i, k in enumerate(labels)
    ]


def split(rows, *, val=0.15, test=0.15, seed=0):
    labels, contents, groups = zip(*rows, strict=True)
    return stratified(labels, contents, groups, val=val, test=test, seed=seed)


def count(rows, sides):
    table = defaultdict(Counter)
    for (label, _, _), side in zip(rows, sides, strict=True):
        table[label][side] += 1
    return {label: {s: c[s] for s in SPLITS} for label, c in table.items()}


@given(data_sets(alone=True), SHARES, SHARES, st.integers(0, 5))
def test_without_twins_or_groups_every_class_has_exactly_its_sizes(rows, val, test, seed):
    got = count(rows, split(rows, val=val, test=test, seed=seed))
    for label, n in Counter(k for k, _, _ in rows).items():
        assert got[label] == sizes(n, val, test)


@given(data_sets(), SHARES, SHARES, st.integers(0, 5))
@settings(max_examples=200)
def test_no_content_and_no_group_stands_on_two_sides(rows, val, test, seed):
    sides = split(rows, val=val, test=test, seed=seed)
    assert set(sides) <= set(SPLITS)
    for part in (1, 2):
        of = defaultdict(set)
        for row, side in zip(rows, sides, strict=True):
            if row[part]:
                of[row[part]].add(side)
        assert all(len(s) == 1 for s in of.values())


@given(data_sets(), SHARES, SHARES)
@settings(max_examples=200)
def test_every_class_keeps_something_to_train_on(rows, val, test):
    assert all(c["train"] >= 1 for c in count(rows, split(rows, val=val, test=test)).values())


@given(data_sets(), st.integers(0, 2**32), st.integers(0, 3))
def test_the_order_of_rows_does_not_matter(rows, shuffle, seed):
    sides = dict(zip(range(len(rows)), split(rows, seed=seed), strict=True))
    order = list(range(len(rows)))
    random.Random(shuffle).shuffle(order)
    again = split([rows[i] for i in order], seed=seed)
    # Rows with equal content are interchangeable, and all on one side.
    assert [rows[i][1:] + (sides[i],) for i in order] == [
        rows[i][1:] + (side,) for i, side in zip(order, again, strict=True)
    ]


def test_a_seed_gives_the_same_split_again_and_another_seed_another():
    rows = [(i % 3, f"c{i}", "") for i in range(90)]
    assert split(rows, seed=3) == split(rows, seed=3)
    assert split(rows, seed=3) != split(rows, seed=4)


def test_few_twins_leave_the_sizes_exact():
    rows = [(i % 5, f"c{i // 2 if i < 40 else i}", "") for i in range(1000)]
    got = count(rows, split(rows))
    assert all(c == {"train": 140, "val": 30, "test": 30} for c in got.values())


def test_groups_of_ten_come_near_the_shares():
    rows = [(k, f"c{k}-{i}", f"g{k}-{i // 10}") for k in range(2) for i in range(200)]
    for c in count(rows, split(rows)).values():
        assert abs(c["val"] - 30) <= 10
        assert abs(c["test"] - 30) <= 10


def test_photographs_added_later_leave_most_of_the_split_alone():
    rows = [(0, f"c{i}", "") for i in range(200)]
    more = [*rows, *((0, f"n{i}", "") for i in range(20))]
    before, after = split(rows), split(more)[:200]
    assert sum(a != b for a, b in zip(before, after, strict=True)) <= 20


def test_the_tutorials_split_is_one_generator_over_classes_in_order():
    files = [
        [f"{name}{i:02d}.jpg" for i in range(n)] for name, n in (("a", 10), ("b", 7), ("c", 4))
    ]
    dice = random.Random(0)
    want = []
    for names in files:
        chosen = dice.sample(names, k=int(0.2 * len(names)))
        want.append(["val" if name in chosen else "train" for name in names])
    assert tutorial(files) == want
    assert [side.count("val") for side in want] == [2, 1, 0]
    assert [i for i, side in enumerate(want[0]) if side == "val"] == [6, 9]  # Python's own dice
