# SPDX-License-Identifier: Apache-2.0
"""What others say they are fetching."""

from __future__ import annotations

from p2pdist.core.fetches import MAX_PER_PEER, MAX_S, SILENT_S, Fetches
from tests.strategies import peer


def test_a_fetch_is_under_way_until_its_peer_has_the_chunk_or_goes() -> None:
    fetches = Fetches()
    for index in (1, 4, 5):
        fetches.note(peer(2), index, 0.0)
    fetches.note(peer(3), 6, 0.0)
    assert fetches.under_way(1.0) == 0b1110010
    assert sorted(fetches.peers(1.0)) == [peer(2)] * 3 + [peer(3)]
    fetches.drop(peer(2), 0b1010000)
    assert fetches.under_way(1.0) == 0b1100010
    fetches.drop(peer(2))
    assert fetches.under_way(1.0) == 0b1000000
    assert fetches.peers(SILENT_S) == []


def test_the_first_to_say_that_it_fetches_a_chunk_counts() -> None:
    fetches = Fetches()
    fetches.note(peer(2), 1, 0.0)
    fetches.note(peer(3), 1, 0.0)
    fetches.drop(peer(3), 0b10)
    assert fetches.under_way(0.0) == 0b10


def test_who_says_nothing_more_is_not_believed_again() -> None:
    fetches = Fetches()
    fetches.note(peer(2), 1, 0.0)
    assert fetches.under_way(SILENT_S - 0.1) == 0b10
    assert fetches.under_way(SILENT_S) == 0
    fetches.note(peer(2), 2, SILENT_S)
    fetches.note(peer(3), 1, SILENT_S)
    assert fetches.under_way(SILENT_S) == 0b10


def test_no_fetch_lasts_for_ever_however_often_it_is_renewed() -> None:
    fetches, now = Fetches(), 0.0
    while now < MAX_S:
        fetches.note(peer(2), 1, now)
        assert fetches.under_way(now) == 0b10
        now += SILENT_S / 2
    assert fetches.under_way(now) == 0


def test_a_peer_fetches_so_many_chunks_and_no_more() -> None:
    fetches = Fetches()
    for index in range(MAX_PER_PEER + 1):
        fetches.note(peer(2), index, 0.0)
    fetches.note(peer(3), 100, 0.0)
    assert fetches.under_way(0.0) == (1 << MAX_PER_PEER) - 1 | 1 << 100
