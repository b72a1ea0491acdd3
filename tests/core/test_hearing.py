# SPDX-License-Identifier: Apache-2.0
"""What others say of chunks, and whose word counts; events in, exact commands out."""

from __future__ import annotations

import pytest

from p2pdist.core import events as ev
from p2pdist.core import wire
from p2pdist.core.lease import NEWS_S, holder_of, rank_of
from p2pdist.core.peerbook import MAX_SHARED_BLOBS
from p2pdist.core.wire import Grant, Lease, Room, Unshare
from p2pdist.errors import RemoteProtocolError
from tests.script import (
    CHECK,
    CHUNKS,
    ME,
    B,
    Script,
    banned,
    checksums,
    complete,
    done,
    drop,
    fetch,
    have,
    scheduled,
    send,
    share,
    takes,
    write,
)
from tests.strategies import CHUNK, checksum, digest, peer


def test_the_word_of_the_lease_holder_by_rendezvous_settles_a_checksum() -> None:
    script = Script()
    script.connect(2, 3)
    script.start()
    script.says(2, share())
    script.says(3, share())
    script.tick(NEWS_S)
    swarm = [ME, peer(2), peer(3)]
    for index in range(4):
        script.says(2, have(index))
        assert (index in script.machine.blobs[B].vouchers.settled) == (holder_of(B, index, swarm) == peer(2))


def test_in_larger_swarms_the_word_of_the_second_in_rank_counts_too_for_it_may_take_over() -> None:
    script = Script()
    script.connect(2, 3, 4)
    script.start()
    for number in (2, 3, 4):
        script.says(number, share())
    script.tick(NEWS_S)
    swarm = [ME, peer(2), peer(3), peer(4)]
    for index in range(4):
        script.says(2, have(index))
        counts = rank_of(peer(2), B, index, swarm) < 2
        assert (index in script.machine.blobs[B].vouchers.settled) == counts


def test_while_a_crowd_arrives_the_word_of_whom_its_elders_do_not_outrank_settles_a_checksum() -> None:
    script = Script()
    script.connect(2, 3, 4)
    script.says(3, share())
    script.tick(NEWS_S)
    script.start()
    script.says(2, share())
    script.says(4, share())
    for index in range(4):
        script.says(2, have(index))
        by_elders = holder_of(B, index, [peer(2), peer(3)]) == peer(2)
        assert (index in script.machine.blobs[B].vouchers.settled) == by_elders


def test_the_word_of_a_peer_that_fetches_nothing_settles_no_checksum() -> None:
    script = Script()
    script.connect(2, 3)
    script.start()
    script.says(3, share())
    script.says(2, share(range(4), wants=False))
    assert not script.machine.blobs[B].vouchers.settled


def test_the_schedulers_word_settles_a_chunk_that_is_here() -> None:
    script = scheduled(2, 3)
    takes(script, 2, 1, 0)
    assert script.ordered(checksums(0)) == []
    assert script.machine.blobs[B].offered == 1


def test_the_scheduler_takes_back_what_a_liar_sent() -> None:
    script = scheduled(2, 3)
    script.connect(4)
    script.says(4, Unshare(B))
    script.says(2, share([0], wrong=[0]), Grant(1))
    assert script.arrives(2, 0, grant=1, word=checksum(1000))[0] == write(0, checksum(1000))
    assert script.ordered(checksums(0)) == [
        ev.ForgetChunks(blob=B, indices=[0]),
        banned(2),
        drop(2, f"sent corrupt chunks of {B}"),
        send(3, share()),
    ]
    assert script.machine.blobs[B].have == 0
    assert script.machine.blobs[B].vouchers.settled == {0: checksum(0)}
    assert takes(script, 3, 1, 0)[0] == write(0)


