# SPDX-License-Identifier: Apache-2.0
"""The systems that a rollout can be done with, behind one face: start it, let nodes pull, read what it spent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from bench.lab import proxy, torrents
from bench.lab.agents import Agent, make_identity, start_agents, start_scheduler, wait_for_mesh
from bench.lab.errors import LabError
from bench.lab.pullers import Source, pull
from bench.results import AgentRecord

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from bench.lab.hosts import Host
    from bench.lab.images import Image
    from bench.lab.processes import Process, ProcessGroup
    from bench.lab.pullers import Pull
    from bench.lab.registry import Registry
    from bench.lab.torrents import TorrentPeer, Torrents

DIRECT = "direct"
P2PDIST = "p2pdist"
P2PDIST_IDENTITY = "p2pdist-identity"
"""With a scheduler, certificates, and TLS between all."""
P2PDIST_MDNS = "p2pdist-mdns"
PROXY = "proxy"
BITTORRENT = "bittorrent"
BITTORRENT_PLAIN = "bittorrent-plain"
"""Without super-seeding: a quicker start, for more bytes out of the origin."""

SYSTEMS = (P2PDIST, P2PDIST_IDENTITY, P2PDIST_MDNS, BITTORRENT, BITTORRENT_PLAIN, PROXY, DIRECT)
FROM_ONE = (DIRECT, PROXY)
"""Where one link carries every node's copy."""

REPOSITORY = "p2pdist/demo"


class Client(Protocol):
    """How a node gets an image."""

    async def pull(self, record: Pull, host: Host, image: Image, *, deadline_s: float, held: Collection[str]) -> None:
        """Bring all of `image` but the blobs `held` to `host`, check it, note all about it in `record`.

        Raises nothing but Cancelled.
        """


class Member(Protocol):
    """A process of a system whose use of the machine counts."""

    async def usage(self) -> AgentRecord:
        """Return what it has spent since it started."""


class Origin(Protocol):
    """What gives an image to the system."""

    async def offer(self, image: Image) -> None:
        """Have an image ready to be pulled, beyond its being in the registry."""

    async def sent_bytes(self) -> int:
        """Return the payload that has left the origin since the lab was built."""


