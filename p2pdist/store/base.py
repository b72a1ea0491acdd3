# SPDX-License-Identifier: Apache-2.0
"""The store without its medium: the index, who reads what, room and eviction.

Owns: which blobs there are, how many handles are open on each, when each was last used, and the rule that
nothing with an open handle is evicted. Refuses: to know where bytes live; `DiskStore` and
`MemoryStore` say that by the underscored methods at the end.

Threads: any method may be called from any thread. `_lock` guards the index and the names of the files, and
is held only for short system calls (open, rename, unlink of a sidecar), never for the reading, writing,
syncing or deleting of a blob's bytes. `on_evicted` is called in the thread that needed the room, without the lock.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import structlog

from p2pdist.core.chunkmap import ChunkMap
from p2pdist.core.types import Home, Repository, parse_digest
from p2pdist.core.verify import checksum_of, digest_like
from p2pdist.errors import IntegrityError, StoreError, StoreFullError
from p2pdist.store.checks import Checks, Record, Tally
from p2pdist.store.eviction import oldest, plan_eviction
from p2pdist.store.files import translated
from p2pdist.store.handles import ArrivingBlob, Keeper, OpenBlob
from p2pdist.store.journal import recheck
from p2pdist.store.sidecar import Sidecar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from p2pdist.core.types import Checksum, Digest
    from p2pdist.ports import PartialBlob, StoredBlob
    from p2pdist.store.eviction import Limits
    from p2pdist.store.handles import Notes

Result = TypeVar("Result")

_log = structlog.get_logger()

DAMAGED = "stored blob is damaged; dropped, and fetched again when asked for"
"""The event of the log."""
_SAVE_USE_EVERY_S = 60.0
"""A blob's last use is written at most this often: it only has to survive a restart roughly."""
_TICK_S = 1e-6
"""Two uses never have the same time, so that their order is known."""


@dataclass(slots=True, eq=False)
class Entry:
    """One blob in the index; guarded by the store's lock."""

    digest: Digest
    size_bytes: int
    last_used_s: float
    whole: bool
    public: bool = False
    home: str = ""
    handles: int = 0
    use_saved_s: float = 0.0
    checked: Record = field(default_factory=Record)


@dataclass(frozen=True, slots=True)
class Arrival:
    """The medium of a partial blob: a preallocated file and what is noted of its chunks."""

    fd: int
    notes: Notes
    noted: dict[int, Checksum]


