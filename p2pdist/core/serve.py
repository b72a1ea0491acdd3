# SPDX-License-Identifier: Apache-2.0
"""Upload slots: whom to offer a chunk to.

The sender decides whom to serve, the receiver which chunk, or none: a bound on the sender's queue
without everybody rushing to the only holder of a new chunk. Of two random candidates the one that
lacks more gets the grant; always the neediest makes all senders choose the same one (measured:
SWARM lesson 2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from random import Random

    from p2pdist.core.peerbook import Peer
    from p2pdist.core.progress import Progress
    from p2pdist.core.types import Digest, PeerId

GRANT_TIMEOUT_S = 3.0
"""A grant that is not answered so long is taken back."""
PARK_S = 1.0
"""How long a peer without room is passed over, unless its Room comes first."""
UPLOAD_TIMEOUT_S = 60.0
"""A slot is freed after this in any case; the link's own stall deadline is shorter."""
PER_PEER = 2
"""Grants to one peer at a time: the second hides the round trip of the first."""


def need(peer: Peer, blobs: Mapping[Digest, Progress]) -> int:
    """Return how many chunks we could give this peer."""
    total = 0
    for blob in peer.wants:
        progress = blobs.get(blob)
        if progress is not None and progress.offered:
            total += peer.lacks(blob, progress.offered).bit_count()
    return total


def candidates(
    peers: Mapping[PeerId, Peer], blobs: Mapping[Digest, Progress], gains: int, now: float
) -> list[tuple[int, Peer]]:
    """Return the peers that a grant may go to, each with the number of chunks that it lacks."""
    found = []
    for peer in peers.values():
        if not peer.wants or len(peer.uploads) >= PER_PEER or peer.parked_until > now or peer.idle_at == gains:
            continue
        lacks = need(peer, blobs)
        if lacks > sum(upload.blob is None for upload in peer.uploads.values()):
            found.append((lacks, peer))
    return found


def choose(found: list[tuple[int, Peer]], rng: Random) -> Peer:
    """Return one of the candidates: the one without a grant first, then the needier of two drawn at random."""
    fresh = [entry for entry in found if not entry[1].uploads] or found
    first = fresh[int(rng.random() * len(fresh))]
    second = fresh[int(rng.random() * len(fresh))]
    return first[1] if first[0] >= second[0] else second[1]
