# SPDX-License-Identifier: Apache-2.0
"""What this agent knows of one blob: its own chunks, its neighbours' chunks, and how far the pull is.

Invariants: `offered` ⊆ `have` ⊆ all chunks; a chunk is in `inflight` while at least one source is
asked for it; `log` lists `offered` in the order gained, so that a peer's cursor into it says what
that peer has been told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2pdist.core.chunkmap import MIN_CHUNK_BYTES, ChunkMap, chunk_set, from_bytes, members, to_bytes
from p2pdist.core.fetches import Fetches
from p2pdist.core.packing import INDEX_BYTES, pack_indices, unpack_checksums
from p2pdist.core.select import window_set
from p2pdist.core.verify import CHECKSUM_BYTES, Vouchers
from p2pdist.core.wire import Have, Join, Share
from p2pdist.errors import RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from p2pdist.core.types import Checksum, Digest, PeerId

MAX_WHOLE_BYTES = MIN_CHUNK_BYTES
"""Content of unknown size (a manifest) is taken from a peer up to this size: one chunk by any cut."""


class Progress:
    """One blob, wanted or held."""

    def __init__(self, blob: Digest, *, order: int, registry: str, shared: bool, wanted: bool) -> None:
        self.blob = blob
        self.order = order
        self.registry = registry
        self.shared = shared
        self.wanted = wanted
        self.whole = False
        """Only the digest was known at the start: a manifest, which comes as one chunk."""
        self.media_type = ""
        self.chunks: ChunkMap | None = None
        self.have = 0
        self.offered = 0
        self.inflight = 0
        self.log: list[int] = []
        self.packed_indices = bytearray()
        self.packed_checksums = bytearray()
        """What a Have says of the chunks in `log`, packed: each is told to many."""
        self.vouchers = Vouchers()
        self.own: dict[int, Checksum] = {}
        """Checksums of the chunks that are here."""
        self.senders: dict[int, PeerId] = {}
        """Which peer each chunk came from; absent: the origin, or an earlier run."""
        self.asked: dict[int, list[tuple[PeerId | None, float]]] = {}
        """Sources asked for each chunk in flight, and when."""
        self.late: set[tuple[int, PeerId]] = set()
        """Chunks given up for late, and the peers that may still send them."""
        self.done = 0
        """Chunks that the scheduler says have been fetched by somebody."""
        self.orphans: dict[int, float] = {}
        """Those of them that no neighbour has, and since when."""
        self.disputed: dict[int, tuple[PeerId, Checksum, float]] = {}
        """Chunks of which a peer contradicts what is settled on no certain word: who, what, and since when."""
        self.unweighed: dict[int, Checksum] = {}
        """What the scheduler has said since the check of the whole blob began, ..."""
        self.withdrawn: list[int] = []
        """... of which chunks it has taken back what it had said, ..."""
        self.postponed: set[int] = set()
        """... and which it has leased to us, perhaps again and again while the check takes long."""
        self.fetches = Fetches()
        self.held = 0
        """Chunks that some connected peer has."""
        self.spread = 0
        """Chunks that several connected peers have."""
        self.seen = 0
        """Chunks that some peer has had since the start: seeing one for the first time is progress, again is none."""
        self.holders: list[int] = []
        self.heads: dict[int, int] = {}
        self._window: int | None = None
        self.checking = False
        self.causes: list[Exception] = []
        """Why the fetches since the last arrival failed."""
        self.failing_since = 0.0
        self.retry_at = 0.0
        """No fetch of our own from the origin before."""
        self.final = False
        """The origin has said that it will never give this."""
        self.since = self.progress_at = self.missing_told_at = self.doubted_at = 0.0
        self.doubted = 0
        """Chunks for which only their senders spoke when that was looked at last."""

    def size(self, chunks: ChunkMap) -> None:
        """Learn the blob's cut."""
        self.chunks = chunks
        self.holders = [0] * chunks.count
        self._window = None

    @property
    def size_bytes(self) -> int:
        """The size, or -1 where it is not known yet."""
        return -1 if self.chunks is None else self.chunks.size_bytes

    @property
    def count(self) -> int:
        return 1 if self.chunks is None else self.chunks.count

    @property
    def full(self) -> int:
        return 1 if self.chunks is None else self.chunks.full

    @property
    def complete(self) -> bool:
        return self.chunks is not None and self.have == self.chunks.full

    @property
    def window(self) -> int:
        """The chunks inside the windows of the runtimes that read."""
        if self._window is None:
            self._window = window_set(self.heads.values(), self.count)
        return self._window

    def move_head(self, reader: int, index: int | None) -> None:
        if index is None:
            self.heads.pop(reader, None)
        else:
            self.heads[reader] = index
        self._window = None

    def gain(self, index: int, checksum: Checksum) -> None:
        """Note a chunk that is in the store now."""
        self.have |= 1 << index
        self.own[index] = checksum

    def lose(self, indices: Iterable[int]) -> None:
        """Forget chunks that proved wrong."""
        gone = chunk_set(indices)
        self.have &= ~gone
        self.retract(members(gone))
        for index in members(gone):
            self.own.pop(index, None)
            self.senders.pop(index, None)

    def retract(self, indices: Iterable[int]) -> None:
        """Offer chunks no more."""
        gone = chunk_set(indices)
        self.offered &= ~gone
        kept = [index for index in self.log if not gone >> index & 1]
        self.log, self.packed_indices, self.packed_checksums = [], bytearray(), bytearray()
        for index in kept:
            self._log(index)

    def offer(self, index: int) -> bool:
        """Let a chunk be told to peers if it is here and vouched for; return whether that is new."""
        bit = 1 << index
        if self.offered & bit or not self.have & bit or self.vouchers.settled.get(index) != self.own[index]:
            return False
        self.offered |= bit
        self._log(index)
        return True

    def _log(self, index: int) -> None:
        self.log.append(index)
        self.packed_indices += pack_indices((index,))
        self.packed_checksums += self.own[index]

    def have_since(self, cursor: int) -> Have:
        """Return what to tell a peer that knows the log up to here, which is not all of it."""
        indices = bytes(self.packed_indices[INDEX_BYTES * cursor :])
        return Have(self.blob, indices, bytes(self.packed_checksums[CHECKSUM_BYTES * cursor :]))

    def ask(self, index: int, source: PeerId | None, now: float) -> None:
        self.inflight |= 1 << index
        self.asked.setdefault(index, []).append((source, now))

    def unask(self, index: int, source: PeerId | None) -> None:
        """Stop waiting for this source's copy of the chunk."""
        left = [entry for entry in self.asked.get(index, []) if entry[0] != source]
        if left:
            self.asked[index] = left
        else:
            self.asked.pop(index, None)
            self.inflight &= ~(1 << index)

    def news(self, bits: int) -> bool:
        """Note chunks that a peer has; return whether one of them is new to the whole swarm, as far as we see it."""
        fresh = bits & ~(self.seen | self.have)
        self.seen |= bits
        return fresh != 0

    def add_holder(self, bits: int) -> None:
        self.spread |= self.held & bits
        self.held |= bits
        holders = self.holders
        while bits:  # as `members` does: a generator costs more than its work here
            low = bits & -bits
            holders[low.bit_length() - 1] += 1
            bits ^= low

    def drop_holder(self, bits: int, others: Iterable[int]) -> None:
        for index in members(bits):
            self.holders[index] -= 1
        held = spread = 0
        for other in others:
            spread |= held & other
            held |= other
        self.held, self.spread = held, spread

    def share(self, *, reply: bool) -> Share:
        """Return what a peer needs to know of our part in this blob's swarm."""
        return Share(
            blob=self.blob,
            size_bytes=self.size_bytes,
            have=b"" if self.chunks is None else to_bytes(self.offered, self.count),
            checksums=b"".join(self.own[index] for index in members(self.offered)),
            wants=self.wanted,
            media_type=self.media_type,
            reply=reply,
        )


def read_share(message: Share | Join, chunks: ChunkMap) -> tuple[int, list[Checksum]]:
    """Return the set of chunks and their checksums that a Share, or Join, of a blob of this cut tells.

    Raises:
        RemoteProtocolError: the parts do not fit each other.
    """
    try:
        bits = from_bytes(message.have, chunks.count)
    except ValueError as error:
        raise RemoteProtocolError(str(error)) from error
    return bits, unpack_checksums(message.checksums, bits.bit_count())
