# SPDX-License-Identifier: Apache-2.0
"""Two ends of a peer connection over loopback: what crosses, what is refused, and what every ending leaves behind."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections import Counter
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from p2pdist.core.rate import TokenBucket
from p2pdist.core.types import Checksum, Digest, PeerId
from p2pdist.core.verify import checksum_of
from p2pdist.core.wire import (
    MESSAGE_BYTES,
    SPAN_BYTES,
    VERSION,
    Decline,
    Decoder,
    Grant,
    Have,
    Hello,
    Message,
    Refuse,
    Room,
    encode,
    span_header,
)
from p2pdist.errors import FloodError, P2PDistError, PeerUnavailable, RemoteProtocolError, TransferTimeout
from p2pdist.net.peer_link import (
    FLOOD_BYTES,
    FLOOD_BYTES_PER_S,
    HELLO_S,
    MAX_INCOMING,
    MAX_QUEUED_BYTES,
    ClearChannel,
    PeerLink,
    connect,
    detach,
    greet,
    tune,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

ANN, BOB = PeerId("a" * 32), PeerId("b" * 32)
CHUNK = random.Random(1).randbytes(5 * SPAN_BYTES + 321)


def hello(peer: PeerId = ANN, *, version: int = VERSION, cluster: str = "lab") -> Hello:
    return Hello(version, cluster, peer, 5051, "", "", "")


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a loopback TCP connection, tuned."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    tune(ours)
    tune(theirs)
    return ours, theirs


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    pair = socket_pair()
    yield pair
    for sock in pair:
        sock.close()


@pytest.fixture
def chunk_file() -> Iterator[int]:
    """A descriptor of a file in memory that holds CHUNK."""
    descriptor = os.memfd_create("chunk")
    os.pwrite(descriptor, CHUNK, 0)
    yield descriptor
    os.close(descriptor)


@dataclass
class Recorder:
    """A LinkHandler that notes what it is told."""

    messages: list[Message] = field(default_factory=list)
    chunks: dict[int, tuple[bytes, Checksum]] = field(default_factory=dict)
    sent: list[int] = field(default_factory=list)
    refuse: type[Message] | None = None
    """Raise RemoteProtocolError for messages of this type."""
    on_message: Callable[[], None] = lambda: None
    _changed: trio.Event = field(default_factory=trio.Event)

    def message_arrived(self, peer: PeerId, message: Message) -> None:
        if self.refuse is not None and isinstance(message, self.refuse):
            raise RemoteProtocolError("refused")
        self.messages.append(message)
        self.on_message()
        self._wake()

    def chunk_arrived(self, peer: PeerId, number: int, data: memoryview, checksum: Checksum) -> None:
        self.chunks[number] = (bytes(data), checksum)
        self._wake()

    def chunk_sent(self, peer: PeerId, number: int) -> None:
        self.sent.append(number)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(10):
            while not condition():
                await self._changed.wait()


@dataclass
class End:
    """A running link and what it told."""

    link: PeerLink
    told: Recorder
    error: P2PDistError | None = None
    ended: trio.Event = field(default_factory=trio.Event)

    async def run(self) -> None:
        try:
            await self.link.run()
        except P2PDistError as error:
            self.error = error
        self.ended.set()

    async def wait_ended(self) -> P2PDistError | None:
        with trio.fail_after(10):
            await self.ended.wait()
        return self.error


def end(
    sock: socket.socket,
    peer: PeerId = BOB,
    early: list[Message] | None = None,
    limit: TokenBucket | None = None,
) -> End:
    told = Recorder()
    link = PeerLink(
        ClearChannel(sock),
        hello(peer),
        told,
        decoder=Decoder(),
        early=[*(early or [])],
        dialled=True,
        source="test",
        limit=limit,
    )
    return End(link, told)


@asynccontextmanager
async def running(*ends: End) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for each in ends:
            nursery.start_soon(each.run)
        yield
        nursery.cancel_scope.cancel()


async def read_frames(sock: socket.socket, decoder: Decoder, count: int) -> list[object]:
    """Read until `count` messages or chunk spans are there."""
    items: list[object] = []
    with trio.fail_after(10):
        while len(items) < count:
            await trio.lowlevel.wait_readable(sock)
            data = sock.recv(65536)
            assert data, "the link closed"
            items += decoder.feed(memoryview(data))
    return items


async def send_all(sock: socket.socket, data: bytes) -> None:
    with trio.fail_after(10):
        while data:
            await trio.lowlevel.wait_writable(sock)
            data = data[sock.send(data) :]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Released(Counter[int]):
    """How often each chunk was released."""

    def of(self, number: int) -> Callable[[], None]:
        return lambda: self.update([number])


# ------------------------------------------------------------------- chunks


async def test_a_chunk_crosses_byte_for_byte_with_messages_in_between(
    sockets: tuple[socket.socket, socket.socket], chunk_file: int
) -> None:
    sender, receiver = end(sockets[0]), end(sockets[1])
    released = Released()
    async with running(sender, receiver):
        for number, start in ((7, 0), (8, 1000)):
            receiver.link.expect(number, memoryview(bytearray(len(CHUNK) - start)))
            sender.link.send_chunk(number, chunk_file, start, len(CHUNK) - start, released.of(number))
        for number in range(20):
            sender.link.send(Grant(number))
            await trio.lowlevel.checkpoint()
        await receiver.told.until(lambda: len(receiver.told.chunks) == 2 and len(receiver.told.messages) == 20)
        await sender.told.until(lambda: sender.told.sent == [7, 8])
    assert receiver.told.messages == [Grant(number) for number in range(20)]
    assert receiver.told.chunks == {
        7: (CHUNK, checksum_of(CHUNK)),
        8: (CHUNK[1000:], checksum_of(CHUNK[1000:])),
    }
    assert released == {7: 1, 8: 1}


async def test_a_message_waits_for_one_frame_and_not_for_the_chunk(
    sockets: tuple[socket.socket, socket.socket], chunk_file: int
) -> None:
    sender, plain = end(sockets[0]), sockets[1]
    async with running(sender):
        sender.link.send_chunk(1, chunk_file, 0, len(CHUNK), lambda: None)
        decoder, items = Decoder(), []
        while not items:
            items = await read_frames(plain, decoder, 1)
        sender.link.send(Room())
        while Room() not in items:
            items += await read_frames(plain, decoder, 1)
        spans = items[: items.index(Room())]
        assert sum(len(span.data) for span in spans) < len(CHUNK)


@pytest.mark.parametrize(
    ("rate_bytes_per_s", "frame_bytes"),
    [(6_000_000, SPAN_BYTES), (100_000_000, 2 * SPAN_BYTES), (10_000_000_000, len(CHUNK))],
    ids=["50 Mbit/s", "800 Mbit/s", "loopback"],
)
async def test_frames_are_as_long_as_the_link_is_fast(
    sockets: tuple[socket.socket, socket.socket], chunk_file: int, rate_bytes_per_s: int, frame_bytes: int
) -> None:
    sender, plain = end(sockets[0]), sockets[1]
    for _ in range(30):
        sender.link._rate.measured(rate_bytes_per_s, 1.0)
    async with running(sender):
        sender.link.send_chunk(1, chunk_file, 0, len(CHUNK), lambda: None)
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(plain)
        header = plain.recv(len(span_header(1, frame_bytes)))
    assert header == span_header(1, frame_bytes)


async def test_both_directions_carry_chunks_at_once(
    sockets: tuple[socket.socket, socket.socket], chunk_file: int
) -> None:
    ends = end(sockets[0]), end(sockets[1])
    async with running(*ends):
        for each in ends:
            each.link.expect(1, memoryview(bytearray(len(CHUNK))))
            each.link.send_chunk(1, chunk_file, 0, len(CHUNK), lambda: None)
        for each in ends:
            await each.told.until(lambda each=each: each.told.chunks == {1: (CHUNK, checksum_of(CHUNK))})


async def test_what_came_right_behind_the_hello_is_not_lost(sockets: tuple[socket.socket, socket.socket]) -> None:
    await send_all(sockets[1], encode(hello(BOB)) + encode(Grant(1)) + encode(Grant(2)))
    decoder = Decoder()
    theirs, early = await greet(ClearChannel(sockets[0]), hello(), decoder)
    told = Recorder()
    link = PeerLink(ClearChannel(sockets[0]), theirs, told, decoder=decoder, early=early, dialled=True, source="test")
    async with running(End(link, told)):
        await told.until(lambda: len(told.messages) == 2)
    assert told.messages == [Grant(1), Grant(2)]


async def test_a_cancelled_chunk_stops_at_the_next_frame_and_leaves_nothing_behind(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    whole = 64 * 1024 * 1024
    descriptor = os.memfd_create("large")
    os.truncate(descriptor, whole)
    sender, plain = end(sockets[0]), sockets[1]
    released = Released()
    async with running(sender):
        sender.link.send_chunk(1, descriptor, 0, whole, released.of(1))
        sender.link.send_chunk(2, descriptor, 0, 10, released.of(2))
        decoder = Decoder()
        items = await read_frames(plain, decoder, 1)
        sender.link.cancel_chunk(1)
        while not any(isinstance(item, Refuse) for item in items):
            items += await read_frames(plain, decoder, 1)
        await sender.told.until(lambda: len(sender.told.sent) == 2)
        assert decoder.span_left == 0
    os.close(descriptor)
    assert sum(len(item.data) for item in items if not isinstance(item, Message) and item.number == 1) < whole
    assert Refuse(1) in items
    assert sender.told.sent == [1, 2]
    assert released == {1: 1, 2: 1}


async def test_a_chunk_cancelled_before_its_first_frame_is_refused(
    sockets: tuple[socket.socket, socket.socket], chunk_file: int
) -> None:
    sender, receiver = end(sockets[0]), end(sockets[1])
    sender.link.send_chunk(1, chunk_file, 0, len(CHUNK), lambda: None)
    sender.link.cancel_chunk(1)
    receiver.link.expect(1, memoryview(bytearray(len(CHUNK))))
    async with running(sender, receiver):
        await receiver.told.until(lambda: receiver.told.messages == [Refuse(1)])
        await sender.told.until(lambda: sender.told.sent == [1])
    assert not receiver.told.chunks


async def test_a_number_can_be_used_again_after_a_refusal(
    sockets: tuple[socket.socket, socket.socket], chunk_file: int
) -> None:
    sender, receiver = end(sockets[0]), end(sockets[1])
    async with running(sender, receiver):
        receiver.link.expect(1, memoryview(bytearray(10)))
        sender.link.send(Refuse(1))
        await receiver.told.until(lambda: receiver.told.messages == [Refuse(1)])
        receiver.link.expect(1, memoryview(bytearray(len(CHUNK))))
        sender.link.send_chunk(1, chunk_file, 0, len(CHUNK), lambda: None)
        await receiver.told.until(lambda: 1 in receiver.told.chunks)
    assert receiver.told.chunks[1][0] == CHUNK


# -------------------------------------------------------------------- limit

RATE = 1_000_000


@asynccontextmanager
async def limited_pairs(count: int, limit: TokenBucket) -> AsyncIterator[list[tuple[End, End]]]:
    """Run senders that share a limit, each with its receiver."""
    sockets = [socket_pair() for _ in range(count)]
    pairs = [(end(ours, limit=limit), end(theirs)) for ours, theirs in sockets]
    async with running(*(each for pair in pairs for each in pair)):
        yield pairs


async def test_all_links_together_send_no_faster_than_the_limit(
    chunk_file: int, quick_clock: trio.testing.MockClock
) -> None:
    limit = TokenBucket(RATE, SPAN_BYTES)
    async with limited_pairs(3, limit) as pairs:
        began = trio.current_time()
        for sender, receiver in pairs:
            for number in (1, 2):
                receiver.link.expect(number, memoryview(bytearray(len(CHUNK))))
                sender.link.send_chunk(number, chunk_file, 0, len(CHUNK), lambda: None)
        for sender, receiver in pairs:
            await receiver.told.until(lambda told=receiver.told: len(told.chunks) == 2)
            await sender.told.until(lambda told=sender.told: len(told.sent) == 2)
        least_s = (6 * len(CHUNK) - SPAN_BYTES) / RATE
        assert least_s <= trio.current_time() - began < 1.05 * least_s
    assert all(receiver.told.chunks[2] == (CHUNK, checksum_of(CHUNK)) for _, receiver in pairs)


async def test_messages_pass_a_chunk_that_waits_for_the_limit(
    chunk_file: int, mock_clock: trio.testing.MockClock
) -> None:
    limit = TokenBucket(RATE, SPAN_BYTES)
    limit.reserve(SPAN_BYTES, trio.current_time())
    async with limited_pairs(1, limit) as pairs:
        ((sender, receiver),) = pairs
        sender.link.send_chunk(1, chunk_file, 0, len(CHUNK), lambda: None)
        for number in range(3):
            await trio.testing.wait_all_tasks_blocked()
            sender.link.send(Grant(number))
            await receiver.told.until(lambda number=number: receiver.told.messages[-1:] == [Grant(number)])
        assert not sender.told.sent
        assert trio.current_time() == 0


async def test_a_link_that_waits_for_the_limit_can_be_closed(
    chunk_file: int, mock_clock: trio.testing.MockClock
) -> None:
    limit, released = TokenBucket(RATE, SPAN_BYTES), Released()
    limit.reserve(SPAN_BYTES, trio.current_time())
    async with limited_pairs(1, limit) as pairs:
        ((sender, _),) = pairs
        sender.link.send_chunk(1, chunk_file, 0, len(CHUNK), released.of(1))
        await trio.testing.wait_all_tasks_blocked()
        sender.link.close("enough")
        await sender.wait_ended()
    assert released == {1: 1}


# -------------------------------------------------------------------- hello


async def rejected(sock: socket.socket) -> P2PDistError:
    with pytest.raises(P2PDistError) as caught:
        await greet(ClearChannel(sock), hello(), Decoder())
    return caught.value


@pytest.mark.parametrize(
    ("first", "why"),
    [
        pytest.param(encode(hello(version=VERSION + 1)), "protocol version", id="another version"),
        pytest.param(encode(hello(cluster="other")), "cluster 'other'", id="another cluster"),
        pytest.param(encode(Grant(1)), "a Grant where a hello should be", id="no hello"),
        pytest.param(span_header(1, 5) + b"12345", "a ChunkSpan where a hello should be", id="a chunk"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "a frame of kind", id="HTTP"),
        pytest.param(bytes([0, 0, 0, 5, 0]) + b"\xff\xff\xff\xff", "malformed message", id="no msgpack"),
    ],
)
async def test_a_peer_that_begins_otherwise_is_refused(
    sockets: tuple[socket.socket, socket.socket], first: bytes, why: str
) -> None:
    await send_all(sockets[1], first)
    error = await rejected(sockets[0])
    assert isinstance(error, RemoteProtocolError)
    assert why in str(error)


async def test_a_peer_that_hangs_up_is_unavailable(sockets: tuple[socket.socket, socket.socket]) -> None:
    sockets[1].close()
    assert isinstance(await rejected(sockets[0]), PeerUnavailable)


async def test_a_peer_that_resets_is_unavailable(sockets: tuple[socket.socket, socket.socket]) -> None:
    reset(sockets[1])
    assert isinstance(await rejected(sockets[0]), PeerUnavailable)


async def test_a_silent_peer_is_given_up_in_time(
    sockets: tuple[socket.socket, socket.socket], autojump_clock: trio.testing.MockClock
) -> None:
    began = trio.current_time()
    assert isinstance(await rejected(sockets[0]), TransferTimeout)
    assert trio.current_time() - began == HELLO_S


async def test_a_peer_that_resets_right_behind_its_hello_is_unavailable(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    """A socket that is not connected any more has no peer's address to show."""
    await send_all(sockets[1], encode(hello(BOB)))
    theirs, early = await greet(ClearChannel(sockets[0]), hello(), Decoder())
    reset(sockets[1])
    await trio.lowlevel.wait_readable(sockets[0])
    with pytest.raises(PeerUnavailable, match="broke off"):
        PeerLink(
            ClearChannel(sockets[0]), theirs, Recorder(), decoder=Decoder(), early=early, dialled=True, source="test"
        )


