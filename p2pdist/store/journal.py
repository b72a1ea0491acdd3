# SPDX-License-Identifier: Apache-2.0
"""Which chunks of a partial blob are here: a header, then one 16-byte slot per chunk with its checksum.

The header says how the blob is cut and whose it is: what one owner left is not for another to resume.

A slot of zeros is a chunk that is not here. The slots are allocated with the file, so noting a chunk
neither grows the file nor fails on a full disk, and the journal's size is known from the start. Nothing is
synced: a slot is a claim that `recheck` proves against the data after a restart, so a torn or lost slot costs
one chunk fetched again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from typing import TYPE_CHECKING

from p2pdist.core.types import Checksum
from p2pdist.core.verify import CHECKSUM_BYTES, checksum_of
from p2pdist.store.files import create, read_all, write_all

if TYPE_CHECKING:
    from collections.abc import Iterator

    from p2pdist.core.chunkmap import ChunkMap

_HEADER = struct.Struct("<8sQQ8s")
_MAGIC = b"p2pdjnl2"
_NOT_HERE = bytes(CHECKSUM_BYTES)


class Journal:
    """The open journal of one partial blob. Every method raises OSError where the disk fails."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def create(cls, path: str, cut: ChunkMap, owner: str = "") -> Journal:
        """Start an empty journal, in the place of any that is there."""
        fd = create(path, _HEADER.size + cut.count * CHECKSUM_BYTES)
        journal = cls(fd)
        with journal.closed_on_error():
            write_all(fd, _header(cut, owner), 0)
        return journal

    @classmethod
    def reopen(cls, path: str, cut: ChunkMap, owner: str = "") -> Journal | None:
        """Open an earlier run's journal; None where it is damaged, another's or the blob was cut otherwise."""
        journal = cls(fd := os.open(path, os.O_RDWR | os.O_CLOEXEC))
        with journal.closed_on_error():
            whole = os.fstat(fd).st_size == _HEADER.size + cut.count * CHECKSUM_BYTES
            if whole and read_all(fd, 0, _HEADER.size) == _header(cut, owner):
                return journal
        journal.close()
        return None

    def noted(self, cut: ChunkMap) -> dict[int, Checksum]:
        """Return the chunks that are noted, in ascending order, with their checksums."""
        slots = read_all(self._fd, _HEADER.size, _HEADER.size + cut.count * CHECKSUM_BYTES)
        each = (slots[at : at + CHECKSUM_BYTES] for at in range(0, len(slots), CHECKSUM_BYTES))
        return {index: Checksum(slot) for index, slot in enumerate(each) if slot != _NOT_HERE}

    def note(self, index: int, checksum: Checksum) -> None:
        """Note that a chunk is here; its data was written before."""
        write_all(self._fd, checksum, _HEADER.size + index * CHECKSUM_BYTES)

    def forget(self, index: int) -> None:
        """Note that a chunk is not here."""
        self.note(index, Checksum(_NOT_HERE))

    @contextlib.contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Close the file if the block raises."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file; idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _header(cut: ChunkMap, owner: str) -> bytes:
    tag = hashlib.sha256(owner.encode()).digest()[:8] if owner else bytes(8)
    return _HEADER.pack(_MAGIC, cut.size_bytes, cut.chunk_bytes, tag)


def recheck(fd: int, cut: ChunkMap, noted: dict[int, Checksum]) -> dict[int, Checksum]:
    """Return those of the noted chunks whose bytes in the file still have their checksum; unreadable ones do not."""
    right: dict[int, Checksum] = {}
    for index, checksum in noted.items():
        start = cut.start(index)
        with contextlib.suppress(OSError):
            if checksum_of(read_all(fd, start, start + cut.length(index))) == checksum:
                right[index] = checksum
    return right
