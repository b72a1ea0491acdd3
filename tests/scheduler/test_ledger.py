# SPDX-License-Identifier: Apache-2.0
"""Who is leased what, how much at a time, and what becomes of a lease that is not kept."""

from __future__ import annotations

import pytest

from p2pdist.core.lease import NEVER
from p2pdist.core.packing import pack_indices
from p2pdist.core.wire import (
    Done,
    Failed,
    Lease,
    Leave,
    Missing,
    Renew,
    Stored,
)
from scheduler import swarm as module
from scheduler.ledger import QUIET_S, RENEWED_S
from scheduler.pace import CROWD, CROWD_LEASES
from scheduler.pace import LEASES_MIN as LEASES
from scheduler.swarm import (
    FAILED_PAUSE_S,
    LEASE_S,
    MAX_PAUSE_S,
)
from tests.scheduler.scripts import B, Script, address, check, done, fast, joining, leases, runs
from tests.strategies import CHUNK, checksum, digest, peer


def test_chunks_are_leased_in_order_one_to_each_member_no_more_than_allowed() -> None:
    script, given_ = Script(*range(1, 9)), list[tuple[int, int]]()
    for number in range(1, 9):
        given_ += leases(script.says(number, joining()))
    # The first member, alone, gets them all.
    assert given_ == [(1, index) for index in range(LEASES)]
    for index in range(LEASES):
        given_ += leases(script.says(1, done(index)))
    assert [index for _, index in given_] == list(range(2 * LEASES))
    assert len({to for to, _ in given_[LEASES:]}) == LEASES
    assert all(to != 1 for to, _ in given_[LEASES:])


@pytest.mark.parametrize(("members", "most"), [(1, LEASES), (2, 3), (3, 2), (LEASES, 1), (9, 1)])
def test_a_member_has_no_more_leases_than_its_share(members: int, most: int) -> None:
    script = Script(*range(1, members + 1))
    script.state._registries.setdefault("r", module.Registry()).paused_until = 1.0
    for number in range(1, members + 1):
        script.says(number, joining())
    given_ = leases(script.tick(1.0))
    assert len(given_) == LEASES
    counts = [sum(to == number for to, _ in given_) for number in range(1, members + 1)]
    assert max(counts) <= most


def test_a_crowd_gets_some_leases_more() -> None:
    script = Script(*range(1, CROWD + 1))
    few = sum(len(leases(script.says(number, joining()))) for number in range(1, CROWD))
    assert (few, len(leases(script.says(CROWD, joining())))) == (LEASES, CROWD_LEASES)


def test_the_first_chunk_of_each_blob_comes_first_then_the_order_of_the_joins() -> None:
    script = Script(1)
    script.state._registries.setdefault("r", module.Registry()).paused_until = 1.0
    for number in (3, 1, 2):
        script.says(1, joining(chunks=3, blob=digest(number)))
    order = [(message.blob, message.index) for _, message in script.tick(1.0) if isinstance(message, Lease)]
    for _ in range(5):
        blob, index = order[len(order) - 4]
        out = script.says(1, done(index, chunks=3, blob=blob))
        order += [(message.blob, message.index) for _, message in out if isinstance(message, Lease)]
    expected = [(3, 0), (1, 0), (2, 0), (3, 1), (3, 2), (1, 1), (1, 2), (2, 1), (2, 2)]
    assert order == [(digest(blob), index) for blob, index in expected]


def test_a_swarm_that_lines_up_again_takes_its_old_place() -> None:
    script = Script(1, 2)
    for number in (1, 2):
        script.says(1, joining(chunks=4, blob=digest(number)))
    script.says(2, joining(chunks=4))
    for index in (1, 2, 3):
        script.says(1, done(index, chunks=4))
    # Chunk 0 is out, and three of the second blob; one comes back and precedes what is left of the second.
    script.says(1, Failed(B, 0, 0))
    assert script.state.swarms[B].leases[0][0] == peer(2)


def test_an_agent_that_fetches_fast_is_leased_runs_of_adjacent_chunks() -> None:
    script = Script(1)
    script.says(1, joining())
    assert runs(script.says(1, fast(0))) == [(LEASES, 16)]
    # The run counts as one of the registry's leases until all of it is done.
    assert runs(script.says(1, fast(LEASES))) == []
    assert runs(script.says(1, fast(1))) == [(LEASES + 16, 16)]
    assert [runs(script.says(1, fast(index))) for index in range(LEASES + 1, LEASES + 16)][-1] != []


