# SPDX-License-Identifier: Apache-2.0
"""The systems that a rollout can be done with, behind one face: start it, and know where each node pulls from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.lab.agents import Agent, start_agents, start_scheduler, wait_for_mesh
from bench.lab.pullers import Source

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from bench.lab.hosts import Host
    from bench.lab.processes import Process, ProcessGroup
    from bench.lab.registry import Registry

DIRECT = "direct"
P2PDIST = "p2pdist"
P2PDIST_MDNS = "p2pdist-mdns"
SYSTEMS = (DIRECT, P2PDIST, P2PDIST_MDNS)


@dataclass(frozen=True, slots=True)
class Running:
    """A system that is ready.

    Args:
        sources: where each node pulls from, by the name of its host.
        note: what a reader of the result should know, or "".
    """

    name: str
    sources: Mapping[str, Source]
    agents: tuple[Agent, ...] = ()
    scheduler: Process | None = None
    note: str = ""


async def start_system(
    name: str, group: ProcessGroup, nodes: Sequence[Host], scheduler_host: Host, registry: Registry, data: Path
) -> Running:
    """Start a system on the nodes and wait until it is ready for a pull.

    Args:
        name: one of SYSTEMS.
        group: owns the processes; the system runs until it ends.

    Raises:
        LabError: a part of it does not come up.
    """
    if name == DIRECT:
        return Running(name, {node.name: Source(registry.base_url) for node in nodes})
    scheduler = await start_scheduler(group, scheduler_host, data) if name == P2PDIST else None
    found_by = scheduler_host if scheduler else None
    agents = await start_agents(group, nodes, data, registry, scheduler=found_by)
    note = ""
    if scheduler is None and (fewest := await wait_for_mesh(agents)) < len(nodes) - 1:
        note = f"an agent knew only {fewest} of {len(nodes) - 1} peers at the start"
    return Running(name, {agent.host.name: agent.source for agent in agents}, tuple(agents), scheduler, note)
