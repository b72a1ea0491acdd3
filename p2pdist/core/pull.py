# SPDX-License-Identifier: Apache-2.0
"""The pull state machine: everything that one agent decides about getting and giving chunks.

Theory of operation. `handle(event, now)` returns commands; it neither waits nor does I/O, and the
simulator drives the same object on virtual time. All blobs that are wanted are one pool. A chunk
comes by one of three rungs: a peer that has it grants us a slot and we take the chunk that suits us
best (core/take.py); the scheduler, or rendezvous hashing, leases it to us, and we fetch it from the
origin (core/lease.py); or nobody brings it, and we fetch it without a lease (core/ladder.py).
What is here we grant to others (core/serve.py). What they say they have, and whose word counts, is
core/hearing.py's; who takes part, and who is sent away, core/membership.py's. This file is the pulls'
own course: start, arrival, completion, failure.

Invariants: a chunk is written once; nothing is offered that is not written and vouched for
(core/verify.py); nothing is taken from a banned peer; every pull ends in CheckBlob or Fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2pdist.core import events as ev
from p2pdist.core import wire
from p2pdist.core.chunkmap import MAX_BLOB_BYTES, ChunkMap
from p2pdist.core.hearing import Hearing
from p2pdist.core.ladder import Ladder
from p2pdist.core.lease import SETTLE_S, Leasing
from p2pdist.core.membership import Membership
from p2pdist.core.progress import Progress
from p2pdist.core.racks import Racks
from p2pdist.core.serve import Giving
from p2pdist.core.state import PullSettings, SwarmState
from p2pdist.core.take import Taking
from p2pdist.core.verify import Basis
from p2pdist.errors import RemoteProtocolError, TransferTimeout

if TYPE_CHECKING:
    from collections.abc import Mapping
    from random import Random

    from p2pdist.core.peerbook import Peer
    from p2pdist.core.types import Digest, PeerId

TICK_S = 0.1
HAVE_INTERVAL_S = 0.5
"""Announcements wait so long for company; grants and takes carry the fresh ones anyway (SWARM lesson 3)."""
SHARE_S = 0.06
"""After starting a pull among peers long known: time for their Share to come back."""
GIVE_UP_S = 60.0
"""A pull that gains nothing at all for so long fails."""
ERROR_GIVE_UP_S = 10.0
"""The origin may answer with nothing but errors for so long, where no peer has what is missing."""
MAX_SEEDS = 256
"""Complete blobs kept in mind; others are looked up in the store when a peer asks."""
CAUSES_KEPT = 5


class PullMachine:
    """All blobs and peers of one agent. `peer_id` is its own."""

    def __init__(self, peer_id: PeerId, rng: Random, settings: PullSettings | None = None) -> None:
        self.state = SwarmState(peer_id=peer_id, rng=rng, settings=settings or PullSettings())
        self.blobs = self.state.blobs
        self.book = self.state.book
        self.counters = self.state.counters
        self._leasing = Leasing(self.state)
        self._ladder = Ladder(self.state, self._leasing)
        racks = Racks(self.state)
        self._taking = Taking(self.state, self._leasing.fetching, racks)
        self._giving = Giving(self.state, racks)
        self._membership = Membership(self.state, self._leasing, self._taking, self._giving)
        self._hearing = Hearing(self.state, self._leasing, self._giving, self._membership)
        self._orders = 0
        self._flushed_at = 0.0
        self._gained_at = float("-inf")
        """When the last chunk of any blob came."""

    def tune(self, settings: PullSettings) -> None:
        """Take other limits; what is on its way goes on."""
        self.state.settings = settings
        self._taking.limit()

    @property
    def window_bytes(self) -> int:
        """Return what may be unacknowledged when the next frame of a chunk is sent; 0: no matter how much."""
        return self._giving.way_out.window_bytes

    def hold_to(self, bytes_per_s: int) -> None:
        """Take note that our way out carries no more than this; 0: that it is not known to be slow."""
        self.state.held_to_bytes_per_s = bytes_per_s

    def handle(self, event: ev.Event, now: float) -> list[ev.Command]:
        """Take in what happened at `now` (monotonic seconds) and return what to do, in order.

        Raises:
            RemoteProtocolError: what a peer, or the scheduler, said breaks the protocol; drop it.
        """
        self.state.now = now
        self.state.out = []
        match event:
            case ev.PeerSaid():
                peer = self.book.peers.get(event.peer)
                if peer is not None:
                    self._peer_said(peer, event.message)
            case ev.ChunkSent():
                peer = self.book.peers.get(event.peer)
                if peer is not None:
                    self._giving.sent(peer, event.number)
            case ev.ChunkArrived():
                self._chunk_arrived(event)
            case ev.ChunkWritten():
                self._chunk_written(event.blob, event.index)
            case ev.HeadMoved():
                if (progress := self.blobs.get(event.blob)) is not None:
                    progress.move_head(event.reader, event.index)
            case ev.Ticked():
                self._ticked(event.received)
            case ev.PullStarted():
                self._pull_started(event)
            case ev.PullCancelled():
                self._drop_blob(event.blob)
            case ev.FetchFailed():
                self._fetch_failed(event)
            case ev.BlobVerified():
                self._blob_verified(event.blob)
            case ev.BlobRejected():
                self._blob_rejected(event.blob, event.indices)
            case ev.BlobStored():
                self._blob_stored(event)
            case ev.BlobEvicted():
                self._blob_evicted(event.blob)
            case ev.PeerConnected():
                self._membership.connected(event.peer, event.rack, event.host)
            case ev.PeerLost():
                self._membership.lost(event.peer)
            case ev.PeerOffended():
                self._membership.offended(event.peer, event.offence, event.why)
            case _:
                self._scheduler_event(event)
        return self.state.out

    def in_turn(self, blob: Digest, indices: list[int]) -> list[int]:
        """Return in which order to read chunks of a blob that is complete and wrong, to find out which are wrong."""
        progress = self.blobs.get(blob)
        if progress is None:
            return indices
        turns = self._leasing.turns(progress, indices)
        return sorted(indices, key=lambda index: (turns[index], self.state.rng.random()))

    def most_suspect(self, blob: Digest, suspects: list[int]) -> int:
        """Return which of these, in turn and not empty, to read before all others."""
        return self._hearing.most_suspect(self.blobs[blob], suspects)

    @property
    def busy(self) -> bool:
        """Whether Ticked has anything to do: a pull, or a slot in use."""
        return bool(self.state.wanted() or self._giving.slots_used)

    def awaited(self, now: float) -> list[PeerId]:
        """Return the peers of whose links Ticked should tell what they received."""
        return self._taking.awaited(now)

    def _scheduler_event(
        self, event: ev.SchedulerConnected | ev.SchedulerLost | ev.SwarmMoved | ev.SchedulerSaid
    ) -> None:
        match event:
            case ev.SchedulerConnected():
                self.state.scheduled = True
                self._hearing.trust_again()
                for progress in self.state.wanted():
                    self._membership.join(progress)
            case ev.SwarmMoved():
                if (moved := self.blobs.get(event.blob)) is not None and moved.wanted:
                    self._membership.join(moved)
            case ev.SchedulerLost():
                self.state.scheduled = False
                self._leasing.met()
            case ev.SchedulerSaid(message=wire.Lease() as message):
                self._leasing.leased(message)
            case ev.SchedulerSaid(message=wire.Checksums() as message):
                self._hearing.checksums_came(message)
            case ev.SchedulerSaid(message=wire.Reread() as message):
                self._leasing.reread(message)
            case ev.SchedulerSaid(message=wire.Withdrawn() as message):
                self._hearing.withdrawn(message)
            case _:
                raise RemoteProtocolError(f"a {type(event.message).__name__} from the scheduler")

    # ------------------------------------------------------------- own pulls

    def _pull_started(self, event: ev.PullStarted) -> None:
        state = self.state
        known = self.blobs.get(event.blob)
        if known is not None:
            if known.wanted:
                return
            self._forget_blob(known)
        shared = event.shared and (event.size_bytes or 0) <= MAX_BLOB_BYTES
        progress = self._new_progress(event.blob, event.registry, shared=shared, wanted=True)
        progress.since = progress.progress_at = state.now
        state.helped_at = state.now
        if event.size_bytes is not None:
            progress.size(ChunkMap.of(event.size_bytes))
        progress.whole = event.size_bytes is None
        for index, checksum in event.have.items():
            # Checked when it came and again now, but perhaps on a liar's word: a better one may correct it.
            progress.gain(index, checksum)
            progress.vouchers.settle(index, checksum, Basis.WITNESSES)
            state.offer(progress, index)
        # A wait lets the neighbours' answers come back before anything is leased by rendezvous.
        progress.retry_at = state.now + (SHARE_S if shared and self.book.peers else 0.0)
        if shared:
            for peer in self.book.peers.values():
                state.share_with(peer, progress, reply=False)
            self._membership.join(progress)
        if progress.complete:
            self._check(progress)
        self._leasing.by_rendezvous()

    def _new_progress(self, blob: Digest, registry: str, *, shared: bool, wanted: bool) -> Progress:
        progress = Progress(blob, order=self._orders, registry=registry, shared=shared, wanted=wanted)
        self._orders += 1
        self.blobs[blob] = progress
        self.state.wanted_changed()
        return progress

    def _tell(self, message: wire.Message) -> None:
        self.state.out.append(ev.Tell(message=message))

    def _drop_blob(self, blob: Digest) -> None:
        """Forget a blob: cancelled, failed or evicted."""
        progress = self.blobs.get(blob)
        if progress is None:
            return
        for peer in self.book.peers.values():
            self._taking.cancel(peer, blob)
        self._forget_blob(progress)
        self._membership.leave(progress)
        self._taking.make_room()

    def _forget_blob(self, progress: Progress) -> None:
        del self.blobs[progress.blob]
        self.state.wanted_changed()
        self._leasing.forget(progress.blob)
        for peer in self.book.peers.values():
            peer.shared.pop(progress.blob, None)
            peer.wants.pop(progress.blob, None)
        self._membership.unshare(progress)

    # --------------------------------------------------------- chunks coming in

    def _chunk_arrived(self, event: ev.ChunkArrived) -> None:
        progress = self.blobs.get(event.blob)
        self._count_arrival(progress, event)
        if progress is None or not progress.wanted or not self._is_needed(progress, event):
            self._taking.make_room()
            return
        progress.causes.clear()
        progress.own[event.index] = event.checksum
        self.state.out.append(ev.WriteChunk(blob=event.blob, index=event.index, checksum=event.checksum))

    def _count_arrival(self, progress: Progress | None, event: ev.ChunkArrived) -> None:
        state = self.state
        size = 0 if progress is None or progress.chunks is None else progress.chunks.length(event.index)
        if event.source is None:
            state.counters.from_origin += size
            self._leasing.arrived(event.blob, event.index, size, event.taken_s)
        else:
            state.counters.from_peers += size
            peer = self.book.peers.get(event.source)
            if peer is not None:
                self._taking.arrived(peer, event.number, size)
        if progress is not None and progress.have >> event.index & 1:
            state.counters.duplicate += size

    def _is_needed(self, progress: Progress, event: ev.ChunkArrived) -> bool:
        """Return whether to write the chunk: it is new and right, or what is here in its place proved wrong."""
        here = progress.have >> event.index & 1
        if event.source is not None:
            return not here and self._passes(progress, event, event.source)
        if here and progress.checking:
            return False
        self._hearing.read(progress, event.index, event.checksum)
        return not progress.have >> event.index & 1

    def _passes(self, progress: Progress, event: ev.ChunkArrived, source: PeerId) -> bool:
        """Compare the chunk's checksum with what it should be; a peer that sent another is banned."""
        vouchers = progress.vouchers
        expected = vouchers.expected(event.index, source)
        if expected == event.checksum or (expected is None and not vouchers.is_stale(event.index, event.checksum)):
            progress.senders[event.index] = source
            peer = self.book.peers.get(source)
            if peer is not None:
                peer.good += 1
            return True
        self.counters.corrupt_chunks += 1
        self._hearing.refute(progress, event.index, source, event.checksum)
        self._taking.call_for(progress, event.index)
        return False

    def _chunk_written(self, blob: Digest, index: int) -> None:
        progress = self.blobs.get(blob)
        if progress is None or progress.have >> index & 1:
            return
        progress.gain(index, progress.own[index])
        progress.progress_at = self._gained_at = self.state.now
        self._taking.cancel_copies(progress, index)
        self._offer(progress, index)
        if index not in progress.senders and not self.state.scheduled:
            # Nobody may pass on what we fetched before they have heard our word on it.
            self._flush_haves()
        if progress.complete:
            self._check(progress)
        self._leasing.by_rendezvous()
        self._taking.make_room()
        self._giving.grant()

    def _offer(self, progress: Progress, index: int) -> None:
        """Give a chunk to others, and report it where it was ours to fetch, if it is here and vouched for."""
        self.state.offer(progress, index)
        self._leasing.done(progress, index)

    def _check(self, progress: Progress) -> None:
        progress.checking = True
        self.state.out.append(ev.CheckBlob(blob=progress.blob))

    def _blob_verified(self, blob: Digest) -> None:
        progress = self.blobs.get(blob)
        if progress is None:
            return
        self._settle_down(progress)
        self._flush_haves()
        self._giving.grant()

    def _become_seed(self, progress: Progress) -> None:
        """A blob whose digest is right vouches for all its chunks."""
        progress.wanted = False
        progress.checking = False
        progress.heads.clear()
        self.state.wanted_changed()
        for index, checksum in progress.own.items():
            progress.vouchers.settle(index, checksum)
            self._offer(progress, index)
        # Also what is still being fetched: of a manifest that came from a peer meanwhile, the end is told to nobody.
        self._leasing.forget(progress.blob)
        peers = self.book.peers.values()
        seeds = [other for other in self.blobs.values() if not other.wanted]
        seeds.sort(key=lambda seed: any(seed.blob in peer.wants for peer in peers))
        for oldest in seeds[: max(0, len(seeds) - MAX_SEEDS)]:
            self._forget_blob(oldest)

    def _blob_rejected(self, blob: Digest, indices: list[int]) -> None:
        progress = self.blobs.get(blob)
        if progress is None:
            return
        progress.checking = False
        progress.progress_at = self.state.now
        if indices:
            self._hearing.blame(progress, indices, "its chunks made the blob wrong:")
        self._hearing.catch_up(progress)
        self._leasing.go_on(progress)
        if progress.whole:
            self._ask_again(progress)

    def _ask_again(self, progress: Progress) -> None:
        """Doubt the size too, where only a digest was known: a peer said it."""
        for peer in self.book.peers.values():
            self._membership.unhold(peer, progress.blob)
        progress.chunks = None
        for peer in self.book.peers.values():
            if progress.blob in peer.cursors:
                self.state.share_with(peer, progress, reply=False)

    def _blob_stored(self, event: ev.BlobStored) -> None:
        """Take in a blob that is in the store: found there for a peer, or fetched whole."""
        cut = ChunkMap.of(event.size_bytes)
        self._leasing.arrived(event.blob, 0)
        if len(event.checksums) != cut.count:
            # A manifest of more than one chunk: it was fetched whole, and is looked up when a peer asks.
            self._drop_blob(event.blob)
            return
        progress = self.blobs.get(event.blob) or self._new_progress(event.blob, "", shared=True, wanted=False)
        for peer in self.book.peers.values():
            self._taking.cancel(peer, event.blob)
        progress.media_type = event.media_type
        progress.size(cut)
        for index, checksum in enumerate(event.checksums):
            progress.gain(index, checksum)
        self._settle_down(progress)
        self._giving.grant()

    def _settle_down(self, progress: Progress) -> None:
        """Become a seed, and say so."""
        was_wanted = progress.wanted
        self._become_seed(progress)
        if not progress.shared:
            return
        if was_wanted:
            self._leasing.tell(wire.Stored([progress.blob]))
        for peer in self.book.peers.values():
            # Who knows the blob's cut sees from our Haves that we want no more. The others are told, and who
            # asked before we knew the blob tells again what it has.
            blind = progress.whole or progress.blob not in peer.shared
            if blind and (progress.blob in peer.wants or progress.blob in peer.cursors):
                self.state.share_with(peer, progress, reply=was_wanted)

    def _blob_evicted(self, blob: Digest) -> None:
        progress = self.blobs.get(blob)
        if progress is None:
            self._leasing.tell(wire.Leave(blob))
        elif not progress.wanted:
            self._drop_blob(blob)

    def _fetch_failed(self, event: ev.FetchFailed) -> None:
        self._leasing.failed(event)
        if (progress := self.blobs.get(event.blob)) is None:
            return
        if not progress.causes:
            progress.failing_since = self.state.now
        progress.causes = [*progress.causes, event.error][-CAUSES_KEPT:]
        progress.final = progress.final or event.final
        progress.retry_at = self.state.now + max(event.pause_s, 0.5 * len(progress.causes))
        erring_s = self.state.now - progress.failing_since
        self._fail_if_hopeless(progress, GIVE_UP_S if erring_s < ERROR_GIVE_UP_S else 0.0)

    def _fail_if_hopeless(self, progress: Progress, limit_s: float = GIVE_UP_S) -> None:
        """End a pull that neither the origin nor any peer can finish: it has gained nothing for `limit_s`.

        While others gain, it may be waiting for its turn on a slow link.
        """
        if progress.inflight or progress.checking or progress.complete:
            return
        if progress.held & ~progress.have:
            limit_s = GIVE_UP_S
        elif progress.final:
            limit_s = SETTLE_S if self.book.peers else 0.0
        gained_at = progress.progress_at if limit_s < GIVE_UP_S else max(progress.progress_at, self._gained_at)
        if self.state.now - gained_at >= limit_s:
            causes = progress.causes or [TransferTimeout(f"nothing arrived for {GIVE_UP_S:.0f} s")]
            self._drop_blob(progress.blob)
            self.state.out.append(ev.Fail(blob=progress.blob, causes=causes))

    # --------------------------------------------------------------- peers

    def _peer_said(self, peer: Peer, message: wire.Message) -> None:
        match message:
            case wire.Have():
                self._hearing.have_came(peer, message)
            case wire.Grant():
                if peer.mute:
                    self._hearing.count_on(peer)
                self._taking.granted(peer, message.number)
            case wire.Take():
                self._giving.taken(peer, message)
            case wire.Decline():
                self._giving.declined(peer, message)
            case wire.Room():
                self._giving.has_room(peer)
            case wire.Share():
                self._hearing.share_came(peer, message)
            case wire.Unshare():
                self._membership.unshared(peer, message.blob)
            case wire.Renew() | wire.Failed():
                self._leasing.heard_of(peer, message)
            case wire.Refuse():
                self._taking.refused(peer, message.number)
            case wire.Cancel():
                self._giving.cancelled(peer, message.number)
            case _:
                raise RemoteProtocolError(f"a {type(message).__name__} from a peer")

    # ---------------------------------------------------------------- time

    def _flush_haves(self) -> None:
        self._flushed_at = self.state.now
        for peer in self.book.peers.values():
            self.state.tell_haves(peer)

    def _ticked(self, received: Mapping[PeerId, int] | None) -> None:
        for peer in list(self.book.peers.values()):
            if received is not None and peer.peer_id in received:
                peer.moved(received[peer.peer_id], self.state.now)
            if peer.uploads:
                self._giving.expire(peer)
            if peer.downloads:
                self._taking.expire(peer, seen=received is not None)
            offence = self._taking.offence(peer, seen=received is not None) or self._giving.offence(peer)
            if offence is not None:
                self._membership.offended(peer.peer_id, *offence)
        if self.state.now - self._flushed_at >= HAVE_INTERVAL_S:
            self._flush_haves()
        self._leasing.renew()
        self._hearing.pass_over()
        self._leasing.by_rendezvous()
        for progress in list(self.state.wanted()):
            self._ladder.climb(progress)
            self._fail_if_hopeless(progress)
        self._taking.ticked()
        self._giving.grant()
