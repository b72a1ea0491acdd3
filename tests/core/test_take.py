# SPDX-License-Identifier: Apache-2.0
"""Taking chunks: which grant is used for what, and what happens to chunks that do not come."""

from __future__ import annotations

from collections import Counter

import pytest

from p2pdist.core import events as ev
from p2pdist.core.chunkmap import MAX_CHUNK_BYTES
from p2pdist.core.peerbook import MOVED_BYTES
from p2pdist.core.reputation import BAN_S, Offence
from p2pdist.core.serve import GRANT_TIMEOUT_S
from p2pdist.core.state import PullSettings
from p2pdist.core.take import (
    BACKLOG,
    CROWD,
    DEADLINE_FACTOR,
    DEADLINE_S,
    FETCH_ROOM,
    FIRST_SILENT_S,
    HUNGRY_S,
    KEPT_S,
    LOOK_S,
    MAX_LATE,
    MIN_DEADLINE_S,
    REFUSALS,
    SILENT_FACTOR,
    SILENT_S,
    STALLED_S,
)
from p2pdist.core.wire import Cancel, Decline, Grant, Lease, Refuse, Room, Unshare
from p2pdist.errors import RemoteProtocolError
from tests.script import B, Script, fetch, have, send, share, take, write
from tests.strategies import CHUNK, digest, peer


