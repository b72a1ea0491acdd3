# SPDX-License-Identifier: Apache-2.0
"""Whose word on a chunk stands, and what goes with a liar."""

from __future__ import annotations

from p2pdist.core.chunkmap import ChunkMap
from p2pdist.core.wire import Refuted, Reread
from scheduler.disputes import ARBITER_S, refuted, revoke
from scheduler.ledger import Swarm
from tests.scheduler.scripts import B, Script, done, joining
from tests.strategies import CHUNK, checksum, digest, peer

RIGHT, WRONG = checksum(1), checksum(2)
LIAR = peer(9)


def told(*indices: int) -> Swarm:
    """A swarm of which the liar has said these chunks' checksums, and another of the last one."""
    swarm = Swarm(digest(1), "r", 0, ChunkMap.of(4 * CHUNK))
    for index in indices:
        swarm.note_done(index, WRONG, LIAR)
    swarm.note_done(3, RIGHT, peer(8))
    swarm.fresh.clear()
    return swarm


def test_two_agents_that_read_the_same_overturn_what_was_pushed() -> None:
    swarm = told(0)
    assert refuted(swarm, 0, RIGHT, peer(1), "a") == LIAR
    assert swarm.done[0] == WRONG
    assert refuted(swarm, 0, RIGHT, peer(2), "b") == LIAR
    assert swarm.done[0] == RIGHT
    assert swarm.done_by[0] == peer(2)
    assert swarm.fresh == [0]
    assert refuted(swarm, 0, RIGHT, peer(3), "c") is None


def test_a_single_agent_overturns_nothing_however_often_it_says_it() -> None:
    swarm = told(0)
    for _ in range(5):
        refuted(swarm, 0, RIGHT, peer(1), "a")
        refuted(swarm, 0, RIGHT, peer(2), "a")
    assert swarm.done[0] == WRONG
    assert not swarm.fresh


def test_agents_that_read_different_things_overturn_nothing() -> None:
    swarm = told(0)
    assert refuted(swarm, 0, RIGHT, peer(1), "a") == LIAR
    assert refuted(swarm, 0, checksum(5), peer(2), "b") == LIAR
    assert swarm.done[0] == WRONG


def test_nobodys_word_is_refuted_where_nothing_or_the_same_or_its_own_was_pushed() -> None:
    swarm = told(0)
    assert refuted(swarm, 1, RIGHT, peer(1), "a") is None
    assert refuted(swarm, 0, WRONG, peer(1), "a") is None
    assert refuted(swarm, 0, RIGHT, LIAR, "l") is None
    assert not swarm.votes


def test_with_a_liar_goes_all_that_it_said_and_nothing_else() -> None:
    swarm = told(0, 2)
    refuted(swarm, 0, RIGHT, peer(1), "a")
    swarm.fresh += [0, 3]
    assert revoke(swarm, LIAR)
    assert swarm.done == {3: RIGHT}
    assert swarm.done_bits == 0b1000
    assert swarm.pending == 0b0111
    assert swarm.fresh == [3]
    assert not swarm.votes
    assert not revoke(swarm, LIAR)


def test_who_accuses_another_of_what_the_arbiter_reads_too_is_not_listened_to_any_more() -> None:
    script = Script(1, 2, 3)
    for number in (1, 2, 3):
        script.says(number, joining(chunks=3))
    for index in range(3):
        script.says(1, done(index, chunks=3))
    assert script.says(2, Refuted(B, 0, checksum(1000))) == [(3, Reread(B, 0))]
    assert script.says(2, Refuted(B, 1, checksum(1001))) == [], "one case at a time"
    script.says(3, done(0, chunks=3))
    assert not script.state.reports.out
    assert script.says(2, Refuted(B, 2, checksum(1002))) == []
    assert script.state.swarms[B].done == {index: checksum(index) for index in range(3)}


def test_an_arbiter_that_says_nothing_is_followed_by_another() -> None:
    script = Script(1, 2, 3, 4)
    for number in (1, 2, 3, 4):
        script.says(number, joining(chunks=3))
    script.says(1, done(0, chunks=3))
    ((first, _),) = script.says(2, Refuted(B, 0, checksum(1000)))
    assert not [message for _, message in script.tick(ARBITER_S - 0.1) if isinstance(message, Reread)]
    drawn = [to for to, message in script.tick(ARBITER_S) if isinstance(message, Reread)]
    assert drawn == [7 - first]
    script.says(drawn[0], Refuted(B, 0, checksum(1000)))
    assert script.state.reports.out == {peer(1)}
