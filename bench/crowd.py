# SPDX-License-Identifier: Apache-2.0
"""One image pulled on all nodes of a lab, and what that came to: shared by the demo and the benchmarks.

`open_stage` builds what stays over several rollouts (hosts, registry, goodput of a link), `run_rollout` starts one
system on it with empty data directories, lets every node pull, reads the counters and ends the system.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import trio

from bench.arrivals import Arrivals
from bench.lab import meters
from bench.lab.calibrate import goodput_bytes_per_s
from bench.lab.errors import LabError
from bench.lab.hosts import Link, Rack, open_lab
from bench.lab.processes import ProcessGroup
from bench.lab.pullers import Pull
from bench.lab.registry import find_docker_registry, start_registry
from bench.lab.workspace import workspace
from bench.results import AgentRecord, Cpu, NodeRecord, Result, Setting, Traffic, summarize
from bench.samples import Series, sample
from bench.systems import FROM_ONE, REPOSITORY, Site, start_system

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence

    from bench.arrivals import Start
    from bench.lab.hosts import Host, Lab
    from bench.lab.images import Image
    from bench.lab.registry import Registry
    from bench.lab.workspace import Workspace
    from bench.systems import Member, Running

__all__ = [
    "REPOSITORY",
    "Outcome",
    "Rollout",
    "Shape",
    "Stage",
    "open_stage",
    "run_rollout",
    "together",
    "watch_nothing",
]

_REGISTRY, _SCHEDULER, _PROXY = "registry", "scheduler", "proxy"
_DEADLINE_SPARE_S = 30.0
_DEADLINE_BOUNDS = 6.0
"""A pull through a swarm that takes six times the bound, and half a minute, has failed."""

_LOG_SETTLE_S = 0.3
"""Until the registry has written the log lines of its last responses."""

_HEADERS_MAX_RATIO = 1.08
_CHATTER_BYTES = 1 << 20
"""What the origin's host may send beyond the payload that it counts: headers, answers without a body, mDNS. More is
an answer that had not ended when the last node was done, or had been cut off: the count leaves it out."""

_COPIES = 3
"""Of the image in the workspace besides the nodes': the layout, the registry's, a proxy's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The lab of a rollout. Rates in Mbit/s, both ways.

    Args:
        origin_per_connection_mbit: what the registry limits each connection to; None for no limit.
        racks: nodes are spread over so many in turn; 0 for one switch. Everything else is on the core switch.
        rack_uplink_mbit: what all nodes of a rack share; None for unshaped.
        uplinks_mbit: what single nodes send at, by name, in the place of `link_mbit`.
        guests: further hosts with a node's link, on which no system is started.
    """

    nodes: int
    link_mbit: float
    origin_mbit: float
    image_bytes: int
    uplinks_mbit: Mapping[str, float] = field(default_factory=dict)
    guests: tuple[str, ...] = ()
    origin_per_connection_mbit: float | None = None
    racks: int = 0
    rack_uplink_mbit: float | None = None
    schedulers: int = 1

    def scheduler_names(self) -> list[str]:
        return [_SCHEDULER, *(f"{_SCHEDULER}{number}" for number in range(2, self.schedulers + 1))]

    def node_names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.nodes + 1)]

    @property
    def sending_mbit(self) -> float:
        """What the registry and all nodes can send together."""
        return self.origin_mbit + sum(self.uplinks_mbit.get(name, self.link_mbit) for name in self.node_names())

    def links(self) -> dict[str, Link]:
        """Return the link of each host but the registry's."""
        names = [*self.scheduler_names(), _PROXY, *self.node_names(), *self.guests]
        return {name: Link(self.uplinks_mbit.get(name, self.link_mbit), self.link_mbit) for name in names}

    def rack_plan(self) -> dict[str, Rack]:
        """Return the racks with their nodes, neighbours by number together."""
        uplink, names = Link(self.rack_uplink_mbit, self.rack_uplink_mbit), self.node_names()
        edges = [round(rack * self.nodes / self.racks) for rack in range(self.racks + 1)] if self.racks else []
        spans = enumerate(pairwise(edges), start=1)
        return {f"rack{rack}": Rack(tuple(names[first:stop]), uplink) for rack, (first, stop) in spans}


