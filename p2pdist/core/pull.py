# SPDX-License-Identifier: Apache-2.0
"""The pull state machine: everything that one agent decides about getting and giving chunks.

Theory of operation. `handle(event, now)` returns commands; it neither waits nor does I/O, and the
simulator drives the same object on virtual time. All blobs that are wanted are one pool.

A chunk comes by one of three rungs, none of which can block the next:

1. A peer that has it grants us a slot; we take the chunk that suits us best (core/select.py) or
   decline. Grants, not requests: only the sender knows its queue (SWARM lesson 2).
2. A lease: the right and duty to fetch one chunk from the origin. The scheduler hands them out; where
   there is none, rendezvous hashing over the swarm's members does (core/lease.py). Content that may
   not be shared, or that nobody else wants, is a swarm of one member, which leases all to itself.
3. When nothing has arrived for a while, a chunk is fetched from the origin without asking anybody.

Invariants: a chunk is written once; nothing is offered that is not written and vouched for
(core/verify.py); nothing is taken from a banned peer; every pull ends in CheckBlob or Fail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2pdist.core import lease, serve
from p2pdist.core.chunkmap import ChunkMap, lowest, members, to_bytes
from p2pdist.core.events import (
    BlobEvicted,
    BlobRejected,
    BlobStored,
    BlobVerified,
    CancelSend,
    CheckBlob,
    ChunkArrived,
    ChunkSent,
    ChunkWritten,
    DropPeer,
    Fail,
    FetchFailed,
    FetchOrigin,
    ForgetChunks,
    HeadMoved,
    LookUp,
    PeerConnected,
    PeerLost,
    PeerSaid,
    PullCancelled,
    PullStarted,
    SchedulerConnected,
    SchedulerLost,
    SchedulerSaid,
    Send,
    SendChunk,
    TakeChunk,
    Tell,
    Ticked,
    WriteChunk,
)
from p2pdist.core.peerbook import BAN_S, FAILURES_TO_DROP, MAX_SHARED_BLOBS, Download, Peer, PeerBook, Upload
from p2pdist.core.progress import MAX_WHOLE_BYTES, Progress, read_share
from p2pdist.core.select import rarest
from p2pdist.core.wire import (
    Cancel,
    Checksums,
    Decline,
    Done,
    Failed,
    Grant,
    Have,
    Join,
    Lease,
    Leave,
    Message,
    Missing,
    Refuse,
    Renew,
    Room,
    Share,
    Stored,
    Take,
    Unshare,
    pack_indices,
    unpack_checksums,
    unpack_indices,
)
from p2pdist.errors import RemoteProtocolError, TransferTimeout

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    from p2pdist.core.events import Command, Event
    from p2pdist.core.types import Checksum, Digest, PeerId

TICK_S = 0.1
HAVE_INTERVAL_S = 0.5
"""Announcements wait so long for company; grants and takes carry the fresh ones anyway (SWARM lesson 3)."""
SETTLE_S = 0.6
"""After meeting a peer, before leasing by rendezvous: without it egress was 1.53 times the image (SWARM)."""
SHARE_S = 0.06
"""After starting a pull among peers long known: time for their Share to come back."""
LEASES = 4
"""Chunks in flight from the origin per swarm: 1, 2 and 8 measured worse (SWARM)."""
REACH_PER_MEMBER = 2
"""Without a scheduler: how many chunks past the first that nobody has may be fetched, per member."""
STEP_IN_S = 3.0
"""Without a scheduler: the next in rank fetches a chunk that nobody has got for so long."""
MISSING_S = 2.0
"""With a scheduler: chunks that no neighbour has are reported after so long without progress."""
STALL_S = 6.0
"""Without any arrival for so long a chunk is fetched from the origin without a lease."""
GIVE_UP_S = 60.0
"""A pull that gains nothing at all for so long fails."""
ERROR_GIVE_UP_S = 10.0
"""The same where the origin has answered with errors and no peer has what is missing."""
DEADLINE_S = 10.0
"""For the first chunk from a peer; later DEADLINE_FACTOR times what chunks take lately, at least MIN_DEADLINE_S."""
MIN_DEADLINE_S = 2.0
DEADLINE_FACTOR = 8
DUPLICATE_FACTOR = 3
"""In the endgame, a chunk that has been on its way this many usual times may be taken a second time."""
RENEW_S = 5.0
MAX_SEEDS = 256
"""Complete blobs kept in mind; others are looked up in the store when a peer asks."""
MISSING_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PullSettings:
    upload_slots: int = 4
    downloads: int = 6
    """Chunks on their way from peers at a time: a little more than slots, to fill the gaps between."""


@dataclass(slots=True)
class Counters:
    """Bytes and chunks since the start."""

    from_peers: int = 0
    from_origin: int = 0
    to_peers: int = 0
    duplicate: int = 0
    corrupt_chunks: int = 0
    late_chunks: int = 0
    grants: int = 0
    declines: int = 0


class PullMachine:
    """All blobs and peers of one agent. `peer_id` is its own."""

    def __init__(self, peer_id: PeerId, rng: Random, settings: PullSettings | None = None) -> None:
        self.peer_id = peer_id
        self.blobs: dict[Digest, Progress] = {}
        self.book = PeerBook()
        self.counters = Counters()
        self.scheduled = False
        self._settings = settings or PullSettings()
        self._rng = rng
        self._now = 0.0
        self._out: list[Command] = []
        self._orders = 0
        self._gains = 0
        self._uploads = 0
        self._downloads = 0
        self._waiting: dict[PeerId, None] = {}
        self._fetching: dict[tuple[Digest, int], float] = {}
        self._leased: set[tuple[Digest, int]] = set()
        self._arrived_at = 0.0
        self._met_at = 0.0
        self._lost_at = 0.0
        self._flushed_at = 0.0
        self._chunk_s = 0.0
        self._wanted_cache: list[Progress] | None = None
        self._owned: dict[Digest, tuple[frozenset[PeerId], int]] = {}

    # ------------------------------------------------------------------ events

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take in what happened at `now` (monotonic seconds) and return what to do, in order."""
        self._now = now
        self._out = []
        match event:
            case PeerSaid():
                self._on_peer_said(event.peer, event.message)
            case ChunkSent():
                self._on_chunk_sent(event.peer, event.number)
            case ChunkArrived():
                self._on_chunk_arrived(event)
            case ChunkWritten():
                self._on_chunk_written(event.blob, event.index)
            case HeadMoved():
                if (progress := self.blobs.get(event.blob)) is not None:
                    progress.move_head(event.reader, event.index)
            case Ticked():
                self._on_tick()
            case SchedulerSaid():
                self._on_scheduler_said(event.message)
            case PullStarted():
                self._on_pull_started(event)
            case PullCancelled():
                self._drop_blob(event.blob)
            case FetchFailed():
                self._on_fetch_failed(event)
            case BlobVerified():
                self._on_blob_verified(event.blob)
            case BlobRejected():
                self._on_blob_rejected(event.blob, event.indices)
            case BlobStored():
                self._on_blob_stored(event)
            case BlobEvicted():
                self._drop_blob(event.blob)
            case PeerConnected():
                self._on_peer_connected(event.peer)
            case PeerLost():
                self._on_peer_lost(event.peer)
            case SchedulerConnected():
                self._on_scheduler_connected()
            case SchedulerLost():
                self.scheduled = False
                self._lost_at = now
        return self._out

    @property
    def busy(self) -> bool:
        """Whether Ticked has anything to do: a pull, or a slot in use."""
        return bool(self._wanted() or self._uploads)

    # ------------------------------------------------------------- own pulls

    def _on_pull_started(self, event: PullStarted) -> None:
        known = self.blobs.get(event.blob)
        if known is not None and known.wanted:
            return
        progress = Progress(event.blob, order=self._orders, registry=event.registry, shared=event.shared, wanted=True)
        self._orders += 1
        progress.progress_at = self._now
        self._arrived_at = max(self._arrived_at, self._now)
        if event.size_bytes is not None:
            progress.size(ChunkMap.of(event.size_bytes))
        for index, checksum in event.have.items():
            progress.gain(index, checksum)
        self.blobs[event.blob] = progress
        self._wanted_cache = None
        # A wait lets the neighbours' answers come back before anything is leased by rendezvous.
        progress.retry_at = self._now + (SHARE_S if event.shared and self.book.peers else 0.0)
        if event.shared:
            for peer in self.book.peers.values():
                self._share_with(peer, progress, reply=False)
            if self.scheduled:
                self._join(progress)
        if progress.complete:
            self._check(progress)
        self._lease_by_rendezvous()

    def _join(self, progress: Progress) -> None:
        have = b"" if progress.chunks is None else to_bytes(progress.have, progress.count)
        checksums = b"".join(progress.own[index] for index in members(progress.have))
        self._out.append(Tell(message=Join(progress.blob, progress.size_bytes, progress.registry, have, checksums)))

    def _drop_blob(self, blob: Digest) -> None:
        """Forget a blob: cancelled, failed or evicted."""
        progress = self.blobs.pop(blob, None)
        if progress is None:
            return
        self._wanted_cache = None
        self._owned.pop(blob, None)
        for peer in self.book.peers.values():
            for number, download in list(peer.downloads.items()):
                if download.blob == blob:
                    self._end_download(peer, number)
                    self._out.append(Send(peer=peer.peer_id, message=Cancel(number)))
            if peer.cursors.pop(blob, None) is not None:
                self._out.append(Send(peer=peer.peer_id, message=Unshare(blob)))
        for key in [key for key in self._fetching if key[0] == blob]:
            del self._fetching[key]
            self._leased.discard(key)
        if progress.shared and self.scheduled:
            self._out.append(Tell(message=Leave(blob)))

    def _wanted(self) -> list[Progress]:
        """Return the pulls that go on, in the order started."""
        if self._wanted_cache is None:
            self._wanted_cache = sorted(
                (progress for progress in self.blobs.values() if progress.wanted), key=lambda progress: progress.order
            )
        return self._wanted_cache

    # --------------------------------------------------------- chunks coming in

    def _on_chunk_arrived(self, event: ChunkArrived) -> None:
        progress = self.blobs.get(event.blob)
        self._arrived_at = self._now
        size = 0 if progress is None or progress.chunks is None else progress.chunks.length(event.index)
        if event.source is None:
            self.counters.from_origin += size
            self._fetching.pop((event.blob, event.index), None)
        else:
            self.counters.from_peers += size
            peer = self.book.peers.get(event.source)
            if peer is not None:
                peer.down_bytes += size
                peer.failures = 0
                self._note_duration(peer.downloads.get(event.number))
                self._end_download(peer, event.number)
                self._make_room()
        if progress is None or not progress.wanted:
            return
        progress.unask(event.index, event.source)
        if progress.have >> event.index & 1:
            self.counters.duplicate += size
            self._finish_lease(progress, event.index)
            return
        if event.source is None:
            progress.vouchers.settle(event.index, event.checksum)
            progress.senders.pop(event.index, None)
        elif not self._passes(progress, event, event.source):
            return
        progress.causes.clear()
        self._out.append(WriteChunk(blob=event.blob, index=event.index, checksum=event.checksum))
        progress.own[event.index] = event.checksum

    def _passes(self, progress: Progress, event: ChunkArrived, source: PeerId) -> bool:
        """Compare the chunk's checksum with what it should be; a peer that sent another is banned."""
        expected = progress.vouchers.expected(event.index, source)
        if expected is None or expected == event.checksum:
            progress.senders[event.index] = source
            return True
        self.counters.corrupt_chunks += 1
        self._drop_peer(source, f"sent a corrupt chunk {event.index} of {event.blob}", BAN_S)
        return False

    def _note_duration(self, download: Download | None) -> None:
        if download is not None:
            taken = self._now - download.since
            self._chunk_s = taken if not self._chunk_s else 0.8 * self._chunk_s + 0.2 * taken

    def _on_chunk_written(self, blob: Digest, index: int) -> None:
        progress = self.blobs.get(blob)
        if progress is None or progress.have >> index & 1:
            return
        progress.gain(index, progress.own[index])
        progress.progress_at = self._now
        for source, _ in progress.asked.get(index, []):
            self._cancel_download(blob, index, source)
        self._offer(progress, index)
        self._finish_lease(progress, index)
        if progress.complete:
            self._check(progress)
        self._lease_by_rendezvous()
        self._grant()

    def _offer(self, progress: Progress, index: int) -> None:
        if progress.offer(index):
            self._gains += 1

    def _finish_lease(self, progress: Progress, index: int) -> None:
        """Report a chunk that was leased to us as done."""
        key = (progress.blob, index)
        if key in self._leased:
            self._leased.discard(key)
            self._out.append(Tell(message=Done(progress.blob, progress.size_bytes, index, progress.own[index])))

    def _cancel_download(self, blob: Digest, index: int, source: PeerId | None) -> None:
        """Call off a second copy of a chunk that is here now."""
        peer = self.book.peers.get(source) if source is not None else None
        if peer is None:
            return
        for number, download in list(peer.downloads.items()):
            if download.blob == blob and download.index == index:
                self._end_download(peer, number)
                self._out.append(Send(peer=peer.peer_id, message=Cancel(number)))

    def _check(self, progress: Progress) -> None:
        if not progress.checking:
            progress.checking = True
            self._out.append(CheckBlob(blob=progress.blob))

    def _on_blob_verified(self, blob: Digest) -> None:
        progress = self.blobs.get(blob)
        if progress is None:
            return
        progress.wanted = False
        progress.checking = False
        progress.heads.clear()
        self._wanted_cache = None
        for index, checksum in progress.own.items():
            progress.vouchers.settle(index, checksum)
            self._offer(progress, index)
        if progress.shared and self.scheduled:
            self._out.append(Tell(message=Stored([blob])))
        self._limit_seeds()
        self._flush_haves()
        self._grant()

    def _on_blob_rejected(self, blob: Digest, indices: list[int]) -> None:
        progress = self.blobs.get(blob)
        if progress is None:
            return
        progress.checking = False
        progress.progress_at = self._now
        liars = {progress.senders[index] for index in indices if index in progress.senders}
        self.counters.corrupt_chunks += len(indices)
        self._forget(progress, indices)
        for liar in liars:
            self._drop_peer(liar, f"its chunks made {blob} wrong", BAN_S)

    def _forget(self, progress: Progress, indices: list[int]) -> None:
        progress.lose(indices)
        progress.vouchers.forget(indices)
        for peer in self.book.peers.values():
            if peer.cursors.pop(progress.blob, None) is not None:
                self._share_with(peer, progress, reply=True)

    def _on_blob_stored(self, event: BlobStored) -> None:
        progress = self.blobs.get(event.blob)
        if progress is None:
            progress = Progress(event.blob, order=self._orders, registry="", shared=True, wanted=False)
            self._orders += 1
            self.blobs[event.blob] = progress
        progress.media_type = event.media_type
        progress.wanted = False
        self._wanted_cache = None
        self._fetching.pop((event.blob, 0), None)
        progress.unask(0, None)
        if not progress.complete:
            progress.size(ChunkMap.of(event.size_bytes))
        for index, checksum in enumerate(event.checksums):
            progress.gain(index, checksum)
            progress.vouchers.settle(index, checksum)
            self._offer(progress, index)
        for index in range(len(event.checksums)):
            self._finish_lease(progress, index)
        self._arrived_at = self._now
        if progress.shared:
            for peer in self.book.peers.values():
                if event.blob in peer.wants:
                    self._share_with(peer, progress, reply=True)
        self._limit_seeds()
        self._grant()

    def _limit_seeds(self) -> None:
        """Forget the oldest complete blobs; a peer that asks has them looked up again."""
        seeds = [progress for progress in self.blobs.values() if not progress.wanted]
        for progress in seeds[: max(0, len(seeds) - MAX_SEEDS)]:
            del self.blobs[progress.blob]
            for peer in self.book.peers.values():
                if peer.cursors.pop(progress.blob, None) is not None:
                    self._out.append(Send(peer=peer.peer_id, message=Unshare(progress.blob)))

    # -------------------------------------------------------------- origin

    def _fetch(self, progress: Progress, index: int, *, leased: bool) -> None:
        key = (progress.blob, index)
        if leased:
            self._leased.add(key)
        if key not in self._fetching:
            self._fetching[key] = self._now
            progress.ask(index, None, self._now)
            self._out.append(FetchOrigin(blob=progress.blob, index=index))

    def _on_fetch_failed(self, event: FetchFailed) -> None:
        key = (event.blob, event.index)
        self._fetching.pop(key, None)
        if key in self._leased:
            self._leased.discard(key)
            self._out.append(Tell(message=Failed(event.blob, event.index, int(event.pause_s * 1000))))
        progress = self.blobs.get(event.blob)
        if progress is None:
            return
        progress.unask(event.index, None)
        progress.causes = [*progress.causes[-4:], event.error]
        progress.final = progress.final or event.final
        progress.retry_at = self._now + max(event.pause_s, 0.5 * len(progress.causes))
        self._fail_if_hopeless(progress)

    def _fail_if_hopeless(self, progress: Progress) -> None:
        """End a pull that neither the origin nor any peer can finish."""
        if progress.inflight or progress.checking or progress.complete:
            return
        idle_s = self._now - progress.progress_at
        if progress.held & ~progress.have or not progress.causes:
            limit = GIVE_UP_S
        else:
            limit = (SETTLE_S if self.book.peers else 0.0) if progress.final else ERROR_GIVE_UP_S
        if idle_s >= limit:
            causes = progress.causes or [TransferTimeout(f"nothing arrived for {GIVE_UP_S:.0f} s")]
            self._drop_blob(progress.blob)
            self._out.append(Fail(blob=progress.blob, causes=causes))

    def _swarm_of(self, progress: Progress) -> frozenset[PeerId]:
        """Return the members of a blob's swarm as far as we know them: those that want it, and us."""
        if not progress.shared:
            return frozenset((self.peer_id,))
        others = (peer.peer_id for peer in self.book.peers.values() if progress.blob in peer.wants)
        return frozenset((self.peer_id, *others))

    def _lease_by_rendezvous(self) -> None:
        """Fetch from the origin what is ours to fetch where no scheduler leases it."""
        settled = self._now - max(self._met_at, self._lost_at) >= SETTLE_S or not self.book.peers
        for progress in self._wanted():
            if progress.shared and (self.scheduled or not settled):
                continue
            if progress.complete or progress.final or progress.retry_at > self._now:
                continue
            swarm = self._swarm_of(progress)
            limit = max(1, LEASES // len(swarm))
            while len(self._fetching) < limit:
                index = self._own_chunk(progress, swarm)
                if index is None:
                    break
                self._fetch(progress, index, leased=False)

    def _own_chunk(self, progress: Progress, swarm: frozenset[PeerId]) -> int | None:
        """Return the next chunk that this agent leases to itself, or None."""
        free = progress.full & ~(progress.have | progress.held | progress.inflight)
        if not free:
            return None
        if len(swarm) == 1:
            return lowest(free & progress.window or free)
        owned = self._owned_chunks(progress, swarm)
        patience = int((self._now - progress.progress_at) / STEP_IN_S)
        for nth, index in enumerate(members(free)):
            if nth >= REACH_PER_MEMBER * len(swarm):
                return None
            if owned >> index & 1 or (
                patience and lease.rank_of(self.peer_id, progress.blob, index, swarm) <= patience
            ):
                return index
        return None

    def _owned_chunks(self, progress: Progress, swarm: frozenset[PeerId]) -> int:
        known = self._owned.get(progress.blob)
        if known is None or known[0] != swarm:
            bits = 0
            for index in range(progress.count):
                if lease.holder_of(progress.blob, index, swarm) == self.peer_id:
                    bits |= 1 << index
            known = self._owned[progress.blob] = (swarm, bits)
        return known[1]

    # ----------------------------------------------------------- scheduler

    def _on_scheduler_connected(self) -> None:
        self.scheduled = True
        for progress in self._wanted():
            if progress.shared:
                self._join(progress)

    def _on_scheduler_said(self, message: Message) -> None:
        match message:
            case Lease():
                self._on_lease(message)
            case Checksums():
                self._on_checksums(message)

    def _on_lease(self, message: Lease) -> None:
        progress = self.blobs.get(message.blob)
        index = message.index
        if progress is None or index >= progress.count or progress.final:
            self._out.append(Tell(message=Failed(message.blob, index, 0)))
        elif progress.have >> index & 1:
            self._leased.add((message.blob, index))
            self._finish_lease(progress, index)
        elif not progress.wanted:
            self._out.append(Tell(message=Failed(message.blob, index, 0)))
        else:
            self._fetch(progress, index, leased=True)

    def _on_checksums(self, message: Checksums) -> None:
        progress = self.blobs.get(message.blob)
        if progress is None or not progress.wanted:
            return
        self._learn_size(progress, message.size_bytes)
        indices = unpack_indices(message.indices, progress.count)
        wrong = []
        for index, checksum in zip(indices, unpack_checksums(message.checksums, len(indices)), strict=True):
            if index in progress.vouchers.settled:
                continue
            progress.vouchers.settle(index, checksum)
            if progress.have >> index & 1:
                if progress.own[index] == checksum:
                    self._offer(progress, index)
                else:
                    wrong.append(index)
        if wrong:
            self._disown(progress, wrong)

    def _disown(self, progress: Progress, wrong: list[int]) -> None:
        """Take back chunks that only their senders vouched for, now that a better word differs."""
        settled = {index: progress.vouchers.settled[index] for index in wrong}
        liars = {progress.senders[index] for index in wrong if index in progress.senders}
        self.counters.corrupt_chunks += len(wrong)
        self._out.append(ForgetChunks(blob=progress.blob, indices=wrong))
        self._forget(progress, wrong)
        for index, checksum in settled.items():
            progress.vouchers.settle(index, checksum)
        for liar in liars:
            self._drop_peer(liar, f"sent corrupt chunks of {progress.blob}", BAN_S)

    def _learn_size(self, progress: Progress, size_bytes: int) -> None:
        if progress.chunks is None and 0 <= size_bytes <= MAX_WHOLE_BYTES:
            chunks = ChunkMap.of(size_bytes)
            if chunks.count == 1:
                progress.size(chunks)

    # --------------------------------------------------------------- peers

    def _on_peer_connected(self, peer_id: PeerId) -> None:
        peer = self.book.peers[peer_id] = Peer(peer_id)
        self._met_at = self._now
        for progress in self._wanted():
            if progress.shared:
                self._share_with(peer, progress, reply=False)

    def _on_peer_lost(self, peer_id: PeerId) -> None:
        peer = self.book.peers.pop(peer_id, None)
        if peer is None:
            return
        self._waiting.pop(peer_id, None)
        self._uploads -= len(peer.uploads)
        for number in list(peer.downloads):
            self._end_download(peer, number)
        for blob in list(peer.shared):
            self._unhold(peer, blob)
        self._gains += 1
        self._make_room()
        self._grant()

    def _drop_peer(self, peer_id: PeerId, reason: str, ban_s: float) -> None:
        if ban_s:
            self.book.ban(peer_id, self._now + ban_s)
        self._on_peer_lost(peer_id)
        self._out.append(DropPeer(peer=peer_id, reason=reason, ban_s=ban_s))

    def _on_peer_said(self, peer_id: PeerId, message: Message) -> None:
        peer = self.book.peers.get(peer_id)
        if peer is None:
            return
        match message:
            case Have():
                self._on_have(peer, message)
            case Grant():
                self._on_grant(peer, message.number)
            case Take():
                self._on_take(peer, message)
            case Decline():
                self._on_decline(peer, message)
            case Room():
                peer.parked_until = 0.0
                self._grant()
            case Share():
                self._on_share(peer, message)
            case Unshare():
                self._unhold(peer, message.blob)
                peer.wants.discard(message.blob)
                peer.cursors.pop(message.blob, None)
            case Refuse():
                self._on_refuse(peer, message.number)
            case Cancel():
                self._out.append(CancelSend(peer=peer_id, number=message.number))
            case _:
                raise RemoteProtocolError(f"a {type(message).__name__} from a peer")

    def _share_with(self, peer: Peer, progress: Progress, *, reply: bool) -> None:
        peer.cursors[progress.blob] = len(progress.log)
        self._out.append(Send(peer=peer.peer_id, message=progress.share(reply=reply)))

    def _on_share(self, peer: Peer, message: Share) -> None:
        if len(peer.wants) > MAX_SHARED_BLOBS or len(peer.shared) > MAX_SHARED_BLOBS:
            raise RemoteProtocolError(f"more than {MAX_SHARED_BLOBS} blobs shared")
        progress = self.blobs.get(message.blob)
        if message.wants:
            peer.wants.add(message.blob)
        else:
            peer.wants.discard(message.blob)
        if progress is None:
            if message.wants:
                self._out.append(LookUp(blob=message.blob))
            return
        if not progress.shared:
            return
        chunks, bits, checksums = read_share(message)
        if chunks is not None:
            self._learn_size(progress, chunks.size_bytes)
        if progress.chunks is not None and chunks == progress.chunks:
            if progress.media_type == "":
                progress.media_type = message.media_type
            self._unhold(peer, message.blob)
            peer.shared[message.blob] = bits
            progress.add_holder(bits)
            self._heard(progress, peer, zip(members(bits), checksums, strict=True))
        if not message.reply and message.wants:
            self._share_with(peer, progress, reply=True)
        peer.idle_at = -1
        self._grant()

    def _on_have(self, peer: Peer, message: Have) -> None:
        progress = self.blobs.get(message.blob)
        if progress is None or progress.chunks is None or message.blob not in peer.shared:
            return
        indices = unpack_indices(message.indices, progress.count)
        checksums = unpack_checksums(message.checksums, len(indices))
        known = peer.shared[message.blob]
        new = 0
        for index in indices:
            new |= 1 << index
        peer.shared[message.blob] = known | new
        if progress.wanted:
            progress.add_holder(new & ~known)
            self._heard(progress, peer, zip(indices, checksums, strict=True))
        if known | new == progress.full:
            peer.wants.discard(message.blob)

    def _heard(self, progress: Progress, peer: Peer, words: Iterator[tuple[int, Checksum]]) -> None:
        """Weigh a peer's word on checksums; a lease holder's own settles it where no scheduler does."""
        settled = progress.vouchers.settled
        swarm = None if self.scheduled else self._swarm_of(progress)
        for index, checksum in words:
            progress.progress_at = self._now
            if index in settled:
                continue
            if swarm is not None and lease.holder_of(progress.blob, index, swarm) == peer.peer_id:
                progress.vouchers.settle(index, checksum)
            elif not progress.vouchers.claim(index, checksum, peer.peer_id):
                continue
            if progress.have >> index & 1:
                self._offer(progress, index)

    def _unhold(self, peer: Peer, blob: Digest) -> None:
        bits = peer.shared.pop(blob, 0)
        progress = self.blobs.get(blob)
        if progress is not None and progress.wanted:
            others = (other.shared.get(blob, 0) for other in self.book.peers.values() if other is not peer)
            progress.drop_holder(bits, others)

    # ----------------------------------------------------- taking from peers

    def _on_grant(self, peer: Peer, number: int) -> None:
        if self._downloads + bool(self._fetching) >= self._settings.downloads:
            self._waiting[peer.peer_id] = None
            self._answer(peer, Decline(number, True))
            return
        picked = self._pick(peer)
        if picked is None:
            self._answer(peer, Decline(number, False))
            return
        progress, index = picked
        if number in peer.downloads:
            raise RemoteProtocolError(f"grant {number} given twice")
        wait_s = max(MIN_DEADLINE_S, DEADLINE_FACTOR * self._chunk_s) if self._chunk_s else DEADLINE_S
        peer.downloads[number] = Download(progress.blob, index, self._now, self._now + wait_s)
        progress.ask(index, peer.peer_id, self._now)
        self._downloads += 1
        self._tell_haves(peer)
        self._out.append(TakeChunk(peer=peer.peer_id, number=number, blob=progress.blob, index=index))

    def _answer(self, peer: Peer, message: Message) -> None:
        self._tell_haves(peer)
        self._out.append(Send(peer=peer.peer_id, message=message))

    def _pick(self, peer: Peer) -> tuple[Progress, int] | None:
        """Return the chunk to take from this peer: in a window first, then the rarest of the pool."""
        best: tuple[Progress, int] | None = None
        for progress in self._wanted():
            theirs = peer.shared.get(progress.blob, 0) & ~progress.have
            free = theirs & ~progress.inflight
            if not free:
                continue
            urgent = free & progress.window
            if urgent:
                return progress, rarest(urgent, progress.holders, self._rng)
            index = rarest(free, progress.holders, self._rng)
            if best is None or progress.holders[index] < best[0].holders[best[1]]:
                best = progress, index
        return best or self._pick_again(peer)

    def _pick_again(self, peer: Peer) -> tuple[Progress, int] | None:
        """Return a chunk that is on its way already, but for long (the endgame), or None."""
        patience = max(DUPLICATE_FACTOR * self._chunk_s, MIN_DEADLINE_S / 2)
        for progress in self._wanted():
            for index in members(peer.shared.get(progress.blob, 0) & ~progress.have):
                asked = progress.asked.get(index, [])
                if len(asked) == 1 and asked[0][0] != peer.peer_id and self._now - asked[0][1] > patience:
                    return progress, index
        return None

    def _end_download(self, peer: Peer, number: int) -> None:
        download = peer.downloads.pop(number, None)
        if download is None:
            return
        if not download.late:
            self._downloads -= 1
        progress = self.blobs.get(download.blob)
        if progress is not None:
            progress.unask(download.index, peer.peer_id)

    def _on_refuse(self, peer: Peer, number: int) -> None:
        download = peer.downloads.get(number)
        if download is None:
            return
        self._end_download(peer, number)
        shared = peer.shared.get(download.blob)
        progress = self.blobs.get(download.blob)
        if shared is not None and progress is not None and progress.wanted and shared >> download.index & 1:
            peer.shared[download.blob] = shared & ~(1 << download.index)
            others = (other.shared.get(download.blob, 0) for other in self.book.peers.values())
            progress.drop_holder(1 << download.index, others)
        self._make_room()

    def _make_room(self) -> None:
        """Tell a peer whose grant we declined for want of room that there is some now."""
        free = self._settings.downloads - self._downloads - bool(self._fetching)
        while free > 0 and self._waiting:
            peer_id = next(iter(self._waiting))
            del self._waiting[peer_id]
            peer = self.book.peers.get(peer_id)
            if peer is not None and self._pick(peer) is not None:
                self._answer(peer, Room())
                free -= 1

    # ------------------------------------------------------- giving to peers

    def _grant(self) -> None:
        """Offer free upload slots."""
        while self._uploads < self._settings.upload_slots:
            found = serve.candidates(self.book.peers, self.blobs, self._gains, self._now)
            if not found:
                return
            peer = serve.choose(found, self._rng)
            number = peer.number()
            peer.uploads[number] = Upload(self._now)
            self._uploads += 1
            self.counters.grants += 1
            self._answer(peer, Grant(number))

    def _on_take(self, peer: Peer, message: Take) -> None:
        upload = peer.uploads.get(message.number)
        progress = self.blobs.get(message.blob)
        if upload is None or upload.blob is not None:
            self._out.append(Send(peer=peer.peer_id, message=Refuse(message.number)))
            return
        if progress is None or not progress.shared or not progress.offered >> message.index & 1:
            self._free_slot(peer, message.number)
            self._out.append(Send(peer=peer.peer_id, message=Refuse(message.number)))
            self._grant()
            return
        upload.blob, upload.index, upload.since = message.blob, message.index, self._now
        self._out.append(SendChunk(peer=peer.peer_id, number=message.number, blob=message.blob, index=message.index))

    def _on_decline(self, peer: Peer, message: Decline) -> None:
        self.counters.declines += 1
        if message.full:
            peer.parked_until = self._now + serve.PARK_S
        else:
            peer.idle_at = self._gains
        self._free_slot(peer, message.number)
        self._grant()

    def _on_chunk_sent(self, peer_id: PeerId, number: int) -> None:
        peer = self.book.peers.get(peer_id)
        if peer is None:
            return
        upload = peer.uploads.get(number)
        if upload is not None and upload.blob is not None:
            progress = self.blobs.get(upload.blob)
            if progress is not None and progress.chunks is not None:
                size = progress.chunks.length(upload.index)
                self.counters.to_peers += size
                peer.up_bytes += size
        self._free_slot(peer, number)
        self._grant()

    def _free_slot(self, peer: Peer, number: int) -> None:
        if peer.uploads.pop(number, None) is not None:
            self._uploads -= 1

    def _tell_haves(self, peer: Peer) -> None:
        """Bring a peer up to date on the blobs that it takes part in."""
        for blob, cursor in peer.cursors.items():
            progress = self.blobs.get(blob)
            if progress is None or cursor >= len(progress.log):
                continue
            fresh = progress.log[cursor:]
            peer.cursors[blob] = len(progress.log)
            checksums = b"".join(progress.own[index] for index in fresh)
            self._out.append(Send(peer=peer.peer_id, message=Have(blob, pack_indices(fresh), checksums)))

    def _flush_haves(self) -> None:
        self._flushed_at = self._now
        for peer in self.book.peers.values():
            self._tell_haves(peer)

    # ---------------------------------------------------------------- time

    def _on_tick(self) -> None:
        for peer in list(self.book.peers.values()):
            self._expire(peer)
        if self._now - self._flushed_at >= HAVE_INTERVAL_S:
            self._flush_haves()
        for (blob, index), since in self._fetching.items():
            if (blob, index) in self._leased and self._now - since >= RENEW_S:
                self._fetching[blob, index] = self._now
                self._out.append(Tell(message=Renew(blob, index)))
        self._lease_by_rendezvous()
        for progress in list(self._wanted()):
            self._climb(progress)
            self._fail_if_hopeless(progress)
        self._make_room()
        self._grant()

    def _expire(self, peer: Peer) -> None:
        """Give up on what a peer should have answered by now."""
        for number, upload in list(peer.uploads.items()):
            if upload.blob is None and self._now - upload.since > serve.GRANT_TIMEOUT_S:
                peer.parked_until = self._now + serve.PARK_S
                self._free_slot(peer, number)
            elif self._now - upload.since > serve.UPLOAD_TIMEOUT_S:
                self._free_slot(peer, number)
        for download in peer.downloads.values():
            if not download.late and download.deadline <= self._now:
                # Its bytes may still come and are welcome; the chunk may be had elsewhere meanwhile.
                download.late = True
                self._downloads -= 1
                self.counters.late_chunks += 1
                peer.failures += 1
                progress = self.blobs.get(download.blob)
                if progress is not None:
                    progress.unask(download.index, peer.peer_id)
        if peer.failures >= FAILURES_TO_DROP:
            self._drop_peer(peer.peer_id, f"let {peer.failures} chunks in a row go late", BAN_S)

    def _climb(self, progress: Progress) -> None:
        """Take the next rung of the ladder where the lower ones bring nothing."""
        if progress.complete or not progress.shared or progress.retry_at > self._now:
            return
        free = progress.full & ~(progress.have | progress.inflight)
        unheld = free & ~progress.held
        quiet_s = self._now - progress.progress_at
        if self.scheduled and unheld and quiet_s > MISSING_S and self._now - progress.missing_told_at > MISSING_S:
            progress.missing_told_at = self._now
            first = [index for index, _ in zip(members(unheld), range(MISSING_AT_ONCE), strict=False)]
            self._out.append(Tell(message=Missing(progress.blob, pack_indices(first))))
        stalled_s = self._now - max(self._arrived_at, progress.progress_at)
        if free and not self._fetching and not progress.final and stalled_s > STALL_S * (1 + self._rng.random()):
            self._arrived_at = self._now
            self._fetch(progress, lowest(free), leased=False)
