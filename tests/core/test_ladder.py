# SPDX-License-Identifier: Apache-2.0
"""The last rung: what is reported missing, and what is fetched without a lease."""

from __future__ import annotations

import pytest

from p2pdist.core import events as ev
from p2pdist.core.ladder import (
    DOUBT_S,
    LARGE,
    LONELY_S,
    MAX_SPREADING_S,
    MAX_TURNS,
    MISSING_AT_ONCE,
    MISSING_S,
    ORPHAN_S,
    SPREADING_CHUNKS,
    STALL_S,
    TURN_S,
)
from p2pdist.core.lease import rank_of
from p2pdist.core.packing import pack_indices
from p2pdist.core.wire import Grant, Lease, Missing
from tests.script import CHUNK, ME, B, Script, checksums, done, fetch, fetches, have, share, told
from tests.strategies import digest, peer

FIRST = 5
"""A chunk of B that rendezvous gives to the agent under test, in a swarm of it and peer 2."""


def pulling(holding: list[int], *, seed: int = 0, chunks: int = 4) -> Script:
    """An agent that pulls B with a scheduler and a peer that has some of it."""
    script = Script(scheduled=True, seed=seed)
    script.connect(2)
    script.start(chunks)
    script.says(2, share(holding, size=chunks * CHUNK))
    return script


def fetched_at(script: Script, until: float = 20.0) -> tuple[float, list[int]]:
    """Tick until something is fetched, and return when and what."""
    while script.now < until:
        fetching = fetches(script.tick(script.now + 0.1))
        if fetching:
            return script.now, fetching
    raise AssertionError("nothing was fetched")


def test_chunks_that_no_neighbour_has_are_reported_missing_now_and_then() -> None:
    script = pulling([0, 3])
    assert told(script.tick(MISSING_S), Missing) == []
    expected = Missing(B, pack_indices([1, 2]))
    assert told(script.tick(MISSING_S + 0.1), Missing) == [expected]
    assert told(script.tick(MISSING_S + 0.2), Missing) == []
    assert told(script.tick(2 * MISSING_S + 0.2), Missing) == [expected]


def test_a_report_of_missing_chunks_has_a_bound() -> None:
    script = Script(scheduled=True)
    script.start(512)
    (report,) = told(script.tick(MISSING_S + 0.1), Missing)
    assert report == Missing(B, pack_indices(range(MISSING_AT_ONCE)))


def test_a_chunk_new_to_the_swarm_is_progress_and_one_seen_before_is_not() -> None:
    script = pulling([])
    script.connect(3)
    script.says(3, share([]))
    script.now = 2.0
    script.says(2, have(0))
    assert told(script.tick(2.1), Missing) == []
    script.now = 4.0
    script.says(3, have(0))
    script.says(2, have(0), share([0]))
    assert told(script.tick(4.1), Missing) == [Missing(B, pack_indices([1, 2, 3]))]


@pytest.mark.parametrize(("holding", "first"), [([], [0, 1, 2, 3]), ([0, 1, 2, 3], [4, 5, 0, 1])])
def test_an_agent_that_nobody_helps_goes_on_alone(holding: list[int], first: list[int]) -> None:
    times = set()
    for seed in range(20):
        script = pulling(holding, seed=seed, chunks=6)
        at, fetching = fetched_at(script)
        times.add(at)
        assert STALL_S < at <= 2 * STALL_S + 0.1
        assert fetching == first
        # Reported although it was not leased; and then the next.
        assert done(first[0], size=6 * CHUNK) in script.arrives(None, first[0])
        assert len(fetches(script.tick(at + 0.1))) == 1
    # Not all in the same moment.
    assert len(times) > 5


def test_an_agent_without_peers_waits_less() -> None:
    script = Script(scheduled=True)
    script.start()
    at, fetching = fetched_at(script)
    assert LONELY_S < at <= 2 * LONELY_S + 0.1
    assert fetching == [0, 1, 2, 3]


def test_help_puts_off_going_alone() -> None:
    script = pulling([0])
    script.now = 5.0
    script.says(2, Grant(1))
    script.arrives(2, 0, grant=1)
    assert fetched_at(script)[0] > 5.0 + STALL_S


def test_who_has_a_lease_is_not_alone_however_long_it_takes() -> None:
    script = pulling([])
    script.ordered(Lease(B, 0, 15000))
    with pytest.raises(AssertionError, match="nothing was fetched"):
        fetched_at(script)
    script.arrives(None, 0)
    assert fetched_at(script, 40.0)[0] > 20.0 + STALL_S


def test_a_cancelled_pulls_lease_does_not_count_any_more() -> None:
    script = pulling([])
    script.ordered(Lease(B, 0, 15000))
    script.start(blob=digest(2))
    script.on(ev.PullCancelled(blob=B))
    assert fetched_at(script)[0] > STALL_S


def test_after_an_error_no_chunk_is_fetched_before_the_pause_is_over() -> None:
    script = pulling([0])
    script.ordered(Lease(B, 1, 15000))
    script.fails(1, pause_s=15.0)
    assert fetched_at(script)[0] >= 15.0


def test_what_is_refused_for_good_is_never_fetched_again() -> None:
    script = pulling([0, 1, 2, 3])
    script.ordered(Lease(B, 0, 15000))
    script.fails(0, final=True)
    with pytest.raises(AssertionError, match="nothing was fetched"):
        fetched_at(script)


