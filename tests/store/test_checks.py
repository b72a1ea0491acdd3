# SPDX-License-Identifier: Apache-2.0
"""Bytes that changed under the store are found before they are served, and what is wrong is dropped."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from p2pdist.core.types import Digest
from p2pdist.errors import IntegrityError
from p2pdist.ports import StoredBlob
from p2pdist.store.base import BaseStore
from p2pdist.store.checks import HOLDS_S, Record
from p2pdist.store.disk import DiskStore
from p2pdist.store.memory import MemoryStore
from tests.store.blobs import CHUNK_BYTES, content, descriptors, read

MakeClocked = Callable[..., BaseStore]


class Clock:
    now_s = 1e9

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["disk", "memory"])
def make(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> MakeClocked:
    def made(on_evicted: Callable[[Digest], None] | None = None) -> BaseStore:
        if request.param == "memory":
            return MemoryStore(max_bytes=1 << 20, now=clock, on_evicted=on_evicted)
        return DiskStore(
            tmp_path, max_bytes=1 << 20, low_bytes=1 << 20, min_free_bytes=0, now=clock, on_evicted=on_evicted
        )

    return made


def opened(store: BaseStore, digest: Digest) -> StoredBlob:
    blob = store.open(digest)
    assert blob is not None
    return blob


def rot(store: BaseStore, digest: Digest, index: int) -> None:
    """Change a bit of a chunk of a stored blob, as a disk does."""
    blob = opened(store, digest)
    with open(f"/proc/self/fd/{blob.fileno()}", "r+b") as file:
        at = index * CHUNK_BYTES + 7
        byte = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 4]), at)
    blob.close()


def test_a_rotten_chunk_drops_its_blob_which_can_be_stored_again(make: MakeClocked, clock: Clock) -> None:
    gone: list[Digest] = []
    store = make(gone.append)
    digest, other = content(1).store(store), content(2).store(store)
    rot(store, digest, 2)
    before = descriptors()
    clock.now_s += HOLDS_S
    blob = opened(store, digest)
    blob.check(0)
    with pytest.raises(IntegrityError, match=rf"{digest} is damaged on this node's disk: chunk 2 is not what was"):
        blob.check(2)
    assert gone == [digest]
    assert not store.contains(digest)
    assert store.open(digest) is None
    with pytest.raises(IntegrityError):
        blob.check(2)
    assert gone == [digest]
    blob.close()
    assert store.statistics()["damaged_blobs"] == 1
    assert list(store.digests()) == [other]
    assert descriptors() <= before
    content(1).store(store)
    assert read(store, digest) == content(1).body
    store.close()


def test_what_was_right_within_the_hour_is_not_read_again_unless_from_the_disk(make: MakeClocked, clock: Clock) -> None:
    store = make()
    digest = content(1).store(store)
    blob = opened(store, digest)
    assert blob.right == 0b11111
    rot(store, digest, 1)
    blob.check(1)
    assert store.statistics()["checked_bytes"] == 0
    clock.now_s += HOLDS_S
    assert blob.right == 0
    blob.check(0)
    assert blob.right == 0b00001
    assert store.statistics()["checked_bytes"] == CHUNK_BYTES
    clock.now_s += 60
    with pytest.raises(IntegrityError):
        blob.check(1, on_disk=True)
    blob.close()
    store.close()


def test_a_clock_that_was_set_back_vouches_for_nothing() -> None:
    record = Record()
    record.note(0b11, 1000.0)
    assert record.lately(1000.0) == 0b11
    assert record.lately(999.0) == 0
    record.note(0b100, 999.0)
    assert record.lately(999.0 + HOLDS_S - 1) == 0b100
    assert record.lately(999.0 + HOLDS_S) == 0


def test_blobs_are_due_for_a_check_longest_ago_first_and_inspecting_them_is_no_use(
    make: MakeClocked, clock: Clock
) -> None:
    store = make()
    digests = []
    for name in range(3):
        digests.append(content(name).store(store))
        clock.now_s += 100
    assert store.unchecked(1000.0) == []
    assert store.unchecked(150.0) == digests[:2]
    order = list(store.digests())
    blob = store.inspect(digests[0])
    assert blob is not None
    blob.found_whole()
    blob.close()
    assert list(store.digests()) == order
    assert store.unchecked(50.0) == digests[1:]
    clock.now_s -= 10_000  # nobody knows how long ago that was
    assert store.unchecked(1e12) == [digests[1], digests[2], digests[0]]
    store.close()


def test_when_a_blob_was_checked_survives_a_restart(tmp_path: Path, clock: Clock) -> None:
    limits = {"max_bytes": 1 << 20, "low_bytes": 1 << 20, "min_free_bytes": 0}
    store = DiskStore(tmp_path, now=clock, **limits)
    first, second = (content(name).store(store) for name in (1, 2))
    for digest in (second, first):
        blob = store.inspect(digest)
        assert blob is not None
        blob.found_whole()
        blob.close()
        clock.now_s += 3000
    store.close()
    store = DiskStore(tmp_path, now=clock, **limits)
    assert store.unchecked(4000.0) == [second]
    assert opened(store, first).right == 0
    store.close()
