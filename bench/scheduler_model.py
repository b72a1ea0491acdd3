# SPDX-License-Identifier: Apache-2.0
"""What simulated agents pull: an image, an origin of some speed, and when an agent would have which blob. Pure.

No chunk moves: a leased chunk takes its time at the origin, a blob is complete at an agent when its link could have
brought it and the swarm has its last chunk. What the scheduler sees of an agent is what a real one would tell it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from p2pdist.core.chunkmap import ChunkMap
from p2pdist.core.types import Checksum, Digest, PeerId

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

REGISTRY, REPOSITORY, TAG = "registry.lab", "bench/image", "latest"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_MANIFEST_BYTES, _CONFIG_BYTES = 1500, 6000

ORIGIN_LATENCY_S = 0.05
"""From a request to its answer's first byte: a registry in the same country."""
SLOW_FETCH_RATIO, SLOW_FETCH_S = 0.005, 6.0
"""So many leases take so much longer, and are renewed."""
TRAIL_S = (0.2, 1.5)
"""From the last chunk's arrival from the origin until an agent has it: some hops of a few hundred ms."""
CHURN_RATIO, CHURN_WITHIN_S, AWAY_S = 0.02, 10.0, 1.0
"""So many agents hang up within so long after their start, half of them without a word, and come back."""
MISSING_RATIO, MISSING_AFTER_S, MISSING_CHUNKS = 0.01, 2.5, 4
"""So many agents report chunks that no neighbour of theirs has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run. Agents start at random within `spread_s`; rates are in Mbit/s."""

    agents: int
    image_bytes: int
    layers: int
    spread_s: float
    origin_mbit: float
    link_mbit: float
    seed: int


@dataclass(slots=True)
class Blob:
    """A blob of the image, and what the swarm as a whole has of it."""

    digest: Digest
    chunks: ChunkMap
    done: set[int] = field(default_factory=set)
    leased: set[int] = field(default_factory=set)
    joined: bool = False

    @property
    def complete(self) -> bool:
        return len(self.done) == self.chunks.count

    @property
    def leasable(self) -> bool:
        """Whether the scheduler has a chunk of it to lease."""
        return self.joined and len(self.leased) < self.chunks.count

    def checksum(self, index: int) -> Checksum:
        return Checksum(hashlib.md5(f"{self.digest}/{index}".encode(), usedforsecurity=False).digest())


class Image:
    """A manifest, a config and layers of equal size."""

    def __init__(self, plan: Plan) -> None:
        layer_bytes = plan.image_bytes // plan.layers
        self.manifest = _blob(plan.seed, "manifest", _MANIFEST_BYTES)
        self.contents = [_blob(plan.seed, "config", _CONFIG_BYTES)]
        self.contents += [_blob(plan.seed, f"layer {number}", layer_bytes) for number in range(plan.layers)]
        self.blobs = {blob.digest: blob for blob in [self.manifest, *self.contents]}

    @property
    def leasable(self) -> bool:
        return any(blob.leasable for blob in self.blobs.values())


def _blob(seed: int, name: str, size_bytes: int) -> Blob:
    digest = hashlib.sha256(f"{seed} {name}".encode()).hexdigest()
    return Blob(Digest(f"sha256:{digest}"), ChunkMap.of(size_bytes))


class Origin:
    """Serves chunks one after another at its rate."""

    def __init__(self, mbit: float, rng: Random) -> None:
        self._bytes_per_s = mbit * 1e6 / 8
        self._free_at = 0.0
        self._rng = rng

    def fetch(self, size_bytes: int, now: float) -> float:
        """Return when a fetch that begins now is complete."""
        self._free_at = max(self._free_at, now) + size_bytes / self._bytes_per_s
        slow_s = SLOW_FETCH_S if self._rng.random() < SLOW_FETCH_RATIO else 0.0
        return self._free_at + ORIGIN_LATENCY_S + slow_s


def arrival_s(plan: Plan, blob: Blob, before: Sequence[Blob]) -> float:
    """Return how long after its join an agent's link has brought `blob`, and what it pulls `before` that."""
    size_bytes = blob.chunks.size_bytes + sum(other.chunks.size_bytes for other in before)
    return ORIGIN_LATENCY_S + size_bytes * 8 / (plan.link_mbit * 1e6)


def longest_s(plan: Plan) -> float:
    """Return how long agents, origin and links take where nothing else takes time."""
    return plan.spread_s + plan.image_bytes * 8 / (min(plan.origin_mbit, plan.link_mbit) * 1e6)


def peer_id(number: int) -> PeerId:
    return PeerId(hashlib.md5(f"agent {number}".encode(), usedforsecurity=False).hexdigest())
