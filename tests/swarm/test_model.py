# SPDX-License-Identifier: Apache-2.0
"""Whole swarms on virtual time (bench/schedules): what certain situations may cost.

What goes wrong at random is in tests/bench/schedules. A failing case names its seed: the same plays the same swarm.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from bench.schedules.plan import Fault, Schedule, draw
from bench.schedules.world import World

SEEDS = range(25)
RACKS = 3
BY = pytest.mark.parametrize("schedulers", [1, 0], ids=["scheduler", "mesh"])


def calm(seed: int, schedulers: int) -> Schedule:
    """A swarm of a seed in which nothing goes wrong."""
    return replace(draw(seed), schedulers=schedulers, mdns=True, racks=0, faults=())


def played(schedule: Schedule, *faults: Fault) -> World:
    world = World(replace(schedule, faults=faults))
    world.play()
    return world


def some_time(seed: int, name: str, first_s: float, last_s: float) -> float:
    return Random(f"{seed}/{name}").uniform(first_s, last_s)


@pytest.mark.parametrize("seed", SEEDS)
def test_with_a_scheduler_the_origin_gives_each_byte_once(seed: int) -> None:
    assert set(played(calm(seed, 1)).origin.egress.values()) == {1}


@pytest.mark.parametrize("seed", SEEDS)
def test_without_a_scheduler_agents_that_know_each_other_fetch_each_byte_about_once(seed: int) -> None:
    world = played(Schedule(seed=seed, nodes=3 + seed % 6, chunks=(60,), spread_s=0.5))
    assert world.watch.egress_ratio <= 1.1


@pytest.mark.parametrize("seed", SEEDS)
def test_a_scheduler_that_dies_and_comes_back_costs_little(seed: int) -> None:
    died_s, gone_s = some_time(seed, "died", 0.7, 2.5), some_time(seed, "back", 0.2, 4)
    world = played(
        calm(seed, 1), Fault(kind="scheduler killed", at_s=died_s, for_s=gone_s * (seed % 10 < 7), nodes=(0,))
    )
    assert world.watch.egress_ratio < 2.5


@BY
@pytest.mark.parametrize("seed", SEEDS)
def test_agents_that_die_and_come_back_go_on_where_they_were(schedulers: int, seed: int) -> None:
    died_s, gone_s = some_time(seed, "died", 0.7, 3), some_time(seed, "back", 0.1, 5)
    nodes = (0, 1)[: 1 + seed % 2]
    world = played(
        calm(seed, schedulers), Fault(kind="killed", at_s=died_s, for_s=gone_s * (seed % 10 < 7), nodes=nodes)
    )
    assert world.watch.egress_ratio < (2.5 if schedulers else 3)


def test_an_agent_whose_connections_all_break_at_once_does_not_fetch_the_rest_for_itself() -> None:
    ratios = []
    for seed in SEEDS:
        swarm = Schedule(seed=seed, nodes=6, chunks=(24,), chunk_s=0.2, spread_s=0.5)
        reset = Fault(kind="reset", at_s=some_time(seed, "reset", 1.5, 3), nodes=(0,))
        ratios.append(played(swarm, reset).watch.egress_ratio)
    # Some are back too late.
    assert sum(ratios) / len(ratios) <= 1.4


@pytest.mark.parametrize("seed", range(10))
def test_a_node_that_comes_late_takes_all_from_the_others_even_without_the_origin(seed: int) -> None:
    without = Fault(kind="refused", at_s=0, for_s=500, nodes=(3,))
    world = World(replace(calm(seed, 0), nodes=4, faults=(without,)))
    world.begin()
    world.run(1)
    for number in range(3):
        world.pull_all(world.agent(number))
    world.run(60)
    assert all(world.agent(number).whole == world.blobs.keys() for number in range(3))
    before = world.origin.egress.total()
    world.pull_all(world.agent(3))
    world.settle()
    assert world.origin.egress.total() == before


@BY
@pytest.mark.parametrize("seed", SEEDS)
def test_a_chunk_comes_into_each_rack_about_once(schedulers: int, seed: int) -> None:
    world = played(Schedule(seed=seed, nodes=9, chunks=(60,), schedulers=schedulers, spread_s=0.4, racks=RACKS))
    # What is fetched from the origin is in one rack already. A member that joins takes over what others have under way.
    assert world.imports.total() <= 1.15 * (RACKS - 1) * 60


@pytest.mark.parametrize("kind", ["killed", "frozen"])
@pytest.mark.parametrize("seed", SEEDS)
def test_when_an_importer_dies_or_hangs_its_rack_goes_on(kind: str, seed: int) -> None:
    begins_s = some_time(seed, kind, 0.8, 2)
    gone = Fault(kind=kind, at_s=begins_s, for_s=100, nodes=(0, 1))
    world = World(Schedule(seed=seed, nodes=9, chunks=(60,), schedulers=1, spread_s=0.4, racks=RACKS, faults=(gone,)))
    world.begin()
    world.run(1)
    for agent in world.agents.values():
        agent.act(world.pull_all, agent)
    world.run(60)
    assert all(world.agent(number).whole == world.blobs.keys() for number in range(2, 9))
    world.run(110)
    world.settle()


@pytest.mark.parametrize("seed", range(5))
def test_a_private_pull_goes_through_beside_a_shared_one(seed: int) -> None:
    world = World(replace(calm(seed, 0), nodes=3))
    world.begin()
    world.run(1)
    first, *others = world.agents.values()
    world.pull_all(first, shared=False)
    for agent in others:
        world.pull_all(agent)
    world.settle()
    assert not first.machine.counters.from_peers
    assert not first.machine.counters.to_peers
