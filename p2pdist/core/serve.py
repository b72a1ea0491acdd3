# SPDX-License-Identifier: Apache-2.0
"""Giving chunks to peers: upload slots, and whom to grant one.

The sender decides whom to serve, the receiver which chunk, or none: a bound on the sender's queue
without everybody rushing to the only holder of a new chunk. Of two random candidates the one that
lacks more gets the grant; always the neediest makes all senders choose the same one (measured:
SWARM lesson 2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2pdist.core.events import SendChunk
from p2pdist.core.peerbook import Upload
from p2pdist.core.wire import Decline, Grant, Have, Refuse, Take, pack_indices

if TYPE_CHECKING:
    from random import Random

    from p2pdist.core.peerbook import Peer
    from p2pdist.core.racks import Racks
    from p2pdist.core.state import SwarmState

GRANT_TIMEOUT_S = 3.0
"""A grant that is not answered so long is taken back."""
PARK_S = 1.0
"""How long a peer that declined is passed over, unless its Room comes or we gain something first."""
UPLOAD_TIMEOUT_S = 60.0
"""A slot is freed after this in any case; the link's own stall deadline is shorter."""
HUNGRY_FOR_S = 0.3
"""A peer that says Room is granted to before others for so long, once."""
PER_PEER = 2
"""Grants to one peer at a time: the second hides the round trip of the first."""


class Giving:
    """The upload slots of one agent. At most `settings.upload_slots` are in use."""

    def __init__(self, state: SwarmState, racks: Racks) -> None:
        self.slots_used = 0
        self._racks = racks
        self._state = state

    def grant(self) -> None:
        """Offer free slots."""
        state = self._state
        while self.slots_used < state.settings.upload_slots:
            found = self._candidates()
            if not found:
                return
            hungry = [entry for entry in found if entry[1].hungry_until > state.now]
            peer = choose(hungry or found, state.rng)
            peer.hungry_until = 0.0
            number = peer.number()
            peer.uploads[number] = Upload(state.now)
            self.slots_used += 1
            state.counters.grants += 1
            state.answer(peer, Grant(number))

    def _candidates(self) -> list[tuple[int, Peer]]:
        """Return the peers that a grant may go to, each with the number of chunks that it lacks."""
        state, found = self._state, []
        for peer in state.book.peers.values():
            if not peer.wants or len(peer.uploads) >= PER_PEER:
                continue
            if peer.passed_until > state.now and (peer.full or peer.idle_at == state.gains):
                continue
            lacks = self._need(peer)
            if lacks > sum(upload.blob is None for upload in peer.uploads.values()):
                found.append((lacks, peer))
        return found

    def _need(self, peer: Peer) -> int:
        """Return how many chunks we could give this peer."""
        total, blobs = 0, self._state.blobs
        for blob in peer.wants:
            progress = blobs.get(blob)
            if progress is not None and progress.shared:
                total += self._racks.givable(peer, progress, peer.lacks(blob, progress.offered)).bit_count()
        return total

    def taken(self, peer: Peer, message: Take) -> None:
        """Serve a grant's chunk, or refuse it where it is not ours to give (any more)."""
        state = self._state
        upload, progress = peer.uploads.get(message.number), state.blobs.get(message.blob)
        ours = progress is not None and progress.shared and progress.offered >> message.index & 1
        if upload is not None and upload.blob is None and ours:
            upload.blob, upload.index, upload.since = message.blob, message.index, state.now
            number, blob, index = message.number, message.blob, message.index
            state.out.append(SendChunk(peer=peer.peer_id, number=number, blob=blob, index=index))
            return
        state.send(peer, Refuse(message.number))
        if progress is not None and ours:
            # The grant has lapsed, but the chunk is still here: a Refuse alone would say that it is not.
            state.send(peer, Have(message.blob, pack_indices([message.index]), progress.own[message.index]))
        elif upload is not None and upload.blob is None:
            self.free(peer, message.number)
            self.grant()

    def declined(self, peer: Peer, message: Decline) -> None:
        state = self._state
        state.counters.declines += 1
        peer.passed_until = state.now + PARK_S
        peer.full, peer.idle_at = message.full, state.gains
        self.free(peer, message.number)
        self.grant()

    def has_room(self, peer: Peer) -> None:
        """Grant to a peer soon: it has room, or little on its way."""
        peer.passed_until = 0.0
        peer.hungry_until = self._state.now + HUNGRY_FOR_S
        self.grant()

    def sent(self, peer: Peer, number: int) -> None:
        """Count a chunk that has left, and use its slot again."""
        state, upload = self._state, peer.uploads.get(number)
        if upload is not None and upload.blob is not None:
            progress = state.blobs.get(upload.blob)
            if progress is not None and progress.chunks is not None:
                size = progress.chunks.length(upload.index)
                state.counters.to_peers += size
                peer.up_bytes += size
        self.free(peer, number)
        self.grant()

    def free(self, peer: Peer, number: int) -> None:
        if peer.uploads.pop(number, None) is not None:
            self.slots_used -= 1

    def lost(self, peer: Peer) -> None:
        self.slots_used -= len(peer.uploads)
        peer.uploads.clear()

    def expire(self, peer: Peer) -> None:
        """Take back slots that the peer does not use."""
        now = self._state.now
        for number, upload in list(peer.uploads.items()):
            if upload.blob is None and now - upload.since > GRANT_TIMEOUT_S:
                peer.passed_until, peer.full = now + PARK_S, True
                self.free(peer, number)
            elif now - upload.since > UPLOAD_TIMEOUT_S:
                self.free(peer, number)


def choose(found: list[tuple[int, Peer]], rng: Random) -> Peer:
    """Return one of the candidates: those without a grant first, then the needier of two drawn at random."""
    fresh = [entry for entry in found if not entry[1].uploads] or found
    first = fresh[int(rng.random() * len(fresh))]
    second = fresh[int(rng.random() * len(fresh))]
    return first[1] if first[0] >= second[0] else second[1]
