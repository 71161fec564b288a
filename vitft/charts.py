"""Numbers -> coordinates: the geometry of the small charts that pages draw as inline SVG.

No plotting library and no markup here: `lay_out` gives numbers and path data, the template turns
them into SVG, where every text is escaped and every colour comes from the style sheet.

The drawing is 400 units wide, so that its text is readable on a phone as well as on paper.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10
from typing import ClassVar, Literal

WIDTH = 400.0
LEFT, RIGHT, BOTTOM = 46.0, 22.0, 44.0  # margins hold the ticks and the name of the x axis
TOP, NAMED = 10.0, 26.0  # room above, without and with the name of the y axis
SQUARE = WIDTH - LEFT - RIGHT  # height of a reliability plot between its axes
LINE = 180.0  # height of the others
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One curve, one set of points, or one layer of stacked bars.

    Attributes:
        name: For the legend.
        x: Positions, in the order they are joined; ignored by bars.
        y: Values; a pair that is not finite leaves a gap.
        low: Lower ends, as long as y: a band around a line, a whisker at a point. Or empty.
        high: Upper ends, likewise.
        style: How it is drawn; bars ignore it.
    """

    name: str
    y: Sequence[float]
    x: Sequence[float] = ()
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    style: Literal["line", "dashed", "points"] = "line"


@dataclass(frozen=True)
class Chart:
    """What a chart says, before it is drawn.

    Attributes:
        series: At most 6 can be told apart.
        kind: `reliability` has both axes from 0 to 1 and the diagonal; `bars` are stacked, one
            for each of `names`.
        percent: y is a share, 0-1, printed as percent.
        x_log: Logarithmic x; points with x <= 0 are left out.
        mark: One point to emphasise, such as the chosen strength.
        caption: One sentence below: what the reader should see.
    """

    title: str
    series: tuple[Series, ...]
    kind: Literal["line", "reliability", "bars"] = "line"
    x_label: str = ""
    y_label: str = ""
    x_log: bool = False
    percent: bool = False
    names: tuple[str, ...] = ()
    mark: Point | None = None
    caption: str = ""
    block: ClassVar[str] = "chart"  # which macro of the page draws it


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Curve:
    """A series in drawing units; `path` and `band` are SVG path data, maybe empty."""

    name: str
    style: str
    path: str
    band: str
    dots: tuple[Point, ...]
    whiskers: tuple[tuple[float, float, float], ...]  # (x, y of low, y of high)


@dataclass(frozen=True)
class Plot:
    """Everything the template draws, in units of the drawing (y grows downwards)."""

    height: float
    top: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    curves: tuple[Curve, ...]
    mark: Point | None
    diagonal: bool
    width: float = WIDTH
    left: float = LEFT
    right: float = WIDTH - RIGHT

    @property
    def bottom(self) -> float:
        """Where the x axis lies."""
        return self.height - BOTTOM


@dataclass(frozen=True)
class Bar:
    """One row of stacked bars: each part as (layer, value, share of the longest row, 0-1)."""

    name: str
    total: float
    parts: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True)
class _Scale:
    """Data -> drawing units along one axis; `start` and `end` are where low and high lie."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, v = self.low, self.high, value
        if self.log:
            low, high, v = log10(low), log10(high), log10(v)
        share = (v - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)


def lay_out(chart: Chart) -> Plot:
    """Places the ticks, curves, bands and whiskers of a line or reliability chart.

    Args:
        chart: Its points may be none at all; the axes are drawn all the same.

    Raises:
        ValueError: A series has lists of different lengths, or the chart is one of bars.
    """
    if chart.kind == "bars":
        raise ValueError(f"chart {chart.title!r}: bars are laid out by `stack`")
    square = chart.kind == "reliability"
    top = NAMED if chart.y_label else TOP
    bottom = top + (SQUARE if square else LINE)
    points = [p for s in chart.series for p in _points(s, chart.x_log)]
    x_values = [0.0, 1.0] if square else [x for x, *_ in points]
    y_values = [0.0, 1.0] if square else [y for _, *ys in points for y in ys]
    x_ends, x_at = _log_axis(x_values) if chart.x_log else _axis(x_values, tight=not square)
    y_ends, y_at = _axis(y_values, tight=False)
    if chart.percent:
        y_ends = (max(0.0, y_ends[0]), min(1.0, y_ends[1]))
    x = _Scale(*x_ends, LEFT, WIDTH - RIGHT, log=chart.x_log)
    y = _Scale(*y_ends, bottom, top)
    return Plot(
        height=bottom + BOTTOM,
        top=top,
        x_ticks=tuple(Tick(x(t), _text(t, percent=square)) for t in x_at),
        y_ticks=tuple(
            Tick(y(t), _text(t, percent=square or chart.percent))
            for t in y_at
            if y_ends[0] <= t <= y_ends[1]
        ),
        curves=tuple(_curve(s, x, y) for s in chart.series),
        mark=(x(chart.mark[0]), y(chart.mark[1])) if chart.mark else None,
        diagonal=square,
    )


def stack(chart: Chart) -> tuple[Bar, ...]:
    """Lays the series of a bar chart end to end, one row for each name.

    Raises:
        ValueError: A series is not as long as `names`, or holds a value below 0.
    """
    for s in chart.series:
        if len(s.y) != len(chart.names) or any(v < 0 for v in s.y):
            raise ValueError(
                f"chart {chart.title!r}: series {s.name!r} needs {len(chart.names)} values of 0 "
                f"or more, got {len(s.y)}"
            )
    totals = [float(sum(s.y[i] for s in chart.series)) for i in range(len(chart.names))]
    longest = max(totals, default=0.0) or 1.0
    return tuple(
        Bar(name, totals[i], tuple((s.name, s.y[i], s.y[i] / longest) for s in chart.series))
        for i, name in enumerate(chart.names)
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that reach from at most `low` to at least `high`, about `count` of them.

    Args:
        low: Finite.
        high: Finite, not below low.
        count: Wanted; the answer has between 2 and `count` + 3.
    """
    size = max(abs(low), abs(high))
    if high - low <= max(1e-9 * size, 1e-300):  # one value: show it in the middle
        size = size if size > 1e-300 else 1.0
        low, high = low - 0.05 * size, high + 0.05 * size
    raw = (high - low) / max(count, 1)
    power = 10.0 ** floor(log10(raw))
    step = next(s * power for s in STEPS if s * power >= raw * (1 - 1e-9))
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    digits = 2 - floor(log10(step))  # 3 * 0.1 is 0.3, not 0.30000000000000004
    return [round(i * step, digits) for i in range(first, last + 1)]


