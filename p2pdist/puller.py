# SPDX-License-Identifier: Apache-2.0
"""Pulls blobs and manifests for the mirror: store first, then the swarm and the origin.

The content side of the exchange: it keeps the blobs that arrive, writes and reads chunks, fetches from
the origin when a lease says so, compares the SHA-256, commits. It sees the store and the origin only
as ports.

Invariants: each blob has at most one Arrival; nothing is committed that does not match its digest;
every Arrival ends settled.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import TYPE_CHECKING

import structlog
import trio

from p2pdist.arrival import Arrival, ArrivalReader, StoredReader
from p2pdist.core import events as ev
from p2pdist.core.chunkmap import ChunkMap, chunk_set
from p2pdist.core.oci import MANIFEST_BYTES_MAX, media_type_of
from p2pdist.core.types import Home, Manifest, Split
from p2pdist.core.verify import checksum_of
from p2pdist.errors import (
    DeniedByOrigin,
    IntegrityError,
    InvalidInput,
    NotFoundAtOrigin,
    OriginError,
    P2PDistError,
    PeerUnavailable,
    PullFailed,
    StoreError,
    TransferTimeout,
)
from p2pdist.fetching import Run, RunReader
from p2pdist.recheck import Recheck
from p2pdist.seeder import Seeder

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from p2pdist.core.types import Checksum, Descriptor, Digest, Repository
    from p2pdist.exchange import Exchange
    from p2pdist.ports import BlobReader, ChunkStore, Origin, Sharing, StoredBlob

log = structlog.get_logger(__name__)

MANIFEST_S = 10.0
"""For a manifest by digest from anywhere: a runtime waits."""
SOURCE_S = 1.5
"""A blob that a manifest named is promised to the runtime after so long even if no byte is here yet."""
UNNAMED_SOURCE_S = 10.0
"""For others, some source must have shown that it has the blob by then."""
HASH_BATCH_BYTES = 4 * 1024 * 1024
"""The prefix is hashed in a worker thread whenever it has grown by so much: a hop costs about 0.1 ms."""
MAX_ARRIVALS = 512
MAX_SPLITS = 2000


class Puller:
    """Everything that is on its way."""

    def __init__(
        self,
        store: ChunkStore,
        origin: Origin,
        exchange: Exchange,
        nursery: trio.Nursery,
        *,
        sharing: Sharing,
    ) -> None:
        self.arrivals: dict[Digest, Arrival] = {}
        self.finished: Callable[[Arrival], None] = lambda _arrival: None
        self._store = store
        self._origin = origin
        self._exchange = exchange
        self._nursery = nursery
        self._sharing = sharing
        self._splits: OrderedDict[Digest, Split] = OrderedDict()
        self._runs = RunReader(origin, exchange)
        self._recheck = Recheck(origin, exchange, self)
        exchange.seeder = Seeder(store, exchange, nursery, self.arrivals, sharing=sharing)

    # ------------------------------------------------------------ for the mirror

    async def manifest(self, repository: Repository, digest: Digest) -> Manifest:
        """Return a manifest by digest from store, swarm or origin, whichever has it.

        Raises:
            OriginError, PullFailed, StoreError, IntegrityError.
        """
        stored = self._read_manifest(digest)
        if stored is not None:
            return stored
        arrival = self.arrivals.get(digest)
        if arrival is None:
            arrival = self._register(repository, digest)
            self._begin(arrival, None)
        with trio.move_on_after(MANIFEST_S):
            await arrival.settled.wait()
        if arrival.failure is not None:
            raise _plain(arrival.failure)
        found = self._read_manifest(digest)
        if found is None:
            progress = self._exchange.machine.blobs.get(digest)
            causes = progress.causes if progress is not None else []
            raise PullFailed(digest, causes or [TransferTimeout(f"no source gave it within {MANIFEST_S:.0f} s")])
        return found

    def _read_manifest(self, digest: Digest) -> Manifest | None:
        blob = self._store.open(digest)
        if blob is None:
            return None
        try:
            if blob.size_bytes > MANIFEST_BYTES_MAX:
                raise InvalidInput(f"{digest} has {blob.size_bytes} bytes: that is no manifest")
            for index in range(len(blob.checksums)):
                blob.check(index)
            return Manifest(digest, blob.media_type, blob.read(0, blob.size_bytes))
        except IntegrityError:
            return None
        finally:
            blob.close()

    def stored_size(self, digest: Digest) -> int | None:
        """Return the size of a blob that is stored or on its way, else None."""
        arrival = self.arrivals.get(digest)
        if arrival is not None and arrival.chunks is not None:
            return arrival.chunks.size_bytes
        blob = self._store.open(digest)
        if blob is None:
            return None
        blob.close()
        return blob.size_bytes

    def home_of(self, digest: Digest) -> Home | None:
        """Return where content that is here, or on its way, comes from."""
        arrival, stored = self.arrivals.get(digest), self._store.home(digest)
        # A blob that arrives again is served from the store meanwhile.
        return stored if arrival is None or stored is not None else Home(arrival.repository, arrival.shared)

    def split(self, digest: Digest) -> Split | None:
        """Return where a blob's bytes came from so far; what an earlier run left counts as cached.

        Nothing is said of what is not for everybody: whoever knows a digest may ask.
        """
        arrival, home = self.arrivals.get(digest), self.home_of(digest)
        if home is None or not home.shared:
            return None
        if arrival is None and home.repository is not None and not self._sharing.may_give(home.repository):
            return None
        if arrival is not None:
            return Split(arrival.from_peers, arrival.from_origin, arrival.from_earlier)
        size = self.stored_size(digest)
        return None if size is None else self._splits.get(digest, Split(from_cache=size))

    def open_stored(self, repository: Repository, digest: Digest) -> BlobReader | None:
        """Return a reader of a blob that is here whole, else None; what proves damaged is pulled. Raises StoreError."""
        stored = self._store.open(digest)
        if stored is None:
            return None
        pull = functools.partial(
            self.open_blob, repository, digest, stored.size_bytes, named=True, first_byte=lambda: None
        )
        return StoredReader(stored, pull)

    async def open_blob(
        self,
        repository: Repository,
        digest: Digest,
        size_bytes: int,
        *,
        named: bool,
        first_byte: Callable[[], None],
        anew: bool = False,
    ) -> BlobReader:
        """Return a reader of a blob, starting its pull where it is not here.

        Args:
            named: a manifest that this agent served names the blob with this size.
            anew: do not give what another registry gave: this one has to show that it has the content.

        Raises:
            OriginError, PullFailed, StoreError.
        """
        while anew and (other := self.arrivals.get(digest)) and other.repository.registry != repository.registry:
            await other.settled.wait()
        stored = None if anew else self.open_stored(repository, digest)
        if stored is not None:
            first_byte()
            return stored
        while True:
            arrival = await self.start(repository, digest, size_bytes)
            if arrival.ended and arrival.failure is None:  # committed while this task waited for its turn
                if (stored := self.open_stored(repository, digest)) is None:
                    continue
                first_byte()
                return stored
            try:
                return await self._open_arrival(arrival, named, first_byte)
            except (NotFoundAtOrigin, DeniedByOrigin):
                # Another repository's verdict, whose pull this one had joined, says nothing about this one.
                if arrival.repository == repository:
                    raise

    async def _open_arrival(self, arrival: Arrival, named: bool, first_byte: Callable[[], None]) -> BlobReader:
        """Return a reader once there is something to read, or a reason to expect it."""
        digest = arrival.digest
        if arrival.failure is not None:
            raise _plain(arrival.failure)
        if arrival.partial is None:
            raise PullFailed(digest, [InvalidInput(f"{digest} is being pulled as a manifest")])
        reader = ArrivalReader(arrival, self._exchange, first_byte)
        try:
            with trio.move_on_after(SOURCE_S if named else UNNAMED_SOURCE_S) as scope:
                while not (arrival.have or arrival.verified or arrival.failure or self._held(digest)):
                    await arrival.changed()
            if arrival.failure is not None:
                raise _plain(arrival.failure)
            if scope.cancelled_caught and not named:
                raise PullFailed(digest, [TransferTimeout(f"no source showed up in {UNNAMED_SOURCE_S:.0f} s")])
        except BaseException:
            reader.close()
            raise
        return reader

    def _held(self, digest: Digest) -> bool:
        progress = self._exchange.machine.blobs.get(digest)
        return progress is not None and progress.held != 0

    async def prefetch(self, repository: Repository, descriptors: Sequence[Descriptor]) -> None:
        """Start the pull of everything that a manifest names, in its order; problems are the later readers'."""
        for descriptor in descriptors:
            if len(self.arrivals) >= MAX_ARRIVALS:
                return
            if not self._store.contains(descriptor.digest):
                await self.start(repository, descriptor.digest, descriptor.size_bytes)

    async def start(self, repository: Repository, digest: Digest, size_bytes: int) -> Arrival:
        """Return the blob's Arrival, running or failed; begins the pull where there is none."""
        arrival = self.arrivals.get(digest)
        if arrival is None:
            arrival = self._register(repository, digest)
            # In a task of its own: the runtime that asked first may hang up, the others still want the blob.
            self._nursery.start_soon(self._open, arrival, size_bytes)
        await arrival.started.wait()
        return arrival

    async def _open(self, arrival: Arrival, size_bytes: int) -> None:
        """Give the blob a file, with what an earlier run left of it, and begin its pull."""
        cut = ChunkMap.of(size_bytes)
        try:
            whose = "" if arrival.shared else str(arrival.repository)
            partial = await trio.to_thread.run_sync(
                self._store.start, arrival.digest, size_bytes, cut.chunk_bytes, whose
            )
        except StoreError as error:
            log.error("no room for the blob", blob=arrival.digest, why=str(error))
            self._settle(arrival, [error])
            return
        have = partial.have()
        arrival.partial, arrival.chunks = partial, cut
        arrival.have = arrival.resumed = chunk_set(have)
        arrival.from_earlier = sum(cut.length(index) for index in have)
        self._begin(arrival, size_bytes, have)

    def _register(self, repository: Repository, digest: Digest) -> Arrival:
        arrival = Arrival(digest, repository, shared=self._sharing.may_share(repository))
        self.arrivals[digest] = arrival
        return arrival

    def _begin(self, arrival: Arrival, size_bytes: int | None, have: dict[int, Checksum] | None = None) -> None:
        arrival.started.set()
        self._exchange.feed(
            ev.PullStarted(
                blob=arrival.digest,
                size_bytes=size_bytes,
                registry=arrival.repository.registry,
                have=have or {},
                shared=arrival.shared,
            )
        )

    # --------------------------------------------------------- for the exchange

    def chunk_buffer(self, blob: Digest, index: int) -> memoryview | None:
        progress = self._exchange.machine.blobs.get(blob)
        if progress is None or progress.chunks is None or blob not in self.arrivals:
            return None
        return memoryview(bytearray(progress.chunks.length(index)))

    def write(self, blob: Digest, index: int, data: memoryview, checksum: Checksum) -> None:
        arrival = self.arrivals.get(blob)
        if arrival is None:
            return
        if arrival.partial is None:
            self._write_whole(arrival, bytes(data))
            return
        arrival.partial.write_chunk(index, data, checksum)
        arrival.gain(index)
        self._count(arrival, index, len(data))
        self._exchange.feed(ev.ChunkWritten(blob=blob, index=index))
        assert arrival.chunks is not None
        grown = arrival.chunks.contiguous_stop(arrival.have, 0)
        if grown - arrival.hashed_upto >= HASH_BATCH_BYTES and grown < arrival.chunks.size_bytes:
            arrival.hashed_upto = grown
            self._nursery.start_soon(self._on_disk, arrival, self._hash)
        arrival.wake()

    def _count(self, arrival: Arrival, index: int, size: int) -> None:
        progress = self._exchange.machine.blobs[arrival.digest]
        if index in progress.senders:
            arrival.from_peers += size
            arrival.origin_chunks.discard(index)
        else:
            arrival.from_origin += size
            arrival.origin_chunks.add(index)

    def _write_whole(self, arrival: Arrival, body: bytes) -> None:
        """Take in content of unknown size that came from a peer, if it is what its digest says."""
        progress = self._exchange.machine.blobs[arrival.digest]
        try:
            media_type = media_type_of(body, progress.media_type)
            self._store.add(
                arrival.digest,
                body,
                media_type=media_type,
                public=self._still_shared(arrival),
                home=str(arrival.repository),
            )
        except (IntegrityError, InvalidInput):
            self._exchange.feed(ev.BlobRejected(blob=arrival.digest, indices=[0]))
            return
        arrival.from_peers += len(body)
        self._exchange.feed(ev.ChunkWritten(blob=arrival.digest, index=0))

    async def _on_disk(self, arrival: Arrival, work: Callable[[Arrival], Awaitable[None]]) -> None:
        """Do some work for a pull; it fails where the disk does."""
        try:
            await work(arrival)
        except (StoreError, OSError) as error:
            self.cancel(arrival, error)

    def cancel(self, arrival: Arrival, cause: Exception) -> None:
        """End a pull that cannot go on."""
        self._exchange.feed(ev.PullCancelled(blob=arrival.digest))
        self.failed(arrival.digest, [cause])

    async def _hash(self, arrival: Arrival) -> None:
        async with arrival.hashing:
            if arrival.partial is not None and arrival.failure is None and not arrival.verified:
                await trio.to_thread.run_sync(arrival.partial.hash_prefix)

    def forget(self, blob: Digest, indices: list[int]) -> None:
        arrival = self.arrivals.get(blob)
        if arrival is not None and arrival.partial is not None:
            arrival.hashed_upto = 0
            arrival.partial.reject(indices)
            arrival.recall(indices)

    def heard(self, blob: Digest) -> None:
        arrival = self.arrivals.get(blob)
        if arrival is not None and arrival.readers:
            arrival.wake()

    def failed(self, blob: Digest, causes: list[Exception]) -> None:
        arrival = self.arrivals.get(blob)
        if arrival is not None:
            log.warning("pull failed", blob=blob, image=str(arrival.repository), why=[str(cause) for cause in causes])
            self._settle(arrival, causes)

    def close(self) -> None:
        """Close the files of what is still on its way; a later run resumes it. The nursery's tasks have ended."""
        for arrival in self.arrivals.values():
            arrival.fail([PeerUnavailable("the agent stops")])
            arrival.end(None)
        self.arrivals.clear()

    def _settle(self, arrival: Arrival, causes: list[Exception]) -> None:
        """End an Arrival that failed."""
        arrival.fail(causes)
        if self.arrivals.get(arrival.digest) is arrival:
            del self.arrivals[arrival.digest]
        arrival.end(None)
        self.finished(arrival)

    # ----------------------------------------------------------------- origin

    def fetch(self, blob: Digest, index: int, count: int) -> None:
        arrival = self.arrivals.get(blob)
        if arrival is not None:
            self._nursery.start_soon(self._fetch, arrival, index, count)

    async def _fetch(self, arrival: Arrival, index: int, count: int) -> None:
        blob, run = arrival.digest, None
        try:
            if arrival.partial is None:
                await self._fetch_whole(arrival)
            else:
                assert arrival.chunks is not None
                run = Run(arrival.chunks, index, index + count)
                await self._runs.read(arrival, run)
        except StoreError as error:
            # Our own disk fails whatever the source: the runtime is told at once, and why.
            self._exchange.feed(ev.PullCancelled(blob=blob))
            self.failed(blob, [error])
        except (OriginError, IntegrityError, InvalidInput) as error:
            final = isinstance(error, NotFoundAtOrigin | DeniedByOrigin | IntegrityError | InvalidInput)
            pause_s = (error.retry_after_s or 0.0) if isinstance(error, OriginError) else 0.0
            at, left = (index, count) if run is None else (run.next, run.stop - run.next)
            if not left:  # all of it is here; what was wrong came behind
                return
            self._exchange.feed(
                ev.FetchFailed(blob=blob, index=at, count=left, error=error, final=final, pause_s=pause_s)
            )

    async def _fetch_whole(self, arrival: Arrival) -> None:
        """Fetch a manifest from the origin."""
        manifest = await self._origin.get_manifest(arrival.repository, arrival.digest)
        public, home = self._still_shared(arrival), str(arrival.repository)
        await trio.to_thread.run_sync(
            lambda: self._store.add(
                arrival.digest, manifest.body, media_type=manifest.media_type, public=public, home=home
            )
        )
        if arrival.settled.is_set():
            return
        arrival.from_origin += len(manifest.body)
        checksums = (checksum_of(manifest.body),) if manifest.body else ()
        self._exchange.feed(
            ev.BlobStored(
                blob=arrival.digest,
                size_bytes=len(manifest.body),
                media_type=manifest.media_type,
                checksums=checksums,
            )
        )
        self._finish(arrival)

    # ------------------------------------------------------------------ checking

    def check(self, blob: Digest) -> None:
        arrival = self.arrivals.get(blob)
        if arrival is None:
            return
        if arrival.partial is None:
            self._exchange.feed(ev.BlobVerified(blob=blob))
            self._finish(arrival)
        else:
            self._nursery.start_soon(self._on_disk, arrival, self._check)

    async def _check(self, arrival: Arrival) -> None:
        """Compare the whole blob's SHA-256 with its digest; commit, or find out who lied."""
        blob = arrival.partial
        assert blob is not None
        async with arrival.hashing:
            await trio.to_thread.run_sync(blob.hash_prefix)
        if not blob.verified:
            await self._recheck.run(arrival)
            return
        arrival.verified = True
        self._exchange.feed(ev.BlobVerified(blob=arrival.digest))
        arrival.wake()
        try:
            public, home = self._still_shared(arrival), str(arrival.repository)
            stored = await trio.to_thread.run_sync(lambda: blob.commit(public=public, home=home))
        except StoreError as error:
            stored = None
            # The readers have it all; only later ones will have to pull again.
            log.error("blob not kept", blob=arrival.digest, why=str(error))
            self._exchange.feed(ev.BlobEvicted(blob=arrival.digest))
        self._finish(arrival, stored)

    def _still_shared(self, arrival: Arrival) -> bool:
        """Return whether peers may have what has arrived: meanwhile it may have taken credentials to read."""
        return arrival.shared and self._sharing.may_share(arrival.repository)

    def _finish(self, arrival: Arrival, stored: StoredBlob | None = None) -> None:
        arrival.verified = True
        self._splits[arrival.digest] = Split(arrival.from_peers, arrival.from_origin, arrival.from_earlier)
        while len(self._splits) > MAX_SPLITS:
            self._splits.popitem(last=False)
        if self.arrivals.get(arrival.digest) is arrival:
            del self.arrivals[arrival.digest]
        arrival.wake()
        arrival.end(stored)
        self.finished(arrival)


def _plain(failure: PullFailed) -> P2PDistError:
    """Return the origin's own verdict where that is why a pull failed: the mirror answers 404 for a 404."""
    for cause in failure.causes:
        if isinstance(cause, OriginError | StoreError):
            return cause
    return failure
