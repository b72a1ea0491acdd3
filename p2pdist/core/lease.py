# SPDX-License-Identifier: Apache-2.0
"""Who fetches which chunk from the origin where no scheduler says it: rendezvous hashing.

Each member ranks all members for a chunk by a hash of (chunk, member); the first fetches it. All
that know the same members agree without a word; when one leaves, only its chunks move (Thaler and
Ravishankar 1998).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

if TYPE_CHECKING:
    from collections.abc import Collection

    from p2pdist.core.types import Digest, PeerId


def weight(blob: Digest, index: int, member: PeerId) -> int:
    """Return the 64-bit weight of a member for a chunk; the greatest leases it."""
    return xxh3_64_intdigest(f"{blob}/{index}/{member}".encode())


def rank_of(member: PeerId, blob: Digest, index: int, members: Collection[PeerId]) -> int:
    """Return how many of `members` come before `member` for this chunk: 0 is the lease holder."""
    own = weight(blob, index, member)
    return sum(1 for other in members if other != member and weight(blob, index, other) > own)


def holder_of(blob: Digest, index: int, members: Collection[PeerId]) -> PeerId:
    """Return the member that leases the chunk; `members` is not empty."""
    return max(members, key=lambda member: weight(blob, index, member))
