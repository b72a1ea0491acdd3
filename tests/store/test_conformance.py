# SPDX-License-Identifier: Apache-2.0
"""What every `ChunkStore` promises, on the disk and in memory: blobs on their way in, and small ones."""

from __future__ import annotations

import os
import random
import threading
from typing import TYPE_CHECKING

import pytest

from p2pdist.core.types import Digest, Home, Repository, parse_digest
from p2pdist.core.verify import checksum_of
from p2pdist.errors import IntegrityError, InvalidInput
from tests.store.blobs import CHUNK_BYTES, Content, content, read

if TYPE_CHECKING:
    from collections.abc import Callable

    from p2pdist.ports import ChunkStore
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
