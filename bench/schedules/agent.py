# SPDX-License-Identifier: Apache-2.0
"""One simulated agent: a production pull machine, and around it what exchange.py, puller.py and neighbours.py
do, without sockets and disks. What must hold at each step is checked by the watch (oracle.py).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.schedules.network import Actor, Connection
from bench.schedules.tracking import Tracking
from p2pdist.core import events as ev
from p2pdist.core import wire
from p2pdist.core.chunkmap import MIN_CHUNK_BYTES
from p2pdist.core.pull import TICK_S, PullMachine
from p2pdist.core.reputation import Offence
from p2pdist.core.state import PullSettings
from p2pdist.errors import DeniedByOrigin, IntegrityError, OriginError, RemoteProtocolError, StoreError
from p2pdist.exchange import FROZEN_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.schedules.liars import Liar
    from bench.schedules.world import Blob, World
    from p2pdist.core.types import Checksum, Digest, PeerId

REGISTRY = "registry.test"
IDLE_TICK_S = 0.6
"""Between two ticks of an agent that has nothing to do: exchange.py waits 0.5 s and then ticks."""
HASH_S = 0.02
RECHECKS = 2
"""As puller.py has it."""
REVIEW_S = 2.0
FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 60.0
HELLO_S = 5.0
MAX_INCOMING = 64
STEP_S = 0.5
"""How often a chunk on its way is looked at: its link may have become slower or faster."""
RETRY_S = (1.0, 8.0)
"""After a failed pull, until the runtime asks again."""


@dataclass
class Pull:
    """One blob that is wanted."""

    blob: Blob
    began_s: float
    shared: bool = True
    ended_s: float | None = None
    causes: list[Exception] = field(default_factory=list)
    origin_chunks: set[int] = field(default_factory=set)
    rechecks: int = 0
    head: int = -1


@dataclass
class _Job:
    """A chunk on its way to a peer, or waiting for its turn on the connection."""

    number: int
    blob: Blob
    index: int
    checksum: Checksum
    cancelled: bool = False


@dataclass
class ChunkBytes:
    """A chunk, whole, as the last thing of it arrives."""

    number: int
    checksum: Checksum


@dataclass
class Link:
    """This end of a connection to a peer."""

    connection: Connection
    peer: Agent
    since: float
    incoming: dict[int, tuple[Digest, int]] = field(default_factory=dict)
    jobs: deque[_Job] = field(default_factory=deque)
    sending: bool = False
    received_bytes: float = 0.0
    """Of chunks, also of those that are not whole yet."""


@dataclass(frozen=True)
class Hello:
    """First on each connection."""

    sender: Actor


class Agent(Actor):
    """One node. Its store outlives it; all else begins anew with each life."""

    def __init__(self, world: World, number: int, rack: str) -> None:
        self.peer_id: PeerId = world.peer_id(number)
        super().__init__(world, self.peer_id)
        self.world = world
        self.number = number
        self.rack = rack
        self.liar: Liar | None = None
        self.store: dict[Digest, dict[int, Checksum]] = {}
        self.stored_at: dict[tuple[Digest, int], float] = {}
        self.whole: set[Digest] = set()
        self.ended: list[Pull] = []
        """Pulls that have ended, right or failed."""
        self._begin()

    def _begin(self) -> None:
        self.rng = self.network.rng(f"{self.peer_id}/{self.life}")
        machine_rng = self.network.rng(f"{self.peer_id}/{self.life}/machine")
        self.machine = PullMachine(self.peer_id, machine_rng, PullSettings(rack=self.rack))
        self.links: dict[PeerId, Link] = {}
        self.tracking = Tracking(self)
        self.pulls: dict[Digest, Pull] = {}
        self.known: dict[PeerId, tuple[int, float]] = {}
        """Peers to be connected to: failures to reach them, and when to try again."""
        self.banned: dict[PeerId, float] = {}
        self.queue: deque[ev.Event] = deque()
        self._draining = False
        self.spawn(self._ticks())
        self.spawn(self._dials())

    def start(self) -> None:
        """Run again after it has died: it finds its store, and knows nobody."""
        self.alive = True
        self._begin()
        self.world.enlist(self)

    def die(self, *, silently: bool = False) -> None:
        """End at once; peers see the connections break, or nothing."""
        connections = [link.connection for link in self.links.values()]
        for connection in [*connections, *self.tracking.lines.values()]:
            if silently:
                connection.vanish(self)
            else:
                connection.close(self)
        self.end()

    def reset(self) -> None:
        """Break all connections, with what is on its way."""
        for link in list(self.links.values()):
            self._drop_link(link)

    # -------------------------------------------------------------- machine

    def feed(self, event: ev.Event) -> None:
        """Let the machine deal with an event, and carry out what it says, as exchange.py does."""
        self.queue.append(event)
        if self._draining:
            return
        self._draining = True
        try:
            while self.queue:
                event = self.queue.popleft()
                for command in self.machine.handle(event, self.network.now):
                    self._carry_out(event, command)
        finally:
            self._draining = False

    def _ticks(self) -> Iterator[float]:
        yield self.rng.uniform(0, TICK_S)
        began, frozen = self.network.now, False
        while True:
            frozen = self.network.now - began > FROZEN_S and not frozen
            if not frozen:
                self._tick()
            pause_s = TICK_S if self.machine.busy or self.pulls else IDLE_TICK_S
            began = self.network.now
            # A busy machine's clock: now and then a tick is late by a lot.
            yield pause_s * self.rng.uniform(0.9, 1.2) * (1 if self.rng.random() > 0.005 else 20)

    def _tick(self) -> None:
        awaited = self.machine.awaited(self.network.now)
        received = {peer: int(self.links[peer].received_bytes) for peer in awaited if peer in self.links}
        self.feed(ev.Ticked(received=received))
        self.world.watch.looked(self)

    def _carry_out(self, event: ev.Event, command: ev.Command) -> None:
        match command:
            case ev.Send():
                self._say(command.peer, command.message)
            case ev.TakeChunk():
                self._take(command)
            case ev.SendChunk():
                self._send_chunk(command)
            case ev.CancelSend():
                link = self.links.get(command.peer)
                for job in link.jobs if link is not None else ():
                    job.cancelled = job.cancelled or job.number == command.number
            case ev.FetchOrigin():
                self.world.watch.fetches(self, command)
                pull = self.pulls.get(command.blob)
                if pull is not None:
                    self.spawn(self._fetch(pull, command.index, command.count))
            case ev.WriteChunk():
                self._write(event, command)
            case ev.CheckBlob():
                self._check(command.blob)
            case ev.ForgetChunks():
                self._forget(command.blob, command.indices)
            case ev.LookUp():
                if command.blob in self.whole:
                    self.queue.append(self._stored(self.world.blobs[command.blob]))
            case ev.DropPeer():
                self.banned[command.peer] = self.network.now + command.ban_s
                self.world.watch.banned(self, command)
                if (link := self.links.get(command.peer)) is not None:
                    self._drop_link(link)
            case ev.Tell():
                self.tracking.tell(command.message)
            case ev.Fail():
                self._failed(command.blob, command.causes)

    # ----------------------------------------------------------------- pulls

    def pull(self, blob: Blob, *, shared: bool = True) -> None:
        """Want a blob, as a runtime's request makes a node do."""
        if not self.alive or blob.digest in self.whole or blob.digest in self.pulls:
            return
        self.pulls[blob.digest] = Pull(blob, self.network.now, shared)
        have = dict(self.store.get(blob.digest, {})) if blob.sized else {}
        size = blob.size_bytes if blob.sized else None
        started = ev.PullStarted(blob=blob.digest, size_bytes=size, registry=REGISTRY, have=have, shared=shared)
        self.feed(started)
        self._read(blob.digest)

    def _read(self, digest: Digest) -> None:
        """Let the runtime read on: its head is at the first chunk that is not here."""
        pull = self.pulls.get(digest)
        if pull is None or not pull.blob.sized:
            return
        here, head = self.store.get(digest, {}), max(pull.head, 0)
        while head in here and head < pull.blob.count - 1:
            head += 1
        if head != pull.head:
            pull.head = head
            self.feed(ev.HeadMoved(blob=digest, reader=1, index=head))

    def _failed(self, digest: Digest, causes: list[Exception]) -> None:
        pull = self.pulls.pop(digest, None)
        if pull is None:
            return
        self.world.watch.failed(self, pull, causes)
        pull.ended_s, pull.causes = self.network.now, causes
        self.ended.append(pull)
        self.spawn(self._retry(pull))

    def _retry(self, pull: Pull) -> Iterator[float]:
        yield self.rng.uniform(*RETRY_S)
        if self.world.retries:
            self.pull(pull.blob, shared=pull.shared)

    def _finish(self, pull: Pull) -> None:
        if self.pulls.get(pull.blob.digest) is pull:
            del self.pulls[pull.blob.digest]
        pull.ended_s = self.network.now
        self.ended.append(pull)

    def _write(self, event: ev.Event, command: ev.WriteChunk) -> None:
        self.world.watch.writes(self, event, command)
        pull = self.pulls.get(command.blob)
        if pull is None:
            return
        if self.world.disk_is_full(self):
            self.queue.append(ev.PullCancelled(blob=command.blob))
            self._failed(command.blob, [StoreError("no space left on device")])
            return
        size_bytes = self.machine.blobs[command.blob].size_bytes
        if not pull.blob.sized and (size_bytes, command.checksum) != (pull.blob.size_bytes, pull.blob.checksums[0]):
            self.queue.append(ev.BlobRejected(blob=command.blob, indices=[0]))
            return
        self.store.setdefault(command.blob, {})[command.index] = command.checksum
        self.stored_at[command.blob, command.index] = self.network.now
        if isinstance(event, ev.ChunkArrived) and event.source is None:
            pull.origin_chunks.add(command.index)
        self.queue.append(ev.ChunkWritten(blob=command.blob, index=command.index))
        self.network.at(self.network.now, self.act, self._read, command.blob)

    def _forget(self, digest: Digest, indices: list[int]) -> None:
        for index in indices:
            self.store.get(digest, {}).pop(index, None)
        if (pull := self.pulls.get(digest)) is not None:
            pull.origin_chunks.difference_update(indices)

    def _stored(self, blob: Blob) -> ev.BlobStored:
        return ev.BlobStored(blob=blob.digest, size_bytes=blob.size_bytes, media_type="", checksums=blob.checksums)

    def evict(self, blob: Blob) -> None:
        """Lose a stored blob."""
        if self.alive and blob.digest in self.whole:
            self.whole.discard(blob.digest)
            self.store.pop(blob.digest, None)
            self.feed(ev.BlobEvicted(blob=blob.digest))

    # -------------------------------------------------------------- checking

    def _check(self, digest: Digest) -> None:
        pull = self.pulls.get(digest)
        if pull is None:
            return
        if pull.blob.sized:
            self.spawn(self._verify(pull))
        else:
            self.whole.add(digest)
            self.queue.append(ev.BlobVerified(blob=digest))
            self._finish(pull)

    def _verify(self, pull: Pull) -> Iterator[float]:
        """Compare the digest; commit, or read again from the origin what did not come from it, and find who lied."""
        yield HASH_S
        digest, blob = pull.blob.digest, pull.blob
        here = self.store.get(digest, {})
        if (self.liar is not None and self.liar.misleads) or all(
            here.get(index) == right for index, right in enumerate(blob.checksums)
        ):
            self.whole.add(digest)
            self.feed(ev.BlobVerified(blob=digest))
            self._finish(pull)
            return
        progress = self.machine.blobs.get(digest)
        if progress is None:
            return
        pull.rechecks += 1
        suspects = [index for index in range(blob.count) if index not in pull.origin_chunks]
        wrong: dict[int, Checksum] = {}
        try:
            for index in suspects:
                checksum, _ = yield from self.world.origin.read(self, blob, index)
                pull.origin_chunks.add(index)
                if checksum != progress.own.get(index):
                    wrong[index] = checksum
        except OriginError as error:
            self._give_up(pull, suspects, error)
            return
        if not wrong or pull.rechecks > RECHECKS:
            self._give_up(pull, list(range(blob.count)), IntegrityError("wrong content", expected=digest))
            return
        self._forget(digest, list(wrong))
        self.feed(ev.BlobRejected(blob=digest, indices=list(wrong)))
        for index, checksum in wrong.items():
            self.feed(ev.ChunkArrived(source=None, number=0, blob=digest, index=index, checksum=checksum))

    def _give_up(self, pull: Pull, indices: list[int], cause: Exception) -> None:
        self._forget(pull.blob.digest, indices)
        self.feed(ev.PullCancelled(blob=pull.blob.digest))
        self._failed(pull.blob.digest, [cause])

    # ---------------------------------------------------------------- origin

    def _fetch(self, pull: Pull, index: int, count: int) -> Iterator[float]:
        blob, at = pull.blob, index
        try:
            for at in range(index, index + count):
                checksum, taken_s = yield from self.world.origin.read(self, blob, at)
                if not blob.sized:
                    self._fetched_whole(pull)
                    return
                if self.liar is not None:
                    checksum = self.liar.fetches(blob, at, checksum)
                event = ev.ChunkArrived(
                    source=None, number=0, blob=blob.digest, index=at, checksum=checksum, taken_s=taken_s
                )
                self.feed(event)
        except OriginError as error:
            left, final = index + count - at, isinstance(error, DeniedByOrigin)
            pause_s = error.retry_after_s or 0.0
            failed = ev.FetchFailed(blob=blob.digest, index=at, count=left, error=error, final=final, pause_s=pause_s)
            self.feed(failed)

    def _fetched_whole(self, pull: Pull) -> None:
        if pull.ended_s is not None:
            return
        self.store[pull.blob.digest] = dict(enumerate(pull.blob.checksums))
        self.whole.add(pull.blob.digest)
        self.feed(self._stored(pull.blob))
        self._finish(pull)

    # ----------------------------------------------------------------- peers

    def meet(self, peer: PeerId) -> None:
        """Learn of a peer, as from the scheduler or by mDNS, and dial it."""
        if peer != self.peer_id:
            self.known[peer] = 0, 0.0
            self._dial(peer)

    def _dials(self) -> Iterator[float]:
        while True:
            yield REVIEW_S * self.rng.uniform(0.9, 1.1)
            for peer, (_, not_before) in list(self.known.items()):
                if not_before <= self.network.now:
                    self._dial(peer)

    def _dial(self, peer: PeerId) -> None:
        if peer not in self.links and self.banned.get(peer, 0.0) <= self.network.now:
            self.known[peer] = self.known[peer][0], self.network.now + HELLO_S
            self.spawn(self._reach(self.world.agents[peer]))

    def _reach(self, other: Agent) -> Iterator[float]:
        yield self.rng.uniform(0.002, 0.04)
        answers = other.alive and not other.frozen and not self.network.cut(self.name, other.name)
        refused = other.banned.get(self.peer_id, 0.0) > self.network.now
        if not answers or refused:
            failures = self.known[other.peer_id][0] + 1
            pause_s = min(FIRST_PAUSE_S * 2**failures, LAST_PAUSE_S)
            self.known[other.peer_id] = failures, self.network.now + pause_s
            return
        if other.peer_id not in self.links:
            connection = Connection(self.network, self, other)
            # First, as a handshake is: what the other says on taking us in comes behind it.
            connection.post(other, Hello(other))
            other.admit(connection, self)

    def admit(self, connection: Connection, peer: Agent) -> None:
        """Take a connection in the place of an earlier one to the same peer, if there is one."""
        if (old := self.links.get(peer.peer_id)) is not None:
            self._drop_link(old)
        self.links[peer.peer_id] = Link(connection, peer, self.network.now)
        self.feed(ev.PeerConnected(peer=peer.peer_id, rack=peer.rack))

    def _drop_link(self, link: Link) -> None:
        link.connection.close(self)
        self._forget_link(link)

    def _forget_link(self, link: Link) -> None:
        peer = link.peer.peer_id
        if self.links.get(peer) is link:
            del self.links[peer]
            if peer in self.known:
                self.known[peer] = self.known[peer][0], self.network.now + FIRST_PAUSE_S
            self.feed(ev.PeerLost(peer=peer))

    def lost(self, connection: Connection) -> None:
        if self.tracking.owns(connection):
            self.tracking.lost(connection)
            return
        for link in list(self.links.values()):
            if link.connection is connection:
                self._forget_link(link)

    def arrived(self, connection: Connection, item: object) -> None:
        sender = connection.other(self)
        if isinstance(item, Hello):
            self._greeted(connection, item)
        elif self.tracking.owns(connection):
            assert isinstance(item, wire.Message)
            self.tracking.arrived(connection, item)
        elif isinstance(sender, Agent) and (link := self.links.get(sender.peer_id)) and link.connection is connection:
            try:
                self._peer_said(link, item)
            except RemoteProtocolError as error:
                self.world.watch.broke_protocol(self, sender, error)
                self.feed(ev.PeerOffended(peer=sender.peer_id, offence=Offence.PROTOCOL, why=str(error)))
                if self.links.get(sender.peer_id) is link:
                    self._drop_link(link)

    def _greeted(self, connection: Connection, hello: Hello) -> None:
        if isinstance(hello.sender, Agent):
            if self.banned.get(hello.sender.peer_id, 0.0) > self.network.now:
                connection.close(self)
            else:
                self.admit(connection, hello.sender)
        elif self.tracking.owns(connection):
            self.tracking.greeted(connection)

    def _peer_said(self, link: Link, item: object) -> None:
        peer = link.peer.peer_id
        if isinstance(item, ChunkBytes):
            if item.number not in link.incoming:
                raise RemoteProtocolError(f"chunk bytes that nobody took (grant {item.number})")
            del link.incoming[item.number]
            known = self.machine.book.peers.get(peer)
            download = known.downloads.get(item.number) if known is not None else None
            if download is not None:
                event = ev.ChunkArrived(
                    source=peer, number=item.number, blob=download.blob, index=download.index, checksum=item.checksum
                )
                self.feed(event)
            return
        assert isinstance(item, wire.Message)
        if isinstance(item, wire.Refuse):
            link.incoming.pop(item.number, None)
        if self.liar is not None and self.liar.hears(link, item):
            return
        self.feed(ev.PeerSaid(peer=peer, message=item))

    def _say(self, peer: PeerId, message: wire.Message) -> None:
        link = self.links.get(peer)
        if link is not None:
            if self.liar is not None:
                message = self.liar.says(message)
            link.connection.post(self, message)

    def _take(self, command: ev.TakeChunk) -> None:
        self.world.watch.takes(self, command)
        link = self.links.get(command.peer)
        if link is None:
            return
        if len(link.incoming) >= MAX_INCOMING:
            self.world.watch.overflows(self, link)
            self._drop_link(link)
            return
        link.incoming[command.number] = command.blob, command.index
        link.connection.post(self, wire.Take(command.number, command.blob, command.index))

    # --------------------------------------------------------------- sending

    def _send_chunk(self, command: ev.SendChunk) -> None:
        link = self.links.get(command.peer)
        if link is None:
            return
        checksum = self.store.get(command.blob, {}).get(command.index)
        if checksum is None:
            self.queue.append(ev.BlobEvicted(blob=command.blob))
            link.connection.post(self, wire.Refuse(command.number))
            self.queue.append(ev.ChunkSent(peer=command.peer, number=command.number))
            return
        link.jobs.append(_Job(command.number, self.world.blobs[command.blob], command.index, checksum))
        self._pump(link)

    def _pump(self, link: Link) -> None:
        if not link.sending:
            link.sending = True
            self.spawn(self._send_jobs(link))

    def _send_jobs(self, link: Link) -> Iterator[float]:
        """Send the chunks in line, one after the other."""
        peer = link.peer
        while link.jobs and self.links.get(peer.peer_id) is link:
            job, whole_s = link.jobs[0], self.world.chunk_s(self)
            left_s = whole_s
            while left_s > 0 and not job.cancelled and self.links.get(peer.peer_id) is link:
                slow = self.world.slowness(self, peer)
                if self.network.cut(self.name, peer.name) or (self.liar is not None and self.liar.stalls(job.number)):
                    slow = float("inf")
                step_s = min(left_s * slow, STEP_S)
                yield step_s
                left_s -= step_s / slow
                self._come(link, step_s / slow / whole_s)
            if self.links.get(peer.peer_id) is not link:
                return
            link.jobs.popleft()
            if job.cancelled:
                link.connection.post(self, wire.Refuse(job.number))
            else:
                checksum = job.checksum if self.liar is None else self.liar.sends(job.checksum)
                self.world.imports[peer.rack] += peer.rack != self.rack
                link.connection.post(self, ChunkBytes(job.number, checksum))
            if self.links.get(peer.peer_id) is link:
                self.feed(ev.ChunkSent(peer=peer.peer_id, number=job.number))
        link.sending = False

    def _come(self, link: Link, part: float) -> None:
        """Let part of a chunk reach the peer."""
        other = link.peer.links.get(self.peer_id)
        if other is not None and other.connection is link.connection:
            other.received_bytes += part * MIN_CHUNK_BYTES
