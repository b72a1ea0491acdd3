# SPDX-License-Identifier: Apache-2.0
"""How a blob is cut into chunks, and sets of chunks as integers.

A set of chunks is a plain `int` whose bit i stands for chunk i: union, difference and emptiness of
512 chunks cost about 0.1 µs each, a tenth of what a `set` costs. All agents of a cluster must cut a
blob alike without asking each other, so the cut depends on the blob's size alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MIN_CHUNK_BYTES = 256 * 1024
"""Below this the cost per chunk (about 1 ms of CPU in all) outweighs the shorter tail."""
MAX_CHUNK_BYTES = 4 * 1024 * 1024
"""Bounds the buffers: each chunk in flight is held in memory once."""
CHUNKS_PER_BLOB = 512
"""The aim: the last node trails by about log2(nodes) chunk times, 2% of 512 for 1,000 nodes."""
MAX_BLOB_BYTES = 256 * 1024**3
"""65,536 chunks of 4 MiB: bounds bitmaps (8 KiB) and checksum lists (1 MiB) that peers send."""


def chunk_bytes_for(size_bytes: int) -> int:
    """Return the chunk size of a blob: a power of two in [MIN_CHUNK_BYTES, MAX_CHUNK_BYTES]."""
    aim = -(-size_bytes // CHUNKS_PER_BLOB)
    return min(max(MIN_CHUNK_BYTES, 1 << (aim - 1).bit_length() if aim > 1 else 1), MAX_CHUNK_BYTES)


@dataclass(frozen=True, slots=True)
class ChunkMap:
    """The cut of one blob: chunk i is bytes [i * chunk_bytes, min((i + 1) * chunk_bytes, size_bytes))."""

    size_bytes: int
    chunk_bytes: int
    count: int = field(init=False)
    full: int = field(init=False)
    """The set of all chunks."""

    def __post_init__(self) -> None:
        if self.size_bytes < 0 or self.chunk_bytes <= 0:
            raise ValueError(f"no such cut: {self.size_bytes} bytes by {self.chunk_bytes}")
        object.__setattr__(self, "count", -(-self.size_bytes // self.chunk_bytes))
        object.__setattr__(self, "full", (1 << self.count) - 1)

    @classmethod
    def of(cls, size_bytes: int) -> ChunkMap:
        """Return the cut that every agent makes of a blob of this size."""
        return cls(size_bytes, chunk_bytes_for(size_bytes))

    def start(self, index: int) -> int:
        return index * self.chunk_bytes

    def length(self, index: int) -> int:
        """Return the chunk's size in bytes; only the last may be shorter."""
        return min(self.chunk_bytes, self.size_bytes - index * self.chunk_bytes)

    def covering(self, start: int, stop: int) -> range:
        """Return the indices of the chunks that overlap bytes [start, stop) of the blob.

        Raises:
            ValueError: the span is empty or not within the blob.
        """
        if not 0 <= start < stop <= self.size_bytes:
            raise ValueError(f"bytes [{start}, {stop}) of a blob of {self.size_bytes}")
        return range(start // self.chunk_bytes, -(-stop // self.chunk_bytes))

    def contiguous_stop(self, have: int, index: int) -> int:
        """Return the byte where the unbroken run of chunks in `have` from `index` on ends."""
        missing = ~(have >> index)
        run = (missing & -missing).bit_length() - 1
        return min((index + run) * self.chunk_bytes, self.size_bytes)


def chunk_set(indices: Iterable[int]) -> int:
    """Return the set of these chunks."""
    bits = 0
    for index in indices:
        bits |= 1 << index
    return bits


def members(bits: int) -> Iterator[int]:
    """Yield the chunks of a set in ascending order."""
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low


def lowest(bits: int) -> int:
    """Return the first chunk of a set that is not empty."""
    return (bits & -bits).bit_length() - 1


def to_bytes(bits: int, count: int) -> bytes:
    """Return the set as a bitmap of `count` bits, little-endian in both bytes and bits."""
    return bits.to_bytes((count + 7) // 8, "little")


def from_bytes(bitmap: bytes, count: int) -> int:
    """Return the set that a bitmap holds.

    Raises:
        ValueError: the bitmap is of another length or names chunks past `count`.
    """
    bits = int.from_bytes(bitmap, "little")
    if len(bitmap) != (count + 7) // 8 or bits >> count:
        raise ValueError(f"a bitmap of {len(bitmap)} bytes for {count} chunks")
    return bits
