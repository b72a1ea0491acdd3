# SPDX-License-Identifier: Apache-2.0
"""What breaks in a rollout and when, as data: the named scenarios, and schedules drawn from a seed. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from bench.workloads import Workload

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

SLOW_FACTOR = 0.1
"""What a slow link has left."""
LOSS_RATIO = 0.01
"""Of what the kernel passes on as one: up to 64 KiB."""


class Kind(StrEnum):
    """What may break."""

    SCHEDULER = "scheduler killed"
    AGENTS = "agents killed"
    LEASE_HOLDER = "lease holder killed"
    ORIGIN = "origin killed"
    PARTITION = "partition"
    FREEZE = "agents frozen"
    SLOW_LINK = "slow links"
    LOSS = "packets lost"


OF_NODES = (Kind.AGENTS, Kind.PARTITION, Kind.FREEZE, Kind.SLOW_LINK, Kind.LOSS)
"""Kinds that strike some nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that breaks.

    Args:
        at: begins when this part of all bytes has arrived; None: when some agent or other has each chunk.
        until: ends when this part has; None: only `lasts_s` ends it.
        lasts_s: it ends after so long at the latest. What was killed is then started again.
        part: of the nodes that it strikes.
        nodes: those that it strikes, by place; empty until drawn.
    """

    kind: Kind
    at: float | None
    until: float | None = None
    lasts_s: float = math.inf
    part: float = 0.0
    nodes: tuple[int, ...] = ()

    def drawn(self, nodes: int, rng: Random) -> Fault:
        """Return the fault with the nodes that it strikes; at least one, where it strikes any."""
        if self.kind not in OF_NODES:
            return self
        return replace(self, nodes=tuple(sorted(rng.sample(range(nodes), max(1, round(self.part * nodes))))))

    def __str__(self) -> str:
        ends = [f"{self.until:.0%}"] if self.until is not None else []
        ends += [f"{self.lasts_s:.1f} s later"] if math.isfinite(self.lasts_s) else []
        whom = f" of {', '.join(f'node{node + 1}' for node in self.nodes)}" if self.nodes else ""
        begins = "once all chunks are out" if self.at is None else f"at {self.at:.0%}"
        return f"{self.kind}{whom} {begins}{', until ' if ends else ''}{' or '.join(ends)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Liars:
    """How many of the nodes are not what they should be, as parts of all; each kind is at least one."""

    slow: float
    stalling: float
    corrupting: float

    def counts(self, nodes: int) -> tuple[int, int, int]:
        """Return how many have a slow uplink, stall, corrupt."""
        slow, stalling, corrupting = (
            max(1, round(part * nodes)) for part in (self.slow, self.stalling, self.corrupting)
        )
        return slow, stalling, corrupting


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A rollout in which something breaks or somebody lies."""

    workload: Workload
    faults: tuple[Fault, ...] = ()
    liars: Liars | None = None

    @property
    def name(self) -> str:
        return self.workload.name


def _w6(name: str, about: str, *faults: Fault) -> Scenario:
    return Scenario(workload=Workload(name=f"W6-{name}", about=about, image_mib=128), faults=faults)


OUTAGE_S = 10.0
AGAIN_S = 1.0
"""After which a supervisor has started a killed agent again."""

_ALL = (
    Scenario(
        workload=Workload(
            name="W5", about="slow uplinks, peers that stall and peers that corrupt", nodes=20, link_mbit=25
        ),
        liars=Liars(slow=0.2, stalling=0.05, corrupting=0.05),
    ),
    _w6("scheduler", "the scheduler killed at 30%, back at 60%", Fault(kind=Kind.SCHEDULER, at=0.3, until=0.6)),
    _w6(
        "peers",
        "a quarter of the agents killed at 50%, started again after a second",
        Fault(kind=Kind.AGENTS, at=0.5, part=0.25, lasts_s=AGAIN_S),
    ),
    _w6(
        "lease-holder",
        "an agent killed while it holds leases",
        Fault(kind=Kind.LEASE_HOLDER, at=0.2, lasts_s=AGAIN_S),
    ),
    _w6("origin", "the registry killed once all chunks are out", Fault(kind=Kind.ORIGIN, at=None)),
    _w6(
        "partition",
        "half of the nodes cut off from all else for 10 s",
        Fault(kind=Kind.PARTITION, at=0.3, part=0.5, lasts_s=OUTAGE_S),
    ),
    _w6(
        "freeze",
        "a sixth of the agents stopped for 10 s",
        Fault(kind=Kind.FREEZE, at=0.3, part=1 / 6, lasts_s=OUTAGE_S),
    ),
    _w6(
        "slow-link",
        "a sixth of the links at a tenth for 10 s",
        Fault(kind=Kind.SLOW_LINK, at=0.3, part=1 / 6, lasts_s=OUTAGE_S),
    ),
    _w6(
        "loss",
        "a quarter of the nodes lose one packet of a hundred for 10 s",
        Fault(kind=Kind.LOSS, at=0.3, part=0.25, lasts_s=OUTAGE_S),
    ),
)
ALL_FAULTS = "W6-all"
NAMES = (*(scenario.name for scenario in _ALL), ALL_FAULTS)


def named(name: str) -> list[Scenario]:
    """Return the scenarios that a name of NAMES stands for."""
    return [scenario for scenario in _ALL if scenario.name == name or (name == ALL_FAULTS and scenario.faults)]


_CHAOS_FAULTS = (2, 5)
_CHAOS_LASTS_S = (0.5, 4.0)
_ALONE = (Kind.PARTITION, Kind.SCHEDULER, Kind.ORIGIN)
"""Kinds of which one at a time can be."""


def chaos(nodes: int, rng: Random) -> tuple[Fault, ...]:
    """Return a schedule of faults; the same for the same seed of `rng`, in the order in which they begin."""
    kinds: Sequence[Kind] = list(Kind)
    faults: list[Fault] = []
    for _ in range(rng.randint(*_CHAOS_FAULTS)):
        kind = rng.choice(kinds)
        kinds = [other for other in kinds if other is not kind or kind not in _ALONE]
        lasts_s = round(rng.uniform(*_CHAOS_LASTS_S), 1)
        part = rng.choice((1 / 12, 1 / 4, 1 / 2))
        faults.append(Fault(kind=kind, at=round(rng.uniform(0, 0.9), 2), lasts_s=lasts_s, part=part).drawn(nodes, rng))
    return tuple(sorted(faults, key=lambda fault: fault.at or 0.0))
