# SPDX-License-Identifier: Apache-2.0
"""Two ends of a peer connection over loopback, and what each was told."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio
import trio.testing

from p2pdist.core.rate import TokenBucket
from p2pdist.core.types import Checksum, PeerId
from p2pdist.core.wire import (
    SPAN_BYTES,
    VERSION,
    Decoder,
    Hello,
    Message,
)
from p2pdist.errors import P2PDistError, RemoteProtocolError
from p2pdist.net.peer_link import (
    ClearChannel,
    PeerLink,
    tune,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

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


@dataclass
class Recorder:
    """A LinkHandler that notes what it is told."""

    messages: list[Message] = field(default_factory=list)
    chunks: dict[int, tuple[bytes, Checksum]] = field(default_factory=dict)
    sent: list[int] = field(default_factory=list)
    window_bytes: int = 0
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


def reset(sock: socket.socket) -> None:
    """Close so that the other side sees a reset, as when a process dies with unread bytes."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
