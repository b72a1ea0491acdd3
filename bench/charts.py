# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG: lines over time, and bars with their spread. Pure: numbers in, markup out.

Colours, fonts and line widths are classes, so that the page decides how they look by day and by night; `colour` is
the name of one. All text is escaped here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

POINTS_MAX = 160
"""More points than a curve is wide do not show, and make the page heavy."""

_TICKS = 5
_LABEL_APART = 15.0
_LOG_TICKS = (1, 1.02, 1.05, 1.1, 1.2, 1.3, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100, 200)
_LOG_TICKS_APART = 42.0


@dataclass(frozen=True, slots=True)
class Line:
    """A curve through points (x, y); `label` stands at its end, "" for none."""

    points: Sequence[tuple[float, float]]
    colour: str
    label: str = ""
    thin: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """A dashed upright line at `x`."""

    x: float
    label: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A median, and each value it is of; hollow where the values do not count."""

    name: str
    median: float
    values: Sequence[float]
    colour: str
    label: str
    hollow: bool = False


@dataclass(frozen=True, slots=True)
class Frame:
    """The size of a chart and the room around its plot, in pixels of its own."""

    width: float
    height: float
    left: float = 46
    right: float = 16
    top: float = 14
    bottom: float = 34


def lines(
    curves: Sequence[Line],
    frame: Frame,
    *,
    x_label: str,
    y_tick: Callable[[float], str],
    x_max: float,
    y_max: float,
    mark: Mark | None = None,
) -> str:
    """Return curves over a common pair of axes that both begin at 0."""
    x_ticks, y_ticks = ticks(x_max), ticks(y_max)
    x_top, y_top = max(x_max, 1e-9), max(y_max, y_ticks[-1], 1e-9)

    def x_of(value: float) -> float:
        return frame.left + min(value / x_top, 1) * (frame.width - frame.left - frame.right)

    def y_of(value: float) -> float:
        return frame.height - frame.bottom - min(value / y_top, 1) * (frame.height - frame.top - frame.bottom)

    parts = [*_grid(frame, [(y_of(tick), y_tick(tick)) for tick in y_ticks])]
    base = frame.height - frame.bottom
    parts += [_text(x_of(tick), base + 16, f"{tick:g}", "tick", "middle") for tick in x_ticks]
    parts.append(_text(frame.width - frame.right, frame.height - 3, x_label, "tick", "end"))
    if mark:
        parts.append(
            f'<line class="mark" x1="{x_of(mark.x):.1f}" x2="{x_of(mark.x):.1f}" y1="{frame.top}" y2="{base}"/>'
        )
        side = "end" if mark.x > x_top / 2 else "start"
        parts.append(_text(x_of(mark.x) + (-4 if side == "end" else 4), frame.top + 10, mark.label, "note", side))
    for curve in curves:
        drawn = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in thinned(curve.points))
        parts.append(f'<polyline class="line {"thin " if curve.thin else ""}{curve.colour}" points="{drawn}"/>')
    parts += _end_labels([curve for curve in curves if curve.label and curve.points], frame, x_of, y_of)
    return _svg(frame, parts)


def bars(rows: Sequence[Bar], frame: Frame, *, base_label: str) -> str:
    """Return bars that begin at 1 on a logarithmic scale: how far each is from what 1 stands for."""
    top = max([1.1, *(value for row in rows for value in (row.median, *row.values))]) * 1.03
    plot = frame.width - frame.left - frame.right

    def x_of(value: float) -> float:
        return frame.left + math.log(max(value, 1)) / math.log(top) * plot

    step = (frame.height - frame.top - frame.bottom) / max(1, len(rows))
    base = frame.height - frame.bottom
    parts = []
    for tick in _log_ticks(top, x_of):
        style = "base" if tick == 1 else "grid"
        parts.append(
            f'<line class="{style}" x1="{x_of(tick):.1f}" x2="{x_of(tick):.1f}" y1="{frame.top}" y2="{base}"/>'
        )
        parts.append(_text(x_of(tick), base + 16, f"{tick:g}", "tick", "middle"))
    parts.append(_text(frame.left, frame.height - 3, base_label, "tick", "start"))
    for number, row in enumerate(rows):
        parts += _bar(row, frame, frame.top + (number + 0.5) * step, min(22.0, step * 0.6), x_of)
    return _svg(frame, parts)


def ticks(top: float) -> list[float]:
    """Return round values from 0 up to at most `top`, about five."""
    if top <= 0:
        return [0.0]
    rough = top / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [round(number * step, 10) for number in range(int(top / step * 1.000001) + 1)]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most POINTS_MAX of the points, the first and the last among them."""
    if len(points) <= POINTS_MAX:
        return list(points)
    last = len(points) - 1
    return [points[round(number * last / (POINTS_MAX - 1))] for number in range(POINTS_MAX)]


def _grid(frame: Frame, rows: Iterable[tuple[float, str]]) -> Iterable[str]:
    for y, label in rows:
        yield f'<line class="grid" x1="{frame.left}" x2="{frame.width - frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield _text(frame.left - 6, y + 4, label, "tick", "end")


def _end_labels(
    curves: Sequence[Line], frame: Frame, x_of: Callable[[float], float], y_of: Callable[[float], float]
) -> list[str]:
    """Return a dot at the end of each curve and, beside the plot, its label at that height or near it."""
    parts = []
    ordered = sorted(curves, key=lambda curve: curve.points[-1][1])
    free_y = math.inf
    for curve in ordered:
        x, y = curve.points[-1]
        free_y = min(free_y - _LABEL_APART, y_of(y))
        parts.append(f'<circle class="dot {curve.colour}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3.5"/>')
        parts.append(_text(frame.width - frame.right + 8, free_y + 4, curve.label, f"end {curve.colour}", "start"))
    return parts


def _bar(row: Bar, frame: Frame, middle: float, height: float, x_of: Callable[[float], float]) -> list[str]:
    hollow = " hollow" if row.hollow else ""
    width = max(1.5, x_of(row.median) - frame.left)
    parts = [
        _text(frame.left - 8, middle + 4, row.name, "name", "end"),
        f'<rect class="bar {row.colour}{hollow}" x="{frame.left}" y="{middle - height / 2:.1f}" '
        f'width="{width:.1f}" height="{height:.1f}" rx="2"/>',
    ]
    ends = [x_of(value) for value in row.values]
    if len(ends) > 1:
        parts.append(
            f'<line class="range" x1="{min(ends):.1f}" x2="{max(ends):.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/>'
        )
        parts += [f'<circle class="seed" cx="{x:.1f}" cy="{middle:.1f}" r="3"/>' for x in ends]
    parts.append(_text(max([frame.left + width, *ends]) + 9, middle + 4, row.label, "note", "start"))
    return parts


def _log_ticks(top: float, x_of: Callable[[float], float]) -> list[float]:
    shown: list[float] = []
    for tick in _LOG_TICKS:
        if tick <= top and (not shown or x_of(tick) - x_of(shown[-1]) >= _LOG_TICKS_APART):
            shown.append(tick)
    return shown


def _text(x: float, y: float, content: str, style: str, anchor: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def _svg(frame: Frame, parts: Iterable[str]) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {frame.width:g} {frame.height:g}" role="img">{body}</svg>'
