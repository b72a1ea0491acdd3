# SPDX-License-Identifier: Apache-2.0
"""Giving chunks to peers: upload slots, and whom to grant one.

The sender decides whom to serve, the receiver which chunk, or none: a bound on the sender's queue
without everybody rushing to the only holder of a new chunk. Of two random candidates the one that
lacks more gets the grant; always the neediest makes all senders choose the same one (measured:
SWARM lesson 2).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from p2pdist.core.chunkmap import MIN_CHUNK_BYTES
from p2pdist.core.events import CancelSend, SendChunk
from p2pdist.core.packing import pack_indices
from p2pdist.core.peerbook import Upload
from p2pdist.core.reputation import Offence
from p2pdist.core.way_out import WayOut
from p2pdist.core.wire import Decline, Grant, Have, Refuse, Take

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    from p2pdist.core.peerbook import Peer
    from p2pdist.core.racks import Racks
    from p2pdist.core.state import SwarmState
    from p2pdist.core.types import Digest, PeerId

GRANT_TIMEOUT_S = 3.0
"""A grant that is not answered so long is taken back, and its peer passed over for PARK_S, twice as long after each
further one up to MAX_PARK_S: who stalls lacks most, and held two of six slots most of the time."""
MAX_PARK_S = 30.0
PARK_S = 1.0
"""How long a peer that declined is passed over, unless its Room comes or we gain something first."""
SLOW_S = 5.0
SLOW_FACTOR = 16
"""A slot whose chunk takes so many times what chunks take lately, and at least SLOW_S, is given to another; the slow
reader gets no other until it has that chunk."""
UPLOAD_TIMEOUT_S = 60.0
"""Who has not read its chunk by then is sent away."""
HUNGRY_FOR_S = 0.3
"""A peer that says Room is granted to before others for so long, once."""
FIRST_GAINS = 4
"""For each so many chunks gained in this pull, one more is sent at a time, up to all slots. While there is little to
give, its copies leave one by one, so that the first can be passed on early; later, many at a time fill the link though
some receivers are busy."""
PER_PEER = 2
"""Grants to one peer at a time: the second hides the round trip of the first."""


class Giving:
    """The upload slots of one agent. At most `settings.upload_slots` are in use."""

    def __init__(self, state: SwarmState, racks: Racks) -> None:
        self.slots_used = 0
        self._racks = racks
        self._state = state
        self._line: deque[tuple[PeerId, int]] = deque()
        """Grants taken whose chunks wait for their turn on our link."""
        self._under_way: set[tuple[PeerId, int]] = set()
        self._usual_s = 0.0
        """What a chunk takes to be sent lately; 0 before the first."""
        self.way_out = WayOut(state)

    def grant(self) -> None:
        """Offer free slots."""
        state = self._state
        while self.slots_used < self.way_out.slots:
            peer = self._choose()
            if peer is None:
                return
            peer.hungry_until = 0.0
            number = peer.number()
            peer.uploads[number] = Upload(state.now)
            self.slots_used += 1
            state.counters.grants += 1
            state.answer(peer, Grant(number))

    def _choose(self) -> Peer | None:
        """Return whom to grant to next, of those that said Room lately if there are such."""
        state = self._state
        now, gains, rng = state.now, state.gains, state.rng
        # Most have declined lately: to see that here spares a call for each, several times a chunk.
        pool = [
            peer
            for peer in state.book.peers.values()
            if (peer.passed_until <= now or not (peer.full or peer.idle_at == gains))
            and len(peer.uploads) < PER_PEER
            and not peer.clogged
        ]
        if not pool:
            return None
        hungry = [peer for peer in pool if peer.hungry_until > now]
        return (choose(hungry, self._lacks, rng) if hungry else None) or choose(pool, self._lacks, rng)

    def _lacks(self, peer: Peer) -> int:
        """Return how many chunks we could give this peer."""
        uploads, total, blobs, shared, racks = peer.uploads, 0, self._state.blobs, peer.shared, self._racks
        passed = peer.passed if peer.passed_until > self._state.now else None
        for blob in peer.wants:
            progress = blobs.get(blob)
            if progress is not None and progress.shared:
                offered = progress.offered
                bits = peer.lacks(blob, offered) if uploads or peer.doubted else offered & ~shared.get(blob, 0)
                if passed:
                    bits &= ~passed.get(blob, 0)
                if bits:
                    total += racks.givable(peer, progress, bits).bit_count()
        return total if total > sum(upload.blob is None for upload in uploads.values()) else 0

    def taken(self, peer: Peer, message: Take) -> None:
        """Serve a grant's chunk, or refuse it where it is not ours to give (any more)."""
        state = self._state
        upload, progress = peer.uploads.get(message.number), state.blobs.get(message.blob)
        ours = progress is not None and progress.shared and progress.offered >> message.index & 1
        if upload is not None and upload.blob is None and ours:
            upload.blob, upload.index, upload.since = message.blob, message.index, state.now
            peer.lapses = 0
            self._line.append((peer.peer_id, message.number))
            self._begin()
            return
        state.send(peer, Refuse(message.number))
        if progress is not None and ours:
            # The grant has lapsed, but the chunk is still here: a Refuse alone would say that it is not.
            state.send(peer, Have(message.blob, pack_indices([message.index]), progress.own[message.index]))
        elif upload is not None and upload.blob is None:
            self.free(peer, message.number)
            self.grant()

    def _begin(self) -> None:
        """Send the next chunks in line, as far as our link should carry them."""
        while self._line and len(self._under_way) < self._at_once():
            peer_id, number = self._line.popleft()
            upload = self._state.book.peers[peer_id].uploads[number]
            assert upload.blob is not None
            if not self._under_way:
                self.way_out.begins()
            self._under_way.add((peer_id, number))
            self._state.out.append(SendChunk(peer=peer_id, number=number, blob=upload.blob, index=upload.index))

    def _at_once(self) -> int:
        """Return how many chunks to send at a time: few while we have few."""
        state = self._state
        most = self.way_out.at_once
        return min(most, 1 + (state.gains - state.gains_before) // FIRST_GAINS) if state.wanted() else most

    def cancelled(self, peer: Peer, number: int) -> None:
        """Stop sending a chunk, or take it out of the line."""
        if (peer.peer_id, number) in self._line:
            self._state.send(peer, Refuse(number))
            self.free(peer, number)
            self.grant()
        else:
            if (upload := peer.uploads.get(number)) is not None:
                upload.called_off = True
            self._state.out.append(CancelSend(peer=peer.peer_id, number=number))

    def declined(self, peer: Peer, message: Decline) -> None:
        state = self._state
        state.counters.declines += 1
        peer.passed_until = state.now + PARK_S
        peer.full, peer.idle_at, peer.lapses = message.full, state.gains, 0
        # What it lacks of that is on its way to it from others.
        peer.passed = {} if message.full else {blob: self._offered(blob) for blob in peer.wants}
        self.free(peer, message.number)
        self.grant()

    def _offered(self, blob: Digest) -> int:
        progress = self._state.blobs.get(blob)
        return 0 if progress is None else progress.offered

    def has_room(self, peer: Peer) -> None:
        """Grant to a peer soon: it has room, or little on its way."""
        peer.passed_until = 0.0
        peer.hungry_until = self._state.now + HUNGRY_FOR_S
        self.grant()

    def sent(self, peer: Peer, number: int) -> None:
        """Count a chunk that has left, and use its slot again."""
        state, upload = self._state, peer.uploads.get(number)
        peer.clogged.discard(number)
        if upload is not None and upload.blob is not None:
            took_s = state.now - upload.since
            self._usual_s = took_s if not self._usual_s else 0.8 * self._usual_s + 0.2 * took_s
            progress = state.blobs.get(upload.blob)
            if progress is not None and progress.chunks is not None:
                size = progress.chunks.length(upload.index)
                state.counters.to_peers += size
                peer.up_bytes += size
                if (peer.peer_id, number) in self._under_way:
                    self.way_out.left(counts=size >= MIN_CHUNK_BYTES and not upload.called_off)
        self.free(peer, number)
        self.grant()

    def free(self, peer: Peer, number: int) -> None:
        if peer.uploads.pop(number, None) is None:
            return
        self.slots_used -= 1
        if (key := (peer.peer_id, number)) in self._under_way:
            self._under_way.discard(key)
            self._begin()
        elif key in self._line:
            self._line.remove(key)

    def lost(self, peer: Peer) -> None:
        """Give up all slots of a peer that has gone."""
        self._line = deque(key for key in self._line if key[0] != peer.peer_id)
        for number in list(peer.uploads):
            self.free(peer, number)

    def expire(self, peer: Peer) -> None:
        """Take back slots that the peer does not use."""
        now = self._state.now
        for number, upload in list(peer.uploads.items()):
            if upload.blob is None and now - upload.since > GRANT_TIMEOUT_S:
                if peer.passed_until <= now:
                    peer.passed_until = now + min(PARK_S * 2**peer.lapses, MAX_PARK_S)
                    peer.lapses += 1
                peer.full = True
                self.free(peer, number)
            elif (peer.peer_id, number) in self._under_way and now - upload.since > self._slow_s:
                peer.clogged.add(number)
                peer.clogged_at = upload.since
                self.free(peer, number)

    @property
    def _slow_s(self) -> float:
        return max(SLOW_S, SLOW_FACTOR * self._usual_s)

    def offence(self, peer: Peer) -> tuple[Offence, str] | None:
        """Return what a peer does wrong with the chunks that it took, or None."""
        if peer.clogged and self._state.now - peer.clogged_at > UPLOAD_TIMEOUT_S:
            return Offence.SLOW_READER, f"has not read a chunk that it took {UPLOAD_TIMEOUT_S:.0f} s ago"
        return None


def choose(pool: list[Peer], lacks: Callable[[Peer], int], rng: Random) -> Peer | None:
    """Return one of the peers: those without a grant first, then the needier of two drawn at random.

    Looks at no more of them than it must, which counts: it is called several times for each chunk.

    Args:
        pool: is used up.
        lacks: how much a peer needs; 0 where it is not eligible.
    """
    fresh: list[tuple[int, Peer]] = []
    served: list[tuple[int, Peer]] = []
    while pool and len(fresh) < 2:
        at = int(rng.random() * len(pool))
        peer, pool[at] = pool[at], pool[-1]
        pool.pop()
        need = lacks(peer)
        if not need:
            continue
        (served if peer.uploads else fresh).append((need, peer))
        if len(fresh) == 1 and rng.random() * (len(pool) + 1) < 1:
            break  # drawn twice: the needy must not always win, or all senders choose the same ones
    drawn = (fresh or served)[:2]
    return max(drawn, key=_need)[1] if drawn else None


def _need(entry: tuple[int, Peer]) -> int:
    return entry[0]
