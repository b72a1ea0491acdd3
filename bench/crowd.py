# SPDX-License-Identifier: Apache-2.0
"""One image pulled on all nodes of a lab at once, and what that came to: shared by the demo and the benchmarks.

`open_stage` builds what stays over several rollouts (hosts, registry, goodput of a link), `run_rollout` starts one
system on it with empty data directories, lets every node pull, reads the counters and ends the system.
"""

from __future__ import annotations

import random
import shutil
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio

from bench.lab import meters
from bench.lab.calibrate import goodput_bytes_per_s
from bench.lab.hosts import Link, open_lab
from bench.lab.processes import ProcessGroup
from bench.lab.pullers import Pull, pull
from bench.lab.registry import find_docker_registry, start_registry
from bench.lab.workspace import workspace
from bench.results import AgentRecord, NodeRecord, Result, summarize
from bench.systems import DIRECT, start_system

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence

    from bench.lab.agents import Agent
    from bench.lab.hosts import Host, Lab
    from bench.lab.images import Image
    from bench.lab.registry import Registry
    from bench.lab.workspace import Workspace
    from bench.systems import Running

REPOSITORY = "p2pdist/demo"

_REGISTRY, _SCHEDULER = "registry", "scheduler"
_DEADLINE_SPARE_S = 30.0
_DEADLINE_BOUNDS = 6.0
"""A pull through a swarm that takes six times the bound, and half a minute, has failed."""

_KILL_POLL_S = 0.05
_LOG_SETTLE_S = 0.3
"""Until the registry has written the log lines of its last responses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The lab of a rollout. Rates in Mbit/s, both ways."""

    nodes: int
    link_mbit: float
    origin_mbit: float
    image_bytes: int


@dataclass(frozen=True, slots=True)
class Stage:
    """What stays over several rollouts."""

    shape: Shape
    lab: Lab
    space: Workspace
    registry: Registry
    goodput_bytes_per_s: float
    """Of one bulk flow from the registry's host to a node."""

    @property
    def nodes(self) -> list[Host]:
        return [host for name, host in self.lab.hosts.items() if name not in (_REGISTRY, _SCHEDULER)]


@dataclass(slots=True)
class Rollout:
    """A rollout while it runs, for whoever watches it."""

    running: Running
    image: Image
    pulls: list[Pull]
    started_s: float = field(default_factory=trio.current_time)

    @property
    def done_ratio(self) -> float:
        return sum(pull.done_bytes for pull in self.pulls) / (self.image.pull_bytes * len(self.pulls))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a rollout came to, and for each failed pull the end of its agent's log."""

    result: Result
    logs: Mapping[str, str]

    def problems(self) -> Iterator[str]:
        """Yield what was wrong, in lines for a person."""
        if note := self.result.run.get("note"):
            yield f"{self.result.system}: {note}"
        yield from self.result.errors
        for name, tail in self.logs.items():
            yield f"--- last lines of {name} ---\n{tail}"


async def watch_nothing(_: Rollout) -> None:
    """The watcher of those who need none."""


@asynccontextmanager
async def open_stage(shape: Shape, *, shaped: bool) -> AsyncIterator[Stage]:
    """Build hosts and registry, measure one link; all of it is gone at the end.

    Args:
        shaped: as `netns.why_not` allows it.

    Raises:
        LabError: something cannot be built or does not start.
    """
    node = Link(shape.link_mbit, shape.link_mbit)
    links = {_REGISTRY: Link(shape.origin_mbit, shape.origin_mbit), _SCHEDULER: node}
    links |= {f"node{number}": node for number in range(1, shape.nodes + 1)}
    async with AsyncExitStack() as stack:
        space = stack.enter_context(workspace(shape.image_bytes * (shape.nodes + 2)))
        program = await trio.to_thread.run_sync(find_docker_registry, space)
        lab = stack.enter_context(open_lab(links, shaped=shaped))
        group = stack.enter_context(ProcessGroup(space.logs))
        goodput = await goodput_bytes_per_s(lab[_REGISTRY], lab["node1"])
        registry = await start_registry(group, lab[_REGISTRY], space, program=program)
        yield Stage(shape, lab, space, registry, goodput)


