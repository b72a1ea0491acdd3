# SPDX-License-Identifier: Apache-2.0
"""TLS on our sockets: what crosses, in whatever pieces it arrives, and what every ending looks like."""

from __future__ import annotations

import os
import random
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import trio

from p2pdist.errors import IdentityRefused, PeerUnavailable, TransferTimeout
from p2pdist.identity.channel import MAX_RECORD_BYTES, SLICE_BYTES, TlsChannel, TlsStream, secure
from tests.identities import identity, make_authority

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from p2pdist.identity.authority import Authority

DATA = random.Random(1).randbytes(3 * SLICE_BYTES + 4321)


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return make_authority(tmp_path / "ca")


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ann = socket.create_connection(listener.getsockname())
        bob, _ = listener.accept()
    for sock in (ann, bob):
        sock.setblocking(False)
    yield ann, bob
    for sock in (ann, bob):
        sock.close()


async def channels(ours: Authority, sockets: tuple[socket.socket, socket.socket]) -> list[TlsChannel]:
    """Return both ends of a connection, the dialler's first."""
    ends: dict[int, TlsChannel] = {}

    async def end(number: int) -> None:
        own = identity(ours, f"{number:032x}")
        ends[number] = await secure(
            sockets[number], own, server_side=bool(number), role="agent", deadline_s=20, expected=None
        )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end, 0)
        nursery.start_soon(end, 1)
    return [ends[0], ends[1]]


async def receive(channel: TlsChannel, count: int) -> bytes:
    buffer, got = memoryview(bytearray(4 * MAX_RECORD_BYTES)), bytearray()
    with trio.fail_after(60):
        while len(got) < count:
            await channel.wait_readable()
            try:
                part = channel.receive_into(buffer)
            except BlockingIOError:
                continue
            assert part
            got += buffer[:part]
    return bytes(got)


async def test_each_end_knows_the_others_name(ours: Authority, sockets: tuple[socket.socket, socket.socket]) -> None:
    ann, bob = await channels(ours, sockets)
    assert ann.holder is not None
    assert bob.holder is not None
    assert (ann.holder.name.name, bob.holder.name.name) == (f"{1:032x}", f"{0:032x}")
    assert ann.tls.version() == "TLSv1.3"


async def test_messages_and_parts_of_a_file_cross_both_ways_at_once(
    ours: Authority, sockets: tuple[socket.socket, socket.socket]
) -> None:
    ann, bob = await channels(ours, sockets)
    descriptor = os.memfd_create("chunk")
    try:
        os.pwrite(descriptor, DATA, 0)

        async def check(channel: TlsChannel, expected: bytes) -> None:
            assert await receive(channel, len(expected)) == expected

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ann.send_file, b"header", descriptor, 5, len(DATA))
            nursery.start_soon(bob.send_all, DATA)
            nursery.start_soon(check, bob, b"header" + DATA[5:])
            nursery.start_soon(check, ann, DATA)
    finally:
        os.close(descriptor)


async def test_bytes_come_out_right_however_the_network_cuts_them(
    ours: Authority, sockets: tuple[socket.socket, socket.socket]
) -> None:
    """What is left of a record is known at each step, so that nobody waits for bytes that are here already."""
    ann, bob = await channels(ours, sockets)
    ann.tls.write(DATA[:40_000])
    wire = ann._outgoing.read()
    rng, at, got = random.Random(2), 0, bytearray()
    buffer = memoryview(bytearray(4 * MAX_RECORD_BYTES))
    while at < len(wire):
        step = rng.choice((1, 3, 5, 100, 5_000, 17_000))
        sockets[0].sendall(wire[at : at + step])
        at = min(at + step, len(wire))
        with suppress(BlockingIOError):
            await trio.lowlevel.wait_readable(sockets[1])
            while True:
                got += buffer[: bob.receive_into(buffer)]
        # Whole records of 16 KiB are out, and what is held of the next is counted.
        records = len(got) // 16384
        assert bob.backlog == at - len(got) - 22 * records or at == len(wire)
    assert bytes(got) == DATA[:40_000]
    assert bob.backlog == 0


async def test_what_is_sent_without_waiting_and_what_waits_stay_in_order(
    ours: Authority, sockets: tuple[socket.socket, socket.socket]
) -> None:
    ann, bob = await channels(ours, sockets)
    sent, pending = bytearray(), bytearray(random.Random(3).randbytes(8 << 20))
    whole = bytes(pending)
    while not ann.unsent:
        count = ann.send_some(pending)
        sent += pending[:count]
        del pending[:count]
    assert ann.send_some(b"x") == 0
    got: list[bytes] = []

    async def read() -> None:
        got.append(await receive(bob, len(whole)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await ann.send_all(pending)
    assert got == [whole]


async def test_the_end_of_a_connection_is_an_end(ours: Authority, sockets: tuple[socket.socket, socket.socket]) -> None:
    ann, bob = await channels(ours, sockets)
    async with TlsStream(ann) as stream:
        await stream.send_all(b"bye")
    reader = TlsStream(bob)
    assert await reader.receive_some() == b"bye"
    assert await reader.receive_some() == b""
    with pytest.raises(OSError):  # noqa: PT011 - whichever the system gives
        for _ in range(100):
            await reader.send_all(b"anybody?")


async def test_bytes_changed_on_the_way_end_the_connection(
    ours: Authority, sockets: tuple[socket.socket, socket.socket]
) -> None:
    ann, bob = await channels(ours, sockets)
    ann.tls.write(b"a message")
    wire = bytearray(ann._outgoing.read())
    wire[-1] ^= 1
    sockets[0].sendall(wire)
    with pytest.raises(IdentityRefused, match="TLS"):
        await receive(bob, 1)


async def test_a_handshake_that_stalls_or_breaks_off_ends_in_time(
    ours: Authority, sockets: tuple[socket.socket, socket.socket], autojump_clock: object
) -> None:
    own = identity(ours, "1" * 32)
    with pytest.raises(TransferTimeout):
        await secure(sockets[0], own, server_side=True, role="agent", deadline_s=5)
    sockets[1].close()
    with pytest.raises(PeerUnavailable):
        await secure(sockets[0], own, server_side=True, role="agent", deadline_s=5)