class BaseStore(ABC):
    """A `ChunkStore` over a medium.

    Args:
        now: wall-clock seconds; only their order and the distance to a file's mtime matter.
        on_evicted: told of each whole blob that is gone without a `remove`; must not block.
    """

    def __init__(self, limits: Limits, now: Callable[[], float], on_evicted: Callable[[Digest], None] | None) -> None:
        self._limits = limits
        self._now = now
        self._on_evicted = on_evicted or (lambda _digest: None)
        self._lock = threading.Lock()
        self._whole: dict[Digest, Entry] = {}
        self._partial: dict[Digest, Entry] = {}
        self._latest_use_s = 0.0
        self._evicted_blobs = 0
        self._evicted_bytes = 0
        self._tally = Tally()

    def limit(self, limits: Limits) -> None:
        """Take other limits; the next arrival is what evicts for them."""
        self._limits = limits

    def contains(self, digest: Digest) -> bool:
        return digest in self._whole

    def digests(self, *, public_only: bool = False) -> Iterator[Digest]:
        with self._lock:
            chosen = [entry for entry in self._whole.values() if entry.public or not public_only]
        chosen.sort(key=lambda entry: entry.last_used_s, reverse=True)
        return (entry.digest for entry in chosen)

    def home(self, digest: Digest) -> Home | None:
        entry = self._whole.get(digest)
        return None if entry is None else Home(Repository.of(entry.home) if entry.home else None, entry.public)

    def statistics(self) -> dict[str, int]:
        """Return what the port promises, and more to measure by; partial blobs count as evicted too."""
        with self._lock:
            return {
                "blobs": len(self._whole),
                "bytes": sum(entry.size_bytes for entry in self._whole.values()),
                "partial_blobs": len(self._partial),
                "partial_bytes": sum(entry.size_bytes for entry in self._partial.values()),
                "evicted_blobs": self._evicted_blobs,
                "evicted_bytes": self._evicted_bytes,
                "checked_bytes": self._tally.checked_bytes,
                "damaged_blobs": self._tally.damaged_blobs,
            }

    def open(self, digest: Digest) -> StoredBlob | None:
        """Return the blob open for reading, or None where it is not here whole; a damaged one is dropped.

        Raises:
            StoreError: it is here but cannot be read now, for example for want of descriptors.
        """
        return self._open(digest, self._touch)

    def inspect(self, digest: Digest) -> StoredBlob | None:
        """Return what `open` does, without its being a use. Raises StoreError."""
        return self._open(digest, lambda _entry: None)

    def _open(self, digest: Digest, used: Callable[[Entry], None]) -> StoredBlob | None:
        with self._lock:
            entry = self._whole.get(digest)
            if entry is None:
                return None
            opened = self._open_whole(digest)
            if not isinstance(opened, str):
                used(entry)
                return self._opened(entry, opened[1], opened[0], used)
        self._damaged(entry, opened)
        return None

    def _opened(self, entry: Entry, sidecar: Sidecar, fd: int, used: Callable[[Entry], None]) -> OpenBlob:
        """Return the blob open on this descriptor; with the lock held."""
        entry.handles += 1
        checks = Checks(
            entry.checked,
            self._tally,
            self._now,
            functools.partial(self._damaged, entry),
            functools.partial(self._found_whole, entry),
        )
        return OpenBlob(entry.digest, sidecar, fd, checks, functools.partial(self._release, entry, used))

    def unchecked(self, within_s: float) -> list[Digest]:
        """Return the blobs not checked as a whole within so long, as the clock has it, longest ago first."""
        now_s = self._now()
        with self._lock:
            due = [entry for entry in self._whole.values() if not 0 <= now_s - entry.checked.whole_s < within_s]
        return [entry.digest for entry in sorted(due, key=lambda entry: entry.checked.whole_s)]

    def _found_whole(self, entry: Entry) -> None:
        with self._lock:
            entry.checked.whole_s = self._now()
            if self._whole.get(entry.digest) is entry:
                self._save_check(entry)

    def _damaged(self, entry: Entry, why: str) -> None:
        """Serve a blob no more; where its files stay, because the disk takes no changes, the next start finds them."""
        with self._lock:
            if self._whole.get(entry.digest) is not entry:
                return
            del self._whole[entry.digest]
            self._tally.damaged_blobs += 1
            _log.warning(
                "stored blob is damaged; dropped, and fetched again when asked for", blob=entry.digest, why=why
            )
            self._try_to(self._detach, entry)
        self._report_gone([entry])

    def start(self, digest: Digest, size_bytes: int, chunk_bytes: int, owner: str = "") -> PartialBlob:
        """As the port says. A blob that is here whole may arrive again; its commit replaces it, and it stays public.

        Raises:
            ValueError: it is arriving already, or the sizes are impossible.
        """
        if size_bytes < 0 or chunk_bytes <= 0:
            raise ValueError(f"no such cut: {size_bytes} bytes by {chunk_bytes}")
        entry = self._claim(parse_digest(digest))
        try:
            resumed = self._resume(entry, size_bytes, chunk_bytes, owner)
            return resumed or self._begin(entry, size_bytes, chunk_bytes, owner)
        except BaseException:
            self._leave(entry)
            raise

    def add(self, digest: Digest, body: bytes, *, media_type: str, public: bool, home: str = "") -> None:
        """As the port says; synced to disk, so better run in a thread. Once public, a blob stays public."""
        actual = digest_like(parse_digest(digest), body)
        if digest != actual:
            raise IntegrityError(f"{digest} does not match its content", expected=digest, actual=actual)
        with self._lock:
            known = self._whole.get(digest)
            if known is not None and known.public >= public:
                self._touch(known)
                return
        cut = ChunkMap.of(len(body))
        spans = ((cut.start(index), cut.length(index)) for index in range(cut.count))
        checksums = tuple(checksum_of(memoryview(body)[start : start + length]) for start, length in spans)
        sidecar = Sidecar(len(body), media_type, public, cut.chunk_bytes, checksums, home)
        entry = Entry(digest, len(body), 0.0, whole=True, public=public, home=home)
        self._make_room(digest, len(body))
        self._with_room(
            len(body), lambda: self._put(digest, body, sidecar, functools.partial(self._admit, entry, cut.count))
        )

    def remove(self, digest: Digest) -> None:
        """Delete a stored blob at once; those who read it keep their descriptors. No error if it is not here."""
        with self._lock:
            if (entry := self._whole.get(digest)) is not None:
                self._drop(entry)
        self._sweep()

    # Arriving blobs

    def _claim(self, digest: Digest) -> Entry:
        """Return the entry of a partial blob, marked open, so that nobody else opens or evicts it."""
        with self._lock:
            entry = self._partial.setdefault(digest, Entry(digest, 0, 0.0, whole=False))
            if entry.handles:
                raise ValueError(f"{digest} is arriving already")
            entry.handles = 1
            return entry

    def _resume(self, entry: Entry, size_bytes: int, chunk_bytes: int, owner: str) -> PartialBlob | None:
        """Return what an earlier run left of the blob; None where that was nothing, another cut or owner."""
        if entry.size_bytes != size_bytes or not size_bytes:
            return None
        cut = ChunkMap(size_bytes, chunk_bytes)
        arrival = self._reopen(entry.digest, cut, owner)
        return None if arrival is None else self._hand_out(entry, cut, arrival)

    def _begin(self, entry: Entry, size_bytes: int, chunk_bytes: int, owner: str) -> PartialBlob:
        with self._lock:
            self._detach(entry)
            entry.size_bytes = 0
        self._sweep()
        self._make_room(entry.digest, size_bytes, entry)
        cut = ChunkMap(size_bytes, chunk_bytes)
        try:
            arrival = self._with_room(size_bytes, lambda: self._create(entry.digest, cut, owner))
        except BaseException:
            entry.size_bytes = 0
            raise
        return self._hand_out(entry, cut, arrival)

    def _hand_out(self, entry: Entry, cut: ChunkMap, arrival: Arrival) -> PartialBlob:
        have = recheck(arrival.fd, cut, arrival.noted)
        for index in arrival.noted.keys() - have.keys():
            with contextlib.suppress(OSError):  # then the next start checks it again
                arrival.notes.forget(index)
        keeper = Keeper(
            functools.partial(self._commit, entry),
            functools.partial(self._leave, entry),
            functools.partial(self._discard, entry),
        )
        return ArrivingBlob(entry.digest, cut, arrival.fd, arrival.notes, have, keeper)

    def _commit(self, entry: Entry, fd: int, sidecar: Sidecar) -> StoredBlob:
        if (known := self._whole.get(entry.digest)) is not None and known.public:
            sidecar = replace(sidecar, public=True, home=sidecar.home if sidecar.public else known.home)
        entry.public, entry.home = sidecar.public, sidecar.home
        with translated(f"open {entry.digest}"):
            reader = os.dup(fd)
        admit = functools.partial(self._admit, entry, len(sidecar.checksums))
        try:
            self._with_room(1, lambda: self._place(entry.digest, sidecar, admit))
        except BaseException:
            os.close(reader)
            raise
        with self._lock:
            return self._opened(entry, sidecar, reader, self._touch)

    def _admit(self, entry: Entry, chunks: int) -> None:
        """Make the blob servable; with the lock held, in the instant when its files have their names."""
        entry.checked.whole_s = self._now()
        entry.checked.note((1 << chunks) - 1, entry.checked.whole_s)
        if self._partial.get(entry.digest) is entry:
            del self._partial[entry.digest]
        entry.whole = True
        self._whole[entry.digest] = entry
        self._touch(entry)

    def _leave(self, entry: Entry) -> None:
        with self._lock:
            entry.handles -= 1
            self._touch(entry)
            if not entry.whole and not entry.size_bytes:
                self._try_to(self._drop, entry)
        self._sweep()

    def _discard(self, entry: Entry) -> None:
        if entry.whole:
            self._release(entry, self._touch)
            return
        with self._lock:
            entry.handles = 0
            self._try_to(self._drop, entry)
        self._sweep()

    def _release(self, entry: Entry, used: Callable[[Entry], None]) -> None:
        with self._lock:
            entry.handles -= 1
            used(entry)

    def _touch(self, entry: Entry) -> None:
        entry.last_used_s = self._latest_use_s = max(self._now(), self._latest_use_s + _TICK_S)
        if entry.whole and entry.last_used_s - entry.use_saved_s >= _SAVE_USE_EVERY_S:
            entry.use_saved_s = entry.last_used_s
            self._save_use(entry)

    # Room

    def _make_room(self, digest: Digest, size_bytes: int, claim: Entry | None = None) -> None:
        """Evict until `size_bytes` more fit, and reserve them for `claim`. Raises StoreFullError."""
        free_bytes = self._free_bytes()
        with self._lock:
            used_bytes = sum(entry.size_bytes for entry in (*self._whole.values(), *self._partial.values()))
            victims = plan_eviction(
                self._idle(), self._limits, used_bytes=used_bytes, incoming_bytes=size_bytes, free_bytes=free_bytes
            )
            if victims is None:
                raise StoreFullError(
                    f"no room for {digest} ({_size(size_bytes)}): the store holds {_size(used_bytes)} of at most "
                    f"{_size(self._limits.max_bytes)}, the disk has {_size(free_bytes)} free, of which "
                    f"{_size(self._limits.min_free_bytes)} stay free; raise `store_max` or free disk space"
                )
            gone = self._evict(victims)
            if claim:
                claim.size_bytes = size_bytes
        self._report_gone(gone)

    def _with_room(self, size_bytes: int, action: Callable[[], Result]) -> Result:
        """Run `action`; where the disk proves full, evict `size_bytes` and run it once more."""
        try:
            return action()
        except StoreFullError:
            with self._lock:
                gone = self._evict(oldest(self._idle(), size_bytes))
            self._report_gone(gone)
            if not gone:
                raise
        return action()

    def _idle(self) -> list[Entry]:
        return [entry for entry in (*self._whole.values(), *self._partial.values()) if not entry.handles]

    def _evict(self, victims: list[Entry]) -> list[Entry]:
        """Return those that could be dropped; what their room was for fails of itself where the disk does."""
        gone = [entry for entry in victims if self._try_to(self._drop, entry)]
        self._evicted_blobs += len(gone)
        self._evicted_bytes += sum(entry.size_bytes for entry in gone)
        return gone

    def _try_to(self, delete: Callable[[Entry], None], entry: Entry) -> bool:
        """Return whether a blob's files could be deleted; where not, the next start tries again."""
        try:
            delete(entry)
        except StoreError as error:
            _log.error("files of the store stay where they are", blob=entry.digest, why=str(error))
            return False
        return True

    def _drop(self, entry: Entry) -> None:
        """Take a blob out of the index and its files off their names; with the lock held."""
        self._detach(entry)
        home = self._whole if entry.whole else self._partial
        if home.get(entry.digest) is entry:
            del home[entry.digest]

    def _report_gone(self, gone: list[Entry]) -> None:
        self._sweep()
        for entry in gone:
            if entry.whole:
                self._on_evicted(entry.digest)

    # The medium

    @abstractmethod
    def close(self) -> None:
        """Give up the medium."""

    @abstractmethod
    def probe(self) -> None:
        """As the port says."""

    @abstractmethod
    def _free_bytes(self) -> int:
        """Return what the medium has free."""

    @abstractmethod
    def _open_whole(self, digest: Digest) -> tuple[int, Sidecar] | str:
        """Return a new descriptor and the metadata, or how the blob is damaged. Called with the lock held."""

    @abstractmethod
    def _create(self, digest: Digest, cut: ChunkMap, owner: str) -> Arrival:
        """Preallocate a partial blob; what an error leaves, `_detach` deletes. Raises StoreError, StoreFullError."""

    @abstractmethod
    def _reopen(self, digest: Digest, cut: ChunkMap, owner: str) -> Arrival | None:
        """Open a partial blob that was left, or return None where it is damaged, another's or cut otherwise."""

    @abstractmethod
    def _place(self, digest: Digest, sidecar: Sidecar, admit: Callable[[], None]) -> None:
        """Make a synced partial blob a whole one; call `admit` with the lock held once it may be served.

        Raises StoreError and StoreFullError before `admit`, nothing after it.
        """

    @abstractmethod
    def _put(self, digest: Digest, body: bytes, sidecar: Sidecar, admit: Callable[[], None]) -> None:
        """Store a small blob, as `_place`."""

    @abstractmethod
    def _detach(self, entry: Entry) -> None:
        """Take the blob's files off their names, if there are any. Called with the lock held."""

    @abstractmethod
    def _sweep(self) -> None:
        """Delete what was detached."""

    @abstractmethod
    def _save_use(self, entry: Entry) -> None:
        """Remember `last_used_s` across a restart; failures do not matter. Called with the lock held."""

    @abstractmethod
    def _save_check(self, entry: Entry) -> None:
        """Remember `checked.whole_s` likewise."""


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB" if size_bytes >= 2**20 else f"{size_bytes} bytes"
