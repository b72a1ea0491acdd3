# SPDX-License-Identifier: Apache-2.0
"""Breaks what a plan says while a rollout runs, mends it when its time is over, and keeps account of both.

However a rollout ends, all is mended afterwards. A runtime whose own agent was killed pulls again through it once it is
back, as kubelet does; nobody else does.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import trio

from bench.faults.plan import LOSS_RATIO, SLOW_FACTOR, Fault, Kind
from bench.lab import outages
from bench.lab.agents import scheduler_status
from bench.lab.hosts import Link

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence

    from bench.crowd import Rollout, Stage
    from bench.lab.agents import Agent
    from bench.lab.hosts import Host
    from bench.lab.images import Image
    from bench.lab.processes import Process
    from bench.lab.pullers import Pull
    from bench.systems import Client, Running

_POLL_S = 0.05
_STATUS_EVERY_S = 0.2
_AGAIN_S = 0.5
"""Before a runtime pulls again."""
_OUTAGE_SHARES = {Kind.PARTITION: 1.0, Kind.FREEZE: 1.0, Kind.SLOW_LINK: 1 - SLOW_FACTOR}
"""Of a fault's time, how much those it strikes can get nothing in, by the nature of the fault."""


@dataclass(slots=True)
class Injector:
    """The faults of one rollout."""

    stage: Stage
    faults: Sequence[Fault]
    happened: list[tuple[float, str]] = field(default_factory=list)
    """Seconds from the start of the rollout, and what."""
    outages_s: dict[str, float] = field(default_factory=dict)
    """By node: for how long it could get nothing."""
    killed: set[str] = field(default_factory=set)
    """Nodes whose agent was killed."""
    attempts: list[tuple[str, str]] = field(default_factory=list)
    """Nodes whose pull failed and was made again, and why."""
    _began_s: float = math.inf

    def persistent(self, running: Running, *, all_nodes: bool = False) -> Running:
        """Return the system with runtimes that pull again where their own agent was killed, or on all nodes."""
        agents = {agent.host.name: agent for agent in running.agents}
        again = agents.keys() if all_nodes else self.killed
        return replace(running, client=_Persistent(running.client, agents, again, self.attempts))

    async def run(self, rollout: Rollout) -> None:
        """Let it all happen, until cancelled."""
        self._began_s = rollout.started_s
        async with trio.open_nursery() as nursery:
            for fault in self.faults:
                nursery.start_soon(self._happen, rollout, fault)

    async def _happen(self, rollout: Rollout, fault: Fault) -> None:
        await _begun(self.stage, rollout, fault)
        async with self._broken(rollout, fault):
            began_s = trio.current_time()
            try:
                await _ended(rollout, fault)
            finally:
                lasted_s = (trio.current_time() - began_s) * _OUTAGE_SHARES.get(fault.kind, 0.0)
                for host in self._struck(fault):
                    self.outages_s[host.name] = self.outages_s.get(host.name, 0.0) + lasted_s
        self._note(f"over: {fault.kind}")

    def _note(self, what: str) -> None:
        self.happened.append((round(trio.current_time() - self._began_s, 2), what))

    def _struck(self, fault: Fault) -> list[Host]:
        return [self.stage.nodes[node] for node in fault.nodes]

    @asynccontextmanager
    async def _broken(self, rollout: Rollout, fault: Fault) -> AsyncIterator[None]:
        """Break something for the time of the block."""
        agents = [rollout.running.agents[node] for node in fault.nodes]
        with ExitStack() as stack:
            match fault.kind:
                case Kind.SCHEDULER:
                    stack.enter_context(_killed([await self._busiest_scheduler(rollout)]))
                case Kind.AGENTS:
                    stack.enter_context(self._kill(agents))
                case Kind.LEASE_HOLDER:
                    stack.enter_context(self._kill([await self._caught_leasing(rollout)]))
                case Kind.FREEZE:
                    stack.enter_context(_frozen([agent.process for agent in agents]))
                case Kind.PARTITION:
                    stack.enter_context(outages.partitioned(self.stage.lab, self._struck(fault)))
                case Kind.SLOW_LINK:
                    slow = Link(*[SLOW_FACTOR * self.stage.shape.link_mbit] * 2)
                    for host in self._struck(fault):
                        stack.enter_context(outages.slowed(self.stage.lab, host, slow))
                case Kind.LOSS:
                    for host in self._struck(fault):
                        stack.enter_context(outages.losing(host, LOSS_RATIO))
                case Kind.ORIGIN:
                    stack.enter_context(_killed([self.stage.registry.process]))
            self._note(str(fault))
            yield
        if fault.kind is Kind.ORIGIN:
            with trio.CancelScope(shield=True):
                await self.stage.registry.wait_ready()

    @contextmanager
    def _kill(self, agents: Sequence[Agent]) -> Iterator[None]:
        self.killed.update(agent.host.name for agent in agents)
        with _killed([agent.process for agent in agents]):
            yield

    async def _busiest_scheduler(self, rollout: Rollout) -> Process:
        """Return the scheduler that leads the most swarms."""
        schedulers = rollout.running.schedulers
        assert schedulers, "the system has a scheduler"
        swarms = {name: len((await scheduler_status(self.stage.lab[name])).get("swarms", [])) for name in schedulers}
        name = max(swarms, key=swarms.__getitem__)
        if len(swarms) > 1:
            self._note(f"{name} leads {swarms[name]} of {sum(swarms.values())} swarms")
        return schedulers[name]

    async def _caught_leasing(self, rollout: Rollout) -> Agent:
        """Return an agent that holds leases, frozen so that it goes on holding them."""
        while True:
            for agent in rollout.running.agents:
                if not await _leases(self.stage.lab["scheduler"], [agent]):
                    continue
                agent.process.freeze()
                if held := await _leases(self.stage.lab["scheduler"], [agent]):
                    self._note(f"{agent.host.name} holds {held} leases")
                    return agent
                agent.process.thaw()
            await trio.sleep(_POLL_S)


