# SPDX-License-Identifier: Apache-2.0
"""Blobs to store in tests, and how to get one in whole."""

from __future__ import annotations

import hashlib
import os
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2pdist.core.types import Digest, parse_digest
from p2pdist.core.verify import checksum_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from p2pdist.core.types import Checksum
    from p2pdist.ports import ChunkStore, PartialBlob

CHUNK_BYTES = 1000


@dataclass(frozen=True)
class Content:
    """A blob's bytes, and its chunks."""

    body: bytes
    chunk_bytes: int = CHUNK_BYTES
    algorithm: str = "sha256"

    @property
    def digest(self) -> Digest:
        return parse_digest(f"{self.algorithm}:{hashlib.new(self.algorithm, self.body).hexdigest()}")

    @property
    def count(self) -> int:
        return -(-len(self.body) // self.chunk_bytes)

    @property
    def checksums(self) -> tuple[Checksum, ...]:
        return tuple(checksum_of(self.chunk(index)) for index in range(self.count))

    def chunk(self, index: int) -> bytes:
        return self.body[index * self.chunk_bytes :][: self.chunk_bytes]

    def start(self, store: ChunkStore) -> PartialBlob:
        return store.start(self.digest, len(self.body), self.chunk_bytes)

    def write(self, partial: PartialBlob, indices: Iterable[int] | None = None) -> None:
        for index in range(self.count) if indices is None else indices:
            partial.write_chunk(index, self.chunk(index), checksum_of(self.chunk(index)))

    def store(self, store: ChunkStore, *, media_type: str = "", public: bool = True) -> Digest:
        """Take the blob through a whole arrival; leave nothing open."""
        partial = self.start(store)
        self.write(partial)
        partial.hash_prefix()
        partial.commit(media_type=media_type, public=public).close()
        partial.close()
        return self.digest


def content(name: int, size_bytes: int = 4500) -> Content:
    """Return the blob of this name: always the same bytes, other than those of any other name."""
    return Content(random.Random(name).randbytes(size_bytes))


def read(store: ChunkStore, digest: Digest) -> bytes | None:
    """Return a stored blob's bytes, or None where it is not here."""
    blob = store.open(digest)
    if blob is None:
        return None
    body = blob.read(0, blob.size_bytes)
    blob.close()
    return body


def descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))
