# SPDX-License-Identifier: Apache-2.0
"""Fetching from the origin: by lease of the scheduler's, and by rendezvous."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core import events as ev
from p2pdist.core.lease import (
    LEASES,
    LEFT_ALONE,
    LOST_S,
    MANY,
    NEVER,
    REACH_PER_MEMBER,
    RENEW_S,
    SETTLE_S,
    SLOW_S,
    STEP_IN_S,
    TAIL_PER_MEMBER,
    TOGETHER,
    holder_of,
    rank_of,
    weight,
)
from p2pdist.core.reputation import Offence
from p2pdist.core.wire import Done, Failed, Lease, Renew, Unshare
from tests.script import (
    CHUNK,
    ME,
    B,
    Script,
    checksums,
    done,
    fetch,
    fetches,
    have,
    send,
    share,
    tell,
    told,
    write,
)
from tests.strategies import checksum, digest, peer

swarms = st.sets(st.integers(0, 1000).map(peer), min_size=1, max_size=12)


def owner(index: int, *numbers: int) -> bool:
    """Whether the agent under test leases a chunk in a swarm of itself and these."""
    return holder_of(B, index, {ME, *map(peer, numbers)}) == ME


# --------------------------------------------------------------- rendezvous


@given(swarms, st.integers(0, 500))
def test_each_chunk_has_exactly_one_holder_and_all_agree(swarm: set[str], index: int) -> None:
    ranks = [rank_of(member, B, index, swarm) for member in swarm]  # type: ignore[arg-type]
    assert sorted(ranks) == list(range(len(swarm)))
    (first,) = [member for member, rank in zip(swarm, ranks, strict=True) if rank == 0]
    assert holder_of(B, index, swarm) == holder_of(B, index, sorted(swarm)) == first  # type: ignore[arg-type]


@given(swarms, st.integers(0, 500), st.data())
def test_a_member_that_leaves_moves_only_its_own_chunks(swarm: set[str], index: int, data: st.DataObject) -> None:
    if len(swarm) < 2:
        return
    leaver = data.draw(st.sampled_from(sorted(swarm)))
    before = holder_of(B, index, swarm)  # type: ignore[arg-type]
    after = holder_of(B, index, swarm - {leaver})  # type: ignore[arg-type]
    assert after == before or before == leaver


def test_the_weights_are_the_same_on_every_machine() -> None:
    assert weight(digest(1), 7, peer(1)) == 1429981761327436730


def test_chunks_are_spread_evenly_over_the_members() -> None:
    swarm, chunks = [peer(number) for number in range(8)], 4000
    counts = Counter(holder_of(B, index, swarm) for index in range(chunks))
    expected = chunks / len(swarm)
    assert all(abs(count - expected) < 4 * expected**0.5 for count in counts.values())


# ------------------------------------------------------- from the scheduler


def test_a_leased_chunk_is_fetched_and_reported() -> None:
    script = Script(scheduled=True)
    script.start()
    assert script.ordered(Lease(B, 2, 15000)) == [fetch(2)]
    assert script.arrives(None, 2) == [write(2), done(2)]
    assert script.arrives(None, 2) == []


def test_a_lease_for_what_is_here_is_done_at_once() -> None:
    script = Script(scheduled=True)
    script.start(have=[1])
    assert script.ordered(Lease(B, 1, 15000)) == [done(1)]


def test_a_lease_for_what_only_its_sender_vouches_for_is_fetched_and_settles_it() -> None:
    script = Script(scheduled=True)
    script.connect(2)
    script.start()
    script.says(2, share([1]))
    script.arrives(2, 1)
    assert script.ordered(Lease(B, 1, 15000)) == [fetch(1)]
    assert script.arrives(None, 1) == [done(1)]
    assert script.machine.blobs[B].offered == 0b10


def test_a_leased_chunk_that_a_peer_brings_is_reported_once_it_is_vouched_for() -> None:
    script = Script(scheduled=True)
    script.connect(2)
    script.start()
    script.says(2, share([1, 2]))
    script.ordered(Lease(B, 1, 15000), Lease(B, 2, 15000))
    assert told(script.arrives(2, 1), Done) == []
    assert script.ordered(checksums(1)) == [done(1)]
    script.ordered(checksums(2))
    assert done(2) in script.arrives(2, 2)


def test_a_lease_of_what_we_know_nothing_of_is_given_back_for_good() -> None:
    script = Script(scheduled=True)
    assert script.ordered(Lease(B, 0, 15000)) == [tell(Failed(B, 0, NEVER))]
    script.start()
    assert script.ordered(Lease(B, 4, 15000)) == [tell(Failed(B, 4, NEVER))]
    script.start(blob=digest(2), shared=False)
    assert script.ordered(Lease(digest(2), 0, 15000)) == [tell(Failed(digest(2), 0, NEVER))]


@pytest.mark.parametrize(("final", "pause_s", "said"), [(False, 0.0, 0), (False, 2.5, 2500), (True, 0.0, NEVER)])
def test_a_failed_lease_is_given_back(final: bool, pause_s: float, said: int) -> None:
    script = Script(scheduled=True)
    script.connect(2)
    script.start()
    script.ordered(Lease(B, 0, 15000))
    assert script.fails(0, final=final, pause_s=pause_s) == [tell(Failed(B, 0, said))]


def test_after_a_final_refusal_no_lease_of_the_blob_is_taken() -> None:
    script = Script(scheduled=True)
    script.connect(2)
    script.start()
    script.ordered(Lease(B, 0, 15000))
    script.fails(0, final=True)
    assert script.ordered(Lease(B, 1, 15000)) == [tell(Failed(B, 1, NEVER))]


def test_a_lease_is_renewed_while_its_fetch_runs() -> None:
    script = Script(scheduled=True)
    script.start()
    script.ordered(Lease(B, 0, 15000))
    assert told(script.tick(RENEW_S - 0.1), Renew) == []
    assert told(script.tick(RENEW_S), Renew) == [Renew(B, 0)]
    assert told(script.tick(RENEW_S + 0.1), Renew) == []
    assert told(script.tick(2 * RENEW_S), Renew) == [Renew(B, 0)]
    script.arrives(None, 0)
    assert told(script.tick(3 * RENEW_S), Renew) == []


def test_a_chunk_leased_twice_is_fetched_once() -> None:
    script = Script(scheduled=True)
    script.start()
    assert script.ordered(Lease(B, 0, 15000), Lease(B, 0, 15000)) == [fetch(0)]


def test_what_is_leased_while_the_blob_is_checked_is_fetched_once_unless_others_vouch_for_it_by_then() -> None:
    script = Script(scheduled=True)
    script.connect(2)
    script.start()
    script.says(2, share(range(4)))
    for index in range(4):
        script.arrives(2, index)
    script.ordered(*(Lease(B, index, 15000) for index in (3, 2, 1, 3)), checksums(1))
    assert script.on(ev.BlobRejected(blob=B, indices=[])) == [done(1), fetch(2, count=2)]
    script.arrives(None, 2)
    script.arrives(None, 3)
    assert script.machine._leasing.fetching() == 0


def test_a_leased_run_is_one_request_and_each_chunk_is_reported_as_it_comes() -> None:
    script = Script(scheduled=True)
    script.start(have=[2])
    assert script.ordered(Lease(B, 0, 15000, 9)) == [done(2), fetch(0, count=2), fetch(3)]
    assert script.arrives(None, 0) == [write(0), done(0)]
    assert script.machine._leasing.fetching() == 2
    assert told(script.tick(RENEW_S), Renew) == [Renew(B, 1), Renew(B, 3)]
    assert script.arrives(None, 1) == [write(1), done(1)]
    assert script.machine._leasing.fetching() == 1


def test_a_run_that_breaks_off_gives_back_what_has_not_come() -> None:
    script = Script(scheduled=True)
    script.connect(2)
    script.start()
    script.ordered(Lease(B, 0, 15000, 4))
    script.arrives(None, 0)
    assert script.fails(1, count=3) == [tell(Failed(B, index, 0)) for index in (1, 2, 3)]
    assert script.machine._leasing.fetching() == 0
    assert script.machine.blobs[B].inflight == 0


def test_who_gets_chunks_fast_asks_for_longer_runs() -> None:
    script = Script(scheduled=True)
    script.start(8)
    script.ordered(Lease(B, 0, 15000))
    (said,) = told(script.arrives(None, 0, taken_s=0.01), Done)
    assert isinstance(said, Done)
    assert said.run_bytes > CHUNK // 2
    script.ordered(Lease(B, 1, 15000))
    (more,) = told(script.arrives(None, 1, taken_s=0.001), Done)
    assert isinstance(more, Done)
    assert more.run_bytes > said.run_bytes


def test_nothing_is_told_to_a_scheduler_that_is_gone() -> None:
    script = Script(scheduled=True)
    script.start()
    script.ordered(Lease(B, 0, 15000), Lease(B, 1, 15000))
    script.on(ev.SchedulerLost())
    assert told(script.arrives(None, 0), Done) == []
    assert told(script.fails(1), Failed) == []
    assert told(script.tick(6.0), Renew) == []


# ------------------------------------------------------ without a scheduler


def test_alone_an_agent_fetches_four_chunks_at_a_time_in_order() -> None:
    script = Script()
    assert fetches(script.start(6)) == [0, 1, 2, 3]
    assert fetches(script.arrives(None, 1)) == [4]
    assert fetches(script.tick(0.1)) == []


def test_alone_on_a_fast_link_a_request_brings_what_is_adjacent_up_to_what_is_here() -> None:
    script = Script()
    script.start(40, have=[12])
    out = [command for index in range(4) for command in script.arrives(None, index, taken_s=0.001)]
    assert [command for command in out if isinstance(command, ev.FetchOrigin)] == [
        fetch(4),
        fetch(5, count=2),
        fetch(7, count=4),
        fetch(11),
    ]


def test_alone_the_window_of_a_reader_comes_first() -> None:
    script = Script()
    script.on(ev.PullCancelled(blob=B))
    script.start(100)
    script.on(ev.HeadMoved(blob=B, reader=1, index=50))
    assert fetches(script.arrives(None, 0)) == [50]


def test_blobs_are_fetched_one_after_the_other() -> None:
    script = Script()
    assert fetches(script.start(6)) == [0, 1, 2, 3]
    assert fetches(script.start(6, blob=digest(2))) == []
    script.fails(0, pause_s=5.0)
    assert script.tick(0.1) == [fetch(0, digest(2))]


def shared_with(other: int, chunks: int) -> Script:
    """An agent in a swarm of two without a scheduler."""
    script = Script()
    script.connect(other)
    script.start(chunks)
    script.says(other, share(size=chunks * CHUNK))
    return script


def test_a_lease_by_rendezvous_waits_until_the_swarm_has_settled() -> None:
    assert [index for index in range(32) if owner(index, 11)][:3] == [1, 2, 3]
    script = shared_with(11, 32)
    assert fetches(script.tick(SETTLE_S - 0.1)) == []
    assert fetches(script.tick(SETTLE_S)) == [1, 2]


def test_peers_that_come_and_go_keep_nobody_waiting_for_long() -> None:
    script, waited = Script(), 0
    script.start()
    script.fails(0)
    for tick in range(1, 200):
        script.now = tick * 0.1
        if not tick % 3:
            script.on(ev.PeerLost(peer=peer(2)))
            script.connect(2)
        fetching = fetches(script.tick(script.now))
        for index in fetching:
            script.fails(index)
        script.machine.blobs[B].causes.clear()
        waited = 0 if fetching else waited + 1
        assert waited < 25


def fetched_with(script: Script) -> list[int]:
    """Let every fetch succeed until there is nothing more to fetch; return what was fetched."""
    out, got = script.tick(SETTLE_S), []
    while fetching := fetches(out):
        got += fetching
        out = [command for index in fetching for command in script.arrives(None, index)]
    return got


def renewed(out: list[ev.Command], *numbers: int) -> list[int]:
    """Return of which chunks exactly these peers are told that they are being fetched."""
    said = [command for command in out if isinstance(command, ev.Send) and isinstance(command.message, Renew)]
    indices = sorted({command.message.index for command in said if isinstance(command.message, Renew)})
    assert sorted(said, key=repr) == sorted((send(n, Renew(B, index)) for n in numbers for index in indices), key=repr)
    return indices


def test_who_fetches_tells_the_members_when_it_begins_while_it_lasts_and_when_it_gives_up() -> None:
    script = shared_with(11, 32)
    script.connect(12)
    assert renewed(script.tick(SETTLE_S), 11) == [1, 2]
    assert renewed(script.tick(SETTLE_S + RENEW_S), 11) == [1, 2]
    assert send(11, Failed(B, 1, 0)) in script.fails(1)
    assert send(11, Failed(B, 1, 0)) not in script.arrives(None, 2)


def test_a_newcomer_is_told_what_is_being_fetched() -> None:
    script = shared_with(11, 32)
    script.tick(SETTLE_S)
    script.connect(12)
    assert renewed(script.says(12, share(size=32 * CHUNK, reply=False)), 12) == [1, 2]


def test_the_members_hear_at_once_what_was_fetched() -> None:
    script = shared_with(11, 32)
    script.tick(SETTLE_S)
    script.now += 0.01
    assert send(11, have(1)) in script.arrives(None, 1)


def test_what_another_fetches_is_not_fetched_whoever_comes_first() -> None:
    script = shared_with(11, 32)
    script.says(11, Renew(B, 1), Renew(B, 3), Renew(B, 99), Renew(digest(2), 1))
    assert fetches(script.tick(SETTLE_S)) == [2, 5]
    script.fails(2)
    script.fails(5)
    script.says(11, Failed(B, 3, 0))
    assert fetches(script.tick(script.now + 1.0)) == [2, 3]


@pytest.mark.parametrize("end", [Unshare(B), None], ids=["unshared", "lost"])
def test_a_member_that_goes_fetches_no_more(end: Unshare | None) -> None:
    script = shared_with(11, 4)
    script.connect(12)
    script.says(12, share())
    script.says(12, *(Renew(B, index) for index in range(4)))
    assert fetches(script.tick(SETTLE_S)) == []
    if end is None:
        script.on(ev.PeerLost(peer=peer(12)))
    else:
        script.says(12, end)
    assert fetches(script.tick(SETTLE_S + 0.1)) == [1, 2]


def test_with_a_scheduler_members_are_not_told_of_fetches() -> None:
    script = Script(scheduled=True)
    script.connect(11)
    script.start()
    script.says(11, share())
    assert renewed(script.ordered(Lease(B, 1, 15000))) == []
    script.connect(12)
    assert renewed(script.says(12, share(reply=False))) == []
    assert renewed(script.tick(RENEW_S)) == []


def test_all_members_together_fetch_so_many_chunks_at_a_time() -> None:
    numbers = range(13, 13 + TOGETHER)
    assert [index for index in range(2 * TOGETHER) if owner(index, *numbers)] == [5]
    script = Script()
    script.connect(*numbers)
    script.start(400)
    for number in numbers:
        script.says(number, share(size=400 * CHUNK), Renew(B, 400 - number))
    assert fetches(script.tick(SETTLE_S)) == []
    for number in numbers[1:]:
        script.says(number, Failed(B, 400 - number, 0))
    assert fetches(script.tick(SETTLE_S + 0.1)) == [5]


def test_one_member_that_says_it_fetches_all_does_not_keep_the_others_from_it() -> None:
    script = shared_with(11, 200)
    script.connect(12)
    script.says(12, share(size=200 * CHUNK), *(Renew(B, index) for index in range(150, 200)))
    assert fetches(script.tick(SETTLE_S)) != []


def crowd_that_fetched(*seconds: float) -> Script:
    """A swarm without a scheduler, whose members 2, 3, ... have each fetched a chunk, in so many seconds."""
    script = Script()
    numbers = range(2, 2 + len(seconds))
    script.connect(*numbers)
    script.start(200)
    for number in numbers:
        script.says(number, share(size=200 * CHUNK), Renew(B, 200 - number))
    for number, taken_s in sorted(zip(numbers, seconds, strict=True), key=lambda each: each[1]):
        script.now = taken_s
        script.says(number, have(200 - number))
    return script


@pytest.mark.parametrize("seconds", [0.5, 2.5], ids=["like the others", "much longer"])
def test_whose_fetches_take_much_longer_than_those_of_most_leaves_it_to_the_others(seconds: float) -> None:
    script = crowd_that_fetched(0.3, 0.3, 0.4, seconds)
    most, all_members = [ME, *map(peer, range(2, 5))], [ME, *map(peer, range(2, 6))]
    theirs = [index for index in range(190) if holder_of(B, index, all_members) == peer(5)]
    index = next(index for index in theirs if holder_of(B, index, most) == ME)
    script.says(2, share([other for other in range(200) if other != index], size=200 * CHUNK))
    assert fetches(script.tick(SETTLE_S + 2.5)) == ([index] if seconds > SLOW_S else [])


def test_who_is_slow_itself_fetches_nothing_unless_nobody_does() -> None:
    script = crowd_that_fetched(0.2, 0.2, 0.2)
    (index, *_) = fetches(script.tick(SETTLE_S))
    script.now = SETTLE_S + SLOW_S + 0.3
    assert fetches(script.arrives(None, index)) == []
    assert fetches(script.tick(script.now + STEP_IN_S)) != []


def test_an_agent_stays_within_reach_of_what_the_swarm_has() -> None:
    assert [index for index in range(12) if owner(index, 9)] == [3, 5, 6, 9, 10, 11]
    assert REACH_PER_MEMBER * 2 == 4
    # With 0, 1, 2 and 4, which are the other's, four are open before 5.
    assert fetched_with(shared_with(9, 32)) == [3]


def test_the_next_in_rank_steps_in_for_a_member_that_does_nothing() -> None:
    script = shared_with(11, 4)
    assert fetched_with(script) == [1, 2, 3]
    assert fetches(script.tick(SETTLE_S + STEP_IN_S - 0.1)) == []
    assert fetches(script.tick(SETTLE_S + STEP_IN_S)) == [0]


CROWD = [ME, peer(2), peer(3), peer(4)]


def crowd_where_peer_2_has_left(chunks: int, left: int, members: int = 4) -> Script:
    """A swarm that has all but the last chunks that are peer 2's to fetch, so many of them."""
    crowd = CROWD[:members]
    theirs = [index for index in range(chunks) if holder_of(B, index, crowd) == peer(2)][-left:]
    script = Script()
    script.connect(*range(2, members + 1))
    script.start(chunks)
    there = [index for index in range(chunks) if index not in theirs]
    for number in range(2, members + 1):
        script.says(number, share(there, size=chunks * CHUNK))
    return script


