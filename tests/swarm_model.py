# SPDX-License-Identifier: Apache-2.0
"""Many pull machines and a scheduler in one process on virtual time: the swarm without sockets, disks and clocks.

`World` carries out what the machines say, as exchange.py and puller.py do, with latencies, transfer times, an
origin that serves some requests at a time, and faults, all drawn from one seeded rng. While it runs it checks
what must hold at each step: a chunk is written once, nothing is taken from a banned peer, nothing is sent that
is not in the store, no chunk is leased twice at a time. `settle` runs it until every pull has ended.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from p2pdist.core import events as ev
from p2pdist.core import wire
from p2pdist.core.chunkmap import ChunkMap
from p2pdist.core.pull import TICK_S, PullMachine
from p2pdist.core.state import PullSettings
from p2pdist.core.types import Checksum, Digest, PeerId
from p2pdist.core.verify import checksum_of
from p2pdist.errors import OriginError
from scheduler.swarm import LEASE_S, PUSH_S, SchedulerState

if TYPE_CHECKING:
    from collections.abc import Callable

REGISTRY = "registry.test"


@dataclass(frozen=True)
class Blob:
    """A blob of the world. `sized` False: a manifest, of which the machines know only the digest at first."""

    digest: Digest
    size_bytes: int
    sized: bool = True

    @property
    def cut(self) -> ChunkMap:
        return ChunkMap.of(self.size_bytes)

    def checksum(self, index: int) -> Checksum:
        return checksum_of(f"{self.digest}/{index}".encode())


def blob(number: int, size_bytes: int, *, sized: bool = True) -> Blob:
    return Blob(Digest(f"sha256:{number:064x}"), size_bytes, sized)


@dataclass
class Faults:
    """Probabilities, each per event."""

    fetch_fails: float = 0.0
    chunk_lost: float = 0.0
    chunk_late: float = 0.0
    chunk_corrupt: float = 0.0


@dataclass
class Node:
    """One agent: its machine, and what its shell would own. `life` tells a restarted agent from the one before."""

    peer: PeerId
    machine: PullMachine
    rack: str = ""
    life: int = 0
    alive: bool = True
    scheduled: bool = False
    store: dict[Digest, dict[int, Checksum]] = field(default_factory=dict)
    whole: set[Digest] = field(default_factory=set)
    failed: dict[Digest, list[Exception]] = field(default_factory=dict)
    banned: dict[PeerId, float] = field(default_factory=dict)
    taken: dict[tuple[PeerId, int], tuple[Digest, int]] = field(default_factory=dict)
    sending: set[tuple[PeerId, int]] = field(default_factory=set)
    queue: deque[ev.Event] = field(default_factory=deque)
    draining: bool = False


class World:
    """All of it. Times are virtual seconds."""

    def __init__(
        self, seed: int, nodes: int, blobs: list[Blob], *, faults: Faults | None = None, racks: int = 0
    ) -> None:
        self.rng = Random(seed)
        self.now = 0.0
        self.blobs = {entry.digest: entry for entry in blobs}
        self.faults = faults or Faults()
        self.origin_parallel = 6
        self.egress: Counter[tuple[Digest, int]] = Counter()
        self.imports: Counter[str] = Counter()
        """Chunks that came into each rack from another."""
        self.scheduler: SchedulerState | None = None
        self._calendar: list[tuple[float, int, Callable[[], None]]] = []
        self._entries = 0
        self._links: dict[frozenset[PeerId], int] = {}
        self._last: dict[tuple[str, str], float] = {}
        self._origin_busy = 0
        self._origin_queue: deque[Callable[[], None]] = deque()
        self._leases: dict[tuple[Digest, int], tuple[PeerId, float]] = {}
        self.nodes: dict[PeerId, Node] = {}
        for number in range(nodes):
            peer = PeerId(f"{number + 1:032x}")
            rack = f"/r{number % racks}" if racks else ""
            self.nodes[peer] = Node(peer, self._machine(peer, rack), rack)
            self._tick(self.nodes[peer], 0)

    def _machine(self, peer: PeerId, rack: str) -> PullMachine:
        return PullMachine(peer, Random(self.rng.random()), PullSettings(rack=rack))

    # ------------------------------------------------------------------ time

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self._entries += 1
        heapq.heappush(self._calendar, (self.now + delay_s, self._entries, action))

    def run(self, until: float) -> None:
        while self._calendar and self._calendar[0][0] <= until:
            self.now, _, action = heapq.heappop(self._calendar)
            action()
        self.now = until

    def settle(self, limit_s: float) -> None:
        """Run until no machine has a pull, then until nothing can be under way any more."""
        while any(node.machine.state.wanted() for node in self.nodes.values() if node.alive):
            assert self.now < limit_s, f"pulls still going on after {limit_s} s"
            self.run(self.now + 1)
        self.run(self.now + 20)

    def _tick(self, node: Node, life: int) -> None:
        if node.alive and node.life == life:
            self.feed(node, ev.Ticked())
            self.after(TICK_S * self.rng.uniform(0.9, 1.1), lambda: self._tick(node, life))

    def _send(self, source: str, target: str, action: Callable[[], None], delay_s: float = 0.0) -> None:
        """Deliver in order, a short while later."""
        due = max(self._last.get((source, target), 0.0), self.now + delay_s + self.rng.uniform(0.001, 0.02))
        self._last[source, target] = due
        self.after(due - self.now, action)

    # ----------------------------------------------------------------- agents

    def pull(self, node: Node, entry: Blob, *, shared: bool = True) -> None:
        """Want a blob that is not in the store yet."""
        if not node.alive or entry.digest in node.whole:
            return
        size = entry.size_bytes if entry.sized else None
        here = node.store.setdefault(entry.digest, {})
        have = dict(here) if entry.sized else {}
        self.feed(node, ev.PullStarted(blob=entry.digest, size_bytes=size, registry=REGISTRY, have=have, shared=shared))

    def connect(self, a: PeerId, b: PeerId) -> None:
        left, right = self.nodes[a], self.nodes[b]
        key = frozenset((a, b))
        banned = left.banned.get(b, 0.0) > self.now or right.banned.get(a, 0.0) > self.now
        if a != b and key not in self._links and left.alive and right.alive and not banned:
            self._links[key] = self._entries = self._entries + 1
            self.feed(left, ev.PeerConnected(peer=b, rack=right.rack))
            self.feed(right, ev.PeerConnected(peer=a, rack=left.rack))

    def mesh(self, within_s: float = 0.4) -> None:
        peers = list(self.nodes)
        for at, a in enumerate(peers):
            for b in peers[at + 1 :]:
                self.after(self.rng.uniform(0, within_s), lambda a=a, b=b: self.connect(a, b))  # type: ignore[misc]

    def disconnect(self, a: PeerId, b: PeerId) -> None:
        if self._links.pop(frozenset((a, b)), None) is not None:
            for node, other in ((self.nodes[a], b), (self.nodes[b], a)):
                if node.alive:
                    self.feed(node, ev.PeerLost(peer=other))

    def kill(self, node: Node) -> None:
        node.alive = False
        self._part(node)
        for key in [key for key in self._links if node.peer in key]:
            (other,) = key - {node.peer}
            self.disconnect(node.peer, other)

    def hang(self, node: Node) -> None:
        """Let an agent do and say nothing any more while its connections stay."""
        node.alive = False

    def restart(self, node: Node) -> None:
        """Start a killed agent anew with what its disk holds; it knows nobody and pulls nothing yet."""
        node.machine = self._machine(node.peer, node.rack)
        node.life, node.alive = node.life + 1, True
        node.taken.clear()
        node.sending.clear()
        self._tick(node, node.life)

    def feed(self, node: Node, event: ev.Event) -> None:
        if not node.alive:
            return
        node.queue.append(event)
        if node.draining:
            return
        node.draining = True
        while node.queue:
            for command in node.machine.handle(node.queue.popleft(), self.now):
                self._carry_out(node, command)
        node.draining = False

    def _later(self, node: Node, delay_s: float, event: ev.Event) -> None:
        life = node.life
        self.after(delay_s, lambda: self.feed(node, event) if node.alive and node.life == life else None)

    def _carry_out(self, node: Node, command: ev.Command) -> None:
        match command:
            case ev.Send():
                self._say(node, command.peer, command.message)
            case ev.TakeChunk():
                assert node.banned.get(command.peer, 0.0) <= self.now, "taken from a banned peer"
                node.taken[command.peer, command.number] = command.blob, command.index
                self._say(node, command.peer, wire.Take(command.number, command.blob, command.index))
            case ev.SendChunk():
                self._send_chunk(node, command)
            case ev.CancelSend():
                if (command.peer, command.number) in node.sending:
                    node.sending.discard((command.peer, command.number))
                    self._say(node, command.peer, wire.Refuse(command.number))
                    node.queue.append(ev.ChunkSent(peer=command.peer, number=command.number))
            case ev.FetchOrigin():
                self._fetch(node, command.blob, command.index, command.count)
            case ev.WriteChunk():
                self._write(node, command)
            case ev.CheckBlob():
                self._later(node, 0.01, self._verdict(node, command.blob))
            case ev.ForgetChunks():
                for index in command.indices:
                    del node.store[command.blob][index]
            case ev.LookUp():
                if command.blob in node.whole:
                    node.queue.append(self._stored(command.blob))
            case ev.DropPeer():
                node.banned[command.peer] = self.now + command.ban_s
                self.after(0, lambda: self.disconnect(node.peer, command.peer))
            case ev.Tell():
                assert node.scheduled, "told to a scheduler that is not there"
                self._send(node.peer, "scheduler", lambda: self._scheduler_hears(node, command.message))
            case ev.Fail():
                node.failed[command.blob] = command.causes

    def _say(self, node: Node, peer: PeerId, message: wire.Message) -> None:
        link = self._links.get(frozenset((node.peer, peer)))
        message = wire.decode_message(wire.encode(message)[5:])

        def deliver() -> None:
            if link is not None and self._links.get(frozenset((node.peer, peer))) == link:
                self.feed(self.nodes[peer], ev.PeerSaid(peer=node.peer, message=message))

        self._send(node.peer, peer, deliver)

    def _send_chunk(self, node: Node, job: ev.SendChunk) -> None:
        key = frozenset((node.peer, job.peer))
        link, faults, target = self._links.get(key), self.faults, self.nodes[job.peer]
        checksum = node.store[job.blob][job.index]
        if self.rng.random() < faults.chunk_corrupt:
            checksum = checksum_of(b"noise")
        lost = self.rng.random() < faults.chunk_lost
        took_s = self.rng.uniform(0.02, 0.2) + (self.rng.uniform(5, 25) if self.rng.random() < faults.chunk_late else 0)
        node.sending.add((job.peer, job.number))
        self.imports[target.rack] += target.rack != node.rack

        def sent() -> None:
            if self._links.get(key) != link or (job.peer, job.number) not in node.sending:
                return
            node.sending.discard((job.peer, job.number))
            self.feed(node, ev.ChunkSent(peer=job.peer, number=job.number))
            if not lost:
                self._send(node.peer, job.peer, arrived)

        def arrived() -> None:
            wanted = target.machine.book.peers.get(node.peer)
            if self._links.get(key) == link and wanted is not None and job.number in wanted.downloads:
                assert target.taken[node.peer, job.number] == (job.blob, job.index)
                self.feed(
                    target,
                    ev.ChunkArrived(
                        source=node.peer, number=job.number, blob=job.blob, index=job.index, checksum=checksum
                    ),
                )

        self.after(took_s, sent)

    def _write(self, node: Node, command: ev.WriteChunk) -> None:
        here = node.store[command.blob]
        assert command.index not in here, "written twice"
        if not self.blobs[command.blob].sized and command.checksum != self.blobs[command.blob].checksum(0):
            node.queue.append(ev.BlobRejected(blob=command.blob, indices=[0]))
            return
        here[command.index] = command.checksum
        node.queue.append(ev.ChunkWritten(blob=command.blob, index=command.index))

    def _verdict(self, node: Node, digest: Digest) -> ev.Event:
        entry, here = self.blobs[digest], node.store[digest]
        wrong = [index for index in range(entry.cut.count) if here[index] != entry.checksum(index)]
        for index in wrong:
            del here[index]
        if not wrong:
            node.whole.add(digest)
        return ev.BlobRejected(blob=digest, indices=wrong) if wrong else ev.BlobVerified(blob=digest)

    def _stored(self, digest: Digest) -> ev.BlobStored:
        entry = self.blobs[digest]
        checksums = tuple(entry.checksum(index) for index in range(entry.cut.count))
        return ev.BlobStored(blob=digest, size_bytes=entry.size_bytes, media_type="", checksums=checksums)

    # ----------------------------------------------------------------- origin

    def _fetch(self, node: Node, digest: Digest, index: int, count: int) -> None:
        life = node.life

        def done() -> None:
            if node.life != life or not node.alive:
                end()
                return
            entry = self.blobs[digest]
            if self.rng.random() < self.faults.fetch_fails:
                end()
                error = OriginError("503")
                self.feed(
                    node,
                    ev.FetchFailed(blob=digest, index=index, count=count, error=error, final=False, pause_s=0.0),
                )
                return
            self.egress[digest, index] += 1
            if not entry.sized:
                end()
                node.store[digest][0] = entry.checksum(0)
                node.whole.add(digest)
                self.feed(node, self._stored(digest))
                return
            if count == 1:
                end()
            else:
                self._origin_busy -= 1
                self._fetch(node, digest, index + 1, count - 1)
            event = ev.ChunkArrived(
                source=None, number=0, blob=digest, index=index, checksum=entry.checksum(index), taken_s=taken_s
            )
            self.feed(node, event)

        def end() -> None:
            self._origin_busy -= 1
            if self._origin_queue:
                self._origin_queue.popleft()()

        # Some chunks come so fast that runs of several follow.
        taken_s = self.rng.choice((0.0, self.rng.uniform(0.02, 0.1)))

        def begin() -> None:
            self._origin_busy += 1
            self.after(self.rng.uniform(0.02, 0.1), done)

        if self._origin_busy < self.origin_parallel:
            begin()
        else:
            self._origin_queue.append(begin)

    # -------------------------------------------------------------- scheduler

    def start_scheduler(self) -> None:
        self.scheduler = SchedulerState(Random(self.rng.random()), started=self.now)
        self._leases.clear()
        self._tick_scheduler(self.scheduler)
        for node in self.nodes.values():
            self.after(self.rng.uniform(0.01, 0.5), lambda node=node: self.enlist(node))  # type: ignore[misc]

    def stop_scheduler(self) -> None:
        self.scheduler = None
        for node in self.nodes.values():
            if node.scheduled:
                node.scheduled = False
                self.feed(node, ev.SchedulerLost())

    def enlist(self, node: Node) -> None:
        if self.scheduler is not None and node.alive and not node.scheduled:
            self.scheduler.connected(wire.PeerAddress(node.peer, "host", 5051, "", node.rack))
            node.scheduled = True
            self.feed(node, ev.SchedulerConnected())
            self._scheduler_hears(node, wire.Stored(list(node.whole)))

    def _part(self, node: Node) -> None:
        if node.scheduled and self.scheduler is not None:
            node.scheduled = False
            self._end_leases(lambda _key, holder: holder == node.peer)
            self._deliver(self.scheduler.gone(node.peer, self.now))

    def _tick_scheduler(self, scheduler: SchedulerState) -> None:
        if self.scheduler is scheduler:
            self._end_leases(lambda key, _holder: self._leases[key][1] <= self.now)
            self._deliver(scheduler.tick(self.now))
            self.after(PUSH_S, lambda: self._tick_scheduler(scheduler))

    def _scheduler_hears(self, node: Node, message: wire.Message) -> None:
        if self.scheduler is None or not node.scheduled:
            return
        message = wire.decode_message(wire.encode(message)[5:])
        match message:
            case wire.Done() | wire.Failed():
                self._end_leases(lambda key, holder: key == (message.blob, message.index) and holder == node.peer)
            case wire.Leave():
                self._end_leases(lambda key, holder: key[0] == message.blob and holder == node.peer)
            case wire.Stored():
                self._end_leases(lambda key, holder: key[0] in message.blobs and holder == node.peer)
            case wire.Renew() if self._leases.get((message.blob, message.index), ("", 0.0))[0] == node.peer:
                self._leases[message.blob, message.index] = node.peer, self.now + LEASE_S
        self._deliver(self.scheduler.said(node.peer, message, self.now))

    def _end_leases(self, which: Callable[[tuple[Digest, int], PeerId], bool]) -> None:
        self._leases = {key: lease for key, lease in self._leases.items() if not which(key, lease[0])}

    def _deliver(self, out: list[tuple[PeerId, wire.Message]]) -> None:
        for peer, message in out:
            if isinstance(message, wire.Lease):
                assert (message.blob, message.index) not in self._leases, "leased twice at a time"
                self._leases[message.blob, message.index] = peer, self.now + LEASE_S
                assert self.scheduler is not None
                allowed = self.scheduler._registries[REGISTRY].pace.leases
                assert len(self._leases) <= allowed, "more leases out than allowed"
            self._send("scheduler", peer, lambda peer=peer, message=message: self._hears(peer, message))  # type: ignore[misc]

    def _hears(self, peer: PeerId, message: wire.Message) -> None:
        node = self.nodes[peer]
        if not node.scheduled:
            return
        if isinstance(message, wire.Neighbours):
            for address in message.peers:
                self.connect(peer, address.peer_id)
        else:
            self.feed(node, ev.SchedulerSaid(message=wire.decode_message(wire.encode(message)[5:])))

    # ----------------------------------------------------------------- checks

    def egress_ratio(self) -> float:
        """Return the chunks read from the origin per chunk of all blobs."""
        return self.egress.total() / sum(entry.cut.count for entry in self.blobs.values())

    def assert_all_have(self, *blobs: Blob) -> None:
        for node in self.nodes.values():
            if node.alive:
                assert not node.failed, (node.peer, node.failed)
                for entry in blobs:
                    right = {index: entry.checksum(index) for index in range(entry.cut.count)}
                    assert node.store[entry.digest] == right, (node.peer, entry)
                    assert entry.digest in node.whole

    def assert_nothing_left(self) -> None:
        """All slots are free and nobody waits for anything: no entry of a pull outlives it."""
        for node in self.nodes.values():
            if not node.alive:
                continue
            machine = node.machine
            assert not machine.busy
            leasing, taking = machine._leasing, machine._taking
            left = [leasing._fetching, leasing._due, leasing._ranked, taking._waiting]
            left += [peer.uploads for peer in machine.book.peers.values()]
            left += [peer.downloads for peer in machine.book.peers.values()]
            left += [progress.asked for progress in machine.blobs.values()]
            left += [progress.late for progress in machine.blobs.values()]
            assert not any(left), (node.peer, left)
            assert taking._downloads == 0
            assert not any(progress.inflight for progress in machine.blobs.values())
