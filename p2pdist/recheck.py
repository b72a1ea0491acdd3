# SPDX-License-Identifier: Apache-2.0
"""Finds the chunks that made a blob's SHA-256 wrong: suspects are read again from the origin until it is right.

Suspects are what did not come from the origin in this run: first those that peers dispute, then what rests on the word
of one who was wrong already, and the others in turn (core/lease.py). Where a whole swarm was led astray by one lease
holder, its members so look in different places at the same time, and what one of them finds reaches the others, by way
of the scheduler, who has it looked into, or as a dispute (core/hearing.py): together they read about the blob once, and
not once each.

Invariants: no suspect is given to a reader before it was read again; each round reads at least one more chunk, so it
ends; what the origin itself gives wrong ends the pull.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

import structlog
import trio

from p2pdist.core import events as ev
from p2pdist.core.chunkmap import chunk_set
from p2pdist.core.verify import checksum_of
from p2pdist.errors import IntegrityError, OriginError, StoreError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from p2pdist.arrival import Arrival
    from p2pdist.core.chunkmap import ChunkMap
    from p2pdist.core.types import Checksum, Digest
    from p2pdist.exchange import Exchange
    from p2pdist.ports import Origin

log = structlog.get_logger(__name__)


class Keeper(Protocol):
    """Who keeps the arrivals (puller.py)."""

    def forget(self, blob: Digest, indices: list[int]) -> None: ...

    def cancel(self, arrival: Arrival, cause: Exception) -> None:
        """End the pull; what is left of the blob stays for a later one."""


class Recheck:
    """Reads suspects again."""

    def __init__(self, origin: Origin, exchange: Exchange, keeper: Keeper) -> None:
        self._origin = origin
        self._exchange = exchange
        self._keeper = keeper

    async def run(self, arrival: Arrival) -> None:
        """Look for wrong chunks until one is found, a better word finds one, or the origin proves wrong itself."""
        assert arrival.chunks is not None
        progress = self._exchange.machine.blobs.get(arrival.digest)
        if progress is None:
            return
        changed = await trio.to_thread.run_sync(
            _changed_on_disk, arrival.descriptor(), arrival.chunks, dict(progress.own)
        )
        if changed:
            disk = StoreError(f"the disk gives back other bytes of {arrival.digest} than were written; check it")
            self._give_up(arrival, changed, disk)
            return
        suspects = [index for index in range(arrival.chunks.count) if index not in arrival.origin_chunks]
        log.warning("the blob's SHA-256 is wrong; suspects are read again", blob=arrival.digest, chunks=len(suspects))
        arrival.suspects = chunk_set(suspects)
        suspects = self._exchange.machine.in_turn(arrival.digest, suspects)
        self._exchange.feed(ev.BlobRejected(blob=arrival.digest, indices=[]))
        try:
            while self._goes_on(arrival):
                suspects = [index for index in suspects if index not in arrival.origin_chunks]
                if not suspects:
                    self._give_up(arrival, list(range(arrival.chunks.count)), _wrong_content(arrival))
                    return
                await self._read(arrival, self._exchange.machine.most_suspect(arrival.digest, suspects))
        except OriginError as error:
            left = [index for index in suspects if index not in arrival.origin_chunks]
            self._give_up(arrival, left, error)

    def _goes_on(self, arrival: Arrival) -> bool:
        """Whether the blob is complete and wrong still: else its pull goes on, and it is checked again at the end."""
        progress = self._exchange.machine.blobs.get(arrival.digest)
        return (
            progress is not None
            and progress.complete
            and not (progress.checking or arrival.verified or arrival.settled.is_set())
        )

    async def _read(self, arrival: Arrival, index: int) -> None:
        """Read a chunk again, which takes the place of one that differs. Raises OriginError."""
        cut = arrival.chunks
        assert cut is not None
        data = memoryview(bytearray(cut.length(index)))
        await self._origin.fetch(
            arrival.repository,
            arrival.digest,
            cut.start(index),
            data,
            blob_bytes=cut.size_bytes,
            progress=lambda _count: None,
        )
        if not self._goes_on(arrival):
            return
        arrival.origin_chunks.add(index)
        self._exchange.chunk_in(arrival.digest, index, data, checksum_of(data))
        if self._goes_on(arrival):
            arrival.suspects &= ~(1 << index)
            arrival.wake()

    def _give_up(self, arrival: Arrival, wrong: list[int], cause: Exception) -> None:
        """Fail the pull and throw away what nobody can vouch for."""
        self._keeper.forget(arrival.digest, wrong)
        self._keeper.cancel(arrival, cause)


def _wrong_content(arrival: Arrival) -> IntegrityError:
    return IntegrityError(
        f"{arrival.repository} at its origin serves content for {arrival.digest} that does not match the digest",
        expected=arrival.digest,
    )


def _changed_on_disk(file: int, cut: ChunkMap, own: Mapping[int, Checksum]) -> list[int]:
    """Return the chunks that are not as they were written, for which no sender is to blame. Blocking; closes `file`."""
    try:
        return [
            index
            for index in range(cut.count)
            if checksum_of(os.pread(file, cut.length(index), cut.start(index))) != own.get(index)
        ]
    finally:
        os.close(file)
