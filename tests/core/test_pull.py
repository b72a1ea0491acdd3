# SPDX-License-Identifier: Apache-2.0
"""The pulls' own course: start, arrival, whose word counts, completion, failure; events in, exact commands out."""

from __future__ import annotations

import pytest

from p2pdist.core import events as ev
from p2pdist.core import wire
from p2pdist.core.chunkmap import MAX_BLOB_BYTES
from p2pdist.core.lease import DOUBTERS, LEASES, SETTLE_S, holder_of
from p2pdist.core.progress import MAX_WHOLE_BYTES
from p2pdist.core.pull import ERROR_GIVE_UP_S, GIVE_UP_S, MAX_SEEDS, SHARE_S
from p2pdist.core.reputation import BAN_S
from p2pdist.core.wire import Cancel, Decline, Grant, Lease, Leave, Room, Stored, Take, Unshare
from p2pdist.errors import RemoteProtocolError, TransferTimeout
from tests.script import (
    CHECK,
    CHUNK,
    CHUNKS,
    ME,
    VERIFIED,
    B,
    Script,
    banned,
    checksums,
    complete,
    done,
    drop,
    fetch,
    fetches,
    have,
    join,
    scheduled,
    send,
    share,
    take,
    takes,
    tell,
    write,
)
from tests.strategies import checksum, digest, peer

WRONG = checksum(99)


# ------------------------------------------------------------------- starting


def test_a_pull_is_told_to_the_neighbours_and_the_scheduler() -> None:
    script = Script(scheduled=True)
    script.connect(2, 3)
    asked = share(reply=False)
    assert script.start() == [send(2, asked), send(3, asked), join()]
    assert script.machine.busy


def test_a_pull_that_goes_on_already_is_not_started_again() -> None:
    script = scheduled(2)
    assert script.start() == []


def test_what_an_earlier_run_left_is_offered_at_once() -> None:
    script = Script(scheduled=True)
    script.connect(2)
    assert script.start(have=[0, 2]) == [send(2, share([0, 2], reply=False)), join(0, 2)]


def test_a_pull_of_which_everything_is_here_is_checked_at_once() -> None:
    script = Script()
    assert script.start(have=range(4)) == [CHECK]
    assert script.start(0, blob=digest(2)) == [ev.CheckBlob(blob=digest(2))]


def test_a_private_pull_talks_to_nobody() -> None:
    script = Script(scheduled=True)
    script.connect(2)
    assert script.start(2, shared=False) == [fetch(0), fetch(1)]
    assert script.says(2, share(size=2 * CHUNK, reply=False)) == []
    assert script.says(2, share([0], size=2 * CHUNK), have(0)) == []
    assert script.connect(3) == []
    assert script.arrives(None, 0) == [write(0)]
    assert script.ordered(checksums(1, size=2 * CHUNK)) == []
    assert script.arrives(None, 1) == [write(1), CHECK]
    assert script.on(VERIFIED) == []
    assert script.tick(1.0) == []
    assert script.on(ev.BlobEvicted(blob=B)) == []


def test_a_blob_larger_than_the_protocol_knows_is_not_shared() -> None:
    script = Script(scheduled=True)
    script.connect(2)
    assert fetches(script.start(size=MAX_BLOB_BYTES + 1)) == [0, 1, 2, 3]
    assert not script.machine.blobs[B].shared
    assert script.start(size=MAX_BLOB_BYTES, blob=digest(2))[0] != fetch(0, digest(2))


def test_without_a_scheduler_the_neighbours_get_a_moment_to_answer() -> None:
    script = Script()
    script.connect(2)
    script.now = 10.0
    assert fetches(script.start()) == []
    assert fetches(script.tick(10.0 + SHARE_S - 0.01)) == []
    assert fetches(script.tick(10.0 + SHARE_S)) == [0, 1, 2, 3]


