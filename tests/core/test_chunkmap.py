# SPDX-License-Identifier: Apache-2.0
"""How blobs are cut, and sets of chunks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.chunkmap import (
    MAX_BLOB_BYTES,
    MAX_CHUNK_BYTES,
    MIN_CHUNK_BYTES,
    ChunkMap,
    chunk_bytes_for,
    chunk_set,
    from_bytes,
    lowest,
    members,
    to_bytes,
)

MIB = 1024 * 1024
small_maps = st.builds(ChunkMap, st.integers(0, 500), st.integers(1, 40))
index_sets = st.sets(st.integers(0, 300))


@pytest.mark.parametrize(
    ("size", "chunk"),
    [
        (0, MIN_CHUNK_BYTES),
        (1, MIN_CHUNK_BYTES),
        (128 * MIB, MIN_CHUNK_BYTES),
        (128 * MIB + 1, 2 * MIN_CHUNK_BYTES),
        (256 * MIB, 2 * MIN_CHUNK_BYTES),
        (2048 * MIB, MAX_CHUNK_BYTES),
        (MAX_BLOB_BYTES, MAX_CHUNK_BYTES),
    ],
)
def test_the_cut_follows_from_the_size_alone(size: int, chunk: int) -> None:
    assert chunk_bytes_for(size) == chunk
    assert ChunkMap.of(size) == ChunkMap(size, chunk)


@given(st.integers(0, MAX_BLOB_BYTES))
def test_a_chunk_is_a_power_of_two_and_there_are_at_most_65536(size: int) -> None:
    cut = ChunkMap.of(size)
    assert cut.chunk_bytes & (cut.chunk_bytes - 1) == 0
    assert MIN_CHUNK_BYTES <= cut.chunk_bytes <= MAX_CHUNK_BYTES
    assert cut.count <= 65536
    assert cut.count <= 512 or cut.chunk_bytes == MAX_CHUNK_BYTES


@given(small_maps)
def test_every_byte_is_in_exactly_one_chunk(cut: ChunkMap) -> None:
    spans = [(cut.start(index), cut.start(index) + cut.length(index)) for index in range(cut.count)]
    assert [byte for start, stop in spans for byte in range(start, stop)] == list(range(cut.size_bytes))
    assert all(start < stop for start, stop in spans)
    assert list(members(cut.full)) == list(range(cut.count))


@given(small_maps, st.data())
def test_covering_names_just_the_chunks_that_a_span_touches(cut: ChunkMap, data: st.DataObject) -> None:
    if not cut.size_bytes:
        return
    start = data.draw(st.integers(0, cut.size_bytes - 1))
    stop = data.draw(st.integers(start + 1, cut.size_bytes))
    touched = {byte // cut.chunk_bytes for byte in range(start, stop)}
    assert list(cut.covering(start, stop)) == sorted(touched)


@pytest.mark.parametrize(("start", "stop"), [(5, 5), (6, 5), (-1, 5), (0, 101), (100, 101)])
def test_a_span_outside_the_blob_is_an_error(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="of a blob of 100"):
        ChunkMap(100, 10).covering(start, stop)


@pytest.mark.parametrize(("size", "chunk"), [(-1, 10), (10, 0), (10, -1)])
def test_no_blob_is_cut_like_this(size: int, chunk: int) -> None:
    with pytest.raises(ValueError, match="no such cut"):
        ChunkMap(size, chunk)


@given(small_maps, st.data())
def test_the_unbroken_run_ends_at_the_first_chunk_that_is_missing(cut: ChunkMap, data: st.DataObject) -> None:
    have = data.draw(st.integers(0, cut.full))
    index = data.draw(st.integers(0, cut.count))
    stop = index
    while have >> stop & 1:
        stop += 1
    assert cut.contiguous_stop(have, index) == min(stop * cut.chunk_bytes, cut.size_bytes)


@given(index_sets)
def test_a_set_of_chunks_holds_what_was_put_in_in_order(indices: set[int]) -> None:
    bits = chunk_set(indices)
    assert list(members(bits)) == sorted(indices)
    assert bits.bit_count() == len(indices)
    if indices:
        assert lowest(bits) == min(indices)


@given(index_sets)
def test_a_bitmap_round_trips_in_the_length_that_its_count_says(indices: set[int]) -> None:
    bits = chunk_set(indices)
    bitmap = to_bytes(bits, 301)
    assert len(bitmap) == 38
    assert from_bytes(bitmap, 301) == bits


def test_a_bitmap_is_little_endian_in_bytes_and_bits() -> None:
    assert to_bytes(chunk_set([0, 9]), 10) == b"\x01\x02"


@pytest.mark.parametrize(
    ("bitmap", "count"),
    [(b"", 1), (b"\x01\x00", 8), (b"\x00", 9), (b"\x02", 1), (b"\xff\xff", 15), (b"\x00", 0)],
)
def test_a_bitmap_of_another_length_or_with_chunks_past_the_end_is_an_error(bitmap: bytes, count: int) -> None:
    with pytest.raises(ValueError, match="bitmap"):
        from_bytes(bitmap, count)
