# SPDX-License-Identifier: Apache-2.0
"""What the members of a swarm without a scheduler say they are fetching from the origin.

Rendezvous hashing says who fetches a chunk next, and says otherwise as soon as a member comes or goes: what is being
fetched then would be fetched again. So whoever begins to fetch tells the others (Renew, which is what a scheduler
hears), says so again while it lasts, and tells newcomers when they share. A fetch ends when its peer has the chunk,
goes, or gives it up (Failed). Who says nothing more is not believed again, for this blob.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from p2pdist.core.types import PeerId

SILENT_S = 3.0
"""Without another Renew a fetch counts for so long: members renew every second."""
MAX_S = 15.0
"""However often it is renewed: as long as a scheduler's lease."""
MAX_PER_PEER = 64
"""Of one blob: four requests of sixteen chunks each."""


@dataclass(slots=True)
class _Fetch:
    peer: PeerId
    since: float
    renewed_at: float


class Fetches:
    """Those of others, of one blob."""

    def __init__(self) -> None:
        self._fetches: dict[int, _Fetch] = {}
        self._unreliable: set[PeerId] = set()

    def note(self, peer: PeerId, index: int, now: float) -> None:
        """Take in that a peer fetches a chunk; where several do, the first to say so counts."""
        known = self._fetches.get(index)
        if known is not None:
            if known.peer == peer:
                known.renewed_at = now
            return
        several = sum(other.peer == peer for other in self._fetches.values())
        if peer not in self._unreliable and several < MAX_PER_PEER:
            self._fetches[index] = _Fetch(peer, now, now)

    def drop(self, peer: PeerId, chunks: int = -1) -> list[float]:
        """Forget what a peer fetches of the set `chunks`: of all, if it is not given; return since when it did."""
        gone = [at for at, fetch in self._fetches.items() if fetch.peer == peer and chunks >> at & 1]
        return [self._fetches.pop(at).since for at in gone]

    def peers(self, now: float) -> list[PeerId]:
        """Return who fetches, once for each chunk."""
        self.under_way(now)
        return [fetch.peer for fetch in self._fetches.values()]

    def under_way(self, now: float) -> int:
        """Return the chunks that are being fetched."""
        bits = 0
        for index, fetch in list(self._fetches.items()):
            if now - fetch.renewed_at >= SILENT_S or now - fetch.since >= MAX_S:
                del self._fetches[index]
                self._unreliable.add(fetch.peer)
            else:
                bits |= 1 << index
        return bits
