# SPDX-License-Identifier: Apache-2.0
"""Which blobs make way for a new one: pure policy, no I/O and no clock.

Owns: the order (least recently used first) and how much goes. Two watermarks keep a full store from
evicting one blob per arrival: crossing `max_bytes` evicts down to `low_bytes`. Room that cannot be made
is not half made: then nothing is evicted at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

    from p2pdist.core.types import Digest


class Evictable(Protocol):
    """A blob, whole or partial, that nobody has open."""

    @property
    def digest(self) -> Digest: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def last_used_s(self) -> float: ...


Blob = TypeVar("Blob", bound=Evictable)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much the store may hold.

    Args:
        max_bytes: the high watermark, whole and partial blobs together.
        low_bytes: where eviction stops once the high watermark is crossed, in [0, max_bytes].
        min_free_bytes: what has to stay free on the disk, >= 0.

    Raises:
        ValueError: the numbers contradict each other.
    """

    max_bytes: int
    low_bytes: int
    min_free_bytes: int

    def __post_init__(self) -> None:
        if not 0 <= self.low_bytes <= self.max_bytes or self.min_free_bytes < 0:
            raise ValueError(f"no such limits: {self}")


def plan_eviction(
    idle: Iterable[Blob], limits: Limits, *, used_bytes: int, incoming_bytes: int, free_bytes: int
) -> list[Blob] | None:
    """Return what to evict for a blob of `incoming_bytes`, in order, or None where no eviction makes room.

    Args:
        idle: what may be evicted.
        used_bytes: what the store holds now, idle or not.
        free_bytes: free on the disk now.
    """
    over_disk_bytes = incoming_bytes + limits.min_free_bytes - free_bytes
    must_bytes = max(0, used_bytes + incoming_bytes - limits.max_bytes, over_disk_bytes)
    if must_bytes == 0:
        return []
    wanted_bytes = over_disk_bytes
    if used_bytes + incoming_bytes > limits.max_bytes:
        wanted_bytes = max(wanted_bytes, used_bytes + incoming_bytes - limits.low_bytes)
    victims = oldest(idle, wanted_bytes)
    return victims if sum(victim.size_bytes for victim in victims) >= must_bytes else None


def oldest(idle: Iterable[Blob], wanted_bytes: int) -> list[Blob]:
    """Return the least recently used blobs that together have `wanted_bytes`, or all; empty blobs free nothing."""
    victims: list[Blob] = []
    for blob in sorted(idle, key=lambda blob: (blob.last_used_s, blob.digest)):
        if wanted_bytes <= 0:
            break
        if blob.size_bytes:
            victims.append(blob)
            wanted_bytes -= blob.size_bytes
    return victims
