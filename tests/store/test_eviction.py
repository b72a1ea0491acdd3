# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.types import Digest
from p2pdist.store.eviction import Limits, oldest, plan_eviction

LIMITS = Limits(max_bytes=100, low_bytes=60, min_free_bytes=10)
PLENTY = 1 << 40


@dataclass(frozen=True)
class Idle:
    digest: Digest
    size_bytes: int
    last_used_s: float


def idle(*sizes: int) -> list[Idle]:
    """Blobs named a, b, c ... of these sizes, a the least recently used; handed over newest first."""
    return [Idle(Digest(chr(97 + at)), size, float(at)) for at, size in enumerate(sizes)][::-1]


@pytest.mark.parametrize(
    ("sizes", "used", "incoming", "free", "expected"),
    [
        pytest.param([40, 40], 80, 20, PLENTY, "", id="exactly the high watermark is no crossing"),
        pytest.param([20, 20, 20, 20], 80, 21, PLENTY, "abc", id="crossing it goes down to the low one"),
        pytest.param([20, 20, 20, 20], 80, 70, PLENTY, "abcd", id="the low one cannot be reached: all go"),
        pytest.param([20, 20], 80, 61, PLENTY, None, id="what is open leaves no room: nothing goes"),
        pytest.param([50], 50, 101, PLENTY, None, id="larger than the store: nothing goes"),
        pytest.param([20, 20, 20], 60, 15, 25, "", id="the disk has just enough free"),
        pytest.param([20, 20, 20], 60, 15, 24, "a", id="the disk has too little free: only so much goes"),
        pytest.param([20, 20, 20], 60, 15, 4, "ab", id="the disk lacks more than one blob"),
        pytest.param([], 0, 15, 24, None, id="others fill the disk"),
        pytest.param([5, 5, 40], 90, 20, 0, "abc", id="both limits: the stricter counts"),
        pytest.param([0, 0, 50], 100, 10, PLENTY, "c", id="empty blobs make no room and stay"),
        pytest.param([50], 100, 0, PLENTY, "", id="nothing comes in: nothing goes"),
    ],
)
def test_the_plan(sizes: list[int], used: int, incoming: int, free: int, expected: str | None) -> None:
    plan = plan_eviction(idle(*sizes), LIMITS, used_bytes=used, incoming_bytes=incoming, free_bytes=free)
    assert (plan if plan is None else "".join(victim.digest for victim in plan)) == expected


blobs = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=12).map(
    lambda drawn: [Idle(Digest(f"{at:02}"), size, float(used)) for at, (size, used) in enumerate(drawn)]
)


@given(blobs, st.integers(0, 60), st.integers(0, 200), st.integers(0, 200))
def test_a_plan_makes_room_with_the_oldest_and_with_no_more_than_it_takes(
    blobs: list[Idle], open_bytes: int, incoming: int, free: int
) -> None:
    used = open_bytes + sum(blob.size_bytes for blob in blobs)
    plan = plan_eviction(blobs, LIMITS, used_bytes=used, incoming_bytes=incoming, free_bytes=free)

    def fits(gone_bytes: int, max_bytes: int) -> bool:
        return used - gone_bytes + incoming <= max_bytes and free + gone_bytes - incoming >= LIMITS.min_free_bytes

    if plan is None:
        assert not fits(used - open_bytes, LIMITS.max_bytes)
        return
    assert fits(sum(blob.size_bytes for blob in plan), LIMITS.max_bytes)
    by_age = sorted((blob for blob in blobs if blob.size_bytes), key=lambda blob: (blob.last_used_s, blob.digest))
    assert plan == by_age[: len(plan)]
    if plan:
        assert not fits(sum(blob.size_bytes for blob in plan[:-1]), LIMITS.low_bytes)


def test_the_order_does_not_depend_on_the_order_given() -> None:
    assert oldest(idle(10, 10, 10), 15) == oldest(idle(10, 10, 10)[::-1], 15) == idle(10, 10)[::-1]


@pytest.mark.parametrize("limits", [(10, 11, 0), (10, -1, 0), (10, 5, -1)])
def test_limits_that_contradict_each_other_are_our_bug(limits: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="no such limits"):
        Limits(*limits)
