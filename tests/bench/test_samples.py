# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from bench.lab.pullers import Pull
from bench.samples import EVERY_S, Series, sample


async def test_readings_come_in_time_and_once_more_at_the_end(autojump_clock: MockClock) -> None:
    series, pulls, sent = Series(), [Pull("node1"), Pull("node2")], iter(range(100, 200))
    with trio.move_on_after(2.5 * EVERY_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sample, series, pulls, lambda: next(sent), trio.current_time())
            await trio.sleep(1.5 * EVERY_S)
            pulls[1].done_bytes = 7
    assert series.times_s == pytest.approx([0, EVERY_S, 2 * EVERY_S, 2.5 * EVERY_S])
    assert series.node(1) == [0, 0, 7, 7]
    assert series.node(0) == [0, 0, 0, 0]
    assert series.origin_bytes == [1, 2, 3, 4], "what was sent before counts"
