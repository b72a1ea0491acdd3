# SPDX-License-Identifier: Apache-2.0
"""The node's store: blobs as files below one data directory (see layout.py).

Owns: the directory's lock, and the order of writes that keeps a kill or a power cut at any instant from
leaving anything but a resumable partial blob or a whole one: bytes synced, sidecar synced and named, blob named,
directories synced, journal dropped. What a start makes of the rest is in recovery.py. A committed blob
is not hashed again when it is opened or found.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import time
from typing import TYPE_CHECKING

import structlog

from p2pdist.errors import StoreError
from p2pdist.store.base import Arrival, BaseStore
from p2pdist.store.eviction import Limits
from p2pdist.store.files import (
    create,
    read_file,
    store_error,
    sync_directory,
    translated,
    write_durably,
)
from p2pdist.store.journal import Journal
from p2pdist.store.layout import Layout
from p2pdist.store.recovery import recover
from p2pdist.store.sidecar import Sidecar, decode, encode

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from p2pdist.core.chunkmap import ChunkMap
    from p2pdist.core.types import Digest
    from p2pdist.store.base import Entry

PARTIAL_TTL_S = 24 * 3600.0
"""A pull that nobody has taken up for a day is not coming back."""

_PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EPERM}
"""What keeps a file from being opened without its being damaged."""

_log = structlog.get_logger()


class DiskStore(BaseStore):
    """A `ChunkStore` in a directory.

    Args:
        data_dir: made if it is not there; other files in it are left alone.
        max_bytes, low_bytes, min_free_bytes: see `Limits`.
        partial_ttl_s: partial blobs that nobody has written to for so long are dropped at the start.
        now: wall-clock seconds, comparable to the mtimes of files.
        on_evicted: see `BaseStore`.

    Raises:
        StoreError: the directory cannot be used, or another agent uses it.
        ValueError: the limits contradict each other.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        max_bytes: int,
        low_bytes: int,
        min_free_bytes: int,
        partial_ttl_s: float = PARTIAL_TTL_S,
        now: Callable[[], float] = time.time,
        on_evicted: Callable[[Digest], None] | None = None,
    ) -> None:
        super().__init__(Limits(max_bytes, low_bytes, min_free_bytes), now, on_evicted)
        self._layout = Layout(str(data_dir))
        self._doomed: list[str] = []
        self._serial = itertools.count()
        with translated(f"use the data directory {data_dir}"):
            self._make_directories()
            self._lock_fd = _lock_directory(self._layout)
            try:
                whole, partial = recover(self._layout, now(), partial_ttl_s)
            except BaseException:
                os.close(self._lock_fd)
                raise
        self._whole = {entry.digest: entry for entry in whole}
        self._partial = {entry.digest: entry for entry in partial}
        self._latest_use_s = max((entry.last_used_s for entry in (*whole, *partial)), default=0.0)

    def _make_directories(self) -> None:
        for directory in (*self._layout.roots.values(), self._layout.partials, self._layout.scratch):
            os.makedirs(directory, mode=0o700, exist_ok=True)

    def close(self) -> None:
        """Give up the directory's lock; idempotent. Close all blobs first: another agent may take over at once."""
        fd, self._lock_fd = self._lock_fd, -1
        if fd < 0:
            return
        with self._lock:
            for entry in self._whole.values():
                if entry.last_used_s > entry.use_saved_s:
                    self._save_use(entry)
        os.close(fd)

    def probe(self) -> None:
        path = self._scratch_path()
        with translated(f"write to the data directory {self._layout.root}"):
            write_durably(path, b"probe")
            os.unlink(path)

    def _free_bytes(self) -> int:
        with translated(f"measure the free space of {self._layout.root}"):
            if not (os.path.isdir(self._layout.scratch) and os.path.isdir(self._layout.partials)):
                self._make_directories()  # somebody emptied the directory to make room
            disk = os.statvfs(self._layout.root)
        return disk.f_bavail * disk.f_frsize

    def _open_whole(self, digest: Digest) -> tuple[int, Sidecar] | str:
        fd = -1
        try:
            fd = os.open(self._layout.blob(digest), os.O_RDONLY | os.O_CLOEXEC)
            sidecar = decode(read_file(self._layout.meta(digest)))
            if os.fstat(fd).st_size != sidecar.size_bytes:
                raise ValueError("its size is not the one noted")
        except (OSError, ValueError) as error:
            if fd >= 0:
                os.close(fd)
            if isinstance(error, OSError) and error.errno in _PASSING:
                raise store_error(error, f"open {digest}") from error
            return str(error)
        return fd, sidecar

    def _create(self, digest: Digest, cut: ChunkMap, owner: str) -> Arrival:
        with translated(f"make room for {digest} in {self._layout.root}"):
            journal = Journal.create(self._layout.journal(digest), cut, owner)
            with journal.closed_on_error():
                fd = create(self._layout.partial(digest), cut.size_bytes)
        return Arrival(fd, journal, {})

    def _reopen(self, digest: Digest, cut: ChunkMap, owner: str) -> Arrival | None:
        try:
            journal = Journal.reopen(self._layout.journal(digest), cut, owner)
            if journal is None:
                return None
            with journal.closed_on_error():
                noted = journal.noted(cut)
                fd = os.open(self._layout.partial(digest), os.O_RDWR | os.O_CLOEXEC)
            return Arrival(fd, journal, noted)
        except OSError as error:
            if error.errno in _PASSING:
                raise store_error(error, f"resume {digest}") from error
            _log.warning("a partial blob cannot be read; it begins anew", blob=digest, why=str(error))
            return None

    def _place(self, digest: Digest, sidecar: Sidecar, admit: Callable[[], None]) -> None:
        self._name(digest, self._layout.partial(digest), sidecar, admit)
        self._sync_directories(self._layout.partials, self._layout.shard(digest))
        _unlink_quietly(self._layout.journal(digest))

    def _put(self, digest: Digest, body: bytes, sidecar: Sidecar, admit: Callable[[], None]) -> None:
        path = self._scratch_path()
        with translated(f"store {digest}"):
            write_durably(path, body)
        try:
            self._name(digest, path, sidecar, admit)
        finally:
            _unlink_quietly(path)
        self._sync_directories(self._layout.shard(digest))

    def _name(self, digest: Digest, source: str, sidecar: Sidecar, admit: Callable[[], None]) -> None:
        """Give the synced file `source` and its sidecar their names among the blobs."""
        meta = self._scratch_path()
        with translated(f"store {digest}"):
            if not os.path.isdir(self._layout.shard(digest)):
                os.makedirs(self._layout.shard(digest), mode=0o700, exist_ok=True)
                sync_directory(os.path.dirname(self._layout.shard(digest)))
            write_durably(meta, encode(sidecar))
            try:
                with self._lock:
                    os.rename(meta, self._layout.meta(digest))
                    os.rename(source, self._layout.blob(digest))
                    admit()
            finally:
                _unlink_quietly(meta)

    def _sync_directories(self, *directories: str) -> None:
        """Wait for the names; where that fails the blob is still whole, and a power cut only means another fetch."""
        try:
            for directory in directories:
                sync_directory(directory)
        except OSError as error:
            _log.warning("a stored blob may not survive a power cut", directory=directory, why=str(error))

    def _detach(self, entry: Entry) -> None:
        layout, digest = self._layout, entry.digest
        data, companion = (
            (layout.blob(digest), layout.meta(digest))
            if entry.whole
            else (layout.partial(digest), layout.journal(digest))
        )
        with translated(f"delete {digest}"):
            doomed = self._scratch_path()
            with contextlib.suppress(FileNotFoundError):
                os.rename(data, doomed)
                self._doomed.append(doomed)
        _unlink_quietly(companion)

    def _sweep(self) -> None:
        while True:
            try:
                doomed = self._doomed.pop()
            except IndexError:
                return
            _unlink_quietly(doomed)

    def _save_use(self, entry: Entry) -> None:
        with contextlib.suppress(OSError):
            os.utime(self._layout.meta(entry.digest), (entry.last_used_s, entry.last_used_s))

    def _save_check(self, entry: Entry) -> None:
        with contextlib.suppress(OSError):
            os.utime(self._layout.blob(entry.digest), (entry.checked.whole_s, entry.checked.whole_s))

    def _scratch_path(self) -> str:
        return f"{self._layout.scratch}/{next(self._serial)}"


def _unlink_quietly(path: str) -> None:
    """Delete what the next start would delete anyway."""
    with contextlib.suppress(OSError):
        os.unlink(path)


def _lock_directory(layout: Layout) -> int:
    """Return the descriptor that holds the directory's lock.

    Raises:
        StoreError: another process holds it.
        OSError: the file system has no locks, or refuses.
    """
    fd = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as error:
        holder = os.pread(fd, 20, 0).decode(errors="replace").strip()
        os.close(fd)
        raise StoreError(
            f"the data directory {layout.root} is in use by another agent (process {holder or 'unknown'}); "
            "stop that one, or give this one another with --data-dir"
        ) from error
    except BaseException:
        os.close(fd)
        raise
    return fd
