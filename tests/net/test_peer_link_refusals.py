# SPDX-License-Identifier: Apache-2.0
"""A peer that is not let in, or breaks the protocol: what is refused, when the link ends, and with which word."""

from __future__ import annotations

import socket
import struct
from contextlib import suppress

import pytest
import trio
import trio.testing

from p2pdist.core.types import Digest
from p2pdist.core.wire import (
    MESSAGE_BYTES,
    VERSION,
    Decline,
    Decoder,
    Grant,
    Have,
    Hello,
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
    greet,
)
from tests.net.links import (
    ANN,
    BOB,
    CHUNK,
    Recorder,
    end,
    hello,
    reset,
    running,
    send_all,
)

# ------------------------------------------------------------------------ hello


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


# ---------------------------------------------------------------- bad behaviour


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
