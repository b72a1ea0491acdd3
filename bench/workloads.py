# SPDX-License-Identifier: Apache-2.0
"""The workloads by name, as data: what each asks of a swarm and with which sizes. Pure.

The sizes suit a machine with two cores; each can be changed from the command line without becoming another workload.
A name without its part (W2) stands for all of its parts, one after another.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.arrivals import Arrivals


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One shape of lab, image and arrivals. Rates in Mbit/s, both ways.

    Args:
        origin_mbit: the registry's link; None for as the nodes'.
        origin_per_connection_mbit: what the registry limits each connection to; None for no limit.
        batches: the part of the nodes that starts at once, the next when these are done; 1 for all.
        poisson_s: mean gap between one node's start and the next's; None for `jitter_s` instead.
        shared: the part of the image's bytes that nodes have from an image pulled before; None for a first pull.
        racks: 0 for one switch; else nodes in so many racks behind uplinks of `rack_uplink_mbit`.
    """

    name: str = "custom"
    about: str = ""
    nodes: int = 12
    link_mbit: float = 50.0
    origin_mbit: float | None = None
    origin_per_connection_mbit: float | None = None
    image_mib: int = 64
    layers: int = 5
    jitter_s: float = 1.0
    batches: float = 1.0
    poisson_s: float | None = None
    shared: float | None = None
    racks: int = 0
    rack_uplink_mbit: float | None = None

    @property
    def title(self) -> str:
        return f"{self.name}: {self.about}" if self.about else self.name

    @property
    def arrivals(self) -> Arrivals:
        return Arrivals(jitter_s=self.jitter_s, batch_ratio=self.batches, poisson_gap_s=self.poisson_s)

    @property
    def shared_layers(self) -> int:
        """How many layers, from the first on, nodes have from before; never all of them."""
        return min(self.layers - 1, round(self.layers * (self.shared or 0.0)))


CUSTOM = Workload(link_mbit=100.0, layers=3, jitter_s=0.0)
"""What is measured where no workload is named."""

_ALL = (
    Workload(name="W1", about="a cold crowd: all nodes want one image within a second", image_mib=128),
    Workload(name="W2-slow", about="a registry behind a slow link", origin_mbit=10, image_mib=32),
    Workload(name="W2-fast", about="a registry with ten times a node's link", origin_mbit=500),
    Workload(name="W2-limited", about="a registry that limits each connection", origin_per_connection_mbit=5),
    Workload(name="W3-batches", about="a rolling update, a fifth of the nodes at a time", nodes=10, batches=0.2),
    Workload(name="W3-poisson", about="nodes that join one by one", nodes=10, poisson_s=2.0, jitter_s=0),
    Workload(name="W4-upgrade", about="nodes have four fifths from before", layers=10, shared=0.8, image_mib=160),
    Workload(name="W4-layers", about="many small layers", image_mib=60, layers=60),
    Workload(name="W4-small", about="a small image", image_mib=10),
    Workload(name="W7", about="racks behind shared uplinks", nodes=16, racks=4, rack_uplink_mbit=100),
)

NAMES = tuple(dict.fromkeys(name for workload in _ALL for name in (workload.name.partition("-")[0], workload.name)))


def named(name: str) -> list[Workload]:
    """Return the workloads that a name of NAMES stands for."""
    return [workload for workload in _ALL if workload.name == name or workload.name.partition("-")[0] == name]
