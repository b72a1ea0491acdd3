# SPDX-License-Identifier: Apache-2.0
"""One blob on its way into the store, and the runtimes that read it meanwhile.

Invariants: bytes become readable only once their chunk is checked; the last chunk only once the whole
blob's SHA-256 is right; a reader has a descriptor of its own, so the pull's end does not disturb it; the
stored blob stays open, and so is not evicted, until the last of them has gone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from p2pdist.core import events as ev
from p2pdist.errors import PullFailed, TransferTimeout

if TYPE_CHECKING:
    from collections.abc import Callable

    from p2pdist.core.chunkmap import ChunkMap
    from p2pdist.core.types import Digest, Repository
    from p2pdist.exchange import Exchange
    from p2pdist.ports import PartialBlob, StoredBlob

READ_STALL_S = 75.0
"""A reader that gets no byte for so long is cut; the pull itself gives up earlier."""


@dataclass(slots=True)
class Arrival:
    """A blob that is being pulled. `partial` is None for content of unknown size (a manifest)."""

    digest: Digest
    repository: Repository
    shared: bool
    partial: PartialBlob | None = None
    chunks: ChunkMap | None = None
    have: int = 0
    verified: bool = False
    failure: PullFailed | None = None
    from_peers: int = 0
    from_origin: int = 0
    origin_chunks: set[int] = field(default_factory=set)
    """Chunks read from the origin in this run: beyond suspicion when the SHA-256 is wrong."""
    hashed_upto: int = 0
    hashing: trio.Lock = field(default_factory=trio.Lock)
    readers: int = 0
    next_reader: int = 0
    settled: trio.Event = field(default_factory=trio.Event)
    """Set once verified or failed."""
    started: trio.Event = field(default_factory=trio.Event)
    """Set once the pull is running, or has failed before it could."""
    stored: StoredBlob | None = None
    """The committed blob, open for as long as somebody reads what was its Arrival."""
    _changed: trio.Event = field(default_factory=trio.Event)

    def wake(self) -> None:
        """Let all that wait look again."""
        self._changed.set()
        self._changed = trio.Event()
        if self.verified or self.failure is not None:
            self.settled.set()
            self.started.set()

    async def changed(self) -> None:
        await self._changed.wait()

    def fail(self, causes: list[Exception]) -> None:
        if not self.verified and self.failure is None:
            self.failure = PullFailed(self.digest, causes)
            self.wake()

    def readable_stop(self, start: int, stop: int) -> int:
        """Return where the bytes that may be read from `start` on end; `start` itself where there are none."""
        assert self.chunks is not None
        if self.verified:
            return stop
        last = self.chunks.start(self.chunks.count - 1)
        return min(stop, last, self.chunks.contiguous_stop(self.have, start // self.chunks.chunk_bytes))

    def end(self, stored: StoredBlob | None) -> None:
        """Close the file: the blob is stored, or the pull has failed."""
        if self.partial is not None:
            self.partial.close()
        self.stored = stored
        self.close_if_unread()

    def close_if_unread(self) -> None:
        if self.stored is not None and not self.readers:
            self.stored.close()
            self.stored = None


class ArrivalReader:
    """A BlobReader of a blob that is still arriving."""

    def __init__(self, arrival: Arrival, exchange: Exchange, on_first_byte: Callable[[], None]) -> None:
        assert arrival.partial is not None
        self.source = "swarm"
        self.size_bytes = arrival.partial.size_bytes
        self._arrival = arrival
        self._descriptor = os.dup(arrival.partial.fileno())
        self._exchange = exchange
        self._first = on_first_byte
        self._number = arrival.next_reader
        self._head: int | None = None
        self._open = True
        arrival.next_reader += 1
        arrival.readers += 1

    async def available(self, start: int, stop: int) -> int:
        arrival = self._arrival
        assert arrival.chunks is not None
        while True:
            if arrival.failure is not None:
                raise arrival.failure
            end = arrival.readable_stop(start, stop)
            self._move_head(min(max(end, start), self.size_bytes - 1) // arrival.chunks.chunk_bytes)
            if end > start:
                self._first()
                return end
            with trio.move_on_after(READ_STALL_S) as scope:
                await arrival.changed()
            if scope.cancelled_caught:
                raise PullFailed(arrival.digest, [TransferTimeout(f"no byte came for {READ_STALL_S:.0f} s")])

    def _move_head(self, index: int) -> None:
        if index != self._head and not self._arrival.verified:
            self._head = index
            self._exchange.feed(ev.HeadMoved(blob=self._arrival.digest, reader=self._number, index=index))

    def fileno(self) -> int:
        return self._descriptor

    def close(self) -> None:
        if self._open:
            self._open = False
            os.close(self._descriptor)
            self._arrival.readers -= 1
            self._exchange.feed(ev.HeadMoved(blob=self._arrival.digest, reader=self._number, index=None))
            self._arrival.close_if_unread()


class StoredReader:
    """A BlobReader of a blob in the store."""

    def __init__(self, blob: StoredBlob) -> None:
        self.source = "cache"
        self.size_bytes = blob.size_bytes
        self._blob = blob

    async def available(self, start: int, stop: int) -> int:
        await trio.lowlevel.checkpoint()
        return stop

    def fileno(self) -> int:
        return self._blob.fileno()

    def close(self) -> None:
        self._blob.close()
