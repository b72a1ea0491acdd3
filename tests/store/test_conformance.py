# SPDX-License-Identifier: Apache-2.0
"""What every `ChunkStore` promises, on the disk and in memory."""

from __future__ import annotations

import os
import random
import threading
from typing import TYPE_CHECKING

import pytest

from p2pdist.core.types import Digest, Home, Repository, parse_digest
from p2pdist.core.verify import checksum_of
from p2pdist.errors import IntegrityError, InvalidInput, StoreFullError
from tests.store.blobs import CHUNK_BYTES, Content, content, descriptors, read

if TYPE_CHECKING:
    from collections.abc import Callable

    from p2pdist.ports import ChunkStore, PartialBlob, StoredBlob
    from p2pdist.store.base import BaseStore
    from tests.store.conftest import MakeStore

EMPTY = Content(b"")


# Arriving


def test_a_committed_blob_is_open_and_whole_with_all_that_was_said_of_it(store: ChunkStore) -> None:
    blob = content(1)
    partial = blob.start(store)
    blob.write(partial)
    partial.hash_prefix()
    assert partial.verified
    stored = partial.commit(media_type="text/x", public=True)
    assert (stored.digest, stored.size_bytes, stored.media_type, stored.public) == (blob.digest, 4500, "text/x", True)
    assert (stored.chunk_bytes, stored.checksums) == (CHUNK_BYTES, blob.checksums)
    assert stored.read(0, 4500) == blob.body
    assert stored.read(999, 1001) == blob.body[999:1001]
    assert stored.read(4500, 4500) == b""
    assert os.pread(stored.fileno(), 10, 4490) == blob.body[-10:]
    stored.close()
    partial.close()
    assert read(store, blob.digest) == blob.body


def test_a_blob_is_here_only_after_its_commit(store: ChunkStore) -> None:
    blob = content(1)
    partial = blob.start(store)
    blob.write(partial)
    partial.hash_prefix()
    assert not store.contains(blob.digest)
    assert store.open(blob.digest) is None
    assert list(store.digests()) == []
    partial.commit(public=True).close()
    assert store.contains(blob.digest)
    assert list(store.digests()) == [blob.digest]
    partial.close()


@pytest.mark.parametrize("seed", range(5))
def test_chunks_in_any_order_are_hashed_as_the_prefix_grows(store: ChunkStore, seed: int) -> None:
    blob = content(seed, 12 * CHUNK_BYTES - seed)
    order = random.Random(seed).sample(range(12), 12)
    partial = blob.start(store)
    for at, index in enumerate(order):
        blob.write(partial, [index])
        partial.hash_prefix()
        assert partial.verified == (at == 11)
    partial.commit(public=True).close()
    partial.close()


@pytest.mark.parametrize("data", [bytes, bytearray, memoryview])
def test_a_chunk_may_be_any_kind_of_buffer(store: ChunkStore, data: Callable[[bytes], bytes]) -> None:
    blob = content(1, 700)
    partial = blob.start(store)
    partial.write_chunk(0, data(blob.body), blob.checksums[0])
    partial.hash_prefix()
    assert partial.verified
    partial.discard()


def test_blobs_larger_than_a_hashing_step_and_not_a_multiple_of_it_are_hashed_right(make_store: MakeStore) -> None:
    store = make_store(max_bytes=1 << 24)
    for name, chunk_bytes in enumerate((256 << 10, 3 << 20)):
        blob = Content(random.Random(name).randbytes((5 << 20) + 12345), chunk_bytes)
        blob.store(store)
        assert read(store, blob.digest) == blob.body


def test_the_arriving_blobs_descriptor_serves_its_chunks_before_and_after_the_commit(store: ChunkStore) -> None:
    blob = content(1)
    partial = blob.start(store)
    blob.write(partial, [2])
    fd = partial.fileno()
    assert os.pread(fd, CHUNK_BYTES, 2 * CHUNK_BYTES) == blob.chunk(2)
    blob.write(partial, [0, 1, 3, 4])
    partial.commit(public=True).close()
    assert partial.fileno() == fd
    store.remove(blob.digest)
    assert os.pread(fd, 4500, 0) == blob.body
    partial.close()


def test_a_chunk_that_is_here_is_not_written_twice(store: ChunkStore) -> None:
    blob = content(1)
    partial = blob.start(store)
    blob.write(partial, [1, 1])
    with pytest.raises(ValueError, match="another checksum"):
        partial.write_chunk(1, blob.chunk(0), blob.checksums[0])
    assert os.pread(partial.fileno(), CHUNK_BYTES, CHUNK_BYTES) == blob.chunk(1)
    assert partial.have() == {1: blob.checksums[1]}
    partial.close()