def test_a_chunk_that_was_fetched_but_reaches_no_neighbour_is_reported_and_then_fetched() -> None:
    script = pulling([0], chunks=6)
    script.now = 1.0
    script.ordered(checksums(0, FIRST, size=6 * CHUNK))
    script.tick(1.0)
    # Without the word of the scheduler it would be two seconds after the last help.
    script.now = script.machine.state.helped_at = 2.0
    reported = [now / 10 for now in range(20, 50) if told(script.tick(now / 10), Missing)]
    assert reported[0] == pytest.approx(1.0 + MISSING_S + 0.1)
    assert fetches(script.tick(1.0 + ORPHAN_S)) == []
    assert script.tick(1.0 + ORPHAN_S + 0.1)[-1] == fetch(FIRST)


@pytest.mark.parametrize(
    ("chunk_s", "wait_s"), [(0.1, ORPHAN_S), (0.5, SPREADING_CHUNKS * 0.5), (9.0, MAX_SPREADING_S)]
)
def test_while_other_chunks_come_an_orphan_is_waited_for_as_long_as_some_of_these_take(
    chunk_s: float, wait_s: float
) -> None:
    script = pulling([0], chunks=6)
    script.ordered(checksums(FIRST, size=6 * CHUNK))
    script.tick(1.0)
    state = script.machine.state
    state.chunk_s, reported = chunk_s, []
    while script.now < 2 * MAX_SPREADING_S:
        state.helped_at = script.now
        out = script.tick(script.now + 0.1)
        reported += [script.now] * len(told(out, Missing))
        if fetches(out):
            break
    assert fetches(out) == [FIRST]
    assert script.now == pytest.approx(1.0 + wait_s, abs=0.2)
    assert reported[0] == pytest.approx(1.0 + wait_s - ORPHAN_S + MISSING_S, abs=0.2)


def test_in_a_small_swarm_the_members_take_turns_in_fetching_an_orphan() -> None:
    def waits(index: int) -> float:
        script = Script(scheduled=True)
        others = range(2, 7)
        script.connect(*others)
        script.start(20)
        for other in others:
            script.says(other, share([], size=20 * CHUNK))
        script.ordered(checksums(index, size=20 * CHUNK))
        script.tick(1.0)
        script.now = script.machine.state.helped_at = 8.0
        return fetched_at(script)[0] - 1.0

    swarm = [peer(number) for number in range(1, 7)]
    for index in range(20):
        turn_s = min(rank_of(ME, B, index, swarm), MAX_TURNS) * TURN_S
        assert waits(index) == pytest.approx(max(7.1, ORPHAN_S + turn_s), abs=0.2)


def test_in_a_large_swarm_only_few_lose_patience_first() -> None:
    def waits(seed: int) -> float:
        script = pulling([0], seed=seed)
        script.connect(*range(3, LARGE + 2))
        script.ordered(checksums(2))
        script.tick(1.0)
        script.now = script.machine.state.helped_at = 3.0
        return fetched_at(script)[0] - 1.0

    waited = [waits(seed) for seed in range(60)]
    assert all(ORPHAN_S < each <= 2 * ORPHAN_S + 0.2 for each in waited)
    assert sum(each < 1.5 * ORPHAN_S for each in waited) <= 12


def test_an_orphan_that_came_after_the_scheduler_was_lost_is_not_fetched_again() -> None:
    script = pulling([0], chunks=6)
    script.ordered(checksums(FIRST, size=6 * CHUNK))
    script.tick(1.0)
    script.on(ev.SchedulerLost())
    script.says(2, have(FIRST), Grant(1))
    script.arrives(2, FIRST, grant=1)
    while script.now < 2 * ORPHAN_S:
        assert FIRST not in fetches(script.tick(script.now + 0.1))


def test_a_chunk_that_shows_up_at_a_neighbour_is_no_orphan_any_more() -> None:
    script = pulling([0])
    script.ordered(checksums(2))
    script.tick(1.0)
    script.says(2, have(2))
    script.tick(2.0)
    assert fetches(script.tick(5.5)) == []
    script.on(ev.PeerLost(peer=peer(2)))
    script.tick(5.6)
    assert not script.machine.blobs[B].orphans or min(script.machine.blobs[B].orphans.values()) == 5.6


def test_chunks_that_only_their_sender_vouches_for_are_reported_until_somebody_else_does() -> None:
    script = pulling([])
    script.says(2, have(0, 1))
    script.ordered(checksums(3))
    for number, index in ((1, 0), (2, 1)):
        script.says(2, Grant(number))
        script.arrives(2, index, grant=number)
    doubts = [told(script.tick(tick / 10), Missing) for tick in range(1, 46)]
    assert [Missing(B, pack_indices([0, 1]))] in doubts[: int(20 * DOUBT_S) + 2]
    script.ordered(checksums(0))
    assert told(script.tick(4.5 + DOUBT_S), Missing)[0].indices.startswith(pack_indices([1]))


def test_nothing_is_doubted_before_anybody_has_fetched_anything() -> None:
    script = pulling([])
    script.says(2, have(0))
    script.says(2, Grant(1))
    script.arrives(2, 0, grant=1)
    told_of = [message for tick in range(1, 60) for message in told(script.tick(tick / 10), Missing)]
    assert all(not message.indices.startswith(pack_indices([0])) for message in told_of)
