# SPDX-License-Identifier: Apache-2.0
"""One machine that was misled: what the scheduler takes back, what it is asked to read again, claims without grants."""

from __future__ import annotations

from p2pdist.core import events as ev
from p2pdist.core import wire
from p2pdist.core.hearing import MUTE_S, WITHDRAWN_MAX
from p2pdist.core.packing import pack_indices
from p2pdist.core.reputation import Offence
from p2pdist.core.wire import Grant, Lease
from tests.script import (
    CHUNKS,
    VERIFIED,
    B,
    Script,
    checksums,
    done,
    drops,
    fetches,
    scheduled,
    send,
    share,
    takes,
    tell,
)
from tests.strategies import CHUNK, checksum, digest, peer


def withdrawn(*indices: int, by: int = 2) -> wire.Withdrawn:
    return wire.Withdrawn(B, pack_indices(indices), peer(by))


def misled() -> Script:
    """An agent that has all, of which chunks 0 and 1 are wrong: the scheduler said so, and peers 2 and 3 as well."""
    script = scheduled(2, 3)
    script.ordered(checksums(*range(CHUNKS), wrong=[0, 1]))
    for number in (2, 3):
        script.says(number, share(range(CHUNKS), wrong=[0, 1]))
    for index in range(CHUNKS):
        script.says(3, Grant(index + 1))
        at = script.machine.book.peers[peer(3)].downloads[index + 1].index
        script.arrives(3, at, grant=index + 1, word=checksum(at + 1000 if at < 2 else at))
    script.on(ev.BlobRejected(blob=B, indices=[]))
    return script


def test_what_the_scheduler_takes_back_goes_and_nobody_is_believed_to_have_it_who_has_the_same() -> None:
    script = misled()
    out = script.ordered(withdrawn(0, 1))
    assert ev.ForgetChunks(blob=B, indices=[0, 1]) in out
    assert drops(out) == [(2, Offence.FALSE_CHECKSUM)]
    assert script.machine.blobs[B].offered == 0b1100
    assert script.machine.book.peers[peer(3)].shared[B] == 0b1100
    # It says so again: it has not heard yet.
    script.says(3, share(range(CHUNKS), wrong=[0, 1]))
    assert script.machine.book.peers[peer(3)].shared[B] == 0b1100
    script.says(3, share(range(CHUNKS)))
    assert script.machine.book.peers[peer(3)].shared[B] == 0b1111
    # Leased, it is read: what was here proved nothing.
    assert fetches(script.ordered(Lease(B, 0, 15000))) == [0]
    assert done(0) in script.arrives(None, 0)


def test_what_this_agent_has_read_itself_is_not_taken_back() -> None:
    script = misled()
    script.arrives(None, 0)
    script.on(ev.BlobRejected(blob=B, indices=[]))
    out = script.ordered(withdrawn(0, 1))
    assert ev.ForgetChunks(blob=B, indices=[1]) in out
    assert script.machine.blobs[B].vouchers.settled[0] == checksum(0)


def test_while_the_whole_blob_is_checked_it_is_taken_back_only_once_it_proves_wrong() -> None:
    script = misled()
    script.machine.blobs[B].checking = True
    out = script.ordered(withdrawn(0, 1))
    assert not any(isinstance(command, ev.ForgetChunks) for command in out)
    # Nobody hears of these chunks meanwhile, the scheduler neither, who leases them anew.
    assert send(3, share([2, 3])) in out
    assert script.ordered(Lease(B, 0, 15000)) == []
    out = script.on(ev.BlobRejected(blob=B, indices=[]))
    assert ev.ForgetChunks(blob=B, indices=[0, 1]) in out
    assert fetches(out) == [0]
    assert done(0) in script.arrives(None, 0)


def test_what_was_taken_back_while_the_whole_blob_was_checked_stands_where_that_is_right() -> None:
    script = scheduled(2, 3)
    script.ordered(checksums(*range(CHUNKS)))
    script.says(3, share(range(CHUNKS)))
    for number in range(1, CHUNKS + 1):
        script.says(3, Grant(number))
        index = script.machine.book.peers[peer(3)].downloads[number].index
        script.arrives(3, index, grant=number)
    script.ordered(withdrawn(0, 1), Lease(B, 0, 15000))
    out = script.on(VERIFIED)
    assert done(0) in out
    assert script.machine.blobs[B].offered == 0b1111