def test_a_seed_that_is_wanted_again_is_pulled_anew() -> None:
    script = Script(scheduled=True).seeding()
    script.connect(2)
    script.says(2, share([0], reply=False))
    assert script.start() == [send(2, Unshare(B)), send(2, share(reply=False)), join()]
    script.says(2, share([0]))
    assert script.machine.blobs[B].holders == [1, 0, 0, 0]


# -------------------------------------------------------------------- arriving


def test_a_chunk_from_the_origin_is_written_offered_and_counted() -> None:
    script = scheduled(2)
    script.ordered(Lease(B, 0, 15000))
    assert script.arrives(None, 0) == [write(0), done(0), send(2, have(0)), send(2, Grant(1))]
    assert script.machine.counters.from_origin == CHUNK
    assert script.machine.blobs[B].senders == {}


def test_a_chunk_from_a_peer_whose_checksum_is_known_is_offered_on() -> None:
    script = scheduled(2, 3)
    script.ordered(checksums(0))
    out = takes(script, 2, 1, 0)
    assert out[0] == write(0)
    assert send(3, have(0)) in out
    assert script.machine.counters.from_peers == script.machine.book.peers[peer(2)].down_bytes == CHUNK
    assert script.machine.blobs[B].senders == {0: peer(2)}


def test_a_chunk_that_only_its_sender_vouches_for_is_kept_but_not_offered() -> None:
    script = scheduled(2, 3, 4)
    assert takes(script, 2, 1, 0) == [write(0)]
    assert script.machine.blobs[B].have == 1
    assert script.machine.blobs[B].offered == 0
    # A second witness, and it is offered.
    out = script.says(3, have(0))
    assert out == []
    assert send(4, have(0)) in script.tick(0.5)


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_crowd_reads_from_the_origin_what_a_single_peer_alone_vouches_for(seeds: int) -> None:
    script = Script()
    others = range(3, 3 + DOUBTERS - 1)
    script.connect(*others, 8, 9)
    for number in (8, 9)[:seeds]:
        script.says(number, share(range(CHUNKS), wants=False))
    script.start()
    for number in others:
        script.says(number, share())
    for number in (8, 9)[:seeds]:
        script.says(number, share(range(CHUNKS), wants=False))
    fetched = fetches(script.tick(1.0))
    mine = [index for index in range(CHUNKS) if holder_of(B, index, [ME, *map(peer, others)]) == ME]
    assert mine
    assert fetched == (mine[:1] if seeds == 1 else [])


def test_a_wrong_chunk_bans_its_sender_and_is_got_elsewhere() -> None:
    script = scheduled(2, 3)
    script.says(3, have(0))
    out = takes(script, 2, 1, 0, word=WRONG)
    assert out == [banned(2), drop(2, f"sent a corrupt chunk 0 of {B}"), send(3, Room())]
    assert script.machine.book.is_banned(peer(2), BAN_S - 0.1)
    assert not script.machine.book.is_banned(peer(2), BAN_S)
    assert script.machine.counters.corrupt_chunks == 1
    assert script.says(2, Grant(2)) == []
    assert script.says(3, Grant(1)) == [take(3, 1, 0)]
    assert script.arrives(3, 0, grant=1)[0] == write(0)


def test_a_chunk_that_is_here_already_counts_as_a_duplicate() -> None:
    script = scheduled(2)
    script.ordered(Lease(B, 0, 15000))
    script.says(2, have(0))
    script.now = 2.0
    script.says(2, Grant(1))
    script.arrives(None, 0)
    assert script.arrives(2, 0, grant=1) == []
    assert script.machine.counters.duplicate == CHUNK


def test_a_chunk_of_a_blob_that_is_not_wanted_any_more_is_only_counted() -> None:
    script = scheduled(2)
    script.ordered(Lease(B, 0, 15000))
    script.on(ev.PullCancelled(blob=B))
    assert script.arrives(None, 0) == []
    assert script.on(ev.ChunkWritten(blob=B, index=0)) == []
    assert script.arrives(9, 0) == []
    script.on(ev.HeadMoved(blob=B, reader=1, index=0))


