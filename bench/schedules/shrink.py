# SPDX-License-Identifier: Apache-2.0
"""Plays a schedule, and makes one that fails smaller for as long as it does."""

from __future__ import annotations

import gc
import traceback
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bench.schedules.oracle import Violation
from bench.schedules.plan import SCHEDULER_KINDS
from bench.schedules.world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.schedules.plan import Fault, Schedule

MAX_TRIES = 400
SEEDS = 3
"""How often a smaller schedule is tried, with other seeds, before it counts as one that holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a schedule came to. `invariant` empty: all held."""

    invariant: str
    what: str
    egress_ratio: float
    failures: int
    finished_s: float
    events: int


def play(schedule: Schedule) -> Verdict:
    """Play one schedule. What a state machine raises is a failure, too."""
    world, invariant, what = World(schedule), "", ""
    try:
        world.play()
    except Violation as violation:
        invariant, what = violation.invariant, str(violation)
    except Exception as error:
        # Whatever the machines raise is what is looked for.
        where = traceback.extract_tb(error.__traceback__)[-1]
        invariant = f"raises {type(error).__name__} in {where.name}"
        what = "".join(traceback.format_exception(error))
    watch = world.watch
    verdict = Verdict(
        invariant=invariant,
        what=what,
        egress_ratio=watch.egress_ratio,
        failures=watch.failures,
        finished_s=watch.finished_s,
        events=world.events,
    )
    del world, watch
    gc.collect(1)
    return verdict


def shrink(schedule: Schedule, fails: Callable[[Schedule], bool]) -> Schedule:
    """Return the smallest schedule found that fails, too; if MAX_TRIES do, nothing can be left out of it any more."""
    tries = 0
    while True:
        for smaller in _smaller(schedule):
            if tries >= MAX_TRIES:
                return schedule
            for seed in range(schedule.seed, schedule.seed + SEEDS):
                tries += 1
                candidate = replace(smaller, seed=seed)
                if fails(candidate):
                    schedule = candidate
                    break
            else:
                continue
            break
        else:
            return schedule


def _smaller(schedule: Schedule) -> Iterator[Schedule]:
    """Yield schedules with something left out, much first."""
    faults = schedule.faults
    for index in range(len(faults)):
        yield replace(schedule, faults=faults[:index] + faults[index + 1 :])
    if schedule.manifest and schedule.chunks:
        yield replace(schedule, manifest=False)
    for index in range(len(schedule.chunks)):
        if len(schedule.chunks) > 1 or schedule.manifest:
            yield replace(schedule, chunks=schedule.chunks[:index] + schedule.chunks[index + 1 :])
    if schedule.nodes > 1:
        for node in reversed(range(schedule.nodes)):
            yield schedule.without_node(node)
    if schedule.schedulers:
        left = schedule.schedulers - 1
        yield replace(schedule, schedulers=left, mdns=schedule.mdns or not left, faults=_without_scheduler(schedule))
    if schedule.racks:
        yield replace(schedule, racks=0)
    for index, count in enumerate(schedule.chunks):
        for fewer in dict.fromkeys((1, count // 2, count - 1)):
            if 0 < fewer < count:
                yield replace(schedule, chunks=(*schedule.chunks[:index], fewer, *schedule.chunks[index + 1 :]))
    for index, fault in enumerate(faults):
        for node in fault.nodes if len(fault.nodes) > 1 else ():
            fewer_nodes = tuple(each for each in fault.nodes if each != node)
            yield replace(schedule, faults=(*faults[:index], replace(fault, nodes=fewer_nodes), *faults[index + 1 :]))


def _without_scheduler(schedule: Schedule) -> tuple[Fault, ...]:
    last = schedule.schedulers - 1
    return tuple(fault for fault in schedule.faults if fault.kind not in SCHEDULER_KINDS or last not in fault.nodes)
