# SPDX-License-Identifier: Apache-2.0
"""Who fetches for a swarm without a scheduler."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.crew import CREW, HUBS, crew_of, foremost
from tests.strategies import peer

swarms = st.sets(st.integers(0, 1000).map(peer), min_size=1, max_size=60)


def test_all_of_a_small_swarm_fetch() -> None:
    swarm = frozenset(peer(number) for number in range(CREW))
    assert crew_of(swarm) == swarm


@given(swarms, swarms)
def test_whoever_knows_the_foremost_of_a_swarm_agrees_on_its_crew(swarm: set[str], known: set[str]) -> None:
    best = foremost(swarm, HUBS)  # type: ignore[arg-type]
    view = frozenset(best) | (swarm & known)
    assert crew_of(view) == crew_of(frozenset(swarm)) == frozenset(best[:CREW])  # type: ignore[arg-type]


def test_the_order_is_the_same_on_every_machine() -> None:
    assert foremost([peer(number) for number in range(10)], 3) == [peer(4), peer(5), peer(0)]
