# SPDX-License-Identifier: Apache-2.0
"""Blobs on one node without peers: what readers get, when, and what is left when something fails."""

from __future__ import annotations

import hashlib
import os
import random
import tracemalloc
from typing import TYPE_CHECKING

import pytest
import trio

from p2pdist.arrival import DOUBT_S, READ_STALL_S
from p2pdist.core.chunkmap import MIN_CHUNK_BYTES, ChunkMap
from p2pdist.core.pull import ERROR_GIVE_UP_S
from p2pdist.core.types import Repository
from p2pdist.core.verify import checksum_of
from p2pdist.errors import (
    DeniedByOrigin,
    IntegrityError,
    NotFoundAtOrigin,
    OriginError,
    PullFailed,
    StoreError,
    StoreFullError,
)
from p2pdist.store.memory import MemoryStore
from tests.fake_registry import FakeRegistry, Fault
from tests.nodes import REPOSITORY, FakeOrigin, Node, eventually, no_descriptor_left, origin_at, read, running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trio.testing import MockClock

    from p2pdist.core.types import Checksum, Digest
    from p2pdist.ports import PartialBlob

CHUNK = MIN_CHUNK_BYTES
BLOB = random.Random(2).randbytes(8 * CHUNK + 1000)
LAST = 8 * CHUNK
"""Where the last chunk begins."""


class ShakyStore(MemoryStore):
    """A store whose disk fails at one kind of call while `broken` names it."""

    broken = ""

    def start(self, digest: Digest, size_bytes: int, chunk_bytes: int, owner: str = "") -> PartialBlob:
        self._fail("start")
        partial = super().start(digest, size_bytes, chunk_bytes, owner)
        for name in ("write_chunk", "hash_prefix", "commit"):
            setattr(partial, name, self._shaky(name, getattr(partial, name)))
        return partial

    def _shaky(self, name: str, call: Callable[..., object]) -> Callable[..., object]:
        def shaky(*arguments: object, **named: object) -> object:
            self._fail(name)
            return call(*arguments, **named)

        return shaky

    def _fail(self, name: str) -> None:
        if name == self.broken:
            raise StoreError("the disk fails")


@pytest.fixture
def store() -> Iterator[ShakyStore]:
    store = ShakyStore(max_bytes=1 << 30)
    yield store
    store.close()


@pytest.fixture
def origin() -> FakeOrigin:
    return FakeOrigin()


@pytest.fixture
def node(origin: FakeOrigin, store: ShakyStore) -> Node:
    return Node(1, origin, store)


# ----------------------------------------------------------------------- bytes


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK], ids=str)
async def test_a_cold_pull_gives_the_blob_and_keeps_it(
    node: Node, origin: FakeOrigin, store: ShakyStore, size: int, quick_clock: MockClock
) -> None:
    digest = origin.add_blob(BLOB[:size])
    async with running(node):
        assert await node.read_blob(digest) == BLOB[:size]
        await eventually(lambda: store.contains(digest))
        assert origin.egress_bytes == size
        origin.error = OriginError("down")
        assert await node.read_blob(digest) == BLOB[:size]
        await eventually(lambda: not node.puller.arrivals)


async def test_bytes_are_readable_in_order_as_they_come_and_the_last_chunk_when_all_is_verified(
    node: Node, origin: FakeOrigin, quick_clock: MockClock
) -> None:
    digest = origin.add_blob(BLOB)
    second, last = origin.held[CHUNK], origin.held[LAST] = trio.Event(), trio.Event()
    async with running(node):
        reader = await node.open(digest)
        assert await reader.available(0, len(BLOB)) == CHUNK
        with trio.move_on_after(2) as waited:
            await reader.available(CHUNK, len(BLOB))
        assert waited.cancelled_caught
        second.set()
        end = CHUNK
        while end < LAST:
            end = await reader.available(end, len(BLOB))
        assert end == LAST
        assert os.pread(reader.fileno(), LAST, 0) == BLOB[:LAST]
        with trio.move_on_after(2) as waited:
            await reader.available(LAST, len(BLOB))
        assert waited.cancelled_caught
        last.set()
        assert await reader.available(LAST, len(BLOB)) == len(BLOB)
        reader.close()