def test_a_chunk_is_written_once() -> None:
    script = scheduled()
    script.arrives(None, 0)
    assert script.on(ev.ChunkWritten(blob=B, index=0)) == []


# ------------------------------------------------------------------ completing


def test_a_complete_blob_is_checked_and_then_a_seed() -> None:
    script = scheduled(2)
    assert CHECK in complete(script)
    assert tell(Stored([B])) in script.on(VERIFIED)
    assert not script.machine.blobs[B].wanted
    assert script.says(2, Take(1, B, 3)) == [ev.SendChunk(peer=peer(2), number=1, blob=B, index=3)]


def test_a_verified_blob_vouches_for_all_its_chunks() -> None:
    script = scheduled(2, 3)
    takes(script, 2, 1, 0)
    complete(script)
    assert send(3, have(3, 0)) in script.on(VERIFIED)


def test_of_a_blob_that_is_gone_nothing_more_is_heard() -> None:
    script = Script()
    assert script.on(VERIFIED) == []
    assert script.on(ev.BlobRejected(blob=B, indices=[0])) == []
    assert script.fails(0) == []


def test_a_peer_that_never_told_us_anything_of_the_blob_hears_that_we_want_no_more() -> None:
    script = Script(scheduled=True)
    script.connect(2)
    script.start(1)
    complete(script, 1)
    assert send(2, share([0], size=CHUNK, wants=False)) in script.on(VERIFIED)


# ------------------------------------------------------------- seeds, the store


def test_a_peer_that_wants_what_may_be_in_the_store_has_it_looked_up() -> None:
    script = Script(scheduled=True)
    script.connect(2)
    assert script.says(2, share([0], reply=False)) == [ev.LookUp(blob=B)]
    words = tuple(checksum(index) for index in range(4))
    assert script.on(ev.BlobStored(blob=B, size_bytes=4 * CHUNK, media_type="m", checksums=words)) == [
        send(2, share(range(4), wants=False, media_type="m", reply=False)),
        send(2, Grant(1)),
        send(2, Grant(2)),
    ]
    # It answers with what it has, and is granted no more than it lacks.
    assert script.says(2, share([0, 1, 2])) == []
    script.says(2, Decline(1, False))
    assert script.says(2, Take(2, B, 3)) == [ev.SendChunk(peer=peer(2), number=2, blob=B, index=3)]


def test_what_a_peer_only_has_is_not_looked_up() -> None:
    script = Script()
    script.connect(2)
    assert script.says(2, share(range(4), wants=False)) == []


def test_a_share_of_a_seed_is_answered_unless_it_is_an_answer() -> None:
    script = Script().seeding()
    script.connect(2, 3)
    assert script.says(2, share(range(4), wants=False, reply=False)) == [send(2, share(range(4), wants=False))]
    assert script.says(3, share(range(4), wants=False)) == []


def test_an_evicted_seed_is_unshared_and_its_peers_forgotten() -> None:
    script = Script(scheduled=True).seeding()
    script.connect(2)
    script.says(2, share([0], reply=False))
    assert script.on(ev.BlobEvicted(blob=B)) == [send(2, Unshare(B)), tell(Leave(B))]
    assert not script.machine.book.peers[peer(2)].shared
    assert not script.machine.book.peers[peer(2)].wants


def test_the_scheduler_hears_of_every_eviction() -> None:
    script = Script(scheduled=True)
    assert script.on(ev.BlobEvicted(blob=B)) == [tell(Leave(B))]
    script.on(ev.SchedulerLost())
    assert script.on(ev.BlobEvicted(blob=B)) == []


def test_the_eviction_of_an_old_copy_does_not_end_a_new_pull() -> None:
    script = scheduled()
    assert script.on(ev.BlobEvicted(blob=B)) == []
    assert script.machine.blobs[B].wanted


