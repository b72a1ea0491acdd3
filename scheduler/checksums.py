# SPDX-License-Identifier: Apache-2.0
"""The checksums of whole blobs, kept when their swarms have ended, for those who want the blobs later. Pure.

Whoever comes when a single agent holds a blob has only that agent's word on it otherwise, and what only its sender
vouches for is not passed on: all latecomers would take the whole blob from that one agent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from p2pdist.core.types import Digest

KEPT_BYTES = 32 * 1024 * 1024
"""Of packed checksums: 4,000 blobs of 128 MiB or more."""


class Archive:
    """Packed checksums by blob, with the blob's size; the least recently used go first."""

    def __init__(self, limit_bytes: int = KEPT_BYTES) -> None:
        self._kept: dict[Digest, tuple[int, bytes]] = {}
        self._limit_bytes = limit_bytes
        self._bytes = 0

    def put(self, blob: Digest, size_bytes: int, checksums: bytes) -> None:
        """Keep a blob's checksums, one after the other, in the place of what was kept of it."""
        self._bytes += len(checksums) - len(self._kept.pop(blob, (0, b""))[1])
        self._kept[blob] = size_bytes, checksums
        while self._bytes > self._limit_bytes:
            self._bytes -= len(self._kept.pop(next(iter(self._kept)))[1])

    def get(self, blob: Digest) -> tuple[int, bytes] | None:
        """Return a blob's size in bytes and its checksums, or None."""
        kept = self._kept.pop(blob, None)
        if kept is not None:
            self._kept[blob] = kept
        return kept
