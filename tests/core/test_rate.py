# SPDX-License-Identifier: Apache-2.0
"""Rate limits: never more than the rate and the burst, in any span of time, and no less than the rate when busy."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.chunkmap import MAX_CHUNK_BYTES
from p2pdist.core.rate import BURST_S, CHUNK_S, MIN_BYTES_PER_S, TokenBucket, slots_within

BURST = 1000
rates = st.integers(1, 10**10)
demands = st.lists(st.tuples(st.floats(0, 100), st.integers(0, BURST)), max_size=40)
"""(pause before it, amount)"""


def spent(bucket: TokenBucket, asked: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Return (when it may be used, amount) for each demand."""
    times = accumulate(pause for pause, _ in asked)
    return [(bucket.reserve(amount, now), amount) for now, (_, amount) in zip(times, asked, strict=True)]


@given(rates, demands)
def test_no_span_of_time_sees_more_than_the_rate_and_the_burst(rate: int, asked: list[tuple[float, int]]) -> None:
    uses = spent(TokenBucket(rate, BURST), asked)
    for first, (start, _) in enumerate(uses):
        total = 0
        for at, amount in uses[first:]:
            total += amount
            allowed = rate * (at - start) + BURST
            assert total <= allowed * (1 + 1e-6) + 1e-3 + rate * 1e-12 * max(1.0, at)


@given(rates, demands)
def test_who_asks_later_is_served_later(rate: int, asked: list[tuple[float, int]]) -> None:
    times = [at for at, _ in spent(TokenBucket(rate, BURST), asked)]
    assert times == sorted(times)


@given(st.integers(1, 10**6), st.lists(st.integers(1, BURST), min_size=1, max_size=50))
def test_without_pauses_it_gives_what_the_rate_allows(rate: int, amounts: list[int]) -> None:
    bucket = TokenBucket(rate, BURST)
    last = max(bucket.reserve(amount, 0.0) for amount in amounts)
    assert last == pytest.approx(max(0.0, (sum(amounts) - BURST) / rate))


@given(rates, demands, st.floats(0, 1000))
def test_what_is_available_can_be_had_at_once(rate: int, asked: list[tuple[float, int]], later: float) -> None:
    bucket = TokenBucket(rate, BURST)
    spent(bucket, asked)
    now = sum(pause for pause, _ in asked) + later
    amount = bucket.available(now)
    assert 0 <= amount <= BURST
    if amount:
        assert bucket.reserve(amount, now) <= now + 1e-6


def test_what_has_not_been_used_is_saved_up_to_the_burst_and_no_further() -> None:
    bucket = TokenBucket(100, 50)
    assert bucket.available(1e9) == 50
    assert bucket.reserve(50, 10.0) == 10.0
    assert bucket.available(10.0) == 0
    assert bucket.available(10.25) == 25
    assert bucket.available(99.0) == 50


@pytest.mark.parametrize(
    ("rate", "largest", "burst"),
    [(1_000_000, 65536, 100_000), (100_000, 65536, 65536), (10**9, 65536, int(BURST_S * 10**9))],
)
def test_a_smooth_bucket_has_the_least_burst_that_its_amounts_allow(rate: int, largest: int, burst: int) -> None:
    assert TokenBucket.smooth(rate, largest).available(0.0) == pytest.approx(burst, abs=1)


@given(st.integers(MIN_BYTES_PER_S, 10**10), st.integers(1, 256))
def test_chunks_that_share_a_limit_are_done_in_time(rate: int, most: int) -> None:
    slots = slots_within(rate, most)
    assert 1 <= slots <= most
    assert slots * MAX_CHUNK_BYTES / rate <= CHUNK_S


@pytest.mark.parametrize("factor", [0.1, 1.0, 5.0])
def test_at_another_rate_as_many_bytes_are_waited_for(factor: float) -> None:
    bucket = TokenBucket(1000, 100)
    bucket.reserve(100, 0.0)
    assert bucket.reserve(300, 0.0) == pytest.approx(0.3)
    bucket.change(int(1000 * factor), 0.0)
    assert bucket.reserve(100, 0.0) == pytest.approx(0.4 / factor)
    assert bucket.available(100.0) == 100
