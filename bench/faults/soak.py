# SPDX-License-Identifier: Apache-2.0
"""`p2pdist bench faults --soak`: many rollouts in a row on the same agents, which must not grow.

What is watched is their memory, descriptors, tasks and disk.

Each image is new, but for a first layer that ten of them share; the stores are so small that each has to evict all
the time. After each rollout every agent is looked at.
"""

from __future__ import annotations

import shutil
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from bench.contract import Target, add_line, at_most, begin_file, record, target_table
from bench.crowd import REPOSITORY, Shape, open_stage
from bench.lab import meters
from bench.lab.agents import found_by, start_agent, start_scheduler
from bench.lab.images import make_random_image
from bench.lab.processes import ProcessGroup
from bench.lab.pullers import Pull, pull
from bench.systems import P2PDIST

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from bench.crowd import Stage
    from bench.lab.agents import Agent
    from bench.lab.images import Image

STORE_MAX_BYTES = 24 << 20
_SETTINGS = f'store_max = "{STORE_MAX_BYTES >> 20}MiB"\nstore_low = 0.75\nstore_min_free = 0\n'
_LAYERS = 4
_ALIKE = 10
"""Images in a row that share their first layer."""
_DEADLINE_S = 60.0
_SETTLED_TIMEOUT_S = 10.0
_POLL_S = 0.05
_TELL_EVERY = 20
GROWTH_PERCENT = 5.0
SLACK = 2
"""Descriptors or tasks that an agent may have more than before: a connection that is just being made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is asked for; rollouts before `warm_up` count for nothing, then `window` are compared with the last ones."""

    rollouts: int
    seed: int
    nodes: int = 6
    link_mbit: float = 1000.0
    image_kib: int = 2560
    warm_up: int = 20
    window: int = 50
    json_file: Path | None = None

    def windows(self) -> tuple[slice, slice]:
        """Return which rollouts are compared: of few the first and last thirds."""
        warm_up = min(self.warm_up, self.rollouts // 4)
        width = max(1, min(self.window, (self.rollouts - warm_up) // 2))
        return slice(warm_up, warm_up + width), slice(self.rollouts - width, self.rollouts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """An agent after a rollout."""

    rss_mib: float
    descriptors: int
    tasks: int
    stored_bytes: int
    disk_bytes: int
    """What its data directory takes up."""
    evicted_blobs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One rollout: its seconds, the pulls that were not right, and each agent afterwards."""

    seconds: float
    errors: tuple[str, ...]
    looks: tuple[Look, ...]


async def run_soak(plan: Plan, console: Console) -> bool:
    """Do all rollouts and print what they came to; return whether nothing grew and every pull was right.

    Raises:
        LabError: the lab or an agent does not come up.
    """
    room_bytes = plan.rollouts * (plan.image_kib << 10) // 4 + STORE_MAX_BYTES
    shape = Shape(nodes=plan.nodes, link_mbit=plan.link_mbit, origin_mbit=plan.link_mbit, image_bytes=room_bytes)
    rounds: list[Round] = []
    async with open_stage(shape, shaped=True) as stage:
        with ProcessGroup(stage.space.directory("logs/soak")) as group:
            agents = await _start(stage, group)
            for number in range(plan.rollouts):
                rounds.append(await _round(plan, stage, agents, number))
                for error in rounds[-1].errors:
                    console.print(error, markup=False, highlight=False)
                if (number + 1) % _TELL_EVERY == 0:
                    console.print(_line(number + 1, rounds[-_TELL_EVERY:]), highlight=False)
    targets = judge(plan, rounds)
    console.print(target_table(targets))
    if plan.json_file:
        begin_file(plan.json_file)
        add_line(plan.json_file, _record(plan, rounds, targets))
    return all(target.met for target in targets)


async def _start(stage: Stage, group: ProcessGroup) -> list[Agent]:
    """Start a scheduler and agents with small stores, and wait until they are ready."""
    data = stage.space.directory("data")
    scheduler = stage.site.scheduler
    await start_scheduler(group, scheduler, data)
    settings = data / "agent.toml"
    settings.write_text(_SETTINGS)
    flags = [*found_by(scheduler), "--config", str(settings)]
    agents = [start_agent(group, host, data, stage.registry.base_url, flags) for host in stage.nodes]
    async with trio.open_nursery() as nursery:
        for agent in agents:
            nursery.start_soon(agent.wait_ready)
    return agents


async def _round(plan: Plan, stage: Stage, agents: Sequence[Agent], number: int) -> Round:
    """Roll one image out, and look at all agents once what they pulled is committed."""
    layout = stage.space.path / "image"
    shared = (1, plan.seed + number - number % _ALIKE)
    make = partial(make_random_image, image_bytes=plan.image_kib << 10, layers=_LAYERS, tag=f"soak{number}")
    image = await make(layout, seed=plan.seed + number, shared=shared)
    await trio.to_thread.run_sync(stage.registry.push, image, REPOSITORY)
    pulls = [Pull(agent.host.name) for agent in agents]
    began_s = trio.current_time()
    async with trio.open_nursery() as nursery:
        for agent, record_ in zip(agents, pulls, strict=True):
            nursery.start_soon(_pull, record_, agent, image)
    seconds = trio.current_time() - began_s
    shutil.rmtree(layout)
    errors = tuple(f"rollout {number + 1}, {each.node}: {each.error}" for each in pulls if not each.right)
    return Round(seconds=seconds, errors=errors, looks=tuple([await _look(agent) for agent in agents]))


async def _pull(record_: Pull, agent: Agent, image: Image) -> None:
    await pull(record_, agent.host, agent.source, REPOSITORY, image.tag, deadline_s=_DEADLINE_S)


async def _look(agent: Agent) -> Look:
    status = await agent.status()
    with trio.move_on_after(_SETTLED_TIMEOUT_S):
        while status.get("pulls", True):
            await trio.sleep(_POLL_S)
            status = await agent.status()
    store, pid = status["store"], agent.process.pid
    return Look(
        rss_mib=meters.process_rss_mib(pid),
        descriptors=meters.process_descriptors(pid),
        tasks=status["tasks"],
        stored_bytes=store["bytes"] + store["partial_bytes"],
        disk_bytes=_disk_bytes(Path(status["data_dir"])),
        evicted_blobs=store["evicted_blobs"],
    )


def _disk_bytes(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.lstat().st_blocks * 512
        except FileNotFoundError:  # evicted meanwhile
            continue
    return total


def judge(plan: Plan, rounds: Sequence[Round]) -> list[Target]:
    """Return what was wanted: nothing grows, between the first rollouts after the warm-up and the last."""
    first, last = (rounds[window] for window in plan.windows())
    before, after = (_memory_mib(window) for window in (first, last))
    worst = max(_growth_percent(first, last, agent) for agent in range(plan.nodes))
    evicted = min(look.evicted_blobs for look in rounds[-1].looks)
    return [
        at_most("failed pulls", sum(len(each.errors) for each in rounds), 0, ""),
        at_most("memory of all agents, growth", 100 * (after / before - 1), GROWTH_PERCENT, "%", 2),
        at_most("memory of the agent that grew most", worst, 2 * GROWTH_PERCENT, "%", 2),
        _not_more("descriptors of an agent", first, last, lambda look: look.descriptors),
        _not_more("tasks of an agent", first, last, lambda look: look.tasks),
        at_most("blobs on an agent's disk", _most(rounds, lambda look: look.stored_bytes), STORE_MAX_BYTES, "bytes"),
        Target("blobs that the agent evicted which evicted least", str(evicted), "≥ 1", evicted > 0),
    ]


def _memory_mib(rounds: Sequence[Round]) -> float:
    return statistics.mean(look.rss_mib for each in rounds for look in each.looks)


def _growth_percent(first: Sequence[Round], last: Sequence[Round], agent: int) -> float:
    before, after = (statistics.mean(each.looks[agent].rss_mib for each in window) for window in (first, last))
    return 100 * (after / before - 1)


def _most(rounds: Sequence[Round], figure: Callable[[Look], int]) -> int:
    return max(figure(look) for each in rounds for look in each.looks)


def _not_more(what: str, first: Sequence[Round], last: Sequence[Round], figure: Callable[[Look], int]) -> Target:
    return at_most(f"{what}, most at the end", _most(last, figure), _most(first, figure) + SLACK, "")


def _line(done: int, rounds: Sequence[Round]) -> str:
    looks = rounds[-1].looks
    return (
        f"{done} rollouts, {statistics.median(each.seconds for each in rounds):.2f} s each; memory "
        f"{_memory_mib(rounds):.1f} MiB, descriptors {max(look.descriptors for look in looks)}, "
        f"tasks {max(look.tasks for look in looks)}, stored {max(look.stored_bytes for look in looks) >> 20} MiB, "
        f"on disk {max(look.disk_bytes for look in looks) >> 20} MiB, "
        f"evicted {max(look.evicted_blobs for look in looks)}"
    )


def _record(plan: Plan, rounds: Sequence[Round], targets: Sequence[Target]) -> dict[str, object]:
    seconds = sorted(each.seconds for each in rounds)
    return record(
        {
            "system": P2PDIST,
            "nodes": plan.nodes,
            "image_bytes": plan.image_kib << 10,
            "link_mbit": plan.link_mbit,
            "p50_s": statistics.median(seconds),
            "last_s": seconds[-1],
            "failed_pulls": sum(len(each.errors) for each in rounds),
            "rss_mib_max": max(look.rss_mib for each in rounds for look in each.looks),
            "rounds": [asdict(each) for each in rounds],
            "expectations": [asdict(target) for target in targets],
        }
    )
