# SPDX-License-Identifier: Apache-2.0
"""What the store hands out: a whole blob open for reading, and a blob that is arriving.

Both work on a descriptor and know nothing of names, directories or eviction; the store that made them
is told by callbacks. An arriving blob keeps these promises:

- a chunk is in `have()` only after its bytes and its journal slot are written;
- the SHA-256 runs over bytes read back from the file, so `verified` speaks of what will be served.

Threads: `write_chunk`, `reject`, `have` and `verified` belong to the owner's thread; `hash_prefix` and `commit`
may run in one worker thread meanwhile. A written chunk is published by one dict assignment, after its bytes, so
the hasher meets either nothing or all of it. `reject` puts a fresh SHA-256 in the place of the old
one; a hasher in the middle of a step sees that its own is no longer the blob's, and drops that step's result.
`close` and `discard` wait for the running step (1 MiB, under 1 ms) or commit, so that the
descriptor's number is never used after another file has got it.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from p2pdist.core.chunkmap import ChunkMap
from p2pdist.core.verify import checksum_of, hash_like
from p2pdist.errors import IntegrityError
from p2pdist.store.files import read_all, store_error, translated, write_all
from p2pdist.store.sidecar import Sidecar

if TYPE_CHECKING:
    from collections.abc import Callable

    from p2pdist.core.types import Checksum, Digest
    from p2pdist.ports import StoredBlob
    from p2pdist.store.checks import Checks

HASH_STEP_BYTES = 1 << 20
"""One read; between two of them another thread may close or reject."""


class OpenBlob:
    """A `StoredBlob`: owns one descriptor until `close`."""

    def __init__(self, digest: Digest, sidecar: Sidecar, fd: int, checks: Checks, release: Callable[[], None]) -> None:
        self.digest = digest
        self.size_bytes = sidecar.size_bytes
        self.media_type = sidecar.media_type
        self.public = sidecar.public
        self.chunk_bytes = sidecar.chunk_bytes
        self.checksums = sidecar.checksums
        self._fd = fd
        self._checks = checks
        self._release = release

    @property
    def right(self) -> int:
        return self._checks.right

    def fileno(self) -> int:
        if self._fd < 0:
            raise ValueError(f"{self.digest} is closed")
        return self._fd

    def read(self, start: int, stop: int) -> bytes:
        if not 0 <= start <= stop <= self.size_bytes:
            raise ValueError(f"bytes [{start}, {stop}) of a blob of {self.size_bytes}")
        with translated(f"read {self.digest}"):
            return read_all(self.fileno(), start, stop)

    def check(self, index: int, *, on_disk: bool = False) -> None:
        if self.right >> index & 1 and not on_disk:
            return
        cut = ChunkMap(self.size_bytes, self.chunk_bytes)
        start, size_bytes = cut.start(index), cut.length(index)
        if on_disk:
            os.posix_fadvise(self.fileno(), start, size_bytes, os.POSIX_FADV_DONTNEED)
        try:
            right = checksum_of(read_all(self.fileno(), start, start + size_bytes)) == self.checksums[index]
            why = f"chunk {index} is not what was stored"
        except OSError as error:
            right, why = False, f"chunk {index} cannot be read: {error.strerror}"
        if on_disk:  # what nobody asked for takes nobody's place in memory
            os.posix_fadvise(self.fileno(), start, size_bytes, os.POSIX_FADV_DONTNEED)
        if not right:
            self._checks.damaged(why)
            raise IntegrityError(f"{self.digest} is damaged on this node's disk: {why}; it is fetched again")
        self._checks.passed(index, size_bytes)

    def found_whole(self) -> None:
        self._checks.whole()

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
            self._release()


class Notes(Protocol):
    """Where an arriving blob notes its chunks, for a resume: the disk's journal or the memory's dict."""

    def note(self, index: int, checksum: Checksum) -> None: ...
    def forget(self, index: int) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Keeper:
    """What the store does for one arriving blob.

    Args:
        install: makes the verified blob, by its descriptor, a stored one, and returns it open.
        leave: the handle is closed; keep what there is.
        discard: the handle is closed; delete what there is, unless it was installed.
    """

    install: Callable[[int, Sidecar], StoredBlob]
    leave: Callable[[], None]
    discard: Callable[[], None]


class ArrivingBlob:
    """A `PartialBlob` on a preallocated file; owns the descriptor and the notes until it is closed."""

    def __init__(
        self, digest: Digest, cut: ChunkMap, fd: int, notes: Notes, have: dict[int, Checksum], keeper: Keeper
    ) -> None:
        self.digest = digest
        self.size_bytes = cut.size_bytes
        self.chunk_bytes = cut.chunk_bytes
        self._cut = cut
        self._fd = fd
        self._notes = notes
        self._have = have
        self._keeper = keeper
        self._using_fd = threading.Lock()
        self._hash_state = threading.Lock()
        self._committed = False
        self._start_hash()

    def have(self) -> dict[int, Checksum]:
        return dict(self._have)

    def fileno(self) -> int:
        if self._fd < 0:
            raise ValueError(f"{self.digest} is closed")
        return self._fd

    def write_chunk(self, index: int, data: bytes | bytearray | memoryview, checksum: Checksum) -> None:
        """Write a chunk. One that is here with the same checksum is left as it is.

        Raises:
            ValueError: no such chunk, not its size, or it is here with another checksum: reject that first.
        """
        if not 0 <= index < self._cut.count or len(data) != self._cut.length(index):
            raise ValueError(f"{len(data)} bytes as chunk {index} of {self._cut.count} of {self.digest}")
        if (noted := self._have.get(index)) is not None:
            if noted != checksum:
                raise ValueError(f"chunk {index} of {self.digest} is here with another checksum")
            return
        try:
            write_all(self.fileno(), data, index * self.chunk_bytes)
            self._notes.note(index, checksum)
        except OSError as error:
            raise store_error(error, f"write chunk {index} of {self.digest}") from error
        self._have[index] = checksum

    def hash_prefix(self) -> None:
        with translated(f"read back {self.digest}"):
            while self._hash_step():
                pass

    @property
    def verified(self) -> bool:
        return self._verified

    def reject(self, indices: list[int]) -> None:
        if self._committed:
            raise ValueError(f"{self.digest} is committed")
        with self._hash_state:
            for index in indices:
                self._have.pop(index, None)
            self._start_hash()
        with translated(f"forget chunks of {self.digest}"):
            for index in indices:
                self._notes.forget(index)

    def commit(self, *, media_type: str = "", public: bool, home: str = "") -> StoredBlob:
        have = self.have()
        if self._committed or len(have) != self._cut.count:
            raise ValueError(f"{self.digest} is committed, or lacks some of its {self._cut.count} chunks")
        self.hash_prefix()
        if not self._verified:
            raise IntegrityError(
                f"{self.digest} is complete, but its content has another digest; some chunk is wrong",
                expected=self.digest,
                actual=self._actual(),
            )
        checksums = tuple(have[index] for index in range(self._cut.count))
        with self._using_fd:
            self._sync()
            sidecar = Sidecar(self.size_bytes, media_type, public, self.chunk_bytes, checksums, home)
            stored = self._keeper.install(self.fileno(), sidecar)
            self._committed = True
        return stored

    def close(self) -> None:
        if self._close_files():
            self._keeper.leave()

    def discard(self) -> None:
        """Close the file and delete it; a committed blob stays stored."""
        if self._close_files():
            self._keeper.discard()

    def _sync(self) -> None:
        """Wait until the bytes are on the disk.

        After a failed fsync the kernel takes the pages for clean, and a second one would say that all is well: so all
        chunks are forgotten and have to be written anew.
        """
        try:
            os.fsync(self.fileno())
        except OSError as error:
            self.reject(list(self._have))
            raise store_error(error, f"write {self.digest} to the disk") from error

    def _close_files(self) -> bool:
        with self._using_fd:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)
                self._notes.close()
        return fd >= 0

    def _start_hash(self) -> None:
        self._sha = hash_like(self.digest)
        self._hashed_bytes = 0
        self._verified = self.size_bytes == 0 and self._is_right()

    def _is_right(self) -> bool:
        return self.digest == self._actual()

    def _actual(self) -> str:
        return f"{self._sha.name}:{self._sha.hexdigest()}"

    def _hash_step(self) -> bool:
        """Hash the next span, if its chunks are here; return whether it is worth calling again."""
        with self._using_fd:
            with self._hash_state:
                sha, start = self._sha, self._hashed_bytes
                stop = self._prefix_stop(start)
            if start == stop or self._fd < 0:
                return False
            sha.update(read_all(self._fd, start, stop))
            with self._hash_state:
                if sha is self._sha:
                    self._hashed_bytes = stop
                    self._verified = stop == self.size_bytes and self._is_right()
        return True

    def _prefix_stop(self, start: int) -> int:
        """Return where the unbroken run of chunks from byte `start` ends, at most one step on."""
        stop, index = start, start // self.chunk_bytes
        while stop < start + HASH_STEP_BYTES and index in self._have:
            stop = min((index + 1) * self.chunk_bytes, self.size_bytes)
            index += 1
        return min(stop, start + HASH_STEP_BYTES)
