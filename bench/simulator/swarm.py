# SPDX-License-Identifier: Apache-2.0
"""Thousands of production pull machines and one production scheduler on virtual time.

Carries out what the machines say as exchange.py, puller.py and neighbours.py do, without sockets, disks or CPU time.
Deterministic for a plan. Messages are delivered as objects, not encoded; their sizes on the wire are added up.

What is simplified: every message takes the same time, whatever else is on its connection, so nothing overtakes; what
an agent computes takes no time; an agent that leaves closes its connections, and its neighbours know at once.
"""

from __future__ import annotations

import heapq
from collections import deque
from random import Random
from typing import TYPE_CHECKING, Any

from bench.simulator.links import Link, Transfer
from bench.simulator.plan import MBIT
from bench.simulator.sizes import frame_bytes
from p2pdist.core import events as ev
from p2pdist.core import wire
from p2pdist.core.chunkmap import ChunkMap
from p2pdist.core.peerbook import MAX_PEERS_PER_DEGREE, MESH_PER_DEGREE
from p2pdist.core.pull import PullMachine
from p2pdist.core.state import PullSettings
from p2pdist.core.types import Digest, PeerId
from p2pdist.core.verify import checksum_of
from scheduler.swarm import PUSH_S, SchedulerState

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.simulator.plan import Plan

READ_AT_ONCE = 3
"""Layers that a runtime reads at the same time: containerd's default."""
IDLE_TICK_S = 0.6
"""Between two ticks of an agent that has nothing to do: exchange.py waits 0.5 s and then ticks."""
DIAL_TRIPS = 4
"""One-way trips until a dialled peer is connected: TCP's handshake, then the hellos."""
MEET_S = 3.0
"""Without a scheduler agents run so long before the first start: they know each other and have settled."""
ORIGIN_SPREAD = 0.5
"""The registry's first byte takes so much less or more than it does in the mean."""
LOOK_EVERY = 4096
"""Events between two calls of `watch`."""


class Node:
    """One agent: its machine, its link, and what its shell owns. Those that have left are kept for the figures."""

    def __init__(self, peer: PeerId, machine: PullMachine, up_rate: float, down_rate: float, rack: int | None) -> None:
        self.peer = peer
        self.machine = machine
        self.up_rate, self.down_rate = up_rate, down_rate
        self.up, self.down = Link(up_rate), Link(down_rate)
        self.rack = rack
        self.alive = True
        self.failed = False
        self.started_s = 0.0
        self.tick_due_s = 0.0
        """When its timers are looked at next; what was planned before that is void."""
        self.pioneer = False
        """Whether it was there at the start."""
        self.finished_s: float | None = None
        self.links: dict[PeerId, Node] = {}
        self.sending: dict[PeerId, deque[Upload]] = {}
        """Chunks by receiver: the first is under way, the others wait behind it on the same connection."""
        self.fetches: set[Transfer] = set()
        self.queue: deque[ev.Event] = deque()
        self.written: Digest | None = None
        """A layer of which something was written that its reader has not seen."""
        self.unread: deque[Digest] = deque()
        """Layers that the runtime has not asked for yet."""
        self.heads: dict[Digest, int] = {}
        """Where the runtime reads in the layers that it has asked for."""
        self.unverified = 0
        """Layers whose digest is not known to be right yet."""


class Upload:
    """A chunk that one node sends to another."""

    __slots__ = ("job", "receiver", "sender", "sent", "size", "transfer")

    def __init__(self, job: ev.SendChunk, size: int, sender: Node, receiver: Node) -> None:
        self.job = job
        self.size = size
        self.sender = sender
        self.receiver = receiver
        self.transfer: Transfer | None = None
        self.sent = False
        """Whether the sender knows that its slot is free."""


