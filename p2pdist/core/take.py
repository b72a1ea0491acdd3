# SPDX-License-Identifier: Apache-2.0
"""Taking chunks from peers: which chunk to use a grant for, how many at a time, and until when to wait.

A grant is answered at once: Take for the chunk that suits best, Decline where there is no room or
nothing new. One of those that find no room is kept, and answered when there is some; who was declined is told then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2pdist.core.chunkmap import MAX_CHUNK_BYTES, members
from p2pdist.core.events import TakeChunk
from p2pdist.core.peerbook import FAILURES_TO_DROP, Download
from p2pdist.core.rate import TokenBucket
from p2pdist.core.reputation import Offence
from p2pdist.core.select import rarest
from p2pdist.core.swap import Swap
from p2pdist.core.wire import Cancel, Decline, Room
from p2pdist.errors import RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from p2pdist.core.peerbook import Peer
    from p2pdist.core.progress import Progress
    from p2pdist.core.racks import Racks
    from p2pdist.core.state import SwarmState
    from p2pdist.core.swap import Fresh
    from p2pdist.core.types import Digest, PeerId

DEADLINE_S = 10.0
"""For the first chunk from a peer; later DEADLINE_FACTOR times what chunks take lately, at least MIN_DEADLINE_S."""
MIN_DEADLINE_S = 2.0
DEADLINE_FACTOR = 8
SILENT_S = 1.0
SILENT_FACTOR = 4
"""A peer that sends nothing at all loses the slot sooner, after this many times what chunks take and at least SILENT_S,
or after FIRST_SILENT_S before the first has come from anywhere."""
FIRST_SILENT_S = 3.0
STALLED_S = 20.0
"""A peer whose chunk is late and that has sent nothing for so long is sent away: it costs no slot before that, and a
network that was cut for some seconds must not part the honest."""
MAX_LATE = 32
"""Late chunks that may still come, from all peers together: their buffers are kept. More are called off."""
REFUSALS = 8
"""Chunks that a peer may refuse, more than it has sent, before that counts against it."""
DUPLICATE_FACTOR = 3
"""In the endgame, a chunk that has been on its way this many usual times may be taken a second time."""
CALLED = 2
"""Holders told that a chunk is to be had from them after all, or that we have little on its way."""
FETCH_ROOM = 3
"""A node that fetches from the origin takes so many chunks fewer from peers, or its origin flow starves (SWARM lesson
4; with 1 the origin's link idled for 2% of a rollout)."""
BACKLOG = 4
"""From so many on that only one neighbour has, any of them is taken: its way out is slow, and where all take the newest
that leaves it several times before the next one does. Fewer are usual in large swarms, where any costs 1%."""
CROWD = 6
"""Neighbours from which on a chunk that only one of them has is new; among fewer most chunks are such, and in order
serves the readers better."""
LOOK_S = 0.5
"""With a limit: what may be saved up, beyond a chunk, until the next look for room."""
KEPT_S = 1.0
"""A grant that finds no room is kept so long at most, one at a time: that spares a Decline, a Room and another grant,
and with them a third of what is sent that is no chunk (simulated, W1; two kept: no fewer)."""
HUNGRY_S = 0.05
"""A node with less than half of its downloads under way says so, at most this often, while it lacks more than these."""


class Taking:
    """The downloads of one agent. At most `settings.downloads` chunks are on their way from peers."""

    def __init__(self, state: SwarmState, fetching: Callable[[], int], racks: Racks) -> None:
        self._state = state
        self._racks = racks
        self._swap = Swap(state)
        self._fetching = fetching
        self._downloads = 0
        self._late = 0
        self._waiting: dict[PeerId, None] = {}
        self._kept: tuple[PeerId, int, float] | None = None
        """A grant that waits for room, and since when."""
        self._hungry_at = float("-inf")
        self._limit: TokenBucket | None = None
        self.limit()

    def limit(self) -> None:
        """Hold to `settings.download_bytes_per_s` from now on."""
        rate = self._state.settings.download_bytes_per_s
        self._limit = TokenBucket(rate, int(MAX_CHUNK_BYTES + LOOK_S * rate)) if rate else None

    def _room(self) -> int:
        """Return how many chunks more may be taken now; 0 or less where there is no room."""
        most = self._state.settings.downloads
        room = (max(1, most - FETCH_ROOM) if self._fetching() else most) - self._downloads
        if self._limit is None:
            return room
        return min(room, self._limit.available(self._state.now) // MAX_CHUNK_BYTES)

    def granted(self, peer: Peer, number: int) -> None:
        """Answer a grant.

        Raises:
            RemoteProtocolError: its number is not greater than those before.
        """
        state = self._state
        if number <= peer.granted:
            raise RemoteProtocolError(f"grant {number} given after grant {peer.granted}")
        peer.granted = number
        most = state.settings.peer_chunks if peer.down_bytes else state.settings.stranger_chunks
        if len(peer.downloads) >= most:
            state.answer(peer, Decline(number, True))
            return
        if self._room() > 0:
            self._use(peer, number)
        elif self._kept is None and self._limit is None and self._pick(peer) is not None:
            self._kept = peer.peer_id, number, state.now
        else:
            self._decline(peer, number)

    def _decline(self, peer: Peer, number: int) -> None:
        """Decline a grant for want of room."""
        self._waiting[peer.peer_id] = None
        self._state.answer(peer, Decline(number, True))
        if self._limit is not None:
            # It would help: a limit must not send us to the origin instead.
            self._state.helped_at = self._state.now

    def _use(self, peer: Peer, number: int) -> None:
        """Take a chunk for a grant, if there is one to take."""
        state, picked = self._state, self._pick(peer)
        if picked is None:
            state.answer(peer, Decline(number, False))
            return
        progress, index = picked
        peer.downloads[number] = Download(progress.blob, index, state.now)
        progress.ask(index, peer.peer_id, state.now)
        self._downloads += 1
        if self._limit is not None and progress.chunks is not None:
            self._limit.reserve(progress.chunks.length(index), state.now)
        state.tell_haves(peer)
        state.out.append(TakeChunk(peer=peer.peer_id, number=number, blob=progress.blob, index=index))

    def _pick(self, peer: Peer) -> tuple[Progress, int] | None:
        """Return the chunk to take from this peer: a reader's first, then news, then in a window, then the rarest.

        In a crowd, what only one of many neighbours has is news from the origin: the newest first, it must grow from
        here to the whole swarm. Behind the windows it grew half as fast (simulated, 300 nodes of degree 20: 1.22
        times the bound instead of 1.29).
        """
        rng = self._state.rng
        news: tuple[Fresh, Progress] | None = None
        window: tuple[Progress, int] | None = None
        best: tuple[Progress, int] | None = None
        for progress in self._state.wanted():
            free = peer.shared.get(progress.blob, 0) & ~(progress.have | progress.inflight)
            free = self._racks.takable(peer, progress, free)
            if not free:
                continue
            if free & 1 and 0 in progress.heads.values():
                return progress, 0
            if (fresh := self._news(peer, progress, free)) is not None:
                news = (fresh, progress) if news is None or fresh[:2] < news[0][:2] else news
            if news is not None or window is not None:
                continue
            if urgent := free & progress.window:
                window = progress, urgent
                continue
            index = rarest(free, progress.holders, rng)
            if best is None or progress.holders[index] < best[0].holders[best[1]]:
                best = progress, index
        if news is not None:
            return news[1], news[0][2]
        if window is not None:
            return window[0], rarest(window[1], window[0].holders, rng)
        return best or self._pick_again(peer)

    def _news(self, peer: Peer, progress: Progress, free: int) -> Fresh | None:
        """Return what to take before all windows: the newest that this peer alone has, or what only seeds have."""
        if progress.blob not in peer.wants:
            return self._swap.fresh(progress, free)
        alone = free & ~progress.spread
        if not alone or len(self._state.book.peers) < CROWD:
            return None
        if alone.bit_count() >= BACKLOG:
            return 0, False, self._state.rng.choice(list(members(alone)))
        return 0, False, alone.bit_length() - 1

    def _pick_again(self, peer: Peer) -> tuple[Progress, int] | None:
        """Return a chunk that is on its way already, but for long (the endgame), or None."""
        patience_s = max(DUPLICATE_FACTOR * self._state.chunk_s, MIN_DEADLINE_S / 2)
        for progress in self._state.wanted():
            free = self._racks.takable(peer, progress, peer.shared.get(progress.blob, 0) & ~progress.have)
            for index, asked in progress.asked.items():
                late = self._state.now - asked[0][1] > patience_s
                if free >> index & 1 and late and len(asked) == 1 and asked[0][0] != peer.peer_id:
                    return progress, index
        return None

    def arrived(self, peer: Peer, number: int, size: int) -> None:
        """Note that a chunk is whole, right or wrong; the caller makes room once it knows which."""
        state, download = self._state, peer.downloads.get(number)
        if download is not None:
            taken_s = state.now - download.since
            peer.moved_at = state.now
            state.chunk_s = taken_s if not state.chunk_s else 0.8 * state.chunk_s + 0.2 * taken_s
        self._state.helped_at = self._state.now
        peer.down_bytes += size
        peer.failures = 0
        peer.refusals = max(0, peer.refusals - 1)
        self.end(peer, number)

    def end(self, peer: Peer, number: int) -> Download | None:
        """Wait for this chunk no more; return what was waited for."""
        download = peer.downloads.pop(number, None)
        if download is None:
            return None
        # Whoever forgets a blob calls off its chunks first.
        progress = self._state.blobs[download.blob]
        if download.late:
            self._late -= 1
            progress.late.discard((download.index, peer.peer_id))
        else:
            self._downloads -= 1
            progress.unask(download.index, peer.peer_id)
        return download

    def cancel(self, peer: Peer, blob: Digest, index: int | None = None) -> None:
        """Call off chunks of a blob that are on their way from a peer: one, or all."""
        for number, download in list(peer.downloads.items()):
            if download.blob == blob and index in (None, download.index):
                self.end(peer, number)
                self._state.send(peer, Cancel(number))

    def cancel_copies(self, progress: Progress, index: int) -> None:
        """Call off other copies of a chunk that is here now."""
        sources = [source for source, _ in progress.asked.get(index, [])]
        sources += [source for late, source in progress.late if late == index]
        for source in sources:
            peer = self._state.book.peers.get(source) if source is not None else None
            if peer is not None:
                self.cancel(peer, progress.blob, index)

    def refused(self, peer: Peer, number: int) -> None:
        """Take in that a chunk will not come: the peer does not have it (any more)."""
        download = self.end(peer, number)
        if download is None:
            return
        peer.refusals += 1
        progress, bit = self._state.blobs[download.blob], 1 << download.index
        shared = peer.shared.get(download.blob, 0)
        if shared & bit:
            peer.shared[download.blob] = shared & ~bit
            others = (other.shared.get(download.blob, 0) for other in self._state.book.peers.values())
            progress.drop_holder(bit, others)
            self.call_for(progress, download.index)
        self.make_room()

    def _patience_s(self, peer: Peer, download: Download, *, seen: bool) -> float:
        """Return how long to wait for a chunk, as others deliver lately; less where the peer sends nothing at all.

        Args:
            seen: whether what its link receives is known.
        """
        usual_s = self._state.chunk_s
        if seen and peer.moved_at <= download.since:
            return max(SILENT_S, SILENT_FACTOR * usual_s) if usual_s else FIRST_SILENT_S
        return max(MIN_DEADLINE_S, DEADLINE_FACTOR * usual_s) if usual_s else DEADLINE_S

    def expire(self, peer: Peer, *, seen: bool) -> None:
        """Count as late what has not come in time; its bytes may still come and are welcome."""
        state = self._state
        for download in list(peer.downloads.values()):
            waited_s = state.now - download.since
            if download.late or waited_s < self._patience_s(peer, download, seen=seen):
                continue
            state.counters.late_chunks += 1
            peer.failures += 1
            progress = state.blobs[download.blob]
            if self._late >= MAX_LATE:
                self.cancel(peer, download.blob, download.index)
            else:
                download.late = True
                self._downloads -= 1
                self._late += 1
                progress.unask(download.index, peer.peer_id)
                progress.late.add((download.index, peer.peer_id))
            self.call_for(progress, download.index)

    def awaited(self, now: float) -> list[PeerId]:
        """Return the peers of whose links it is of use to know what they received: chunks are due from them."""
        return [
            peer.peer_id
            for peer in self._state.book.peers.values()
            if peer.downloads and now - min(download.since for download in peer.downloads.values()) >= SILENT_S / 2
        ]

    def offence(self, peer: Peer, *, seen: bool) -> tuple[Offence, str] | None:
        """Return what a peer does wrong with the chunks that were taken from it, or None."""
        now = self._state.now
        if peer.failures >= FAILURES_TO_DROP:
            return Offence.STALLED, f"let {peer.failures} chunks in a row go late"
        late = [download.since for download in peer.downloads.values() if download.late]
        if seen and late and now - max(peer.moved_at, *late) >= STALLED_S:
            return Offence.STALLED, f"sent nothing of {len(late)} chunks for {STALLED_S:.0f} s"
        if peer.refusals > REFUSALS:
            peer.refusals = 0
            return Offence.ABSENT, f"refused {REFUSALS} chunks more than it sent of those that it announced"
        return None

    def lost(self, peer: Peer) -> None:
        """Forget a peer, and look elsewhere for what was on its way from it."""
        self._waiting.pop(peer.peer_id, None)
        if self._kept is not None and self._kept[0] == peer.peer_id:
            self._kept = None
        for number, download in list(peer.downloads.items()):
            self.end(peer, number)
            self.call_for(self._state.blobs[download.blob], download.index)
        self.make_room()

    def call_for(self, progress: Progress, index: int) -> None:
        """Ask some holders of a chunk, who may have been told that we need nothing, to grant again."""
        holders = [
            peer
            for peer in self._state.book.peers.values()
            if peer.shared.get(progress.blob, 0) >> index & 1 and not peer.downloads
        ]
        for peer in self._state.rng.sample(holders, min(CALLED, len(holders))):
            self._state.answer(peer, Room())

    def ticked(self) -> None:
        """Use the room that there is, also for chunks that those of our rack whose turn it was did not import."""
        self._swap.prune()
        for progress, index in self._racks.look(self._downloads):
            if self._room() > 0:
                self.call_for(progress, index)
        self.make_room()

    def make_room(self) -> None:
        """Use the grant that was kept, and tell peers whose grants were declined for want of room, if there is some."""
        if self._kept is not None:
            self._answer_kept(*self._kept)
        free = self._room()
        while free > 0 and self._waiting:
            peer_id = next(iter(self._waiting))
            del self._waiting[peer_id]
            peer = self._state.book.peers.get(peer_id)
            if peer is not None and self._pick(peer) is not None:
                self._state.answer(peer, Room())
                free -= 1
        if self._downloads < self._state.settings.downloads // 2 and (self._limit is None or free > 0):
            self._say_hungry()

    def _answer_kept(self, peer_id: PeerId, number: int, since: float) -> None:
        peer = self._state.book.peers[peer_id]
        if self._room() > 0:
            self._kept = None
            self._use(peer, number)
        elif self._state.now - since >= KEPT_S:
            self._kept = None
            self._decline(peer, number)

    def _say_hungry(self) -> None:
        """Ask some that have what we lack to grant to us next: chance alone leaves one node in eight idling."""
        state, racks = self._state, self._racks
        if state.now - self._hungry_at < HUNGRY_S:
            return
        lacking = [(progress, progress.full & ~(progress.have | progress.inflight)) for progress in state.wanted()]
        few = sum(bits.bit_count() for _, bits in lacking) <= state.settings.downloads
        if few and not self._racks.starving:
            return
        holders = [
            peer
            for peer in state.book.peers.values()
            if len(peer.downloads) < CALLED
            and any(racks.takable(peer, lacks, peer.shared.get(lacks.blob, 0) & bits) for lacks, bits in lacking)
        ]
        self._hungry_at = state.now
        for peer in state.rng.sample(holders, min(CALLED, len(holders))):
            state.answer(peer, Room())
