# SPDX-License-Identifier: Apache-2.0
"""Played peers: take all of a blob from one agent at once, check each chunk by its announced checksum, keep none.

Run as a program: prints what came of a `Wish`, its argument, as JSON. One epoll serves all. Each peer takes the chunks
in an order of its own, as real ones do, and says what it has before each Take.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import socket
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from xxhash import xxh3_128

from p2pdist.core.chunkmap import ChunkMap, from_bytes, members, to_bytes
from p2pdist.core.packing import pack_indices, unpack_checksums
from p2pdist.core.types import PeerId, parse_digest
from p2pdist.core.wire import (
    VERSION,
    ChunkSpan,
    Decline,
    Decoder,
    Grant,
    Have,
    Hello,
    Message,
    Refuse,
    Share,
    Take,
    encode,
)

if TYPE_CHECKING:
    from p2pdist.core.types import Checksum

_RECEIVE_BYTES = 256 << 10
_LOW_WATER_BYTES = 64 << 10
_TIMEOUT_S = 30.0
_LISTENING_PORT = 1
"""Said in the Hello; the agent has no reason to dial back while the connection stands."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be taken, by how many peers, on which core; `run` gives them other names than those of other runs."""

    host: str
    port: int
    digest: str
    size_bytes: int
    peers: int
    run: int
    cpu: int


@dataclass(slots=True)
class _Coming:
    """A chunk that was taken."""

    index: int
    left_bytes: int
    checksum: xxh3_128


class PlayedPeer:
    """One peer's end of the protocol, without sockets: bytes in, bytes out."""

    def __init__(self, wish: Wish, number: int) -> None:
        self._blob = parse_digest(wish.digest)
        self._chunks = ChunkMap.of(wish.size_bytes)
        name = hashlib.md5(f"{wish.run}/{number}".encode(), usedforsecurity=False).hexdigest()
        self._hello = Hello(VERSION, "default", PeerId(name), _LISTENING_PORT, "", "", "")
        self._wanted = list(range(self._chunks.count))
        Random(name).shuffle(self._wanted)
        self._expected: dict[int, Checksum] = {}
        self._coming: dict[int, _Coming] = {}
        self._news: list[int] = []
        self._decoder = Decoder()
        self.payload_bytes = 0

    @property
    def done(self) -> bool:
        return self.payload_bytes == self._chunks.size_bytes

    @property
    def span_left(self) -> int:
        return self._decoder.span_left

    def greeting(self) -> bytes:
        """Return what it begins with: that it has nothing of the blob and wants it."""
        nothing = to_bytes(0, self._chunks.count)
        share = Share(self._blob, self._chunks.size_bytes, nothing, b"", True, "application/octet-stream", False)
        return encode(self._hello) + encode(share)

    def receive(self, data: memoryview) -> bytes:
        """Return what is to be said to what came. Raises ValueError: what came is wrong."""
        said = b""
        for item in self._decoder.feed(data):
            if isinstance(item, ChunkSpan):
                self._span(item)
            else:
                said += self._answer(item)
        return said

    def _span(self, span: ChunkSpan) -> None:
        coming = self._coming[span.number]
        coming.checksum.update(span.data)
        coming.left_bytes -= len(span.data)
        self.payload_bytes += len(span.data)
        if not coming.left_bytes:
            del self._coming[span.number]
            if coming.checksum.digest() != self._expected[coming.index]:
                raise ValueError(f"chunk {coming.index} is not what was announced")
            self._news.append(coming.index)

    def _answer(self, message: Message) -> bytes:
        if isinstance(message, Share):
            have = list(members(from_bytes(message.have, self._chunks.count)))
            self._expected.update(zip(have, unpack_checksums(message.checksums, len(have)), strict=True))
        elif isinstance(message, Refuse):
            raise ValueError("a chunk was refused")
        elif isinstance(message, Grant):
            return self._take(message.number)
        return b""

    def _take(self, number: int) -> bytes:
        if not self._wanted:
            return self._have() + encode(Decline(number, False))
        index = self._wanted.pop()
        self._coming[number] = _Coming(index, self._chunks.length(index), xxh3_128())
        return self._have() + encode(Take(number, self._blob, index))

    def _have(self) -> bytes:
        news, self._news = self._news, []
        checksums = b"".join(self._expected[index] for index in news)
        return encode(Have(self._blob, pack_indices(news), checksums)) if news else b""


def take_all(wish: Wish) -> dict[str, object]:
    """Let all peers take the whole blob; return seconds, payload and each peer's time to its first chunk bytes.

    Raises:
        ValueError: what the agent says or sends is wrong.
        OSError: it hangs up, or says nothing for long.
    """
    with ExitStack() as closing:
        epoll = closing.enter_context(select.epoll())
        peers: dict[int, tuple[socket.socket, PlayedPeer]] = {}
        for number in range(wish.peers):
            sock = closing.enter_context(socket.create_connection((wish.host, wish.port), timeout=_TIMEOUT_S))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peers[sock.fileno()] = sock, PlayedPeer(wish, number)
        return _take_all(epoll, peers)


def _take_all(epoll: select.epoll, peers: dict[int, tuple[socket.socket, PlayedPeer]]) -> dict[str, object]:
    buffer, first_s, began = memoryview(bytearray(_RECEIVE_BYTES)), [], time.perf_counter()
    for fd, (sock, peer) in peers.items():
        epoll.register(fd, select.EPOLLIN)
        sock.sendall(peer.greeting())
    busy = len(peers)
    while busy:
        ready = epoll.poll(_TIMEOUT_S)
        if not ready:
            raise OSError("the agent sends nothing")
        for fd, _ in ready:
            sock, peer = peers[fd]
            count, before = sock.recv_into(buffer), peer.payload_bytes
            if not count:
                raise OSError("the agent hung up")
            if said := peer.receive(buffer[:count]):
                sock.sendall(said)
            if not before and peer.payload_bytes:
                first_s.append(time.perf_counter() - began)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, max(1, min(_LOW_WATER_BYTES, peer.span_left)))
            if peer.done:
                # At once: a peer that is silent keeps an upload slot from the others.
                epoll.unregister(fd)
                sock.close()
                busy -= 1
    payload_bytes = sum(peer.payload_bytes for _, peer in peers.values())
    return {"seconds": time.perf_counter() - began, "payload_bytes": payload_bytes, "first_s": first_s}


if __name__ == "__main__":
    try:
        given = Wish(**json.loads(sys.argv[1]))
        os.sched_setaffinity(0, [given.cpu])
        print(json.dumps(take_all(given)))
    except (ValueError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
