# SPDX-License-Identifier: Apache-2.0
"""The scheduler's decisions, but for leases (test_ledger.py): messages in, messages out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pdist.core.chunkmap import to_bytes
from p2pdist.core.lease import DOUBTERS
from p2pdist.core.packing import pack_indices
from p2pdist.core.wire import (
    Ask,
    Banned,
    Checksums,
    Done,
    Grant,
    Join,
    Lease,
    Leave,
    Message,
    Missing,
    Neighbours,
    Refuted,
    Reread,
    Resolve,
    Resolved,
    Stored,
    Withdrawn,
)
from p2pdist.errors import RemoteProtocolError
from scheduler import swarm as module
from scheduler.pace import LEASES_MIN as LEASES
from scheduler.swarm import (
    PUSH_S,
    PUSH_S_PER_MEMBER,
    RESETTLE_S,
    STALE_DONE_S,
)
from tests.scheduler.scripts import B, Script, address, check, done, joining, leases, named, pushed
from tests.strategies import CHUNK, checksum, digest, messages, peer

if TYPE_CHECKING:
    from collections.abc import Iterable


# ------------------------------------------------------------------- neighbours


def test_in_a_small_swarm_each_newcomer_is_told_of_all_others() -> None:
    script = Script(1, 2, 3)
    assert named(script.says(1, joining())) == {}
    assert script.says(2, joining())[0] == (2, Neighbours(B, [address(1)]))
    assert named(script.says(3, joining())) == {3: [1, 2]}


def test_in_a_large_swarm_a_newcomer_gets_half_the_degree_and_all_have_about_the_degree_in_the_end() -> None:
    script = Script(*range(1, 301), degree=10)
    sizes = [len(named(script.says(number, joining())).get(number, [])) for number in range(1, 301)]
    assert sizes == list(range(11)) + [5] * 289
    degrees = [len(member.neighbours) for member in script.state.members.values()]
    assert all(
        number in script.state.members[other].neighbours
        for number, member in script.state.members.items()
        for other in member.neighbours
    )
    assert max(degrees) <= 18
    assert sum(degrees[:250]) / 250 > 9


def test_neighbours_for_one_blob_are_neighbours_for_the_next() -> None:
    script = Script(*range(1, 101), degree=10)
    for number in range(1, 101):
        script.says(number, joining())
    before = sum(len(member.neighbours) for member in script.state.members.values())
    for number in range(1, 101):
        known = {int(other, 16) for other in script.state.members[peer(number)].neighbours}
        again = set(named(script.says(number, joining(blob=digest(2)))).get(number, []))
        joined = {other for other in known if other <= number}
        assert joined - {number} <= again
    after = sum(len(member.neighbours) for member in script.state.members.values())
    assert after < 1.3 * before


def test_those_that_hold_the_blob_are_neighbours_too() -> None:
    script = Script(1, 2, 3)
    script.says(1, Stored([B]))
    script.says(2, joining())
    assert named(script.says(3, joining())) == {3: [2, 1]}


def test_an_agent_that_does_not_listen_is_named_to_nobody() -> None:
    script = Script(2, 3)
    script.state.connected(address(1, port=0))
    script.says(1, joining())
    assert named(script.says(2, joining())) == {}
    assert named(script.says(3, joining())) == {3: [2]}


def test_who_is_gone_is_nobodys_neighbour_any_more() -> None:
    script = Script(1, 2)
    script.says(1, joining())
    script.says(2, joining())
    script.gone(1)
    assert not script.state.members[peer(2)].neighbours
    assert script.gone(1) == []


# -------------------------------------------------------------- done, checksums


def test_checksums_are_pushed_to_all_members_together() -> None:
    script = Script(1, 2)
    script.says(1, joining())
    script.says(2, joining())
    script.now = 1.0
    script.says(1, done(1), done(0))
    expected = pushed(1, 0)
    assert script.tick(1.0) == [(1, expected), (2, expected)]
    assert script.tick(1.0 + PUSH_S) == []
    script.says(1, done(2))
    assert script.tick(1.0 + 2 * PUSH_S) == [(1, pushed(2)), (2, pushed(2))]


def test_what_pushes_may_cost_is_shared_by_all_swarms_and_those_that_wait_longest_come_first() -> None:
    crowd = int(3 * PUSH_S / PUSH_S_PER_MEMBER)
    script, other = Script(*range(1, crowd + 2)), digest(2)
    script.says(1, joining())
    script.says(2, joining(blob=other))
    for number in range(3, crowd + 2):
        script.state.swarms[B].members.add(peer(number))
    script.says(1, done(0))
    script.says(2, done(0, blob=other))
    assert len(script.tick(1.0)) == crowd
    script.says(1, done(1))
    assert script.tick(1.0 + PUSH_S) == []
    told = script.tick(1.0 + 3 * PUSH_S)
    assert told[0] == (2, Checksums(other, 100 * CHUNK, pack_indices([0]), checksum(0)))
    assert len(told) == 1 + crowd


def test_a_newcomer_gets_all_checksums_so_far() -> None:
    script = Script(1, 2)
    script.says(1, joining())
    script.says(1, done(1), done(0))
    assert (2, pushed(1, 0)) in script.says(2, joining([0]))


def test_who_comes_after_the_swarm_has_ended_gets_the_checksums_of_the_whole_blob() -> None:
    script = Script(1, 2)
    script.says(1, joining(chunks=2), done(0, chunks=2), done(1, chunks=2), Stored([B]))
    assert B not in script.state.swarms
    assert (2, pushed(0, 1, chunks=2)) in script.says(2, joining(chunks=2))


def test_what_one_agent_holds_and_nobody_vouches_for_is_leased_once_some_want_it() -> None:
    script = Script(*range(1, DOUBTERS + 2))
    script.says(1, Stored([B]))
    out = [leases(script.says(number, joining())) for number in range(2, DOUBTERS + 2)]
    assert [len(some) for some in out] == [0] * (DOUBTERS - 1) + [LEASES]


def test_what_two_agents_hold_is_not_leased_they_vouch_for_each_other() -> None:
    script = Script(*range(1, DOUBTERS + 3))
    script.says(1, Stored([B]))
    script.says(2, Stored([B]))
    assert [leases(script.says(number, joining())) for number in range(3, DOUBTERS + 3)] == [[]] * DOUBTERS


def test_done_for_a_chunk_that_was_not_leased_counts_where_nobody_else_has_the_lease() -> None:
    script = Script(1, 2)
    script.says(1, joining())
    script.says(2, joining())
    script.says(2, done(50), done(0))
    assert list(script.state.swarms[B].done) == [50]
    script.says(2, Done(B, 100 * CHUNK, 50, checksum(9)))
    assert script.state.swarms[B].done == {50: checksum(50)}


def test_a_chunk_that_a_member_has_is_not_leased() -> None:
    script = Script(1)
    assert leases(script.says(1, joining([0, 2]))) == [(1, 1), *((1, index) for index in range(3, LEASES + 2))]


def test_what_the_whole_swarm_needs_is_not_leased_where_someone_has_it_stored() -> None:
    script = Script(1, 2)
    script.says(1, Stored([B]))
    assert leases(script.says(2, joining())) == []
    assert named(script.says(2, joining())) == {2: [1]}


def test_when_one_has_stored_the_blob_nothing_more_is_leased() -> None:
    script = Script(1, 2)
    script.says(1, joining())
    script.says(2, joining())
    assert leases(script.says(1, Stored([B]))) == []
    assert not script.state.members[peer(1)].swarms


def test_the_size_of_a_blob_may_become_known_later() -> None:
    script = Script(1, 2, 3)
    assert leases(script.says(1, joining(size=-1))) == [(1, 0)]
    script.says(2, joining(size=-1))
    script.says(1, done(0, chunks=1))
    (one, two) = script.tick(1.0)
    assert one == (1, pushed(0, chunks=1))
    assert two == (2, pushed(0, chunks=1))
    script.says(1, joining(blob=digest(2), size=-1))
    assert leases(script.says(3, joining(blob=digest(2), chunks=3))) == [(3, 1), (3, 2)]


def test_words_about_another_cut_of_the_blob_mean_nothing() -> None:
    script = Script(1, 2)
    script.says(1, joining(chunks=2))
    script.says(2, joining([50]))
    script.says(2, done(50))
    assert not script.state.swarms[B].done


@pytest.mark.parametrize(
    "message",
    [
        Join(B, 100 * CHUNK, "r", b"\x01", checksum(0)),
        Join(B, 100 * CHUNK, "r", to_bytes(1, 100), b""),
        done(100),
        Done(B, 100 * CHUNK, 0, b"short"),
        Missing(B, b"\x01"),
        Grant(1),
        Lease(B, 0, 1),
    ],
    ids=str,
)
def test_what_does_not_fit_is_the_agents_fault(message: Message) -> None:
    script = Script(1)
    script.says(1, joining())
    with pytest.raises(RemoteProtocolError):
        script.says(1, message)


def test_an_empty_blob_has_nothing_to_lease_or_report() -> None:
    script = Script(1)
    assert script.says(1, joining(chunks=0)) == []
    with pytest.raises(RemoteProtocolError):
        script.says(1, Done(B, 0, 0, checksum(0)))


# ---------------------------------------------------------------------- missing


def missing(*indices: int) -> Missing:
    return Missing(B, pack_indices(indices))


def test_a_missing_chunk_is_to_be_had_from_who_fetched_it_or_has_it_all() -> None:
    script = Script(1, 2, 3)
    for number in (1, 2):
        script.says(number, joining())
    script.says(1, done(0))
    assert script.says(2, missing(0)) == [(2, Neighbours(B, [address(1)]))]
    script.says(3, Stored([B]))
    names = [tuple(named(script.says(2, missing(0, 1)))[2]) for _ in range(20)]
    assert {name for entry in names for name in entry} == {1, 3}


def test_a_missing_chunk_that_nobody_can_have_is_leased_again() -> None:
    script = Script(1, 2)
    script.says(1, joining(chunks=1))
    script.says(2, joining(chunks=1))
    script.says(1, done(0, chunks=1))
    script.gone(1)
    assert leases(script.says(2, missing(0))) == [(2, 0)]
    # Once it is leased there is nothing to help with.
    assert script.says(2, missing(0)) == []


def test_a_chunk_that_its_own_fetcher_misses_is_leased_again() -> None:
    script = Script(1)
    script.says(1, joining(chunks=1))
    script.says(1, done(0, chunks=1))
    assert leases(script.says(1, missing(0))) == [(1, 0)]


def test_a_chunk_that_stays_missing_is_leased_again_whoever_is_said_to_have_it() -> None:
    script = Script(1, 2)
    script.says(1, Stored([B]))
    script.says(2, joining())
    assert named(script.says(2, missing(0))) == {2: [1]}
    script.now = STALE_DONE_S - 0.1
    assert named(script.says(2, missing(0))) == {2: [1]}
    script.now = STALE_DONE_S
    assert leases(script.says(2, missing(0))) == [(2, 0)]
    script.says(2, done(0))
    assert not script.state.swarms[B].missing


def test_a_report_long_ago_does_not_count_against_todays() -> None:
    script = Script(1, 2)
    script.says(1, Stored([B]))
    script.says(2, joining())
    script.says(2, missing(0))
    script.now = 2 * STALE_DONE_S
    assert named(script.says(2, missing(0))) == {2: [1]}
    script.now = 3 * STALE_DONE_S
    assert leases(script.says(2, missing(0))) == [(2, 0)]


def test_chunks_yet_to_be_leased_or_past_the_end_are_not_missing() -> None:
    script = Script(1)
    script.says(1, joining())
    assert script.says(1, missing(50, 100, 2**32 - 1)) == []


def test_what_is_evicted_is_not_named_any_more() -> None:
    script = Script(1, 2, 3)
    script.says(1, Stored([B]))
    script.says(2, Stored([B]))
    script.says(3, joining())
    script.says(1, Leave(B))
    assert named(script.says(3, missing(0))) == {3: [2]}
    assert leases(script.says(2, Leave(B))) == []
    assert leases(script.says(3, missing(0))) == [(3, 0)]


# ---------------------------------------------------------------------- restart


def test_after_a_restart_nothing_is_leased_until_the_others_are_back() -> None:
    script = Script(1, 2, started=0.0)
    assert leases(script.says(1, joining([0, 1]))) == []
    script.now = RESETTLE_S / 2
    assert leases(script.says(2, joining([3]))) == []
    assert leases(script.tick(RESETTLE_S - 0.01)) == []
    given_ = leases(script.tick(RESETTLE_S))
    assert [index for _, index in given_] == [2, *range(4, LEASES + 3)]
    assert script.state.swarms[B].done.keys() == {0, 1, 3}


def test_at_a_first_start_leases_go_out_at_once() -> None:
    script = Script(1, started=0.0)
    assert len(leases(script.says(1, joining()))) == LEASES


def test_an_agent_that_joins_again_says_what_it_has_now() -> None:
    script = Script(1)
    script.says(1, joining())
    assert leases(script.says(1, joining([0, 5]))) == []
    assert script.state.swarms[B].done.keys() == {0, 5}
    assert len(script.state.swarms[B].members) == 1


# ----------------------------------------------------------------------- bounds


def test_blobs_and_swarms_have_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SWARMS", 3)
    monkeypatch.setattr(module, "MAX_JOINED", 2)
    script = Script(1, 2)
    script.says(1, joining(blob=digest(1)), joining(blob=digest(2)), joining(blob=digest(2)))
    with pytest.raises(RemoteProtocolError, match="wanted"):
        script.says(1, joining(blob=digest(3)))
    assert digest(3) not in script.state.swarms
    script.says(2, joining(blob=digest(3)))
    with pytest.raises(RemoteProtocolError, match="at once"):
        script.says(2, joining(blob=digest(4)))


def test_only_so_many_stored_blobs_are_remembered_but_all_pulls_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_STORED", 1)
    script = Script(1)
    script.says(1, Stored([digest(2)]), joining(), Stored([B]))
    assert list(script.state.members[peer(1)].stored) == [digest(2)]
    assert not script.state.swarms
    script.gone(1)
    assert not script.state._holders


def test_tags_are_passed_on() -> None:
    script = Script(1, 2, 3)
    question = Resolve(1, "r", "repository", "tag")
    assert script.says(1, question) == [(1, Ask(1))]
    assert script.says(2, question) == [(2, Ask(1))]
    script.says(3, question)
    script.says(1, Resolved(1, B, "m", 5))
    assert script.says(2, Resolved(1, B, "m", 5)) == [(3, Resolved(1, B, "m", 5))]
    for number in (1, 2, 3):
        script.says(number, Resolve(2, "r", "repository", "other"))
    assert script.gone(1) == [(3, Ask(2))]
    assert script.tick(8.0) == []


def test_a_message_costs_no_walk_over_all_swarms(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(*range(1, 1001))
    for number in range(1, 1001):
        script.says(number, joining(blob=digest(number)))
    looked_at, pending = 0, module.Swarm.pending

    def counted(swarm: module.Swarm) -> int:
        nonlocal looked_at
        looked_at += 1
        return pending.fget(swarm)  # type: ignore[attr-defined, no-any-return]

    monkeypatch.setattr(module.Swarm, "pending", property(counted))
    for index in range(4):
        script.says(1, done(index, blob=digest(1)))
    script.tick(1.0)
    assert 0 < looked_at < 50


# ------------------------------------------------------------- whatever is said


@given(st.lists(st.tuples(st.integers(1, 3), messages(), st.floats(0, 5)), max_size=30))
@settings(max_examples=60)
def test_whatever_agents_say_only_their_connection_may_end(script: list[tuple[int, Message, float]]) -> None:
    """Everything else would end the scheduler. Blobs are few, so that the messages meet."""
    run = Script(1, 2, 3)
    for number, message, pause_s in script:
        run.now += pause_s
        if hasattr(message, "blob"):
            fields = {name: getattr(message, name) for name in message.__slots__}
            message = type(message)(**{**fields, "blob": digest(int(message.blob[-1], 16) % 3)})
        try:
            run.says(number, message)
        except RemoteProtocolError:
            run.gone(number)
            run.state.connected(address(number))
        run.tick(run.now)
        check(run.state)


# ----------------------------------------------------------------- shutting out


def shut_out(script: Script, suspect: int, by: Iterable[int]) -> list[tuple[int, Message]]:
    """Let these report an agent; return what follows."""
    return [entry for number in by for entry in script.says(number, Banned(peer(suspect), "corrupt", 30_000))]


def test_whom_a_quorum_has_banned_is_handed_to_nobody_and_leased_nothing() -> None:
    script = Script(*range(1, 8))
    script.says(1, joining())
    shut_out(script, 1, (2, 3, 4))
    assert script.state.reports.out == {peer(1)}
    assert [suspect for suspect, _ in script.state.reports.news] == [peer(1)]
    for number in range(2, 7):
        assert not any(1 in peers for peers in named(script.says(number, joining())).values())
    for at in range(1, 30):
        assert all(to != 1 for to, _ in leases(script.tick(float(at))))
    assert script.says(1, Resolve(1, "r", "name", "tag")) == [(1, Resolved(1, "", "", 0))]


def test_the_leases_of_a_shut_out_agent_go_to_others() -> None:
    script = Script(1, 2, 3, 4)
    had = leases(script.says(1, joining()))
    assert had
    script.says(2, joining())
    assert leases(shut_out(script, 1, (2, 3, 4)))[: len(had)] == [(2, index) for _, index in had][:3]
    assert not any(holder == peer(1) for holder, _ in script.state.swarms[B].leases.values())


def test_a_single_agent_cannot_have_others_shut_out_nor_those_that_are_not_there() -> None:
    script = Script(*range(1, 8))
    for _ in range(5):
        for suspect in range(1, 8):
            shut_out(script, suspect, (1, 2))
    assert not script.state.reports.out
    shut_out(script, 99, range(1, 8))
    assert not script.state.reports.out


def test_who_misses_a_chunk_is_not_sent_to_a_shut_out_holder() -> None:
    script = Script(*range(1, 8))
    script.says(1, joining(chunks=1))
    script.says(1, done(0, chunks=1), Stored([B]))
    shut_out(script, 1, (2, 3, 4))
    script.says(5, joining(chunks=1))
    out = script.says(5, Missing(B, pack_indices([0])))
    assert named(out) == {}
    assert leases(out) == [(5, 0)]


def test_what_a_lying_lease_holder_said_is_leased_again_once_enough_agents_have_read_otherwise() -> None:
    script = Script(1, 2, 3, 4, 5)
    script.says(1, joining(chunks=3))
    for index in range(3):
        script.says(1, Done(B, 3 * CHUNK, index, checksum(index + 1000)))
    script.tick(1.0)
    for number in (2, 3, 4, 5):
        script.says(number, joining(chunks=3))
    # Another, whom it has not chosen, is to read the chunk.
    ((arbiter, asked),) = script.says(2, Refuted(B, 0, checksum(0)))
    assert asked == Reread(B, 0)
    assert arbiter not in (1, 2)
    others = [number for number in (3, 4, 5) if number != arbiter]
    script.says(others[0], Refuted(B, 1, checksum(1)))
    assert not script.state.reports.out
    out = script.says(arbiter, Refuted(B, 0, checksum(0)))
    assert script.state.reports.out == {peer(1)}
    assert [to for to, message in out if message == Withdrawn(B, pack_indices([1, 2]), peer(1))] == [2, 3, 4, 5]
    assert {index for _, index in leases(out)} == {1, 2}
    assert script.state.swarms[B].done == {0: checksum(0)}
    # Two have read the same: everybody hears of it. The liar's word counts no more.
    assert (2, Checksums(B, 3 * CHUNK, pack_indices([0]), checksum(0))) in script.tick(2.0)
    script.says(1, Done(B, 3 * CHUNK, 1, checksum(1001)), joining([0, 1, 2], chunks=3))
    assert script.state.swarms[B].done == {0: checksum(0)}


def test_an_agent_that_was_unplugged_is_let_in_again_soon_and_what_it_said_stands() -> None:
    script = Script(1, 2, 3, 4)
    for number in (1, 2, 3, 4):
        script.says(number, joining(chunks=3))
    script.says(1, done(0, chunks=3))
    for number in (2, 3, 4):
        script.says(number, Banned(peer(1), "stalled", 30_000))
    assert script.state.reports.out == {peer(1)}
    assert script.state.swarms[B].done == {0: checksum(0)}
    script.tick(29.0)
    assert script.state.reports.out == {peer(1)}
    script.tick(30.0)
    assert not script.state.reports.out


def test_who_lies_about_a_blobs_size_is_left_alone_with_that() -> None:
    script = Script(1, 2, 3, tried=False)
    script.says(1, joining(chunks=50))
    assert leases(script.says(2, joining(chunks=3)))[:1] == [(2, 0)]
    assert (3, Neighbours(B, [address(2)])) in script.says(3, joining(chunks=3))
    script.says(2, done(0, chunks=3))
    told = [to for to, message in script.tick(1.0) if isinstance(message, Checksums)]
    assert told == [2, 3]
    script.says(3, done(1, chunks=3), done(2, chunks=3))
    script.says(2, Stored([B]))
    script.says(3, Stored([B]))
    script.says(1, Leave(B))
    assert not script.state.swarms
    check(script.state)


def test_who_calls_a_blob_empty_keeps_nobody_from_a_lease() -> None:
    script = Script(1, 2, 3)
    script.says(1, joining(chunks=0))
    assert leases(script.says(2, joining(size=-1))) == [(2, 0)]
    script.says(3, joining(size=-1))
    script.says(2, Done(B, 0, 0, checksum(0)))
    assert leases(script.gone(2)) == [(3, 0)]
    check(script.state)


def test_who_learns_better_about_a_blobs_size_goes_to_those_who_say_the_same() -> None:
    script = Script(1, 2, 3)
    script.says(1, joining(chunks=50))
    script.says(2, joining(chunks=3))
    script.says(1, joining(chunks=3))
    assert [sorted(swarm.members) for swarm in script.state.swarms.values()] == [[peer(1), peer(2)]]
    script.says(3, joining(chunks=3))
    assert len(script.state.swarms) == 1
    check(script.state)


def test_a_lying_agent_refutes_nothing_by_itself() -> None:
    script = Script(1, 2, 3)
    for number in (1, 2, 3):
        script.says(number, joining(chunks=3))
    script.says(1, done(0, chunks=3))
    for index in range(3):
        script.says(2, Refuted(B, index, checksum(9)), Refuted(digest(7), index, checksum(9)))
    assert script.state.swarms[B].done == {0: checksum(0)}
    assert not script.state.reports.out