@pytest.mark.parametrize(("index", "size"), [(-1, 1000), (5, 1000), (0, 999), (0, 1001), (4, 1000), (4, 0)])
def test_what_is_not_a_chunk_of_the_blob_is_not_written(store: ChunkStore, index: int, size: int) -> None:
    partial = content(1).start(store)
    with pytest.raises(ValueError, match=f"{size} bytes as chunk {index} of 5"):
        partial.write_chunk(index, bytes(size), checksum_of(bytes(size)))
    assert partial.have() == {}
    partial.close()


# Verifying


def test_wrong_content_is_never_committed_and_only_the_wrong_chunk_is_lost(store: ChunkStore) -> None:
    blob = content(1)
    partial = blob.start(store)
    blob.write(partial, [0, 1, 2, 4])
    lie = b"x" * CHUNK_BYTES
    partial.write_chunk(3, lie, checksum_of(lie))
    partial.hash_prefix()
    assert not partial.verified
    with pytest.raises(IntegrityError) as caught:
        partial.commit(public=True)
    assert caught.value.expected == blob.digest
    assert parse_digest(caught.value.actual) != blob.digest
    assert not store.contains(blob.digest)
    partial.reject([3])
    assert sorted(partial.have()) == [0, 1, 2, 4]
    blob.write(partial, [3])
    partial.commit(public=True).close()
    partial.close()
    assert read(store, blob.digest) == blob.body


def test_a_verified_blob_is_not_verified_after_a_rejection(store: ChunkStore) -> None:
    blob = content(1)
    partial = blob.start(store)
    blob.write(partial)
    partial.hash_prefix()
    partial.reject([0])
    assert not partial.verified
    partial.hash_prefix()
    assert not partial.verified
    blob.write(partial, [0])
    partial.hash_prefix()
    assert partial.verified
    partial.close()


def test_a_commit_before_all_chunks_are_here_is_our_bug(store: ChunkStore) -> None:
    blob = content(1)
    partial = blob.start(store)
    blob.write(partial, [0, 1, 2, 3])
    with pytest.raises(ValueError, match="lacks"):
        partial.commit(public=True)
    partial.close()


def test_a_commit_hashes_what_nobody_has_hashed(store: ChunkStore) -> None:
    blob = content(1)
    partial = blob.start(store)
    blob.write(partial)
    partial.commit(public=True).close()
    partial.close()
    assert read(store, blob.digest) == blob.body


def test_after_the_commit_nothing_can_be_changed(store: ChunkStore) -> None:
    blob = content(1)
    partial = blob.start(store)
    blob.write(partial)
    partial.commit(public=True).close()
    with pytest.raises(ValueError, match="committed"):
        partial.commit(public=True)
    with pytest.raises(ValueError, match="committed"):
        partial.reject([0])
    partial.close()
    assert read(store, blob.digest) == blob.body


def test_the_empty_blob_is_verified_at_once(store: ChunkStore) -> None:
    partial = EMPTY.start(store)
    assert partial.verified
    stored = partial.commit(public=True)
    assert (stored.size_bytes, stored.checksums, stored.read(0, 0)) == (0, (), b"")
    stored.close()
    partial.close()
    assert read(store, EMPTY.digest) == b""


def test_an_empty_blob_under_another_digest_is_not_committed(store: ChunkStore) -> None:
    partial = store.start(content(1).digest, 0, CHUNK_BYTES)
    assert not partial.verified
    with pytest.raises(IntegrityError):
        partial.commit(public=True)
    partial.close()
    assert store.statistics()["partial_blobs"] == 0


def test_hashing_in_a_thread_while_chunks_arrive_and_are_rejected_ends_right(make_store: MakeStore) -> None:
    rng = random.Random(7)
    store = make_store(max_bytes=1 << 24)
    blob = Content(rng.randbytes(6 << 20), 64 << 10)
    partial = blob.start(store)
    failures: list[BaseException] = []

    def hash_until_verified() -> None:
        try:
            while not partial.verified:
                partial.hash_prefix()
        except BaseException as error:
            failures.append(error)

    hasher = threading.Thread(target=hash_until_verified)
    hasher.start()
    for index in rng.sample(range(blob.count), blob.count):
        if rng.random() < 0.2:
            lie = rng.randbytes(64 << 10)
            partial.write_chunk(index, lie, checksum_of(lie))
            partial.hash_prefix()
            partial.reject([index])
        blob.write(partial, [index])
    hasher.join()
    assert failures == []
    partial.commit(public=True).close()
    partial.close()
    assert read(store, blob.digest) == blob.body


