# SPDX-License-Identifier: Apache-2.0
"""What is known of one blob."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.chunkmap import ChunkMap, chunk_set, members
from p2pdist.core.packing import pack_indices
from p2pdist.core.progress import Progress, read_share
from p2pdist.core.wire import Have, Share
from p2pdist.errors import RemoteProtocolError
from tests.strategies import CHUNK, checksum, digest, peer


def progress_of(chunks: int | None = 4) -> Progress:
    progress = Progress(digest(1), order=0, registry="r", shared=True, wanted=True)
    if chunks is not None:
        progress.size(ChunkMap.of(chunks * CHUNK))
    return progress


def test_content_of_unknown_size_counts_as_one_chunk_that_is_not_here() -> None:
    progress = progress_of(None)
    assert (progress.size_bytes, progress.count, progress.full, progress.complete) == (-1, 1, 1, False)
    assert progress.share(reply=True) == Share(digest(1), -1, b"", b"", True, "", True)


def test_an_empty_blob_is_complete_from_the_start() -> None:
    assert progress_of(0).complete


def test_a_chunk_is_offered_once_and_only_when_it_is_here_and_vouched_for() -> None:
    progress = progress_of()
    progress.vouchers.settle(2, checksum(2))
    assert not progress.offer(2)
    progress.gain(2, checksum(2))
    progress.gain(3, checksum(3))
    assert progress.offer(2)
    assert not progress.offer(2)
    assert not progress.offer(3)
    progress.vouchers.settle(3, checksum(9))
    assert not progress.offer(3)
    assert (progress.have, progress.offered, progress.log) == (0b1100, 0b0100, [2])


def test_chunks_that_proved_wrong_are_lost_altogether() -> None:
    progress = progress_of()
    for index in (1, 0, 3):
        progress.gain(index, checksum(index))
        progress.vouchers.settle(index, checksum(index))
        progress.senders[index] = peer(1)
        progress.offer(index)
    progress.lose([0, 2])
    assert (progress.have, progress.offered, progress.log) == (0b1010, 0b1010, [1, 3])
    assert list(progress.own) == [1, 3]
    assert list(progress.senders) == [1, 3]


def test_a_chunk_is_in_flight_while_one_source_is_asked() -> None:
    progress = progress_of()
    progress.ask(1, peer(1), 0.0)
    progress.ask(1, None, 1.0)
    progress.unask(1, peer(1))
    progress.unask(1, peer(2))
    assert (progress.inflight, progress.asked) == (0b10, {1: [(None, 1.0)]})
    progress.unask(1, None)
    progress.unask(1, None)
    assert (progress.inflight, progress.asked) == (0, {})


def test_each_reader_has_a_window_until_it_goes() -> None:
    progress = progress_of(100)
    progress.move_head(1, 0)
    progress.move_head(2, 50)
    assert list(members(progress.window)) == [*range(6), *range(50, 56)]
    progress.move_head(1, 10)
    progress.move_head(2, None)
    progress.move_head(3, None)
    assert list(members(progress.window)) == list(range(10, 16))


def test_a_chunk_is_news_only_when_it_is_seen_for_the_first_time() -> None:
    progress = progress_of()
    progress.gain(0, checksum(0))
    assert not progress.news(0b0001)
    assert progress.news(0b0011)
    assert not progress.news(0b0011)
    assert progress.news(0b0111)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 15)), max_size=30))
def test_the_holders_are_counted_right_whatever_comes_and_goes(changes: list[tuple[int, int]]) -> None:
    progress = progress_of()
    shared: dict[int, int] = {}
    for who, bits in changes:
        old = shared.pop(who, None)
        if old is not None:
            progress.drop_holder(old, shared.values())
        else:
            shared[who] = bits
            progress.add_holder(bits)
        assert progress.holders == [sum(has >> index & 1 for has in shared.values()) for index in range(4)]
        assert progress.held == chunk_set(index for index, count in enumerate(progress.holders) if count)


def test_a_share_is_read_as_it_was_made() -> None:
    progress = progress_of(10)
    for index in (9, 2):
        progress.gain(index, checksum(index))
        progress.vouchers.settle(index, checksum(index))
        progress.offer(index)
    share = progress.share(reply=False)
    assert read_share(share, ChunkMap.of(10 * CHUNK)) == (chunk_set([2, 9]), [checksum(2), checksum(9)])


@pytest.mark.parametrize(
    ("have", "checksums"),
    [(b"\x01", bytes(15)), (b"\x01", bytes(32)), (b"\x00", bytes(16)), (b"", b""), (b"\x10", bytes(16))],
)
def test_a_share_whose_parts_do_not_fit_is_the_peers_fault(have: bytes, checksums: bytes) -> None:
    share = Share(digest(1), 4 * CHUNK, have, checksums, True, "", False)
    with pytest.raises(RemoteProtocolError):
        read_share(share, ChunkMap.of(4 * CHUNK))


def test_a_have_tells_what_was_offered_since_also_after_wrong_chunks_went() -> None:
    progress = progress_of()
    for index in (2, 0, 3):
        progress.vouchers.settle(index, checksum(index))
        progress.gain(index, checksum(index))
        progress.offer(index)
    assert progress.have_since(1) == Have(digest(1), pack_indices([0, 3]), checksum(0) + checksum(3))
    progress.lose([0])
    assert progress.have_since(0) == Have(digest(1), pack_indices([2, 3]), checksum(2) + checksum(3))