def test_who_has_nothing_left_to_fetch_takes_over_from_the_end_what_one_member_has_left() -> None:
    script = crowd_where_peer_2_has_left(64, LEFT_ALONE + 10)
    ours = [index for index in range(64) if [rank_of(who, B, index, CROWD) for who in (peer(2), ME)] == [0, 1]]
    assert fetches(script.tick(SETTLE_S)) == [ours[-1]]
    assert fetches(script.tick(SETTLE_S + 0.1)) == []
    assert fetches(script.arrives(None, ours[-1])) == [ours[-2]]


@pytest.mark.parametrize(
    ("left", "members"),
    [(LEFT_ALONE, 4), (4 * TAIL_PER_MEMBER + 1, 4), (LEFT_ALONE + 4, MANY - 1)],
    ids=["few are left", "many are left", "a small swarm"],
)
def test_no_chunk_is_taken_over_where(left: int, members: int) -> None:
    assert fetches(crowd_where_peer_2_has_left(100, left, members).tick(SETTLE_S)) == []


def test_what_a_peer_has_is_not_fetched() -> None:
    script = Script()
    script.connect(2)
    script.start()
    script.says(2, share(range(4), wants=False))
    assert fetches(script.tick(SETTLE_S)) == []


def test_a_swarm_that_changes_shares_its_chunks_anew() -> None:
    script = Script()
    script.connect(2, 3)
    script.start(16)
    script.says(2, share(size=16 * CHUNK))
    script.says(3, share(size=16 * CHUNK, wants=False))
    script.tick(SETTLE_S)
    script.on(ev.PeerLost(peer=peer(2)))
    assert script.machine._leasing.fetching() < LEASES
    script.tick(SETTLE_S + 0.1)
    assert script.machine._leasing.fetching() == LEASES


