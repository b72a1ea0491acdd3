# SPDX-License-Identifier: Apache-2.0
"""Runs the pull state machine: events from links, scheduler and content go in, its commands are carried out.

Owns the links by peer and the buffers of chunks on their way. Everything here is synchronous, so an
event is fully dealt with before the next; what takes time (the origin, the disk's big jobs) is the
content's, which comes back with an event.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import structlog
import trio

from p2pdist.core import events as ev
from p2pdist.core.addresses import telling
from p2pdist.core.pull import TICK_S
from p2pdist.core.racks import place_of
from p2pdist.core.wire import Ask, Cancel, Checksums, Have, Hello, Neighbours, Refuse, Resolved, Share, Take
from p2pdist.errors import RemoteProtocolError, StoreError

if TYPE_CHECKING:
    from p2pdist.core.pull import PullMachine
    from p2pdist.core.reputation import Offence
    from p2pdist.core.types import Checksum, Digest, PeerId
    from p2pdist.core.wire import Message, PeerAddress
    from p2pdist.net.peer_link import PeerLink

log = structlog.get_logger(__name__)

IDLE_TICK_S = 0.5
FROZEN_S = 2.0
"""A tick that comes so late is passed over: the process was stopped, or its machine paused. What has come meanwhile is
taken in first; else this agent would fetch for itself what is here already, and blame its peers."""

ChunkSource = tuple[int, int, int, Callable[[], None]]
"""The descriptor, start, length, and what to call when it is sent."""
LATER: ChunkSource = (-1, 0, 0, lambda: None)
"""The chunk is being looked at."""


class Content(Protocol):
    """What the exchange needs of whoever keeps the blobs (puller.py)."""

    def chunk_buffer(self, blob: Digest, index: int) -> memoryview | None:
        """Return an empty buffer as long as the chunk; None where the blob is not wanted any more."""

    def write(self, blob: Digest, index: int, data: memoryview, checksum: Checksum) -> None:
        """Write the chunk; ChunkWritten or BlobRejected is fed. Raises StoreError."""

    def forget(self, blob: Digest, indices: list[int]) -> None: ...

    def heard(self, blob: Digest) -> None:
        """Let readers look again: somebody spoke for the blob's chunks."""

    def fetch(self, blob: Digest, index: int, count: int) -> None:
        """Begin to read chunks from the origin; ChunkArrived for each, BlobStored or FetchFailed is fed later."""

    def check(self, blob: Digest) -> None:
        """Begin to compare the SHA-256; BlobVerified or BlobRejected is fed later."""

    def failed(self, blob: Digest, causes: list[Exception]) -> None: ...


class Seed(Protocol):
    """What the exchange needs of whoever gives peers the node's content (seeder.py)."""

    def chunk_source(self, blob: Digest, index: int) -> ChunkSource | None:
        """Return where the chunk is; None where it is gone, LATER where `clear` or `refuse_held` is called soon.

        Raises:
            StoreError: it is there and cannot be read.
        """

    def cleared(self, blob: Digest) -> bool:
        """Return whether peers may be given this blob now; else `clear` is called once that is known."""

    def look_up(self, blob: Digest) -> None:
        """Feed BlobStored, now or later, if the blob is in the store and may be shared."""


class Tracker(Protocol):
    """The way to the scheduler."""

    def send(self, message: Message) -> None: ...


