# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from p2pdist.arrival import DOUBT_S, Arrival, ArrivalReader
from p2pdist.core.chunkmap import ChunkMap
from p2pdist.core.types import Repository
from p2pdist.core.verify import checksum_of
from p2pdist.errors import PullFailed
from p2pdist.store.memory import MemoryStore
from tests.fake_registry import digest_of

CUT = ChunkMap.of(1 << 20)
CHUNK = CUT.chunk_bytes
BLOB = random.Random(1).randbytes(CUT.size_bytes)
"""Four chunks."""


@dataclass
class Scene:
    """An arrival and what the swarm vouches for: `vouched`, a set of chunks."""

    arrival: Arrival
    vouched: int = 0
    heads: list[int | None] = field(default_factory=list)

    @property
    def machine(self) -> Any:  # noqa: ANN401
        return SimpleNamespace(blobs={self.arrival.digest: SimpleNamespace(offered=self.vouched)})

    def feed(self, event: Any) -> None:  # noqa: ANN401
        self.heads.append(event.index)

    def reader(self) -> ArrivalReader:
        return ArrivalReader(self.arrival, cast("Any", self), lambda: None)

    def write(self, index: int, *, vouched: bool = True, content: bytes = BLOB) -> None:
        assert self.arrival.partial is not None
        chunk = content[CUT.start(index) : CUT.start(index) + CUT.length(index)]
        self.arrival.partial.write_chunk(index, memoryview(chunk), checksum_of(chunk))
        self.arrival.gain(index)
        self.vouched |= vouched << index
        self.arrival.wake()

    def forget(self, index: int) -> None:
        """What the puller does with a chunk that proved wrong."""
        assert self.arrival.partial is not None
        self.arrival.partial.reject([index])
        self.arrival.recall([index])


@pytest.fixture
def scene() -> Iterator[Scene]:
    store = MemoryStore(max_bytes=1 << 22)
    arrival = Arrival(digest_of(BLOB), Repository("registry.lab", "demo"), shared=True)
    arrival.partial, arrival.chunks = store.start(arrival.digest, len(BLOB), CHUNK), CUT
    yield Scene(arrival)
    arrival.partial.close()
    store.close()


async def test_bytes_are_readable_up_to_the_first_chunk_that_is_missing(scene: Scene) -> None:
    reader = scene.reader()
    for index in (0, 1, 3):
        scene.write(index)
    assert await reader.available(0, len(BLOB)) == 2 * CHUNK
    assert os.pread(reader.fileno(), CHUNK, CHUNK) == BLOB[CHUNK : 2 * CHUNK]
    reader.close()


async def test_a_suspect_is_given_to_nobody_until_it_has_been_read_again(scene: Scene) -> None:
    scene.write(0)
    scene.write(1)
    scene.arrival.suspects = 0b10
    reader = scene.reader()
    assert await reader.available(0, len(BLOB)) == CHUNK
    scene.arrival.suspects = 0
    assert await reader.available(0, len(BLOB)) == 2 * CHUNK
    reader.close()


async def test_the_last_chunk_is_kept_back_until_the_blob_is_verified(
    scene: Scene, autojump_clock: trio.testing.MockClock
) -> None:
    reader = scene.reader()
    for index in range(CUT.count):
        scene.write(index)
    assert await reader.available(0, len(BLOB)) == 3 * CHUNK
    with trio.move_on_after(DOUBT_S * 2) as early:
        await reader.available(3 * CHUNK, len(BLOB))
    assert early.cancelled_caught
    scene.arrival.verified = True
    assert await reader.available(3 * CHUNK, len(BLOB)) == len(BLOB)
    reader.close()


async def test_what_only_its_sender_vouches_for_is_kept_back_until_somebody_else_does(
    scene: Scene, autojump_clock: trio.testing.MockClock
) -> None:
    reader = scene.reader()
    scene.write(0, vouched=False)
    async with trio.open_nursery() as nursery:

        async def vouch() -> None:
            await trio.sleep(DOUBT_S / 2)
            scene.vouched |= 1
            scene.arrival.wake()

        nursery.start_soon(vouch)
        assert await reader.available(0, len(BLOB)) == CHUNK
        assert trio.current_time() < DOUBT_S
    reader.close()


async def test_where_nobody_else_ever_vouches_bytes_flow_after_a_while(
    scene: Scene, autojump_clock: trio.testing.MockClock
) -> None:
    reader = scene.reader()
    scene.write(0, vouched=False)
    since = trio.current_time()
    assert await reader.available(0, len(BLOB)) == CHUNK
    assert trio.current_time() - since == pytest.approx(DOUBT_S)
    reader.close()


async def test_what_came_while_a_reader_waited_is_not_doubted_anew(
    scene: Scene, autojump_clock: trio.testing.MockClock
) -> None:
    reader = scene.reader()
    scene.write(0, vouched=False)
    scene.write(2, vouched=False)
    await trio.sleep(DOUBT_S / 2)
    scene.write(1, vouched=False)
    assert await reader.available(0, len(BLOB)) == CHUNK
    assert trio.current_time() == pytest.approx(DOUBT_S)
    assert await reader.available(CHUNK, len(BLOB)) == 3 * CHUNK
    assert trio.current_time() == pytest.approx(1.5 * DOUBT_S)
    reader.close()


async def test_a_reader_that_was_given_a_wrong_chunk_is_never_brought_to_the_end(scene: Scene) -> None:
    misled, late = scene.reader(), scene.reader()
    scene.write(0)
    scene.write(1, content=bytes(len(BLOB)))
    assert await misled.available(0, len(BLOB)) == 2 * CHUNK
    assert await late.available(0, CHUNK) == CHUNK
    scene.forget(1)
    for index in range(1, CUT.count):
        scene.write(index)
    scene.arrival.verified = True
    with pytest.raises(PullFailed, match="wrong bytes"):
        await misled.available(2 * CHUNK, len(BLOB))
    assert await late.available(CHUNK, len(BLOB)) == len(BLOB)
    misled.close()
    late.close()


async def test_what_comes_in_the_place_of_a_forgotten_chunk_is_not_beyond_suspicion(scene: Scene) -> None:
    for index in (0, 1):
        scene.write(index)
        scene.arrival.origin_chunks.add(index)
    scene.forget(1)
    assert scene.arrival.origin_chunks == {0}


async def test_a_waiting_reader_hears_at_once_that_it_was_misled(
    scene: Scene, autojump_clock: trio.testing.MockClock
) -> None:
    reader = scene.reader()
    scene.write(0)
    assert await reader.available(0, len(BLOB)) == CHUNK
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(PullFailed, match="wrong bytes"):
                await reader.available(CHUNK, len(BLOB))

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        scene.forget(0)
    assert trio.current_time() == 0
    reader.close()


async def test_the_head_of_a_reader_is_where_its_bytes_end(scene: Scene) -> None:
    reader = scene.reader()
    scene.write(0)
    await reader.available(0, len(BLOB))
    reader.close()
    assert scene.heads == [1, None]
