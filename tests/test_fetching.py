# SPDX-License-Identifier: Apache-2.0
"""A run of chunks as its bytes come; what becomes of them is in test_puller.py."""

from __future__ import annotations

import pytest

from p2pdist.core.chunkmap import MIN_CHUNK_BYTES, ChunkMap
from p2pdist.fetching import Run

CHUNK = MIN_CHUNK_BYTES
CUT = ChunkMap.of(4 * CHUNK + 5)


def test_a_chunk_is_complete_with_its_last_byte_and_its_time_begins_where_the_last_one_ended() -> None:
    run = Run(CUT, 1, 4)
    assert run.length == 3 * CHUNK
    assert list(run.completed(1, 10.0)) == []
    assert list(run.completed(CHUNK - 1, 10.5)) == []
    assert list(run.completed(CHUNK, 11.0)) == [(1, 1.0)]
    assert list(run.completed(3 * CHUNK, 13.0)) == [(2, 2.0), (3, 0.0)]
    assert run.next == run.stop


@pytest.mark.parametrize(("start", "stop", "length"), [(3, 5, CHUNK + 5), (4, 5, 5), (0, 5, 4 * CHUNK + 5)])
def test_the_last_chunk_is_as_short_as_the_blob_has_it(start: int, stop: int, length: int) -> None:
    run = Run(CUT, start, stop)
    assert run.length == length
    assert [index for index, _ in run.completed(length, 1.0)] == list(range(start, stop))
    assert run.length == 0


def test_what_is_left_of_a_broken_run_begins_with_its_first_incomplete_chunk() -> None:
    run = Run(CUT, 0, 4)
    list(run.completed(2 * CHUNK + 1, 1.0))
    assert (run.next, run.stop) == (2, 4)
