# SPDX-License-Identifier: Apache-2.0
"""What every `ChunkStore` promises, on the disk and in memory: how it keeps within its room, and its handles."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from p2pdist.core.types import Digest
from p2pdist.core.verify import checksum_of
from p2pdist.errors import IntegrityError, StoreFullError
from tests.store.blobs import Content, content, descriptors, read

if TYPE_CHECKING:
    from p2pdist.ports import ChunkStore, PartialBlob, StoredBlob
    from p2pdist.store.base import BaseStore
    from tests.store.conftest import MakeStore

# Room


def test_eviction_takes_the_least_recently_used_and_says_so(make_store: MakeStore) -> None:
    gone: list[Digest] = []
    store = make_store(max_bytes=3000, on_evicted=gone.append)
    first, second, third = (content(name, 1000).store(store) for name in range(3))
    read(store, first)
    assert list(store.digests()) == [first, third, second]
    fourth = content(4, 1000).store(store)
    assert gone == [second]
    assert list(store.digests()) == [fourth, first, third]
    assert store.open(second) is None
    statistics = store.statistics()
    assert (statistics["blobs"], statistics["bytes"]) == (3, 3000)
    assert (statistics["evicted_blobs"], statistics["evicted_bytes"]) == (1, 1000)


def test_crossing_the_high_watermark_evicts_down_to_the_low_one(make_store: MakeStore) -> None:
    store = make_store(max_bytes=10_000, low_bytes=5000)
    names = [content(name, 1000).store(store) for name in range(10)]
    assert store.statistics()["blobs"] == 10
    last = content(10, 1000).store(store)
    assert list(store.digests()) == [last, *reversed(names[6:])]


def test_a_small_blob_makes_room_too(make_store: MakeStore) -> None:
    gone: list[Digest] = []
    store = make_store(max_bytes=1000, on_evicted=gone.append)
    old = content(1, 900).store(store)
    store.add(content(2, 200).digest, content(2, 200).body, media_type="", public=True)
    assert gone == [old]


def test_what_is_open_is_never_evicted(make_store: MakeStore) -> None:
    store = make_store(max_bytes=3000)
    digest = content(1, 1000).store(store)
    reader = store.open(digest)
    assert reader is not None
    arriving = content(2, 1000).start(store)
    content(2, 1000).write(arriving)
    committed = arriving.commit(public=True)
    committed.close()
    with pytest.raises(StoreFullError, match=content(3, 2000).digest):
        content(3, 2000).start(store)
    assert store.contains(digest)
    assert store.contains(committed.digest)
    arriving.close()
    content(3, 2000).store(store)
    assert store.contains(digest)
    reader.close()
    last = content(4, 3000).store(store)
    assert list(store.digests()) == [last]


def test_a_partial_blob_is_evicted_only_when_nobody_has_it_open(make_store: MakeStore) -> None:
    gone: list[Digest] = []
    store = make_store(max_bytes=2000, on_evicted=gone.append)
    left, open_ = content(1, 1000), content(2, 1000)
    left.start(store).close()
    partial = open_.start(store)
    content(3, 1000).start(store).discard()
    assert store.statistics()["partial_blobs"] == 1
    assert store.statistics()["evicted_blobs"] == 1
    assert gone == []
    open_.write(partial)
    partial.commit(public=True).close()
    partial.close()


def test_a_blob_larger_than_the_store_is_refused_and_nothing_is_evicted_for_it(make_store: MakeStore) -> None:
    store = make_store(max_bytes=3000)
    digest = content(1, 1000).store(store)
    for attempt in (Content.start, add):
        with pytest.raises(StoreFullError, match="no room"):
            attempt(content(2, 3001), store)
    assert list(store.digests()) == [digest]
    assert store.statistics()["partial_blobs"] == 0


def test_the_place_of_a_blob_of_absurd_size_is_not_even_computed(store: ChunkStore) -> None:
    with pytest.raises(StoreFullError):
        store.start(content(1).digest, 1 << 62, 1)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_done_the_store_keeps_within_its_room_and_what_is_open_stays(
    make_store: MakeStore, seed: int
) -> None:
    rng = random.Random(seed)
    store = make_store(max_bytes=20_000, low_bytes=15_000)
    readers: list[StoredBlob] = []
    arriving: dict[int, PartialBlob] = {}

    def arrive(name: int) -> None:
        if name not in arriving:
            arriving[name] = content(name, 1000 + 100 * name).start(store)

    def write(name: int) -> None:
        if name in arriving:
            content(name, 1000 + 100 * name).write(arriving[name], [0])

    def finish(name: int) -> None:
        if (partial := arriving.pop(name, None)) is not None:
            content(name, 1000 + 100 * name).write(partial)
            readers.append(partial.commit(public=True))
            partial.close()

    def leave(name: int) -> None:
        if (partial := arriving.pop(name, None)) is not None:
            rng.choice([partial.close, partial.discard])()

    def look(name: int) -> None:
        if (reader := store.open(content(name, 1000 + 100 * name).digest)) is not None:
            readers.append(reader)

    def stop_reading(name: int) -> None:
        if readers:
            readers.pop(name % len(readers)).close()

    for _ in range(400):
        step = rng.choice([arrive, arrive, write, finish, leave, look, stop_reading, stop_reading])
        try:
            step(rng.randrange(20))
        except StoreFullError:
            assert readers or arriving
        statistics = store.statistics()
        assert statistics["bytes"] + statistics["partial_bytes"] <= 20_000
        assert statistics["partial_blobs"] >= len(arriving)
        assert all(store.contains(reader.digest) for reader in readers)
    assert store.statistics()["evicted_blobs"] > 0
    for reader in readers:
        reader.close()
    for partial in arriving.values():
        partial.close()
    content(99, 20_000).store(store)


def test_removing_is_at_once_and_readers_keep_reading(store: ChunkStore) -> None:
    blob = content(1)
    blob.store(store)
    reader = store.open(blob.digest)
    assert reader is not None
    store.remove(blob.digest)
    assert not store.contains(blob.digest)
    assert store.open(blob.digest) is None
    assert store.statistics()["bytes"] == 0
    assert reader.read(0, 4500) == blob.body
    reader.close()
    store.remove(blob.digest)
    blob.store(store)
    assert read(store, blob.digest) == blob.body


# Handles


def test_closing_twice_is_harmless_and_a_closed_handle_has_no_descriptor(store: ChunkStore) -> None:
    blob = content(1)
    partial = blob.start(store)
    blob.write(partial)
    stored = partial.commit(public=True)
    for handle in (stored, partial):
        handle.close()
        handle.close()
        with pytest.raises(ValueError, match="closed"):
            handle.fileno()
    partial.discard()
    store.close()
    store.close()


@pytest.mark.parametrize("span", [(-1, 2), (3, 2), (0, 4501)])
def test_only_what_is_in_the_blob_can_be_read(store: ChunkStore, span: tuple[int, int]) -> None:
    stored = store.open(content(1).store(store))
    assert stored is not None
    with pytest.raises(ValueError, match="bytes"):
        stored.read(*span)
    stored.close()


def test_no_descriptor_is_leaked_whichever_way_a_blob_goes(make_store: MakeStore) -> None:
    store = make_store(max_bytes=20_000)
    resident = 0
    for lap in range(3):
        go_every_way(store)
        for digest in list(store.digests()):
            store.remove(digest)
        resident = resident or descriptors()
        assert descriptors() == resident, f"lap {lap}"
    store.close()


def go_every_way(store: BaseStore) -> None:
    content(1).store(store)
    blob = content(2)
    partial = blob.start(store)
    blob.write(partial, [1])
    partial.close()
    store.start(blob.digest, 4500, 900).discard()
    partial = blob.start(store)
    blob.write(partial, [0, 1, 2, 3])
    partial.write_chunk(4, bytes(500), checksum_of(bytes(500)))
    with pytest.raises(IntegrityError):
        partial.commit(public=True)
    partial.discard()
    with pytest.raises(StoreFullError):
        content(3, 20_001).start(store)
    for name in range(4, 12):
        content(name).store(store)
    add(content(4), store)
    content(12).start(store).discard()


def add(blob: Content, store: ChunkStore) -> None:
    store.add(blob.digest, blob.body, media_type="", public=True)
