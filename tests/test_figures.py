"""Pictures of maps: colours, places and type, read back from their pixels."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vitft import figures
from vitft.figures import ACCENT, HEADING, MARGIN, PAPER, SMALL, Panel


def pixels(picture):
    return np.asarray(picture, dtype=int)


def photo(width=60, height=40):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height))


def one_hot(rows, columns, *at):
    values = np.zeros((rows, columns), np.float32)
    values[at] = 1
    return values


# -- colours --------------------------------------------------------------------------------------


def test_the_scale_grows_lighter_all_the_way_so_that_no_eye_confuses_it():
    linear = (figures.colours(np.linspace(0, 1, 32, dtype=np.float32)) / 255) ** 2.2
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > 0).all()
    assert luminance[-1] > 20 * luminance[0]
    # a red-blind and a green-blind eye see red and green as one: what is left must still tell
    assert (np.diff(linear @ [0, 0.92, 0.08]) > 0).all()
    assert (np.diff(linear[:, :2].mean(axis=1)) > 0).all()


def test_stretching_goes_from_the_least_to_the_largest():
    np.testing.assert_allclose(
        figures.stretched(np.array([[2, 4], [3, 2]])), [[0, 1], [0.5, 0]], atol=0.04
    )
    assert not figures.stretched(np.full((3, 3), 7.0)).any()
    np.testing.assert_array_equal(figures.stretched(one_hot(9, 9, 4, 4)), one_hot(9, 9, 4, 4))


def test_a_few_extreme_patches_do_not_leave_the_others_dark():
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    values[0, :4] = 50
    assert figures.stretched(values)[15, 0] > 0.9
    assert (figures.stretched(values)[0, :4] == 1).all()


# -- overlay --------------------------------------------------------------------------------------


def test_the_brightest_yellow_lies_where_the_map_is_largest():
    drawn = pixels(figures.overlay(Image.new("RGB", (90, 60), (90, 90, 90)), one_hot(4, 6, 1, 4)))
    assert drawn.shape == (60, 90, 3)
    yellow = drawn[..., 0] - drawn[..., 2]
    y, x = np.unravel_index(yellow.argmax(), yellow.shape)
    assert 15 <= y < 30
    assert 60 <= x < 75


def test_the_photograph_stays_visible_below_the_map():
    image = photo()
    for values, least in (
        (np.zeros((4, 6), np.float32), 0.99),
        (np.random.default_rng(1).random((4, 6), np.float32), 0.7),
    ):
        drawn = figures.overlay(image, values)
        grey = [pixels(picture.convert("L")).ravel() for picture in (image, drawn)]
        assert np.corrcoef(*grey)[0, 1] > least


def test_what_the_network_did_not_see_has_no_colour_and_a_frame_before_it():
    drawn = pixels(figures.overlay(photo(), one_hot(2, 2, 0, 0), (10, 5, 50, 35)))
    outside = np.ones(drawn.shape[:2], bool)
    outside[5:35, 10:50] = False
    assert (drawn[outside].max(axis=1) == drawn[outside].min(axis=1)).all()
    assert (drawn[5:35, 10:50].max(axis=2) > drawn[5:35, 10:50].min(axis=2)).all()
    assert (drawn[4, 9:51] == PAPER).all()
    assert (drawn[4:36, 50] == PAPER).all()


def test_a_map_that_reaches_beyond_the_photograph_is_cut_at_its_edge():
    inside = figures.overlay(photo(), one_hot(2, 4, 0, 1), (-20, 0, 60, 40))
    assert inside.size == (60, 40)
    yellow = pixels(inside)[..., 0] - pixels(inside)[..., 2]
    assert yellow[:20, :20].mean() > yellow[:, 40:].mean() + 10


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_the_thinnest_photograph_has_its_overlay(size):
    assert figures.overlay(photo(*size), one_hot(2, 2, 1, 1)).size == size


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        figures.overlay(photo(), np.array([[0.0, np.nan]], np.float32))


# -- sheets ---------------------------------------------------------------------------------------


def panel(count=2, size=(60, 40), title="rose 93.1%", note="rose/a.jpg", label=""):
    colours = [(10 * k, 200, 3) for k in range(count)]
    pictures = tuple(Image.new("RGB", size, colour) for colour in colours)
    return Panel(pictures, (label,) * count, title, note)


@pytest.mark.parametrize(
    ("panels", "across"),
    [
        ([panel()], 4),
        ([panel()] * 5, 4),
        ([panel(7, label="head")] * 2, 7),
        ([panel(13, label="head")], 7),
        ([panel(), panel(size=(40, 60))], 4),
    ],
)
def test_every_picture_stands_whole_in_its_sheet(panels, across):
    drawn = pixels(figures.sheet("Title", "note", panels, across=across))
    wanted = {}
    for one in panels:
        for picture in one.pictures:
            colour = picture.getpixel((0, 0))
            wanted[colour] = wanted.get(colour, 0) + picture.width * picture.height
    for colour, area in wanted.items():
        assert (drawn == colour).all(axis=2).sum() == area, colour
    edge = np.concatenate([drawn[:, :20].ravel(), drawn[:, -20:].ravel(), drawn[-10:].ravel()])
    assert (edge == 255).all()


def test_long_and_strange_names_stay_in_their_room():
    long = "Löwenzahn \u202e中文\n" + "x" * 500
    drawn = pixels(figures.sheet(long, long, [panel(title=long, note=long)] * 3, across=4))
    assert (drawn[:, -20:] == 255).all()


def test_a_note_that_is_too_long_breaks_before_it_is_shortened(monkeypatch):
    written = []
    monkeypatch.setattr(
        figures, "_text", lambda draw, at, text, *rest: written.append((at[1], text))
    )
    panel = Panel((photo(),), ("",), "a", "b")
    figures.sheet("title", "short; note", [panel], across=1)
    figures.sheet("title", f"{'how ' * 15}; {'what ' * 9}", [panel], across=1)
    notes = [
        (y, text) for y, text in written if y < figures.HEAD and ("note" in text or "w" in text)
    ]
    (first, _), (second, how), (third, what) = notes
    assert (first, notes[0][1]) == (second, "short; note")
    assert (how, what) == ("how " * 15, "what " * 9)
    assert second < third < figures.HEAD - SMALL


def test_a_line_that_is_too_long_is_shortened_in_its_middle():
    canvas = Image.new("RGB", (400, 60), PAPER)
    figures._text(
        ImageDraw.Draw(canvas), (0, 0), "start " + "x" * 90 + " end", SMALL, (0, 0, 0), 300
    )
    dark = np.flatnonzero((pixels(canvas) < 128).any(axis=(0, 2)))
    assert 270 < dark.max() <= 300
    assert figures._shortened("abcdefgh", 5) == "abc...gh"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Löwenzähnchen", "Lowenzahnchen"),
        ("fleur d'été", "fleur d'ete"),
        ("中", "\\u4e2d"),
        ("a\nb\x1b[31m", "a\\nb\\x1b[31m"),
        ("plain ~ text", "plain ~ text"),
    ],
)
def test_letters_that_the_font_lacks_are_spelled(text, expected):
    assert figures.plain(text) == expected


def test_the_font_has_every_character_that_plain_lets_through():
    font = figures._font(HEADING)
    missing = bytes(font.getmask("\uffff"))
    assert [c for c in map(chr, range(33, 127)) if bytes(font.getmask(c)) == missing] == []


def test_a_png_comes_back_as_it_was():
    image = photo()
    again = Image.open(BytesIO(figures.png(image)), formats=["PNG"])
    np.testing.assert_array_equal(pixels(again), pixels(image))


# -- the paper's figures --------------------------------------------------------------------------


def similarity(rows, columns):
    """1 for a patch with itself, less with distance."""
    y, x = np.mgrid[:rows, :columns].reshape(2, -1).astype(np.float32)
    apart = np.abs(y[:, None] - y) + np.abs(x[:, None] - x)
    return (1 - apart / apart.max()).reshape(rows, columns, rows, columns)


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 7), (14, 14), (37, 37), (1, 5)])
def test_each_patch_is_most_like_itself_in_the_grid_of_grids(rows, columns):
    drawn = pixels(figures.positions(similarity(rows, columns), "note"))
    best = (drawn == figures.SCALE[-1]).all(axis=2)
    best[:140] = False  # the legend
    shown = min(rows, figures.SHOWN) * min(columns, figures.SHOWN)
    cell = max(2, 900 // min(max(rows, columns), figures.SHOWN) // max(rows, columns))
    assert best.sum() == shown * cell**2
    assert max(drawn.shape[:2]) < 2200


def test_a_large_grid_is_thinned_with_its_edges_kept():
    assert figures._picked(5) == [0, 1, 2, 3, 4]
    picked = figures._picked(37)
    assert len(picked) == figures.SHOWN
    assert (picked[0], picked[-1]) == (0, 36)


def test_filters_are_grey_where_they_do_not_look():
    images = np.zeros((3, 8, 8, 3), np.float32)
    images[0, 0, 0] = (2, 0, -2)  # orange-red at full strength
    drawn = pixels(figures.filters(images, None, 32, "note"))
    y, x = np.argwhere((drawn == (255, 128, 0)).all(axis=2))[0]
    assert (drawn[y : y + 16, x : x + 16] == (255, 128, 0)).all()
    assert (drawn[y + 20, x + 20] == 128).all()
    with_shares = figures.filters(images, np.array([0.5, 0.3, 0.1], np.float32), 32, "note")
    assert with_shares.height > drawn.shape[0]


def test_dots_of_distance_lie_at_their_height():
    values = np.array([[20.0, 80.0], [40.0, 65.0]], np.float32)
    drawn = pixels(figures.distance(values, 70.0, "note"))
    plot = figures._Plot(2, 100.0)
    blue = (np.abs(drawn - ACCENT).sum(axis=2) < 30)[plot.top :]
    for block, wanted in ((0, {20, 80}), (1, {40, 65})):
        column = blue[:, round(plot.x(block)) + 4]  # beside the bar of the mean
        rows = np.flatnonzero(column) + plot.top
        dots = np.split(rows, np.flatnonzero(np.diff(rows) > 8) + 1)
        found = [(plot.bottom - dot.mean()) / (plot.bottom - plot.top) * 100 for dot in dots]
        assert len(found) == len(wanted)
        np.testing.assert_allclose(sorted(found), sorted(wanted), atol=0.5)


@pytest.mark.parametrize(
    ("step", "nice"), [(0.9, 1), (1.0, 1), (1.1, 2), (3, 5), (23.4, 50), (60, 100), (0.03, 0.05)]
)
def test_steps_of_an_axis_are_round(step, nice):
    assert figures._nice(step) == pytest.approx(nice)


def test_many_blocks_and_one_block_have_their_figure():
    for shape in ((1, 1), (48, 25)):
        drawn = figures.distance(np.full(shape, 30, np.float32), 70.0, "note")
        assert (pixels(drawn)[:, -MARGIN + 10 :] == 255).all()
