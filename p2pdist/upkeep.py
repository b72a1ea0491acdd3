# SPDX-License-Identifier: Apache-2.0
"""Looks after the store: reads all blobs once in a while, and sees whether the disk still takes bytes.

What is found damaged is dropped by the store and fetched again when somebody asks for it. Reading is limited, so that
pulls have the disk; it begins with what was not read for longest, and goes on there after a restart.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import structlog
import trio

from p2pdist.core.chunkmap import ChunkMap
from p2pdist.errors import IntegrityError, StoreError

if TYPE_CHECKING:
    from p2pdist.core.rate import TokenBucket
    from p2pdist.core.types import Digest
    from p2pdist.ports import ChunkStore

log = structlog.get_logger(__name__)

LOOK_S = 60.0
"""Between two looks at what is due, and at the disk."""


class Upkeep:
    """Looks after one store.

    Attributes:
        every_s: each blob is read once in so many seconds; 0: none is.
        limit: on what is read per second; None: no limit. Both may be replaced at any time.
        failing: why the disk takes no bytes; None where it does, as far as is known.
    """

    def __init__(self, store: ChunkStore, *, every_s: float, limit: TokenBucket | None) -> None:
        self._store = store
        self.every_s = every_s
        self.limit = limit
        self.failing: str | None = None

    async def run(self) -> None:
        """Look after it until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._probe_over_and_over)
            while True:
                await trio.sleep(LOOK_S)
                if self.every_s:
                    for digest in self._store.unchecked(self.every_s):
                        await self._scrub(digest)

    async def _scrub(self, digest: Digest) -> None:
        """Read one blob from the disk and compare each chunk with its checksum."""
        try:
            blob = self._store.inspect(digest)
        except StoreError as error:
            log.warning("stored blob not checked", blob=digest, why=str(error))
            return
        if blob is None:
            return
        cut = ChunkMap(blob.size_bytes, blob.chunk_bytes)
        try:
            for index in range(cut.count):
                if self.limit is not None:
                    await trio.sleep_until(self.limit.reserve(cut.length(index), trio.current_time()))
                await trio.to_thread.run_sync(functools.partial(blob.check, index, on_disk=True))
            blob.found_whole()
        except IntegrityError as error:
            log.debug("the check of a stored blob ended", blob=digest, why=str(error))
        finally:
            blob.close()

    async def _probe_over_and_over(self) -> None:
        while True:
            await self._probe()
            await trio.sleep(LOOK_S)

    async def _probe(self) -> None:
        failing = None
        try:
            await trio.to_thread.run_sync(self._store.probe)
        except StoreError as error:
            failing = str(error)
        if failing is not None and self.failing is None:
            log.error("the disk takes no bytes: only what is stored can be served", why=failing)
        if failing is None and self.failing is not None:
            log.info("the disk takes bytes again")
        self.failing = failing
