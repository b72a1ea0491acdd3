# SPDX-License-Identifier: Apache-2.0
"""What is simulated, and what came of it: plain data and the bound. Pure; times in virtual seconds."""

from __future__ import annotations

from dataclasses import dataclass

from bench.arrivals import Arrivals

MBIT = 1e6 / 8
MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One swarm. Each node has a link of its own, both ways, and the origin another.

    Args:
        layers: blobs of equal size; production cuts each into chunks by its size.
        latency_s: from saying something to its being acted on, one way: wire, queues and wakeup.
        resolve_s: from a node's start to its knowing the image's layers.
        origin_s: from asking the origin for a chunk to its first byte, beyond the two ways.
        check_s: from a layer's last chunk to its digest being known right.
        unsent_bytes: what a sender's kernel may still hold of a chunk when its slot is free again.
        tick_s: between two looks at timers in an agent that is busy. Production: 0.1.
        slow_ratio, slow_factor: this part of the nodes has links of so many times the rate.
        slow_uplinks: of these nodes only what they send is slow; they receive like the others.
        leave_per_minute: this part of the nodes leaves each minute, those that are done alike.
        replaced: whether for each that leaves a new one with nothing joins, as long as first ones are not done.
        racks: 0 for none; else so many, each behind an uplink of `rack_mbit` both ways.
        scheduler: whether there is one; without it the agents have found each other before the first start.
        poisson_s: mean gap between one node's start and the next's; None for `jitter_s` instead.
    """

    nodes: int = 1000
    link_mbit: float = 50.0
    origin_mbit: float | None = None
    origin_per_connection_mbit: float | None = None
    image_mib: float = 64.0
    layers: int = 1
    degree: int = 20
    jitter_s: float = 1.0
    latency_s: float = 0.005
    resolve_s: float = 0.02
    origin_s: float = 0.005
    check_s: float = 0.01
    unsent_bytes: int = 64 << 10
    tick_s: float = 0.1
    slow_ratio: float = 0.0
    slow_factor: float = 0.1
    slow_uplinks: bool = False
    leave_per_minute: float = 0.0
    replaced: bool = False
    racks: int = 0
    rack_mbit: float | None = None
    scheduler: bool = True
    poisson_s: float | None = None
    seed: int = 1
    limit_s: float = 3600.0

    @property
    def layer_bytes(self) -> int:
        return round(self.image_mib * MIB / self.layers)

    @property
    def image_bytes(self) -> int:
        return self.layer_bytes * self.layers

    @property
    def origin_rate(self) -> float:
        return (self.origin_mbit or self.link_mbit) * MBIT

    @property
    def arrivals(self) -> Arrivals:
        return Arrivals(jitter_s=self.jitter_s, poisson_gap_s=self.poisson_s)

    @property
    def rack_rate(self) -> float | None:
        return self.rack_mbit * MBIT if self.racks and self.rack_mbit else None

    def swarm_s(self, rates: list[float]) -> float:
        """Return what the image takes at least from the first start on, however fast one's own link is.

        Args:
            rates: at which all nodes send.
        """
        image, together = self.image_bytes, len(rates) * self.image_bytes / (self.origin_rate + sum(rates))
        return max(image / self.origin_rate, together, image / self.rack_rate if self.rack_rate else 0.0)


LIKE_LAB = Plan(nodes=12, image_mib=128.0, layers=5)
"""W1 of `bench rollout`, whose links `link_mbit` then stands for in goodput."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The figures of one simulation. Ratios of times are each node's own time over the least that it could take."""

    nodes: int
    seed: int
    failed: int
    left: int
    last_s: float
    ratio_last: float
    ratio_p99: float
    ratio_p50: float
    late_ratio: float | None
    """Of the slowest joiner: its own time over what its own link takes; None where none joins late."""
    origin_egress_ratio: float
    duplicate_bytes_ratio: float
    """Chunks that came twice, and what was sent of chunks that were called off, over all that was delivered."""
    scheduler_in_per_node: float
    scheduler_out_per_node: float
    control_bytes_per_node: float
    """Sent to peers and to the scheduler."""
    grants_per_chunk: float
    declined_ratio: float
    late_chunks: int
    transfers: int
    events: int
    wall_s: float

    @property
    def events_per_s(self) -> float:
        return self.events / self.wall_s if self.wall_s else 0.0
