# SPDX-License-Identifier: Apache-2.0
"""Reads runs of adjacent chunks from the origin, and passes each chunk on as soon as it is whole.

Owns the buffers that the origin's bytes come into, which are used again. Refuses to decide what is fetched
(core/lease.py), and what a failure means: that is the caller's.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import trio

from p2pdist.core.chunkmap import MAX_CHUNK_BYTES
from p2pdist.core.lease import LEASES
from p2pdist.core.runs import MAX_RUN_BYTES
from p2pdist.core.verify import checksum_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from p2pdist.arrival import Arrival
    from p2pdist.core.chunkmap import ChunkMap
    from p2pdist.exchange import Exchange
    from p2pdist.ports import Origin

BUFFER_BYTES = max(MAX_RUN_BYTES, MAX_CHUNK_BYTES)


class Run:
    """Adjacent chunks, [next, stop), that one request is to bring, and since when bytes of the next one come."""

    def __init__(self, cut: ChunkMap, start: int, stop: int) -> None:
        self.cut = cut
        self.next = start
        self.stop = stop
        self._start_bytes = cut.start(start)
        self._since: float | None = None

    @property
    def length(self) -> int:
        """Bytes of all chunks to come."""
        start, stop = (min(self.cut.start(index), self.cut.size_bytes) for index in (self.next, self.stop))
        return stop - start

    def completed(self, filled: int, now: float) -> Iterator[tuple[int, float]]:
        """Yield the chunks that the first `filled` bytes of the run complete, and how long each took."""
        since = now if self._since is None else self._since
        self._since = since
        while self.next < self.stop and self._start_bytes + filled >= self._stop_of(self.next):
            self.next += 1
            self._since = now
            yield self.next - 1, now - since
            since = now

    def _stop_of(self, index: int) -> int:
        return self.cut.start(index) + self.cut.length(index)


class RunReader:
    """Reads runs for one agent."""

    def __init__(self, origin: Origin, exchange: Exchange) -> None:
        self._origin = origin
        self._exchange = exchange
        self._buffers: list[memoryview] = []
        """Kept for the next request."""

    async def read(self, arrival: Arrival, run: Run) -> None:
        """Feed ChunkArrived for each chunk of the run, in order.

        Raises:
            OriginError: after the retries; `run` then says which chunks have not come.
        """
        # A mapping takes memory only as far as it has been filled, and no zeroing.
        buffer = self._buffers.pop() if self._buffers else memoryview(mmap.mmap(-1, BUFFER_BYTES, mmap.MAP_PRIVATE))
        start, size_bytes = run.cut.start(run.next), run.length

        def pass_on(filled: int) -> None:
            for index, taken_s in run.completed(filled, trio.current_time()):
                at = run.cut.start(index) - start
                data = buffer[at : at + run.cut.length(index)]
                self._exchange.chunk_in(arrival.digest, index, data, checksum_of(data), taken_s)

        try:
            await self._origin.fetch(
                arrival.repository,
                arrival.digest,
                start,
                buffer[:size_bytes],
                blob_bytes=run.cut.size_bytes,
                progress=pass_on,
            )
        finally:
            if len(self._buffers) < LEASES:
                self._buffers.append(buffer)