def test_only_so_many_seeds_are_kept_in_mind_those_that_peers_want_the_longest() -> None:
    script = Script()
    script.connect(2)
    for number in range(1, MAX_SEEDS + 2):
        if number == 1:
            script.says(2, share(blob=digest(1), size=CHUNK))
        words = (checksum(0),)
        script.on(ev.BlobStored(blob=digest(number), size_bytes=CHUNK, media_type="", checksums=words))
    assert len(script.machine.blobs) == MAX_SEEDS
    assert digest(1) in script.machine.blobs
    assert digest(2) not in script.machine.blobs


def test_a_cancelled_pull_leaves_the_swarm() -> None:
    script = scheduled(2)
    assert script.on(ev.PullCancelled(blob=B)) == [send(2, Unshare(B)), tell(Leave(B))]
    assert script.on(ev.PullCancelled(blob=B)) == []
    assert not script.machine.busy


def test_a_pull_that_starts_again_counts_its_holders_anew() -> None:
    script = scheduled(2)
    script.says(2, share([1]))
    script.on(ev.PullCancelled(blob=B))
    script.says(2, have(2))
    script.start()
    script.says(2, share([1, 2]))
    assert script.machine.blobs[B].holders == [0, 1, 1, 0]
    script.on(ev.PeerLost(peer=peer(2)))
    assert script.machine.blobs[B].holders == [0, 0, 0, 0]


# ---------------------------------------------------------- content without a size


def unsized(*peers: int, scheduler: bool = True) -> Script:
    script = Script(scheduled=scheduler)
    script.connect(*peers)
    script.start(size=None)
    return script


def stored(size: int = 1000, words: int = 1) -> ev.BlobStored:
    return ev.BlobStored(blob=B, size_bytes=size, media_type="m", checksums=tuple(checksum(i) for i in range(words)))


def test_content_without_a_size_is_asked_for_as_such() -> None:
    script = Script(scheduled=True)
    script.connect(2)
    assert script.start(size=None) == [send(2, share(size=-1, reply=False)), join(size=-1)]


def test_its_size_is_learnt_from_a_peer_that_has_it() -> None:
    script = unsized(2)
    assert script.says(2, share(size=-1)) == []
    assert script.says(2, Grant(1)) == [send(2, Decline(1, False))]
    script.says(2, share([0], size=1000, wants=False, media_type="m"))
    assert script.says(2, Grant(2)) == [take(2, 2, 0)]
    assert script.arrives(2, 0, grant=2) == [write(0), CHECK]
    assert script.machine.blobs[B].media_type == "m"
    assert script.on(VERIFIED) == [tell(Stored([B])), send(2, share([0], size=1000, wants=False, media_type="m"))]


def test_its_size_is_learnt_from_the_scheduler() -> None:
    script = unsized(2)
    script.ordered(checksums(0, size=1000))
    assert script.machine.blobs[B].size_bytes == 1000
    assert script.machine.blobs[B].vouchers.settled == {0: checksum(0)}


def test_it_is_fetched_whole_by_its_lease_holder_who_tells_those_that_want_it() -> None:
    script = unsized(2)
    script.says(2, share(size=-1))
    assert script.ordered(Lease(B, 0, 15000)) == [fetch(0)]
    shared = share([0], size=1000, wants=False, media_type="m")
    assert script.on(stored()) == [done(0, size=1000), tell(Stored([B])), send(2, shared), send(2, Grant(1))]
    assert not script.machine.busy or script.machine._giving.slots_used == 1


def test_a_copy_on_its_way_is_called_off_when_it_was_fetched_whole() -> None:
    script = unsized(2)
    script.ordered(Lease(B, 0, 15000))
    script.says(2, share([0], size=1000, wants=False))
    script.now = 2.0
    assert script.says(2, Grant(1)) == [take(2, 1, 0)]
    assert send(2, Cancel(1)) in script.on(stored())


def test_a_fetch_whose_content_came_from_a_peer_meanwhile_holds_no_request_any_more() -> None:
    script = unsized(2)
    script.ordered(Lease(B, 0, 15000))
    script.says(2, share([0], size=1000, wants=False))
    script.now = 2.0
    script.says(2, Grant(1))
    script.arrives(2, 0, grant=1)
    script.on(VERIFIED)
    script.on(ev.SchedulerLost())
    script.on(ev.PeerLost(peer=peer(2)))
    assert len(fetches(script.start(2 * LEASES, blob=digest(2), shared=False))) == LEASES


