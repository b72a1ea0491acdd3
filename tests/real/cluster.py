# SPDX-License-Identifier: Apache-2.0
"""A cluster of real processes for one test: docker-registry, agents, perhaps a scheduler, each on a host of its own.

Nothing here sleeps to let something happen: `until` looks again and again until it is so, or a generous deadline
passes; what then fails shows the ends of all logs.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from bench.lab import agents as lab_agents
from bench.lab import http
from bench.lab.hosts import Link, namespace_lab
from bench.lab.processes import ProcessGroup
from bench.lab.pullers import Pull, pull
from bench.lab.registry import start_registry
from bench.lab.workspace import workspace

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
    from pathlib import Path

    from bench.lab.agents import Agent
    from bench.lab.hosts import Host, Lab
    from bench.lab.images import Image
    from bench.lab.processes import Process
    from bench.lab.registry import Registry
    from bench.lab.workspace import Workspace

T = TypeVar("T")

REPOSITORY = "library/demo"
SCHEDULER, MDNS, ALONE = "scheduler", "mdns", "alone"
"""How the agents of a cluster find each other."""

UNSHAPED = Link()
DEADLINE_S = 90.0
"""For anything that is waited for: seconds on an idle machine, more beside other tests on two slow cores."""

_POLL_S = 0.05
_ROOM_BYTES = 512 << 20


async def until(condition: Callable[[], T | Awaitable[T]], what: str, *, deadline_s: float = DEADLINE_S) -> T:
    """Return the first true value of `condition` (which may be async); fail where none comes in time."""
    with trio.move_on_after(deadline_s):
        while True:
            found = condition()
            value = await found if inspect.isawaitable(found) else found
            if value:
                return value
            await trio.sleep(_POLL_S)
    raise AssertionError(f"not within {deadline_s:.0f} s: {what}")


@dataclass(slots=True)
class Cluster:
    """What runs. Hosts are `node1`, `node2`, …, besides `registry` and `scheduler`."""

    lab: Lab
    space: Workspace
    group: ProcessGroup
    registry: Registry
    found_by: str
    agents: dict[str, Agent] = field(default_factory=dict)
    scheduler: Process | None = None
    more_schedulers: dict[str, Process | None] = field(default_factory=dict)
    """Further ones by their hosts, None before their start."""
    scheduler_flags: list[str] = field(default_factory=list)
    agent_flags: list[str] = field(default_factory=list)

    @property
    def data(self) -> Path:
        return self.space.directory("data")

    @property
    def scheduler_hosts(self) -> list[str]:
        return ["scheduler", *self.more_schedulers] if self.found_by == SCHEDULER else []

    @property
    def schedulers(self) -> dict[str, Process]:
        """Those that were started, by the address that agents know."""
        started = {"scheduler": self.scheduler, **self.more_schedulers}
        return {lab_agents.scheduler_address(self.lab[name]): process for name, process in started.items() if process}

    async def start_scheduler(self) -> None:
        flags = self.scheduler_flags
        self.scheduler = await lab_agents.start_scheduler(self.group, self.lab["scheduler"], self.data, flags)
        for name in self.more_schedulers:
            self.more_schedulers[name] = await lab_agents.start_scheduler(self.group, self.lab[name], self.data, flags)

    async def start(
        self, *names: str, settings: str = "", origin_url: str | None = None, wrapper: Sequence[str] = ()
    ) -> list[Agent]:
        """Start agents on these hosts and wait until they are ready and know each other.

        Args:
            settings: lines of a configuration file.
            wrapper: as `bench.lab.agents.start_agent` knows it.
        """
        flags = self._flags(settings)
        for name in names:
            self.agents[name] = lab_agents.start_agent(
                self.group,
                self.lab[name],
                self.data,
                origin_url or self.registry.base_url,
                flags,
                wrapper=wrapper,
            )
        started = [self.agents[name] for name in names]
        for agent in started:
            await agent.wait_ready()
            name = agent.host.name
            await until(lambda name=name: self.joined(name), f"{name} is part of the cluster")
        return started

    def _flags(self, settings: str) -> list[str]:
        flags = lab_agents.found_by(*(self.lab[name] for name in self.scheduler_hosts))
        if self.found_by == ALONE:
            flags = ["--no-mdns"]
        flags = [*flags, *self.agent_flags]
        if settings:
            file = self.space.path / "agent.toml"
            file.write_text(settings)
            flags = [*flags, "--config", str(file)]
        return flags

    async def joined(self, name: str) -> bool:
        """Return whether an agent is connected to the scheduler, or where there is none, to all other agents."""
        status = await self.agents[name].status()
        if self.found_by == SCHEDULER:
            return bool(status.get("scheduler", {}).get("connected"))
        living = sum(other.process.running for other in self.agents.values())
        return self.found_by == ALONE or len(status.get("peers", [])) >= living - 1

    async def pull(self, name: str, image: Image, reference: str | None = None) -> Pull:
        """Pull through one agent, as containerd does, with every digest checked, and fail where that fails."""
        record = Pull(name)
        await self.pull_into(record, image, reference)
        self.expect_right([record])
        return record

    @asynccontextmanager
    async def rollout(self, image: Image, *names: str) -> AsyncIterator[list[Pull]]:
        """Let all these agents' hosts pull at once, beside the block; at its end all pulls have ended."""
        pulls = [Pull(name) for name in names]
        async with trio.open_nursery() as nursery:
            for record in pulls:
                nursery.start_soon(self.pull_into, record, image)
            yield pulls

    async def pull_into(self, record: Pull, image: Image, reference: str | None = None) -> None:
        source, host = self.agents[record.node].source, self.lab[record.node]
        await pull(record, host, source, REPOSITORY, reference or image.tag, deadline_s=DEADLINE_S)

    def expect_right(self, pulls: Sequence[Pull]) -> None:
        wrong = {record.node: record.error or "not ended" for record in pulls if not record.right}
        assert not wrong, wrong

    @asynccontextmanager
    async def reading(self, name: str, digest: str) -> AsyncIterator[BlobReading]:
        """Give a running response to a GET of a blob, as a runtime on that agent's host has it."""
        source = self.agents[name].source
        async with http.HttpConnection(self.lab[name], source.base_url) as connection:
            head = await connection.request("GET", source.target(REPOSITORY, "blobs", digest))
            assert head.status_code == 200, await connection.read_all()
            yield BlobReading(connection)

    async def status(self, name: str) -> dict[str, Any]:
        return await until(self.agents[name].status, f"{name} tells its status")

    async def moved(self, name: str) -> dict[str, int]:
        """Return the bytes that an agent moved: `to_runtime`, `from_peers`, `from_origin`, …"""
        moved: dict[str, int] = (await self.status(name))["bytes"]
        return moved

    async def settled(self, names: Sequence[str] = ()) -> None:
        """Wait until agents (all that run) have nothing on its way: what was pulled is committed."""
        for name in names or [name for name, agent in self.agents.items() if agent.process.running]:
            await until(lambda name=name: self._idle(name), f"{name} has committed all that it pulled")

    async def _idle(self, name: str) -> bool:
        return (await self.status(name))["pulls"] == []

    async def ready_parts(self, name: str) -> Mapping[str, Any]:
        """Return what `/readyz` says of each part of an agent."""
        host = self.lab[name]
        said = await http.get_json(host, f"http://{host.local_address}:5052/readyz", timeout_s=2.0)
        return (said or {}).get("parts", {})

    def log(self, name: str) -> str:
        """Return what an agent has written so far."""
        return self.agents[name].process.log.read_text(errors="replace")

    async def account(self) -> str:
        """Return what a person needs who asks why a test failed: each agent's status and the end of its log."""
        lines = []
        for agent in self.agents.values():
            status = await agent.status() if agent.process.running else f"exit code {agent.process.exit_code}"
            lines += [f"--- {agent.process.name}: {status}", agent.process.tail()]
        return "\n".join(lines)

    def expect_clean_logs(self) -> None:
        """Fail where an agent or the scheduler wrote what is no event of its log: a traceback, a library's warning."""
        processes = [agent.process for agent in self.agents.values()]
        for process in filter(None, [*processes, self.scheduler, *self.more_schedulers.values()]):
            strange = [line for line in process.log.read_text().splitlines() if not line.startswith('{"')]
            assert not strange, f"{process.name} wrote {strange[:20]}"

    def requests(self) -> list[dict[str, Any]]:
        """Return the registry's log of the responses that it has written."""
        lines = self.registry.process.log.read_bytes().splitlines(keepends=True)
        entries = [json.loads(line) for line in lines if b'"http.response.written"' in line and line.endswith(b"\n")]
        # The lab's own pushes come without a User-Agent.
        return [entry for entry in entries if entry.get("http.request.useragent")]


