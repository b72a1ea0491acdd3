# SPDX-License-Identifier: Apache-2.0
"""The vocabulary between the pull state machine and its shells.

Events are what happened, in the past tense; commands are what to do, in the imperative. The messages
of the wire (core/wire.py) travel inside PeerSaid, SchedulerSaid, Send and Tell as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from p2pdist.core.reputation import Offence
    from p2pdist.core.types import Checksum, Digest, PeerId
    from p2pdist.core.wire import Message

ORIGIN = None
"""The source of a chunk that was read from the origin, where a peer id stands otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullStarted:
    """A blob is wanted. `have` are the chunks that an earlier run left, re-checked.

    `size_bytes` None: content of which only the digest is known (a manifest); it is one chunk, and comes
    whole from a peer or is fetched whole from the origin.
    """

    blob: Digest
    size_bytes: int | None
    registry: str
    have: Mapping[int, Checksum]
    shared: bool
    """Whether peers and the scheduler may know: False for private content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullCancelled:
    """Nobody waits for the blob any more, or the pull failed."""

    blob: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadMoved:
    """A runtime reads the blob at this chunk now; None: that reader has gone."""

    blob: Digest
    reader: int
    index: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkArrived:
    """All bytes of a chunk are in memory and hash to `checksum`; nothing is written yet."""

    source: PeerId | None
    number: int
    """The grant it came by; 0 from the origin."""
    blob: Digest
    index: int
    checksum: Checksum
    taken_s: float | None = None
    """From the origin: how long its bytes took, from the first, or the chunk before, to the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkWritten:
    """The chunk of an earlier WriteChunk is in the store."""

    blob: Digest
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchFailed:
    """A FetchOrigin ended without its chunk, or without the last `count` of its chunks.

    `final`: the origin does not have the blob, or refuses it; asking again is of no use.
    """

    blob: Digest
    index: int
    count: int = 1
    error: Exception
    final: bool
    pause_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobVerified:
    """The whole blob's SHA-256 is right, and it is, or is about to be, in the store."""

    blob: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRejected:
    """All chunks were there, but the SHA-256 was wrong; these chunks proved bad and are gone, others are looked for."""

    blob: Digest
    indices: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobStored:
    """A blob is in the store and may be shared: the answer to LookUp, or fetched whole."""

    blob: Digest
    size_bytes: int
    media_type: str
    checksums: tuple[Checksum, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobEvicted:
    """A stored blob is gone."""

    blob: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConnected:
    peer: PeerId
    rack: str = ""
    """Where it stands (core/racks.py), empty where it does not say."""
    host: str = ""
    """The address that it is reached at, empty where that tells peers apart from nobody (loopback)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLost:
    peer: PeerId


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerOffended:
    """Its link found the peer doing what no honest one does."""

    peer: PeerId
    offence: Offence
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSaid:
    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSent:
    """The chunk asked for by this grant has left the socket's queue, or never will."""

    peer: PeerId
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConnected:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLost:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSaid:
    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmMoved:
    """The blob's swarm is on another scheduler now, which is to be told of it."""

    blob: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    """Some time has passed; comes every TICK_S while anything is going on."""

    received: Mapping[PeerId, int] | None = None
    """Bytes of chunks that came so far on the links of PullMachine.awaited; None: not known."""


Event = (
    PullStarted
    | PullCancelled
    | HeadMoved
    | ChunkArrived
    | ChunkWritten
    | FetchFailed
    | BlobVerified
    | BlobRejected
    | BlobStored
    | BlobEvicted
    | PeerConnected
    | PeerLost
    | PeerOffended
    | PeerSaid
    | ChunkSent
    | SchedulerConnected
    | SchedulerLost
    | SchedulerSaid
    | SwarmMoved
    | Ticked
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Send:
    """Send a message to a peer."""

    peer: PeerId
    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeChunk:
    """Send Take for this grant, and be ready for the chunk's bytes under its number."""

    peer: PeerId
    number: int
    blob: Digest
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SendChunk:
    """Send the chunk's bytes to the peer; ChunkSent follows in any case."""

    peer: PeerId
    number: int
    blob: Digest
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelSend:
    """Stop sending the chunk, at the next frame; ChunkSent follows."""

    peer: PeerId
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchOrigin:
    """Read `count` chunks from `index` on from the origin; ChunkArrived follows for each, in order, or FetchFailed."""

    blob: Digest
    index: int
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteChunk:
    """Write the chunk that just arrived; ChunkWritten follows."""

    blob: Digest
    index: int
    checksum: Checksum


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckBlob:
    """All chunks are here: compare the SHA-256; BlobVerified or BlobRejected follows."""

    blob: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetChunks:
    """Take chunks back out of the store: a better word than their sender's says that they are wrong."""

    blob: Digest
    indices: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class LookUp:
    """A peer asks for a blob that may be in the store; BlobStored follows if it is and may be shared."""

    blob: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class DropPeer:
    """End the connection, and have nothing to do with the peer for `ban_s`."""

    peer: PeerId
    offence: Offence
    reason: str
    ban_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tell:
    """Send a message to the scheduler, if there is one."""

    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail:
    """The blob cannot be had from anywhere."""

    blob: Digest
    causes: list[Exception]


Command = (
    Send
    | TakeChunk
    | SendChunk
    | CancelSend
    | FetchOrigin
    | WriteChunk
    | CheckBlob
    | ForgetChunks
    | LookUp
    | DropPeer
    | Tell
    | Fail
)
