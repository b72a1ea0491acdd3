# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.arrivals import Arrivals, Start


def test_without_jitter_all_start_at_once_and_none_is_late() -> None:
    assert Arrivals().batches(3, Random(1)) == [[Start(0, 0.0), Start(1, 0.0), Start(2, 0.0)]]


@given(st.integers(1, 60), st.floats(0.01, 1), st.floats(0, 10), st.integers())
def test_every_node_starts_once_within_its_batch_and_its_jitter(
    nodes: int, batch_ratio: float, jitter_s: float, seed: int
) -> None:
    batches = Arrivals(batch_ratio=batch_ratio, jitter_s=jitter_s).batches(nodes, Random(seed))
    assert [start.node for batch in batches for start in batch] == list(range(nodes))
    assert max(len(batch) for batch in batches) == min(nodes, max(1, math.ceil(nodes * batch_ratio)))
    assert all(0 <= start.offset_s <= jitter_s for batch in batches for start in batch)
    assert [start.late for batch in batches for start in batch] == [
        number > 0 for number, batch in enumerate(batches) for _ in batch
    ]


def test_nodes_that_join_one_by_one_come_in_order_and_all_but_the_first_are_late() -> None:
    (starts,) = Arrivals(poisson_gap_s=2.0).batches(50, Random(1))
    offsets = [start.offset_s for start in starts]
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    assert [start.late for start in starts] == [False] + [True] * 49


def test_gaps_of_a_poisson_process_have_the_mean_that_was_asked_for() -> None:
    (starts,) = Arrivals(poisson_gap_s=2.0).batches(4001, Random(1))
    assert starts[-1].offset_s / 4000 == pytest.approx(2.0, rel=0.05)


def test_the_same_seed_gives_the_same_starts() -> None:
    arrivals = Arrivals(jitter_s=1.0)
    assert arrivals.batches(5, Random(7)) == arrivals.batches(5, Random(7)) != arrivals.batches(5, Random(8))


@pytest.mark.parametrize(
    ("arrivals", "bound_s"),
    [(Arrivals(jitter_s=1.0), 50.0), (Arrivals(batch_ratio=0.2), 50.0 + 4 * 10.0)],
    ids=["at once", "batches"],
)
def test_only_the_first_batch_waits_for_the_origin(arrivals: Arrivals, bound_s: float) -> None:
    assert arrivals.bound_s(arrivals.batches(10, Random(1)), 50.0, 10.0) == bound_s


@pytest.mark.parametrize(("first_s", "bound_s"), [(50.0, 50.0), (10.0, 22.0)], ids=["slow origin", "late joiner"])
def test_whoever_joins_last_or_the_origin_bounds_a_rollout_of_joiners(first_s: float, bound_s: float) -> None:
    starts = [[Start(0, 0.0), Start(1, 12.0, late=True)]]
    assert Arrivals(poisson_gap_s=5.0).bound_s(starts, first_s, 10.0) == bound_s
