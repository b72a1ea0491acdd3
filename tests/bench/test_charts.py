# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.charts import POINTS_MAX, Bar, Frame, Line, Mark, bars, lines, thinned, ticks

FRAME = Frame(width=500, height=200)


def drawn(points: list[tuple[float, float]], **changes: float) -> str:
    limits = {"x_max": 10.0, "y_max": 1.0} | changes
    return lines([Line(points, "direct", "a <b>")], FRAME, x_label="s", y_tick=str, mark=Mark(5, "half"), **limits)


def polyline(svg: str) -> list[tuple[float, float]]:
    (points,) = re.findall(r'points="([^"]*)"', svg)
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in points.split())]


def test_a_curve_fills_the_room_between_the_axes() -> None:
    left, right = FRAME.left, FRAME.width - FRAME.right
    bottom, top = FRAME.height - FRAME.bottom, FRAME.top
    assert polyline(drawn([(0, 0), (10, 1)])) == [(left, bottom), (right, top)]


def test_what_lies_beyond_the_axes_stays_on_the_chart() -> None:
    assert polyline(drawn([(20, 5)])) == [(FRAME.width - FRAME.right, FRAME.top)]


def test_text_is_escaped_and_the_markup_is_well_formed() -> None:
    root = ElementTree.fromstring(drawn([(0, 0), (10, 1)]))
    assert "a <b>" in [element.text for element in root]


@pytest.mark.parametrize("points", [[], [(0.0, 0.0)]], ids=["no points", "one point"])
def test_there_is_a_chart_of_next_to_nothing(points: list[tuple[float, float]]) -> None:
    ElementTree.fromstring(drawn(points, x_max=0.0, y_max=0.0))
    ElementTree.fromstring(bars([], FRAME, base_label=""))


def test_the_longer_bar_is_the_larger_ratio_and_a_ratio_below_one_is_no_bar() -> None:
    rows = [Bar(name, value, [value], "direct", "") for name, value in (("a", 1.1), ("b", 1.6), ("c", 0.99))]
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', bars(rows, FRAME, base_label=""))]
    assert widths[1] > widths[0] > widths[2] > 0


def test_every_run_of_several_is_a_dot_and_a_single_one_is_not() -> None:
    def dots(values: list[float]) -> int:
        return bars([Bar("a", 1.1, values, "direct", "")], FRAME, base_label="").count("<circle")

    assert dots([1.05, 1.1, 1.2]) == 3
    assert dots([1.1]) == 0


def test_bars_that_do_not_count_are_hollow() -> None:
    assert "hollow" in bars([Bar("a", 1.1, [1.1], "direct", "void", hollow=True)], FRAME, base_label="")


@given(st.floats(1e-3, 1e6))
def test_ticks_are_few_rise_from_zero_and_stay_below_the_top(top: float) -> None:
    seen = ticks(top)
    assert seen[0] == 0
    assert seen == sorted(set(seen))
    assert 3 <= len(seen) <= 7
    assert seen[-1] <= top * 1.001


@given(st.integers(0, 3000))
def test_a_thinned_curve_keeps_its_ends(count: int) -> None:
    points = [(float(number), 0.0) for number in range(count)]
    kept = thinned(points)
    assert len(kept) == min(count, POINTS_MAX)
    assert kept[:1] == points[:1]
    assert kept[-1:] == points[-1:]
