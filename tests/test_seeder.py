# SPDX-License-Identifier: Apache-2.0
"""A chunk that rotted in the store reaches neither a peer nor a runtime, and nobody is blamed for it."""

from __future__ import annotations

import os
import random
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
import trio

from p2pdist.core.chunkmap import MIN_CHUNK_BYTES
from p2pdist.store.checks import HOLDS_S
from p2pdist.store.memory import MemoryStore
from tests.nodes import REPOSITORY, FakeOrigin, Node, connect_all, eventually, no_descriptor_left, read, running

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trio.testing import MockClock

    from p2pdist.core.types import Digest
    from p2pdist.ports import ChunkStore

CHUNK = MIN_CHUNK_BYTES
BLOB = random.Random(8).randbytes(6 * CHUNK + 99)
ROTTEN = 4


class Clock:
    """The stores' clock: an hour on, nothing counts as checked."""

    now_s = 1e9

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def origin() -> FakeOrigin:
    return FakeOrigin()


@pytest.fixture
def nodes(origin: FakeOrigin, clock: Clock) -> Iterator[list[Node]]:
    with ExitStack() as stack:
        stores = [MemoryStore(max_bytes=1 << 30, now=clock) for _ in range(3)]
        for store in stores:
            stack.callback(store.close)
        yield [Node(number, origin, store) for number, store in enumerate(stores, start=1)]


async def fill(node: Node, digest: Digest) -> None:
    """Let a node pull the blob, and commit it."""
    assert await node.read_blob(digest) == BLOB
    await eventually(lambda: node.store.contains(digest))


def rot(store: ChunkStore, digest: Digest, at: int) -> None:
    """Change a bit of a stored blob."""
    blob = store.open(digest)
    assert blob is not None
    with open(f"/proc/self/fd/{blob.fileno()}", "r+b") as file:
        byte = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), at)
    blob.close()


async def test_a_peer_never_gets_a_rotten_chunk_and_does_not_take_its_holder_for_a_liar(
    nodes: list[Node], origin: FakeOrigin, clock: Clock, quick_clock: MockClock
) -> None:
    digest = origin.add_blob(BLOB)
    with no_descriptor_left():
        async with running(*nodes[:2]):
            holder, other = nodes[:2]
            await fill(holder, digest)
            rot(holder.store, digest, ROTTEN * CHUNK + 5)
            clock.now_s += HOLDS_S
            await connect_all([holder, other])
            assert await other.read_blob(digest) == BLOB
            assert other.machine.counters.corrupt_chunks == 0
            assert not other.machine.book.is_banned(holder.peer_id, trio.current_time())
            assert holder.store.statistics()["damaged_blobs"] == 1
            assert not holder.store.contains(digest)
            assert origin.egress_bytes <= 3 * len(BLOB)  # the virtual clock does not wait for the check's thread
            assert await holder.read_blob(digest) == BLOB
        for node in nodes:
            node.store.close()


async def test_chunks_that_are_right_are_checked_once_and_given_to_many(
    nodes: list[Node], origin: FakeOrigin, clock: Clock, quick_clock: MockClock
) -> None:
    digest = origin.add_blob(BLOB)
    async with running(*nodes):
        await fill(nodes[0], digest)
        clock.now_s += HOLDS_S
        await connect_all(nodes)
        async with trio.open_nursery() as nursery:
            for node in nodes[1:]:
                nursery.start_soon(node.read_blob, digest)
        assert origin.egress_bytes <= 2 * len(BLOB)  # as above
        assert 0 < nodes[0].store.statistics()["checked_bytes"] <= len(BLOB)


@pytest.mark.parametrize("start", [0, ROTTEN * CHUNK + 1], ids=["from the start", "from within the chunk"])
async def test_a_runtime_that_meets_a_rotten_chunk_gets_the_blob_without_noticing(
    nodes: list[Node], origin: FakeOrigin, clock: Clock, start: int, quick_clock: MockClock
) -> None:
    digest, node = origin.add_blob(BLOB), nodes[0]
    with no_descriptor_left():
        async with running(node):
            await fill(node, digest)
            rot(node.store, digest, ROTTEN * CHUNK)
            clock.now_s += HOLDS_S
            readers = [await node.open(digest) for _ in range(3)]
            for reader in readers:
                assert await read(reader, start) == BLOB[start:]
            for reader in readers:
                reader.close()
            assert node.store.statistics()["damaged_blobs"] == 1
            assert origin.egress_bytes == 2 * len(BLOB)
            assert await node.read_blob(digest) == BLOB
            assert origin.egress_bytes == 2 * len(BLOB)
        node.store.close()


async def test_a_rotten_manifest_is_fetched_again(
    nodes: list[Node], origin: FakeOrigin, clock: Clock, quick_clock: MockClock
) -> None:
    digest, node = origin.add_image("latest", [b"layer"]), nodes[0]
    async with running(node):
        good = (await node.manifest(digest)).body
        rot(node.store, digest, 3)
        clock.now_s += HOLDS_S
        assert (await node.images.manifest(REPOSITORY, digest)).body == good
        assert node.store.statistics()["damaged_blobs"] == 1
