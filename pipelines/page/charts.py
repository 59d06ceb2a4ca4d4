"""Numbers to the geometry of small charts; the template draws them as SVG. Coordinates are pixels of a box 360 wide, y downwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 348, 10, 158
"""The box in which values are drawn."""


@dataclass(frozen=True)
class Tick:
    """A number on an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Bar:
    """A bar, and what it says when it is pointed at."""

    x: float
    y: float
    width: float
    height: float
    title: str


@dataclass(frozen=True)
class Mark:
    """A vertical line with a word."""

    at: float
    text: str


@dataclass(frozen=True)
class Point:
    """One of several things, told apart by colour and form, that leads to `#target` in the page."""

    x: float
    y: float
    kind: str
    """v0 to v7: colour and form."""
    group: str
    target: str
    title: str


@dataclass(frozen=True)
class Line:
    """Likewise, as a curve."""

    path: str
    kind: str
    group: str
    target: str
    title: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What the template draws."""

    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    bars: tuple[Bar, ...] = ()
    line: str = ""
    """An SVG path."""
    dots: tuple[tuple[float, float], ...] = ()
    marks: tuple[Mark, ...] = ()
    diagonal: bool = False
    points: tuple[Point, ...] = ()
    lines: tuple[Line, ...] = ()
    front: str = ""
    """An SVG path."""


@dataclass(frozen=True)
class Curve:
    """Values to be drawn as a line, or one value as a point."""

    values: Sequence[tuple[float, float]]
    kind: str
    group: str
    target: str
    title: str


def scatter(things: Sequence[Curve], front: Sequence[tuple[float, float]], *, x_title: str, y_title: str) -> Chart:
    """Points over a logarithmic x axis, and the front of those that nothing to their left is above. x above 0; `front` in ascending order."""
    found = [thing.values[0] for thing in things]
    to_x, x_ticks = _log_axis([x for x, _ in found])
    to_y, y_ticks = _fitting_axis([y for _, y in found], pad=0.08)
    corners = [(to_x(x), to_y(y)) for x, y in front]
    path = f"M{corners[0][0]:.1f},{corners[0][1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in corners[1:]) + f"H{RIGHT}" if corners else ""
    points = [Point(to_x(x), to_y(y), thing.kind, thing.group, thing.target, thing.title) for thing, (x, y) in zip(things, found, strict=True)]
    return Chart(x_title=x_title, y_title=y_title, x_ticks=x_ticks, y_ticks=y_ticks, points=tuple(points), front=path)


def curves(
    things: Sequence[Curve], *, x_title: str, y_title: str, log_y: bool = False, from_zero: bool = False, marks: Sequence[tuple[float, str]] = (),
    max_points: int = 120,
) -> Chart:  # fmt: skip
    """Lines over a common x axis of whole numbers from 0. Long ones are thinned, their last point is kept; one point is drawn as a short dash."""
    top = max((x for thing in things for x, _ in thing.values), default=1.0) or 1.0
    ys = [y for thing in things for _, y in thing.values]
    to_y, y_ticks = _log_axis(ys, vertical=True) if log_y else _fitting_axis([*ys, 0.0] if from_zero else ys)
    lines = []
    for thing in things:
        every = -(-len(thing.values) // max_points)
        kept = [*thing.values[:-1:every], thing.values[-1]]
        drawn = [(LEFT + (RIGHT - LEFT) * x / top, to_y(y)) for x, y in kept]
        path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in drawn) if len(drawn) > 1 else f"M{drawn[0][0] - 4:.1f},{drawn[0][1]:.1f}h4"
        lines.append(Line(path, thing.kind, thing.group, thing.target, thing.title))
    return Chart(
        x_title=x_title,
        y_title=y_title,
        x_ticks=tuple(Tick(LEFT + (RIGHT - LEFT) * value / top, f"{value:,g}") for value in _multiples(_step(top, 5, whole=True), 0, top)),
        y_ticks=y_ticks,
        lines=tuple(lines),
        marks=tuple(Mark(LEFT + (RIGHT - LEFT) * value / top, text) for value, text in marks),
    )


def _fitting_axis(values: Sequence[float], *, pad: float = 0.0) -> tuple[Callable[[float], float], tuple[Tick, ...]]:
    """From a value to its y, and ticks: an axis around all values, not necessarily with 0, `pad` of its length beyond them."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    length = high - low or max(abs(high), 1.0) / 10
    step = _step(length, 4)
    low, high = (low - pad * length, high + pad * length) if pad else (math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step)
    high = max(high, low + step)

    def place(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)

    return place, tuple(Tick(place(value), f"{value:,g}") for value in _multiples(step, low, high))