@dataclass(frozen=True, slots=True)
class Stage:
    """What stays over several rollouts."""

    shape: Shape
    lab: Lab
    space: Workspace
    registry: Registry
    goodput_bytes_per_s: float
    """Of one bulk flow from the registry's host to a node; where the registry limits connections, of one for each
    node together, if that is less."""
    link_goodput_bytes_per_s: float
    """Of one bulk flow to a node from another one."""

    @property
    def sending_bytes_per_s(self) -> float:
        """The payload that the registry and all nodes can send together."""
        return self.shape.sending_mbit * self.link_goodput_bytes_per_s / self.shape.link_mbit

    @property
    def nodes(self) -> list[Host]:
        return [self.lab[name] for name in self.shape.node_names()]

    @property
    def site(self) -> Site:
        lab = self.lab
        first, *more = [lab[name] for name in self.shape.scheduler_names()]
        return Site(self.nodes, first, lab[_PROXY], lab[_REGISTRY], self.registry, more)

    def origin_wire_bytes(self) -> int | None:
        """Return what has left the registry's host, headers included; None where nothing counts it."""
        return self.lab[_REGISTRY].transmitted_bytes()


@dataclass(slots=True)
class Rollout:
    """A rollout while it runs, for whoever watches it.

    Args:
        held: digests of blobs that all nodes have from before.
    """

    running: Running
    image: Image
    pulls: list[Pull]
    held: Collection[str] = ()
    started_s: float = field(default_factory=trio.current_time)
    series: Series = field(default_factory=Series)

    @property
    def pull_bytes(self) -> int:
        """What each node lacks."""
        return self.image.pull_bytes_without(self.held)

    @property
    def done_ratio(self) -> float:
        return sum(pull.done_bytes for pull in self.pulls) / (self.pull_bytes * len(self.pulls))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a rollout came to, what it looked like, and for each failed pull the end of its agent's log."""

    result: Result
    logs: Mapping[str, str]
    series: Series = field(default_factory=Series)

    def problems(self) -> Iterator[str]:
        """Yield what was wrong, in lines for a person."""
        if note := self.result.run.get("note"):
            yield f"{self.result.system}: {note}"
        yield from self.result.errors
        for name, tail in self.logs.items():
            yield f"--- last lines of {name} ---\n{tail}"


async def watch_nothing(_: Rollout) -> None:
    """The watcher of those who need none."""


def together(*watchers: Callable[[Rollout], Awaitable[None]]) -> Callable[[Rollout], Awaitable[None]]:
    """Return what runs all these watchers."""

    async def watch(rollout: Rollout) -> None:
        async with trio.open_nursery() as nursery:
            for watcher in watchers:
                nursery.start_soon(watcher, rollout)

    return watch


@asynccontextmanager
async def open_stage(shape: Shape, *, shaped: bool) -> AsyncIterator[Stage]:
    """Build hosts and registry, measure one link; all of it is gone at the end.

    Args:
        shaped: as `netns.why_not` allows it.

    Raises:
        LabError: something cannot be built or does not start.
    """
    if shape.racks and not shaped:
        raise LabError("racks need network namespaces, for their uplinks; run as root")
    links = {_REGISTRY: Link(shape.origin_mbit, shape.origin_mbit), **shape.links()}
    async with AsyncExitStack() as stack:
        space = stack.enter_context(workspace(shape.image_bytes * (shape.nodes + _COPIES)))
        program = await trio.to_thread.run_sync(find_docker_registry, space)
        lab = stack.enter_context(open_lab(links, shaped=shaped, racks=shape.rack_plan()))
        group = stack.enter_context(ProcessGroup(space.logs))
        goodput, link_goodput = await _calibrate(shape, lab)
        registry = await start_registry(group, lab[_REGISTRY], space, program=program)
        if shape.origin_per_connection_mbit:
            registry.pace_connections(_bytes_per_s(shape.origin_per_connection_mbit))
        yield Stage(shape, lab, space, registry, goodput, link_goodput)