def pulling(*holders: int, chunks: int = 4, downloads: int = 6, seed: int = 0, download_bytes_per_s: int = 0) -> Script:
    """An agent that pulls B with a scheduler, and peers that have all of it."""
    script = Script(scheduled=True, downloads=downloads, seed=seed, download_bytes_per_s=download_bytes_per_s)
    script.connect(*holders)
    script.start(chunks)
    for number in holders:
        script.says(number, share(range(chunks), size=chunks * share().size_bytes // 4))
    return script


def test_a_grant_is_used_for_a_chunk_that_the_peer_has() -> None:
    script = Script(scheduled=True)
    script.connect(2)
    script.start()
    script.says(2, share([3]))
    assert script.says(2, Grant(7)) == [take(2, 7, 3)]


def test_a_grant_of_a_peer_that_has_nothing_new_is_declined() -> None:
    script = Script(scheduled=True)
    script.connect(2)
    script.start()
    script.says(2, share([]))
    assert script.says(2, Grant(1)) == [send(2, Decline(1, False))]


def test_a_grant_is_never_given_again_nor_after_a_later_one() -> None:
    script = pulling(2)
    script.says(2, Grant(1))
    with pytest.raises(RemoteProtocolError, match="after grant 1"):
        script.says(2, Grant(1))


def test_a_grant_that_finds_no_room_is_used_when_a_chunk_has_come() -> None:
    script = pulling(2, 3, downloads=1)
    (first,) = script.says(2, Grant(1))
    assert isinstance(first, ev.TakeChunk)
    assert script.says(3, Grant(1)) == []
    (used,) = [command for command in script.arrives(2, first.index, grant=1) if isinstance(command, ev.TakeChunk)]
    assert (used.peer, used.number) == (peer(3), 1)
    assert used.index != first.index


def test_while_one_waits_for_room_others_are_declined_and_told_when_there_is_some() -> None:
    script = pulling(2, 3, 4, downloads=1)
    (first,) = script.says(2, Grant(1))
    script.says(3, Grant(1))
    assert script.says(4, Grant(1)) == [send(4, Decline(1, True))]
    (used,) = [command for command in script.arrives(2, first.index, grant=1) if isinstance(command, ev.TakeChunk)]
    out = script.arrives(3, used.index, grant=1)
    assert [command for command in out if command == send(4, Room())] == [send(4, Room())]


def test_a_grant_does_not_wait_for_room_longer_than_its_giver_waits_for_an_answer() -> None:
    script = pulling(2, 3, downloads=1)
    script.says(2, Grant(1))
    script.says(3, Grant(1))
    assert send(3, Decline(1, True)) not in script.tick(KEPT_S - 0.1)
    assert send(3, Decline(1, True)) in script.tick(KEPT_S)
    assert KEPT_S < GRANT_TIMEOUT_S


def test_a_grant_whose_giver_has_gone_or_has_nothing_for_us_does_not_wait_for_room() -> None:
    script = pulling(2, 3, downloads=1)
    (first,) = script.says(2, Grant(1))
    script.connect(4)
    script.says(4, share([first.index]))
    assert script.says(4, Grant(1)) == [send(4, Decline(1, True))]
    script.says(3, Grant(1))
    script.on(ev.PeerLost(peer=peer(3)))
    out = script.arrives(2, first.index, grant=1)
    assert not [command for command in out if isinstance(command, ev.TakeChunk)]


def test_room_is_told_only_to_a_peer_that_has_something_for_us() -> None:
    script = Script(scheduled=True, downloads=1)
    script.connect(2, 3)
    script.start()
    script.says(2, share([0]))
    script.says(3, share([0]))
    script.says(2, Grant(1))
    script.says(3, Grant(1))
    assert send(3, Room()) not in script.arrives(2, 0, grant=1)


def test_an_agent_that_fetches_from_the_origin_takes_less_from_peers() -> None:
    script = pulling(2, downloads=FETCH_ROOM + 1)
    assert script.ordered(Lease(B, 3, 1000)) == [fetch(3)]
    assert isinstance(script.says(2, Grant(1))[0], ev.TakeChunk)
    assert script.says(2, Grant(2), Grant(3)) == [send(2, Decline(3, True))]


def test_an_agent_that_has_little_on_its_way_says_so_to_holders_while_it_lacks_much() -> None:
    script = pulling(2, 3, chunks=20, downloads=6)
    rooms = [command for command in script.tick(1.0) if command == send(int(command.peer, 16), Room())]
    assert len(rooms) == 2
    assert send(2, Room()) not in script.tick(1.0 + HUNGRY_S / 2)
    for number in range(3):
        script.says(2, Grant(number + 1))
    assert send(3, Room()) not in script.tick(2.0)


def test_the_first_chunk_that_a_reader_waits_for_comes_before_another_blobs_window() -> None:
    script = pulling(2, chunks=4)
    script.start(4, blob=digest(2))
    script.says(2, share(range(4), blob=digest(2)))
    script.on(ev.HeadMoved(blob=B, reader=1, index=1))
    script.on(ev.HeadMoved(blob=digest(2), reader=1, index=0))
    assert script.says(2, Grant(1)) == [take(2, 1, 0, blob=digest(2))]
    (other,) = script.says(2, Grant(2))
    assert isinstance(other, ev.TakeChunk)
    assert other.blob == B


def test_chunks_in_the_window_of_a_reader_come_first_then_the_rarest() -> None:
    picks = Counter[int]()
    for seed in range(40):
        script = Script(scheduled=True, seed=seed)
        script.connect(2, 3)
        script.start(100)
        size = 100 * share().size_bytes // 4
        script.says(2, share(range(100), size=size))
        script.says(3, share([*range(60), *range(61, 100)], size=size))
        (rarest,) = script.says(2, Grant(1))
        assert rarest == take(2, 1, 60)
        script.on(ev.HeadMoved(blob=B, reader=1, index=30))
        (urgent,) = script.says(2, Grant(2))
        assert isinstance(urgent, ev.TakeChunk)
        picks[urgent.index] += 1
    assert set(picks) == set(range(30, 36))


def test_in_a_crowd_what_one_neighbour_alone_has_comes_before_a_window_the_newest_first() -> None:
    script = in_a_crowd()
    script.says(2, have(50, 60))
    assert script.says(2, Grant(1), Grant(2)) == [take(2, 1, 60), take(2, 2, 50)]


def test_of_many_chunks_that_one_neighbour_alone_has_any_is_taken() -> None:
    several = range(50, 50 + BACKLOG)
    taken = set()
    for seed in range(40):
        script = in_a_crowd(seed)
        script.says(2, have(*several))
        taken.update(script.says(2, Grant(1)))
    assert taken == {take(2, 1, index) for index in several}


def test_without_a_crowd_the_window_comes_first() -> None:
    script = in_a_crowd()
    script.says(2, have(70))
    script.on(ev.PeerLost(peer=peer(3)))
    (urgent,) = script.says(2, Grant(3))
    assert isinstance(urgent, ev.TakeChunk)
    assert 10 <= urgent.index < 16


def in_a_crowd(seed: int = 0) -> Script:
    """An agent that wants 100 chunks, of which its many neighbours have 40, and reads at the tenth."""
    crowd, script = range(2, 2 + CROWD), Script(scheduled=True, seed=seed)
    script.connect(*crowd)
    script.start(100)
    script.on(ev.HeadMoved(blob=B, reader=1, index=10))
    for number in crowd:
        script.says(number, share(range(40), size=25 * share().size_bytes))
    return script


def test_of_several_blobs_the_rarest_chunk_of_all_is_taken_and_equals_go_to_the_first() -> None:
    script = Script(scheduled=True)
    script.connect(2, 3)
    size = share().size_bytes // 4
    for number, holders in ((1, (2, 3)), (2, (2,)), (3, (2,))):
        script.start(1, blob=digest(number))
        for holder in holders:
            script.says(holder, share([0], size=size, blob=digest(number)))
    taken = [take(2, 1, 0, digest(2)), take(2, 2, 0, digest(3)), take(2, 3, 0, digest(1))]
    assert script.says(2, Grant(1), Grant(2), Grant(3)) == taken


def test_what_is_on_its_way_is_taken_a_second_time_only_when_it_takes_long() -> None:
    script = pulling(2, 3, chunks=1)
    assert script.says(2, Grant(1)) == [take(2, 1, 0)]
    assert script.says(3, Grant(1)) == [send(3, Decline(1, False))]
    script.now = 1.1
    assert script.says(2, Grant(2)) == [send(2, Decline(2, False))]
    assert script.says(3, Grant(2)) == [take(3, 2, 0)]
    script.connect(4)
    script.says(4, share([0], size=share().size_bytes // 4))
    script.now = 2.9
    assert script.says(4, Grant(1)) == [send(4, Decline(1, False))]


def test_the_other_copies_are_called_off_when_a_chunk_is_here() -> None:
    script = pulling(2, 3, chunks=2)
    (first,) = script.says(2, Grant(1))
    assert isinstance(first, ev.TakeChunk)
    script.says(2, Grant(2))
    script.now = 1.1
    assert script.says(3, Grant(1)) == [take(3, 1, first.index)]
    assert send(2, Cancel(1)) in script.arrives(3, first.index, grant=1)
    assert list(script.machine.book.peers[peer(2)].downloads) == [2]


# ------------------------------------------------------------ late, refused, lost


def late() -> tuple[Script, int]:
    """Peer 2 has sent one of two chunks and lets the other, by grant 2, go late; peer 3 has both."""
    script = pulling(2, 3, chunks=2)
    (first,) = script.says(2, Grant(1))
    assert isinstance(first, ev.TakeChunk)
    script.now = 0.1
    script.arrives(2, first.index, grant=1)
    assert script.says(2, Grant(2))[-1] == take(2, 2, 1 - first.index)
    return script, 1 - first.index


def test_a_late_chunk_is_looked_for_elsewhere_and_its_first_holders_are_called() -> None:
    script, index = late()
    script.tick(2.05)
    assert not script.machine.counters.late_chunks
    assert send(3, Room()) in script.tick(2.1)
    assert script.machine.counters.late_chunks == 1
    assert script.says(3, Grant(1)) == [take(3, 1, index)]


def test_a_late_chunk_that_comes_after_all_is_welcome() -> None:
    script, index = late()
    script.tick(2.1)
    script.says(3, Grant(1))
    out = script.arrives(2, index, grant=2)
    assert out[0] == write(index)
    assert send(3, Cancel(1)) in out
    assert not script.machine.blobs[B].late


def test_a_late_copy_is_called_off_when_the_chunk_came_from_another() -> None:
    script, index = late()
    script.tick(2.1)
    script.says(3, Grant(1))
    assert send(2, Cancel(2)) in script.arrives(3, index, grant=1)
    assert not script.machine.blobs[B].late


def test_the_deadline_follows_what_chunks_take_lately() -> None:
    script = pulling(2)
    known = script.machine.book.peers[peer(2)]
    script.says(2, Grant(1))
    script.now = 0.1
    script.arrives(2, known.downloads[1].index, grant=1)
    script.says(2, Grant(2))
    script.tick(0.1 + MIN_DEADLINE_S - 0.01)
    assert not known.downloads[2].late
    script.tick(0.1 + MIN_DEADLINE_S)
    assert known.downloads[2].late
    script.machine.state.chunk_s = 1.0
    script.says(2, Grant(3))
    began = script.now
    script.tick(began + DEADLINE_FACTOR - 0.01)
    assert not known.downloads[3].late
    script.tick(began + DEADLINE_FACTOR)
    assert known.downloads[3].late


def ticks(script: Script, at: float, **received: int) -> list[ev.Command]:
    """Let time pass while it is known what came on the links, `p2` for that of peer 2."""
    return script.on(ev.Ticked(received={peer(int(key[1:])): count for key, count in received.items()}), at)


def test_a_peer_that_sends_nothing_loses_its_slot_as_soon_as_others_would_have_sent_several() -> None:
    script = pulling(2, 3)
    script.machine.state.chunk_s = 0.5
    script.says(2, Grant(1))
    script.says(3, Grant(1))
    two, three = (script.machine.book.peers[peer(number)].downloads[1] for number in (2, 3))
    assert script.machine.awaited(SILENT_S) == [peer(2), peer(3)]
    ticks(script, SILENT_FACTOR * 0.5 - 0.01, p2=0, p3=MOVED_BYTES)
    assert not two.late
    ticks(script, SILENT_FACTOR * 0.5, p2=MOVED_BYTES - 1, p3=2 * MOVED_BYTES)
    assert two.late
    assert not three.late
    ticks(script, DEADLINE_FACTOR * 0.5, p2=0, p3=3 * MOVED_BYTES)
    assert three.late


def test_before_the_first_chunk_has_come_from_anywhere_silence_counts_sooner_than_slowness() -> None:
    script = pulling(2, 3)
    script.says(2, Grant(1))
    script.says(3, Grant(1))
    ticks(script, FIRST_SILENT_S, p3=MOVED_BYTES)
    assert [script.machine.book.peers[peer(number)].downloads[1].late for number in (2, 3)] == [True, False]


def test_bytes_of_chunks_that_came_before_are_no_sign_of_life() -> None:
    script = pulling(2)
    known = script.machine.book.peers[peer(2)]
    script.says(2, Grant(1))
    script.arrives(2, known.downloads[1].index, grant=1)
    script.says(2, Grant(2))
    script.now = 0.1
    script.machine.state.chunk_s = 0.5
    ticks(script, SILENT_FACTOR * 0.5, p2=CHUNK)
    assert known.downloads[2].late


def test_who_has_sent_nothing_for_long_is_sent_away_and_who_sends_a_little_is_not() -> None:
    script = pulling(2, 3)
    for number in (2, 3):
        script.says(number, Grant(1))
    out: list[ev.Command] = []
    for second in range(1, int(STALLED_S) + 8):
        out += ticks(script, float(second), p2=second, p3=second * MOVED_BYTES)
    drops = [command for command in out if isinstance(command, ev.DropPeer)]
    assert [(drop.peer, drop.offence) for drop in drops] == [(peer(2), Offence.STALLED)]


def test_a_stranger_is_let_send_two_chunks_at_a_time_and_a_known_peer_four_late_ones_too() -> None:
    script = pulling(2, chunks=20, downloads=20)
    script.machine.tune(PullSettings())
    known = script.machine.book.peers[peer(2)]
    for number in range(1, 6):
        script.says(2, Grant(number))
    assert len(known.downloads) == PullSettings().stranger_chunks
    script.tick(MIN_DEADLINE_S * 5)
    assert script.says(2, Grant(6)) == [send(2, Decline(6, True))]
    script.arrives(2, known.downloads[1].index, grant=1)
    for number in range(7, 12):
        script.says(2, Grant(number))
    assert len(known.downloads) == PullSettings().peer_chunks


def test_late_chunks_are_bounded_over_all_peers() -> None:
    numbers = range(2, 2 + MAX_LATE + 4)
    script = pulling(*numbers, chunks=100, downloads=100)
    for number in numbers:
        script.says(number, Grant(1))
    out = script.tick(DEADLINE_S)
    late = [known for known in script.machine.book.peers.values() if known.downloads]
    assert len(late) == MAX_LATE
    assert sum(isinstance(command, ev.Send) and isinstance(command.message, Cancel) for command in out) == 4
    assert script.machine._taking._downloads == 0


def test_who_announces_and_refuses_again_and_again_is_sent_away() -> None:
    script = pulling(2, 3, chunks=2)
    drops: list[ev.Command] = []
    for number in range(1, 3 * REFUSALS):
        script.says(2, have(0), Grant(number), Refuse(number))
        drops += [command for command in script.tick(0.01 * number) if isinstance(command, ev.DropPeer)]
        if drops:
            break
    assert [(drop.peer, drop.offence) for drop in drops] == [(peer(2), Offence.ABSENT)]  # type: ignore[union-attr]
    assert REFUSALS < number <= 2 * REFUSALS + 2


def test_a_peer_that_lets_four_chunks_in_a_row_go_late_is_dropped() -> None:
    script = pulling(2, 3)
    for number in range(1, 5):
        script.says(2, Grant(number))
    out = script.tick(DEADLINE_S)
    drops = [command for command in out if isinstance(command, ev.DropPeer)]
    assert [(drop.peer, drop.ban_s) for drop in drops] == [(peer(2), BAN_S)]
    assert script.machine.book.is_banned(peer(2), DEADLINE_S)


def test_a_chunk_that_comes_makes_up_for_those_that_were_late() -> None:
    script = pulling(2, 3)
    for number in range(1, 4):
        script.says(2, Grant(number))
    script.tick(DEADLINE_S)
    script.arrives(2, script.machine.book.peers[peer(2)].downloads[1].index, grant=1)
    assert script.machine.book.peers[peer(2)].failures == 0


def test_a_refused_chunk_is_taken_for_gone_and_looked_for_elsewhere() -> None:
    script = pulling(2, 3, chunks=1)
    script.says(2, Grant(1))
    assert script.says(2, Refuse(1)) == [send(3, Room())]
    assert script.machine.blobs[B].holders == [1]
    assert script.says(2, Grant(2)) == [send(2, Decline(2, False))]
    assert script.says(3, Grant(1)) == [take(3, 1, 0)]


def test_a_have_after_a_refusal_brings_the_chunk_back() -> None:
    script = pulling(2, chunks=1)
    script.says(2, Grant(1), Refuse(1), have(0))
    assert script.machine.blobs[B].holders == [1]
    assert script.says(2, Grant(2)) == [take(2, 2, 0)]


def test_a_refusal_by_a_peer_that_has_left_the_swarm_frees_the_chunk() -> None:
    script = pulling(2, chunks=1)
    script.says(2, Grant(1), Unshare(B))
    assert script.says(2, Refuse(1)) == []
    assert not script.machine.blobs[B].inflight


def test_a_refusal_of_what_nobody_took_says_nothing() -> None:
    script = pulling(2)
    assert script.says(2, Refuse(5)) == []
    script.says(2, Grant(1))
    script.on(ev.PullCancelled(blob=B))
    assert script.says(2, Refuse(1)) == []


def test_a_lost_peers_chunks_are_looked_for_elsewhere() -> None:
    script = pulling(2, 3, chunks=1, downloads=1)
    script.says(2, Grant(1))
    script.says(3, Grant(1))
    assert script.on(ev.PeerLost(peer=peer(2))) == [send(3, Room())] * 2
    assert script.says(3, Grant(2)) == [take(3, 2, 0)]


def test_a_lost_peer_that_waited_for_room_is_not_told_of_it() -> None:
    script = pulling(2, 3, downloads=1)
    (first,) = script.says(2, Grant(1))
    assert isinstance(first, ev.TakeChunk)
    script.says(3, Grant(1))
    script.on(ev.PeerLost(peer=peer(3)))
    assert not [command for command in script.arrives(2, first.index, grant=1) if command == send(3, Room())]


def test_only_holders_from_which_nothing_is_on_its_way_are_called_and_no_more_than_two() -> None:
    called = Counter[str]()
    for seed in range(60):
        script = pulling(2, 3, 4, 5, 6, chunks=2, seed=seed)
        script.says(2, Grant(1))
        script.says(3, Grant(1))
        rooms = [
            command.peer for command in script.says(2, Refuse(1)) if command == send(int(command.peer, 16), Room())
        ]
        assert len(set(rooms)) == 2
        called.update(rooms)
    # Number 2 itself may only be called for what it still has, which this is not.
    assert set(called) == {peer(4), peer(5), peer(6)}


# ---------------------------------------------------------------- cancelling


def test_a_cancelled_pull_calls_off_its_chunks_and_makes_room_for_others() -> None:
    script = pulling(2, 3, chunks=1, downloads=1)
    script.start(1, blob=digest(2))
    script.says(3, share([0], size=share().size_bytes // 4, blob=digest(2)))
    script.says(2, Grant(1))
    script.says(3, Grant(1))
    out = script.on(ev.PullCancelled(blob=B))
    assert send(2, Cancel(1)) in out
    assert take(3, 1, 0, digest(2)) in out


def test_a_late_chunk_of_a_cancelled_pull_is_forgotten_too() -> None:
    script = pulling(2, chunks=1)
    script.says(2, Grant(1))
    script.tick(DEADLINE_S)
    assert send(2, Cancel(1)) in script.on(ev.PullCancelled(blob=B))
    assert not script.machine.book.peers[peer(2)].downloads


# -------------------------------------------------------------------- limit

RATE = 4 * CHUNK
BURST = MAX_CHUNK_BYTES + LOOK_S * RATE


def test_with_a_limit_chunks_are_taken_at_its_rate_and_the_origin_is_left_alone() -> None:
    script = pulling(2, 3, chunks=400, download_bytes_per_s=RATE)
    taken, declined = 0, 0
    for step in range(300):
        script.now = step / 10
        out = script.tick(script.now)
        assert not [command for command in out if isinstance(command, ev.FetchOrigin)]
        for number in (2, 3):
            answer = script.says(number, Grant(step + 1))[-1]
            if isinstance(answer, ev.TakeChunk):
                taken += CHUNK
                script.arrives(number, answer.index, grant=step + 1)
            else:
                assert answer == send(number, Decline(step + 1, True))
                declined += 1
        assert taken <= RATE * script.now + BURST
    assert taken >= RATE * script.now
    assert declined


def test_who_was_declined_because_of_the_limit_is_told_when_it_allows_more() -> None:
    script = pulling(2, chunks=40, download_bytes_per_s=RATE)
    number, answer = 0, None
    while answer is None or isinstance(answer, ev.TakeChunk):
        number += 1
        answer = script.says(2, Grant(number))[-1]
        if isinstance(answer, ev.TakeChunk):
            script.arrives(2, answer.index, grant=number)
    assert send(2, Room()) not in script.tick(0.01)
    assert send(2, Room()) in script.tick(1.0)


def test_without_a_limit_nothing_is_measured() -> None:
    script = pulling(2, chunks=40, downloads=40)
    for number in range(1, 41):
        assert isinstance(script.says(2, Grant(number))[0], ev.TakeChunk)
