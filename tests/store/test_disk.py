# SPDX-License-Identifier: Apache-2.0
"""What only a store on a disk can get wrong: locks, restarts, leftovers, full and failing disks."""

from __future__ import annotations

import os
import resource
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from p2pdist.core.types import Home, Repository
from p2pdist.errors import IntegrityError, StoreError, StoreFullError
from p2pdist.store.disk import DiskStore
from tests.store.blobs import CHUNK_BYTES, Content, content, descriptors, read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from p2pdist.core.types import Digest

DAY_S = 24 * 3600


@contextmanager
def opened(
    data_dir: Path,
    *,
    max_bytes: int = 1 << 30,
    min_free_bytes: int = 0,
    now: Callable[[], float] | None = None,
    on_evicted: Callable[[Digest], None] | None = None,
) -> Iterator[DiskStore]:
    clock = {} if now is None else {"now": now}
    store = DiskStore(
        data_dir,
        max_bytes=max_bytes,
        low_bytes=max_bytes,
        min_free_bytes=min_free_bytes,
        partial_ttl_s=DAY_S,
        on_evicted=on_evicted,
        **clock,
    )
    try:
        yield store
    finally:
        store.close()


def files(data_dir: Path) -> set[str]:
    """Return all files but the lock, relative to the directory, with digests cut to four digits."""
    found = (path.relative_to(data_dir) for path in data_dir.rglob("*") if path.is_file())
    return {str(path.parent / (path.name[:4] + path.suffix)) for path in found} - {"lock"}


def blob_path(data_dir: Path, digest: Digest) -> Path:
    return data_dir / "blobs/sha256" / digest[7:9] / digest[7:]


def names(digest: Digest) -> set[str]:
    shard = f"blobs/sha256/{digest[7:9]}/{digest[7:11]}"
    return {shard, f"{shard}.meta"}


# The lock


def test_a_second_agent_on_the_same_directory_is_refused_in_one_line(tmp_path: Path) -> None:
    with opened(tmp_path):
        before = descriptors()
        with pytest.raises(StoreError, match="in use by another agent") as caught, opened(tmp_path):
            pass
        assert str(tmp_path) in str(caught.value)
        assert str(os.getpid()) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert descriptors() == before
    with opened(tmp_path):
        pass


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StoreError, match=r"cannot use the data directory .*/file: Not a directory"),
        opened(tmp_path / "file"),
    ):
        pass


