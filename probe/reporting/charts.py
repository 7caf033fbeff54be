"""Static plots as geometry: data in, pixel positions out; a template draws them as SVG.

Written by hand and not by a plotting library: a page whose colours follow the reader's light or dark setting needs
SVG that is styled by the page, a report has five kinds of plot, and the import would cost more time than all of them.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """Points of one kind. low, high: bars at each point. kind: line, dashed, dots or steps of the style sheet."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    titles: Sequence[str] = ()
    radii: Sequence[float] = ()
    kind: str = "line"
    colour: int = 0


@dataclasses.dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclasses.dataclass(frozen=True)
class Mark:
    """One point as it is drawn: position, bar ends, radius, and what it says on hover."""

    x: float
    y: float
    low: float | None
    high: float | None
    radius: float
    title: str


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A series in pixels. points: of the SVG polyline."""

    name: str
    kind: str
    colour: int
    points: str
    marks: list[Mark]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """All that the template needs; positions are in the SVG's own units, y downwards.

    chosen: where a vertical line marks a choice. diagonal: ends of the line y = x.
    """

    title: str
    description: str
    x_label: str
    y_label: str
    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    series: list[Drawn]
    chosen: Tick | None
    diagonal: tuple[float, float, float, float] | None

    @property
    def legend(self) -> list[Drawn]:
        """Series that need a name: none where there is one alone."""
        return self.series if len(self.series) > 1 else []


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    chosen: tuple[float, str] | None = None,
    square: bool = False,
    percent_y: bool = False,
) -> Chart:
    """Lays out series over common axes.

    Args:
      title, description: for those who see the plot, and for those who do not.
      log_x: powers of ten as ticks; all x are positive.
      chosen: the x that was chosen, and what is written there.
      square: both axes from 0 to 1, with the diagonal.
      percent_y: y is a share, written as percentages.
    """
    series = [one for one in series if len(one.x)]
    assert series, "a chart of nothing"
    width, height = (360, 374) if square else (520, 310)
    left, right, top, bottom = 58.0, width - 14.0, 28.0, height - 46.0
    if square:
        x_range = y_range = (0.0, 1.0)
    else:
        x_range = _extent([x for one in series for x in one.x], log=log_x, pad=0.03)
        ends = [y for one in series for y in (*one.y, *one.low, *one.high) if y is not None]
        y_range = _extent(ends, log=False, pad=0.08)
        if percent_y:
            y_range = max(y_range[0], 0.0), min(y_range[1], 1.0)
        if y_range[0] == y_range[1]:
            y_range = y_range[0] - 0.5, y_range[1] + 0.5

    def place_x(x: float) -> float:
        low, high = x_range
        share = (math.log10(x) - low) / (high - low) if log_x else (x - low) / (high - low)
        return round(left + share * (right - left), 2)

    def place_y(y: float) -> float:
        low, high = y_range
        return round(bottom - (y - low) / (high - low) * (bottom - top), 2)

    def draw(one: Series) -> Drawn:
        marks = []
        for i, (x, y) in enumerate(zip(one.x, one.y, strict=True)):
            low, high = (ends[i] if ends else None for ends in (one.low, one.high))
            marks.append(
                Mark(
                    place_x(x),
                    place_y(y),
                    None if low is None else place_y(low),
                    None if high is None else place_y(high),
                    round(one.radii[i], 2) if one.radii else 3.0,
                    one.titles[i] if one.titles else f"{number(x)}: {number(y)}",
                )
            )
        return Drawn(one.name, one.kind, one.colour, " ".join(f"{m.x},{m.y}" for m in marks), marks)

    write_y = percent if percent_y or square else number
    return Chart(
        title=title,
        description=description,
        x_label=x_label,
        y_label=y_label,
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        x_ticks=[Tick(place_x(x), percent(x) if square else number(x)) for x in _ticks(x_range, log=log_x)],
        y_ticks=[Tick(place_y(y), write_y(y)) for y in _ticks(y_range, log=False)],
        series=[draw(one) for one in series],
        chosen=None if chosen is None else Tick(place_x(chosen[0]), chosen[1]),
        diagonal=(left, bottom, right, top) if square else None,
    )


@dataclasses.dataclass(frozen=True)
class Bar:
    """A line of an interval chart: the share, and its interval if there is one; x positions in pixels."""

    name: str
    text: str
    note: str
    y: float
    x: float
    low: float | None
    high: float | None
    own: bool


@dataclasses.dataclass(frozen=True)
class IntervalChart:
    width: int
    height: int
    left: float
    right: float
    ticks: list[Tick]
    bars: list[Bar]


def interval_chart(lines: Sequence[tuple[str, float, Sequence[float] | None, str, bool]]) -> IntervalChart:
    """Shares with intervals, one below the other, on one axis.

    Args:
      lines: (name, share, [low, high] or None, note, whether it is the run itself).
    """
    width, left, right, row, top = 640, 200.0, 520.0, 34, 12
    ends = [end for _, share, interval, _, _ in lines for end in (share, *(interval or ()))]
    low, high = _extent(ends, log=False, pad=0.06)
    low, high = max(low, 0.0), min(high, 1.0)
    if low == high:
        low, high = max(low - 0.05, 0.0), min(high + 0.05, 1.0)

    def place(share: float) -> float:
        return round(left + (share - low) / (high - low) * (right - left), 2)

    bars = []
    for i, (name, share, interval, note, own) in enumerate(lines):
        start, end = (None, None) if interval is None else (place(interval[0]), place(interval[1]))
        bars.append(Bar(name, percent(share, 1), note, top + (i + 0.5) * row, place(share), start, end, own))
    height = top + row * len(lines) + 30
    return IntervalChart(width, height, left, right, [Tick(place(x), percent(x)) for x in _ticks((low, high))], bars)


def number(value: float) -> str:
    """A few digits: 0.05, 12, 3,200, 1e-5."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    mantissa, exponent = f"{value:.2g}".split("e") if "e" in f"{value:.2g}" else (f"{value:.1e}").split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}"


def percent(share: float, digits: int | None = None) -> str:
    """0.955 -> 95.5 %; without digits, as few as tell it."""
    if digits is None:
        text = f"{100 * share:.2f}".rstrip("0").rstrip(".")
        return f"{text} %"
    return f"{100 * share:.{digits}f} %"


def _extent(values: Sequence[float], *, log: bool, pad: float) -> tuple[float, float]:
    array = np.asarray(values, float)
    if log:
        array = np.log10(array)
    low, high = float(array.min()), float(array.max())
    # Never so short that its ticks would all be written alike
    margin = max(pad * (high - low), 0.1 if log else max(1e-3 * max(abs(low), abs(high)), 1e-6))
    return low - margin, high + margin


def _ticks(extent: tuple[float, float], *, log: bool = False) -> list[float]:
    """Round numbers inside, four to eight of them; powers of ten on a logarithmic axis, with 2 and 5 if it is short."""
    low, high = extent
    if log:
        exponents = range(math.ceil(low), math.floor(high) + 1)
        if len(exponents) >= 3:
            return [10.0**e for e in exponents[:: math.ceil(len(exponents) / 7)]]
        whole = range(math.floor(low), math.ceil(high) + 1)
        return [m * 10.0**e for e in whole for m in (1, 2, 5) if low <= math.log10(m * 10.0**e) <= high]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]
