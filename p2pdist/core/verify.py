# SPDX-License-Identifier: Apache-2.0
"""Digests, checksums of chunks, and whose word for them counts.

The blob's SHA-256 (SHA-512 where its digest is one) is the only authority. The xxh3-128 of a chunk
finds corruption early: the expected value comes from the one that fetched the chunk from the origin
(by way of the scheduler, or directly where it is the chunk's lease holder), or from two peers that
agree; never from the peer that serves the bytes alone. A chunk that only its sender vouches for is
kept but not offered on; what an earlier run kept, checked again, counts as our own word.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from xxhash import xxh3_128_digest

from p2pdist.core.types import Checksum, Digest

if TYPE_CHECKING:
    from p2pdist.core.types import PeerId

CHECKSUM_BYTES = 16
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


class Vouchers:
    """What is known of the checksums of one blob's chunks."""

    def __init__(self) -> None:
        self.settled: dict[int, Checksum] = {}
        self.settled_bits = 0
        """The same chunks, as a set."""
        self._claims: dict[int, dict[PeerId, Checksum]] = {}

    def settle(self, index: int, checksum: Checksum) -> None:
        """Take this checksum as right: its source has read the chunk from the origin, or the blob is verified."""
        self.settled[index] = checksum
        self.settled_bits |= 1 << index
        self._claims.pop(index, None)

    def claim(self, index: int, checksum: Checksum, by: PeerId) -> bool:
        """Note a peer's word; return whether it settled the chunk's checksum just now."""
        if index in self.settled:
            return False
        claims = self._claims.setdefault(index, {})
        claims[by] = checksum
        if sum(1 for other in claims.values() if other == checksum) < WITNESSES:
            return False
        self.settle(index, checksum)
        return True

    def expected(self, index: int, sender: PeerId) -> Checksum | None:
        """Return what the chunk's checksum should be: the settled one, else the sender's own claim, else None."""
        settled = self.settled.get(index)
        return settled if settled is not None else self._claims.get(index, {}).get(sender)

    def forget(self, indices: list[int]) -> None:
        """Trust nothing said of these chunks any more: they proved wrong."""
        for index in indices:
            self.settled.pop(index, None)
            self.settled_bits &= ~(1 << index)
            self._claims.pop(index, None)