def test_content_larger_than_a_chunk_is_fetched_by_each_for_itself() -> None:
    script = unsized(2)
    out = script.says(2, share([0], size=MAX_WHOLE_BYTES + 1, wants=False))
    assert out == [tell(Leave(B)), send(2, Unshare(B))]
    assert script.tick(0.1) == [fetch(0)]
    assert script.on(stored(MAX_WHOLE_BYTES + 1)) == []
    assert B not in script.machine.blobs
    script = unsized(2)
    assert tell(Leave(B)) in script.ordered(checksums(0, size=MAX_WHOLE_BYTES + 1))


def test_content_larger_than_a_chunk_that_was_fetched_whole_is_not_offered_under_a_wrong_cut() -> None:
    script = unsized(2)
    script.ordered(Lease(B, 0, 15000))
    assert script.on(stored(MAX_WHOLE_BYTES + 1)) == [send(2, Unshare(B)), tell(Leave(B))]


def test_a_peer_that_lies_about_content_without_a_size_is_banned_and_the_others_are_asked_again() -> None:
    script = unsized(2, 3, 4)
    script.says(4, Unshare(B))
    script.says(2, share([0], size=10, wants=False))
    script.says(3, share([0], size=1000, wants=False))
    script.says(2, Grant(1))
    script.on(ev.ChunkArrived(source=peer(2), number=1, blob=B, index=0, checksum=checksum(0)))
    out = script.on(ev.BlobRejected(blob=B, indices=[0]))
    assert drop(2, f"its chunks made the blob wrong: {B}") in out
    assert out[-1] == send(3, share(size=-1, reply=False))
    script.says(3, share([0], size=1000, wants=False))
    assert script.says(3, Grant(1)) == [take(3, 1, 0)]


def test_nobody_is_believed_that_content_without_a_size_is_empty() -> None:
    script = unsized(2, 3)
    script.says(2, share(size=0, wants=False))
    script.ordered(wire.Checksums(B, 0, b"", b""))
    script.says(3, share([0], size=1000, wants=False))
    assert script.says(3, Grant(1)) == [take(3, 1, 0)]


def test_an_empty_blob_is_a_seed_too() -> None:
    script = unsized(2)
    script.says(2, share(size=-1))
    assert send(2, share(size=0, wants=False, media_type="m")) in script.on(stored(0, 0))
    assert not script.machine.busy


# --------------------------------------------------------------------- failing


def failed(out: list[ev.Command]) -> list[str]:
    return [str(cause) for command in out if isinstance(command, ev.Fail) for cause in command.causes]


def test_alone_a_final_error_ends_the_pull_at_once() -> None:
    error = OSError("not found")
    script = Script()
    script.start(shared=False)
    for index in (0, 1, 2):
        assert script.fails(index, final=True, error=error) == []
    assert script.fails(3, final=True, error=error) == [ev.Fail(blob=B, causes=[error] * 4)]
    assert not script.machine.busy


def test_among_peers_a_final_error_ends_it_when_nobody_has_had_anything_for_a_moment() -> None:
    script = scheduled(2)
    script.ordered(Lease(B, 0, 15000))
    script.fails(0, final=True)
    assert failed(script.tick(SETTLE_S - 0.1)) == []
    out = script.tick(SETTLE_S)
    assert failed(out) == ["refused"]
    assert out[-2:] == [tell(Leave(B)), ev.Fail(blob=B, causes=out[-1].causes)]  # type: ignore[union-attr]


def test_while_a_peer_has_what_is_missing_a_final_error_ends_nothing() -> None:
    script = scheduled(2)
    script.says(2, have(1))
    script.ordered(Lease(B, 0, 15000))
    script.fails(0, final=True)
    assert failed(script.tick(10.0)) == []
    assert script.says(2, Grant(1)) == [take(2, 1, 1)]


