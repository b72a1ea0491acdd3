# SPDX-License-Identifier: Apache-2.0
"""Peers that speak the wire protocol and do not keep it: what they say and send on one connection to an agent.

`LyingPeer` dials an agent, for tests; `bench.lab.liar` is a program that joins a cluster as agents do.
"""

from __future__ import annotations

import random
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import trio

from p2pdist.core.chunkmap import ChunkMap, chunk_set, to_bytes
from p2pdist.core.packing import pack_indices
from p2pdist.core.types import PeerId
from p2pdist.core.verify import checksum_of
from p2pdist.core.wire import (
    SPAN_BYTES,
    VERSION,
    Decline,
    Decoder,
    Grant,
    Have,
    Hello,
    Share,
    Take,
    encode,
    span_header,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    from bench.lab.hosts import Host
    from p2pdist.core.types import Checksum, Digest
    from p2pdist.core.wire import Message

PEER_ID = PeerId("f" * 32)
GRANTS = 4
LIES_FROM_BYTES = 1 << 20
"""Smaller blobs are passed over: the first lie found out ends it, and it is layers that are streamed."""
_RECEIVE_BYTES = 64 << 10
_AGAIN_S = 0.02
_BYTE_EVERY_S = 1.0


class Behaviour(StrEnum):
    """What a lying peer does with a chunk that was taken from it."""

    FORGE = "forge"
    """Says that it has all chunks, with checksums that fit the random bytes that it sends."""
    CORRUPT = "corrupt"
    """Says what is right, and sends other bytes."""
    STALL = "stall"
    """Says what is right, and sends nothing."""
    TRICKLE = "trickle"
    """Says what is right, and sends a byte a second."""


@dataclass(slots=True, kw_only=True)
class Conversation:
    """One connection to an agent.

    Args:
        wants: whether it says that it wants the rest, which makes it a member of the swarm that leases chunks.
        truths: the right checksums by blob and chunk; whoever does not forge says that it has these chunks.
        on_chunk: told of each chunk once it is sent.
        peer: whom it is with, once that one has said so.
    """

    stream: trio.SocketStream
    behaviour: Behaviour = Behaviour.FORGE
    wants: bool = False
    truths: Mapping[Digest, Mapping[int, Checksum]] = field(default_factory=dict)
    on_chunk: Callable[[PeerId | None, Digest, int], None]
    peer: PeerId | None = None
    _sizes: dict[Digest, int] = field(default_factory=dict)
    _grants: int = 0
    _sending: trio.Lock = field(default_factory=trio.Lock)

    async def run(self) -> None:
        """Talk until the agent hangs up; our own hello has been sent."""
        decoder = Decoder()
        try:
            async with trio.open_nursery() as nursery:
                while data := await self.stream.receive_some(_RECEIVE_BYTES):
                    for item in decoder.feed(memoryview(data)):
                        await self._answer(item, nursery)
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def tell(self, blob: Digest, news: Mapping[int, Checksum]) -> None:
        """Say that it has more chunks, which `truths` hold by now, if it has said anything of the blob."""
        if blob in self._sizes and self.behaviour is not Behaviour.FORGE:
            await self._send(encode(Have(blob, pack_indices(list(news)), b"".join(news.values()))))

    async def _answer(self, item: object, nursery: trio.Nursery) -> None:
        match item:
            case Hello():
                self.peer = item.peer_id
            case Share() if item.wants and item.size_bytes >= LIES_FROM_BYTES and item.blob not in self._sizes:
                self._sizes[item.blob] = item.size_bytes
                await self._send(encode(self._share(item.blob)))
                while self._grants < GRANTS:
                    await self._grant()
            case Take():
                nursery.start_soon(self._taken, item)
            case Decline():
                nursery.start_soon(self._grant_later)

    async def _grant(self) -> None:
        self._grants += 1
        await self._send(encode(Grant(self._grants)))

    async def _grant_later(self) -> None:
        await trio.sleep(_AGAIN_S)
        await self._grant()

    async def _send(self, frame: bytes) -> None:
        async with self._sending:
            await self.stream.send_all(frame)

    async def _taken(self, take: Take) -> None:
        chunk = self._chunk(take.blob, take.index)
        match self.behaviour:
            case Behaviour.STALL:
                pass
            case Behaviour.TRICKLE:
                await self._trickle(span_header(take.number, len(chunk)), chunk)
            case _:
                spans = [chunk[start : start + SPAN_BYTES] for start in range(0, len(chunk), SPAN_BYTES)]
                await self._send(b"".join(span_header(take.number, len(span)) + span for span in spans))
                self.on_chunk(self.peer, take.blob, take.index)
                await self._grant()

    async def _trickle(self, head: bytes, chunk: bytes) -> None:
        async with self._sending:
            await self.stream.send_all(head)
            for byte in chunk:
                await self.stream.send_all(bytes((byte,)))
                await trio.sleep(_BYTE_EVERY_S)

    def _share(self, blob: Digest) -> Message:
        cut = ChunkMap.of(self._sizes[blob])
        if self.behaviour is Behaviour.FORGE:
            said = {index: checksum_of(self._chunk(blob, index)) for index in range(cut.count)}
        else:
            said = dict(sorted(self.truths.get(blob, {}).items()))
        have = to_bytes(chunk_set(said), cut.count)
        return Share(blob, cut.size_bytes, have, b"".join(said.values()), self.wants, "", True)

    def _chunk(self, blob: Digest, index: int) -> bytes:
        length = ChunkMap.of(self._sizes[blob]).length(index)
        return random.Random(f"{blob}/{index}").randbytes(length)


@dataclass(slots=True)
class LyingPeer:
    """A peer that dials one agent and forges chunks. `sent` are those that it was made to take."""

    host: Host
    address: tuple[str, int]
    wants: bool = False
    peer_id: PeerId = PEER_ID
    sent: list[tuple[Digest, int]] = field(default_factory=list)
    dropped: trio.Event = field(default_factory=trio.Event)

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
        await Conversation(stream=stream, wants=self.wants, on_chunk=self._note).run()
        self.dropped.set()

    def _note(self, _agent: PeerId | None, blob: Digest, index: int) -> None:
        self.sent.append((blob, index))
