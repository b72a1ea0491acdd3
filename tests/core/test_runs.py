# SPDX-License-Identifier: Apache-2.0
"""How long runs are, and what is in them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.chunkmap import chunk_set, members
from p2pdist.core.runs import MAX_RUN_BYTES, RUN_S, Rate, run_from, runs_of

KIB = 1024
CHUNK = 256 * KIB


def measured(*taken_s: float) -> int:
    """The run's bytes after chunks that took so long."""
    rate = Rate()
    for each_s in taken_s:
        rate.measured(CHUNK, each_s)
    return rate.run_bytes


@pytest.mark.parametrize(
    ("taken_s", "chunks"),
    [([], 0), ([0.2] * 20, 0), ([RUN_S * 0.9] * 20, 1), ([0.01] * 20, 4), ([0.0001] * 20, 16), ([0.0] * 100, 16)],
)
def test_a_run_is_what_comes_in_a_moment(taken_s: list[float], chunks: int) -> None:
    assert measured(*taken_s) // CHUNK == chunks


def test_it_takes_some_chunks_to_believe_in_a_fast_link() -> None:
    assert measured(0.0) // CHUNK == 1
    assert measured(*[0.0] * 8) == MAX_RUN_BYTES


def test_one_chunk_that_came_at_once_changes_little_on_a_slow_link() -> None:
    assert measured(*[0.2] * 20, 0.0) < CHUNK


def test_a_link_that_became_slow_gets_single_chunks_after_a_few() -> None:
    assert measured(*[0.001] * 20, 0.2, 0.2) < CHUNK


@given(st.sets(st.integers(0, 60), min_size=1), st.integers(0, 8), st.data())
def test_a_run_is_unbroken_free_and_not_too_long(free: set[int], chunks: int, data: st.DataObject) -> None:
    first = data.draw(st.sampled_from(sorted(free)))
    run = run_from(first, chunk_set(free), chunks * CHUNK, CHUNK)
    assert run.start == first
    assert set(run) <= free
    assert 1 <= len(run) <= max(1, chunks)
    assert len(run) == max(1, chunks) or run.stop not in free


@given(st.sets(st.integers(0, 40)))
def test_runs_are_as_long_as_can_be_and_leave_nothing_out(indices: set[int]) -> None:
    runs = runs_of(members(chunk_set(indices)))
    assert [index for run in runs for index in run] == sorted(indices)
    assert all(one.stop < other.start for one, other in pairwise(runs))