class Exchange:
    """The shell around one PullMachine."""

    content: Content
    """Set once by the composition root: content and exchange know each other."""
    seeder: Seed
    """Set with it."""
    tracker: Tracker | None = None

    def __init__(self, machine: PullMachine, learn: Callable[[PeerAddress, str], None]) -> None:
        self.machine = machine
        self.links: dict[PeerId, PeerLink] = {}
        self.on_ask: Callable[[int], None] = lambda _number: None
        self.on_resolved: Callable[[Resolved], None] = lambda _message: None
        self.on_scheduler: Callable[[bool], None] = lambda _connected: None
        self.control_bytes = 0
        self._learn = learn
        self._held: dict[tuple[PeerId, int], ev.SendChunk] = {}
        """Chunks that wait for the word that peers may have them; no more than there are upload slots."""
        self._queue: deque[ev.Event] = deque()
        self._draining = False
        self._said: set[PeerLink] = set()
        """Links with messages to be sent when the event is dealt with: several go at once."""
        self._arrived: memoryview | None = None
        self._active = trio.Event()

    def feed(self, event: ev.Event) -> None:
        """Let the machine deal with an event, and carry out what it says; may be called from within."""
        self._queue.append(event)
        self._active.set()
        if self._draining:
            return
        self._draining = True
        try:
            while self._queue:
                now_event = self._queue.popleft()
                for command in self.machine.handle(now_event, trio.current_time()):
                    self._carry_out(command)
        finally:
            self._draining = False
            while self._said:
                self._said.pop().flush()

    async def tick(self) -> None:
        """Feed Ticked for as long as it runs, slowly while nothing goes on."""
        frozen = False
        while True:
            if not self.machine.busy:
                self._active = trio.Event()
                with trio.move_on_after(IDLE_TICK_S):
                    await self._active.wait()
            began = trio.current_time()
            await trio.sleep(TICK_S)
            # Never two in a row: where each is late, some have to count.
            frozen = trio.current_time() - began > FROZEN_S and not frozen
            if frozen:
                continue
            awaited = self.machine.awaited(trio.current_time())
            received = {peer: self.links[peer].received_bytes for peer in awaited if peer in self.links}
            self.feed(ev.Ticked(received=received))

    def _carry_out(self, command: ev.Command) -> None:
        match command:
            case ev.Send(message=Cancel() as message):
                if (link := self.links.get(command.peer)) is not None:
                    self._say(link, message)
                    link.abandon(message.number)
            case ev.Send():
                if (link := self.links.get(command.peer)) is not None:
                    self._say(link, command.message)
            case ev.TakeChunk():
                self._take(command)
            case ev.SendChunk():
                self._send_chunk(command)
            case ev.WriteChunk():
                self._write(command)
            case ev.Tell():
                if self.tracker is not None:
                    self.tracker.send(command.message)
            case ev.FetchOrigin():
                self.content.fetch(command.blob, command.index, command.count)
            case ev.CheckBlob():
                self.content.check(command.blob)
            case ev.CancelSend():
                self._cancel_send(command)
            case ev.ForgetChunks():
                self.content.forget(command.blob, command.indices)
            case ev.LookUp():
                self.seeder.look_up(command.blob)
            case ev.DropPeer():
                log.warning(
                    "peer dropped",
                    peer=command.peer,
                    offence=command.offence,
                    why=command.reason,
                    banned_s=round(command.ban_s),
                )
                if (link := self.links.pop(command.peer, None)) is not None:
                    link.close(command.reason)
            case ev.Fail():
                self.content.failed(command.blob, command.causes)

    def _say(self, link: PeerLink, message: Message) -> None:
        link.queue(message)
        self._said.add(link)

    def _take(self, command: ev.TakeChunk) -> None:
        link = self.links.get(command.peer)
        buffer = self.content.chunk_buffer(command.blob, command.index)
        if link is None or buffer is None:
            return
        link.expect(command.number, buffer)
        self._say(link, Take(command.number, command.blob, command.index))

    def _cancel_send(self, command: ev.CancelSend) -> None:
        held = self._held.pop((command.peer, command.number), None)
        if held is not None:
            self._refuse(held)
        elif (link := self.links.get(command.peer)) is not None:
            link.cancel_chunk(command.number)

    def clear(self, blob: Digest, *, allowed: bool) -> None:
        """Send the chunks of a blob that were held back, or refuse them and withdraw the blob."""
        if not allowed:
            self.feed(ev.BlobEvicted(blob=blob))
            self.refuse_held(blob)
        for held in self._let_go(blob):
            self._send_chunk(held)

    def refuse_held(self, blob: Digest) -> None:
        """Refuse the chunks of a blob that were held back."""
        for held in self._let_go(blob):
            self._refuse(held)

    def _let_go(self, blob: Digest) -> list[ev.SendChunk]:
        return [self._held.pop(key) for key in [key for key, held in self._held.items() if held.blob == blob]]

    def _refuse(self, command: ev.SendChunk) -> None:
        if (link := self.links.get(command.peer)) is not None:
            link.send(Refuse(command.number))
            self.feed(ev.ChunkSent(peer=command.peer, number=command.number))

    def _send_chunk(self, command: ev.SendChunk) -> None:
        link = self.links.get(command.peer)
        if link is None:
            return
        self._held[command.peer, command.number] = command
        if not self.seeder.cleared(command.blob):
            return
        try:
            source = self.seeder.chunk_source(command.blob, command.index)
        except StoreError as error:
            source = None
            log.error("chunk not sent to a peer", blob=command.blob, index=command.index, why=str(error))
        if source is LATER:
            return
        del self._held[command.peer, command.number]
        if source is None:
            self._refuse(command)
        else:
            link.send_chunk(command.number, *source)

    def _write(self, command: ev.WriteChunk) -> None:
        assert self._arrived is not None
        try:
            self.content.write(command.blob, command.index, self._arrived, command.checksum)
        except StoreError as error:
            self.feed(ev.PullCancelled(blob=command.blob))
            self.content.failed(command.blob, [error])

    # -------------------------------------------------------------- links

    def chunk_in(
        self, blob: Digest, index: int, data: memoryview, checksum: Checksum, taken_s: float | None = None
    ) -> None:
        """Take in a chunk that was read from the origin, in so many seconds; `data` is not kept."""
        self._chunk(
            ev.ChunkArrived(source=ev.ORIGIN, number=0, blob=blob, index=index, checksum=checksum, taken_s=taken_s),
            data,
        )

    def _chunk(self, event: ev.ChunkArrived, data: memoryview) -> None:
        assert not self._draining
        self._arrived = data
        try:
            self.feed(event)
        finally:
            self._arrived = None

    def chunk_arrived(self, peer: PeerId, number: int, data: memoryview, checksum: Checksum) -> None:
        known = self.machine.book.peers.get(peer)
        download = known.downloads.get(number) if known is not None else None
        if download is not None:
            self._chunk(
                ev.ChunkArrived(
                    source=peer, number=number, blob=download.blob, index=download.index, checksum=checksum
                ),
                data,
            )

    def message_arrived(self, peer: PeerId, message: Message) -> None:
        if isinstance(message, Hello):
            raise RemoteProtocolError("a second hello")
        self.feed(ev.PeerSaid(peer=peer, message=message))
        if isinstance(message, Share | Have):
            self.content.heard(message.blob)

    @property
    def window_bytes(self) -> int:
        return self.machine.window_bytes

    def chunk_sent(self, peer: PeerId, number: int) -> None:
        self.feed(ev.ChunkSent(peer=peer, number=number))

    def add_link(self, link: PeerLink) -> None:
        self.links[link.peer_id] = link
        rack = place_of(link.hello.site, link.hello.rack)
        self.feed(ev.PeerConnected(peer=link.peer_id, rack=rack, host=telling(link.host)))

    def offended(self, peer: PeerId, offence: Offence, why: str) -> None:
        """Count what a peer's link found it doing."""
        self.feed(ev.PeerOffended(peer=peer, offence=offence, why=why))

    def remove_link(self, link: PeerLink) -> None:
        """Forget a link that ended; of no effect where another has taken its place."""
        self.control_bytes += link.control_bytes
        link.control_bytes = 0
        if self.links.get(link.peer_id) is link:
            del self.links[link.peer_id]
            for key in [key for key in self._held if key[0] == link.peer_id]:
                del self._held[key]
            self.feed(ev.PeerLost(peer=link.peer_id))

    # ---------------------------------------------------------- scheduler

    def scheduler_connected(self, address: str) -> None:
        log.info("scheduler connected", address=address)
        self.feed(ev.SchedulerConnected())
        self.on_scheduler(True)

    def scheduler_lost(self, address: str, why: str) -> None:
        log.warning("scheduler lost; the agents coordinate themselves until it is back", address=address, why=why)
        self.feed(ev.SchedulerLost())
        self.on_scheduler(False)

    def scheduler_said(self, message: Message) -> None:
        match message:
            case Neighbours():
                for address in message.peers:
                    self._learn(address, "scheduler")
            case Ask():
                self.on_ask(message.number)
            case Resolved():
                self.on_resolved(message)
            case _:
                self.feed(ev.SchedulerSaid(message=message))
                if isinstance(message, Checksums):
                    self.content.heard(message.blob)