def test_who_loses_all_peers_at_once_waits_for_some_to_come_back_but_not_for_long_nor_often() -> None:
    script = Script()
    script.connect(2)
    script.start(16)
    script.says(2, share(range(16), size=16 * CHUNK, wants=False))
    script.now = script.machine.state.helped_at = 10.0
    script.on(ev.PeerLost(peer=peer(2)))
    assert fetches(script.tick(10.0 + LOST_S - 0.1)) == []
    script.connect(2)
    script.says(2, share(range(16), size=16 * CHUNK, wants=False))
    assert fetches(script.tick(10.0 + LOST_S + SETTLE_S)) == []
    script.on(ev.PeerLost(peer=peer(2)))
    assert fetches(script.tick(script.now + 0.1)) == [0, 1, 2, 3]


def test_a_last_peer_that_is_banned_is_not_waited_for() -> None:
    script = Script()
    script.connect(2)
    script.start(16)
    script.says(2, share(range(16), size=16 * CHUNK, wants=False))
    script.now = 10.0
    script.on(ev.PeerOffended(peer=peer(2), offence=Offence.PROTOCOL, why="nonsense"))
    assert fetches(script.tick(10.1)) == [0, 1, 2, 3]


def test_when_the_scheduler_is_lost_rendezvous_takes_over_after_settling() -> None:
    script = Script(scheduled=True)
    script.connect(2)
    script.start()
    script.says(2, share())
    script.now = 10.0
    script.on(ev.SchedulerLost())
    assert fetches(script.tick(10.0 + SETTLE_S - 0.1)) == []
    assert fetches(script.tick(10.0 + SETTLE_S)) != []


def test_what_was_fetched_without_a_lease_is_reported_when_the_scheduler_is_back() -> None:
    script = Script()
    script.start()
    script.on(ev.SchedulerConnected())
    assert done(0) in script.arrives(None, 0)


def test_a_private_pull_fetches_for_itself_whatever_the_scheduler() -> None:
    script = Script(scheduled=True)
    script.connect(2)
    assert script.start(6, shared=False) == [fetch(index) for index in range(4)]
    assert script.tick(RENEW_S) == []
    assert script.arrives(None, 0) == [write(0), fetch(4)]
    assert script.fails(1) == []


def test_a_verified_blob_leaves_nothing_behind() -> None:
    script = Script()
    script.connect(2)
    script.start()
    script.says(2, share())
    script.tick(SETTLE_S)
    for index in range(4):
        script.arrives(None, index, word=checksum(index))
    script.on(ev.BlobVerified(blob=B))
    leasing = script.machine._leasing
    assert not any([leasing._fetching, leasing._due, leasing._ranked, leasing._granted])
