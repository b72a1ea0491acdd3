# SPDX-License-Identifier: Apache-2.0
"""Agents and a scheduler on the hosts of a lab, as the programs that users run."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from bench.lab import http, ready
from bench.lab.pullers import Source
from p2pdist.identity.authority import Authority

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bench.lab.hosts import Host
    from bench.lab.processes import Process, ProcessGroup
    from bench.lab.registry import Registry

REGISTRY_NAME = "registry.lab"
"""What the pullers call the origin, in `?ns=`."""

_MIRROR_PORT, _PEER_PORT, _ADMIN_PORT, _SCHEDULER_PORT, _API_PORT = 5050, 5051, 5052, 5060, 5061
_READY_TIMEOUT_S = 60.0
"""A dozen interpreters start at once, on few cores."""

_SCHEDULER_TIMEOUT_S = 20.0
_MESH_TIMEOUT_S = 10.0
_POLL_S = 0.25
_STATUS_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Agent:
    host: Host
    process: Process

    @property
    def source(self) -> Source:
        """Where this host's runtime pulls from."""
        return Source(f"http://{self.host.local_address}:{_MIRROR_PORT}", REGISTRY_NAME)

    async def ready(self) -> bool:
        return await http.get_status(self.host, self._admin("readyz"), timeout_s=_STATUS_TIMEOUT_S) == 200

    async def wait_ready(self) -> None:
        """Wait until the agent says that it is ready. Raises LabError."""
        await ready.until(self.ready, self.process, _READY_TIMEOUT_S, poll_s=_POLL_S)

    async def status(self) -> dict[str, Any]:
        """Return what `/status` tells, {} where the agent does not answer in time."""
        return await http.get_json(self.host, self._admin("status"), timeout_s=_STATUS_TIMEOUT_S) or {}

    def _admin(self, path: str) -> str:
        return f"http://{self.host.local_address}:{_ADMIN_PORT}/{path}"


async def scheduler_status(host: Host) -> dict[str, Any]:
    """Return what the scheduler on this host tells of itself, {} where it does not answer in time."""
    return (
        await http.get_json(host, f"http://{host.local_address}:{_API_PORT}/status", timeout_s=_STATUS_TIMEOUT_S) or {}
    )


def scheduler_address(host: Host) -> str:
    """Return where a scheduler on this host listens for agents, HOST:PORT."""
    return f"{host.address}:{_SCHEDULER_PORT}"


def make_identity(data: Path, *, agents: int) -> tuple[list[str], list[str]]:
    """Make a cluster's CA and a token; return the flags with which a scheduler uses it, and so many agents join."""
    authority = Authority.make(data / "ca", "lab", time.time())
    token = authority.make_token(uses=agents, lifetime_s=600.0, now=time.time())
    return ["--ca-dir", str(data / "ca")], ["--join", str(token)]


async def start_scheduler(group: ProcessGroup, host: Host, data: Path, flags: Sequence[str] = ()) -> Process:
    """Start a scheduler and wait until agents can reach it. Raises LabError."""
    command = ["--listen", scheduler_address(host), "--api-listen", f"{host.local_address}:{_API_PORT}"]
    command += ["--data-dir", str(data / host.name), *flags]
    process = group.start(host, host.name, [*_p2pdist("scheduler"), *command])

    await ready.accepting(host, _SCHEDULER_PORT, process, _SCHEDULER_TIMEOUT_S)
    return process


async def start_agents(
    group: ProcessGroup,
    hosts: Sequence[Host],
    data: Path,
    registry: Registry,
    *,
    schedulers: Sequence[Host] = (),
    flags: Sequence[str] = (),
) -> list[Agent]:
    """Start an agent on each host and wait until all say that they are ready.

    Args:
        data: gets a data directory for each agent.
        schedulers: their hosts; without any the agents find each other by mDNS.
        flags: further ones for each.

    Raises:
        LabError: an agent ends or is not ready in time.
    """
    agents = [
        start_agent(group, host, data, registry.base_url, [*found_by(*schedulers), *_place(host), *flags])
        for host in hosts
    ]
    async with trio.open_nursery() as nursery:
        for agent in agents:
            nursery.start_soon(agent.wait_ready)
    return agents


def found_by(*schedulers: Host) -> list[str]:
    """Return an agent's flags for being found: by schedulers on these hosts alone, or by mDNS alone."""
    flags = [flag for host in schedulers for flag in ("--scheduler", scheduler_address(host))]
    return [*flags, "--no-mdns"] if flags else []


def _place(host: Host) -> list[str]:
    return ["--rack", host.rack] if host.rack else []


def start_agent(
    group: ProcessGroup, host: Host, data: Path, origin_url: str, flags: Sequence[str], *, wrapper: Sequence[str] = ()
) -> Agent:
    """Start an agent, on the data directory that it had if it ran before, and do not wait for it.

    Args:
        data: holds the data directories.
        origin_url: what REGISTRY_NAME stands for.
        flags: further flags, such as `found_by`.
        wrapper: a program that executes what follows it, in the place of itself.
    """
    listeners = [
        *("--mirror-listen", f"{host.local_address}:{_MIRROR_PORT}"),
        *("--peer-listen", f"{host.address}:{_PEER_PORT}"),
        *("--admin-listen", f"{host.local_address}:{_ADMIN_PORT}"),
    ]
    place = ["--data-dir", str(data / f"agent-{host.name}"), "--registry", f"{REGISTRY_NAME}={origin_url}"]
    # On loopback all agents' connections come from 127.0.0.1, which is nobody's address.
    advertise = () if host.namespace else ("env", f"P2PDIST_ADVERTISE={host.address}")
    command = [*wrapper, *advertise, *_p2pdist("agent"), *listeners, *place, *flags]
    return Agent(host, group.start(host, f"agent-{host.name}", command))


async def wait_for_mesh(agents: Sequence[Agent]) -> int:
    """Wait until each agent knows all others, at most 10 s; return the fewest peers that an agent knows."""
    fewest = 0
    with trio.move_on_after(_MESH_TIMEOUT_S):
        while fewest < len(agents) - 1:
            await trio.sleep(_POLL_S)
            fewest = min([len((await agent.status()).get("peers", [])) for agent in agents])
    return fewest


def _p2pdist(verb: str) -> list[str]:
    return [sys.executable, "-m", "p2pdist", verb]