async def _leases(scheduler: Host, agents: Collection[Agent]) -> int:
    """Return how many leases these agents hold, by the scheduler's word."""
    addresses = {agent.host.address for agent in agents}
    listed = (await scheduler_status(scheduler)).get("agent_list", [])
    return sum(entry["leases"] for entry in listed if entry["host"] in addresses)


async def _begun(stage: Stage, rollout: Rollout, fault: Fault) -> None:
    """Wait until it is time for a fault."""
    if fault.at is None:
        await _all_out(stage, rollout.image)
        return
    at = fault.at
    await _until(lambda: rollout.done_ratio >= at)


async def _ended(rollout: Rollout, fault: Fault) -> None:
    with trio.move_on_after(fault.lasts_s):
        until = fault.until
        await _until(lambda: until is not None and rollout.done_ratio >= until)


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - counters; nobody signals
        await trio.sleep(_POLL_S)


async def _all_out(stage: Stage, image: Image) -> None:
    """Wait until each chunk of the image's layers is with some agent, by the scheduler's word."""
    seen: set[str] = set()
    out: set[str] = set()
    while not out >= {layer.digest for layer in image.layers}:
        swarms = (await scheduler_status(stage.lab["scheduler"])).get("swarms", [])
        # A swarm that has been and is not any more: all its members have the whole blob.
        out |= seen - {swarm["blob"] for swarm in swarms} if swarms else set()
        out |= {swarm["blob"] for swarm in swarms if swarm["chunks_done"] == swarm["chunks"]}
        seen |= {swarm["blob"] for swarm in swarms}
        await trio.sleep(_STATUS_EVERY_S)


@contextmanager
def _killed(processes: Sequence[Process]) -> Iterator[None]:
    for process in processes:
        process.kill()
    try:
        yield
    finally:
        for process in processes:
            if not process.running:
                process.start_again()


@contextmanager
def _frozen(processes: Sequence[Process]) -> Iterator[None]:
    for process in processes:
        process.freeze()
    try:
        yield
    finally:
        for process in processes:
            process.thaw()


@dataclass(frozen=True, slots=True)
class _Persistent:
    """Runtimes of which those on the nodes `again` pull again when a pull fails."""

    client: Client
    agents: Mapping[str, Agent]
    again: Collection[str]
    attempts: list[tuple[str, str]]

    async def pull(self, record: Pull, host: Host, image: Image, *, deadline_s: float, held: Collection[str]) -> None:
        first_s = trio.current_time()
        deadline = first_s + deadline_s
        while True:
            left_s = deadline - trio.current_time()
            await self.client.pull(record, host, image, deadline_s=left_s, held=held)
            record.started_s = first_s
            if record.error is None or host.name not in self.again:
                return
            failed_s, error = record.finished_s, record.error
            record.error = record.finished_s = None
            with trio.move_on_at(deadline):
                await trio.sleep(_AGAIN_S)
                while not await self.agents[host.name].ready():  # noqa: ASYNC110 - another process
                    await trio.sleep(_STATUS_EVERY_S)
                self.attempts.append((host.name, error))
                record.total_bytes = record.done_bytes = 0
                continue
            record.error, record.finished_s = error, failed_s
            return
