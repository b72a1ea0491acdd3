# SPDX-License-Identifier: Apache-2.0
"""The shell around the pull machine: links that come and go, peers that lie or stall, a scheduler's words."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from p2pdist.core.chunkmap import MIN_CHUNK_BYTES, ChunkMap, to_bytes
from p2pdist.core.pull import TICK_S, PullMachine
from p2pdist.core.state import PullSettings
from p2pdist.core.types import Descriptor, Digest, PeerId
from p2pdist.core.verify import checksum_of
from p2pdist.core.wire import (
    VERSION,
    Ask,
    Cancel,
    ChunkSpan,
    Decline,
    Decoder,
    Grant,
    Hello,
    Lease,
    Message,
    Neighbours,
    PeerAddress,
    Refuse,
    Resolved,
    Share,
    Take,
    encode,
    span_header,
)
from p2pdist.errors import RemoteProtocolError, StoreError
from p2pdist.exchange import Exchange
from p2pdist.store.memory import MemoryStore
from tests.nodes import REPOSITORY, FakeOrigin, Node, eventually, running

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trio.testing import MockClock

    from p2pdist.core.events import Command, Event

CHUNK = MIN_CHUNK_BYTES
BLOB = random.Random(7).randbytes(6 * CHUNK + 5)
CUT = ChunkMap.of(len(BLOB))


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    store = MemoryStore(max_bytes=1 << 30)
    yield store
    store.close()


@pytest.fixture
def origin() -> FakeOrigin:
    return FakeOrigin()


@pytest.fixture
def node(origin: FakeOrigin, store: MemoryStore) -> Node:
    return Node(1, origin, store)


@dataclass
class HandPeer:
    """A peer that does what the test says, on a real connection. It tells what it has when it is asked for it.

    Attributes:
        content: what it says it has, and sends.
        claimed: what the checksums that it announces are of; the content, unless given.
        grants: how many chunks it offers at a time; it offers again what is declined.
        sends: whether it sends what is taken.
    """

    number: int
    digest: Digest
    content: bytes = b""
    claimed: bytes = b""
    grants: int = 0
    sends: bool = True
    said: list[Message] = field(default_factory=list)
    received: dict[int, bytearray] = field(default_factory=dict)
    gone: trio.Event = field(default_factory=trio.Event)
    granted: int = 0
    sending: trio.Lock = field(default_factory=trio.Lock)
    stream: trio.SocketStream = field(init=False)

    @property
    def peer_id(self) -> PeerId:
        return PeerId(f"{self.number:032x}")

    async def run(self, node: Node, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self.stream = await trio.open_tcp_stream("127.0.0.1", node.port)
        async with self.stream, trio.open_nursery() as nursery:
            await self.say(Hello(VERSION, "lab", self.peer_id, 1, "", "", ""))
            await eventually(lambda: self.number in node.peers)
            task_status.started()
            decoder = Decoder()
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                while data := await self.stream.receive_some(65536):
                    for item in decoder.feed(memoryview(data)):
                        await self._heard(item, nursery)
            nursery.cancel_scope.cancel()
        self.gone.set()

    async def say(self, *messages: Message) -> None:
        await self._send(b"".join(encode(message) for message in messages))

    async def _send(self, data: bytes) -> None:
        async with self.sending:
            with suppress(trio.BrokenResourceError):
                await self.stream.send_all(data)

    async def ask(self, digest: Digest) -> None:
        """Say that it wants a blob of which it has nothing."""
        await self.say(Share(digest, len(BLOB), bytes(1), b"", True, "", reply=False))

    def heard(self, kind: type[Message]) -> list[Message]:
        return [message for message in self.said if isinstance(message, kind)]

    async def _heard(self, item: Message | ChunkSpan, nursery: trio.Nursery) -> None:
        if isinstance(item, ChunkSpan):
            self.received.setdefault(item.number, bytearray()).extend(item.data)
            return
        self.said.append(item)
        match item:
            case Share(blob=self.digest, wants=True) if self.content:
                await self._share()
                for _ in range(self.grants):
                    await self._grant()
            case Decline():
                nursery.start_soon(self._grant, 0.1)
            case Take() if self.sends:
                chunk = self.content[CUT.start(item.index) : CUT.start(item.index) + CUT.length(item.index)]
                await self._send(span_header(item.number, len(chunk)) + chunk)
                await self._grant()

    async def _share(self) -> None:
        claimed = self.claimed or self.content
        spans = [claimed[CUT.start(index) : CUT.start(index) + CUT.length(index)] for index in range(CUT.count)]
        checksums = b"".join(checksum_of(span) for span in spans)
        await self.say(Share(self.digest, len(BLOB), to_bytes(CUT.full, CUT.count), checksums, False, "", reply=True))

    async def _grant(self, pause_s: float = 0) -> None:
        await trio.sleep(pause_s)
        self.granted += 1
        await self.say(Grant(self.granted))


def descriptor(digest: Digest) -> Descriptor:
    return Descriptor(digest, len(BLOB), "")


# --------------------------------------------------------------- taking chunks


async def test_with_the_origin_stuck_a_peer_serves_the_blob_whole(
    node: Node, origin: FakeOrigin, quick_clock: MockClock
) -> None:
    digest = origin.add_blob(BLOB)
    peer = HandPeer(2, digest, BLOB, grants=2)
    async with running(node), trio.open_nursery() as nursery:
        await nursery.start(peer.run, node)
        origin.chunk_s = 1000
        assert await node.read_blob(digest) == BLOB
        nursery.cancel_scope.cancel()
    assert node.machine.counters.from_peers == len(BLOB)
    assert origin.egress_bytes == 0


@pytest.mark.parametrize("lie", ["other bytes than announced", "other content altogether"])
async def test_a_peer_with_wrong_bytes_is_dropped_and_the_pull_ends_right(
    node: Node, origin: FakeOrigin, lie: str, quick_clock: MockClock
) -> None:
    digest = origin.add_blob(BLOB)
    origin.chunk_s = 1
    wrong = bytes(len(BLOB))
    peer = HandPeer(2, digest, wrong, BLOB if lie.startswith("other bytes") else wrong, grants=2)
    async with running(node), trio.open_nursery() as nursery:
        await nursery.start(peer.run, node)
        await node.puller.prefetch(REPOSITORY, [descriptor(digest)])
        await eventually(lambda: node.store.contains(digest))
        await peer.gone.wait()
        assert node.machine.book.is_banned(peer.peer_id, trio.current_time())
        assert node.machine.counters.corrupt_chunks > 0
        assert await node.read_blob(digest) == BLOB


@pytest.mark.parametrize("ending", ["stalls", "hangs up", "refuses"])
async def test_a_peer_that_does_not_deliver_costs_time_and_no_byte(
    node: Node, origin: FakeOrigin, ending: str, quick_clock: MockClock
) -> None:
    digest = origin.add_blob(BLOB)
    peer = HandPeer(2, digest, BLOB, grants=4, sends=False)
    async with running(node), trio.open_nursery() as nursery:
        await nursery.start(peer.run, node)
        await node.puller.prefetch(REPOSITORY, [descriptor(digest)])
        await eventually(lambda: len(peer.heard(Take)) == PullSettings().stranger_chunks)
        if ending == "hangs up":
            await peer.stream.aclose()
        if ending == "refuses":
            await peer.say(*[Refuse(take.number) for take in peer.heard(Take)])
        assert await node.read_blob(digest) == BLOB
        nursery.cancel_scope.cancel()
    assert node.machine.counters.from_peers == 0


async def test_what_a_chunk_that_came_meanwhile_was_also_asked_for_is_called_off(
    node: Node, origin: FakeOrigin, quick_clock: MockClock
) -> None:
    """A peer is slow; the chunk comes from elsewhere; the peer need not send it any more."""
    digest = origin.add_blob(BLOB)
    slow = HandPeer(2, digest, BLOB, grants=1, sends=False)
    quick = HandPeer(3, digest, BLOB, grants=2)
    origin.chunk_s = 1000
    async with running(node), trio.open_nursery() as nursery:
        await nursery.start(slow.run, node)
        await node.puller.prefetch(REPOSITORY, [descriptor(digest)])
        await eventually(lambda: bool(slow.heard(Take)))
        await nursery.start(quick.run, node)
        await eventually(lambda: node.store.contains(digest))
        await eventually(lambda: Cancel(1) in slow.said)
        nursery.cancel_scope.cancel()
    assert node.machine.counters.from_peers == len(BLOB)


# --------------------------------------------------------------- giving chunks


async def test_a_chunk_is_given_for_a_grant_and_once(node: Node, origin: FakeOrigin, quick_clock: MockClock) -> None:
    digest = origin.add_blob(BLOB)
    peer = HandPeer(2, digest)
    async with running(node), trio.open_nursery() as nursery:
        await node.read_blob(digest)
        await eventually(lambda: not node.puller.arrivals)
        await nursery.start(peer.run, node)
        await peer.ask(digest)
        await eventually(lambda: bool(peer.heard(Grant)))
        number = peer.heard(Grant)[0].number
        await peer.say(Take(number, digest, 3))
        await eventually(lambda: len(peer.received.get(number, b"")) == CHUNK)
        assert peer.received[number] == BLOB[3 * CHUNK : 4 * CHUNK]
        await peer.say(Take(number, digest, 4))
        await eventually(lambda: Refuse(number) in peer.said)
        assert node.machine.counters.to_peers == CHUNK
        nursery.cancel_scope.cancel()


async def test_what_is_not_there_is_refused(node: Node, origin: FakeOrigin, quick_clock: MockClock) -> None:
    digest = origin.add_blob(BLOB)
    peer = HandPeer(2, digest)
    async with running(node), trio.open_nursery() as nursery:
        await node.read_blob(digest)
        await eventually(lambda: not node.puller.arrivals)
        await nursery.start(peer.run, node)
        await peer.ask(digest)
        await eventually(lambda: len(peer.heard(Grant)) > 1)
        first, second = (grant.number for grant in peer.heard(Grant)[:2])
        await peer.say(Take(first, Digest("sha256:" + "0" * 64), 0))
        await eventually(lambda: Refuse(first) in peer.said)
        node.store.remove(digest)
        await peer.say(Take(second, digest, 0))
        await eventually(lambda: Refuse(second) in peer.said)
        assert digest not in node.machine.blobs
        nursery.cancel_scope.cancel()


async def test_a_chunk_that_the_disk_does_not_give_is_refused_and_the_link_lives(
    node: Node, origin: FakeOrigin, quick_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = origin.add_blob(BLOB)
    peer = HandPeer(2, digest)

    def fail(_digest: Digest) -> None:
        raise StoreError("the disk fails")

    async with running(node), trio.open_nursery() as nursery:
        await node.read_blob(digest)
        await eventually(lambda: not node.puller.arrivals)
        await nursery.start(peer.run, node)
        await peer.ask(digest)
        await eventually(lambda: bool(peer.heard(Grant)))
        monkeypatch.setattr(node.store, "open", fail)
        number = peer.heard(Grant)[0].number
        await peer.say(Take(number, digest, 0))
        await eventually(lambda: Refuse(number) in peer.said)
        assert node.peers == {2}
        assert digest in node.machine.blobs
        nursery.cancel_scope.cancel()


async def test_a_peer_that_asks_for_a_stored_blob_is_told_of_it_and_of_private_ones_nothing(
    node: Node, origin: FakeOrigin, store: MemoryStore, quick_clock: MockClock
) -> None:
    open_one, secret = origin.add_blob(BLOB), origin.add_blob(BLOB[::-1])
    for digest, public in ((open_one, True), (secret, False)):
        store.add(digest, origin.blobs[digest], media_type="", public=public)
    peer = HandPeer(2, open_one)
    async with running(node), trio.open_nursery() as nursery:
        await nursery.start(peer.run, node)
        for digest in (secret, open_one):
            await peer.ask(digest)
        await eventually(lambda: bool(peer.heard(Share)))
        await trio.sleep(2)
        assert {share.blob for share in peer.heard(Share)} == {open_one}
        nursery.cancel_scope.cancel()


# ------------------------------------------------------------------- the links


async def test_a_second_hello_and_a_message_for_the_scheduler_end_the_link(node: Node, quick_clock: MockClock) -> None:
    digest = Digest("sha256:" + "0" * 64)
    async with running(node), trio.open_nursery() as nursery:
        for number, message in ((2, Hello(VERSION, "lab", PeerId("2" * 32), 1, "", "", "")), (3, Lease(digest, 0, 1))):
            peer = HandPeer(number, digest)
            await nursery.start(peer.run, node)
            await peer.say(message)
            await peer.gone.wait()
        assert not node.peers


async def test_the_messages_of_a_link_that_has_gone_are_still_counted(
    node: Node, origin: FakeOrigin, quick_clock: MockClock
) -> None:
    digest = origin.add_blob(BLOB)
    peer = HandPeer(2, digest, BLOB, grants=2)
    async with running(node), trio.open_nursery() as nursery:
        await nursery.start(peer.run, node)
        await node.read_blob(digest)
        link = node.exchange.links[peer.peer_id]
        sent = link.control_bytes
        assert sent > 0
        await peer.stream.aclose()
        await eventually(lambda: not node.peers)
        assert node.exchange.control_bytes >= sent
        assert link.control_bytes == 0


# --------------------------------------------------------------- the scheduler


async def test_the_schedulers_words_go_where_they_belong(node: Node, quick_clock: MockClock) -> None:
    asked: list[int] = []
    resolved: list[Resolved] = []
    other = PeerAddress(PeerId("9" * 32), "127.0.0.1", 9)
    blob = Digest("sha256:" + "0" * 64)
    node.exchange.on_ask = asked.append
    node.exchange.on_resolved = resolved.append
    told: list[Message] = []

    class Tracker:
        def send(self, message: Message) -> None:
            told.append(message)

    node.exchange.tracker = Tracker()
    node.exchange.scheduler_connected("here")
    node.exchange.scheduler_said(Neighbours(blob, [other]))
    node.exchange.scheduler_said(Ask(4))
    node.exchange.scheduler_said(answer := Resolved(5, "", "", 0))
    node.exchange.content = None
    node.exchange.scheduler_said(Lease(blob, 0, 1000))
    assert node.neighbourhood.known[other.peer_id].source == "scheduler"
    assert (asked, resolved) == ([4], [answer])
    assert [type(message).__name__ for message in told] == ["Failed"]
    node.exchange.scheduler_lost("here", "why")
    assert not node.machine.state.scheduled


async def test_a_message_that_only_agents_send_is_the_schedulers_breach_of_the_protocol(
    node: Node, quick_clock: MockClock
) -> None:
    with pytest.raises(RemoteProtocolError):
        node.exchange.scheduler_said(Grant(1))


async def test_a_tick_that_comes_late_waits_for_what_came_meanwhile_but_once(mock_clock: MockClock) -> None:
    class Busy(PullMachine):
        ticked = 0
        busy = True

        def handle(self, event: Event, now: float) -> list[Command]:
            self.ticked += 1
            return super().handle(event, now)

    machine = Busy(PeerId("1" * 32), random.Random(0))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Exchange(machine, lambda *_: None).tick)
        for pause_s, ticked in [(TICK_S, 1), (60.0, 1), (60.0, 2), (60.0, 2), (TICK_S, 3), (TICK_S, 4)]:
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(pause_s)
            await trio.testing.wait_all_tasks_blocked()
            assert machine.ticked == ticked
        nursery.cancel_scope.cancel()