def test_errors_of_the_origin_end_the_pull_when_they_go_on_for_long() -> None:
    script = Script()
    script.start(1)
    at = 0.0
    while at < ERROR_GIVE_UP_S + 3:
        out = script.fails(0, error=OSError(f"{at:.1f}"))
        if failed(out):
            break
        while fetches(script.tick(at)) == []:
            at += 0.1
    assert ERROR_GIVE_UP_S <= at < ERROR_GIVE_UP_S + 2.6
    # The last few, in order.
    assert len(failed(out)) == 5
    assert failed(out) == sorted(failed(out), key=float)


def test_errors_long_after_the_last_gain_get_their_time_too() -> None:
    script = scheduled(2)
    script.now = 30.0
    script.ordered(Lease(B, 0, 15000))
    assert failed(script.fails(0)) == []
    assert failed(script.tick(30.0 + ERROR_GIVE_UP_S - 0.1)) == []


def test_an_arrival_forgives_the_errors_before() -> None:
    script = scheduled(2)
    script.ordered(Lease(B, 0, 15000))
    script.fails(0)
    script.arrives(None, 1)
    script.now = ERROR_GIVE_UP_S + 1
    script.ordered(Lease(B, 0, 15000))
    assert failed(script.fails(0)) == []


def test_a_retry_waits_as_long_as_the_origin_says_and_longer_each_time() -> None:
    script = Script()
    script.start(1)
    script.fails(0, pause_s=3.0)
    assert fetches(script.tick(2.9)) == []
    assert fetches(script.tick(3.0)) == [0]
    script.fails(0)
    assert fetches(script.tick(3.9)) == []
    assert fetches(script.tick(4.0)) == [0]


def test_a_pull_that_gains_nothing_for_a_minute_fails() -> None:
    script = scheduled(2)
    script.says(2, share(range(4), wants=False))
    script.ordered(Lease(B, 0, 15000))
    script.fails(0, final=True)
    assert failed(script.tick(GIVE_UP_S - 0.1)) == []
    assert failed(script.tick(GIVE_UP_S)) == ["refused"]


def test_a_pull_that_waits_for_its_turn_while_another_gains_does_not_fail() -> None:
    script = scheduled(2)
    script.says(2, share(range(4), wants=False))
    script.start(blob=digest(2))
    script.machine.blobs[B].retry_at = 1000.0
    script.now = GIVE_UP_S - 1
    script.arrives(None, 0, blob=digest(2))
    script.on(ev.ChunkWritten(blob=digest(2), index=0))
    assert failed(script.tick(2 * GIVE_UP_S - 1.1)) == []
    assert len(failed(script.tick(2 * GIVE_UP_S - 1))) == 1


def test_a_pull_that_nobody_answers_fails_with_a_time_out() -> None:
    script = scheduled(2)
    script.says(2, share(range(4), wants=False))
    script.machine.blobs[B].retry_at = 1000.0
    (fail,) = [command for command in script.tick(GIVE_UP_S) if isinstance(command, ev.Fail)]
    assert [type(cause) for cause in fail.causes] == [TransferTimeout]


def test_what_is_being_checked_or_on_its_way_does_not_fail() -> None:
    script = scheduled(2)
    script.ordered(Lease(B, 0, 15000))
    assert failed(script.tick(GIVE_UP_S + 1)) == []
    script.arrives(None, 0)
    complete(script)
    assert failed(script.tick(3 * GIVE_UP_S)) == []


# ------------------------------------------------------------- peers' conduct


@pytest.mark.parametrize("message", [join().message, Lease(B, 0, 1), wire.Hello(1, "", ME, 1, "", "", "")])
def test_a_message_that_no_peer_sends_is_the_peers_fault(message: wire.Message) -> None:
    script = scheduled(2)
    with pytest.raises(RemoteProtocolError, match="from a peer"):
        script.says(2, message)