def _points(s: Series, x_log: bool = False) -> Iterator[tuple[float, ...]]:
    """The finite (x, y[, low, high]) of a series."""
    lists = [s.x, s.y, s.low, s.high] if len(s.low) else [s.x, s.y]
    if len({len(values) for values in lists}) != 1:
        raise ValueError(
            f"series {s.name!r} needs lists of one length, got {[len(v) for v in lists]}"
        )
    for row in zip(*lists, strict=True):
        if all(isfinite(v) for v in row) and (not x_log or row[0] > 0):
            yield tuple(float(v) for v in row)


def _axis(values: list[float], *, tight: bool) -> tuple[Point, list[float]]:
    """Ends and ticks of a linear axis; a tight one ends at the data, not at a tick."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    at = ticks(low, high)
    if not tight or low == high:
        return (at[0], at[-1]), at
    if all(v == int(v) for v in values):  # epochs: there is no epoch 2.5
        at = [t for t in at if t == int(t)]
    slack = 1e-9 * (high - low)
    return (low, high), [t for t in at if low - slack <= t <= high + slack]


def _log_axis(values: list[float]) -> tuple[Point, list[float]]:
    """Ends and ticks of a logarithmic axis: six powers of ten at most, or 1, 2, 5 of few."""
    low, high = (min(values), max(values)) if values else (0.1, 1.0)
    if low == high:
        low, high = low / 10 or low, high * 10  # the least number has no tenth
    first, last = ceil(log10(low) - 1e-9), floor(log10(high) + 1e-9)
    stride = max(1, ceil((last - first + 1) / 6))
    if last - first < 2:
        fine = [m * 10.0**k for k in range(first - 1, last + 1) for m in (1, 2, 5)]
        return (low, high), [t for t in fine if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
    return (low, high), [10.0**k for k in range(first, last + 1, stride)]


def _text(value: float, *, percent: bool) -> str:
    """A tick as people read it: `75 %`, `0.02`, `1,000`, `10⁻⁶`."""
    if percent:
        return f"{100 * value:.4g}\u00a0%"
    power = round(log10(value)) if value > 0 else 0
    if abs(power) > 3 and abs(value / 10.0**power - 1) < 1e-9:
        return "10" + str(power).translate(RAISED)
    return f"{int(value):,}" if value == int(value) else f"{value:.4g}"


def _curve(s: Series, x: _Scale, y: _Scale) -> Curve:
    rows = list(_points(s, x.log))
    dots = tuple((x(row[0]), y(row[1])) for row in rows)
    ends = [(x(row[0]), y(row[2]), y(row[3])) for row in rows if len(row) == 4]
    points = s.style == "points"
    return Curve(
        name=s.name,
        style=s.style,
        path="" if points else _path(s, x, y),
        band="" if points or len(ends) < 2 else _band(ends),
        dots=dots if points or len(rows) < 2 else (),
        whiskers=tuple(ends) if points or len(rows) < 2 else (),
    )


def _path(s: Series, x: _Scale, y: _Scale) -> str:
    """`M` at the start and after every gap, `L` between."""
    parts, pen = [], "M"
    for a, b in zip(s.x, s.y, strict=True):
        if not (isfinite(a) and isfinite(b)) or (x.log and a <= 0):
            pen = "M"
            continue
        parts.append(f"{pen}{x(a):g} {y(b):g}")
        pen = "L"
    return "".join(parts)


def _band(ends: list[tuple[float, float, float]]) -> str:
    """There along the high ends, back along the low ones."""
    there = [f"{x:g} {high:g}" for x, _, high in ends]
    back = [f"{x:g} {low:g}" for x, low, _ in reversed(ends)]
    return "M" + "L".join(there + back) + "Z"