@pytest.mark.parametrize(
    "host",
    [
        pytest.param("a" * 70, id="a label too long"),
        pytest.param("..", id="empty labels"),
        pytest.param("a\0b", id="a null byte"),
        pytest.param("", id="nothing"),
    ],
)
async def test_a_host_that_cannot_be_is_unavailable_and_no_crash(host: str) -> None:
    """Addresses come from others' announcements."""
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(PeerUnavailable):
        port = listener.getsockname()[1]
        listener.close()
        await connect(host, port)


async def test_a_refused_connection_is_unavailable_and_says_where() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(PeerUnavailable, match=f"127.0.0.1:{port}"):
        await connect("127.0.0.1", port)


# ------------------------------------------------------------- bad behaviour


@pytest.mark.parametrize(
    ("garbage", "why"),
    [
        pytest.param(span_header(9, 4) + b"byte", "nobody took", id="a chunk that nobody took"),
        pytest.param(span_header(1, 11) + b"01234567890", "more than the chunk", id="a byte too many"),
        pytest.param(span_header(1, 6) + b"012345" + span_header(1, 5) + b"67890", "more than the chunk", id="in two"),
        pytest.param(struct.pack(">IB", 1 << 30, 1), "a chunk frame of", id="a chunk frame too large"),
        pytest.param(struct.pack(">IB", 1 << 30, 0), "a frame of kind 0", id="a message too large"),
        pytest.param(struct.pack(">IB", 10, 9), "a frame of kind 9", id="an unknown kind"),
        pytest.param(struct.pack(">IB", 5, 1) + b"\0\0\0\1", "a chunk frame of 5", id="an empty chunk frame"),
    ],
)
async def test_what_breaks_the_protocol_ends_the_link(
    sockets: tuple[socket.socket, socket.socket], garbage: bytes, why: str
) -> None:
    receiver = end(sockets[0])
    receiver.link.expect(1, memoryview(bytearray(10)))
    async with running(receiver):
        await send_all(sockets[1], garbage)
        error = await receiver.wait_ended()
    assert isinstance(error, RemoteProtocolError)
    assert why in str(error)
    assert not receiver.told.chunks
    assert sockets[0].fileno() == -1