@dataclass(frozen=True, slots=True)
class Running:
    """A system that is ready.

    Args:
        note: what a reader of the result should know, or "".
    """

    name: str
    client: Client
    origin: Origin
    members: tuple[Member, ...] = ()
    agents: tuple[Agent, ...] = ()
    schedulers: Mapping[str, Process] = field(default_factory=dict)
    """By the name of the host."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Site:
    """Where a system is started: the hosts of a lab by what they are for."""

    nodes: Sequence[Host]
    scheduler: Host
    proxy: Host
    registry_host: Host
    registry: Registry
    more_schedulers: Sequence[Host] = ()


def why_not(name: str) -> str | None:
    """Return what is missing on this machine for a system and how to install it, or None."""
    if name == PROXY and proxy.find_nginx() is None:
        return proxy.MISSING
    return torrents.why_not() if name in (BITTORRENT, BITTORRENT_PLAIN) else None


async def start_system(name: str, group: ProcessGroup, site: Site, data: Path) -> Running:
    """Start a system on the nodes and wait until it is ready for a pull.

    Args:
        name: one of SYSTEMS.
        group: owns the processes; the system runs until it ends.
        data: an empty directory for all that the system keeps.

    Raises:
        LabError: a part of it does not come up.
    """
    if reason := why_not(name):
        raise LabError(reason)
    if name == DIRECT:
        return Running(name, _Runtimes.all_from(site.nodes, site.registry.base_url), _RegistryOrigin(site.registry))
    if name == PROXY:
        process = await proxy.start_proxy(group, site.proxy, site.registry, data / "proxy")
        clients = _Runtimes.all_from(site.nodes, proxy.base_url(site.proxy))
        return Running(name, clients, _RegistryOrigin(site.registry), (_Program(process),))
    if name in (BITTORRENT, BITTORRENT_PLAIN):
        super_seeding = name == BITTORRENT
        swarm = await torrents.start_torrents(group, site.registry_host, site.nodes, data, super_seeding=super_seeding)
        leechers = tuple(_Leecher(peer) for peer in swarm.leechers.values())
        return Running(name, swarm, _SeedOrigin(swarm), leechers)
    return await _start_p2pdist(name, group, site, data)


async def _start_p2pdist(name: str, group: ProcessGroup, site: Site, data: Path) -> Running:
    for_schedulers: list[str] = []
    for_agents: list[str] = []
    if name == P2PDIST_IDENTITY:
        for_schedulers, for_agents = make_identity(data, agents=len(site.nodes))
    hosts = [] if name == P2PDIST_MDNS else [site.scheduler, *site.more_schedulers]
    schedulers = {host.name: await start_scheduler(group, host, data, for_schedulers) for host in hosts}
    agents = await start_agents(group, site.nodes, data, site.registry, schedulers=hosts, flags=for_agents)
    note = ""
    if not schedulers and (fewest := await wait_for_mesh(agents)) < len(agents) - 1:
        note = f"an agent knew only {fewest} of {len(agents) - 1} peers at the start"
    return Running(
        name,
        _Runtimes({agent.host.name: agent.source for agent in agents}),
        _RegistryOrigin(site.registry),
        tuple(_AgentMember(agent) for agent in agents),
        tuple(agents),
        schedulers,
        note,
    )


@dataclass(frozen=True, slots=True)
class _Runtimes:
    """Container runtimes that each pull from a mirror or registry, by the name of the host."""

    sources: Mapping[str, Source]

    @staticmethod
    def all_from(nodes: Sequence[Host], base_url: str) -> _Runtimes:
        return _Runtimes({node.name: Source(base_url) for node in nodes})

    async def pull(self, record: Pull, host: Host, image: Image, *, deadline_s: float, held: Collection[str]) -> None:
        source = self.sources[host.name]
        await pull(record, host, source, REPOSITORY, image.tag, deadline_s=deadline_s, held=held)


@dataclass(frozen=True, slots=True)
class _RegistryOrigin:
    registry: Registry

    async def offer(self, image: Image) -> None:
        """Nothing is left to do: the image has been pushed."""

    async def sent_bytes(self) -> int:
        return self.registry.sent_bytes()


@dataclass(frozen=True, slots=True)
class _SeedOrigin:
    swarm: Torrents

    async def offer(self, image: Image) -> None:
        try:
            await self.swarm.offer(image)
        except torrents.TorrentError as error:
            raise LabError(str(error), log=self.swarm.seed.process.tail()) from error

    async def sent_bytes(self) -> int:
        return (await self.swarm.seed.counters()).get("uploaded_bytes", 0)


@dataclass(frozen=True, slots=True)
class _AgentMember:
    agent: Agent

    async def usage(self) -> AgentRecord:
        """Read what the agent spent; its status may be missing, where it died."""
        cpu_s, status = self.agent.process.cpu_s(), await self.agent.status()
        moved = status.get("bytes", {})
        return AgentRecord(
            cpu_s=cpu_s,
            peak_rss_mib=self.agent.process.peak_rss_mib(),
            control_bytes=status.get("control_bytes", 0),
            duplicate_bytes=moved.get("duplicate", 0),
            from_peers_bytes=moved.get("from_peers", 0),
            from_origin_bytes=moved.get("from_origin", 0),
        )


@dataclass(frozen=True, slots=True)
class _Program:
    """A process that tells nothing about itself."""

    process: Process

    async def usage(self) -> AgentRecord:
        return AgentRecord(cpu_s=self.process.cpu_s(), peak_rss_mib=self.process.peak_rss_mib())


@dataclass(frozen=True, slots=True)
class _Leecher:
    """A libtorrent peer; it does not tell the seed's bytes from other peers'."""

    peer: TorrentPeer

    async def usage(self) -> AgentRecord:
        cpu_s, seen = self.peer.process.cpu_s(), await self.peer.counters()
        return AgentRecord(
            cpu_s=cpu_s,
            peak_rss_mib=self.peer.process.peak_rss_mib(),
            control_bytes=seen.get("control_bytes", 0),
            duplicate_bytes=seen.get("wasted_bytes", 0),
            from_peers_bytes=seen.get("downloaded_bytes", 0) - seen.get("wasted_bytes", 0),
        )