class Swarm:
    """The world of one plan. `run` it once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.now = 0.0
        self.events = self.transfers = 0
        self.origin_bytes = self.wasted_bytes = self.control_bytes = 0.0
        self.scheduler_in = self.scheduler_out = 0
        self.rng = Random(plan.seed)
        self.nodes: dict[PeerId, Node] = {}
        self.alive: list[Node] = []
        """All nodes that are there, in no order."""
        self.unfinished = 0
        self._pioneers = 0
        """Of those that were there at the start, the ones that are neither done nor gone."""
        self._calendar: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._entries = 0
        self._mail: deque[tuple[float, Node, ev.Event]] = deque()
        """Events that take one trip: what is posted later is due later, so a queue will do."""
        self._latency_s = plan.latency_s
        cut = ChunkMap.of(plan.layer_bytes)
        self.cut = cut
        self.layers = [Digest(f"sha256:{number:064x}") for number in range(plan.layers)]
        self._checksums = {
            layer: [checksum_of(f"{layer}/{index}".encode()) for index in range(cut.count)] for layer in self.layers
        }
        self._origin = Link(plan.origin_rate)
        rate = plan.rack_rate
        self._rack_up = [Link(rate) for _ in range(plan.racks)] if rate else []
        self._rack_down = [Link(rate) for _ in range(plan.racks)] if rate else []
        self._scheduler = SchedulerState(Random(self.rng.random()), degree=plan.degree, started=-60.0)
        self._do: dict[type, Callable[[Node, Any], None]] = {
            ev.Send: self._say,
            ev.TakeChunk: self._take,
            ev.SendChunk: self._send_chunk,
            ev.WriteChunk: self._write,
            ev.CancelSend: self._cancel_send,
            ev.FetchOrigin: self._fetch,
            ev.CheckBlob: self._check,
            ev.Tell: self._tell,
            ev.DropPeer: self._drop_peer,
            ev.Fail: self._fail,
            ev.LookUp: lambda _node, _command: None,
        }
        slow = set(self.rng.sample(range(plan.nodes), round(plan.nodes * plan.slow_ratio)))
        before_s = 0.0 if plan.scheduler else MEET_S
        for start in plan.arrivals.batches(plan.nodes, Random(plan.seed))[0]:
            self._join(before_s + start.offset_s, slow=start.node in slow)
        self._pioneers = plan.nodes
        if plan.scheduler:
            self._at(PUSH_S, self._tick_scheduler, None)
        else:
            for node in self.alive:
                self._find_peers(node)
        if plan.leave_per_minute:
            self._at(self._until_next_leaves(), self._somebody_leaves, None)

    # ------------------------------------------------------------------ time

    def run(self, watch: Callable[[Swarm], None] | None = None) -> None:
        """Run until every node that is there is done, or the plan's limit is over.

        Args:
            watch: called every few thousand events.
        """
        mail, calendar, feed = self._mail, self._calendar, self._feed
        while self.unfinished and self.now < self.plan.limit_s:
            if mail and mail[0][0] <= calendar[0][0]:
                self.now, node, event = mail.popleft()
                if node.alive:
                    feed(node, event)
            else:
                self.now, _, action, argument = heapq.heappop(calendar)
                action(argument)
            self.events += 1
            if watch is not None and not self.events % LOOK_EVERY:
                watch(self)

    @property
    def chunks_done(self) -> float:
        """The part of all chunks that those that are there have, 0 to 1."""
        if not self.alive:
            return 1.0
        total = len(self.alive) * self.cut.count * len(self.layers)
        return sum(p.have.bit_count() for node in self.alive for p in node.machine.blobs.values()) / total

    def _at(self, due: float, action: Callable[[Any], None], argument: Any) -> None:  # noqa: ANN401
        self._entries += 1
        heapq.heappush(self._calendar, (due, self._entries, action, argument))

    def _feed(self, node: Node, event: ev.Event) -> None:
        """Let a machine deal with an event, and carry out what it says; that may queue more, but feeds nothing."""
        queue, do, handle, now = node.queue, self._do, node.machine.handle, self.now
        for command in handle(event, now):
            do[type(command)](node, command)
        while queue:
            for command in handle(queue.popleft(), now):
                do[type(command)](node, command)
        if node.written is not None:
            layer, node.written = node.written, None
            self._read_on(node, layer)

    def _post(self, node: Node, event: ev.Event) -> None:
        self._mail.append((self.now + self._latency_s, node, event))

    def _tick(self, node: Node) -> None:
        if node.alive and self.now >= node.tick_due_s:
            self._feed(node, ev.Ticked())
            pause_s = self.plan.tick_s if node.machine.busy else IDLE_TICK_S
            self._tick_at(node, self.now + pause_s * self.rng.uniform(0.9, 1.1))

    def _tick_at(self, node: Node, due_s: float) -> None:
        node.tick_due_s = due_s
        self._at(due_s, self._tick, node)

    # ----------------------------------------------------------------- nodes

    def _join(self, started_s: float, *, slow: bool) -> None:
        """Let an agent come up that will be asked for the image at `started_s`."""
        plan, number = self.plan, len(self.nodes)
        full_rate = plan.link_mbit * MBIT
        up_rate = full_rate * (plan.slow_factor if slow else 1.0)
        peer = PeerId(f"{self.rng.getrandbits(128):032x}")
        rack = self._rack_of(number)
        settings = PullSettings(rack="" if rack is None else f"rack-{rack}")
        machine = PullMachine(peer, Random(self.rng.random()), settings)
        node = Node(peer, machine, up_rate, full_rate if plan.slow_uplinks else up_rate, rack)
        node.started_s = started_s
        node.pioneer = number < plan.nodes
        self.nodes[peer] = node
        self.alive.append(node)
        self.unfinished += 1
        if plan.scheduler:
            self._scheduler.connected(wire.PeerAddress(peer, "192.0.2.1", 5051, "", settings.rack))
            self._feed(node, ev.SchedulerConnected())
        elif self._pioneers:
            self._find_peers(node)
        self._at(started_s + plan.resolve_s, self._start, node)
        self._tick_at(node, started_s + self.rng.uniform(0, IDLE_TICK_S))

    def _rack_of(self, number: int) -> int | None:
        return number % self.plan.racks if self.plan.racks else None

    def _start(self, node: Node) -> None:
        """The runtime has the manifest: the agent begins on all layers, the runtime asks for the first ones."""
        if not node.alive:
            return
        node.unread.extend(self.layers)
        node.unverified = len(self.layers)
        for layer in self.layers:
            self._feed(
                node, ev.PullStarted(blob=layer, size_bytes=self.plan.layer_bytes, registry="", have={}, shared=True)
            )
        while node.unread and len(node.heads) < READ_AT_ONCE:
            self._read_next(node)
        # Whoever idles ticks again a moment after something happened (exchange.py).
        self._tick_at(node, self.now + self.plan.tick_s)

    def _read_next(self, node: Node) -> None:
        layer = node.unread.popleft()
        node.heads[layer] = 0
        self._feed(node, ev.HeadMoved(blob=layer, reader=0, index=0))
        self._read_on(node, layer)

    def _read_on(self, node: Node, layer: Digest) -> None:
        """Let the runtime read what is there."""
        head = node.heads.get(layer)
        if head is None:
            return
        offered, last = node.machine.blobs[layer].offered, self.cut.count - 1
        run = ~(offered >> head)
        reached = min(head + (run & -run).bit_length() - 1, last)
        if reached != head:
            node.heads[layer] = reached
            self._feed(node, ev.HeadMoved(blob=layer, reader=0, index=reached))

    def _verified(self, argument: tuple[Node, Digest]) -> None:
        node, layer = argument
        if not node.alive:
            return
        self._feed(node, ev.BlobVerified(blob=layer))
        node.heads.pop(layer, None)
        if layer in node.unread:
            node.unread.remove(layer)
        if node.unread and len(node.heads) < READ_AT_ONCE:
            self._read_next(node)
        node.unverified -= 1
        if not node.unverified:
            self._finish(node)

    def _finish(self, node: Node) -> None:
        if node.finished_s is None and not node.failed:
            node.finished_s = self.now
            self._count_out(node)

    def _count_out(self, node: Node) -> None:
        self.unfinished -= 1
        self._pioneers -= node.pioneer

    def _until_next_leaves(self) -> float:
        return self.now + self.rng.expovariate(len(self.alive) * self.plan.leave_per_minute / 60)

    def _somebody_leaves(self, _: None) -> None:
        node = self.rng.choice(self.alive)
        self.alive.remove(node)
        node.alive = False
        if node.finished_s is None and not node.failed:
            self._count_out(node)
        for other in list(node.links.values()):
            self._disconnect(node, other)
        for fetch in node.fetches:
            self.wasted_bytes += self.cut.chunk_bytes - fetch.call_off(self.now)
        self._at(self.now + self._latency_s, self._scheduler_loses, node.peer)
        if self.plan.replaced and self._pioneers > 0:
            self._join(self.now, slow=node.up_rate < self.plan.link_mbit * MBIT)
        if self.alive:
            self._at(self._until_next_leaves(), self._somebody_leaves, None)

    # ----------------------------------------------------------------- links

    def _find_peers(self, node: Node) -> None:
        """Dial some of those that are there, as an agent does that knows of others by mDNS."""
        others = [other for other in self.alive if other is not node]
        for other in self.rng.sample(others, min(MESH_PER_DEGREE * self.plan.degree, len(others))):
            self._at(self.now + DIAL_TRIPS * self._latency_s, self._connect, (node, other.peer))

    def _connect(self, argument: tuple[Node, PeerId]) -> None:
        node, other = argument[0], self.nodes[argument[1]]
        most = MAX_PEERS_PER_DEGREE * self.plan.degree
        if not (node.alive and other.alive) or other.peer in node.links or other is node:
            return
        if len(node.links) < most and len(other.links) < most:
            node.links[other.peer], other.links[node.peer] = other, node
            self._feed(node, ev.PeerConnected(peer=other.peer, rack=other.machine.state.settings.rack))
            self._feed(other, ev.PeerConnected(peer=node.peer, rack=node.machine.state.settings.rack))

    def _disconnect(self, node: Node, other: Node) -> None:
        for one, two in ((node, other), (other, node)):
            if one.links.pop(two.peer, None) is None:
                continue
            for upload in one.sending.pop(two.peer, ()):
                self._call_off(upload)
            if one.alive:
                self._post(one, ev.PeerLost(peer=two.peer))

    def _drop_peer(self, node: Node, command: ev.DropPeer) -> None:
        other = self.nodes[command.peer]
        self._disconnect(node, other)
        self._at(self.now + command.ban_s + 1, self._connect, (node, other.peer))

    def _say(self, node: Node, command: ev.Send) -> None:
        message = command.message
        self.control_bytes += frame_bytes(message)
        other = node.links.get(command.peer)
        if other is not None:
            self._mail.append((self.now + self._latency_s, other, ev.PeerSaid(peer=node.peer, message=message)))

    # ------------------------------------------------------------- transfers

    def _take(self, node: Node, command: ev.TakeChunk) -> None:
        self._say(node, ev.Send(peer=command.peer, message=wire.Take(command.number, command.blob, command.index)))

    def _send_chunk(self, node: Node, job: ev.SendChunk) -> None:
        receiver = node.links.get(job.peer)
        if receiver is None:
            return
        waiting = node.sending.setdefault(job.peer, deque())
        waiting.append(Upload(job, self.cut.length(job.index), node, receiver))
        if len(waiting) == 1:
            self._begin(waiting[0])

    def _begin(self, upload: Upload) -> None:
        sender, receiver = upload.sender, upload.receiver
        links: tuple[Link, ...] = (sender.up, receiver.down)
        if self._rack_up and sender.rack != receiver.rack:
            assert sender.rack is not None
            assert receiver.rack is not None
            links = (sender.up, self._rack_up[sender.rack], self._rack_down[receiver.rack], receiver.down)
        upload.transfer = transfer = Transfer(links, upload.size, self.now)
        self._at(transfer.when(self.plan.unsent_bytes, self.now), self._look_at_upload, upload)

    def _look_at_upload(self, upload: Upload) -> None:
        """The upload may have come to its slot's end, or its own; or others have slowed it down meanwhile."""
        transfer, sender, job = upload.transfer, upload.sender, upload.job
        assert transfer is not None
        if transfer.dead:
            return
        now = self.now
        due = transfer.when(0 if upload.sent else self.plan.unsent_bytes, now)
        if due > now:
            self._at(due, self._look_at_upload, upload)
        elif not upload.sent:
            upload.sent = True
            self._at(transfer.when(0, now), self._look_at_upload, upload)
            self._feed(sender, ev.ChunkSent(peer=job.peer, number=job.number))
        else:
            transfer.dead = True
            self.transfers += 1
            self._post(upload.receiver, self._arrival(sender.peer, job.number, job.blob, job.index))
            self._next_upload(sender, job.peer)

    def _next_upload(self, sender: Node, peer: PeerId) -> None:
        waiting = sender.sending[peer]
        waiting.popleft()
        if waiting:
            self._begin(waiting[0])

    def _arrival(self, source: PeerId | None, number: int, blob: Digest, index: int) -> ev.ChunkArrived:
        checksum = self._checksums[blob][index]
        return ev.ChunkArrived(source=source, number=number, blob=blob, index=index, checksum=checksum)

    def _cancel_send(self, node: Node, command: ev.CancelSend) -> None:
        waiting = node.sending.get(command.peer) or deque()
        for upload in waiting:
            if upload.job.number != command.number or upload.sent:
                continue
            self._call_off(upload)
            self._say(node, ev.Send(peer=command.peer, message=wire.Refuse(command.number)))
            node.queue.append(ev.ChunkSent(peer=command.peer, number=command.number))
            if upload is waiting[0]:
                self._next_upload(node, command.peer)
            else:
                waiting.remove(upload)
            return

    def _call_off(self, upload: Upload) -> None:
        if upload.transfer is not None and not upload.transfer.dead:
            self.wasted_bytes += upload.size - upload.transfer.call_off(self.now)

    def _write(self, node: Node, command: ev.WriteChunk) -> None:
        node.queue.append(ev.ChunkWritten(blob=command.blob, index=command.index))
        node.written = command.blob

    def _check(self, node: Node, command: ev.CheckBlob) -> None:
        self._at(self.now + self.plan.check_s, self._verified, (node, command.blob))

    def _fail(self, node: Node, _: ev.Fail) -> None:
        if not node.failed and node.finished_s is None:
            node.failed = True
            self._count_out(node)

    # ---------------------------------------------------------------- origin

    def _fetch(self, node: Node, command: ev.FetchOrigin) -> None:
        # No registry takes the same time twice. Were it so, fetches that begin together would end together, on and on,
        # and leave its link idle until the next ones have been leased.
        answer_s = self.plan.origin_s * self.rng.uniform(1 - ORIGIN_SPREAD, 1 + ORIGIN_SPREAD)
        self._at(self.now + 2 * self._latency_s + answer_s, self._begin_fetch, (node, command))

    def _begin_fetch(self, argument: tuple[Node, ev.FetchOrigin]) -> None:
        node, command = argument
        if not node.alive:
            return
        links: list[Link] = [self._origin, node.down]
        if self.plan.origin_per_connection_mbit:
            links.append(Link(self.plan.origin_per_connection_mbit * MBIT))
        if self._rack_down:
            assert node.rack is not None
            links.append(self._rack_down[node.rack])
        transfer = Transfer(tuple(links), self.cut.length(command.index), self.now)
        node.fetches.add(transfer)
        self._at(transfer.when(0, self.now), self._look_at_fetch, (node, command, transfer))

    def _look_at_fetch(self, argument: tuple[Node, ev.FetchOrigin, Transfer]) -> None:
        node, command, transfer = argument
        if transfer.dead:
            return
        due = transfer.when(0, self.now)
        if due > self.now:
            self._at(due, self._look_at_fetch, argument)
            return
        transfer.dead = True
        node.fetches.discard(transfer)
        self.transfers += 1
        self.origin_bytes += self.cut.length(command.index)
        self._feed(node, self._arrival(None, 0, command.blob, command.index))

    # ------------------------------------------------------------- scheduler

    def _tell(self, node: Node, command: ev.Tell) -> None:
        self.control_bytes += frame_bytes(command.message)
        self._at(self.now + self._latency_s, self._scheduler_hears, (node, command.message))

    def _scheduler_hears(self, argument: tuple[Node, wire.Message]) -> None:
        node, message = argument
        self.scheduler_in += 1
        if node.peer in self._scheduler.members:
            self._deliver(self._scheduler.said(node.peer, message, self.now))

    def _scheduler_loses(self, peer: PeerId) -> None:
        self._deliver(self._scheduler.gone(peer, self.now))

    def _tick_scheduler(self, _: None) -> None:
        self._deliver(self._scheduler.tick(self.now))
        self._at(self.now + PUSH_S, self._tick_scheduler, None)

    def _deliver(self, out: list[tuple[PeerId, wire.Message]]) -> None:
        self.scheduler_out += len(out)
        for peer, message in out:
            node = self.nodes[peer]
            if isinstance(message, wire.Neighbours):
                for address in message.peers:
                    self._at(self.now + (1 + DIAL_TRIPS) * self._latency_s, self._connect, (node, address.peer_id))
            else:
                self._post(node, ev.SchedulerSaid(message=message))