async def test_what_a_reader_waits_for_is_fetched_first(node: Node, origin: FakeOrigin, quick_clock: MockClock) -> None:
    origin.chunk_s = 1
    digest = origin.add_blob(random.Random(3).randbytes(64 * CHUNK))
    async with running(node):
        reader = await node.open(digest)
        began = trio.current_time()
        await reader.available(60 * CHUNK, 61 * CHUNK)
        assert trio.current_time() - began < 5
        reader.close()


async def test_chunks_of_one_request_are_readable_as_they_come(
    node: Node, origin: FakeOrigin, quick_clock: MockClock
) -> None:
    blob = random.Random(4).randbytes(40 * CHUNK)
    digest, held = origin.add_blob(blob), 30
    origin.held[held * CHUNK] = trio.Event()
    async with running(node):
        reader = await node.open(digest)
        end = 0
        while end < held * CHUNK:
            end = await reader.available(end, len(blob))
        fetched = [int(what.rpartition("@")[2]) // CHUNK for asked, what in origin.asked if asked == "fetch"]
        assert held not in fetched, "it is within a run"
        origin.held[held * CHUNK].set()
        reader.close()
        assert await node.read_blob(digest) == blob
    assert origin.egress_bytes == len(blob)


async def test_what_a_request_that_breaks_off_had_brought_is_not_fetched_again(
    node: Node, origin: FakeOrigin, quick_clock: MockClock
) -> None:
    blob = random.Random(4).randbytes(40 * CHUNK)
    digest = origin.add_blob(blob)
    origin.breaks.add(30 * CHUNK)
    async with running(node):
        assert await node.read_blob(digest) == blob
    assert not origin.breaks
    assert origin.egress_bytes == len(blob)


async def test_readers_of_ranges_share_one_download(node: Node, origin: FakeOrigin, quick_clock: MockClock) -> None:
    digest = origin.add_blob(BLOB)
    spans = [(0, len(BLOB)), (0, 1), (3 * CHUNK - 5, 5 * CHUNK + 5), (LAST, len(BLOB)), (CHUNK, 2 * CHUNK)] * 3
    got: dict[int, bytes] = {}

    async def fetch(number: int, start: int, stop: int) -> None:
        got[number] = await node.read_blob(digest, start, stop)

    async with running(node), trio.open_nursery() as nursery:
        for number, (start, stop) in enumerate(spans):
            nursery.start_soon(fetch, number, start, stop)
    assert [got[number] for number in range(len(spans))] == [BLOB[start:stop] for start, stop in spans]
    assert origin.egress_bytes == len(BLOB)


async def test_readers_that_read_nothing_hold_no_chunk_in_memory_and_delay_nobody(
    node: Node, origin: FakeOrigin, store: ShakyStore, quick_clock: MockClock
) -> None:
    blob = random.Random(4).randbytes(32 * CHUNK)
    digest = origin.add_blob(blob)
    async with running(node):
        slow = [await node.open(digest) for _ in range(50)]
        for reader in slow:
            await reader.available(0, len(blob))
        tracemalloc.start()
        assert hashlib.sha256(await node.read_blob(digest)).hexdigest() == digest.partition(":")[2]
        await eventually(lambda: store.contains(digest) and not node.puller.arrivals)
        held_bytes, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held_bytes < 2 * CHUNK
        assert os.pread(slow[7].fileno(), 100, 31 * CHUNK) == blob[31 * CHUNK :][:100]
        for reader in slow:
            reader.close()


@pytest.mark.parametrize("when", ["at once", "while waiting for a source", "while reading"])
async def test_a_runtime_that_hangs_up_does_not_disturb_the_others(
    node: Node, origin: FakeOrigin, when: str, quick_clock: MockClock
) -> None:
    digest = origin.add_blob(BLOB)
    origin.held[0] = trio.Event()
    bodies: list[bytes] = []

    async def other() -> None:
        bodies.append(await node.read_blob(digest))

    async with running(node), trio.open_nursery() as nursery:
        with trio.CancelScope() as hung_up:
            if when == "at once":
                hung_up.cancel()
            else:
                hung_up.deadline = trio.current_time() + 0.3
            nursery.start_soon(other)
            if when == "while reading":
                origin.held[0].set()
                origin.held[CHUNK] = trio.Event()
            await node.read_blob(digest)
        assert hung_up.cancelled_caught
        for held in origin.held.values():
            held.set()
    assert bodies == [BLOB]
    assert origin.egress_bytes == len(BLOB)


async def test_the_download_goes_on_when_nobody_reads_any_more(
    node: Node, origin: FakeOrigin, store: ShakyStore, quick_clock: MockClock
) -> None:
    digest = origin.add_blob(BLOB)
    async with running(node):
        (await node.open(digest)).close()
        await eventually(lambda: store.contains(digest) and not node.puller.arrivals)
        assert store.statistics()["partial_blobs"] == 0


async def test_a_reader_whose_turn_comes_after_the_commit_gets_the_blob_from_the_store(
    node: Node, origin: FakeOrigin, store: ShakyStore, quick_clock: MockClock
) -> None:
    class LateTurn:
        def set(self) -> None:
            pass

        async def wait(self) -> None:
            origin.held[0].set()
            await eventually(lambda: not node.puller.arrivals)

    digest = origin.add_blob(BLOB)
    origin.held[0] = trio.Event()
    async with running(node), trio.open_nursery() as nursery:
        nursery.start_soon(node.read_blob, digest)
        await eventually(lambda: digest in node.puller.arrivals and node.puller.arrivals[digest].started.is_set())
        node.puller.arrivals[digest].started = LateTurn()  # type: ignore[assignment]
        assert await node.read_blob(digest) == BLOB
    assert origin.egress_bytes == len(BLOB)


async def test_what_an_earlier_run_left_is_not_fetched_again_and_counts_as_cached(
    node: Node, origin: FakeOrigin, store: ShakyStore, quick_clock: MockClock
) -> None:
    digest = origin.add_blob(BLOB)
    left = MemoryStore.start(store, digest, len(BLOB), CHUNK)
    for index in (0, 1, 5):
        span = BLOB[index * CHUNK : (index + 1) * CHUNK]
        left.write_chunk(index, span, checksum_of(span))
    left.close()
    async with running(node):
        assert await node.read_blob(digest) == BLOB
        assert origin.egress_bytes == len(BLOB) - 3 * CHUNK
        await eventually(lambda: store.contains(digest))
        split = node.puller.split(digest)
        assert split is not None
        assert (split.from_cache, split.from_origin, split.from_peers) == (3 * CHUNK, len(BLOB) - 3 * CHUNK, 0)


async def test_a_whole_blob_that_an_earlier_run_left_uncommitted_needs_no_origin(
    node: Node, origin: FakeOrigin, store: ShakyStore, quick_clock: MockClock
) -> None:
    digest = origin.add_blob(BLOB)
    left = MemoryStore.start(store, digest, len(BLOB), CHUNK)
    cut = ChunkMap.of(len(BLOB))
    for index in range(cut.count):
        span = BLOB[cut.start(index) : cut.start(index) + cut.length(index)]
        left.write_chunk(index, span, checksum_of(span))
    left.close()
    async with running(node):
        assert await node.read_blob(digest) == BLOB
        await eventually(lambda: store.contains(digest))
    assert origin.egress_bytes == 0


# --------------------------------------------------------------- wrong content


@pytest.mark.parametrize("wrong_at", [0, 3 * CHUNK, LAST], ids=["first", "middle", "last"])
async def test_wrong_bytes_of_the_origin_reach_nobody_as_a_whole_and_are_not_kept(
    node: Node, origin: FakeOrigin, store: ShakyStore, wrong_at: int, quick_clock: MockClock
) -> None:
    digest = origin.add_blob(BLOB)
    origin.blobs[digest] = BLOB[:wrong_at] + b"\0" + BLOB[wrong_at + 1 :]
    async with running(node):
        reader = await node.open(digest)
        with pytest.raises(PullFailed) as caught:
            await read(reader)
        assert isinstance(caught.value.causes[0], IntegrityError)
        assert digest in str(caught.value)
        assert not store.contains(digest)
        assert not node.puller.arrivals
        origin.blobs[digest] = BLOB
        assert await node.read_blob(digest) == BLOB
        with pytest.raises(PullFailed):
            await read(reader, LAST)
        reader.close()


class FlippingStore(MemoryStore):
    """A store whose disk changes a bit of one chunk, once, after it was written."""

    flipped = False

    def start(self, digest: Digest, size_bytes: int, chunk_bytes: int, owner: str = "") -> PartialBlob:
        partial = super().start(digest, size_bytes, chunk_bytes, owner)
        write = partial.write_chunk

        def write_chunk(index: int, data: bytes, checksum: Checksum) -> None:
            write(index, data, checksum)
            if index == 3 and not self.flipped:
                self.flipped = True
                os.pwrite(partial.fileno(), bytes([data[0] ^ 1]), index * chunk_bytes)

        partial.write_chunk = write_chunk  # type: ignore[assignment, method-assign]
        return partial


async def test_a_disk_that_gives_back_other_bytes_is_named_and_not_the_origin_or_a_peer(
    origin: FakeOrigin, quick_clock: MockClock
) -> None:
    store = FlippingStore(max_bytes=1 << 30)
    node, digest = Node(1, origin, store), origin.add_blob(BLOB)
    async with running(node):
        with pytest.raises((PullFailed, StoreError), match="the disk gives back other bytes of sha256:"):
            await node.read_blob(digest)
        assert not store.contains(digest)
        assert await node.read_blob(digest) == BLOB
        assert origin.egress_bytes == len(BLOB) + CHUNK
    store.close()


async def test_a_reader_of_a_failed_pull_does_not_keep_a_new_one_from_beginning(
    node: Node, origin: FakeOrigin, quick_clock: MockClock
) -> None:
    """The runtime asks again on a new connection before it has read the old one's end."""
    digest = origin.add_blob(BLOB)
    origin.held[CHUNK] = trio.Event()
    async with running(node):
        slow = await node.open(digest)
        await slow.available(0, 1)
        origin.error = OriginError("down")
        origin.held.pop(CHUNK).set()
        await eventually(lambda: not node.puller.arrivals)
        origin.error = None
        assert await node.read_blob(digest) == BLOB
        assert os.pread(slow.fileno(), CHUNK, 0) == BLOB[:CHUNK]
        slow.close()


# --------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", [NotFoundAtOrigin, DeniedByOrigin])
async def test_what_the_origin_refuses_is_refused_at_once_and_as_such(
    node: Node, origin: FakeOrigin, kind: type[OriginError], quick_clock: MockClock
) -> None:
    digest = origin.add_blob(BLOB)
    origin.error = kind("no", status_code=404)
    async with running(node):
        with pytest.raises(kind):
            await node.read_blob(digest)
        with pytest.raises(kind):
            await node.puller.open_blob(REPOSITORY, digest, len(BLOB), named=True, first_byte=lambda: None)
        assert len(set(origin.asked)) == len(origin.asked), "asked for the same again"
        assert not node.puller.arrivals


async def test_a_pull_that_joined_one_in_a_repository_without_the_blob_starts_its_own(
    node: Node, origin: FakeOrigin, quick_clock: MockClock
) -> None:
    digest = origin.add_blob(BLOB)
    wrong = Repository(REPOSITORY.registry, "lab/other")
    origin.without = {wrong}
    async with running(node):
        joined = await node.puller.start(wrong, digest, len(BLOB))
        reader = await node.puller.open_blob(REPOSITORY, digest, len(BLOB), named=True, first_byte=lambda: None)
        assert joined.failure is not None
        assert await read(reader) == BLOB
        reader.close()


async def test_an_origin_that_is_down_is_an_error_within_its_bound(
    node: Node, origin: FakeOrigin, quick_clock: MockClock
) -> None:
    digest = origin.add_blob(BLOB)
    async with running(node):
        reader = await node.open(digest)
        await reader.available(0, 1)
        origin.error = OriginError("the registry is down")
        began = trio.current_time()
        with pytest.raises(PullFailed, match="the registry is down"):
            await read(reader, CHUNK)
        assert trio.current_time() - began < ERROR_GIVE_UP_S + 3
        reader.close()
        assert not node.puller.arrivals


async def test_an_origin_that_says_nothing_is_an_error_before_the_reader_gives_up(
    node: Node, origin: FakeOrigin, quick_clock: MockClock
) -> None:
    quick_clock.autojump_threshold = 0.0005
    digest = origin.add_blob(BLOB)
    async with running(node):
        reader = await node.open(digest)
        origin.gate = trio.Event()
        began = trio.current_time()
        with pytest.raises(PullFailed):
            await read(reader)
        assert trio.current_time() - began <= READ_STALL_S + DOUBT_S + 1
        reader.close()


async def test_an_origin_that_recovers_is_asked_again(node: Node, origin: FakeOrigin, quick_clock: MockClock) -> None:
    digest = origin.add_blob(BLOB)
    async with running(node):
        reader = await node.open(digest)
        await reader.available(0, 1)
        origin.error = OriginError("503", status_code=503, retry_after_s=2)
        await trio.sleep(4)
        origin.error = None
        assert await read(reader) == BLOB
        reader.close()


# ------------------------------------------------------------------- the store


async def test_a_store_that_is_full_is_said_to_the_reader(origin: FakeOrigin, quick_clock: MockClock) -> None:
    store = MemoryStore(max_bytes=len(BLOB) - 1)
    node = Node(1, origin, store)
    digest, small = origin.add_blob(BLOB), origin.add_blob(b"small")
    async with running(node):
        with pytest.raises(StoreFullError):
            await node.read_blob(digest)
        assert not node.puller.arrivals
        assert await node.read_blob(small) == b"small"
    assert origin.egress_bytes == len(b"small")
    store.close()


@pytest.mark.parametrize("broken", ["start", "write_chunk", "hash_prefix"])
async def test_a_disk_that_fails_fails_the_pull_and_not_the_node(
    node: Node, origin: FakeOrigin, store: ShakyStore, broken: str, quick_clock: MockClock
) -> None:
    digest = origin.add_blob(BLOB)
    store.broken = broken
    async with running(node):
        with pytest.raises((StoreError, PullFailed), match="the disk fails"):
            await node.read_blob(digest)
        assert not node.puller.arrivals
        store.broken = ""
        assert await node.read_blob(digest) == BLOB


async def test_a_blob_that_cannot_be_kept_still_reaches_those_who_read_it(
    node: Node, origin: FakeOrigin, store: ShakyStore, quick_clock: MockClock
) -> None:
    digest = origin.add_blob(BLOB)
    store.broken = "commit"
    async with running(node):
        reader = await node.open(digest)
        assert await read(reader) == BLOB
        await eventually(lambda: not node.puller.arrivals)
        assert not store.contains(digest)
        store.broken = ""
        assert await node.read_blob(digest) == BLOB
        await eventually(lambda: store.contains(digest))
        assert os.pread(reader.fileno(), len(BLOB), 0) == BLOB
        reader.close()


async def test_a_blob_that_is_being_read_is_not_evicted(origin: FakeOrigin, quick_clock: MockClock) -> None:
    store = MemoryStore(max_bytes=3 * len(BLOB))
    node = Node(1, origin, store)
    first = origin.add_blob(BLOB)
    async with running(node):
        reader = await node.open(first)
        await eventually(lambda: store.contains(first))
        for seed in range(3):
            await node.read_blob(origin.add_blob(random.Random(seed).randbytes(len(BLOB))))
        assert store.contains(first)
        assert await read(reader) == BLOB
        reader.close()
    store.close()


# ------------------------------------------------------------------ the whole way


async def test_a_pull_from_a_registry_over_http(store: ShakyStore, quick_clock: MockClock) -> None:
    async with FakeRegistry().running() as registry:
        digest = registry.add_blob(BLOB)
        registry.script(f"GET /v2/lab/image/blobs/{digest}", Fault(cut_after=1000), Fault(status=503))
        origin = origin_at(registry)
        node = Node(1, origin, store)
        async with running(node):
            assert await node.read_blob(digest) == BLOB
            absent = "sha256:" + "0" * 64
            with pytest.raises(NotFoundAtOrigin):
                await node.read_blob(absent)
        await origin.aclose()


async def test_a_node_that_is_stopped_leaves_nothing_open(origin: FakeOrigin, quick_clock: MockClock) -> None:
    """One pull waits for the origin, one is read, one is done and read, one has failed and is not closed yet."""
    await trio.to_thread.run_sync(lambda: None)
    with no_descriptor_left():
        store = MemoryStore(max_bytes=1 << 30)
        node = Node(1, origin, store)
        digests = [origin.add_blob(BLOB[:-number] + b"x" * number) for number in range(1, 5)]
        origin.blobs[digests[0]] = bytes(len(BLOB))
        async with running(node):
            readers = [await node.open(digest) for digest in digests[:3]]
            with pytest.raises(PullFailed):
                await read(readers[0])
            await read(readers[1])
            origin.held[0] = trio.Event()
            with trio.move_on_after(0.2):
                await node.read_blob(digests[3])
            assert node.puller.arrivals
            for reader in readers:
                reader.close()
        store.close()
