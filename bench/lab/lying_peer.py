# SPDX-License-Identifier: Apache-2.0
"""A peer that says it has every chunk of every blob that is asked for, and sends random bytes that fit what it says."""

from __future__ import annotations

import random
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from p2pdist.core.chunkmap import ChunkMap, to_bytes
from p2pdist.core.types import PeerId
from p2pdist.core.verify import checksum_of
from p2pdist.core.wire import VERSION, Decline, Decoder, Grant, Hello, Share, Take, encode, span_header

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bench.lab.hosts import Host
    from p2pdist.core.types import Digest
    from p2pdist.core.wire import Message

PEER_ID = PeerId("f" * 32)
GRANTS = 4
LIES_FROM_BYTES = 1 << 20
"""Smaller blobs are passed over: the first lie found out ends it, and it is layers that are streamed."""
_RECEIVE_BYTES = 64 << 10
_AGAIN_S = 0.02


@dataclass(slots=True)
class LyingPeer:
    """One connection to an agent. `sent` are the chunks that it was made to take.

    Args:
        wants: whether it says that it wants the rest, which makes it a member of the swarm that leases chunks.
    """

    host: Host
    address: tuple[str, int]
    wants: bool = False
    peer_id: PeerId = PEER_ID
    sent: list[tuple[Digest, int]] = field(default_factory=list)
    dropped: trio.Event = field(default_factory=trio.Event)
    _sizes: dict[Digest, int] = field(default_factory=dict)
    _grants: int = 0
    _sending: trio.Lock = field(default_factory=trio.Lock)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[LyingPeer]:
        """Be connected to the agent beside the block, or until it hangs up."""
        connection = trio.socket.from_stdlib_socket(self.host.socket())
        await connection.connect(self.address)
        stream = trio.SocketStream(connection)
        async with stream, trio.open_nursery() as nursery:
            await stream.send_all(encode(Hello(VERSION, "default", self.peer_id, 0, "", "", "")))
            nursery.start_soon(self._talk, stream)
            yield self
            nursery.cancel_scope.cancel()

    async def _talk(self, stream: trio.SocketStream) -> None:
        decoder = Decoder()
        try:
            async with trio.open_nursery() as nursery:
                while data := await stream.receive_some(_RECEIVE_BYTES):
                    for item in decoder.feed(memoryview(data)):
                        await self._answer(stream, item, nursery)
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self.dropped.set()

    async def _answer(self, stream: trio.SocketStream, item: object, nursery: trio.Nursery) -> None:
        match item:
            case Share() if item.wants and item.size_bytes >= LIES_FROM_BYTES and item.blob not in self._sizes:
                self._sizes[item.blob] = item.size_bytes
                await self._send(stream, encode(self._share(item.blob)))
                while self._grants < GRANTS:
                    await self._grant(stream)
            case Take():
                self.sent.append((item.blob, item.index))
                chunk = self._chunk(item.blob, item.index)
                await self._send(stream, span_header(item.number, len(chunk)) + chunk)
                await self._grant(stream)
            case Decline():
                nursery.start_soon(self._grant_later, stream)

    async def _grant(self, stream: trio.SocketStream) -> None:
        self._grants += 1
        await self._send(stream, encode(Grant(self._grants)))

    async def _send(self, stream: trio.SocketStream, frame: bytes) -> None:
        async with self._sending:
            await stream.send_all(frame)

    async def _grant_later(self, stream: trio.SocketStream) -> None:
        await trio.sleep(_AGAIN_S)
        await self._grant(stream)

    def _share(self, blob: Digest) -> Message:
        cut = ChunkMap.of(self._sizes[blob])
        checksums = b"".join(checksum_of(self._chunk(blob, index)) for index in range(cut.count))
        return Share(blob, cut.size_bytes, to_bytes(cut.full, cut.count), checksums, self.wants, "", True)

    def _chunk(self, blob: Digest, index: int) -> bytes:
        length = ChunkMap.of(self._sizes[blob]).length(index)
        return random.Random(f"{blob}/{index}").randbytes(length)