def test_a_run_is_no_more_than_a_members_share_of_what_is_left() -> None:
    script = Script(1, 2, 3)
    for number in (1, 2, 3):
        script.says(number, joining(chunks=26))
        script.state.members[peer(number)].run_bytes = 16 * CHUNK
    holder = int(script.state.swarms[B].leases[0][0], 16)
    assert runs(script.says(holder, fast(0, chunks=26))) == [(LEASES, -(-(26 - LEASES) // 3))]


def test_what_of_a_run_fails_is_leased_again() -> None:
    script = Script(1)
    script.says(1, joining())
    script.says(1, fast(0))
    script.state.connected(address(2))
    script.says(2, joining())
    again = [entry for index in range(LEASES, LEASES + 16) for entry in script.says(1, Failed(B, index, 0))]
    assert {index for first, count in runs(again) for index in range(first, first + count)} == {LEASES}
    check(script.state)


def test_each_registry_has_its_own_leases() -> None:
    script = Script(1, 2)
    assert len(leases(script.says(1, joining()))) == LEASES
    assert len(leases(script.says(1, joining(blob=digest(2))))) == 0
    # One member alone does not get more than four in all.
    assert len(leases(script.says(2, joining(blob=digest(3), registry="other")))) == LEASES


def test_a_lease_that_is_done_frees_the_next() -> None:
    script = Script(1)
    script.says(1, joining())
    assert leases(script.says(1, done(2))) == [(1, LEASES)]
    assert script.state.leases_granted == LEASES + 1


def test_a_late_lease_lapses_and_goes_to_another() -> None:
    script = Script(1, 2)
    script.says(1, joining(chunks=1))
    script.says(2, joining(chunks=1))
    assert leases(script.tick(LEASE_S - 0.1)) == []
    assert leases(script.tick(LEASE_S)) == [(2, 0)]
    assert script.state.leases_lapsed == 1
    # Whoever comes too late is heard no more: the lease is another's now.
    script.says(1, Done(B, CHUNK, 0, checksum(9)))
    assert not script.state.swarms[B].done
    script.says(2, done(0, chunks=1))
    assert script.state.swarms[B].done == {0: checksum(0)}


def test_a_late_lease_of_the_only_member_comes_back_to_it_after_a_pause() -> None:
    script = Script(1)
    script.says(1, joining(chunks=1))
    assert leases(script.tick(LEASE_S)) == []
    assert leases(script.tick(LEASE_S + FAILED_PAUSE_S)) == [(1, 0)]


def test_what_members_doubt_or_miss_is_leased_before_all_else() -> None:
    script = Script(1, 2)
    script.says(1, joining(), Missing(B, pack_indices([70, 60, 200, 1])))
    assert leases(script.says(1, done(0))) == [(1, 60)]
    assert leases(script.says(1, done(1))) == [(1, 70)]
    assert leases(script.says(1, done(2))) == [(1, LEASES)]


def test_an_agent_that_has_brought_no_chunk_yet_gets_one_lease_and_then_its_share() -> None:
    script = Script(1, tried=False)
    assert leases(script.says(1, joining())) == [(1, 0)]
    assert leases(script.says(1, done(0))) == [(1, index) for index in range(1, LEASES + 1)]


def test_members_that_fell_silent_take_nobodys_place() -> None:
    script = Script(*range(1, 13))
    for number in range(1, 13):
        script.says(number, joining())
    silent = {to for swarm in script.state.swarms.values() for to, _ in swarm.leases.values()}
    assert leases(script.tick(QUIET_S - 0.1)) == []
    others = leases(script.tick(QUIET_S))
    assert len(others) == LEASES
    assert not {peer(to) for to, _ in others} & silent
    assert leases(script.tick(QUIET_S + 0.1)) == []


def test_a_lease_that_is_renewed_keeps_its_place() -> None:
    script = Script(*range(1, 13))
    out = [script.says(number, joining()) for number in range(1, 13)]
    for to, index in [lease for said in out for lease in leases(said)]:
        script.now = QUIET_S - 0.1
        script.says(to, Renew(B, index))
    assert leases(script.tick(QUIET_S)) == []


def test_who_lets_leases_lapse_waits_four_times_as_long_each_time_until_it_brings_a_chunk() -> None:
    script = Script(1)
    script.says(1, joining(chunks=2))
    for pause_s in (FAILED_PAUSE_S, 4 * FAILED_PAUSE_S, 16 * FAILED_PAUSE_S):
        assert leases(script.tick(script.now + LEASE_S)) == []
        lapsed = script.now
        assert leases(script.tick(lapsed + pause_s - 0.1)) == []
        assert leases(script.tick(lapsed + pause_s)) == [(1, 0), (1, 1)]
    script.says(1, done(0, chunks=2))
    assert leases(script.tick(script.now + LEASE_S)) == []
    assert leases(script.tick(script.now + FAILED_PAUSE_S)) == [(1, 1)]


def test_a_renewed_lease_goes_on() -> None:
    script = Script(1, 2)
    script.says(1, joining(chunks=1))
    script.says(2, joining(chunks=1))
    script.now = 10.0
    assert script.says(1, Renew(B, 0)) == []
    script.says(2, Renew(B, 0), Renew(B, 7), Renew(digest(9), 0))
    assert leases(script.tick(10.0 + LEASE_S - 0.1)) == []
    assert leases(script.tick(10.0 + LEASE_S)) == [(2, 0)]


@pytest.mark.parametrize("how", ["gone", "leave", "stored"])
def test_the_leases_of_a_member_that_leaves_go_to_others(how: str) -> None:
    script = Script(1, 2)
    script.says(1, joining(chunks=2))
    script.says(2, joining(chunks=2))
    if how == "gone":
        assert leases(script.gone(1)) == [(2, 0), (2, 1)]
    elif how == "leave":
        assert leases(script.says(1, Leave(B))) == [(2, 0), (2, 1)]
    else:
        # It has the whole blob, so nothing is left to lease.
        assert leases(script.says(1, Stored([B]))) == []


def test_a_member_that_leaves_takes_only_its_own_leases() -> None:
    script = Script(1, 2)
    script.says(1, joining(chunks=2))
    script.says(2, joining(chunks=2))
    assert script.says(2, Leave(B)) == []
    assert script.state.swarms[B].leases.keys() == {0, 1}


def test_a_swarm_without_members_is_forgotten() -> None:
    script = Script(1)
    script.says(1, joining())
    script.says(1, done(0))
    script.says(1, Leave(B))
    assert not script.state.swarms
    assert script.tick(1.0) == []
    assert not script.state._registries
    assert not script.state._fresh
    assert script.says(1, done(1), Failed(B, 0, 0), Missing(B, b""), Leave(B)) == []


def test_a_member_that_failed_gets_no_lease_of_the_blob_for_a_while() -> None:
    script = Script(1, 2)
    script.says(1, joining(chunks=1))
    script.says(2, joining(chunks=1))
    assert leases(script.says(1, Failed(B, 0, 0))) == [(2, 0)]
    assert leases(script.says(2, Failed(B, 0, 0))) == []
    assert leases(script.tick(FAILED_PAUSE_S - 0.1)) == []
    assert len(leases(script.tick(FAILED_PAUSE_S))) == 1


def test_a_member_that_will_never_get_the_blob_is_never_asked_again() -> None:
    script = Script(1)
    script.says(1, joining(chunks=1))
    script.says(1, Failed(B, 0, NEVER))
    assert leases(script.tick(10_000.0)) == []
    script.state.connected(address(2))
    assert leases(script.says(2, joining(chunks=1))) == [(2, 0)]


def test_a_failure_is_only_its_holders_to_tell() -> None:
    script = Script(1, 2)
    script.says(1, joining(chunks=1))
    script.says(2, joining(chunks=1))
    script.says(2, Failed(B, 0, 5000), Failed(B, 77, 5000))
    assert script.state.swarms[B].leases[0][0] == peer(1)
    assert leases(script.gone(1)) == [(2, 0)]


@pytest.mark.parametrize(("pause_ms", "pause_s"), [(3000, 3.0), (10**9, MAX_PAUSE_S)])
def test_a_registry_that_asks_for_a_pause_gets_it(pause_ms: int, pause_s: float) -> None:
    script = Script(1, 2)
    script.says(1, joining(chunks=1))
    script.says(2, joining(chunks=1, blob=digest(2)))
    assert leases(script.says(1, Failed(B, 0, pause_ms), Leave(B))) == []
    script.says(2, done(0, chunks=1, blob=digest(2)), Leave(digest(2)), joining(chunks=1))
    assert leases(script.tick(pause_s - 0.1)) == []
    assert leases(script.tick(pause_s)) == [(2, 0)]


def test_in_a_large_swarm_leases_are_spread_over_the_members() -> None:
    script = Script(*range(1, 101))
    for number in range(1, 101):
        script.says(number, joining(chunks=200))
    for index in range(200):
        holder = int(script.state.swarms[B].leases[index][0], 16)
        script.says(holder, done(index, chunks=200))
    counts = [member.leased_ever for member in script.state.members.values()]
    assert sum(counts) == 200
    assert max(counts) <= 5
    assert sum(count == 0 for count in counts) < 10


def test_a_lease_that_is_renewed_for_ever_lapses() -> None:
    script = Script(1, 2)
    assert leases(script.says(1, joining(chunks=8)))[:2] == [(1, 0), (1, 1)]
    script.says(2, joining(chunks=8))
    script.now = 1.0
    script.says(1, done(0, chunks=8))
    for second in range(2, int(RENEWED_S + LEASE_S) + 1):
        script.tick(float(second))
        held = script.state.swarms[B].leases.get(1, ("", 0.0))[0] == peer(1)
        assert held == (second < RENEWED_S + LEASE_S)
        if held:
            script.says(1, Renew(B, 1))
