# SPDX-License-Identifier: Apache-2.0
"""What is known of peers."""

from __future__ import annotations

from p2pdist.core.peerbook import Peer, PeerBook, Upload
from p2pdist.core.reputation import BAN_S, Offence
from tests.strategies import digest, peer


def test_a_ban_is_the_reputations() -> None:
    book = PeerBook()
    book.reputation.offended(peer(1), Offence.CORRUPT, 100.0)
    assert book.is_banned(peer(1), 100.0 + BAN_S - 0.01)
    assert not book.is_banned(peer(1), 100.0 + BAN_S)


def test_grants_are_numbered_once() -> None:
    known = Peer(peer(1))
    assert [known.number() for _ in range(3)] == [1, 2, 3]


def test_a_peer_lacks_what_it_neither_has_nor_is_being_sent() -> None:
    known = Peer(peer(1), shared={digest(1): 0b0001})
    known.uploads[1] = Upload(0.0, digest(1), 1)
    known.uploads[2] = Upload(0.0, digest(2), 2)
    known.uploads[3] = Upload(0.0)
    assert known.lacks(digest(1), 0b1111) == 0b1100
    assert known.lacks(digest(3), 0b1111) == 0b1111
