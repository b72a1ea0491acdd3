# SPDX-License-Identifier: Apache-2.0
"""Gives peers chunks of what is stored or on its way, once it is known that they may have them and that they are right.

Refuses to decide who gets what and when (core/serve.py). Invariants: a stored chunk that was not checked lately is
compared with its checksum before it goes out; a blob whose origin takes it back is withdrawn.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import structlog
import trio

from p2pdist.core import events as ev
from p2pdist.core.chunkmap import ChunkMap
from p2pdist.errors import IntegrityError, StoreError
from p2pdist.exchange import LATER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from p2pdist.arrival import Arrival
    from p2pdist.core.types import Digest, Repository
    from p2pdist.exchange import ChunkSource, Exchange
    from p2pdist.ports import ChunkStore, Sharing, StoredBlob

log = structlog.get_logger(__name__)


class Seeder:
    """Answers the exchange for the node's own content."""

    def __init__(
        self,
        store: ChunkStore,
        exchange: Exchange,
        nursery: trio.Nursery,
        arrivals: Mapping[Digest, Arrival],
        *,
        sharing: Sharing,
    ) -> None:
        self._store = store
        self._exchange = exchange
        self._nursery = nursery
        self._arrivals = arrivals
        self._sharing = sharing
        self._proving: set[Digest] = set()
        self._checking: set[tuple[Digest, int]] = set()

    def chunk_source(self, blob: Digest, index: int) -> ChunkSource | None:
        """As the exchange asks; raises StoreError."""
        arrival = self._arrivals.get(blob)
        if arrival is not None and arrival.partial is not None and arrival.chunks is not None:
            if not arrival.have >> index & 1:
                return None  # it was stored, and arrives again
            cut = arrival.chunks
            descriptor = arrival.descriptor()
            return descriptor, cut.start(index), cut.length(index), lambda: os.close(descriptor)
        stored = self._store.open(blob)
        if stored is None:
            self._exchange.feed(ev.BlobEvicted(blob=blob))
            return None
        if not stored.right >> index & 1:
            self._check_first(stored, index)
            return LATER
        cut = ChunkMap(stored.size_bytes, stored.chunk_bytes)
        return stored.fileno(), cut.start(index), cut.length(index), stored.close

    def _check_first(self, stored: StoredBlob, index: int) -> None:
        if (stored.digest, index) in self._checking:
            stored.close()
            return
        self._checking.add((stored.digest, index))
        self._nursery.start_soon(self._check, stored, index)

    async def _check(self, stored: StoredBlob, index: int) -> None:
        """Check a chunk that peers wait for; send it to them, or give up the blob."""
        blob, right = stored.digest, False
        try:
            await trio.to_thread.run_sync(stored.check, index)
            right = True
        except IntegrityError as error:
            log.debug("chunk not sent to a peer", blob=blob, index=index, why=str(error))
        finally:
            self._checking.discard((blob, index))
            stored.close()
        if right or blob not in self._arrivals:
            self._exchange.clear(blob, allowed=right)
        else:  # a runtime met the damage first, and it is being pulled
            self._exchange.refuse_held(blob)

    def look_up(self, blob: Digest) -> None:
        """As the exchange asks."""
        if self.cleared(blob):
            self._offer_stored(blob)

    def cleared(self, blob: Digest) -> bool:
        """As the exchange asks."""
        home, arrival = self._store.home(blob), self._arrivals.get(blob)
        if home is None or (arrival is not None and arrival.partial is not None):
            return True  # What is on its way is shared or in no swarm; what is gone is found to be so.
        if not home.shared:
            allowed: bool | None = False
        else:
            allowed = True if home.repository is None else self._sharing.may_give(home.repository)
        if allowed is None and home.repository is not None:
            if blob not in self._proving:
                self._proving.add(blob)
                self._nursery.start_soon(self._prove, blob, home.repository)
        elif not allowed:
            self._exchange.clear(blob, allowed=False)
        return bool(allowed)

    async def _prove(self, blob: Digest, repository: Repository) -> None:
        """Find out whether peers may still have a blob, and give it to those that wait for it, or withdraw it."""
        allowed = False
        try:
            stored = self._store.open(blob)
            if stored is not None:
                stored.close()
                allowed = await self._sharing.prove(repository, blob, manifest=bool(stored.media_type))
        except StoreError as error:
            log.error("stored blob not read", blob=blob, why=str(error))
        finally:
            self._proving.discard(blob)
        if allowed:
            self._offer_stored(blob)
        else:
            log.info("not given to peers any more: its origin does not give it to everybody", image=str(repository))
        self._exchange.clear(blob, allowed=allowed)

    def _offer_stored(self, blob: Digest) -> None:
        try:
            stored = self._store.open(blob)
        except StoreError as error:
            log.error("stored blob not read", blob=blob, why=str(error))
            return
        if stored is None:
            return
        try:
            if blob not in self._exchange.machine.blobs:
                self._exchange.feed(
                    ev.BlobStored(
                        blob=blob,
                        size_bytes=stored.size_bytes,
                        media_type=stored.media_type,
                        checksums=tuple(stored.checksums),
                    )
                )
        finally:
            stored.close()
