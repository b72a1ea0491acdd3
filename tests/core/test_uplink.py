# SPDX-License-Identifier: Apache-2.0
"""What is sent where the way out is slow: no queue, and not much less than the uplink carries."""

from __future__ import annotations

import pytest

from p2pdist.core.uplink import FORGET_S, FRAMES_BYTES, LATE_S, LEAST_LINKS, LOOK_S, QUEUE_S, Sent, Uplink

SLOW = 250_000
LINKS = 12


class Road:
    """Connections that share a way out; senders always have more, and the kernel takes 500 kB of it."""

    def __init__(self, carries: int = SLOW, links: int = LINKS) -> None:
        self.uplink = Uplink()
        self.carries = carries
        self.links = links
        self.now = 100.0
        self.acked = 0
        self.queue = 0.0

    def pass_s(self, looks: int = 1, *, sends: bool = True, others_late_s: float | None = None) -> float:
        """Let so many looks pass; return the bytes a second that got through, of what the way out carries."""
        before = self.acked
        for _ in range(looks):
            self.now += LOOK_S
            most = self.carries + 500_000 - self.queue
            offered = min(most, self.uplink.bytes_per_s * LOOK_S if self.uplink.bytes_per_s else most)
            through = min(self.carries * LOOK_S, self.queue + offered if sends else 0)
            self.queue = self.queue + offered - through if sends else 0.0
            self.acked += int(through)
            late_s = self.queue / self.carries
            others = late_s if others_late_s is None else others_late_s
            seen = {0: Sent(self.acked, int(self.queue), late_s)}
            seen |= {link: Sent(int(self.now), 0, others) for link in range(1, self.links)}
            self.uplink.look(seen, self.now)
        return (self.acked - before) / looks / self.carries

    @property
    def queue_s(self) -> float:
        return self.queue / self.carries


def test_a_slow_way_out_gets_a_limit_that_leaves_no_queue_and_costs_little() -> None:
    road = Road()
    road.pass_s(10)
    waits = []
    for _ in range(120):
        road.pass_s()
        waits.append(road.queue_s)
    assert sorted(waits)[len(waits) // 2] <= QUEUE_S
    assert max(waits) <= LATE_S
    assert road.pass_s(120) >= 0.85


@pytest.mark.parametrize("carries", [3_000_000, 100_000_000])
def test_where_nothing_waits_for_long_there_is_no_limit(carries: int) -> None:
    road = Road(carries)
    road.pass_s(60)
    assert road.uplink.bytes_per_s == 0


def test_a_receiver_that_is_slow_is_not_our_way_out() -> None:
    road = Road()
    road.pass_s(60, others_late_s=0.1)
    assert road.uplink.bytes_per_s == 0


def test_of_fewer_connections_than_it_takes_it_is_not_clear_whose_queue_it_is() -> None:
    road = Road(links=LEAST_LINKS - 1)
    road.pass_s(60)
    assert road.uplink.bytes_per_s == 0


def test_a_way_out_that_becomes_faster_is_used() -> None:
    road = Road()
    road.pass_s(30)
    road.carries = 20 * SLOW
    road.pass_s(60)
    assert road.pass_s(10) >= 0.8


def test_a_way_out_that_becomes_slower_still_is_respected() -> None:
    road = Road()
    road.pass_s(30)
    road.carries = SLOW // 4
    road.pass_s(30)
    assert road.uplink.bytes_per_s <= 1.1 * road.carries
    assert road.queue <= 2 * FRAMES_BYTES


def test_what_is_not_used_neither_grows_nor_shrinks() -> None:
    road = Road()
    road.pass_s(20)
    limit = road.uplink.bytes_per_s
    road.pass_s(20, sends=False)
    assert 0.5 * limit <= road.uplink.bytes_per_s <= 1.3 * limit


def test_a_limit_is_forgotten_when_nothing_was_sent_for_long() -> None:
    road = Road()
    road.pass_s(20)
    assert road.uplink.bytes_per_s
    road.now += FORGET_S
    road.queue = 0.0
    road.pass_s()
    assert road.uplink.bytes_per_s == 0


def test_a_few_frames_on_their_way_are_no_queue() -> None:
    road = Road()
    road.pass_s(20)
    before = road.uplink.bytes_per_s
    road.now += LOOK_S
    seen = {link: Sent(road.acked + before, FRAMES_BYTES // LINKS, 2.0) for link in range(LINKS)}
    road.uplink.look(seen, road.now)
    assert road.uplink.bytes_per_s >= 0.9 * before
