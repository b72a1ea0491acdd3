# SPDX-License-Identifier: Apache-2.0
"""What the agent's parts ask of each other, as Protocols; nothing here does anything.

The puller sees the store, the origin and the peers only through these, so that a test can put a
fake in the place of each and one conformance suite runs on the fake and on the real one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from p2pdist.core.access import Caller
    from p2pdist.core.types import Checksum, Digest, Home, Manifest, ManifestInfo, Repository, Split


class StoredBlob(Protocol):
    """A verified blob, open for reading; while it is open it is never evicted."""

    digest: Digest
    size_bytes: int
    media_type: str
    """Empty where the blob came without one (layers, configs)."""
    public: bool
    """Whether anyone may have it: only public content is offered to peers."""
    chunk_bytes: int
    checksums: tuple[Checksum, ...]
    """xxh3-128 of each chunk of `chunk_bytes`, in order; empty for an empty blob."""

    def fileno(self) -> int:
        """Return a descriptor for pread and sendfile; valid until `close`."""

    def read(self, start: int, stop: int) -> bytes:
        """Return bytes [start, stop), 0 <= start <= stop <= size_bytes."""

    @property
    def right(self) -> int:
        """The chunks, as a set, that were lately found to be what was stored."""

    def check(self, index: int, *, on_disk: bool = False) -> None:
        """Compare a chunk with its checksum, unless that was done lately. Blocking; run it in a thread.

        Args:
            on_disk: read it from the disk itself, whatever memory has and whenever it was checked.

        Raises:
            IntegrityError: it is another or unreadable; the store has dropped the blob.
        """

    def found_whole(self) -> None:
        """Note that all chunks were checked now, for `ChunkStore.unchecked`."""

    def close(self) -> None:
        """Let the blob be evicted again; idempotent."""


class PartialBlob(Protocol):
    """A blob that is arriving: preallocated, written by chunk, hashed in order as its prefix grows."""

    digest: Digest
    size_bytes: int
    chunk_bytes: int

    def have(self) -> dict[int, Checksum]:
        """Return the chunks that are here, with their checksums; after a restart only those re-checked."""

    def fileno(self) -> int:
        """Return a descriptor for pread and sendfile; stays valid across `commit`, until `close`."""

    def write_chunk(self, index: int, data: bytes | bytearray | memoryview, checksum: Checksum) -> None:
        """Write one whole chunk and note its checksum; the caller has compared them. Blocking, short.

        Raises:
            StoreFullError: the disk is full.
            StoreError: the disk failed.
        """

    def hash_prefix(self) -> None:
        """Hash all chunks that are there in unbroken order from the start. Blocking; safe in a worker thread."""

    @property
    def verified(self) -> bool:
        """Whether all chunks are here and `hash_prefix` found the whole blob's SHA-256 equal to its digest."""

    def reject(self, indices: list[int]) -> None:
        """Forget these chunks (they proved wrong) and start hashing again from the beginning."""

    def commit(self, *, media_type: str = "", public: bool, home: str = "") -> StoredBlob:
        """Make the verified blob durable (fsync, rename) and return it open. Blocking; run it in a thread.

        Args:
            home: the repository that it was pulled from.

        Raises:
            IntegrityError: all chunks are here, but the SHA-256 is not the digest's. Nothing is lost:
                reject the wrong chunks and go on.
            StoreError: the disk failed; the partial blob stays.
        """

    def close(self) -> None:
        """Close the file and keep what is there for a later resume; idempotent."""

    def discard(self) -> None:
        """Close the file and delete it."""


class ChunkStore(Protocol):
    """The node's blobs. Calls are short and blocking unless they say otherwise."""

    def open(self, digest: Digest) -> StoredBlob | None:
        """Return the blob open for reading and mark it used, or None where it is not here whole."""

    def inspect(self, digest: Digest) -> StoredBlob | None:
        """Return what `open` does, without marking it used."""

    def unchecked(self, within_s: float) -> list[Digest]:
        """Return the blobs not checked as a whole within so long, longest ago first."""

    def probe(self) -> None:
        """Find out whether the medium takes what is written. Blocking; run it in a thread. Raises StoreError."""

    def contains(self, digest: Digest) -> bool: ...

    def home(self, digest: Digest) -> Home | None:
        """Return where a whole blob came from, or None where it is not here. Cheap."""

    def digests(self, *, public_only: bool = False) -> Iterator[Digest]:
        """Yield what is stored whole, most recently used first."""

    def start(self, digest: Digest, size_bytes: int, chunk_bytes: int, owner: str = "") -> PartialBlob:
        """Preallocate a blob, or resume it with what an earlier run left, re-checked; evicts to make room.

        May take long where it resumes; run it in a thread.

        Args:
            owner: for whom alone what arrives may be resumed; empty: for all who name none.

        Raises:
            StoreFullError: no room even after eviction.
            StoreError: the disk failed.
        """

    def add(self, digest: Digest, body: bytes, *, media_type: str, public: bool, home: str = "") -> None:
        """Store a small blob (a manifest) in one step. Raises IntegrityError, StoreFullError, StoreError."""

    def remove(self, digest: Digest) -> None:
        """Delete a stored blob; one that is being read goes when its last reader closes."""

    def statistics(self) -> dict[str, int]:
        """Return blobs, bytes, partial_blobs, evicted_blobs, evicted_bytes, checked_bytes, damaged_blobs."""

    def close(self) -> None:
        """Give up the directory's lock."""


