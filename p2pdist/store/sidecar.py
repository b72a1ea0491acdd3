# SPDX-License-Identifier: Apache-2.0
"""What is known of a stored blob besides its bytes, and its form on disk. No I/O.

The form is a msgpack map followed by the xxh3-128 of that map, so that a sidecar that was cut short or
has rotted is never taken for a whole one. A version that is not ours counts as damage: the store is a
cache, and the blob is fetched again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgpack

from p2pdist.core.types import Checksum
from p2pdist.core.verify import CHECKSUM_BYTES, checksum_of

_VERSION = 2
_REMEMBERED = 32
"""Sidecars that are not decoded again: a runtime opens a blob once for each range, and 512 checksums take 0.1 ms."""


@dataclass(frozen=True, slots=True)
class Sidecar:
    """The metadata of one whole blob; the fields are those of `StoredBlob`."""

    size_bytes: int
    media_type: str
    public: bool
    chunk_bytes: int
    checksums: tuple[Checksum, ...]
    home: str = ""
    """`str` of the repository that it was pulled from."""


def encode(sidecar: Sidecar) -> bytes:
    """Return the sidecar's form on disk."""
    packed: bytes = msgpack.packb(
        {
            "version": _VERSION,
            "size_bytes": sidecar.size_bytes,
            "media_type": sidecar.media_type,
            "public": sidecar.public,
            "chunk_bytes": sidecar.chunk_bytes,
            "checksums": b"".join(sidecar.checksums),
            "home": sidecar.home,
        }
    )
    return packed + checksum_of(packed)


@lru_cache(maxsize=_REMEMBERED)
def decode(encoded: bytes) -> Sidecar:
    """Return the sidecar that `encode` made.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    packed, seal = encoded[:-CHECKSUM_BYTES], encoded[-CHECKSUM_BYTES:]
    if not packed or checksum_of(packed) != seal:
        raise ValueError("its sidecar is damaged")
    fields: Any = msgpack.unpackb(packed)
    if fields.pop("version") != _VERSION:
        raise ValueError("its sidecar is of another version")
    joined = fields.pop("checksums")
    checksums = tuple(Checksum(joined[at : at + CHECKSUM_BYTES]) for at in range(0, len(joined), CHECKSUM_BYTES))
    return Sidecar(checksums=checksums, **fields)
