"""Which photographs a page shows, in which order, within which bounds."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from vitft.gallery import (
    PER_CELL,
    Answers,
    Source,
    drawers,
    mistakes,
    photographs,
    shown,
    shrink,
    worst,
)

CLASSES = ("a", "b", "c")


def answers(rows) -> Answers:
    """Rows of (label, guess, confidence of the guess)."""
    p = np.zeros((len(rows), 3))
    for i, (_, guess, confidence) in enumerate(rows):
        p[i] = (1 - confidence) / 2
        p[i, guess] = confidence
    label, guess = (np.array([row[k] for row in rows], np.int64) for k in (0, 1))
    return Answers([f"{CLASSES[row[0]]}/{i}.jpg" for i, row in enumerate(rows)], label, guess, p)


SIX = answers([(0, 0, 0.9), (0, 1, 0.6), (1, 0, 0.8), (0, 1, 0.7), (2, 2, 0.5), (0, 0, 0.6)])
BYTES = Source(lambda i: b"\xff\xd8\xff" + bytes([i]) * 297)


def test_mistakes_come_most_confident_first():
    assert worst(SIX) == [2, 3, 1]


def test_a_page_shows_mistakes_in_turn_then_the_least_sure_right_answers():
    assert shown(SIX, first=0, limit=99) == [2, 3, 1, 4, 5, 0]
    many = answers([(0, 1, 0.9), (0, 1, 0.8), (0, 1, 0.7), (1, 2, 0.6)])
    assert shown(many, first=0, limit=99) == [0, 3, 1, 2]  # the rare confusion is not last
    assert shown(many, first=2, limit=3) == [0, 1, 2]


def test_right_answers_of_one_class_are_bounded():
    sure = answers([(0, 0, 0.9)] * 40 + [(1, 1, 0.9)] * 2)
    rows = shown(sure, first=24, limit=500)
    assert sum(i < 40 for i in rows) == PER_CELL
    assert {40, 41} < set(rows)


def test_photographs_stop_when_the_budget_is_spent():
    asked = []

    def thumbnail(i: int) -> bytes:
        asked.append(i)
        return b"\xff\xd8\xff" + bytes(297)  # 400 characters of base64

    made = photographs(SIX, CLASSES, [5, 1, 2, 3], Source(thumbnail), budget=1000)
    assert list(made) == [5, 1]
    assert asked == [5, 1, 2]
    made = photographs(SIX, CLASSES, [5, 1, 2, 3], Source(thumbnail), budget=1000, twice=1)
    assert list(made) == [5]


def test_a_photograph_carries_its_three_likeliest_classes():
    photo = photographs(SIX, CLASSES, [1], BYTES, budget=10**6)[1]
    assert [name for name, _ in photo.top] == ["b", "a", "c"]
    assert [p for _, p in photo.top] == pytest.approx([0.6, 0.2, 0.2])
    assert (photo.label, photo.path) == ("a", "a/1.jpg")
    assert photo.alt == "Photograph labelled a, called b"


def test_the_gallery_of_mistakes_counts_those_it_does_not_show():
    made = photographs(SIX, CLASSES, [2, 3], BYTES, budget=10**6)
    gallery = mistakes(SIX, CLASSES, made, 24)
    assert [p.path for p in gallery.photos] == ["b/2.jpg", "a/3.jpg"]
    assert gallery.photos[0].title == "labelled b, called a"
    assert gallery.total == 3


def test_a_drawer_holds_its_cell_and_says_the_share_of_the_label():
    made = photographs(SIX, CLASSES, range(6), BYTES, budget=10**6)
    wrong, right = drawers(SIX, CLASSES, [(0, 1), (0, 0)], made)
    assert (wrong.id, wrong.title) == ("cell-0-1", "Labelled a, called b")
    assert [p.path for p in wrong.photos] == ["a/3.jpg", "a/1.jpg"]  # most confident first
    assert [p.path for p in right.photos] == ["a/5.jpg", "a/0.jpg"]  # least confident first
    assert wrong.note == (
        "2 of 4 photographs with this label (50.0\u00a0%). The most confident come first."
    )


def test_a_drawer_that_lacks_photographs_says_where_the_rest_is():
    (drawer,) = drawers(SIX, CLASSES, [(0, 1)], {})
    assert drawer.total == 2
    assert drawer.note.endswith("All are in predictions.csv.")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "P", "I;16"])
def test_a_thumbnail_is_a_small_jpeg_of_any_mode(mode):
    data = shrink(Image.new(mode, (900, 300)), 160)
    with Image.open(BytesIO(data)) as small:
        assert (small.format, small.mode, small.size) == ("JPEG", "RGB", (160, 53))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"paths": ["x"]}, "1 paths and 3 classes do not fit"),
        ({"labels": np.array([0, 0, 1, 0, 3, 0])}, r"a label is outside \[0, 3\): 3"),
        ({"guesses": np.array([0, 1, 0, 1, 2, -1])}, "a guess is outside"),
        ({"probabilities": np.full((6, 3), np.nan)}, "not a number between 0 and 1"),
        ({"probabilities": np.full((6, 3), 1.5)}, "not a number between 0 and 1"),
    ],
)
def test_answers_that_no_model_gives_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        Answers(**(vars(SIX) | change)).check(3)