def test_the_origin_corrects_what_a_liar_sent() -> None:
    script = scheduled(2)
    script.says(2, share([0], wrong=[0]), Grant(1))
    script.arrives(2, 0, grant=1, word=checksum(1000))
    assert script.ordered(Lease(B, 0, 15000)) == [fetch(0)]
    out = script.arrives(None, 0)
    assert out[:3] == [ev.ForgetChunks(blob=B, indices=[0]), banned(2), drop(2, f"sent corrupt chunks of {B}")]
    assert out[3] == write(0)
    assert done(0) in out


def test_while_the_whole_blob_is_checked_nothing_is_taken_back() -> None:
    script = Script(scheduled=True)
    script.connect(2)
    script.start(1)
    script.ordered(Lease(B, 0, 15000))
    script.says(2, share([0], size=CHUNK, wrong=[0]))
    script.now = 2.0
    script.says(2, Grant(1))
    assert CHECK in script.arrives(2, 0, grant=1, word=checksum(1000))
    assert script.ordered(checksums(0, size=CHUNK)) == []
    assert script.arrives(None, 0) == []


def test_checksums_of_another_cut_or_blob_mean_nothing() -> None:
    script = scheduled(2)
    assert script.ordered(checksums(9, size=10 * CHUNK)) == []
    assert script.ordered(wire.Checksums(digest(9), CHUNK, b"", b"")) == []
    assert script.machine.blobs[B].vouchers.settled == {}


@pytest.mark.parametrize("message", [checksums(4), wire.Checksums(B, CHUNKS * CHUNK, bytes(4), b""), Room()])
def test_a_scheduler_that_breaks_the_protocol_is_found_out(message: wire.Message) -> None:
    with pytest.raises(RemoteProtocolError):
        scheduled().ordered(message)


def test_a_wrong_blob_bans_who_made_it_wrong_and_goes_on() -> None:
    script = scheduled(2, 3)
    takes(script, 2, 1, 0)
    takes(script, 3, 1, 1)
    complete(script)
    out = script.on(ev.BlobRejected(blob=B, indices=[0, 2]))
    assert drop(2, f"its chunks made the blob wrong: {B}") in out
    # Chunk 1 only its sender vouches for; 3 is ours.
    assert send(3, share([3])) in out
    assert script.machine.blobs[B].have == 0b1010
    script.arrives(None, 0)
    assert CHECK in script.arrives(None, 2)


def test_a_peer_may_not_name_blobs_without_end() -> None:
    script = Script()
    script.connect(2)
    with pytest.raises(RemoteProtocolError, match="blobs shared"):
        for number in range(MAX_SHARED_BLOBS + 2):
            script.says(2, share(blob=digest(number)))
    assert len(script.machine.book.peers[peer(2)].wants) == MAX_SHARED_BLOBS + 1


def test_a_share_replaces_what_was_known() -> None:
    script = scheduled(2)
    script.says(2, share([0, 1]), share([1, 2]))
    assert script.machine.blobs[B].holders == [0, 1, 1, 0]
    script.says(2, share([0], size=CHUNK))
    assert script.machine.blobs[B].holders == [0, 0, 0, 0]


def test_haves_that_do_not_fit_are_the_peers_fault() -> None:
    for message in (have(4), wire.Have(B, bytes(4), b"")):
        with pytest.raises(RemoteProtocolError):
            scheduled(2).says(2, message)


def test_haves_of_a_peer_that_never_shared_the_blob_mean_nothing() -> None:
    script = Script(scheduled=True)
    script.connect(2)
    script.start()
    assert script.says(2, have(0)) == []
    assert script.machine.blobs[B].held == 0


def test_a_peer_that_has_everything_wants_no_more() -> None:
    script = scheduled(2)
    script.says(2, have(0, 1), have(1, 2, 3))
    assert not script.machine.book.peers[peer(2)].wants
    assert script.machine.blobs[B].holders == [1, 1, 1, 1]
    script = Script().seeding()
    script.connect(2)
    script.says(2, share([0]), have(1, 2, 3))
    assert not script.machine.book.peers[peer(2)].wants
