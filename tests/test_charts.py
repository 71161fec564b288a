"""Charts: coordinates against positions worked out by hand."""

from math import isfinite, nan

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vitft.charts import BOTTOM, LEFT, LINE, RIGHT, TOP, WIDTH, Chart, Series, lay_out, stack, ticks

RIGHT_END = WIDTH - RIGHT


def test_ticks_are_round_and_enclose_the_data():
    assert ticks(0.03, 0.97) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(86.1, 93.2) == [86, 88, 90, 92, 94]


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_ticks_enclose_any_range_and_are_few(low, width):
    at = ticks(low, low + width)
    step = at[1] - at[0]
    assert 2 <= len(at) <= 8
    assert at[0] <= low + 1e-6 * step
    assert at[-1] >= low + width - 1e-6 * step


def test_a_line_runs_from_corner_to_corner():
    plot = lay_out(Chart("t", (Series("s", x=[1, 2, 3], y=[0, 5, 10]),)))
    middle = (LEFT + RIGHT_END) / 2
    assert plot.bottom == TOP + LINE
    assert plot.curves[0].path == (
        f"M{LEFT:g} {plot.bottom:g}L{middle:g} {TOP + LINE / 2:g}L{RIGHT_END:g} {TOP:g}"
    )
    assert [t.text for t in plot.x_ticks] == ["1", "2", "3"]  # epochs: whole numbers only


def test_a_missing_value_leaves_a_gap():
    plot = lay_out(Chart("t", (Series("s", x=[1, 2, 3, 4], y=[0, nan, 1, 1]),)))
    assert plot.curves[0].path.count("M") == 2
    assert "nan" not in plot.curves[0].path


def test_powers_of_ten_are_equally_far_apart_on_a_logarithmic_axis():
    xs = [1e-6, 1e-3, 1, 1e3, 1e6]
    plot = lay_out(Chart("t", (Series("s", x=[0, *xs], y=[0, 1, 2, 3, 2, 1]),), x_log=True))
    at = [float(p.split(" ")[0]) for p in plot.curves[0].path[1:].split("L")]
    assert len(at) == 5  # 0 has no logarithm
    assert [round(b - a) for a, b in zip(at, at[1:], strict=False)] == [83] * 4
    assert [t.text for t in plot.x_ticks] == ["10⁻⁶", "0.001", "1", "1,000", "10⁶"]


def test_a_band_goes_there_and_back():
    s = Series("s", x=[0, 1], y=[0.5, 0.5], low=[0, 0.25], high=[1, 0.75])
    plot = lay_out(Chart("t", (s,), percent=True))
    low, high = plot.bottom, TOP
    quarter = LINE / 4
    assert plot.curves[0].band == (
        f"M{LEFT:g} {high:g}L{RIGHT_END:g} {high + quarter:g}"
        f"L{RIGHT_END:g} {low - quarter:g}L{LEFT:g} {low:g}Z"
    )


def test_points_have_whiskers_and_no_line():
    s = Series("s", x=[0.5], y=[0.5], low=[0.25], high=[1.0], style="points")
    plot = lay_out(Chart("t", (s,), kind="reliability"))
    side = RIGHT_END - LEFT
    x, y = LEFT + side / 2, TOP + side / 2
    assert plot.diagonal
    assert plot.curves[0].path == ""
    assert plot.curves[0].dots == ((x, y),)
    assert plot.curves[0].whiskers == ((x, TOP + 3 * side / 4, TOP),)
    assert [t.text for t in plot.x_ticks] == [f"{p}\u00a0%" for p in (0, 20, 40, 60, 80, 100)]


def test_shares_never_leave_0_to_100_percent():
    plot = lay_out(Chart("t", (Series("s", x=[1, 2], y=[0.999, 1.0]),), percent=True))
    assert all(float(t.text.split("\u00a0")[0]) <= 100 for t in plot.y_ticks)


def test_a_chart_of_nothing_still_has_axes():
    plot = lay_out(Chart("t", (Series("s", x=[nan], y=[1.0]),), x_log=True))
    assert plot.x_ticks
    assert plot.y_ticks


@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=6), st.booleans())
@example([(5e-324, 0.0)], True)
def test_any_numbers_are_drawn_inside_the_picture(points, x_log):
    points = [p for p in points if all(abs(v) < 1e100 or not isfinite(v) for v in p)]
    s = Series("s", x=[x for x, _ in points], y=[y for _, y in points], style="points")
    plot = lay_out(Chart("t", (s,), x_log=x_log))
    for x, y in plot.curves[0].dots:
        assert LEFT - 1 <= x <= RIGHT_END + 1
        assert TOP - 1 <= y <= plot.height - BOTTOM + 1


def test_bars_are_stacked_and_the_longest_fills_the_row():
    chart = Chart(
        "t", (Series("train", [3, 6]), Series("test", [1, 2])), kind="bars", names=("a", "b")
    )
    small, large = stack(chart)
    assert (small.name, small.total) == ("a", 4)
    assert small.parts == (("train", 3, 0.375), ("test", 1, 0.125))
    assert sum(share for *_, share in large.parts) == 1


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"series 's' needs lists of one length, got \[1, 2\]"):
        lay_out(Chart("t", (Series("s", x=[1], y=[1, 2]),)))
    with pytest.raises(ValueError, match="needs 2 values of 0 or more, got 1"):
        stack(Chart("t", (Series("s", [1]),), kind="bars", names=("a", "b")))
    with pytest.raises(ValueError, match="bars are laid out by `stack`"):
        lay_out(Chart("t", (), kind="bars"))
