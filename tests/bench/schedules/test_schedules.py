# SPDX-License-Identifier: Apache-2.0
"""Random schedules of faults: whatever goes wrong, what must hold holds; and what does not hold is found.

A failing seed: `p2pdist bench schedules --seed SEED --count 1` makes it smaller and prints it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from bench.schedules.agent import Agent
from bench.schedules.oracle import Violation
from bench.schedules.plan import KINDS, Fault, Schedule, draw
from bench.schedules.shrink import play, shrink
from bench.schedules.world import World
from p2pdist.core import events as ev
from p2pdist.core.pull import PullMachine
from p2pdist.core.reputation import Offence

if TYPE_CHECKING:
    from collections.abc import Callable

PER_TEST = 15
FOUND = (775, 1311, 2663, 3282, 3979)
"""Seeds beyond these that have found something."""
CALM = Schedule(seed=1, nodes=4, chunks=(8,), schedulers=1)


@pytest.mark.parametrize("first", range(0, 150, PER_TEST))
def test_whatever_goes_wrong_what_must_hold_holds(first: int) -> None:
    broken = {seed: verdict.what for seed in range(first, first + PER_TEST) if (verdict := play(draw(seed))).invariant}
    assert broken == {}


@pytest.mark.parametrize("seed", FOUND)
def test_what_once_went_wrong_does_so_no_more(seed: int) -> None:
    assert play(draw(seed)).what == ""


def test_the_same_schedule_plays_the_same() -> None:
    assert play(draw(7)) == play(draw(7))


def test_every_kind_of_fault_is_drawn_and_survives_json() -> None:
    drawn = [draw(seed) for seed in range(300)]
    assert {fault.kind for schedule in drawn for fault in schedule.faults} == set(KINDS)
    for schedule in drawn:
        assert Schedule.from_dict(json.loads(json.dumps(schedule.as_dict()))) == schedule


def test_a_schedule_says_what_goes_wrong_in_the_order_of_time() -> None:
    faults = (
        Fault(kind="error", at_s=2, for_s=1),
        Fault(kind="busy", at_s=3, for_s=1, nodes=(1,), ratio=5),
        Fault(kind="killed", at_s=1, nodes=(2,)),
        Fault(kind="scheduler killed", at_s=4, nodes=(0,)),
    )
    assert str(Schedule(seed=3, nodes=4, chunks=(8, 2), manifest=True, schedulers=1, faults=faults)).splitlines() == [
        "seed 3: 4 nodes, a scheduler and mDNS, 8 + 2 chunks and a manifest of 0.05 s, within 1 s",
        "   1.00 s  node 2: killed for good",
        "   2.00 s  origin: error to all for 1.00 s",
        "   3.00 s  origin: busy to node 1 for 1.00 s (5)",
        "   4.00 s  scheduler 0: killed for good",
    ]


def test_a_failing_schedule_is_made_as_small_as_it_gets() -> None:
    def fails(schedule: Schedule) -> bool:
        return any(fault.kind == "frozen" and 2 in fault.nodes for fault in schedule.faults) and schedule.chunks[0] > 2

    faults = tuple(Fault(kind=kind, at_s=1, for_s=1, nodes=(2, 3)) for kind in ("killed", "frozen", "parted"))
    big = Schedule(seed=1, nodes=8, chunks=(9, 4), manifest=True, schedulers=2, racks=2, faults=faults)
    small = shrink(big, fails)
    assert small == Schedule(seed=1, nodes=3, chunks=(3,), faults=(Fault(kind="frozen", at_s=1, for_s=1, nodes=(2,)),))


def test_a_schedule_keeps_a_blob_however_small_it_gets() -> None:
    big = Schedule(seed=1, nodes=2, chunks=(1, 1), manifest=True)
    small = shrink(big, lambda schedule: schedule.manifest or not schedule.chunks)
    assert (small.chunks, small.manifest) == ((), True)


# ------------------------------------------------------- machines that are wrong


class Altered(PullMachine):
    """A machine whose commands somebody changes."""

    alter: Callable[[ev.Command], list[ev.Command]]

    def handle(self, event: ev.Event, now: float) -> list[ev.Command]:
        return [altered for command in super().handle(event, now) for altered in self.alter(command)]


def altered(alter: Callable[[Agent, ev.Command], list[ev.Command]], schedule: Schedule = CALM) -> str:
    """Play with node 0's machine altered; return the invariant that broke, empty where none did."""
    world = World(schedule)
    agent = world.agent(0)
    agent.machine = Altered(agent.peer_id, world.rng("altered"))
    agent.machine.alter = lambda command: alter(agent, command)
    try:
        world.play()
    except Violation as violation:
        return violation.invariant
    return ""


def twice(_agent: Agent, command: ev.Command) -> list[ev.Command]:
    return [command, command] if isinstance(command, ev.WriteChunk) else [command]


def never_checks(_agent: Agent, command: ev.Command) -> list[ev.Command]:
    return [] if isinstance(command, ev.CheckBlob) else [command]


def gives_up(_agent: Agent, command: ev.Command) -> list[ev.Command]:
    failed = ev.Fail(blob=command.blob, causes=[OSError("enough")]) if isinstance(command, ev.WriteChunk) else None
    return [command, failed] if failed is not None and command.index == 3 else [command]


def bans(agent: Agent, command: ev.Command) -> list[ev.Command]:
    if not isinstance(command, ev.TakeChunk):
        return [command]
    return [ev.DropPeer(peer=command.peer, offence=Offence.STALLED, reason="late", ban_s=30.0), command]


@pytest.mark.parametrize(
    ("alter", "invariant"),
    [(twice, "written once"), (never_checks, "ends right"), (gives_up, "promise"), (bans, "banned")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_machine_that_does_wrong_is_found(
    alter: Callable[[Agent, ev.Command], list[ev.Command]], invariant: str
) -> None:
    assert altered(lambda _agent, command: [command]) == ""
    assert altered(alter) == invariant