@dataclass(slots=True)
class BlobReading:
    """A response that is being read."""

    connection: http.HttpConnection
    done_bytes: int = 0
    sha256: Any = field(default_factory=hashlib.sha256)
    _buffer: memoryview = field(default_factory=lambda: memoryview(bytearray(64 << 10)))

    async def read_some(self) -> int:
        """Read some bytes and return how many; 0 at the end. Raises HttpFailure where the response is cut."""
        count = await self.connection.read_into(self._buffer)
        self.sha256.update(self._buffer[:count])
        self.done_bytes += count
        return count

    async def read_to_end(self) -> str:
        """Read the rest; return the digest of all that was read. Raises HttpFailure."""
        while await self.read_some():
            pass
        return f"sha256:{self.sha256.hexdigest()}"


@asynccontextmanager
async def open_cluster(
    program: str,
    *images: Image,
    nodes: int,
    found_by: str = SCHEDULER,
    schedulers: int = 1,
    link: Link = UNSHAPED,
    origin: Link = UNSHAPED,
    identity: bool = False,
) -> AsyncIterator[Cluster]:
    """Build hosts, start a registry that has the images and, where it is wanted, a scheduler; no agents yet.

    Args:
        program: docker-registry.
        link: of each node; `origin`: of the registry's host.
        identity: whether the cluster has a CA, and its agents join with a token for as many as there are nodes.
    """
    more = [f"scheduler{number}" for number in range(2, schedulers + 1)]
    links = dict.fromkeys(["scheduler", *more], UNSHAPED) | {"registry": origin}
    links |= {f"node{number}": link for number in range(1, nodes + 1)}
    async with AsyncExitStack() as stack:
        space = stack.enter_context(workspace(_ROOM_BYTES))
        lab = stack.enter_context(namespace_lab(links))
        group = stack.enter_context(ProcessGroup(space.logs))
        registry = await start_registry(group, lab["registry"], space, program=program)
        for image in images:
            await trio.to_thread.run_sync(registry.push, image, REPOSITORY)
        cluster = Cluster(lab, space, group, registry, found_by, more_schedulers=dict.fromkeys(more))
        if identity:
            cluster.scheduler_flags, cluster.agent_flags = lab_agents.make_identity(cluster.data, agents=nodes)
        if found_by == SCHEDULER:
            await cluster.start_scheduler()
        try:
            yield cluster
            cluster.expect_clean_logs()
        except Exception as error:
            error.add_note(await cluster.account())
            raise


async def run_to_end(command: Sequence[str], *, host: Host | None = None, env: Mapping[str, str] | None = None) -> str:
    """Run a program to its end, on a host if one is named, and return its output; fail where it fails."""
    prefix = host.command_prefix if host else ()
    with trio.fail_after(DEADLINE_S):
        done = await trio.run_process(
            [*prefix, *command], capture_stdout=True, capture_stderr=True, check=False, env=env
        )
    said = done.stderr.decode(errors="replace")
    assert done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}\n{said}"
    return done.stdout.decode()


def part_done(pulls: Sequence[Pull], image: Image) -> float:
    """Return which part of all bytes the clients have."""
    return sum(record.done_bytes for record in pulls) / (image.pull_bytes * len(pulls))