def test_a_rejection_in_the_middle_of_hashing_starts_the_hash_again(make_store: MakeStore) -> None:
    blob = Content(bytes(4 << 20), 1 << 20)
    partial = blob.start(make_store(max_bytes=1 << 24))
    blob.write(partial)
    for lap in range(20):
        hasher = threading.Thread(target=partial.hash_prefix)
        hasher.start()
        partial.reject([lap % 4])
        blob.write(partial, [lap % 4])
        hasher.join()
        partial.hash_prefix()
        assert partial.verified
    partial.close()


def test_closing_stops_a_hasher_in_another_thread(make_store: MakeStore) -> None:
    blob = Content(bytes(4 << 20), 1 << 20)
    store = make_store(max_bytes=1 << 24)
    for _ in range(20):
        partial = blob.start(store)
        blob.write(partial)
        hasher = threading.Thread(target=partial.hash_prefix)
        hasher.start()
        partial.close()
        hasher.join()
        partial.hash_prefix()
        assert len(partial.have()) == 4


# Resuming


def test_a_closed_partial_blob_is_resumed_with_its_chunks(store: ChunkStore) -> None:
    blob = content(1)
    partial = blob.start(store)
    blob.write(partial, [3, 0])
    partial.hash_prefix()
    partial.close()
    partial = blob.start(store)
    assert partial.have() == {0: blob.checksums[0], 3: blob.checksums[3]}
    blob.write(partial, [1, 2, 4])
    partial.commit(public=True).close()
    partial.close()
    assert read(store, blob.digest) == blob.body


def test_a_resume_drops_chunks_that_changed_meanwhile_and_those_rejected(store: ChunkStore) -> None:
    blob = content(1)
    partial = blob.start(store)
    blob.write(partial)
    partial.reject([4])
    os.pwrite(partial.fileno(), b"rot", 2 * CHUNK_BYTES + 7)
    partial.close()
    for _ in range(2):
        partial = blob.start(store)
        assert sorted(partial.have()) == [0, 1, 3]
        partial.close()


@pytest.mark.parametrize(("size_bytes", "chunk_bytes"), [(4501, CHUNK_BYTES), (4500, 500), (4500, 1001)])
def test_a_blob_that_is_cut_otherwise_starts_from_zero(store: ChunkStore, size_bytes: int, chunk_bytes: int) -> None:
    blob = content(1)
    partial = blob.start(store)
    blob.write(partial)
    partial.close()
    partial = store.start(blob.digest, size_bytes, chunk_bytes)
    assert (partial.size_bytes, partial.chunk_bytes, partial.have()) == (size_bytes, chunk_bytes, {})
    assert store.statistics()["partial_bytes"] == size_bytes
    partial.close()


@pytest.mark.parametrize(("first", "second"), [("", "reg/a"), ("reg/a", ""), ("reg/a", "reg/b")])
def test_what_one_owner_left_is_not_for_another_to_resume(store: ChunkStore, first: str, second: str) -> None:
    blob = content(1)
    size_bytes = len(blob.body)
    for owner, had in ((first, 0), (first, blob.count), (second, 0)):
        partial = store.start(blob.digest, size_bytes, blob.chunk_bytes, owner)
        assert len(partial.have()) == had
        blob.write(partial)
        partial.close()


def test_a_discarded_blob_leaves_nothing(store: ChunkStore) -> None:
    blob = content(1)
    partial = blob.start(store)
    blob.write(partial, [0])
    partial.discard()
    assert store.statistics()["partial_blobs"] == 0
    partial = blob.start(store)
    assert partial.have() == {}
    partial.close()


def test_discarding_after_the_commit_keeps_the_stored_blob(store: ChunkStore) -> None:
    blob = content(1)
    partial = blob.start(store)
    blob.write(partial)
    partial.commit(public=True).close()
    partial.discard()
    assert read(store, blob.digest) == blob.body


def test_one_blob_arrives_once_at_a_time(store: ChunkStore) -> None:
    partial = content(1).start(store)
    with pytest.raises(ValueError, match="arriving already"):
        content(1).start(store)
    partial.close()
    content(1).start(store).close()


@pytest.mark.parametrize(("size_bytes", "chunk_bytes"), [(-1, 1000), (10, 0), (10, -1)])
def test_impossible_sizes_are_our_bug(store: ChunkStore, size_bytes: int, chunk_bytes: int) -> None:
    with pytest.raises(ValueError, match="no such cut"):
        store.start(content(1).digest, size_bytes, chunk_bytes)


