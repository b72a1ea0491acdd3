# SPDX-License-Identifier: Apache-2.0
"""Racks: a chunk comes into a rack once, and goes from node to node inside it.

A rack's nodes share an uplink, which is narrower than what they can give each other. Per chunk, each
rack has one importer: of its members that want the blob, the first by rendezvous hashing, as for leases
(core/lease.py). Only it takes the chunk from other racks, as long as nobody in the rack has it; the
others take it inside. Senders know the same members and grant accordingly.

Liveness: a chunk that outsiders have had for PATIENCE_S and nobody inside may be imported by the next
in rank too, and so on; who gets little for PATIENCE_S takes from anybody. A peer whose rack is not known
is near to everybody, and where our own is not, all are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2pdist.core.chunkmap import lowest, members
from p2pdist.core.lease import rank_of, weight

if TYPE_CHECKING:
    from p2pdist.core.peerbook import Peer
    from p2pdist.core.progress import Progress
    from p2pdist.core.state import SwarmState
    from p2pdist.core.types import Digest, PeerId

PATIENCE_S = 2.5
"""How long the next in rank waits for an importer: several times what a chunk takes on a busy uplink."""
WINDOW_PATIENCE_S = 1.5
"""The same for chunks that a runtime is about to read."""
MOST_PATIENT = 3
"""After so many times the patience, anybody imports."""


def place_of(site: str, rack: str) -> str:
    """Return a rack's name among all sites, empty where no rack is given."""
    return f"{site}/{rack}" if rack else ""


class Importers:
    """Who of a rack's members imports which chunks of one blob."""

    def __init__(self, blob: Digest, count: int) -> None:
        self.count = count
        self._blob = blob
        self._best: list[tuple[int, PeerId] | None] = [None] * count
        self._chunks: dict[PeerId, int] = {}

    def chunks_of(self, member: PeerId, rack: set[PeerId]) -> int:
        """Return the chunks that `member` imports, as one of these; who comes or goes costs a hash per chunk."""
        chunks = self._chunks
        if chunks.keys() != rack:
            for other in rack - chunks.keys():
                self._add(other)
            for other in chunks.keys() - rack:
                self._remove(other)
        return chunks.get(member, 0)

    def _add(self, member: PeerId) -> None:
        chunks, own = self._chunks, 0
        for index, best in enumerate(self._best):
            entry = weight(self._blob, index, member), member
            if best is None or entry > best:
                self._best[index] = entry
                own |= 1 << index
                if best is not None:
                    chunks[best[1]] &= ~(1 << index)
        chunks[member] = own

    def _remove(self, member: PeerId) -> None:
        for index in members(self._chunks.pop(member)):
            best = max((weight(self._blob, index, other), other) for other in self._chunks)
            self._best[index] = best
            self._chunks[best[1]] |= 1 << index


class Racks:
    """Which chunks may cross the border of a rack, as one agent sees it."""

    def __init__(self, state: SwarmState) -> None:
        self._state = state
        self._own = state.settings.rack
        self._importers: dict[tuple[Digest, str], Importers] = {}
        self._waits: dict[Digest, dict[int, float]] = {}
        """Chunks that only other racks have, and since when."""
        self._overdue: dict[Digest, int] = {}
        """Those of them that we may import though others should."""
        self._fed_at = 0.0
        """When this agent last had enough on its way, or nothing to get elsewhere."""

    def is_far(self, peer: Peer) -> bool:
        """Whether what this peer gives us, or we give it, crosses our rack's border."""
        return bool(self._own and peer.rack and peer.rack != self._own)

    @property
    def starving(self) -> bool:
        """Whether so little has been on its way for so long that anything may be taken from anybody."""
        return self._state.now - self._fed_at > PATIENCE_S

    def takable(self, peer: Peer, progress: Progress, free: int) -> int:
        """Return those of the chunks `free` that we should take from this peer rather than wait for our rack."""
        if not free or not self.is_far(peer) or self.starving:
            return free
        free &= ~self._held(self._own, progress.blob)
        if not free:
            return 0
        ours = self._imports(self._own, self._state.peer_id, progress)
        return free & (ours | self._overdue.get(progress.blob, 0))

    def givable(self, peer: Peer, progress: Progress, lacking: int) -> int:
        """Return those of the chunks `lacking` that this peer should take from us: what its rack has, it has there."""
        if not lacking or not self.is_far(peer) or peer.hungry_until > self._state.now:
            return lacking
        lacking &= ~self._held(peer.rack, progress.blob)
        return lacking & self._imports(peer.rack, peer.peer_id, progress) if lacking else 0

    def _held(self, rack: str, blob: Digest) -> int:
        """Return the chunks that some peer of a rack has."""
        held = 0
        for mate in self._state.book.racks.get(rack, {}).values():
            held |= mate.shared.get(blob, 0)
        return held

    def _imports(self, rack: str, member: PeerId, progress: Progress) -> int:
        """Return the chunks of which a member of a rack is the importer."""
        who = self._members(rack, progress.blob)
        if len(who) < 2:
            return progress.full
        importers = self._importers.get((progress.blob, rack))
        if importers is None or importers.count != progress.count:
            importers = self._importers[progress.blob, rack] = Importers(progress.blob, progress.count)
        return importers.chunks_of(member, who)

    def _members(self, rack: str, blob: Digest) -> set[PeerId]:
        who = {mate.peer_id for mate in self._state.book.racks.get(rack, {}).values() if blob in mate.wants}
        if rack == self._own:
            who.add(self._state.peer_id)
        return who

    def look(self, under_way: int) -> list[tuple[Progress, int]]:
        """Note what the rack waits for; return chunks that others should have imported long ago, one a blob.

        Args:
            under_way: chunks on their way to us from peers.
        """
        state, late, elsewhere = self._state, [], 0
        far = [rack for rack in state.book.racks if rack != self._own] if self._own else []
        for progress in state.wanted() if far else ():
            outside = 0
            for rack in far:
                outside |= self._held(rack, progress.blob)
            lacking = outside & ~(progress.have | progress.inflight)
            elsewhere |= lacking
            self._note(progress, lacking & ~self._held(self._own, progress.blob))
            if overdue := self._overdue.get(progress.blob, 0):
                late.append((progress, lowest(overdue)))
        if not elsewhere or 2 * under_way >= state.settings.downloads:
            self._fed_at = state.now
        self._prune()
        return late

    def _note(self, progress: Progress, waiting: int) -> None:
        """Keep since when each chunk is waited for, and which ones have been for too long."""
        now, known, overdue = self._state.now, self._waits.get(progress.blob, {}), 0
        waits = self._waits[progress.blob] = {index: known.get(index, now) for index in members(waiting)}
        who = self._members(self._own, progress.blob)
        for index, since in waits.items():
            patience_s = WINDOW_PATIENCE_S if progress.window >> index & 1 else PATIENCE_S
            turns = int((now - since) / patience_s)
            if turns and (turns >= MOST_PATIENT or rank_of(self._state.peer_id, progress.blob, index, who) <= turns):
                overdue |= 1 << index
        self._overdue[progress.blob] = overdue

    def _prune(self) -> None:
        blobs = self._state.blobs
        for gone in [blob for blob in self._waits if blob not in blobs or not blobs[blob].wanted]:
            del self._waits[gone], self._overdue[gone]
        for key in [key for key in self._importers if key[0] not in blobs]:
            del self._importers[key]