def _log_axis(values: Sequence[float], *, vertical: bool = False) -> tuple[Callable[[float], float], tuple[Tick, ...]]:
    """From a value above 0 to its place on a logarithmic axis, and ticks: a few of 1, 2 and 5 times powers of ten, or round numbers if none fit."""
    low, high = min(values, default=1.0), max(values, default=10.0)
    pad = max((math.log10(high) - math.log10(low)) * 0.07, 0.04)
    low_log, high_log = math.log10(low) - pad, math.log10(high) + pad
    begin, end = (BOTTOM, TOP) if vertical else (LEFT, RIGHT)

    def place(value: float) -> float:
        return begin + (end - begin) * (math.log10(value) - low_log) / (high_log - low_log)

    decades = range(math.floor(low_log), math.ceil(high_log) + 1)
    found: list[float] = []
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [factor * 10.0**decade for decade in decades for factor in factors if low_log <= math.log10(factor * 10.0**decade) <= high_log]
        if len(found) >= 3:
            break
    if len(found) < 3:
        low, high = 10**low_log, 10**high_log
        found = _multiples(_step(high - low, 4), low, high)
    every = -(-len(found) // 6)
    return place, tuple(Tick(place(value), f"{value:,.6g}") for value in found[::every])


def _multiples(step: float, low: float, high: float) -> list[float]:
    """Of `step`, from `low` to `high`."""
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def histogram(values: Sequence[float], high: float, *, bins: int, x_title: str, y_title: str, marks: Sequence[tuple[float, str]] = ()) -> Chart:
    """Counts of values between 0 and `high`."""
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, max(0, int(value / high * bins)))] += 1
    top = max(counts, default=1) or 1
    step = (RIGHT - LEFT) / bins
    drawn = []
    for number, count in enumerate(counts):
        height = (BOTTOM - TOP) * count / top
        title = f"{high * number / bins:.2f} to {high * (number + 1) / bins:.2f}: {count:,}"
        drawn.append(Bar(LEFT + step * number + 0.5, BOTTOM - height, step - 1, height, title))
    ticks = _nice(high, 5)
    return Chart(
        x_title=x_title,
        y_title=y_title,
        x_ticks=tuple(Tick(LEFT + (RIGHT - LEFT) * value / high, f"{value:g}") for value in ticks),
        y_ticks=_y_ticks(top),
        bars=tuple(drawn),
        marks=tuple(Mark(LEFT + (RIGHT - LEFT) * min(value, high) / high, text) for value, text in marks),
    )


