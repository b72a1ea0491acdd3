# SPDX-License-Identifier: Apache-2.0
"""Two ends of a peer connection over loopback: what crosses, how fast, and what every ending leaves behind."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import sys
import termios
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from p2pdist.core.rate import TokenBucket
from p2pdist.core.verify import checksum_of
from p2pdist.core.wire import (
    SPAN_BYTES,
    Decoder,
    Grant,
    Message,
    Refuse,
    Room,
    encode,
    span_header,
)
from p2pdist.errors import PeerUnavailable
from p2pdist.net.peer_link import (
    LEAST_FRAME_BYTES,
    WINDOW_S,
    ClearChannel,
    PeerLink,
    connect,
    detach,
    greet,
)
from tests.net.links import (
    BOB,
    CHUNK,
    End,
    Recorder,
    Released,
    end,
    hello,
    open_descriptors,
    read_frames,
    reset,
    running,
    send_all,
    socket_pair,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# ----------------------------------------------------------------------- chunks


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


@pytest.mark.parametrize("seed", range(5))
async def test_a_chunk_is_right_however_its_bytes_and_the_messages_between_are_cut(
    sockets: tuple[socket.socket, socket.socket], seed: int
) -> None:
    receiver, plain, rng = end(sockets[0]), sockets[1], random.Random(seed)
    receiver.link.expect(1, memoryview(bytearray(len(CHUNK))))
    stream = b"".join(
        span_header(1, len(CHUNK[at : at + SPAN_BYTES])) + CHUNK[at : at + SPAN_BYTES] + encode(Grant(at))
        for at in range(0, len(CHUNK), SPAN_BYTES)
    )
    async with running(receiver):
        while stream:
            cut = rng.choice((1, 8, 1000, SPAN_BYTES, 2 * SPAN_BYTES))
            await send_all(plain, stream[:cut])
            await trio.testing.wait_all_tasks_blocked()
            stream = stream[cut:]
        await receiver.told.until(lambda: len(receiver.told.messages) == 6)
    assert receiver.told.chunks == {1: (CHUNK, checksum_of(CHUNK))}
    assert receiver.link.received_bytes == len(CHUNK)


async def test_what_is_queued_is_sent_at_once_and_together(sockets: tuple[socket.socket, socket.socket]) -> None:
    sender, plain = end(sockets[0]), sockets[1]
    sender.link.queue(Grant(1))
    sender.link.queue(Room())
    with pytest.raises(BlockingIOError):
        plain.recv(1)
    sender.link.flush()
    assert plain.recv(100) == encode(Grant(1)) + encode(Room())


async def test_a_message_that_finds_the_connection_broken_ends_the_link(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    sender, plain = end(sockets[0]), sockets[1]
    sender.link.channel.sock.shutdown(socket.SHUT_WR)
    async with running(sender):
        sender.link.send(Room())
        assert isinstance(await sender.wait_ended(), PeerUnavailable)
    assert plain.recv(1) == b""


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


# ------------------------------------------------------------------------ limit


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


@pytest.mark.parametrize(
    ("rate", "frame_bytes"), [(50_000, LEAST_FRAME_BYTES), (400_000, 32 * 1024), (RATE, SPAN_BYTES)]
)
async def test_with_a_narrow_limit_frames_are_short(
    sockets: tuple[socket.socket, socket.socket], chunk_file: int, rate: int, frame_bytes: int
) -> None:
    sender, plain = end(sockets[0], limit=TokenBucket(rate, SPAN_BYTES)), sockets[1]
    async with running(sender):
        sender.link.send_chunk(1, chunk_file, 0, len(CHUNK), lambda: None)
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(plain)
        header = plain.recv(len(span_header(1, frame_bytes)))
    assert header == span_header(1, frame_bytes)


async def test_what_a_link_has_sent_is_known_and_of_a_broken_one_nothing(chunk_file: int) -> None:
    sender, receiver = (end(sock) for sock in socket_pair())
    async with running(sender, receiver):
        receiver.link.expect(1, memoryview(bytearray(len(CHUNK))))
        sender.link.send_chunk(1, chunk_file, 0, len(CHUNK), lambda: None)
        await receiver.told.until(lambda: bool(receiver.told.chunks))
        sent = sender.link.sent()
        assert sent is not None
        # What the receiver has read is acknowledged, but for what its kernel has not said yet.
        assert 0 < sent.acked_bytes <= sent.acked_bytes + sent.underway_bytes
        assert sent.acked_bytes + 2 * sent.underway_bytes + 65536 >= len(CHUNK)
        assert 0 <= sent.late_s < 10
    assert sender.link.sent() is None


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


# ----------------------------------------------------------------------- window


WINDOW_BYTES = 16 * 1024


def narrow_pair() -> tuple[socket.socket, socket.socket]:
    """Return connected sockets of which the second takes in little that is not read."""
    ours, theirs = socket_pair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    return ours, theirs


async def test_with_a_window_no_more_is_unacknowledged_than_it_and_a_frame(chunk_file: int) -> None:
    ours, theirs = narrow_pair()
    sender, received = end(ours), bytearray()
    sender.told.window_bytes = WINDOW_BYTES
    frames = -(-len(CHUNK) // LEAST_FRAME_BYTES)
    headers = frames * len(span_header(1, LEAST_FRAME_BYTES))
    with theirs, trio.fail_after(10):
        async with running(sender):
            sender.link.send_chunk(1, chunk_file, 0, len(CHUNK), lambda: None)
            while len(received) < len(CHUNK) + headers:
                await trio.lowlevel.wait_readable(theirs)
                outstanding = int.from_bytes(fcntl.ioctl(ours, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
                assert outstanding <= WINDOW_BYTES + LEAST_FRAME_BYTES + headers
                received += theirs.recv(2048)
            await sender.told.until(lambda: sender.told.sent == [1])


async def test_a_chunk_counts_as_sent_only_when_the_window_is_free_again(
    chunk_file: int, mock_clock: trio.testing.MockClock
) -> None:
    ours, theirs = narrow_pair()
    sender = end(ours)
    sender.told.window_bytes = WINDOW_BYTES
    with theirs:
        async with running(sender):
            sender.link.send_chunk(1, chunk_file, 0, 3 * LEAST_FRAME_BYTES, lambda: None)
            for _ in range(3):
                await trio.testing.wait_all_tasks_blocked(0.01)
                mock_clock.jump(WINDOW_S / 2)
            assert not sender.told.sent
            sender.told.window_bytes = 0
            mock_clock.jump(WINDOW_S)
            await sender.told.until(lambda: sender.told.sent == [1])


async def test_a_link_that_waits_for_its_window_can_be_closed(
    chunk_file: int, mock_clock: trio.testing.MockClock
) -> None:
    (ours, theirs), released = narrow_pair(), Released()
    sender = end(ours)
    sender.told.window_bytes = 1
    with theirs:
        async with running(sender):
            sender.link.send_chunk(1, chunk_file, 0, len(CHUNK), released.of(1))
            await trio.testing.wait_all_tasks_blocked()
            sender.link.close("enough")
            await sender.wait_ended()
    assert released == {1: 1}


# ---------------------------------------------------------------------- endings


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