def test_others_cannot_read_what_is_stored(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        digest = content(1).store(store)
        content(2).start(store).close()
    for directory in ("blobs/sha256", "partial", "tmp"):
        assert (tmp_path / directory).stat().st_mode & 0o077 == 0
    assert blob_path(tmp_path, digest).stat().st_mode & 0o077 == 0


# Restarts


def test_a_restart_keeps_blobs_their_order_of_use_and_what_was_said_of_them(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        digests = [content(name).store(store, media_type=f"m/{name}", public=name % 2 == 0) for name in range(4)]
        read(store, digests[1])
        expected = list(store.digests())
        assert expected[0] == digests[1]
    with opened(tmp_path) as store:
        assert list(store.digests()) == expected
        assert store.statistics()["bytes"] == 4 * 4500
        for name, digest in enumerate(digests):
            stored = store.open(digest)
            assert stored is not None
            assert (stored.media_type, stored.public) == (f"m/{name}", name % 2 == 0)
            assert stored.checksums == content(name).checksums
            assert stored.read(0, 4500) == content(name).body
            stored.close()


def test_a_restart_keeps_where_a_blob_came_from(tmp_path: Path) -> None:
    home = Repository("reg.lab", "team/app")
    with opened(tmp_path) as store:
        store.add(content(1).digest, content(1).body, media_type="m", public=False, home=str(home))
    with opened(tmp_path) as store:
        assert store.home(content(1).digest) == Home(home, shared=False)


def test_a_restart_resumes_what_was_arriving_even_if_nobody_closed_it(tmp_path: Path) -> None:
    blob = content(1)
    with opened(tmp_path) as store:
        abandoned = blob.start(store)
        blob.write(abandoned, [0, 2])
        with opened_anew(tmp_path, store) as after:
            partial = blob.start(after)
            assert sorted(partial.have()) == [0, 2]
            blob.write(partial, [1, 3, 4])
            partial.commit(public=True).close()
            partial.close()
            assert read(after, blob.digest) == blob.body
        abandoned.close()


@contextmanager
def opened_anew(data_dir: Path, crashed: DiskStore) -> Iterator[DiskStore]:
    """Open the directory as after a crash: the lock is gone, nothing else was put in order."""
    crashed.close()
    with opened(data_dir) as store:
        yield store


def test_blobs_named_by_their_sha512_are_kept_resumed_and_deleted_like_others(tmp_path: Path) -> None:
    blob, arriving, gone = (replace(content(name), algorithm="sha512") for name in (1, 2, 3))
    with opened(tmp_path) as store:
        blob.store(store)
        store.add(gone.digest, gone.body, media_type="", public=True)
        partial = arriving.start(store)
        arriving.write(partial, [0, 2])
        partial.close()
    with opened(tmp_path) as store:
        assert set(store.digests()) == {blob.digest, gone.digest}
        assert read(store, blob.digest) == blob.body
        partial = arriving.start(store)
        assert set(partial.have()) == {0, 2}
        partial.discard()
        store.remove(gone.digest)
    shard = f"blobs/sha512/{blob.digest[7:9]}/{blob.digest[7:11]}"
    assert files(tmp_path) == {shard, f"{shard}.meta"}


def test_a_sha512_that_is_wrong_is_not_committed(tmp_path: Path) -> None:
    right = replace(content(1), algorithm="sha512")
    with opened(tmp_path) as store:
        partial = right.start(store)
        content(2).write(partial)
        with pytest.raises(IntegrityError):
            partial.commit(public=True)
        partial.discard()
        with pytest.raises(IntegrityError):
            store.add(right.digest, content(2).body, media_type="", public=True)


def test_the_last_use_is_written_at_most_once_a_minute_and_at_the_end(tmp_path: Path) -> None:
    clock = [1000.0]
    with opened(tmp_path, now=lambda: clock[0]) as store:
        digest = content(1).store(store)
        meta = blob_path(tmp_path, digest).with_suffix(".meta")
        assert int(meta.stat().st_mtime) == 1000
        for clock[0], written in ((1059.0, 1000), (1061.0, 1061), (1100.0, 1061)):
            read(store, digest)
            assert int(meta.stat().st_mtime) == written
    assert int(meta.stat().st_mtime) == 1100


def test_a_clock_that_was_set_back_does_not_disturb_the_order_of_use(tmp_path: Path) -> None:
    clock = [5000.0]
    with opened(tmp_path, max_bytes=9000, now=lambda: clock[0]) as store:
        first, second = (content(name).store(store) for name in (1, 2))
        clock[0] = 100.0
        read(store, first)
        assert list(store.digests()) == [first, second]
    with opened(tmp_path, max_bytes=9000, now=lambda: clock[0]) as store:
        third = content(3).store(store)
        assert next(iter(store.digests())) == third


def test_partial_blobs_of_yesterday_are_dropped_at_the_start(tmp_path: Path) -> None:
    young, old = content(1), content(2)
    with opened(tmp_path) as store:
        for blob in (young, old):
            partial = blob.start(store)
            blob.write(partial, [0])
            partial.close()
    written_s = (tmp_path / "partial" / young.digest[7:]).stat().st_mtime
    for suffix in ("", ".journal"):
        path = tmp_path / "partial" / (old.digest[7:] + suffix)
        os.utime(path, (written_s - 100, written_s - 100))
    with opened(tmp_path, now=lambda: written_s + DAY_S - 50) as store:
        assert store.statistics()["partial_blobs"] == 1
        partial = young.start(store)
        assert sorted(partial.have()) == [0]
        partial.close()
    assert files(tmp_path) == {f"partial/{young.digest[7:11]}", f"partial/{young.digest[7:11]}.journal"}


# Leftovers of a kill or a power cut: see the table in recovery.py


def test_a_partial_blob_rotten_on_disk_is_resumed_without_the_rotten_chunk(tmp_path: Path) -> None:
    blob = content(1)
    with opened(tmp_path) as store:
        partial = blob.start(store)
        blob.write(partial)
        partial.close()
    with open(tmp_path / "partial" / blob.digest[7:], "r+b") as file:
        file.seek(CHUNK_BYTES)
        file.write(b"rot")
    with opened(tmp_path) as store:
        partial = blob.start(store)
        assert sorted(partial.have()) == [0, 2, 3, 4]
        blob.write(partial, [1])
        partial.commit(public=True).close()
        partial.close()
        assert read(store, blob.digest) == blob.body


@pytest.mark.parametrize("name", ["data", "journal"])
def test_a_partial_blob_cut_short_starts_from_zero(tmp_path: Path, name: str) -> None:
    blob = content(1)
    with opened(tmp_path) as store:
        partial = blob.start(store)
        blob.write(partial)
        partial.close()
    suffix = "" if name == "data" else ".journal"
    os.truncate(tmp_path / "partial" / (blob.digest[7:] + suffix), 40)
    with opened(tmp_path) as store:
        partial = blob.start(store)
        assert partial.have() == {}
        partial.discard()
    assert files(tmp_path) == set()


def damage_sidecar(data: Path, meta: Path) -> None:
    os.truncate(meta, 30)


def truncate_data(data: Path, meta: Path) -> None:
    os.truncate(data, 4499)


def drop_sidecar(data: Path, meta: Path) -> None:
    meta.unlink()


def drop_data(data: Path, meta: Path) -> None:
    data.unlink()


@pytest.mark.parametrize("break_it", [damage_sidecar, truncate_data, drop_sidecar, drop_data])
def test_a_blob_that_is_not_whole_on_disk_is_dropped(tmp_path: Path, break_it: Callable[[Path, Path], None]) -> None:
    gone: list[Digest] = []
    with opened(tmp_path, on_evicted=gone.append) as store:
        first, second, other = (content(name).store(store) for name in (1, 2, 3))
        data = blob_path(tmp_path, first)
        break_it(data, data.with_suffix(".meta"))
        before = descriptors()
        assert store.open(first) is None
        assert not store.contains(first)
        assert descriptors() == before
        assert gone == [first]
    data = blob_path(tmp_path, second)
    break_it(data, data.with_suffix(".meta"))
    with opened(tmp_path) as store:
        assert list(store.digests()) == [other]
        assert files(tmp_path) == names(other)
        content(1).store(store)
        assert read(store, first) == content(1).body


def test_a_blob_without_sidecar_but_with_its_journal_goes_back_to_arriving(tmp_path: Path) -> None:
    blob = content(1)
    with opened(tmp_path) as store:
        partial = blob.start(store)
        blob.write(partial)
        partial.close()
    (tmp_path / "blobs/sha256" / blob.digest[7:9]).mkdir()
    (tmp_path / "partial" / blob.digest[7:]).rename(blob_path(tmp_path, blob.digest))
    with opened(tmp_path) as store:
        assert not store.contains(blob.digest)
        partial = blob.start(store)
        assert len(partial.have()) == 5
        partial.commit(public=True).close()
        partial.close()
        assert read(store, blob.digest) == blob.body
    assert files(tmp_path) == names(blob.digest)


def test_leftovers_are_deleted_and_foreign_files_are_not(tmp_path: Path) -> None:
    blob, arriving = content(1), content(2)
    with opened(tmp_path) as store:
        blob.store(store)
        arriving.start(store).close()
    hexes = {name: content(name).digest[7:] for name in range(3, 6)}
    (tmp_path / "tmp/17").write_bytes(b"half a sidecar")
    (tmp_path / "partial" / hexes[3]).write_bytes(b"data without journal")
    (tmp_path / "partial" / f"{hexes[4]}.journal").write_bytes(b"journal without data")
    for suffix in ("", ".journal"):
        (tmp_path / "partial" / (blob.digest[7:] + suffix)).write_bytes(b"of a blob that is whole")
    foreign = {"blobs/sha256/READ.txt", "partial/READ.txt", "peer.id"}
    for name in foreign:
        (tmp_path / name).write_text("not ours")
    with opened(tmp_path) as store:
        assert store.statistics()["partial_blobs"] == 1
        assert read(store, blob.digest) == blob.body
    arriving_names = {f"partial/{arriving.digest[7:11]}{suffix}" for suffix in ("", ".journal")}
    assert files(tmp_path) - names(blob.digest) - arriving_names == {
        "blobs/sha256/READ.txt",
        "partial/READ.txt",
        "peer.id",
    }


def test_no_file_is_left_of_a_blob_that_was_removed_discarded_or_evicted(tmp_path: Path) -> None:
    with opened(tmp_path, max_bytes=9000) as store:
        store.remove(content(1).store(store))
        content(2).start(store).discard()
        content(3).start(store).close()
        content(4).store(store)
        last = [content(name).store(store) for name in (5, 6)]
        assert files(tmp_path) == names(last[0]) | names(last[1])


# Full and failing disks


def test_a_disk_without_room_refuses_the_blob_and_stays_clean(tiny_disk: Path) -> None:
    with opened(tiny_disk) as store:
        before = descriptors()
        with pytest.raises(StoreFullError, match="free disk space"):
            store.start(content(1).digest, 3 << 20, 1 << 18)
        with pytest.raises(StoreFullError):
            store.add(content(1, 3 << 20).digest, content(1, 3 << 20).body, media_type="", public=True)
        assert files(tiny_disk) == set()
        assert descriptors() == before
        content(2, 1 << 20).store(store)
        assert read(store, content(2, 1 << 20).digest) == content(2, 1 << 20).body


def test_a_full_disk_evicts_even_where_the_store_has_not_reached_its_size(tiny_disk: Path) -> None:
    gone: list[Digest] = []
    with opened(tiny_disk, on_evicted=gone.append) as store:
        first, second = (content(name, 800_000).store(store) for name in (1, 2))
        content(3, 700_000).store(store)
        assert gone == [first]
        assert store.contains(second)


def test_the_disk_keeps_the_free_space_it_was_promised(tiny_disk: Path) -> None:
    with opened(tiny_disk, min_free_bytes=1 << 20) as store:
        first, second = (content(name, 400_000).store(store) for name in (1, 2))
        third = content(3, 400_000).store(store)
        assert list(store.digests()) == [third, second]
        assert not store.contains(first)
        disk = os.statvfs(tiny_disk)
        assert disk.f_bavail * disk.f_frsize >= 1 << 20
        with pytest.raises(StoreFullError):
            content(4, 1 << 20).start(store)


def test_a_disk_that_has_less_room_than_it_says_evicts_on_the_refusal(tiny_disk: Path) -> None:
    with opened(tiny_disk) as store:
        old = content(1, 100_000).store(store)
        disk = os.statvfs(tiny_disk)
        # The journal takes the page that the blob then lacks.
        partial = store.start(content(2).digest, disk.f_bavail * disk.f_frsize, 1 << 18)
        assert not store.contains(old)
        partial.discard()


def test_a_blob_that_starts_again_with_another_cut_frees_the_room_of_the_first_try(tiny_disk: Path) -> None:
    blob = content(1, 1_500_000)
    with opened(tiny_disk) as store:
        blob.start(store).close()
        other = store.start(blob.digest, 1_500_000, 1 << 18)
        assert other.have() == {}
        other.close()


def fill(disk: Path) -> Path:
    """Take all room there is; return the file that holds it."""
    ballast = disk / "ballast"
    free = os.statvfs(disk)
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)
    return ballast


def test_a_disk_that_others_fill_meanwhile_still_takes_the_blob_that_was_promised_room(tiny_disk: Path) -> None:
    blob = content(1, 500_000)
    with opened(tiny_disk) as store:
        evictable = content(2).store(store)
        partial = blob.start(store)
        fill(tiny_disk)
        blob.write(partial)
        partial.commit(public=True).close()
        partial.close()
        assert not store.contains(evictable)
        assert read(store, blob.digest) == blob.body


def test_a_commit_without_room_for_the_sidecar_can_be_repeated_later(tiny_disk: Path) -> None:
    blob = content(1)
    with opened(tiny_disk) as store:
        partial = blob.start(store)
        blob.write(partial)
        ballast = fill(tiny_disk)
        with pytest.raises(StoreFullError, match=blob.digest):
            partial.commit(public=True)
        os.truncate(ballast, ballast.stat().st_size - 8192)  # enough for the content, not for the sidecar
        with pytest.raises(StoreFullError):
            store.add(content(2).digest, content(2).body, media_type="", public=True)
        assert files(tiny_disk) == {"ball", *(f"partial/{blob.digest[7:11]}{end}" for end in ("", ".journal"))}
        ballast.unlink()
        partial.commit(public=True).close()
        partial.close()
        assert read(store, blob.digest) == blob.body
        assert files(tiny_disk) == names(blob.digest)


@contextmanager
def files_end_at(size_bytes: int) -> Iterator[None]:
    """Let every write of this process past this byte of a file fail, as a dying disk does, after a short write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_chunk_whose_write_failed_is_not_here_and_can_be_written_again(tmp_path: Path) -> None:
    blob = Content(content(1, 4 << 20).body, 1 << 20)
    with opened(tmp_path) as store:
        partial = blob.start(store)
        blob.write(partial, [0])
        with (
            files_end_at((2 << 20) + 777),
            pytest.raises(StoreError, match="cannot write chunk 2 of sha256:") as caught,
        ):
            blob.write(partial, [1, 2])
        assert not isinstance(caught.value, StoreFullError)
        assert sorted(partial.have()) == [0, 1]
        partial.close()
        partial = blob.start(store)
        assert sorted(partial.have()) == [0, 1]
        blob.write(partial, [2, 3])
        partial.commit(public=True).close()
        partial.close()
        assert read(store, blob.digest) == blob.body


def test_without_descriptors_a_stored_blob_is_not_lost(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        digest = content(1).store(store)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest_free = os.dup(0)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        try:
            with pytest.raises(StoreError, match="Too many open files"):
                store.open(digest)
            with pytest.raises(StoreError, match="Too many open files"):
                content(2).start(store)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert read(store, digest) == content(1).body
        assert store.statistics()["partial_blobs"] == 0