async def _calibrate(shape: Shape, lab: Lab) -> tuple[float, float]:
    """Return the goodput from the origin and that between nodes, as `Stage` means them."""
    link = goodput = await goodput_bytes_per_s(lab[_REGISTRY], lab["node1"])
    if shape.origin_mbit < shape.link_mbit:
        link = await goodput_bytes_per_s(lab[_SCHEDULER], lab["node1"])
    if shape.origin_per_connection_mbit:
        paced = _bytes_per_s(shape.origin_per_connection_mbit)
        one = await goodput_bytes_per_s(lab[_REGISTRY], lab["node1"], paced_bytes_per_s=paced)
        goodput = min(goodput, one * shape.nodes)
    return goodput, link


async def run_rollout(
    stage: Stage,
    system: str,
    image: Image,
    *,
    label: str,
    watch: Callable[[Rollout], Awaitable[None]] = watch_nothing,
    arrivals: Arrivals | None = None,
    seed: int = 0,
    before: Image | None = None,
    prepare: Callable[[ProcessGroup, Running], Awaitable[Running]] | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Outcome:
    """Start a system, pull the image on all nodes and measure.

    Args:
        label: names the run's logs; differs from those before.
        watch: runs beside the pulls and is cancelled after the last.
        arrivals: when nodes start; all at once by default.
        before: an image that all nodes pull first, unmeasured; they do not ask again for layers that both share.
        prepare: called once the system runs; may start more, which ends with it, and change how nodes pull.
        notes: goes into the result's `run`.

    Raises:
        LabError: the system does not come up, or the image `before` cannot be pulled.
    """
    data = stage.space.directory(f"data-{label}")
    try:
        with ProcessGroup(stage.space.directory(f"logs/{label}")) as group:
            running = await start_system(system, group, stage.site, data)
            if prepare:
                running = await prepare(group, running)
            if before:
                await _pull_before(stage, running, before)
            await running.origin.offer(image)
            arrivals = arrivals or Arrivals()
            batches = arrivals.batches(stage.shape.nodes, random.Random(seed))
            held = {layer.digest for layer in before.layers} if before else set()
            rollout = Rollout(running, image, [Pull(node.name) for node in stage.nodes], held)
            setting = _setting(stage, rollout, arrivals, batches)
            return await _measure(stage, rollout, setting, batches, watch, dict(notes or {}))
    finally:
        shutil.rmtree(data, ignore_errors=True)


def _setting(stage: Stage, rollout: Rollout, arrivals: Arrivals, batches: Sequence[Sequence[Start]]) -> Setting:
    setting = Setting(
        image_bytes=rollout.pull_bytes,
        link_mbit=stage.shape.link_mbit,
        goodput_bytes_per_s=stage.goodput_bytes_per_s,
        link_goodput_bytes_per_s=stage.link_goodput_bytes_per_s,
        swarm_s=rollout.pull_bytes * stage.shape.nodes / stage.sending_bytes_per_s,
    )
    return replace(setting, bound_s=arrivals.bound_s(batches, max(setting.origin_s, setting.swarm_s), setting.link_s))


async def _pull_before(stage: Stage, running: Running, image: Image) -> None:
    await running.origin.offer(image)
    rollout = Rollout(running, image, [Pull(node.name) for node in stage.nodes])
    await _pull_everywhere(stage, rollout, Arrivals().batches(stage.shape.nodes, random.Random(0)))
    if errors := [pull.error for pull in rollout.pulls if pull.error]:
        raise LabError(f"the image before the upgrade could not be pulled: {errors[0]}")
    await trio.sleep(_LOG_SETTLE_S)


async def _measure(
    stage: Stage,
    rollout: Rollout,
    setting: Setting,
    batches: Sequence[Sequence[Start]],
    watch: Callable[[Rollout], Awaitable[None]],
    notes: dict[str, Any],
) -> Outcome:
    running = rollout.running
    spent = [await member.usage() for member in running.members]
    before = await _traffic(stage, running)
    cpu, harness_s = meters.machine_cpu(), time.process_time()
    rollout.started_s = began_s = trio.current_time()
    async with trio.open_nursery() as beside:
        beside.start_soon(sample, rollout.series, rollout.pulls, lambda: stage.origin_wire_bytes() or 0, began_s)
        beside.start_soon(watch, rollout)
        await _pull_everywhere(stage, rollout, batches)
        beside.cancel_scope.cancel()
    machine_s = (trio.current_time() - began_s) * (os.cpu_count() or 1)
    used = Cpu(meters.machine_cpu().idle_ratio_since(cpu), (time.process_time() - harness_s) / machine_s)
    members = [await _spent(member, earlier) for member, earlier in zip(running.members, spent, strict=True)]
    await trio.sleep(_LOG_SETTLE_S)
    traffic = (await _traffic(stage, running)).since(before)
    late = {start.node for batch in batches for start in batch if start.late}
    pulls = [_record(pull, began_s, number in late) for number, pull in enumerate(rollout.pulls)]
    notes["note"] = "; ".join(filter(None, (running.note, _doubt(traffic))))
    result = summarize(running.name, pulls, members, setting, traffic, used, notes)
    return Outcome(result, _failed_logs(rollout), rollout.series)


async def _traffic(stage: Stage, running: Running) -> Traffic:
    sent_bytes = await running.origin.sent_bytes()
    return Traffic(
        origin_bytes=sent_bytes,
        origin_wire_bytes=stage.origin_wire_bytes(),
        rack_bytes=stage.lab.rack_received_bytes(),
    )


def _doubt(traffic: Traffic) -> str:
    """Return why the origin's own count of its bytes cannot be believed, or ""."""
    wire_bytes = traffic.origin_wire_bytes
    if wire_bytes is None or wire_bytes <= traffic.origin_bytes * _HEADERS_MAX_RATIO + _CHATTER_BYTES:
        return ""
    return f"{wire_bytes / 2**20:.1f} MiB left the origin's host, which counts {traffic.origin_bytes / 2**20:.1f}"


async def _spent(member: Member, before: AgentRecord) -> AgentRecord:
    return (await member.usage()).since(before)


async def _pull_everywhere(stage: Stage, rollout: Rollout, batches: Sequence[Sequence[Start]]) -> None:
    nodes = stage.nodes
    bounds = 1.5 * len(nodes) if rollout.running.name in FROM_ONE else _DEADLINE_BOUNDS
    deadline_s = _DEADLINE_SPARE_S + bounds * rollout.pull_bytes / stage.goodput_bytes_per_s

    async def pull_one(start: Start, began_s: float) -> None:
        await trio.sleep_until(began_s + start.offset_s)
        record, host = rollout.pulls[start.node], nodes[start.node]
        await rollout.running.client.pull(record, host, rollout.image, deadline_s=deadline_s, held=rollout.held)

    for batch in batches:
        began_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            for start in batch:
                nursery.start_soon(pull_one, start, began_s)


def _record(pull: Pull, began_s: float, late: bool) -> NodeRecord:
    assert pull.started_s is not None, "every pull was started"
    assert pull.finished_s is not None, "every pull has ended"
    return NodeRecord(
        started_s=pull.started_s - began_s,
        finished_s=pull.finished_s - began_s,
        right=pull.right,
        ttfb_s=tuple(pull.ttfb_s),
        error=f"{pull.node}: {pull.error}" if pull.error else None,
        late=late,
    )


def _failed_logs(rollout: Rollout) -> dict[str, str]:
    failed = {pull.node for pull in rollout.pulls if not pull.right}
    return {agent.process.name: agent.process.tail() for agent in rollout.running.agents if agent.host.name in failed}


def _bytes_per_s(mbit: float) -> float:
    return mbit * 1e6 / 8
