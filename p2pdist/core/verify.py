# SPDX-License-Identifier: Apache-2.0
"""Digests, checksums of chunks, and whose word for them counts.

The blob's SHA-256 (SHA-512 where its digest is one) is the only authority. The xxh3-128 of a chunk
finds corruption early: the expected value comes from the one that fetched the chunk from the origin
(by way of the scheduler, or directly where it is the chunk's lease holder), or from two peers that
agree; never from the peer that serves the bytes alone. A chunk that only its sender vouches for is
kept but not offered on; what an earlier run kept, checked again, counts as if witnesses had spoken for it.
What a word rests on is kept (Basis): when it proves wrong, who gave it is to blame, not who passed it on.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum
from typing import TYPE_CHECKING

from xxhash import xxh3_128_digest

from p2pdist.core.chunkmap import chunk_set
from p2pdist.core.types import Checksum, Digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from p2pdist.core.types import PeerId

CHECKSUM_BYTES = 16
MAX_WRONG_WORDS = 64
"""Of one chunk, remembered."""
WITNESSES = 2
"""Peers that must agree on a checksum where no lease holder's word is known."""


def hash_like(digest: str) -> hashlib._Hash:
    """Return a hash, with nothing in it yet, of the algorithm that a parsed digest names."""
    return hashlib.new(digest.partition(":")[0])


def digest_like(digest: str, body: bytes) -> Digest:
    """Return the digest of `body` by the algorithm that a parsed digest names."""
    algorithm = digest.partition(":")[0]
    return Digest(f"{algorithm}:{hashlib.new(algorithm, body).hexdigest()}")


def checksum_of(data: bytes | bytearray | memoryview) -> Checksum:
    """Return the xxh3-128 of a chunk, 16 bytes (15 GB/s, a twentieth of SHA-256's cost)."""
    return Checksum(xxh3_128_digest(data))


class Basis(IntEnum):
    """What a settled checksum rests on; a higher one takes the place of a lower."""

    WITNESSES = 1
    """Peers that agree, each of which may believe another."""
    HOLDER = 2
    """The chunk's lease holder by rendezvous, which says so itself."""
    SCHEDULER = 3
    """The lease holder by way of the scheduler."""
    CERTAIN = 4
    """This agent has read the chunk from the origin, or the blob is verified."""


class Vouchers:
    """What is known of the checksums of one blob's chunks."""

    def __init__(self) -> None:
        self.settled: dict[int, Checksum] = {}
        self.settled_bits = 0
        """The same chunks, as a set."""
        self.overturned: dict[int, tuple[Checksum, Basis, PeerId | None]] = {}
        """What was settled of a chunk and proved wrong last."""
        self.known_wrong: dict[int, set[Checksum]] = {}
        """Words that proved wrong, whose author has been blamed: whoever says the same later may have believed it."""
        self._basis: dict[int, tuple[Basis, PeerId | None]] = {}
        """What each settled checksum rests on, and which peer was the first to say it."""
        self._claims: dict[int, dict[PeerId, Checksum]] = {}

    def settle(
        self, index: int, checksum: Checksum, basis: Basis = Basis.CERTAIN, by: PeerId | None = None
    ) -> list[tuple[PeerId, Checksum]]:
        """Take this checksum as right; return the peers that said otherwise, and what."""
        claims = self._claims.pop(index, {})
        self.settled[index] = checksum
        self.settled_bits |= 1 << index
        self._basis[index] = basis, by
        return [(peer, word) for peer, word in claims.items() if word != checksum]

    def agree(self, indices: list[int], checksums: bytes) -> bool:
        """Return whether all these chunks are settled and their checksums, packed, say the same: mostly they do."""
        settled = self.settled
        try:
            return b"".join([settled[index] for index in indices]) == checksums
        except KeyError:
            return False

    def basis(self, index: int) -> tuple[Basis | None, PeerId | None]:
        """Return what the chunk's settled checksum rests on; None where it is not settled."""
        return self._basis.get(index, (None, None))

    def resting_on(self, peer: PeerId) -> list[int]:
        """Return the chunks whose settled checksum this peer was the first to say."""
        return [index for index, (_, by) in self._basis.items() if by == peer]

    def claim(self, index: int, checksum: Checksum, by: PeerId) -> bool:
        """Note a peer's word on a chunk that is not settled; return whether enough peers agree to settle it."""
        claims = self._claims.setdefault(index, {})
        claims[by] = checksum
        return sum(1 for other in claims.values() if other == checksum) >= WITNESSES

    def author(self, index: int, checksum: Checksum, last: PeerId) -> PeerId:
        """Return who was the first to say this of a chunk that is not settled: `last`, or one before."""
        return next((peer for peer, word in self._claims.get(index, {}).items() if word == checksum), last)

    def news(self, index: int, checksum: Checksum) -> bool:
        """Note that a word proved wrong; return whether that was not known yet, so that its author is to blame."""
        known = self.known_wrong.setdefault(index, set())
        if checksum in known or len(known) >= MAX_WRONG_WORDS:
            return False
        known.add(checksum)
        return True

    def is_stale(self, index: int, checksum: Checksum) -> bool:
        """Return whether a word on a chunk of which nothing is settled is one that proved wrong."""
        return checksum in self.known_wrong.get(index, ()) and index not in self.settled

    def stale(self, words: list[tuple[int, Checksum]]) -> int:
        """Return the set of the chunks of which a word is stale."""
        if not self.known_wrong:
            return 0
        return chunk_set(index for index, word in words if self.is_stale(index, word))

    def redeem(self, words: Mapping[int, Checksum]) -> list[int]:
        """Take words as right that may have been thought wrong before; return the chunks of those that were."""
        if not self.known_wrong:
            return []
        right = [index for index, word in words.items() if word in self.known_wrong.get(index, ())]
        for index in right:
            self.known_wrong[index].discard(words[index])
        return right

    def expected(self, index: int, sender: PeerId) -> Checksum | None:
        """Return what the chunk's checksum should be: the settled one, else the sender's own claim, else None."""
        settled = self.settled.get(index)
        return settled if settled is not None else self._claims.get(index, {}).get(sender)

    def forget(self, indices: Iterable[int]) -> None:
        """Trust nothing said of these chunks any more: they proved wrong."""
        for index in indices:
            word = self.settled.pop(index, None)
            if word is not None:
                self.overturned[index] = word, *self._basis.pop(index)
                self.news(index, word)
            self.settled_bits &= ~(1 << index)
            self._claims.pop(index, None)

    def withdraw(self, peer: PeerId) -> None:
        """Forget what one peer claims; what is settled stays."""
        for claims in self._claims.values():
            claims.pop(peer, None)