def test_a_scheduler_cannot_take_back_everything_for_ever() -> None:
    script = misled()
    for number in range(WITHDRAWN_MAX):
        script.ordered(withdrawn(by=100 + number))
    assert script.ordered(withdrawn(0, 1)) == []
    assert script.machine.blobs[B].have == 0b1111


def test_a_chunk_that_proved_wrong_on_its_way_is_not_its_senders_fault() -> None:
    script = scheduled(2, 3)
    script.ordered(checksums(0, wrong=[0]))
    script.says(3, share([0], wrong=[0]), Grant(1))
    script.ordered(checksums(0))
    out = script.arrives(3, 0, grant=1, word=checksum(1000))
    assert drops(out) == []
    assert script.machine.blobs[B].have == 0


def test_who_has_found_out_the_scheduler_and_sends_what_is_right_is_not_banned() -> None:
    script = scheduled(2, 3)
    script.ordered(checksums(*range(CHUNKS), wrong=[0]))
    script.says(3, share([0], wrong=[0]), Grant(1))
    script.says(3, share([0]))
    assert drops(script.arrives(3, 0, grant=1)) == []


def test_who_contradicts_a_liars_words_and_agrees_about_the_rest_is_not_banned() -> None:
    chunks = 16
    size = chunks * CHUNK
    script = Script(scheduled=True)
    script.connect(2, 3)
    script.start(chunks)
    script.ordered(checksums(*range(chunks), wrong=range(5), size=size))
    assert drops(script.says(3, share(range(chunks), size=size))) == []
    assert drops(script.says(2, share(range(chunks), wrong=range(4, chunks), size=size))) == [
        (2, Offence.FALSE_CHECKSUM)
    ]


def test_who_contradicted_the_scheduler_is_asked_again_once_it_corrects_itself() -> None:
    script = misled()
    script.says(3, share(range(CHUNKS), wrong=[1]))
    assert script.machine.book.peers[peer(3)].shared[B] == 0b1110
    out = script.ordered(checksums(0))
    assert send(3, share(range(1, CHUNKS), wrong=[1], reply=False)) in out
    script.says(3, share(range(CHUNKS), wrong=[1]))
    assert script.machine.book.peers[peer(3)].shared[B] == 0b1111


def test_a_chunk_is_read_again_where_the_scheduler_wants_that_and_what_is_known_is_said_at_once() -> None:
    script = misled()
    script.ordered(Lease(B, 2, 15000))
    script.arrives(None, 2)
    assert script.ordered(wire.Reread(B, 2)) == [done(2)]
    assert script.ordered(wire.Reread(B, 0), wire.Reread(digest(7), 0), wire.Reread(B, 99)) == []
    assert script.machine.most_suspect(B, [3, 1, 0]) == 0
    out = script.arrives(None, 0)
    assert tell(wire.Refuted(B, 0, checksum(0))) in out
    assert done(0) in out


def test_a_chunk_that_is_not_complete_yet_is_read_again_at_the_next_tick() -> None:
    script = scheduled(2, 3)
    script.ordered(checksums(0))
    takes(script, 2, 1, 0)
    script.ordered(wire.Reread(B, 0))
    assert fetches(script.tick(0.1)) == [0]
    assert done(0) in script.arrives(None, 0)


# ------------------------------------------------------------ claims without grants


def test_what_a_peer_claims_that_grants_nothing_is_fetched_after_a_moment() -> None:
    script = Script()
    script.connect(2)
    script.says(2, share())
    script.start()
    script.says(2, share(range(CHUNKS), wants=False))
    assert fetches(script.tick(MUTE_S - 0.1)) == []
    assert fetches(script.tick(MUTE_S))
    # Once it grants it is asked again what it has.
    assert send(2, share(reply=False)) in script.says(2, Grant(1))
    script.says(2, share(range(CHUNKS), wants=False))
    assert script.machine.book.peers[peer(2)].shared[B] == 0b1111


def test_what_a_mute_peer_says_again_is_not_believed() -> None:
    script = Script()
    script.connect(2)
    script.start()
    script.says(2, share(range(CHUNKS), wants=False))
    script.tick(MUTE_S)
    script.says(2, share(range(CHUNKS), wants=False))
    assert script.machine.blobs[B].held == 0


def test_a_peer_that_has_granted_is_waited_for() -> None:
    script = Script()
    script.connect(2)
    script.start()
    script.says(2, share(range(CHUNKS), wants=False), Grant(1))
    assert fetches(script.tick(MUTE_S)) == []
