# SPDX-License-Identifier: Apache-2.0
"""One blob on its way into the store, and the runtimes that read it meanwhile.

Invariants: bytes become readable only once their chunk is checked; the last chunk only once the whole
blob's SHA-256 is right, and never to a reader that was given a chunk which proved wrong; a reader has a
descriptor of its own, so the pull's end does not disturb it; the stored blob stays open, and so is not
evicted, until the last of them has gone.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from p2pdist.core import events as ev
from p2pdist.core.chunkmap import ChunkMap, chunk_set
from p2pdist.errors import IntegrityError, PullFailed, StoreError, TransferTimeout

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from p2pdist.core.types import Digest, Repository
    from p2pdist.exchange import Exchange
    from p2pdist.ports import BlobReader, PartialBlob, StoredBlob

READ_STALL_S = 75.0
"""A reader that gets no byte for so long is cut; the pull itself gives up earlier."""
DOUBT_S = 5.0
"""What only its sender vouches for is kept from readers for so long after it came: by then small blobs are verified.
Where there is no second witness a large one must flow on: CRI-O 1.32 gives up after 10 s without a byte."""


@dataclass(slots=True)
class Arrival:
    """A blob that is being pulled. `partial` is None for content of unknown size (a manifest)."""

    digest: Digest
    repository: Repository
    shared: bool
    partial: PartialBlob | None = None
    chunks: ChunkMap | None = None
    have: int = 0
    resumed: int = 0
    """Chunks of an earlier run, whose sources are not known any more."""
    verified: bool = False
    failure: PullFailed | None = None
    from_earlier: int = 0
    """Bytes that an earlier run had left."""
    from_peers: int = 0
    from_origin: int = 0
    origin_chunks: set[int] = field(default_factory=set)
    """Chunks read from the origin in this run: beyond suspicion when the SHA-256 is wrong."""
    suspects: int = 0
    """Chunks of which one or more made the SHA-256 wrong, not read again yet: nobody is given them."""
    hashed_upto: int = 0
    hashing: trio.Lock = field(default_factory=trio.Lock)
    readers: set[ArrivalReader] = field(default_factory=set)
    next_reader: int = 0
    settled: trio.Event = field(default_factory=trio.Event)
    """Set once verified or failed."""
    started: trio.Event = field(default_factory=trio.Event)
    """Set once the pull is running, or has failed before it could."""
    ended: bool = False
    """Set once the file is closed."""
    stored: StoredBlob | None = None
    """The committed blob, open for as long as somebody reads what was its Arrival."""
    _changed: trio.Event = field(default_factory=trio.Event)
    _young: deque[tuple[float, int]] = field(default_factory=deque)
    """Chunks that came less than DOUBT_S ago, and until when that is so, in the order they came."""
    _aged: int = 0

    def gain(self, index: int) -> None:
        """Note a chunk that is in the file now."""
        self.have |= 1 << index
        self.suspects &= ~(1 << index)
        self._young.append((trio.current_time() + DOUBT_S, index))

    def aged(self) -> int:
        """Return the chunks that are here for DOUBT_S."""
        now = trio.current_time()
        while self._young and self._young[0][0] <= now:
            self._aged |= 1 << self._young.popleft()[1]
        return self._aged

    def aged_at(self, index: int) -> float:
        """Return when a chunk will be here for DOUBT_S; infinity where it is that already, or not here at all."""
        if not self.have >> index & 1:
            return float("inf")
        return next((until for until, young in self._young if young == index), float("inf"))

    def wake(self) -> None:
        """Let all that wait look again."""
        self._changed.set()
        self._changed = trio.Event()
        for reader in self.readers:
            reader.look()
        if self.verified or self.failure is not None:
            self.settled.set()
            self.started.set()

    async def changed(self) -> None:
        await self._changed.wait()

    def fail(self, causes: list[Exception]) -> None:
        if not self.verified and self.failure is None:
            self.failure = PullFailed(self.digest, causes)
            self.wake()

    def readable_stop(self, start: int, stop: int, vouched: int) -> int:
        """Return where the bytes that may be read from `start` on end; `start` itself where there are none.

        Args:
            vouched: chunks for which more than their senders speaks.
        """
        assert self.chunks is not None
        if self.verified:
            return stop
        readable = self.have & (vouched | self.resumed) & ~self.suspects
        last, index = self.chunks.start(self.chunks.count - 1), start // self.chunks.chunk_bytes
        return min(stop, last, self.chunks.contiguous_stop(readable, index))

    def recall(self, indices: list[int]) -> None:
        """Forget chunks that proved wrong, and cut off the readers that were given any of them."""
        assert self.chunks is not None
        gone = chunk_set(indices)
        self.have &= ~gone
        self.resumed &= ~gone
        self.suspects &= ~gone
        self._aged &= ~gone
        self._young = deque(entry for entry in self._young if not gone >> entry[1] & 1)
        # What comes in their place may come from a peer again.
        self.origin_chunks.difference_update(indices)
        for reader in self.readers:
            reader.recall(self.chunks, indices)
        self.wake()

    def descriptor(self) -> int:
        """Return a descriptor of the file for a reader or sender of its own, who closes it.

        Raises:
            StoreError: the agent is out of descriptors.
        """
        assert self.partial is not None
        try:
            return os.dup(self.partial.fileno())
        except OSError as error:
            raise StoreError(
                f"{self.digest} cannot be read: {error.strerror}; raise the limit on open files"
            ) from error

    def end(self, stored: StoredBlob | None) -> None:
        """Close the file: the blob is stored, or the pull has failed."""
        self.ended = True
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
        self._descriptor = arrival.descriptor()
        self._exchange = exchange
        self._first = on_first_byte
        self._number = arrival.next_reader
        self._head: int | None = None
        self._given: tuple[int, int] | None = None
        """The span of bytes that the runtime has, or is being sent."""
        self._misled = False
        self._open = True
        self._waiting: tuple[int, int, bool] | None = None
        """The span of which a byte is waited for, and whether its chunk is here but not to be read yet."""
        self._wake = trio.Event()
        arrival.next_reader += 1
        arrival.readers.add(self)

    async def available(self, start: int, stop: int) -> int:
        arrival, deadline = self._arrival, trio.current_time() + READ_STALL_S
        assert arrival.chunks is not None
        index = start // arrival.chunks.chunk_bytes
        while True:
            if arrival.failure is not None:
                raise arrival.failure
            if self._misled:
                raise PullFailed(arrival.digest, [IntegrityError("a peer's wrong bytes had been passed on")])
            end = self._readable_stop(start, stop)
            self._move_head(min(max(end, start), self.size_bytes - 1) // arrival.chunks.chunk_bytes)
            if end > start:
                self._first()
                self._given = (start if self._given is None else min(start, self._given[0]), end)
                return end
            if trio.current_time() >= deadline:
                raise PullFailed(arrival.digest, [TransferTimeout(f"no byte came for {READ_STALL_S:.0f} s")])
            self._waiting, self._wake = (start, stop, bool(arrival.have >> index & 1)), trio.Event()
            with trio.move_on_at(min(arrival.aged_at(index), deadline)):
                await self._wake.wait()
            self._waiting = None

    def look(self) -> None:
        """Wake up if there is something to read, to fail of, or another time to wait for.

        That is looked at several times for each chunk that comes, and seldom so: a wakeup costs twenty times as much.
        """
        if self._waiting is None:
            return
        arrival, (start, stop, here) = self._arrival, self._waiting
        assert arrival.chunks is not None
        ended = arrival.failure is not None or self._misled
        come = not here and arrival.have >> start // arrival.chunks.chunk_bytes & 1
        if ended or come or self._readable_stop(start, stop) > start:
            self._wake.set()

    def _readable_stop(self, start: int, stop: int) -> int:
        return self._arrival.readable_stop(start, stop, self._vouched() | self._arrival.aged())

    def _vouched(self) -> int:
        progress = self._exchange.machine.blobs.get(self._arrival.digest)
        return progress.offered if progress is not None else 0

    def recall(self, chunks: ChunkMap, indices: list[int]) -> None:
        """Give nothing more if any of these chunks has been given."""
        if self._given is not None:
            given = chunks.covering(*self._given)
            self._misled = self._misled or any(index in given for index in indices)

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
            self._arrival.readers.discard(self)
            self._exchange.feed(ev.HeadMoved(blob=self._arrival.digest, reader=self._number, index=None))
            self._arrival.close_if_unread()


class StoredReader:
    """A BlobReader of a blob in the store, which goes on from a pull where a chunk proves to be damaged.

    Args:
        blob: open; closed with the reader.
        pull: starts the blob's pull, and returns a reader of that.
    """

    def __init__(self, blob: StoredBlob, pull: Callable[[], Awaitable[BlobReader]]) -> None:
        self.source = "cache"
        self.size_bytes = blob.size_bytes
        self._blob = blob
        self._cut = ChunkMap(blob.size_bytes, blob.chunk_bytes)
        self._pull = pull
        self._instead: BlobReader | None = None

    async def available(self, start: int, stop: int) -> int:
        if self._instead is None:
            try:
                return await self._checked(start, stop)
            except IntegrityError:
                self._instead = await self._pull()
        return await self._instead.available(start, stop)

    async def _checked(self, start: int, stop: int) -> int:
        """Return where the chunks end that are known to be right; check the first one if it is not."""
        index = start // self._cut.chunk_bytes
        end = self._cut.contiguous_stop(self._blob.right, index)
        if end <= start:
            await trio.to_thread.run_sync(self._blob.check, index)
            end = self._cut.start(index) + self._cut.length(index)
        else:
            await trio.lowlevel.checkpoint()
        return min(stop, end)

    def fileno(self) -> int:
        return self._blob.fileno() if self._instead is None else self._instead.fileno()

    def close(self) -> None:
        self._blob.close()
        if self._instead is not None:
            self._instead.close()