def bars(items: Sequence[tuple[str, float]], *, x_title: str, y_title: str) -> Chart:
    """A bar an item, from 0."""
    top = max((value for _, value in items), default=1.0) or 1.0
    step = (RIGHT - LEFT) / len(items)
    every = -(-len(items) // 10)
    return Chart(
        x_title=x_title,
        y_title=y_title,
        x_ticks=tuple(Tick(LEFT + step * (i + 0.5), name) for i, (name, _) in enumerate(items) if i % every == 0),
        y_ticks=_y_ticks(top),
        bars=tuple(
            Bar(
                LEFT + step * i + 0.1 * step, BOTTOM - (BOTTOM - TOP) * value / top, 0.8 * step, (BOTTOM - TOP) * value / top, f"{name}: {value:,.0f}"
            )
            for i, (name, value) in enumerate(items)
        ),
    )


def curve(
    points: Sequence[tuple[float, float]], *, x_title: str, y_title: str, log_y: bool = False, from_zero: bool = False, max_points: int = 160
) -> Chart:
    """A line through points whose x is at least 1, on a logarithmic x axis; y from 0, or logarithmic too."""
    xs = [math.log10(x) for x, _ in points]
    widest = max(xs[-1], 1e-9)
    keep = sorted({round(10 ** (widest * i / (max_points - 1))) - 1 for i in range(max_points)} & set(range(len(points)))) if len(points) > 1 else [0]
    values = [max(y, 1e-12) for _, y in points]
    if log_y:
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
        high = max(high, low + 1)
        place = [(math.log10(value) - low) / (high - low) for value in values]
        y_ticks = tuple(Tick(BOTTOM - (BOTTOM - TOP) * i / (high - low), f"{10.0 ** (low + i):g}") for i in range(high - low + 1))
    else:
        top = max(values)
        place = [value / top for value in values]
        y_ticks = _y_ticks(top)
    assert from_zero or log_y
    drawn = [(LEFT + (RIGHT - LEFT) * xs[i] / widest, BOTTOM - (BOTTOM - TOP) * place[i]) for i in keep]
    line = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
    decades = [10**i for i in range(int(widest) + 1)]
    return Chart(
        x_title=x_title,
        y_title=y_title,
        x_ticks=tuple(Tick(LEFT + (RIGHT - LEFT) * math.log10(value) / widest, f"{value:,}") for value in decades),
        y_ticks=y_ticks,
        line=line,
    )


def reliability(points: Sequence[tuple[float, float, int]]) -> Chart:
    """Accuracy against confidence: (mean confidence, accuracy, rows) of each bin, both from 0 to 1."""
    ticks = [0, 0.25, 0.5, 0.75, 1]
    drawn = [(LEFT + (RIGHT - LEFT) * confidence, BOTTOM - (BOTTOM - TOP) * accuracy) for confidence, accuracy, _ in points]
    return Chart(
        x_title="confidence, %",
        y_title="correct, %",
        x_ticks=tuple(Tick(LEFT + (RIGHT - LEFT) * value, f"{100 * value:g}") for value in ticks),
        y_ticks=tuple(Tick(BOTTOM - (BOTTOM - TOP) * value, f"{100 * value:g}") for value in ticks),
        line="M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in drawn),
        dots=tuple(drawn),
        diagonal=True,
    )


def _y_ticks(top: float) -> tuple[Tick, ...]:
    return tuple(Tick(BOTTOM - (BOTTOM - TOP) * value / top, f"{value:,g}") for value in _nice(top, 4))


def _nice(high: float, about: int) -> list[float]:
    """Round numbers from 0 to at most `high`, near `about` of them."""
    step = _step(high, about)
    return [round(i * step, 12) for i in range(int(high / step + 1e-9) + 1)]


def _step(length: float, about: int, *, whole: bool = False) -> float:
    """A round number, or a whole one, that fits near `about` times into `length`."""
    rough = max(length / about, 1.0) if whole else length / about
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in ((1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)) if factor * power >= rough * 0.999)


@dataclass(frozen=True)
class CellMap:
    """Cells in rows from left to right, one unit a side; neighbours of one kind are drawn as one."""

    columns: int
    rows: int
    paths: tuple[tuple[str, str], ...]
    """(kind, SVG path) of each kind that occurs."""


def cell_map(kinds: Sequence[str]) -> CellMap:
    """A map about three times as wide as high. A run ends within the gap after its last cell, which the template draws over it."""
    columns = min(160, max(24, math.ceil(math.sqrt(3 * len(kinds)))))
    paths: dict[str, list[str]] = {}
    start = 0
    for i in range(1, len(kinds) + 1):
        if i == len(kinds) or kinds[i] != kinds[start] or i % columns == 0:
            paths.setdefault(kinds[start], []).append(f"M{start % columns},{start // columns}h{i - start - 0.07:g}v.93h-{i - start - 0.07:g}z")
            start = i
    return CellMap(columns, max(1, -(-len(kinds) // columns)), tuple((kind, "".join(path)) for kind, path in sorted(paths.items())))
