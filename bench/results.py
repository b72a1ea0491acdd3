# SPDX-License-Identifier: Apache-2.0
"""What a rollout came to: figures from records, pure; the JSON keys are part of the command-line contract.

Times of nodes count from the start of the rollout; those named `own_` from the node's own start, which differs
where arrivals are spread.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

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


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentRecord:
    """What one agent spent on the rollout; bytes as its `/status` counts them."""

    cpu_s: float
    peak_rss_mib: float
    control_bytes: int = 0
    duplicate_bytes: int = 0
    from_peers_bytes: int = 0
    from_origin_bytes: int = 0


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
    from_peers_bytes: int
    from_origin_bytes: int
    origin_bytes: int
    origin_wire_bytes: int | None
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
    *,
    image_bytes: int,
    link_mbit: float,
    goodput_bytes_per_s: float,
    origin_bytes: int,
    origin_wire_bytes: int | None,
    idle_cpu_ratio: float,
    run: dict[str, Any],
) -> Result:
    """Return the figures of one run.

    Args:
        pulls: one for each node.
        agents: one for each agent; empty for a system without any.
        goodput_bytes_per_s: of one bulk flow from the origin to a node; the bound is the image through that.
        origin_bytes: payload that left the origin during the run.
        origin_wire_bytes: all bytes that left its host, headers included; None where nothing counts them.
    """
    bound_s = image_bytes / goodput_bytes_per_s
    finished = sorted(pull.finished_s for pull in pulls if pull.right)
    own = sorted(pull.finished_s - pull.started_s for pull in pulls if pull.right)
    ttfb = sorted(time_s for pull in pulls for time_s in pull.ttfb_s)
    delivered_gib = image_bytes * len(finished) / 2**30
    return Result(
        system=system,
        nodes=len(pulls),
        image_bytes=image_bytes,
        link_mbit=link_mbit,
        goodput_bytes_per_s=goodput_bytes_per_s,
        bound_s=bound_s,
        first_s=percentile(finished, 0),
        p50_s=percentile(finished, 50),
        p99_s=percentile(finished, 99),
        last_s=percentile(finished, 100),
        ratio_to_bound=_ratio(percentile(finished, 100), bound_s),
        origin_egress_ratio=origin_bytes / image_bytes,
        cpu_s_per_gib=sum(agent.cpu_s for agent in agents) / delivered_gib if delivered_gib else 0.0,
        rss_mib_max=max((agent.peak_rss_mib for agent in agents), default=0.0),
        control_bytes_per_node=sum(agent.control_bytes for agent in agents) / len(pulls),
        ttfb_p50_s=percentile(ttfb, 50),
        ttfb_p99_s=percentile(ttfb, 99),
        failed_pulls=len(pulls) - len(finished),
        duplicate_bytes_ratio=sum(agent.duplicate_bytes for agent in agents) / (image_bytes * len(pulls)),
        idle_cpu_ratio=idle_cpu_ratio,
        own_p50_s=percentile(own, 50),
        own_last_s=percentile(own, 100),
        own_ratio_to_bound=_ratio(percentile(own, 100), bound_s),
        from_peers_bytes=sum(agent.from_peers_bytes for agent in agents),
        from_origin_bytes=sum(agent.from_origin_bytes for agent in agents),
        origin_bytes=origin_bytes,
        origin_wire_bytes=origin_wire_bytes,
        void=_void_reason(idle_cpu_ratio),
        errors=tuple(pull.error for pull in pulls if pull.error),
        run=run,
    )


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """Return the nearest-rank percentile of ascending values, 0 <= percent <= 100; None of nothing."""
    if not ordered:
        return None
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _ratio(time_s: float | None, bound_s: float) -> float | None:
    return None if time_s is None else time_s / bound_s


def _void_reason(idle_cpu_ratio: float) -> str | None:
    if idle_cpu_ratio >= IDLE_MIN_RATIO:
        return None
    return f"the CPU starved: {idle_cpu_ratio:.0%} idle, {IDLE_MIN_RATIO:.0%} is the least; fewer nodes or slower links"
