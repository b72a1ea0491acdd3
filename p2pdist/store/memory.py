# SPDX-License-Identifier: Apache-2.0
"""A store in anonymous memory, for tests and simulations: all of `DiskStore`'s behaviour but outliving the process.

Each blob is a memfd, so that descriptors work as they do with files: one for the blob, one more per open handle.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

from p2pdist.core.types import Checksum
from p2pdist.store.base import Arrival, BaseStore
from p2pdist.store.eviction import Limits
from p2pdist.store.files import translated, write_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from p2pdist.core.chunkmap import ChunkMap
    from p2pdist.core.types import Digest
    from p2pdist.store.base import Entry
    from p2pdist.store.sidecar import Sidecar


class _Notes(dict[int, Checksum]):
    """The journal of a partial blob; stays when the handle closes."""

    def __init__(self, cut: ChunkMap, owner: str) -> None:
        self.cut = cut
        self.owner = owner

    def note(self, index: int, checksum: Checksum) -> None:
        self[index] = checksum

    def forget(self, index: int) -> None:
        self.pop(index, None)

    def close(self) -> None:
        pass


class MemoryStore(BaseStore):
    """A `ChunkStore` that ends with the process; `close` it to free its memory.

    Args:
        max_bytes, low_bytes: see `Limits`; without `low_bytes` no more is evicted than has to be.
        now, on_evicted: see `BaseStore`.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        low_bytes: int | None = None,
        now: Callable[[], float] = time.time,
        on_evicted: Callable[[Digest], None] | None = None,
    ) -> None:
        super().__init__(Limits(max_bytes, max_bytes if low_bytes is None else low_bytes, 0), now, on_evicted)
        self._stored: dict[Digest, tuple[int, Sidecar]] = {}
        self._arriving: dict[Digest, tuple[int, _Notes]] = {}

    def close(self) -> None:
        """Forget all blobs; open handles stay readable. Idempotent."""
        with self._lock:
            for entry in (*self._whole.values(), *self._partial.values()):
                self._detach(entry)
            self._whole.clear()
            self._partial.clear()

    def probe(self) -> None:
        pass

    def _free_bytes(self) -> int:
        return sys.maxsize

    def _open_whole(self, digest: Digest) -> tuple[int, Sidecar]:
        fd, sidecar = self._stored[digest]
        with translated(f"open {digest}"):
            return os.dup(fd), sidecar

    def _create(self, digest: Digest, cut: ChunkMap, owner: str) -> Arrival:
        with translated(f"make room for {digest} in memory"):
            fd = _memory(digest, cut.size_bytes)
            notes = _Notes(cut, owner)
            self._arriving[digest] = fd, notes
            return Arrival(os.dup(fd), notes, {})

    def _reopen(self, digest: Digest, cut: ChunkMap, owner: str) -> Arrival | None:
        fd, notes = self._arriving[digest]
        if (notes.cut, notes.owner) != (cut, owner):
            return None
        with translated(f"resume {digest}"):
            return Arrival(os.dup(fd), notes, dict(notes))

    def _place(self, digest: Digest, sidecar: Sidecar, admit: Callable[[], None]) -> None:
        with self._lock:
            self._replace(digest, self._arriving.pop(digest)[0], sidecar)
            admit()

    def _put(self, digest: Digest, body: bytes, sidecar: Sidecar, admit: Callable[[], None]) -> None:
        with translated(f"store {digest}"):
            fd = _memory(digest, len(body))
            write_all(fd, body, 0)
        with self._lock:
            self._replace(digest, fd, sidecar)
            admit()

    def _replace(self, digest: Digest, fd: int, sidecar: Sidecar) -> None:
        before = self._stored.get(digest)
        self._stored[digest] = fd, sidecar
        if before is not None:
            os.close(before[0])

    def _detach(self, entry: Entry) -> None:
        home: dict[Digest, tuple[int, Sidecar]] | dict[Digest, tuple[int, _Notes]]
        home = self._stored if entry.whole else self._arriving
        if (held := home.pop(entry.digest, None)) is not None:
            os.close(held[0])

    def _sweep(self) -> None:
        pass

    def _save_use(self, entry: Entry) -> None:
        pass

    def _save_check(self, entry: Entry) -> None:
        pass


def _memory(digest: Digest, size_bytes: int) -> int:
    fd = os.memfd_create(f"p2pdist {digest[:19]}", os.MFD_CLOEXEC)
    os.ftruncate(fd, size_bytes)
    return fd
