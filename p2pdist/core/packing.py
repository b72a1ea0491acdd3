# SPDX-License-Identifier: Apache-2.0
"""Chunk indices and checksums as bytes: what messages of thousands of them hold in the place of lists.

What comes from others is checked here and raises RemoteProtocolError.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from p2pdist.core.types import Checksum
from p2pdist.core.verify import CHECKSUM_BYTES
from p2pdist.errors import RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Sequence

INDEX_BYTES = 4


def pack_indices(indices: Sequence[int]) -> bytes:
    """Return chunk indices as 4-byte little-endian numbers."""
    return struct.pack(f"<{len(indices)}I", *indices)


def unpack_indices(data: bytes, count: int) -> list[int]:
    """Return packed chunk indices, each < count.

    Raises:
        RemoteProtocolError: not whole numbers of 4 bytes, or one out of range.
    """
    if len(data) % 4:
        raise RemoteProtocolError("chunk indices cut short")
    indices = list(struct.unpack(f"<{len(data) // 4}I", data))
    if indices and max(indices) >= count:
        raise RemoteProtocolError(f"chunk {max(indices)} of a blob of {count}")
    return indices


def check_checksums(data: bytes, count: int) -> None:
    """Raise RemoteProtocolError where these are not so many checksums."""
    if len(data) != count * CHECKSUM_BYTES:
        raise RemoteProtocolError(f"{len(data)} bytes of checksums for {count} chunks")


def unpack_checksums(data: bytes, count: int) -> list[Checksum]:
    """Return `count` checksums; raises RemoteProtocolError on another length."""
    check_checksums(data, count)
    return [Checksum(data[at : at + CHECKSUM_BYTES]) for at in range(0, len(data), CHECKSUM_BYTES)]
