# SPDX-License-Identifier: Apache-2.0
"""Whole swarms on virtual time (tests/swarm_model.py): whatever goes wrong, every pull ends, and ends right.

A failing case names its seed: the same seed plays the same swarm again.
"""

from __future__ import annotations

from random import Random

import pytest

from tests.strategies import CHUNK
from tests.swarm_model import Blob, Faults, Node, World, blob

SEEDS = range(25)
LIMIT_S = 300


def image(rng: Random) -> list[Blob]:
    """A manifest, a layer, and a small one."""
    return [
        blob(1, 3000, sized=False),
        blob(2, CHUNK * rng.randint(1, 24) - rng.randint(0, 1000)),
        blob(3, CHUNK * rng.randint(0, 10) + 7),
    ]


def pull_all(world: World, node: Node) -> None:
    for entry in world.blobs.values():
        world.pull(node, entry)


def rollout(world: World, first_s: float, last_s: float) -> None:
    """Let every node begin at some time between these."""
    for node in world.nodes.values():
        world.after(world.rng.uniform(first_s, last_s), lambda node=node: pull_all(world, node))  # type: ignore[misc]


def ended(world: World) -> None:
    world.settle(LIMIT_S)
    world.assert_all_have(*world.blobs.values())
    world.assert_nothing_left()


@pytest.mark.parametrize("seed", SEEDS)
def test_with_a_scheduler_the_origin_gives_each_byte_once(seed: int) -> None:
    rng = Random(seed)
    world = World(seed, rng.randint(3, 8), image(rng))
    world.start_scheduler()
    rollout(world, 0.6, 1.6)
    world.run(2)
    ended(world)
    assert set(world.egress.values()) == {1}


@pytest.mark.parametrize("seed", SEEDS)
def test_without_a_scheduler_agents_that_know_each_other_fetch_each_byte_about_once(seed: int) -> None:
    rng = Random(seed)
    world = World(seed, rng.randint(3, 8), [blob(2, 60 * CHUNK)])
    world.mesh(0.4)
    rollout(world, 0.5, 1.0)
    world.run(2)
    ended(world)
    assert world.egress_ratio() <= 1.1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scheduler", [True, False], ids=["scheduler", "mesh"])
def test_lost_late_and_corrupt_chunks_and_a_failing_origin_only_slow_it_down(scheduler: bool, seed: int) -> None:
    rng = Random(seed)
    faults = Faults(fetch_fails=0.1, chunk_lost=0.03, chunk_late=0.03, chunk_corrupt=0.01)
    world = World(seed, rng.randint(3, 8), image(rng), faults=faults)
    if scheduler:
        world.start_scheduler()
    world.mesh()
    rollout(world, 0.6, 1.6)
    world.run(2)
    ended(world)
    # The worst is each for itself.
    assert world.egress_ratio() < 0.75 * len(world.nodes)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_scheduler_that_dies_and_comes_back_loses_nothing(seed: int) -> None:
    rng = Random(seed)
    world = World(seed, rng.randint(3, 8), image(rng))
    world.start_scheduler()
    world.mesh()
    rollout(world, 0.6, 1.6)
    died_s = rng.uniform(0.7, 2.5)
    world.after(died_s, world.stop_scheduler)
    if rng.random() < 0.7:
        world.after(died_s + rng.uniform(0.2, 4), world.start_scheduler)
    world.run(8)
    ended(world)
    assert world.egress_ratio() < 2.5


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scheduler", [True, False], ids=["scheduler", "mesh"])
def test_agents_that_die_and_come_back_go_on_where_they_were(scheduler: bool, seed: int) -> None:
    rng = Random(seed)
    world = World(seed, rng.randint(3, 8), image(rng), faults=Faults(chunk_lost=0.02, fetch_fails=0.05))
    if scheduler:
        world.start_scheduler()
    world.mesh()
    rollout(world, 0.6, 1.6)

    def back(node: Node) -> None:
        world.restart(node)
        world.enlist(node)
        for other in world.nodes:
            world.connect(node.peer, other)
        pull_all(world, node)

    for node in list(world.nodes.values())[: rng.randint(1, 2)]:
        died_s = rng.uniform(0.7, 3)
        world.after(died_s, lambda node=node: world.kill(node))  # type: ignore[misc]
        if rng.random() < 0.7:
            world.after(died_s + rng.uniform(0.1, 5), lambda node=node: back(node))  # type: ignore[misc]
    world.run(9)
    ended(world)
    assert world.egress_ratio() < 2.5


@pytest.mark.parametrize("seed", range(10))
def test_a_node_that_comes_late_takes_all_from_the_others_even_without_the_origin(seed: int) -> None:
    rng = Random(seed)
    world = World(seed, 4, image(rng))
    world.mesh()
    early, late = list(world.nodes.values())[:3], list(world.nodes.values())[3]
    for node in early:
        world.after(rng.uniform(0.6, 1.6), lambda node=node: pull_all(world, node))  # type: ignore[misc]
    world.run(2)
    world.settle(LIMIT_S)
    before, world.faults = world.egress.total(), Faults(fetch_fails=1.0)
    pull_all(world, late)
    ended(world)
    assert world.egress.total() == before


RACKS = 3


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("scheduler", [True, False], ids=["scheduler", "mesh"])
def test_a_chunk_comes_into_each_rack_about_once(scheduler: bool, seed: int) -> None:
    world = World(seed, 9, [blob(2, 60 * CHUNK)], racks=RACKS)
    if scheduler:
        world.start_scheduler()
    world.mesh(0.4)
    rollout(world, 0.6, 1.0)
    world.run(2)
    ended(world)
    # What is fetched from the origin is in one rack already. A member that joins takes over what others have under way.
    assert world.imports.total() <= 1.15 * (RACKS - 1) * 60


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dies", [True, False], ids=["dies", "hangs"])
def test_when_an_importer_dies_or_hangs_its_rack_goes_on(dies: bool, seed: int) -> None:
    world = World(seed, 9, [blob(2, 60 * CHUNK)], faults=Faults(chunk_lost=0.02), racks=RACKS)
    world.start_scheduler()
    world.mesh(0.4)
    rollout(world, 0.6, 1.0)
    victims = list(world.nodes.values())[:2]
    for node in victims:
        action = world.kill if dies else world.hang
        world.after(world.rng.uniform(0.8, 2), lambda node=node, action=action: action(node))  # type: ignore[misc]
    world.run(3)
    world.settle(60)
    world.assert_all_have(*world.blobs.values())
    for node in victims:
        # By now the links' own deadlines have closed them; only then are the slots free again.
        world.kill(node)
    world.assert_nothing_left()


@pytest.mark.parametrize("seed", range(5))
def test_a_private_pull_goes_through_beside_a_shared_one(seed: int) -> None:
    world = World(seed, 3, image(Random(seed)))
    world.mesh()
    first, *others = world.nodes.values()
    for entry in world.blobs.values():
        world.pull(first, entry, shared=False)
        for node in others:
            world.pull(node, entry)
    ended(world)
    assert not first.machine.counters.from_peers
    assert not first.machine.counters.to_peers


def test_the_same_seed_plays_the_same_swarm() -> None:
    def play() -> list[object]:
        world = World(7, 6, image(Random(7)), faults=Faults(chunk_lost=0.05, fetch_fails=0.1))
        world.start_scheduler()
        rollout(world, 0.6, 1.6)
        world.run(2)
        world.settle(LIMIT_S)
        return [node.machine.counters for node in world.nodes.values()]

    assert play() == play()
