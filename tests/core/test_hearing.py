# SPDX-License-Identifier: Apache-2.0
"""What others say of chunks, and whose word counts; events in, exact commands out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core import events as ev
from p2pdist.core import wire
from p2pdist.core.hearing import REFUTED_MAX, WRONG_WORDS
from p2pdist.core.ladder import DISPUTE_S
from p2pdist.core.lease import NEWS_S, holder_of, rank_of
from p2pdist.core.packing import pack_indices
from p2pdist.core.peerbook import MAX_SHARED_BLOBS
from p2pdist.core.reputation import Offence
from p2pdist.core.wire import Decline, Grant, Lease, Room, Unshare, Withdrawn
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
    drops,
    fetch,
    fetches,
    have,
    says_wrong,
    scheduled,
    send,
    share,
    take,
    takes,
    tell,
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
    script.says(2, share(range(3), wrong=range(3)))
    for number in range(1, 4):
        script.says(2, Grant(number))
        index = script.machine.book.peers[peer(2)].downloads[number].index
        assert script.arrives(2, index, grant=number, word=checksum(index + 1000))[0] == write(
            index, checksum(index + 1000)
        )
    assert script.ordered(checksums(0, 1, 2)) == [
        ev.ForgetChunks(blob=B, indices=[0, 1, 2]),
        banned(2),
        drop(2, f"sent corrupt chunks of {B}"),
        send(3, share()),
    ]
    assert script.machine.blobs[B].have == 0
    assert script.machine.blobs[B].vouchers.settled == {index: checksum(index) for index in range(3)}
    assert takes(script, 3, 1, 0)[0] == write(0)


def test_the_origin_corrects_what_a_peer_sent_that_is_suspected() -> None:
    script = scheduled(2)
    script.says(2, share([0], wrong=[0]), Grant(1))
    script.arrives(2, 0, grant=1, word=checksum(1000))
    assert script.ordered(Lease(B, 0, 15000)) == [fetch(0)]
    out = script.arrives(None, 0)
    assert out[0] == ev.ForgetChunks(blob=B, indices=[0])
    assert write(0) in out
    assert done(0) in out
    assert drops(out) == []
    assert script.machine.book.reputation.records[peer(2)].score > 0


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
    script.machine.book.peers[peer(2)].wrong = WRONG_WORDS - 1
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


# ------------------------------------------------------------------- liars


def test_false_checksums_are_found_out_before_a_byte_was_taken() -> None:
    script = scheduled(2, 3)
    script.ordered(checksums(0, 1, 2))
    assert drops(says_wrong(script, 2, 0, 1)) == []
    assert script.says(2, Grant(1)) == [send(2, Decline(1, False))]
    assert drops(says_wrong(script, 2, 2)) == [(2, Offence.FALSE_CHECKSUM)]
    script.says(3, have(0), Grant(1))
    assert drops(script.ordered(checksums(3))) == []


def test_who_said_a_word_that_proves_right_after_all_is_asked_again_what_it_has() -> None:
    script = scheduled(2, 3, 4)
    script.ordered(checksums(0, 1), Withdrawn(B, pack_indices([0]), peer(2)))
    script.says(3, share([0, 1]))
    assert script.says(3, Grant(1)) == [take(3, 1, 1)]
    out = script.ordered(checksums(0))
    assert [command for command in out if isinstance(command, ev.Send)] == [send(3, share(reply=False))]
    script.says(3, share([0, 1]))
    assert script.says(3, Grant(2)) == [take(3, 2, 0)]
    assert script.ordered(checksums(0)) == []


def test_two_liars_that_agree_settle_nothing_against_the_scheduler() -> None:
    script = scheduled(2, 3, 4)
    says_wrong(script, 2, 0, 1, 2)
    says_wrong(script, 3, 0, 1, 2)
    assert script.machine.blobs[B].vouchers.settled == {index: checksum(index + 1000) for index in range(3)}
    # Who was the first to say it.
    assert drops(script.ordered(checksums(0, 1, 2))) == [(2, Offence.FALSE_CHECKSUM)]
    assert script.machine.blobs[B].vouchers.settled == {index: checksum(index) for index in range(3)}
    assert takes(script, 4, 1, 0)[0] == write(0)
    assert script.machine.blobs[B].offered == 1


def test_two_liars_that_agree_have_no_honest_peer_banned_and_the_origin_decides() -> None:
    script = Script()
    script.connect(2, 3, 4)
    script.start()
    for number in (2, 3, 4):
        script.says(number, share(wants=False))
    script.now = 1.0
    says_wrong(script, 2, 0)
    says_wrong(script, 3, 0)
    assert drops(script.says(4, have(0))) == []
    assert script.machine.book.peers[peer(4)].shared[B] == 0
    assert script.machine.book.peers[peer(4)].doubted[B] == 1
    assert 0 not in fetches(script.tick(1.0 + DISPUTE_S - 0.1))
    assert fetches(script.tick(1.0 + DISPUTE_S))[0] == 0
    assert 0 not in fetches(script.tick(1.1 + DISPUTE_S))
    out = script.arrives(None, 0)
    assert drops(out) == []
    assert write(0) in out
    assert not script.machine.blobs[B].disputed
    assert [script.machine.book.peers[peer(number)].wrong for number in (2, 3, 4)] == [1, 0, 0]


def test_a_single_liar_that_disputes_everything_costs_three_chunks_from_the_origin() -> None:
    script = scheduled(2, 3, 4)
    for number in (3, 4):
        script.says(number, have(0, 1, 2, 3))
    says_wrong(script, 2, 0, 1, 2, 3)
    assert len(script.machine.blobs[B].disputed) == CHUNKS
    for index in range(WRONG_WORDS):
        assert fetches(script.tick(DISPUTE_S + index)) == [index]
        out = script.arrives(None, index)
    assert drops(out) == [(2, Offence.FALSE_CHECKSUM)]
    assert not script.machine.blobs[B].disputed
    assert fetches(script.tick(DISPUTE_S + 3)) == []


def test_a_dispute_raised_by_who_has_gone_is_none() -> None:
    script = scheduled(2, 3, 4)
    for number in (3, 4):
        script.says(number, have(0))
    says_wrong(script, 2, 0)
    script.on(ev.PeerLost(peer=peer(2)))
    assert fetches(script.tick(DISPUTE_S)) == []


def lying_holder(wrong: int) -> tuple[Script, int, int]:
    """Without a scheduler: a lease holder whose wrong chunk came by way of an honest peer; and a chunk of ours.

    Args:
        wrong: its wrong words so far.
    """
    script = Script()
    script.connect(2, 3)
    script.start(8)
    for number in (2, 3):
        script.says(number, share(size=8 * CHUNK))
    script.tick(NEWS_S)
    script.machine.book.peers[peer(2)].wrong = wrong
    swarm = [ME, peer(2), peer(3)]
    lied = next(index for index in range(8) if holder_of(B, index, swarm) == peer(2))
    ours = next(index for index in range(8) if holder_of(B, index, swarm) == ME)
    says_wrong(script, 2, lied)
    says_wrong(script, 3, lied)
    script.says(3, Grant(1))
    out = script.arrives(3, lied, grant=1, word=checksum(lied + 1000))
    assert write(lied, checksum(lied + 1000)) in out
    assert script.machine.blobs[B].offered >> lied & 1
    return script, lied, ours


def test_a_lease_holder_that_lied_is_to_blame_and_not_who_passed_its_chunk_on() -> None:
    script, lied, _ = lying_holder(WRONG_WORDS - 1)
    out = script.on(ev.BlobRejected(blob=B, indices=[lied]))
    assert drops(out) == [(2, Offence.FALSE_CHECKSUM)]
    assert not script.machine.blobs[B].have >> lied & 1
    # Who believed it still says the same.
    assert drops(script.arrives(None, lied)) == []
    assert drops(says_wrong(script, 3, lied)) == []


def test_with_a_convicted_lease_holder_goes_all_that_rests_on_its_word() -> None:
    script, lied, ours = lying_holder(WRONG_WORDS - 1)
    says_wrong(script, 2, ours)
    out = script.arrives(None, ours)
    assert drops(out) == [(2, Offence.FALSE_CHECKSUM)]
    assert ev.ForgetChunks(blob=B, indices=[lied]) in out
    assert not script.machine.blobs[B].offered >> lied & 1
    assert script.machine.blobs[B].have >> ours & 1


def test_with_a_convicted_peer_goes_what_only_it_vouched_for() -> None:
    script = scheduled(2, 3)
    says_wrong(script, 2, 0)
    script.says(2, Grant(1))
    script.arrives(2, 0, grant=1, word=checksum(1000))
    says_wrong(script, 2, 1, 2, 3)
    out = script.ordered(checksums(1, 2, 3))
    assert drops(out) == [(2, Offence.FALSE_CHECKSUM)]
    assert ev.ForgetChunks(blob=B, indices=[0]) in out
    assert script.machine.blobs[B].have == 0


def test_a_peer_of_which_many_chunks_were_right_may_have_believed_a_liar() -> None:
    script = scheduled(2, 3)
    script.machine.book.peers[peer(2)].good = 2 * CHUNKS
    script.ordered(checksums(0, 1, 2, 3))
    assert drops(says_wrong(script, 2, 0, 1, 2, 3)) == []
    script.machine.book.peers[peer(2)].good = 0
    script.machine.blobs[B].vouchers.known_wrong.clear()
    assert drops(says_wrong(script, 2, 0)) == [(2, Offence.FALSE_CHECKSUM)]


def test_chunks_that_only_their_sender_vouched_for_are_suspicious_one_by_one() -> None:
    script = scheduled(2, 3)
    script.machine.book.peers[peer(2)].good = 100
    out: list[ev.Command] = []
    for number in range(1, 20):
        assert drops(out) == []
        says_wrong(script, 2, 0)
        script.says(2, Grant(number))
        script.arrives(2, 0, grant=number, word=checksum(1000))
        out = script.on(ev.BlobRejected(blob=B, indices=[0]))
        if drops(out):
            break
    assert drops(out) == [(2, Offence.SUSPECT)]
    assert number == 4


def test_what_an_earlier_run_left_is_corrected_by_a_better_word_and_bans_nobody() -> None:
    script = Script(scheduled=True)
    script.connect(2)
    script.on(
        ev.PullStarted(
            blob=B, size_bytes=4 * CHUNK, registry="r", have={0: checksum(1000), 1: checksum(1)}, shared=True
        )
    )
    assert drops(script.says(2, share([0, 1]))) == []
    out = script.ordered(checksums(0, 1))
    assert ev.ForgetChunks(blob=B, indices=[0]) in out
    assert drops(out) == []


# ------------------------------------------------------- a lying scheduler


def test_the_origin_refutes_the_scheduler_who_is_told_and_whom_it_accused_is_pardoned() -> None:
    script = scheduled(2, 3)
    script.ordered(checksums(0, wrong=[0]))
    script.machine.book.peers[peer(2)].wrong = WRONG_WORDS - 1
    assert drops(script.says(2, have(0))) == [(2, Offence.FALSE_CHECKSUM)]
    script.ordered(Lease(B, 0, 15000))
    out = script.arrives(None, 0)
    assert tell(wire.Refuted(B, 0, checksum(0))) in out
    assert write(0) in out
    assert not script.machine.book.is_banned(peer(2), script.now)
    # It insists.
    out = script.ordered(checksums(0, wrong=[0]))
    assert tell(wire.Refuted(B, 0, checksum(0))) in out
    assert script.machine.blobs[B].vouchers.settled == {0: checksum(0)}


def test_a_scheduler_that_was_refuted_again_and_again_is_believed_no_more_until_it_is_connected_anew() -> None:
    chunks, size = REFUTED_MAX + 2, (REFUTED_MAX + 2) * CHUNK
    script = Script(scheduled=True)
    script.connect(2)
    script.start(chunks)
    for index in range(REFUTED_MAX):
        script.ordered(checksums(index, wrong=[index], size=size), Lease(B, index, 15000))
        script.arrives(None, index)
    script.ordered(checksums(chunks - 1, size=size))
    assert chunks - 1 not in script.machine.blobs[B].vouchers.settled
    script.on(ev.SchedulerLost())
    script.on(ev.SchedulerConnected())
    script.ordered(checksums(chunks - 1, size=size))
    assert chunks - 1 in script.machine.blobs[B].vouchers.settled


def test_the_scheduler_may_correct_itself_and_nobody_is_to_blame() -> None:
    script = scheduled(2, 3)
    script.ordered(checksums(0, wrong=[0]))
    says_wrong(script, 2, 0)
    script.says(2, Grant(1))
    script.arrives(2, 0, grant=1, word=checksum(1000))
    assert script.machine.blobs[B].offered == 1
    out = script.ordered(checksums(0))
    assert ev.ForgetChunks(blob=B, indices=[0]) in out
    assert drops(out) == []
    assert drops(says_wrong(script, 3, 0)) == []
    assert script.machine.blobs[B].have == 0


@given(data=st.data())
def test_whatever_two_liars_say_no_honest_peer_is_banned_and_no_wrong_word_outlives_the_origins(
    data: st.DataObject,
) -> None:
    """Peers 2 and 3 lie, 4 and 5 say what is right; the scheduler, where there is one, and the origin do, too."""
    script = Script(scheduled=data.draw(st.booleans()))
    script.connect(2, 3, 4, 5)
    script.start(8)
    for number in (2, 3, 4, 5):
        script.says(number, share(size=8 * CHUNK, wants=data.draw(st.booleans())))
    steps = st.tuples(st.sampled_from(["lie", "say", "read", "push", "wait"]), st.integers(0, 1), st.integers(0, 7))
    banned_numbers: set[int] = set()
    out: list[ev.Command] = []
    for what, who, index in data.draw(st.lists(steps, max_size=40)):
        match what:
            case "lie":
                out = says_wrong(script, 2 + who, index)
            case "say":
                out = script.says(4 + who, have(index))
            case "read":
                out = script.arrives(None, index)
            case "push" if script.machine.state.scheduled:
                out = script.ordered(checksums(index, size=8 * CHUNK))
            case "wait":
                out = script.tick(script.now + 0.7)
        banned_numbers |= {number for number, _ in drops(out)}
        for index in fetches(out):
            banned_numbers |= {number for number, _ in drops(script.arrives(None, index))}
    assert banned_numbers <= {2, 3}
    vouchers = script.machine.blobs[B].vouchers
    for index in range(8):
        script.arrives(None, index)
    if script.machine.blobs[B].wanted and not script.machine.blobs[B].checking:
        assert all(vouchers.settled[index] == checksum(index) for index in range(8))


def test_the_word_of_one_that_erred_is_read_again_before_others() -> None:
    script, lied, ours = lying_holder(0)
    says_wrong(script, 2, ours)
    script.arrives(None, ours)
    suspects = [index for index in range(8) if index != ours]
    assert script.machine.most_suspect(B, suspects) == lied
