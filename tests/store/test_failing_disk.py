# SPDX-License-Identifier: Apache-2.0
"""A disk that fails at any one call: an error of one line, nothing lost, and the rest goes on."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.lab.workspace import workspace
from bench.store.calls import CHANGES, hooked
from bench.store.expected import Expected, check
from bench.store.worker import Work
from p2pdist.errors import IntegrityError, StoreError
from p2pdist.store.disk import DiskStore
from tests.store.blobs import content, descriptors, read

READS = ("pread", "stat", "fstat", "listdir", "statvfs", "dup")
STEPS = 12


@contextmanager
def opened(data_dir: Path) -> Iterator[DiskStore]:
    store = DiskStore(data_dir, max_bytes=1 << 20, low_bytes=1 << 20, min_free_bytes=0)
    yield store
    store.close()


class Failing:
    """A hook that fails the calls that are chosen, from the `number`-th on or only that one."""

    def __init__(self, name: str, number: int, error: int, *, part: str = "", once: bool = True) -> None:
        self.name, self.number, self.error, self.part, self.once = name, number, error, part, once
        self.calls = 0

    def __call__(self, name: str, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401
        if name == self.name and self.part in str(arguments[0]):
            self.calls += 1
            if self.calls == self.number or (self.calls > self.number and not self.once):
                raise OSError(self.error, os.strerror(self.error))
        return function(*arguments, **named)


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("name", [*CHANGES, *READS])
def test_any_call_may_fail_once(name: str, error: int) -> None:
    """A step that fails says so in one line; what was committed before is there, in this run and after a restart."""
    number, reached = 0, True
    with workspace(64 << 20) as space:
        while reached:
            number += 1
            hook = Failing(name, number, error)
            work_through(space.directory(str(number)), hook)
            reached = hook.calls >= number


def work_through(directory: Path, hook: Failing) -> None:
    reports: list[tuple[str, str, str]] = []
    before, failure, here = descriptors(), "", None
    with hooked(hook, (*CHANGES, *READS)):
        try:
            work = Work(directory, 5, lambda *what: reports.append(what))
            try:
                work.do(STEPS)
            finally:
                here = set(work.store.digests())
                work.store.close()
        except StoreError as error:
            failure = str(error)
    assert "\n" not in failure
    assert descriptors() == before, f"{hook.name} {hook.number}"
    expected = Expected()
    expected.hear(reports)
    assert check(directory, expected) == [], f"{hook.name} {hook.number}"
    assert here is None or set(expected.order) == here, f"{hook.name} {hook.number}"


def test_a_chunk_that_cannot_be_read_any_more_drops_its_blob(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        digest = content(1).store(store)
        blob = store.open(digest)
        assert blob is not None
        with (
            hooked(Failing("pread", 1, errno.EIO), ("pread",)),
            pytest.raises(IntegrityError, match="chunk 3 cannot be read: Input/output error"),
        ):
            blob.check(3, on_disk=True)
        blob.close()
        assert not store.contains(digest)
        content(1).store(store)
        assert read(store, digest) == content(1).body


def test_a_sidecar_that_cannot_be_read_costs_its_blob_and_no_other(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        bad, good = (content(name).store(store) for name in (1, 2))
    with hooked(Failing("open", 1, errno.EIO, part=f"{bad[7:]}.meta"), ("open",)), opened(tmp_path) as store:
        assert list(store.digests()) == [good]
    with opened(tmp_path) as store:
        content(1).store(store)
        with hooked(Failing("open", 1, errno.EIO, part=f"{bad[7:]}.meta"), ("open",)):
            assert store.open(bad) is None
        assert list(store.digests()) == [good]


def test_a_journal_that_cannot_be_read_costs_the_part_that_had_arrived(tmp_path: Path) -> None:
    blob = content(1)
    with opened(tmp_path) as store:
        partial = blob.start(store)
        blob.write(partial, [0, 1])
        partial.close()
        with hooked(Failing("open", 1, errno.EIO, part=".journal"), ("open",)):
            partial = blob.start(store)
        assert partial.have() == {}
        blob.write(partial)
        partial.commit(public=True).close()
        partial.close()
        assert read(store, blob.digest) == blob.body


def test_a_disk_that_became_read_only_serves_what_it_has_and_refuses_the_rest_in_a_line(tmp_path: Path) -> None:
    names = tuple(name for name in CHANGES if name not in ("open", "fsync"))
    with opened(tmp_path) as store:
        digest = content(1).store(store)

        def read_only(name: str, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401
            if name in names or (name == "open" and arguments[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return function(*arguments, **named)

        with hooked(read_only):
            assert read(store, digest) == content(1).body
            for refused in (
                lambda: content(2).start(store),
                lambda: store.add(content(3).digest, content(3).body, media_type="", public=True),
                store.probe,
            ):
                with pytest.raises(StoreError, match="Read-only file system"):
                    refused()
            with pytest.raises(StoreError, match=r"no room for|Read-only file system"):
                content(4, 1 << 20).start(store)
            assert read(store, digest) == content(1).body
        store.probe()
        content(2).store(store)
    with opened(tmp_path) as store:
        assert read(store, digest) == content(1).body
    assert not list((tmp_path / "tmp").iterdir())


def test_strange_files_in_the_directories_do_not_keep_an_agent_from_starting(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        kept, damaged = (content(name).store(store) for name in (1, 2))
    (tmp_path / "tmp" / "directory").mkdir()
    (tmp_path / "blobs/sha256/ff").mkdir(exist_ok=True)
    (tmp_path / "blobs/sha256/ab").write_text("a file for a shard")
    (tmp_path / "blobs/sha256/ff" / ("f" * 64)).mkdir()
    (tmp_path / "partial" / ("e" * 64)).mkdir()
    blob = tmp_path / "blobs/sha256" / damaged[7:9] / damaged[7:]
    blob.unlink()
    blob.symlink_to("nowhere")
    with opened(tmp_path) as store:
        assert list(store.digests()) == [kept]
        assert read(store, kept) == content(1).body
