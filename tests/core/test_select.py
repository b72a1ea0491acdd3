# SPDX-License-Identifier: Apache-2.0
"""Windowed rarest-first."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.chunkmap import chunk_set, members
from p2pdist.core.select import rarest, window_set


@pytest.mark.parametrize(
    ("heads", "count", "expected"),
    [
        ([], 100, []),
        ([0], 10, [0, 1, 2, 3]),
        ([8], 10, [8, 9]),
        ([10], 10, []),
        ([0, 2], 10, [0, 1, 2, 3, 4, 5]),
        ([100], 320, list(range(100, 120))),
        ([0], 1, [0]),
        ([0], 0, []),
    ],
)
def test_each_head_has_a_window_of_a_sixteenth_but_at_least_four(
    heads: list[int], count: int, expected: list[int]
) -> None:
    assert list(members(window_set(heads, count))) == expected


@given(st.sets(st.integers(0, 60), min_size=1), st.lists(st.integers(0, 5), min_size=61, max_size=61), st.integers())
def test_the_pick_is_a_candidate_that_none_is_rarer_than(candidates: set[int], holders: list[int], seed: int) -> None:
    picked = rarest(chunk_set(candidates), holders, Random(seed))
    assert picked in candidates
    assert holders[picked] == min(holders[index] for index in candidates)


def test_among_equally_rare_chunks_each_is_equally_likely() -> None:
    rng, draws = Random(1), 8000
    counts = Counter(rarest(0b11111, [1, 1, 2, 1, 1], rng) for _ in range(draws))
    assert set(counts) == {0, 1, 3, 4}
    # Four standard deviations of a quarter of 8,000.
    assert all(abs(count - draws / 4) < 4 * (draws * 0.25 * 0.75) ** 0.5 for count in counts.values())