class RelayedResponse(Protocol):
    @property
    def status_code(self) -> int: ...
    @property
    def headers(self) -> list[tuple[str, str]]: ...
    @property
    def body(self) -> bytes: ...


class Origin(Protocol):
    """All configured registries. Every wait has a deadline; nothing of the secrets reaches an error's text.

    Where a `caller` is given, what that shows counts alone; else what the repository's access rule lets this agent
    show. `deadline_s` bounds a call with its retries.
    """

    async def head_manifest(
        self,
        repository: Repository,
        reference: str,
        *,
        known: ManifestInfo | None = None,
        caller: Caller | None = None,
        deadline_s: float | None = None,
    ) -> ManifestInfo:
        """Resolve a tag or digest; `known` is returned where the origin says that it has not changed.

        Raises:
            OriginError or one of its kinds.
        """

    async def get_manifest(self, repository: Repository, reference: str) -> Manifest:
        """Fetch a manifest, at most 4 MiB, its digest computed and, for a digest reference, checked.

        Raises:
            OriginError, IntegrityError.
        """

    async def blob_size(
        self,
        repository: Repository,
        digest: Digest,
        *,
        caller: Caller | None = None,
        deadline_s: float | None = None,
    ) -> int:
        """Return the size that the origin gives for a blob. Raises OriginError."""

    async def fetch(
        self,
        repository: Repository,
        digest: Digest,
        start: int,
        into: memoryview,
        *,
        blob_bytes: int,
        progress: Callable[[int], None],
    ) -> None:
        """Fill `into` with the blob's bytes from `start` on.

        Args:
            blob_bytes: the blob's size as the descriptor gives it; an origin that says otherwise is in error.
            progress: told the number of bytes in `into` so far, often enough to renew a lease.

        Raises:
            OriginError: after the retries; the content of `into` is then undefined.
        """

    async def relay(
        self, repository: Repository, target: str, accept: str, *, caller: Caller | None = None
    ) -> RelayedResponse:
        """GET `/v2/<name>/<target>` (tags/list, referrers, with its query), at most 4 MiB, any final status.

        Raises:
            DeniedByOrigin: 401 and 403.
        """

    def lend(self, repository: Repository, caller: Caller) -> None:
        """Fetch from now on with what this caller showed, whom the origin has just served from this repository."""

    def is_public(self, repository: Repository) -> bool:
        """Whether this repository's content has been read without credentials of ours, and none were needed since."""


class Sharing(Protocol):
    """Whether peers may have content, by the repository that it came from."""

    def may_share(self, repository: Repository) -> bool:
        """Return whether what is being pulled from here now may be given on as it arrives."""

    def may_give(self, repository: Repository) -> bool | None:
        """Return whether what is stored from here may be given; None: `prove` has to say."""

    async def prove(self, repository: Repository, digest: Digest, *, manifest: bool) -> bool:
        """Find out at the origin; bounded in time."""


class BlobReader(Protocol):
    """One runtime's reading of one blob; each open reader is a window head of the pull."""

    size_bytes: int
    source: str
    """`cache` where the blob was here before, else `swarm`."""

    async def available(self, start: int, stop: int) -> int:
        """Wait for the byte at `start`; return `end`: [start, end) can be sent now, start < end <= stop.

        The last chunk of a blob is available only when the whole blob's SHA-256 is right.

        Raises:
            PullFailed: the blob cannot be had; cut the connection, never end the body cleanly.
        """

    def fileno(self) -> int:
        """Return the descriptor to send from."""

    def close(self) -> None:
        """Stop reading; the download goes on where others wait for it. Idempotent."""


class ImageSource(Protocol):
    """What the mirror serves from: store, peers and origin behind one face, each of `caller`'s requests checked."""

    async def resolve(self, repository: Repository, reference: str, caller: Caller) -> ManifestInfo:
        """Answer a HEAD. Raises InvalidInput, OriginError, PullFailed."""

    async def manifest(self, repository: Repository, reference: str, caller: Caller) -> Manifest:
        """Answer a GET and start the pull of all that the manifest names. Raises as `resolve`."""

    async def blob_size(self, repository: Repository, digest: Digest, caller: Caller) -> int:
        """Answer a HEAD. Raises OriginError, PullFailed."""

    async def open_blob(self, repository: Repository, digest: Digest, caller: Caller) -> BlobReader:
        """Return a reader once some source is known to have the blob. Raises OriginError, PullFailed, StoreError."""

    async def relay(self, repository: Repository, target: str, accept: str, caller: Caller) -> RelayedResponse: ...

    def split(self, digest: Digest) -> Split | None:
        """Return where a blob's bytes came from so far; None where nothing of it is here that everybody may have."""
