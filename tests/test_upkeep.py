# SPDX-License-Identifier: Apache-2.0
"""The store is read once in a while, at a limited pace, and an agent knows when its disk takes no bytes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import trio
from structlog.testing import capture_logs

from p2pdist.core.rate import TokenBucket
from p2pdist.errors import StoreError
from p2pdist.store.memory import MemoryStore
from p2pdist.upkeep import LOOK_S, Upkeep
from tests.nodes import eventually
from tests.store.blobs import CHUNK_BYTES, content

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trio.testing import MockClock

    from p2pdist.core.types import Digest

PERIOD_S = 20 * LOOK_S
"""Each look costs a moment of real time."""
BEGAN_S = 1e9


class WatchedStore(MemoryStore):
    """On trio's virtual clock, with a disk that fails while `broken`."""

    broken = ""

    def probe(self) -> None:
        if self.broken:
            raise StoreError(self.broken)


@pytest.fixture
def store(quick_clock: MockClock) -> Iterator[WatchedStore]:
    store = WatchedStore(max_bytes=1 << 20, now=lambda: BEGAN_S + quick_clock.current_time())
    yield store
    store.close()


def checked_bytes(store: MemoryStore) -> int:
    return store.statistics()["checked_bytes"]


def rot(store: MemoryStore, digest: Digest) -> None:
    blob = store.open(digest)
    assert blob is not None
    with open(f"/proc/self/fd/{blob.fileno()}", "r+b") as file:
        os.pwrite(file.fileno(), b"rot", 2 * CHUNK_BYTES)
    blob.close()


async def test_each_blob_is_read_once_in_a_period_and_a_rotten_one_is_dropped(
    store: WatchedStore, quick_clock: MockClock, nursery: trio.Nursery
) -> None:
    good, bad = content(1).store(store), content(2).store(store)
    nursery.start_soon(Upkeep(store, every_s=PERIOD_S, limit=None).run)
    rot(store, bad)
    await trio.sleep(PERIOD_S - LOOK_S)
    assert store.statistics()["checked_bytes"] == 0
    once_bytes = 4500 + 2 * CHUNK_BYTES
    await eventually(lambda: store.statistics()["damaged_blobs"] == 1 and checked_bytes(store) == once_bytes)
    assert list(store.digests()) == [good]
    await trio.sleep(PERIOD_S - 2 * LOOK_S)
    await eventually(lambda: checked_bytes(store) == once_bytes + 4500)


async def test_reading_keeps_within_its_limit(
    store: WatchedStore, quick_clock: MockClock, nursery: trio.Nursery
) -> None:
    for name in range(10):
        content(name).store(store)
    upkeep = Upkeep(store, every_s=PERIOD_S, limit=TokenBucket(100, CHUNK_BYTES))
    nursery.start_soon(upkeep.run)
    await trio.sleep(PERIOD_S)
    await eventually(lambda: checked_bytes(store) > 0)
    before_bytes, began = checked_bytes(store), trio.current_time()
    await eventually(lambda: checked_bytes(store) >= before_bytes + 10_000)
    # What is read again while a thread is slow counts too: the clock does not wait for it.
    assert checked_bytes(store) - before_bytes <= 100 * (trio.current_time() - began) + CHUNK_BYTES


async def test_nothing_is_read_where_that_is_switched_off_until_it_is_switched_on(
    store: WatchedStore, quick_clock: MockClock, nursery: trio.Nursery
) -> None:
    content(1).store(store)
    upkeep = Upkeep(store, every_s=0.0, limit=None)
    nursery.start_soon(upkeep.run)
    await trio.sleep(3 * PERIOD_S)
    assert store.statistics()["checked_bytes"] == 0
    upkeep.every_s = PERIOD_S
    await eventually(lambda: checked_bytes(store) == 4500)


async def test_a_disk_that_takes_no_bytes_is_said_once_and_so_is_its_return(
    store: WatchedStore, quick_clock: MockClock, nursery: trio.Nursery
) -> None:
    upkeep = Upkeep(store, every_s=0.0, limit=None)
    with capture_logs() as logs:
        nursery.start_soon(upkeep.run)
        await trio.sleep(2.5 * LOOK_S)
        assert upkeep.failing is None
        store.broken = "cannot write: Read-only file system"
        await eventually(lambda: upkeep.failing == "cannot write: Read-only file system")
        await trio.sleep(3 * LOOK_S)
        store.broken = ""
        await eventually(lambda: upkeep.failing is None)
    assert [entry["event"] for entry in logs] == [
        "the disk takes no bytes: only what is stored can be served",
        "the disk takes bytes again",
    ]