@pytest.mark.parametrize("text", ["sha256:../../etc/passwd", "sha512:00", "", "sha256:" + "A" * 64])
def test_only_a_real_digest_names_a_file(store: ChunkStore, text: str) -> None:
    with pytest.raises(InvalidInput):
        store.start(Digest(text), 10, 10)
    with pytest.raises((InvalidInput, IntegrityError)):
        store.add(Digest(text), b"", media_type="", public=True)
    assert store.open(Digest(text)) is None
    store.remove(Digest(text))


def test_a_blob_that_is_here_may_arrive_again_and_readers_keep_theirs(store: ChunkStore) -> None:
    blob = content(1)
    blob.store(store, public=True)
    reader = store.open(blob.digest)
    assert reader is not None
    Content(blob.body, 700).store(store, public=False)
    assert reader.read(0, 4500) == blob.body
    reader.close()
    again = store.open(blob.digest)
    assert again is not None
    assert again.chunk_bytes == 700
    assert again.public
    again.close()
    assert store.statistics()["blobs"] == 1


# Small blobs


def test_a_manifest_is_stored_in_one_step(store: ChunkStore) -> None:
    body = b'{"schemaVersion": 2}'
    digest = Content(body).digest
    store.add(digest, body, media_type="application/vnd.oci.image.manifest.v1+json", public=True)
    stored = store.open(digest)
    assert stored is not None
    assert stored.media_type == "application/vnd.oci.image.manifest.v1+json"
    assert (stored.public, stored.read(0, 20), stored.checksums) == (True, body, (checksum_of(body),))
    stored.close()


def test_a_manifest_of_several_chunks_has_a_checksum_for_each(make_store: MakeStore) -> None:
    store = make_store(max_bytes=8 << 20)
    body = random.Random(1).randbytes(4 << 20)
    store.add(Content(body).digest, body, media_type="", public=True)
    stored = store.open(Content(body).digest)
    assert stored is not None
    assert stored.checksums == Content(body, stored.chunk_bytes).checksums
    assert read(store, stored.digest) == body
    stored.close()


def test_a_manifest_under_a_wrong_digest_is_refused(store: ChunkStore) -> None:
    with pytest.raises(IntegrityError) as caught:
        store.add(content(1).digest, b"{}", media_type="", public=True)
    assert caught.value.actual == Content(b"{}").digest
    assert store.statistics()["blobs"] == 0


@pytest.mark.parametrize(("first", "second", "public"), [(False, True, True), (True, False, True), (False,) * 3])
def test_what_was_added_public_once_stays_public(store: ChunkStore, first: bool, second: bool, public: bool) -> None:
    blob = Content(b"{}")
    for now_public in (first, second):
        store.add(blob.digest, blob.body, media_type="m", public=now_public)
    stored = store.open(blob.digest)
    assert stored is not None
    assert stored.public is public
    stored.close()


def test_a_blob_remembers_where_it_came_from(store: ChunkStore) -> None:
    blob, home = Content(b"{}"), Repository("reg.lab:5000", "team/app")
    assert store.home(blob.digest) is None
    store.add(blob.digest, blob.body, media_type="m", public=False, home=str(home))
    assert store.home(blob.digest) == Home(home, shared=False)
    store.add(blob.digest, blob.body, media_type="m", public=True, home="docker.io/library/x")
    assert store.home(blob.digest) == Home(Repository("docker.io", "library/x"), shared=True)
    store.add(blob.digest, blob.body, media_type="m", public=False, home=str(home))
    assert store.home(blob.digest) == Home(Repository("docker.io", "library/x"), shared=True)


def test_what_is_here_is_not_replaced_by_adding_it_again(store: ChunkStore) -> None:
    blob = content(1)
    blob.store(store, media_type="first", public=True)
    for public in (True, False):
        store.add(blob.digest, blob.body, media_type="second", public=public)
    stored = store.open(blob.digest)
    assert stored is not None
    assert (stored.media_type, stored.public) == ("first", True)
    stored.close()


def test_a_manifest_can_be_added_while_the_same_blob_arrives(store: ChunkStore) -> None:
    blob = content(1)
    partial = blob.start(store)
    store.add(blob.digest, blob.body, media_type="m", public=True)
    blob.write(partial)
    partial.commit(public=True).close()
    partial.close()
    assert read(store, blob.digest) == blob.body
    assert store.statistics()["blobs"] == 1


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
