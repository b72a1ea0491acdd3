# SPDX-License-Identifier: Apache-2.0
"""How many leases a registry gets, by what it delivers: modelled registries in a closed loop."""

from __future__ import annotations

import heapq
from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.pace import (
    COUNTED_BYTES,
    LEASES_MAX,
    LEASES_MIN,
    MAX_REST_S,
    MEMBER_LEASES,
    Begun,
    Pace,
    worthwhile,
)

if TYPE_CHECKING:
    from collections.abc import Callable

MBIT = 125_000
CHUNK = COUNTED_BYTES


class Origin:
    """A registry that always has more to lease: `took_s(n)` is what a lease takes when n are out, give or take."""

    def __init__(self, took_s: Callable[[int], float], *, noise: float = 0.0, seed: int = 0, members: int = 50) -> None:
        self.pace = Pace()
        self.now = 0.0
        self.took_s = took_s
        self.lost = 0.0
        self.members = members
        self.seen: list[tuple[float, int]] = []
        self._noise = noise
        self._rng = Random(seed)
        self._out: list[tuple[float, Begun]] = []

    def run(self, until: float) -> int:
        """Return the number of leases at `until`, having kept as many out as the pace says."""
        while self.now < until:
            while len(self._out) < self.pace.leases:
                heapq.heappush(self._out, (self.now + self._took_s(), self.pace.began(self.now)))
            self.now, begun = self._out[0]
            if self._rng.random() >= self.lost:
                self.pace.done(begun, CHUNK, self.now, out=len(self._out), members=self.members)
            heapq.heappop(self._out)
            self.seen.append((self.now, self.pace.leases))
        return self.pace.leases

    def _took_s(self) -> float:
        return self.took_s(max(len(self._out) + 1, self.pace.leases)) * self._rng.uniform(
            1 - self._noise, 1 + self._noise
        )

    def part_at(self, low: int, high: int, since: float) -> float:
        """Return the part of the chunks since then that came while so many leases were allowed."""
        counts = [low <= leases <= high for at, leases in self.seen if at >= since]
        return sum(counts) / len(counts)


def limited(link_mbit: float, each_mbit: float, *, extra_s: float = 0.01) -> Callable[[int], float]:
    """A link that connections share, each of which is limited too."""
    return lambda n: extra_s + CHUNK / MBIT / min(each_mbit, link_mbit / n)


# ------------------------------------------------------------ one measurement


@pytest.mark.parametrize(
    ("few", "many", "best"),
    [
        ((5, 1.0), (10, 1.0), 10),  # all that the leases beyond can bring
        ((5, 1.0), (10, 2.0), 5),  # nothing
        ((5, 1.0), (10, 2.5), 5),  # harm
        ((5, 1.0), (10, 1.7), 5),  # little: noise
        ((10, 1.0), (20, 1.6), 15),  # the link fills in between
        ((5, 1.0), (10, 0.5), 10),  # better than could be
        ((6, 1.0), (10, 1.0), 10),
        ((6, 1.0), (10, 10 / 6), 6),
        ((5, 1.0), (10, 0.0), 10),
    ],
)
def test_leases_grow_as_throughput_grew(few: tuple[int, float], many: tuple[int, float], best: int) -> None:
    assert worthwhile(few, many) == best


@given(st.integers(5, 63), st.integers(1, 59), st.floats(0, 100), st.floats(0, 100))
def test_what_is_worthwhile_is_between_the_two(low: int, more: int, low_s: float, high_s: float) -> None:
    assert low <= worthwhile((low, low_s), (low + more, high_s)) <= low + more


# ---------------------------------------------------------------- closed loop


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("noise", [0.0, 0.2, 0.4])
def test_where_the_link_is_the_limit_few_leases_stay_few(noise: float, seed: int) -> None:
    origin = Origin(limited(50, 1000), noise=noise, seed=seed)
    origin.run(60.0)
    assert origin.part_at(LEASES_MIN, LEASES_MIN + 2, since=0.0) > 0.8


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("noise", [0.0, 0.2, 0.4])
def test_where_each_connection_is_limited_leases_grow_within_three_seconds_until_the_link_is_full(
    noise: float, seed: int
) -> None:
    origin = Origin(limited(50, 5), noise=noise, seed=seed)
    assert origin.run(3.0) >= 8
    origin.run(60.0)
    assert origin.part_at(8, 20, since=3.0) > 0.9


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_registry_without_an_end_gets_the_most_and_no_more(noise: float) -> None:
    origin = Origin(lambda _: 0.4, noise=noise)
    assert origin.run(6.0) > LEASES_MAX // 2
    origin.run(60.0)
    assert max(leases for _, leases in origin.seen) == LEASES_MAX


@pytest.mark.parametrize(("members", "most"), [(0, LEASES_MIN), (1, MEMBER_LEASES), (3, 3 * MEMBER_LEASES)])
def test_few_members_bound_the_leases(members: int, most: int) -> None:
    origin = Origin(lambda _: 0.4, members=members)
    origin.run(30.0)
    assert max(leases for _, leases in origin.seen) == most


def test_what_changes_is_found_again() -> None:
    origin = Origin(limited(50, 5), noise=0.2)
    origin.run(10.0)
    origin.took_s = limited(50, 1000)
    assert origin.run(120.0) < 9
    origin.took_s = limited(50, 5)
    origin.run(120.0 + 2 * MAX_REST_S)
    assert origin.part_at(9, 20, since=120.0 + 1.5 * MAX_REST_S) > 0.7


def test_a_trial_whose_leases_fail_is_given_up() -> None:
    origin = Origin(limited(50, 5))
    while origin.pace.leases == LEASES_MIN:
        origin.run(origin.now + 0.01)
    origin.lost = 0.8
    origin.run(origin.now + 5.0)
    assert origin.pace.leases == LEASES_MIN


def test_stragglers_are_not_waited_for() -> None:
    rng, usual = Random(0), limited(50, 5)
    origin = Origin(lambda n: usual(n) * (10 if rng.random() < 0.05 else 1))
    assert origin.run(4.0) >= 9


def test_small_chunks_and_times_with_too_little_to_lease_do_not_count() -> None:
    pace = Pace()
    for number in range(200):
        pace.done(pace.began(number), COUNTED_BYTES - 1, number + 0.4, out=LEASES_MIN, members=9)
        pace.done(pace.began(number), COUNTED_BYTES, number + 0.4, out=LEASES_MIN - 1, members=9)
    assert pace.leases == LEASES_MIN


def test_a_registry_that_asks_for_a_pause_gets_half_and_is_not_tried_soon() -> None:
    origin = Origin(lambda _: 0.4)
    before = origin.run(5.0)
    origin.pace.refused(origin.now)
    assert origin.pace.leases == before // 2
    asked_at = origin.now
    origin.run(asked_at + MAX_REST_S - 1)
    assert origin.pace.leases == before // 2
    for _ in range(9):
        origin.pace.refused(origin.now)
    assert origin.pace.leases == LEASES_MIN


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(0, 1 << 22), st.integers(0, 70), st.integers(0, 99))))
def test_whatever_is_done_the_leases_stay_within_bounds(steps: list[tuple[float, int, int, int]]) -> None:
    pace, now = Pace(), 0.0
    begun = [pace.began(now)]
    for took_s, length, out, members in steps:
        now += took_s
        pace.done(begun[len(begun) // 2], length, now, out=out, members=members)
        begun.append(pace.began(now))
        assert LEASES_MIN <= pace.leases <= LEASES_MAX
