# SPDX-License-Identifier: Apache-2.0
"""Nodes with two schedulers, real ones on loopback: shares, a death in mid-pull, the way back, views that differ."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

import trio

from p2pdist.core.chunkmap import MIN_CHUNK_BYTES
from p2pdist.core.schedulers import IN_USE, RIPE_S, home_of
from p2pdist.core.types import Repository
from tests.nodes import FakeOrigin, Node, cluster, connect_all, eventually, running, running_scheduler
from tests.strategies import peer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from trio.testing import MockClock

    from p2pdist.core.types import Digest, PeerId
    from scheduler.server import SchedulerServer

CHUNK = MIN_CHUNK_BYTES
BLOBS = [random.Random(number).randbytes(12 * CHUNK + number) for number in range(4)]


@dataclass
class Pair:
    """Two schedulers, each of which can be ended and started again where it was."""

    servers: dict[int, SchedulerServer] = field(default_factory=dict)
    ports: dict[int, int] = field(default_factory=lambda: {0: 0, 1: 0})
    _scopes: dict[int, trio.CancelScope] = field(default_factory=dict)
    _starts: Iterator[int] = field(default_factory=lambda: count(3))
    """Ids that are drawn would leave one without any of these few blobs now and then."""

    async def serve(self, which: int, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        own_id = peer(next(self._starts))
        async with running_scheduler(self.ports[which], own_id) as (server, (_, port), scope):
            self.servers[which], self.ports[which], self._scopes[which] = server, port, scope
            task_status.started()
            await trio.sleep_forever()

    def kill(self, which: int) -> None:
        self._scopes[which].cancel()

    @property
    def addresses(self) -> list[tuple[str, int]]:
        return [("127.0.0.1", port) for port in self.ports.values()]

    def id_of(self, which: int) -> PeerId:
        return self.servers[which].state.leading.own_id

    def home(self, key: str) -> int:
        """Which of the two a blob or tag belongs to."""
        return [self.id_of(0), self.id_of(1)].index(home_of(key, [self.id_of(0), self.id_of(1)]))


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Pair, trio.Nursery]]:
    """Run two schedulers; start them again in the nursery."""
    both = Pair()
    async with trio.open_nursery() as nursery:
        for which in (0, 1):
            await nursery.start(both.serve, which)
        yield both, nursery
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def swarm(number: int, origin: FakeOrigin) -> AsyncIterator[tuple[Pair, trio.Nursery, list[Node]]]:
    async with AsyncExitStack() as stack:
        both, nursery = await stack.enter_async_context(pair())
        first, second = both.addresses
        nodes = await stack.enter_async_context(cluster(number, origin, scheduler=first, more_schedulers=[second]))
        await trio.sleep(5)  # what has just come up is looked at more closely
        yield both, nursery, nodes


def slow_origin() -> tuple[FakeOrigin, list[Digest]]:
    origin = FakeOrigin()
    origin.chunk_s = 0.2
    return origin, [origin.add_blob(blob) for blob in BLOBS]


async def read_all(nodes: list[Node], digests: list[Digest]) -> None:
    """Let all nodes read all blobs at once, and compare."""

    async def one(node: Node, number: int) -> None:
        assert await node.read_blob(digests[number]) == BLOBS[number]

    async with trio.open_nursery() as nursery:
        for node in nodes:
            for number in range(len(digests)):
                nursery.start_soon(one, node, number)


def states(node: Node) -> list[str]:
    assert node.tracker is not None
    return [standing.state for standing in node.tracker.status()]


async def test_each_swarm_is_on_one_of_the_two_and_the_origin_gives_each_byte_once(quick_clock: MockClock) -> None:
    origin, digests = slow_origin()
    async with swarm(4, origin) as (both, _, nodes), trio.open_nursery() as nursery:
        nursery.start_soon(read_all, nodes, digests)
        await eventually(lambda: sum(len(server.state.swarms) for server in both.servers.values()) == len(digests))
        for which, server in both.servers.items():
            assert sorted(server.state.swarms) == sorted(blob for blob in digests if both.home(blob) == which)
    assert origin.egress_bytes == sum(map(len, BLOBS))


async def test_one_that_dies_in_mid_pull_costs_little_and_takes_its_share_when_it_is_back(
    quick_clock: MockClock,
) -> None:
    origin, digests = slow_origin()
    async with swarm(4, origin) as (both, schedulers, nodes):
        dead = both.home(digests[0])
        living = both.servers[1 - dead]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_all, nodes, digests)
            await eventually(lambda: origin.egress_bytes > 6 * CHUNK)
            both.kill(dead)
            await eventually(lambda: digests[0] in living.state.swarms)
            assert all(IN_USE in states(node) and "lost" in states(node) for node in nodes)
        assert origin.egress_bytes <= 1.1 * sum(map(len, BLOBS))
        await schedulers.start(both.serve, dead)
        await eventually(lambda: all("returning" in states(node) for node in nodes))
        assert all(node.machine.state.scheduled for node in nodes)
        await eventually(lambda: all(states(node) == [IN_USE, IN_USE] for node in nodes))
        assert both.servers[dead].state.leading.live == living.state.leading.live == {both.id_of(0), both.id_of(1)}


async def test_a_running_swarm_goes_over_to_the_one_that_is_back_without_a_byte_twice(quick_clock: MockClock) -> None:
    origin, digests = slow_origin()
    async with swarm(4, origin) as (both, schedulers, nodes):
        dead = both.home(digests[0])
        both.kill(dead)
        await eventually(lambda: all("lost" in states(node) for node in nodes))
        await schedulers.start(both.serve, dead)
        await eventually(lambda: all("returning" in states(node) for node in nodes))
        await trio.sleep(RIPE_S - 2)
        origin.chunk_s = 1.5  # so slow that no blob is complete before the other scheduler counts
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_all, nodes, digests)
            await eventually(lambda: bool(both.servers[dead].state.swarms))
            assert len(both.servers[1 - dead].state.swarms) == len(digests)
            moved = set(both.servers[dead].state.swarms)
        assert moved == {blob for blob in digests if both.home(blob) == dead}
        assert both.servers[1 - dead].state.swarms == {}
    assert origin.egress_bytes == sum(map(len, BLOBS))


async def test_a_node_that_alone_does_not_reach_a_swarms_scheduler_gets_the_chunks_from_its_peers(
    quick_clock: MockClock,
) -> None:
    origin, digests = slow_origin()
    async with swarm(4, origin) as (both, _, nodes):
        cut_off = Node(9, origin, scheduler=both.addresses[1 - both.home(digests[0])])
        async with running(cut_off):
            await eventually(lambda: cut_off.uses(1))
            await read_all([*nodes, cut_off], digests[:1])
        cut_off.store.close()
    assert origin.egress_bytes <= 1.1 * len(BLOBS[0])


async def test_one_that_is_frozen_is_given_up_while_something_depends_on_it(quick_clock: MockClock) -> None:
    origin, digests = slow_origin()
    async with swarm(3, origin) as (both, _, nodes):
        await connect_all(nodes)
        frozen = both.home(digests[0])
        both.servers[frozen]._take_in = lambda *_: None  # type: ignore[method-assign]
        await read_all(nodes, digests[:1])
        assert all(states(node)[frozen] != IN_USE for node in nodes)
    assert origin.egress_bytes <= 1.1 * len(BLOBS[0])


async def test_two_addresses_of_the_same_scheduler_do_not_fight(quick_clock: MockClock) -> None:
    origin, digests = slow_origin()
    async with running_scheduler() as (server, (_, port), _scope):
        nodes = [
            Node(number, origin, scheduler=("127.0.0.1", port), more_schedulers=[("localhost", port)])
            for number in (1, 2)
        ]
        async with running(*nodes):
            await trio.sleep(10)
            joined = server.messages_in
            await trio.sleep(20)
            assert server.messages_in == joined
            assert all(sorted(states(node))[0] == IN_USE and "the same as" in sorted(states(node))[1] for node in nodes)
            await read_all(nodes, digests[:1])
        for node in nodes:
            node.store.close()
    assert origin.egress_bytes == len(BLOBS[0])


async def test_without_any_scheduler_the_nodes_do_as_without_one_at_all(quick_clock: MockClock) -> None:
    origin, digests = slow_origin()
    async with swarm(3, origin) as (both, _, nodes):
        await connect_all(nodes)
        both.kill(0)
        both.kill(1)
        await eventually(lambda: not any(node.machine.state.scheduled for node in nodes))
        await read_all(nodes, digests)
        assert all(node.tracker is not None and node.tracker.summary().startswith("lost") for node in nodes)
    assert origin.egress_bytes <= 1.6 * sum(map(len, BLOBS))


async def test_a_tag_whose_scheduler_dies_is_asked_of_the_other(quick_clock: MockClock) -> None:
    origin, _ = slow_origin()
    origin.add_image("v1", [BLOBS[0]])
    repository = Repository("reg.test", "lab/image")
    async with swarm(3, origin) as (both, _, nodes), trio.open_nursery() as nursery:
        origin.gate = trio.Event()
        home = both.home(f"{repository}:v1")
        for node in nodes:
            nursery.start_soon(node.resolve, "v1")
        await eventually(lambda: origin.count("head_manifest") == 2)
        both.kill(home)
        other = both.servers[1 - home].state
        await eventually(lambda: bool(other._tags._tags) and origin.count("head_manifest") == 4)
        origin.gate.set()
    assert origin.count("head_manifest") == 4