async def run_rollout(
    stage: Stage,
    system: str,
    image: Image,
    *,
    label: str,
    watch: Callable[[Rollout], Awaitable[None]] = watch_nothing,
    jitter_s: float = 0.0,
    seed: int = 0,
    kill_scheduler_at: float | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Outcome:
    """Start a system, pull the image on all nodes at once and measure.

    Args:
        label: names the run's logs; differs from those before.
        watch: runs beside the pulls and is cancelled after the last.
        jitter_s: each node starts at a random moment of this many seconds.
        kill_scheduler_at: kill the scheduler when this part of all bytes has arrived.
        notes: goes into the result's `run`.

    Raises:
        LabError: the system does not come up.
    """
    data = stage.space.directory(f"data-{label}")
    try:
        with ProcessGroup(stage.space.directory(f"logs/{label}")) as group:
            running = await start_system(system, group, stage.nodes, stage.lab[_SCHEDULER], stage.registry, data)
            rng = random.Random(seed)
            starts_s = [rng.uniform(0, jitter_s) for _ in stage.nodes]
            return await _measure(stage, running, image, starts_s, watch, kill_scheduler_at, dict(notes or {}))
    finally:
        shutil.rmtree(data, ignore_errors=True)


async def _measure(
    stage: Stage,
    running: Running,
    image: Image,
    starts_s: Sequence[float],
    watch: Callable[[Rollout], Awaitable[None]],
    kill_scheduler_at: float | None,
    notes: dict[str, Any],
) -> Outcome:
    origin_bytes, wire_bytes = stage.registry.sent_bytes(), stage.lab[_REGISTRY].transmitted_bytes()
    spent_s = [agent.process.cpu_s() for agent in running.agents]
    cpu = meters.machine_cpu()
    rollout = Rollout(running, image, [Pull(node.name) for node in stage.nodes])
    async with trio.open_nursery() as beside:
        beside.start_soon(watch, rollout)
        if running.scheduler and kill_scheduler_at is not None:
            beside.start_soon(_kill_scheduler, rollout, kill_scheduler_at)
        await _pull_everywhere(stage, rollout, starts_s)
        beside.cancel_scope.cancel()
    idle = meters.machine_cpu().idle_ratio_since(cpu)
    agents = [await _account(agent, before_s) for agent, before_s in zip(running.agents, spent_s, strict=True)]
    await trio.sleep(_LOG_SETTLE_S)
    result = summarize(
        running.name,
        [_record(pull, rollout.started_s) for pull in rollout.pulls],
        agents,
        image_bytes=image.pull_bytes,
        link_mbit=stage.shape.link_mbit,
        goodput_bytes_per_s=stage.goodput_bytes_per_s,
        origin_bytes=stage.registry.sent_bytes() - origin_bytes,
        origin_wire_bytes=None if wire_bytes is None else (stage.lab[_REGISTRY].transmitted_bytes() or 0) - wire_bytes,
        idle_cpu_ratio=idle,
        run={**notes, "note": running.note},
    )
    return Outcome(result, _failed_logs(rollout))


async def _pull_everywhere(stage: Stage, rollout: Rollout, starts_s: Sequence[float]) -> None:
    bounds = 1.5 * len(rollout.pulls) if rollout.running.name == DIRECT else _DEADLINE_BOUNDS
    deadline_s = _DEADLINE_SPARE_S + bounds * rollout.image.pull_bytes / stage.goodput_bytes_per_s

    async def pull_one(record: Pull, host: Host, start_s: float) -> None:
        await trio.sleep_until(rollout.started_s + start_s)
        source = rollout.running.sources[host.name]
        await pull(record, host, source, REPOSITORY, rollout.image.tag, deadline_s=deadline_s)

    async with trio.open_nursery() as nursery:
        for record, host, start_s in zip(rollout.pulls, stage.nodes, starts_s, strict=True):
            nursery.start_soon(pull_one, record, host, start_s)


async def _kill_scheduler(rollout: Rollout, at_ratio: float) -> None:
    while rollout.done_ratio < at_ratio:  # noqa: ASYNC110 - a counter; nobody signals
        await trio.sleep(_KILL_POLL_S)
    if rollout.running.scheduler:
        rollout.running.scheduler.kill()


async def _account(agent: Agent, before_s: float) -> AgentRecord:
    """Read what an agent spent; its status may be missing, where it died."""
    cpu_s, status = agent.process.cpu_s() - before_s, await agent.status()
    moved = status.get("bytes", {})
    return AgentRecord(
        cpu_s=cpu_s,
        peak_rss_mib=agent.process.peak_rss_mib(),
        control_bytes=status.get("control_bytes", 0),
        duplicate_bytes=moved.get("duplicate", 0),
        from_peers_bytes=moved.get("from_peers", 0),
        from_origin_bytes=moved.get("from_origin", 0),
    )


def _record(pull: Pull, started_s: float) -> NodeRecord:
    assert pull.started_s is not None, "every pull was started"
    assert pull.finished_s is not None, "every pull has ended"
    return NodeRecord(
        started_s=pull.started_s - started_s,
        finished_s=pull.finished_s - started_s,
        right=pull.right,
        ttfb_s=tuple(pull.ttfb_s),
        error=f"{pull.node}: {pull.error}" if pull.error else None,
    )


def _failed_logs(rollout: Rollout) -> dict[str, str]:
    failed = {pull.node for pull in rollout.pulls if not pull.right}
    return {agent.process.name: agent.process.tail() for agent in rollout.running.agents if agent.host.name in failed}