async def test_a_message_that_its_reader_refuses_ends_the_link(sockets: tuple[socket.socket, socket.socket]) -> None:
    receiver = end(sockets[0])
    receiver.told.refuse = Decline
    async with running(receiver):
        await send_all(sockets[1], encode(Grant(1)) + encode(Decline(1, True)) + encode(Grant(2)))
        assert isinstance(await receiver.wait_ended(), RemoteProtocolError)
    assert receiver.told.messages == [Grant(1)]


async def test_a_peer_that_reads_nothing_loses_the_link_before_it_costs_much_memory(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    sender = end(sockets[0])
    message = Hello(VERSION, "x" * 500, ANN, 1, "x" * 500, "x" * 500, "x" * 500)
    async with running(sender):
        for _ in range(3 * MAX_QUEUED_BYTES // len(encode(message))):
            sender.link.send(message)
        await sender.wait_ended()
    assert sender.link.why == "it reads nothing"


async def test_a_peer_that_sends_none_of_what_it_granted_loses_the_link(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    """The buffers of chunks that are under way are not for a peer to pile up."""
    receiver = end(sockets[0])
    async with running(receiver):
        for number in range(MAX_INCOMING + 1):
            receiver.link.expect(number, memoryview(bytearray(10)))
        await receiver.wait_ended()
    assert "does not send" in receiver.link.why


async def test_a_flood_of_messages_ends_the_link_after_what_an_honest_peer_may_ever_say(
    sockets: tuple[socket.socket, socket.socket], autojump_clock: trio.testing.MockClock
) -> None:
    receiver = end(sockets[0])
    many = encode(Room()) * 1000
    async with running(receiver):
        with suppress(OSError):
            for _ in range(2 * FLOOD_BYTES // (1000 * MESSAGE_BYTES)):
                await send_all(sockets[1], many)
        assert isinstance(await receiver.wait_ended(), FloodError)
    assert FLOOD_BYTES <= len(receiver.told.messages) * MESSAGE_BYTES < 1.5 * FLOOD_BYTES


async def test_large_messages_count_as_what_they_are_and_time_allows_more(
    sockets: tuple[socket.socket, socket.socket], mock_clock: trio.testing.MockClock
) -> None:
    receiver = end(sockets[0])
    large = encode(Have(Digest("sha256:" + "0" * 64), b"", bytes(1 << 20)))
    count = FLOOD_BYTES // len(large)
    async with running(receiver):
        for _ in range(3):
            for _ in range(count):
                await send_all(sockets[1], large)
            await receiver.told.until(lambda: len(receiver.told.messages) % count == 0)
            mock_clock.jump(FLOOD_BYTES / FLOOD_BYTES_PER_S)
        with suppress(OSError):
            for _ in range(2 * count):
                await send_all(sockets[1], large)
        assert isinstance(await receiver.wait_ended(), FloodError)
    assert len(receiver.told.messages) < 5 * count


async def test_of_a_chunk_that_was_called_off_no_byte_is_kept_and_none_is_a_fault(
    sockets: tuple[socket.socket, socket.socket], chunk_file: int
) -> None:
    sender, receiver = end(sockets[0]), end(sockets[1])
    called_off = bytearray(len(CHUNK))
    receiver.link.expect(1, memoryview(called_off))
    receiver.link.expect(2, memoryview(bytearray(len(CHUNK))))
    receiver.link.abandon(1)
    receiver.link.abandon(7)
    async with running(sender, receiver):
        for number in (1, 2):
            sender.link.send_chunk(number, chunk_file, 0, len(CHUNK), lambda: None)
        await receiver.told.until(lambda: bool(receiver.told.chunks))
    assert list(receiver.told.chunks) == [2]
    assert not any(called_off)
    assert receiver.link.received_bytes == 2 * len(CHUNK)


# ------------------------------------------------------------------ endings


def reset(sock: socket.socket) -> None:
    """Close so that the other side sees a reset, as when a process dies with unread bytes."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


async def test_an_orderly_end_of_the_peer_is_no_error(sockets: tuple[socket.socket, socket.socket]) -> None:
    ours = end(sockets[0])
    async with running(ours):
        sockets[1].close()
        assert await ours.wait_ended() is None
    assert sockets[0].fileno() == -1


@pytest.mark.parametrize("ending", ["finished", "refused", "closed here", "peer gone", "reset", "task cancelled"])
async def test_each_chunk_is_released_exactly_once(
    sockets: tuple[socket.socket, socket.socket], chunk_file: int, ending: str
) -> None:
    sender, receiver = end(sockets[0]), end(sockets[1])
    released = Released()
    whole = 64 * 1024 * 1024 if ending != "finished" else len(CHUNK)
    os.truncate(chunk_file, whole)
    for number in (1, 2, 3):
        sender.link.send_chunk(number, chunk_file, 0, whole, released.of(number))
    async with running(sender):
        if ending == "finished":
            for number in (1, 2, 3):
                receiver.link.expect(number, memoryview(bytearray(whole)))
            async with running(receiver):
                await sender.told.until(lambda: len(sender.told.sent) == 3)
        else:
            await trio.testing.wait_all_tasks_blocked()
        match ending:
            case "refused":
                for number in (1, 2, 3):
                    receiver.link.expect(number, memoryview(bytearray(whole)))
                    sender.link.cancel_chunk(number)
                async with running(receiver):
                    await sender.told.until(lambda: len(sender.told.sent) == 3)
            case "closed here":
                sender.link.close("enough")
                await sender.wait_ended()
            case "peer gone":
                sockets[1].close()
                await sender.wait_ended()
            case "reset":
                reset(sockets[1])
                await sender.wait_ended()
    assert released == {1: 1, 2: 1, 3: 1}
    assert sockets[0].fileno() == -1 or ending == "finished"


async def test_a_peer_killed_in_the_middle_of_a_chunk_is_one_error_and_no_group(
    sockets: tuple[socket.socket, socket.socket], chunk_file: int
) -> None:
    """Reader and writer both meet the reset; what they raise must not end the agent."""
    sender, plain = end(sockets[0]), sockets[1]
    os.truncate(chunk_file, 64 * 1024 * 1024)
    sender.link.send_chunk(1, chunk_file, 0, 64 * 1024 * 1024, lambda: None)
    async with running(sender):
        await read_frames(plain, Decoder(), 1)
        reset(plain)
        assert isinstance(await sender.wait_ended(), PeerUnavailable)


async def test_after_close_nothing_more_is_told() -> None:
    """Another connection may have taken the link's place: what it still reads would be taken for that one's."""
    pairs = socket_pair(), socket_pair()
    ends = [end(pair[0]) for pair in pairs]
    for each, other in (ends, ends[::-1]):
        each.told.on_message = lambda other=other: other.link.close("replaced")
    async with running(*ends):
        await trio.testing.wait_all_tasks_blocked()
        for _, plain in pairs:
            plain.send(encode(Grant(1)))
        for _, plain in pairs:
            plain.close()
        for each in ends:
            await each.wait_ended()
    assert sum(len(each.told.messages) for each in ends) == 1


async def test_no_descriptor_outlives_its_link(chunk_file: int) -> None:
    before = open_descriptors()
    for ending in range(12):
        sockets = socket_pair()
        sender, receiver = end(sockets[0]), end(sockets[1])
        receiver.link.expect(1, memoryview(bytearray(len(CHUNK))))
        async with running(sender, receiver):
            sender.link.send_chunk(1, chunk_file, 0, len(CHUNK), lambda: None)
            if ending % 3:
                await receiver.told.until(lambda receiver=receiver: bool(receiver.told.chunks))
            if ending % 2:
                sender.link.close("enough")
                await receiver.wait_ended()
    assert open_descriptors() == before


async def test_detaching_keeps_one_descriptor() -> None:
    before = open_descriptors()
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        accepted: list[socket.socket] = []
        done = trio.Event()

        async def accept(stream: trio.SocketStream) -> None:
            accepted.append(detach(stream))
            done.set()

        nursery.start_soon(trio.serve_listeners, accept, listeners)
        sock = await connect("127.0.0.1", listeners[0].socket.getsockname()[1])
        with trio.fail_after(10):
            await done.wait()
        nursery.cancel_scope.cancel()
    sock.close()
    accepted[0].close()
    assert open_descriptors() == before
