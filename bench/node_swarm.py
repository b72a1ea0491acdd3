# SPDX-License-Identifier: Apache-2.0
"""The whole cold path of the agent: a few agents with unshaped links pull one image at once, and what that costs them.

An agent receives, checks, writes, serves its runtime and serves its peers, as fast as the machine lets it. The
runtimes' and the registry's CPU is not counted, but they share the machine.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import trio

from bench.lab import meters
from bench.lab.errors import LabError
from bench.lab.hosts import Link, open_lab
from bench.lab.images import make_random_image
from bench.lab.processes import ProcessGroup
from bench.lab.pullers import Pull
from bench.lab.registry import find_docker_registry, start_registry
from bench.lab.workspace import workspace
from bench.node_figures import Figure
from bench.systems import P2PDIST as WITH_SCHEDULER
from bench.systems import P2PDIST_IDENTITY, REPOSITORY, Site, start_system

if TYPE_CHECKING:
    from pathlib import Path

    from bench.lab.hosts import Host
    from bench.lab.images import Image
    from bench.results import AgentRecord
    from bench.systems import Running

_DEADLINE_S = 300.0
_SETTLE_S = 0.5
"""After the start, and for the registry to write the log lines of its last responses."""


async def measure_swarm(
    image_bytes: int, *, nodes: int, layers: int, runs: int, shaped: bool, identity: bool = False
) -> list[Figure]:
    """Return a figure for each run, each on empty data directories.

    Args:
        identity: whether each run is done twice, the second time with certificates and TLS.
        shaped: whether hosts are network namespaces, though without limits; else loopback addresses.

    Raises:
        LabError: an agent or the registry does not come up, or a pull fails.
    """
    names = [f"node{number}" for number in range(1, nodes + 1)]
    hosts = ["registry", "scheduler", *names]
    with (
        workspace((nodes + 2) * image_bytes) as space,
        open_lab(dict.fromkeys(hosts, Link()), shaped=shaped) as lab,
        ProcessGroup(space.logs) as group,
    ):
        program = await trio.to_thread.run_sync(find_docker_registry, space)
        registry = await start_registry(group, lab["registry"], space, program=program)
        image = await make_random_image(space.path / "image", image_bytes=image_bytes, layers=layers, seed=1)
        registry.push(image, REPOSITORY)
        site = Site([lab[name] for name in names], lab["scheduler"], lab["registry"], lab["registry"], registry)
        systems = [WITH_SCHEDULER, P2PDIST_IDENTITY] if identity else [WITH_SCHEDULER]
        return [
            await _run(system, site, image, space.directory(f"run-{run}-{system}"))
            for run in range(runs)
            for system in systems
        ]


async def _run(system: str, site: Site, image: Image, place: Path) -> Figure:
    try:
        with ProcessGroup(place) as group:
            running = await start_system(system, group, site, place)
            await trio.sleep(_SETTLE_S)
            return await _pull_at_once(running, site, image)
    finally:
        shutil.rmtree(place, ignore_errors=True)


async def _pull_at_once(running: Running, site: Site, image: Image) -> Figure:
    egress_bytes, machine = site.registry.sent_bytes(), meters.machine_cpu()
    before = [await member.usage() for member in running.members]
    pulls = [Pull(node.name) for node in site.nodes]
    began_s = trio.current_time()
    async with trio.open_nursery() as nursery:
        for record, host in zip(pulls, site.nodes, strict=True):
            nursery.start_soon(_pull, running, record, host, image)
    seconds, idle = trio.current_time() - began_s, meters.machine_cpu().idle_ratio_since(machine)
    spent: list[AgentRecord] = [
        (await member.usage()).since(earlier) for member, earlier in zip(running.members, before, strict=True)
    ]
    for record, agent in zip(pulls, running.agents, strict=True):
        if record.error:
            raise LabError(f"{record.node}: {record.error}", log=agent.process.tail())
    await trio.sleep(_SETTLE_S)
    return Figure(
        part="swarm",
        system=running.name,
        seconds=seconds,
        payload_bytes=image.pull_bytes * len(pulls),
        cpu_s=sum(agent.cpu_s for agent in spent),
        rss_mib_max=max(agent.peak_rss_mib for agent in spent),
        nodes=len(pulls),
        image_bytes=image.pull_bytes,
        ttfb_s=[wait_s for record in pulls for wait_s in record.ttfb_s],
        egress_ratio=(site.registry.sent_bytes() - egress_bytes) / image.pull_bytes,
        idle_cpu_ratio=idle,
    )


async def _pull(running: Running, record: Pull, host: Host, image: Image) -> None:
    await running.client.pull(record, host, image, deadline_s=_DEADLINE_S, held=())
