# SPDX-License-Identifier: Apache-2.0
"""What a rollout came to: figures from records, pure; the JSON keys are part of the command-line contract.

Times of nodes count from the start of the rollout; those named `own_` from the node's own start, which differs
where arrivals are spread. A node is held against the larger of what its link needs and what the origin needs for
the image from the start of the rollout on: nobody can be done before that has given everything once.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

IDLE_MIN_RATIO = 0.25
"""With less idle CPU than this the machine, not the network, was measured: the run is void."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """One node's pull, in seconds from the start of the rollout."""

    started_s: float
    finished_s: float
    right: bool
    ttfb_s: Sequence[float] = ()
    error: str | None = None
    late: bool = False
    """Whether others had a chance to get ahead of it: a joiner, or in a later batch."""

    @property
    def own_s(self) -> float:
        return self.finished_s - self.started_s


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentRecord:
    """What one agent, or another system's process, has spent; bytes as its `/status` counts them."""

    cpu_s: float
    peak_rss_mib: float
    control_bytes: int = 0
    duplicate_bytes: int = 0
    from_peers_bytes: int = 0
    from_origin_bytes: int = 0

    def since(self, before: AgentRecord) -> AgentRecord:
        """Return what was spent since an earlier record; the peak of memory stays that of all time."""
        return AgentRecord(
            cpu_s=self.cpu_s - before.cpu_s,
            peak_rss_mib=self.peak_rss_mib,
            control_bytes=self.control_bytes - before.control_bytes,
            duplicate_bytes=self.duplicate_bytes - before.duplicate_bytes,
            from_peers_bytes=self.from_peers_bytes - before.from_peers_bytes,
            from_origin_bytes=self.from_origin_bytes - before.from_origin_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a run is judged by.

    Args:
        image_bytes: what each node lacks at the start.
        link_mbit: nominal rate of a node's link.
        goodput_bytes_per_s: of one bulk flow from the origin to a node, or where the origin limits each
            connection, of one for each node together, if that is less.
        link_goodput_bytes_per_s: of one bulk flow between nodes; None for the same.
        bound_s: the least time from the first start to the last finish; None for the image through the goodput.
        swarm_s: what all that nodes lack takes from the origin and all nodes together; it binds where many send slowly.
    """

    image_bytes: int
    link_mbit: float
    goodput_bytes_per_s: float
    link_goodput_bytes_per_s: float | None = None
    bound_s: float | None = None
    swarm_s: float = 0.0

    @property
    def origin_s(self) -> float:
        """What the image takes from the origin."""
        return self.image_bytes / self.goodput_bytes_per_s

    @property
    def link_s(self) -> float:
        """What a node's own link takes for it."""
        return self.image_bytes / (self.link_goodput_bytes_per_s or self.goodput_bytes_per_s)

    def own_bound_s(self, after_first_s: float) -> float:
        """Return the least time that a node can take which starts so long after the first."""
        return max(self.link_s, max(self.origin_s, self.swarm_s) - after_first_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What left the origin and entered the racks during a run.

    Args:
        origin_bytes: payload.
        origin_wire_bytes: all that left the origin's host, headers included; None where nothing counts it.
        rack_bytes: down each rack's uplink, headers included.
    """

    origin_bytes: int
    origin_wire_bytes: int | None = None
    rack_bytes: Mapping[str, int] = field(default_factory=dict)

    def since(self, before: Traffic) -> Traffic:
        """Return what was added to an earlier reading of the same counters."""
        wire = None
        if self.origin_wire_bytes is not None and before.origin_wire_bytes is not None:
            wire = self.origin_wire_bytes - before.origin_wire_bytes
        return Traffic(
            origin_bytes=self.origin_bytes - before.origin_bytes,
            origin_wire_bytes=wire,
            rack_bytes={rack: count - before.rack_bytes[rack] for rack, count in self.rack_bytes.items()},
        )


@dataclass(frozen=True, slots=True)
class Cpu:
    """Parts of all CPU time that passed during a run: what was idle, and what the harness itself used."""

    idle_ratio: float
    harness_ratio: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One run of one system. Ratios are parts of 1; what cannot be said is None."""

    system: str
    nodes: int
    image_bytes: int
    link_mbit: float
    goodput_bytes_per_s: float
    bound_s: float
    first_s: float | None
    p50_s: float | None
    p99_s: float | None
    last_s: float | None
    ratio_to_bound: float | None
    origin_egress_ratio: float
    cpu_s_per_gib: float
    rss_mib_max: float
    control_bytes_per_node: float
    ttfb_p50_s: float | None
    ttfb_p99_s: float | None
    failed_pulls: int
    duplicate_bytes_ratio: float
    idle_cpu_ratio: float
    own_p50_s: float | None
    own_last_s: float | None
    own_ratio_to_bound: float | None
    """The largest of any node."""
    late_ratio_p50: float | None
    """Of late nodes: own time over what the own link takes."""
    late_ratio_max: float | None
    rack_ingress_ratio_max: float | None
    """Bytes into a rack, headers included, over the image."""
    refetched_bytes: int
    """What agents fetched beyond what they lacked."""
    harness_cpu_ratio: float
    from_peers_bytes: int
    from_origin_bytes: int
    origin_bytes: int
    origin_wire_bytes: int | None
    pulls_s: tuple[tuple[float, float], ...]
    """When each node's pull started and ended."""
    void: str | None
    errors: tuple[str, ...] = ()
    run: dict[str, Any] = field(default_factory=dict)
    """How it was run: seed, shape of the image, notes."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def summarize(
    system: str,
    pulls: Sequence[NodeRecord],
    agents: Sequence[AgentRecord],
    setting: Setting,
    traffic: Traffic,
    cpu: Cpu,
    run: dict[str, Any],
) -> Result:
    """Return the figures of one run; `agents` are all processes of the system that are counted, if any."""
    bound_s = setting.bound_s or setting.origin_s
    right = [pull for pull in pulls if pull.right]
    finished = sorted(pull.finished_s for pull in right)
    own = sorted(pull.own_s for pull in right)
    first_s = min(pull.started_s for pull in pulls)
    own_ratios = [pull.own_s / setting.own_bound_s(pull.started_s - first_s) for pull in right]
    late = sorted(pull.own_s / setting.link_s for pull in right if pull.late)
    ttfb = sorted(time_s for pull in pulls for time_s in pull.ttfb_s)
    delivered_bytes = setting.image_bytes * len(right)
    fetched_bytes = sum(agent.from_peers_bytes + agent.from_origin_bytes for agent in agents)
    rack_bytes = max(traffic.rack_bytes.values(), default=None)
    return Result(
        system=system,
        nodes=len(pulls),
        image_bytes=setting.image_bytes,
        link_mbit=setting.link_mbit,
        goodput_bytes_per_s=setting.goodput_bytes_per_s,
        bound_s=bound_s,
        first_s=percentile(finished, 0),
        p50_s=percentile(finished, 50),
        p99_s=percentile(finished, 99),
        last_s=percentile(finished, 100),
        ratio_to_bound=finished[-1] / bound_s if finished else None,
        origin_egress_ratio=traffic.origin_bytes / setting.image_bytes,
        cpu_s_per_gib=sum(agent.cpu_s for agent in agents) / (delivered_bytes / 2**30) if delivered_bytes else 0.0,
        rss_mib_max=max((agent.peak_rss_mib for agent in agents), default=0.0),
        control_bytes_per_node=sum(agent.control_bytes for agent in agents) / len(pulls),
        ttfb_p50_s=percentile(ttfb, 50),
        ttfb_p99_s=percentile(ttfb, 99),
        failed_pulls=len(pulls) - len(right),
        duplicate_bytes_ratio=sum(agent.duplicate_bytes for agent in agents) / (setting.image_bytes * len(pulls)),
        idle_cpu_ratio=cpu.idle_ratio,
        own_p50_s=percentile(own, 50),
        own_last_s=percentile(own, 100),
        own_ratio_to_bound=max(own_ratios, default=None),
        late_ratio_p50=percentile(late, 50),
        late_ratio_max=percentile(late, 100),
        rack_ingress_ratio_max=None if rack_bytes is None else rack_bytes / setting.image_bytes,
        refetched_bytes=max(0, fetched_bytes - setting.image_bytes * len(pulls)),
        harness_cpu_ratio=cpu.harness_ratio,
        from_peers_bytes=sum(agent.from_peers_bytes for agent in agents),
        from_origin_bytes=sum(agent.from_origin_bytes for agent in agents),
        origin_bytes=traffic.origin_bytes,
        origin_wire_bytes=traffic.origin_wire_bytes,
        pulls_s=tuple((round(pull.started_s, 3), round(pull.finished_s, 3)) for pull in pulls),
        void=_void_reason(cpu.idle_ratio),
        errors=tuple(pull.error for pull in pulls if pull.error),
        run=run,
    )


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """Return the nearest-rank percentile of ascending values, 0 <= percent <= 100; None of nothing."""
    if not ordered:
        return None
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _void_reason(idle_cpu_ratio: float) -> str | None:
    if idle_cpu_ratio >= IDLE_MIN_RATIO:
        return None
    return f"the CPU starved: {idle_cpu_ratio:.0%} idle, {IDLE_MIN_RATIO:.0%} is the least; fewer nodes or slower links"
