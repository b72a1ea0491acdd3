# SPDX-License-Identifier: Apache-2.0
"""Upload slots: who gets one, and that each comes back."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from p2pdist.core import events as ev
from p2pdist.core.peerbook import Peer, Upload
from p2pdist.core.reputation import Offence
from p2pdist.core.serve import (
    FIRST_GAINS,
    GRANT_TIMEOUT_S,
    MAX_PARK_S,
    PARK_S,
    SLOW_FACTOR,
    SLOW_S,
    UPLOAD_TIMEOUT_S,
    choose,
)
from p2pdist.core.way_out import PROOFS
from p2pdist.core.wire import Cancel, Decline, Grant, Refuse, Room, Take
from tests.script import CHUNK, B, Script, have, send, share
from tests.strategies import digest, peer


def grants(out: list[ev.Command]) -> list[tuple[int, int]]:
    """The peers and numbers of the grants among these commands."""
    return [
        (int(command.peer, 16), command.message.number)
        for command in out
        if isinstance(command, ev.Send) and isinstance(command.message, Grant)
    ]


def seeding(*wanting: int, chunks: int = 4, slots: int = 4) -> tuple[Script, list[ev.Command]]:
    """An agent that has all of B, and peers that want it; and what it said to them."""
    script, out = Script(upload_slots=slots).seeding(chunks), []
    script.connect(*wanting)
    for number in wanting:
        out += script.says(number, share([], size=chunks * CHUNK))
    return script, out


def sent(script: Script, number: int, grant: int) -> list[ev.Command]:
    return script.on(ev.ChunkSent(peer=peer(number), number=grant))


def test_a_peer_that_wants_what_we_have_gets_grants_no_more_than_two_at_a_time() -> None:
    script, out = seeding(2)
    assert grants(out) == [(2, 1), (2, 2)]
    assert script.machine.busy


def test_never_more_slots_are_in_use_than_there_are() -> None:
    script, out = seeding(2, 3, 4, slots=3)
    assert len(grants(out)) == 3
    peers = script.machine.book.peers.values()
    assert sum(len(known.uploads) for known in peers) == 3
    assert {len(known.uploads) for known in peers} <= {0, 1, 2}


def test_a_peer_is_granted_no_more_than_it_lacks() -> None:
    script, out = seeding(2, chunks=1)
    assert grants(out) == [(2, 1)]
    assert grants(script.tick(0.1)) == []


def test_a_taken_chunk_is_sent_and_its_slot_used_again_when_it_has_left() -> None:
    script, _ = seeding(2)
    assert script.says(2, Take(1, B, 3)) == [ev.SendChunk(peer=peer(2), number=1, blob=B, index=3)]
    assert grants(sent(script, 2, 1)) == [(2, 3)]
    assert script.machine.counters.to_peers == script.machine.book.peers[peer(2)].up_bytes == CHUNK


def test_all_slots_come_back_when_the_peer_has_everything() -> None:
    script, _ = seeding(2, chunks=2)
    script.says(2, Take(1, B, 0), Take(2, B, 1))
    sent(script, 2, 1)
    script.says(2, have(0, 1))
    assert grants(sent(script, 2, 2)) == []
    script.says(2, Decline(3, False))
    assert not script.machine.busy
    assert script.tick(10.0) == []


def test_a_peer_that_declines_for_want_of_anything_new_is_passed_over_until_we_gain_what_it_lacks() -> None:
    script, _ = seeding(2)
    assert script.says(2, Decline(1, False), Decline(2, False)) == []
    assert grants(script.tick(PARK_S - 0.1)) == []
    script.machine.state.gains += 1
    assert grants(script.tick(PARK_S - 0.1)) == []
    script.machine.blobs[B].offered |= 1 << 4
    assert len(grants(script.tick(PARK_S - 0.1))) == 1


@pytest.mark.parametrize("full", [False, True])
def test_a_peer_that_declined_is_asked_again_after_a_while(full: bool) -> None:
    script, _ = seeding(2)
    script.says(2, Decline(1, full), Decline(2, full))
    script.machine.state.gains += full
    assert grants(script.tick(PARK_S - 0.1)) == []
    assert len(grants(script.tick(PARK_S + 0.1))) == 2


def test_room_ends_the_wait_at_once() -> None:
    script, _ = seeding(2)
    script.says(2, Decline(1, True), Decline(2, True))
    assert grants(script.says(2, Room())) == [(2, 3), (2, 4)]


def test_a_grant_that_is_not_answered_is_taken_back_and_the_peer_passed_over() -> None:
    script, _ = seeding(2)
    script.tick(GRANT_TIMEOUT_S)
    assert script.machine.busy
    assert grants(script.tick(GRANT_TIMEOUT_S + 0.1)) == []
    assert not script.machine.busy
    assert len(grants(script.tick(GRANT_TIMEOUT_S + PARK_S + 0.2))) == 2


def test_who_answers_no_grant_is_passed_over_for_longer_each_time_until_it_answers_one() -> None:
    script, _ = seeding(2, slots=1)

    def parked_s() -> float:
        script.tick(script.now + GRANT_TIMEOUT_S + 0.125)
        lapsed_at = script.now
        while not grants(script.tick(script.now + 0.5)):
            assert script.now - lapsed_at <= MAX_PARK_S
        return script.now - lapsed_at

    parked = [parked_s() for _ in range(7)]
    assert parked == [PARK_S, 2 * PARK_S, 4 * PARK_S, 8 * PARK_S, 16 * PARK_S, MAX_PARK_S, MAX_PARK_S]
    assert grants(script.says(2, Decline(8, True), Room())) == [(2, 9)]
    assert parked_s() == PARK_S


def leave(script: Script, chunks: int, each_s: float, *, gained: int) -> list[int]:
    """Let chunks leave, one grant at a time, while the peer gains so many others; return the slots in use meanwhile."""
    used = []
    for _ in range(chunks):
        known = script.machine.book.peers[peer(2)]
        number = next(number for number, upload in known.uploads.items() if upload.blob is None)
        script.says(2, Take(number, B, chunks + len(used)))
        script.machine.state.peers_gained += gained
        script.now += each_s
        sent(script, 2, number)
        used.append(script.machine._giving.slots_used)
    return used


@pytest.mark.parametrize(
    ("each_s", "gained", "slots"),
    [
        pytest.param(1.0, 10, 1, id="slow"),
        pytest.param(0.5, 10, 2, id="not so slow"),
        pytest.param(0.2, 10, 2, id="fast"),
        pytest.param(1.0, 1, 2, id="slow among its like"),
    ],
)
def test_who_sends_much_slower_than_peers_gain_gives_fewer_chunks_at_a_time(
    each_s: float, gained: int, slots: int
) -> None:
    script, _ = seeding(2, chunks=500)
    assert leave(script, 20, each_s, gained=gained)[-1] == slots


def test_a_way_out_that_is_known_to_be_slow_is_not_filled_until_chunks_show_it() -> None:
    script, _ = seeding(2, chunks=500)
    script.machine.hold_to(CHUNK // 2)
    assert leave(script, 4, 0.0, gained=0)[-1] == 1
    script.machine.hold_to(0)
    assert leave(script, 4, 0.0, gained=0)[-1] == 2


def test_a_way_out_that_was_slow_stays_so_while_all_wait_for_it() -> None:
    script, _ = seeding(2, chunks=500)
    leave(script, 10, 1.0, gained=10)
    assert leave(script, 8, 1.0, gained=0)[-1] == 1
    assert leave(script, 80, 1.0, gained=0)[-1] == 2


def test_chunks_that_were_called_off_do_not_make_the_way_out_look_fast() -> None:
    script, _ = seeding(2, chunks=500)
    leave(script, 10, 1.0, gained=10)
    slow_s = script.machine.state.slow_s
    for _ in range(8):
        known = script.machine.book.peers[peer(2)]
        number = next(number for number, upload in known.uploads.items() if upload.blob is None)
        script.says(2, Take(number, B, 400), Cancel(number))
        sent(script, 2, number)
    assert script.machine.state.slow_s == slow_s == 1.0


def test_a_slot_whose_reader_is_slow_goes_to_another_and_the_reader_waits_until_it_has_its_chunk() -> None:
    script, _ = seeding(2, chunks=2, slots=1)
    script.connect(3)
    script.says(3, share(size=2 * CHUNK, reply=False))
    script.says(2, Take(1, B, 0))
    assert grants(script.tick(SLOW_S)) == []
    assert grants(script.tick(SLOW_S + 0.1)) == [(3, 1)]
    script.says(3, have(0, 1), Decline(1, False))
    assert grants(script.tick(SLOW_S + 5)) == []
    assert grants(sent(script, 2, 1)) == [(2, 2)]


def test_where_all_are_slow_nobody_is() -> None:
    script, _ = seeding(2, chunks=4)
    script.machine._giving._usual_s = 3.0
    script.says(2, Take(1, B, 0))
    script.tick(3.0 * SLOW_FACTOR)
    assert not script.machine.book.peers[peer(2)].clogged
    script.tick(3.0 * SLOW_FACTOR + 0.1)
    assert script.machine.book.peers[peer(2)].clogged


def test_who_never_reads_its_chunk_is_sent_away() -> None:
    script, _ = seeding(2, chunks=1)
    script.says(2, Take(1, B, 0))
    script.tick(SLOW_S + 0.1)
    script.tick(UPLOAD_TIMEOUT_S)
    out = script.tick(UPLOAD_TIMEOUT_S + 0.1)
    assert [command.offence for command in out if isinstance(command, ev.DropPeer)] == [Offence.SLOW_READER]


def test_a_lost_peers_slots_go_to_others() -> None:
    script, out = seeding(2, 3, slots=2)
    assert sorted(number for number, _ in grants(out)) in ([2, 2], [2, 3])
    assert all(number == 3 for number, _ in grants(script.on(ev.PeerLost(peer=peer(2)))))
    assert sum(len(known.uploads) for known in script.machine.book.peers.values()) == 2


def test_a_chunk_that_is_not_ours_to_give_is_refused_and_its_slot_free() -> None:
    script, _ = seeding(2)
    assert script.says(2, Take(1, B, 9))[0] == send(2, Refuse(1))
    assert script.says(2, Take(2, digest(9), 0))[0] == send(2, Refuse(2))


def test_a_take_for_a_lapsed_grant_is_refused_but_the_chunk_stays_known() -> None:
    script, _ = seeding(2)
    script.tick(GRANT_TIMEOUT_S + 0.1)
    assert script.says(2, Take(1, B, 3)) == [send(2, Refuse(1)), send(2, have(3))]
    assert script.says(2, Take(1, B, 9)) == [send(2, Refuse(1))]


def test_one_grant_is_good_for_one_chunk() -> None:
    script, _ = seeding(2)
    script.says(2, Take(1, B, 3))
    assert script.says(2, Take(1, B, 2))[0] == send(2, Refuse(1))
    assert script.says(2, Take(1, B, 9)) == [send(2, Refuse(1))]
    assert len(script.machine.book.peers[peer(2)].uploads) == 2


def test_a_peer_may_call_off_its_chunk() -> None:
    script, _ = seeding(2)
    script.says(2, Take(1, B, 3))
    assert script.says(2, Cancel(1)) == [ev.CancelSend(peer=peer(2), number=1)]


def starting(*wanting: int, gained: int = 1) -> tuple[Script, list[ev.Command]]:
    """An agent that pulls B, has so many of its 40 chunks, and whose peers have all taken chunk 0."""
    script = Script(upload_slots=6)
    script.machine._giving.way_out._proofs, script.machine.state.sent_at = PROOFS, script.now
    script.connect(*wanting)
    script.start(40, have=range(gained))
    for number in wanting:
        script.says(number, share([], size=40 * CHUNK))
    return script, [command for number in wanting for command in script.says(number, Take(1, B, 0))]


def chunk_to(number: int) -> ev.SendChunk:
    return ev.SendChunk(peer=peer(number), number=1, blob=B, index=0)


def test_copies_of_the_first_chunks_leave_one_after_the_other_in_the_order_taken() -> None:
    script, out = starting(2, 3, 4)
    assert out == [chunk_to(2)]
    assert chunk_to(3) in sent(script, 2, 1)
    assert chunk_to(4) in sent(script, 3, 1)


def test_who_has_many_chunks_sends_as_many_at_a_time_as_there_are_slots() -> None:
    assert starting(2, 3, 4, gained=FIRST_GAINS)[1] == [chunk_to(2), chunk_to(3)]
    assert starting(2, 3, 4, gained=2 * FIRST_GAINS)[1] == [chunk_to(2), chunk_to(3), chunk_to(4)]


def test_a_chunk_that_is_called_off_in_the_line_is_refused_and_never_sent() -> None:
    script, _ = starting(2, 3, 4)
    assert script.says(3, Cancel(1))[0] == send(3, Refuse(1))
    assert chunk_to(4) in sent(script, 2, 1)


def test_who_is_lost_holds_nobody_up_and_who_comes_back_finds_nothing_in_the_line() -> None:
    script, _ = starting(2, 3, 4)
    script.on(ev.PeerConnected(peer=peer(3)))
    assert chunk_to(4) in script.on(ev.PeerLost(peer=peer(2)))


def test_what_has_left_of_a_blob_that_is_gone_is_not_counted() -> None:
    script, _ = seeding(2, chunks=1)
    script.says(2, Take(1, B, 0))
    script.on(ev.BlobEvicted(blob=B))
    assert sent(script, 2, 1) == []
    assert script.machine.counters.to_peers == 0
    assert not script.machine.busy


def test_private_content_is_neither_granted_nor_given() -> None:
    script = Script()
    script.start(1, shared=False)
    script.arrives(None, 0)
    script.on(ev.BlobVerified(blob=B))
    script.connect(2)
    assert script.says(2, share([], size=CHUNK)) == []
    assert script.says(2, Take(1, B, 0)) == [send(2, Refuse(1))]


def test_a_peer_without_a_grant_comes_before_one_that_has_some() -> None:
    known, fresh = Peer(peer(2)), Peer(peer(3))
    known.uploads[1] = Upload(0.0)

    def always(expected: Peer | None, **lacks: int) -> bool:
        needs = {known.peer_id: lacks["known"], fresh.peer_id: lacks["fresh"]}
        return all(
            choose([known, fresh], lambda each: needs[each.peer_id], Random(seed)) is expected for seed in range(20)
        )

    assert always(fresh, known=9, fresh=1)
    assert always(known, known=9, fresh=0)
    assert always(None, known=0, fresh=0)


def test_the_needier_of_two_drawn_at_random_is_served() -> None:
    rng, draws = Random(7), 9000
    peers = [Peer(peer(lacks)) for lacks in (1, 2, 3)]
    counts: Counter[int] = Counter()
    for _ in range(draws):
        chosen = choose([*peers], lambda each: int(each.peer_id, 16), rng)
        assert chosen is not None
        counts[int(chosen.peer_id, 16)] += 1
    # Of nine equally likely pairs, five have the neediest in them, three the second, and one neither.
    for lacks, share_of in ((3, 5 / 9), (2, 3 / 9), (1, 1 / 9)):
        assert abs(counts[lacks] - draws * share_of) < 4 * (draws * share_of * (1 - share_of)) ** 0.5
