# SPDX-License-Identifier: Apache-2.0
"""Several nodes, one blob or image: what crosses the origin's line, and what becomes of it under faults."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from p2pdist.core.chunkmap import MIN_CHUNK_BYTES
from p2pdist.core.pull import ERROR_GIVE_UP_S
from p2pdist.errors import OriginError, P2PDistError
from tests.fake_registry import FakeRegistry
from tests.nodes import (
    REPOSITORY,
    FakeOrigin,
    Node,
    cluster,
    connect_all,
    eventually,
    no_descriptor_left,
    origin_at,
    read,
    running,
    running_scheduler,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

    from p2pdist.core.types import Digest

CHUNK = MIN_CHUNK_BYTES
BLOB = random.Random(5).randbytes(24 * CHUNK + 77)


@asynccontextmanager
async def swarm(count: int, origin: FakeOrigin, *, scheduled: bool) -> AsyncIterator[list[Node]]:
    async with AsyncExitStack() as stack:
        address = (await stack.enter_async_context(running_scheduler()))[1] if scheduled else None
        yield await stack.enter_async_context(cluster(count, origin, scheduler=address))


@asynccontextmanager
async def cluster_with_scheduler(count: int, origin: FakeOrigin) -> AsyncIterator[tuple[list[Node], trio.CancelScope]]:
    async with (
        running_scheduler() as (_, address, scope),
        cluster(count, origin, scheduler=address) as nodes,
    ):
        yield nodes, scope


async def read_all(nodes: list[Node], digest: Digest) -> None:
    """Let all nodes read the blob at once, and compare."""

    async def one(node: Node) -> None:
        assert await node.read_blob(digest) == BLOB

    async with trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(one, node)


SCHEDULED = pytest.mark.parametrize("scheduled", [False, True], ids=["alone", "scheduled"])


@SCHEDULED
@pytest.mark.parametrize("count", [2, 5])
async def test_the_origin_gives_each_byte_about_once(count: int, scheduled: bool, quick_clock: MockClock) -> None:
    origin = FakeOrigin()
    digest = origin.add_blob(BLOB)
    async with swarm(count, origin, scheduled=scheduled) as nodes:
        await read_all(nodes, digest)
        assert origin.egress_bytes <= (1.0 if scheduled else 1.25) * len(BLOB)
        total = sum(node.machine.counters.from_peers for node in nodes)
        assert total >= (count - 1) * len(BLOB) - (origin.egress_bytes - len(BLOB))
        assert sum(node.machine.counters.corrupt_chunks for node in nodes) == 0


@SCHEDULED
async def test_a_latecomer_gets_everything_from_its_peers(scheduled: bool, quick_clock: MockClock) -> None:
    origin = FakeOrigin()
    digest = origin.add_blob(BLOB)
    async with swarm(3, origin, scheduled=scheduled) as nodes:
        await read_all(nodes[:2], digest)
        before = origin.egress_bytes
        await read_all(nodes[2:], digest)
        assert origin.egress_bytes == before
        assert nodes[2].machine.counters.from_peers == len(BLOB)


@SCHEDULED
async def test_a_blob_on_its_way_is_streamed_on_before_it_is_whole(scheduled: bool, quick_clock: MockClock) -> None:
    origin = FakeOrigin()
    digest = origin.add_blob(BLOB)
    origin.held[20 * CHUNK] = trio.Event()
    async with swarm(2, origin, scheduled=scheduled) as nodes:
        readers = [await node.open(digest) for node in nodes]
        for reader in readers:
            assert await read(reader, 0, 8 * CHUNK) == BLOB[: 8 * CHUNK]
        origin.held.pop(20 * CHUNK).set()
        for reader in readers:
            assert await read(reader) == BLOB
            reader.close()


@SCHEDULED
async def test_with_the_origin_gone_a_peer_that_has_the_image_is_enough(
    scheduled: bool, quick_clock: MockClock
) -> None:
    origin = FakeOrigin()
    manifest = origin.add_image("v1", [BLOB, b"small"])
    async with swarm(2, origin, scheduled=scheduled) as nodes:
        body = (await nodes[0].manifest("v1")).body
        for digest, data in origin.blobs.items():
            assert await nodes[0].read_blob(digest) == data
        await eventually(lambda: not nodes[0].puller.arrivals)
        origin.error = OriginError("the registry is down")
        began = trio.current_time()
        again = await nodes[1].manifest(manifest)
        assert (again.body, again.media_type) == (body, origin.manifests[manifest].media_type)
        assert trio.current_time() - began < 2
        for digest, data in origin.blobs.items():
            assert await nodes[1].read_blob(digest) == data


@SCHEDULED
async def test_with_the_origin_gone_and_no_holder_the_error_comes_within_its_bound(
    scheduled: bool, quick_clock: MockClock
) -> None:
    origin = FakeOrigin()
    manifest = origin.add_image("v1", [BLOB])
    async with swarm(2, origin, scheduled=scheduled) as nodes:
        origin.error = OriginError("the registry is down")
        began = trio.current_time()
        with pytest.raises(P2PDistError, match="the registry is down"):
            await nodes[0].manifest(manifest)
        with pytest.raises(P2PDistError, match="the registry is down"):
            await nodes[0].read_blob(next(iter(origin.blobs)))
        assert trio.current_time() - began < 2 * ERROR_GIVE_UP_S + 5


@SCHEDULED
async def test_a_node_that_dies_in_the_middle_costs_the_others_little(scheduled: bool, quick_clock: MockClock) -> None:
    origin = FakeOrigin()
    origin.chunk_s = 0.2
    digest = origin.add_blob(BLOB)
    async with swarm(4, origin, scheduled=scheduled) as nodes, trio.open_nursery() as nursery:
        nursery.start_soon(read_all, nodes[1:], digest)
        doomed = await nodes[0].open(digest)
        await eventually(lambda: nodes[0].machine.counters.from_peers > 3 * CHUNK)
        nodes[0].scope.cancel()
        doomed.close()
    assert origin.egress_bytes < 1.6 * len(BLOB)


@SCHEDULED
async def test_what_a_node_fetches_is_taken_over_at_once_when_it_leaves(
    scheduled: bool, quick_clock: MockClock
) -> None:
    """A node says farewell by closing its connections, whether it was told to stop or killed."""
    stuck, origin = FakeOrigin(), FakeOrigin()
    stuck.gate = trio.Event()
    digest = origin.add_blob(BLOB)
    async with AsyncExitStack() as stack:
        address = (await stack.enter_async_context(running_scheduler()))[1] if scheduled else None
        leaver, *others = nodes = [
            Node(number, origin if number > 1 else stuck, scheduler=address) for number in (1, 2, 3)
        ]
        for node in nodes:
            stack.callback(node.store.close)
        await stack.enter_async_context(running(*nodes))
        await connect_all(nodes)
        doomed = await leaver.puller.start(REPOSITORY, digest, len(BLOB))
        await eventually(lambda: stuck.count("fetch") > 0)
        for node in others:
            await node.puller.start(REPOSITORY, digest, len(BLOB))
        await trio.sleep(0.5)
        assert not doomed.settled.is_set()
        left_at = trio.current_time()
        leaver.scope.cancel()
        await eventually(lambda: all(node.store.contains(digest) for node in others))
        assert trio.current_time() - left_at < 2.0


async def test_a_scheduler_that_dies_in_the_middle_costs_little(quick_clock: MockClock) -> None:
    origin = FakeOrigin()
    origin.chunk_s = 0.2
    digest = origin.add_blob(BLOB)
    async with cluster_with_scheduler(4, origin) as (nodes, scheduler), trio.open_nursery() as nursery:
        nursery.start_soon(read_all, nodes, digest)
        await eventually(lambda: origin.egress_bytes > 6 * CHUNK)
        scheduler.cancel()
        await eventually(lambda: not any(node.machine.state.scheduled for node in nodes))
    assert origin.egress_bytes < 1.6 * len(BLOB)


async def test_a_node_whose_store_is_full_fails_alone(quick_clock: MockClock) -> None:
    origin = FakeOrigin()
    digest = origin.add_blob(BLOB)
    async with swarm(3, origin, scheduled=False) as nodes:
        nodes[0].store._limits = type(nodes[0].store._limits)(len(BLOB) - 1, 0, 0)
        with pytest.raises(P2PDistError, match="no room"):
            await nodes[0].read_blob(digest)
        await read_all(nodes[1:], digest)


# -------------------------------------------------------------- private content


@SCHEDULED
async def test_private_content_is_told_to_nobody_and_given_to_nobody(scheduled: bool, quick_clock: MockClock) -> None:
    origin = FakeOrigin()
    manifest = origin.add_image("v1", [BLOB])
    layer = next(digest for digest, data in origin.blobs.items() if data == BLOB)
    async with swarm(2, origin, scheduled=scheduled) as nodes:
        if not nodes[0].peers:
            nodes[0].meet(nodes[1])
            await eventually(lambda: nodes[0].peers == {2})
        nodes[0].public = False
        told: list[object] = []
        send = nodes[0].tracker.send if nodes[0].tracker else None
        if nodes[0].tracker:
            nodes[0].tracker.send = lambda message: (told.append(message), send(message))  # type: ignore[method-assign]
        await nodes[0].manifest("v1")
        assert await nodes[0].read_blob(layer) == BLOB
        await eventually(lambda: not nodes[0].puller.arrivals)
        before = origin.egress_bytes
        await nodes[1].manifest(manifest)
        assert await nodes[1].read_blob(layer) == BLOB
        assert nodes[1].machine.counters.from_peers == 0
        assert nodes[0].machine.counters.to_peers == 0
        assert origin.egress_bytes >= before + len(BLOB)
        assert told == []


async def test_what_was_private_stays_so_after_a_restart_and_with_an_empty_memory(quick_clock: MockClock) -> None:
    """A peer asks for a blob that the machine has forgotten: only public ones are looked up."""
    origin = FakeOrigin()
    digest = origin.add_blob(BLOB)
    first = Node(1, origin, public=False)
    async with running(first):
        await first.read_blob(digest)
        await eventually(lambda: not first.puller.arrivals)
    again, other = Node(1, origin, first.store), Node(2, origin)
    async with running(again, other):
        await connect_all([again, other])
        await other.read_blob(digest)
        assert again.machine.counters.to_peers == 0
    for node in (first, other):
        node.store.close()


# ---------------------------------------------------------------- the whole way


async def test_three_nodes_pull_an_image_from_a_registry_over_http_by_way_of_a_scheduler(
    quick_clock: MockClock,
) -> None:
    async with FakeRegistry().running() as registry, running_scheduler() as (_, address, _scope):
        registry.add_image("lab/image", "v1", [BLOB, BLOB[:1000]])
        origins = [origin_at(registry) for _ in range(3)]
        nodes = [Node(number, origin, scheduler=address) for number, origin in enumerate(origins, 1)]
        async with running(*nodes), trio.open_nursery() as nursery:

            async def pull(node: Node) -> None:
                await node.manifest("v1")
                for digest, data in list(registry.blobs.items()):
                    assert await node.read_blob(digest) == data

            for node in nodes:
                nursery.start_soon(pull, node)
        for node, origin in zip(nodes, origins, strict=True):
            await origin.aclose()
            node.store.close()
        served = sum(len(registry.blobs[d]) for d in registry.blobs)
        fetched = sum(origin.statistics()["reg.test"]["bytes"] for origin in origins)
        assert fetched < 1.1 * served + 3 * 2000


async def test_stopping_everything_in_mid_pull_leaves_nothing_open(quick_clock: MockClock) -> None:
    await trio.to_thread.run_sync(lambda: None)
    origin = FakeOrigin()
    digest = origin.add_blob(BLOB)
    origin.held[20 * CHUNK] = trio.Event()
    with no_descriptor_left():
        async with swarm(4, origin, scheduled=True) as nodes:
            readers = [await node.open(digest) for node in nodes]
            for reader in readers:
                await read(reader, 0, 10 * CHUNK)
                reader.close()
