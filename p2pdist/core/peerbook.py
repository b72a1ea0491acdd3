# SPDX-License-Identifier: Apache-2.0
"""What this agent knows of each connected peer: its chunks, its grants both ways; core/reputation.py has the past."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from p2pdist.core.reputation import Reputation

if TYPE_CHECKING:
    from p2pdist.core.types import Digest, PeerId

MAX_SHARED_BLOBS = 4096
"""Blobs remembered per peer; more than any node pulls at once, few enough to bound memory."""
MESH_PER_DEGREE = 4
"""Without a scheduler agents have to know who wants what and who fetches what: so many connections are sought, times
the degree, ..."""
MAX_PEERS_PER_DEGREE = 8
"""... and at most so many kept, so that who comes later finds room."""
FAILURES_TO_DROP = 4
"""Chunks in a row that came too late before the connection is given up."""
MOVED_BYTES = 16 * 1024
"""A peer that has sent less of its chunks meanwhile has sent nothing."""


@dataclass(slots=True)
class Download:
    """A chunk that we took from this peer."""

    blob: Digest
    index: int
    since: float
    late: bool = False


@dataclass(slots=True)
class Upload:
    """A slot that this peer has: granted, and taken once `blob` is set."""

    since: float
    blob: Digest | None = None
    index: int = 0
    called_off: bool = False


@dataclass(slots=True)
class Peer:
    """A connected peer."""

    peer_id: PeerId
    rack: str = ""
    """Its rack's name among all sites; empty: not known."""
    host: str = ""
    """The address that it connected from; empty: not known, or that of many."""
    shared: dict[Digest, int] = field(default_factory=dict)
    """The chunks it has, by blob."""
    doubted: dict[Digest, int] = field(default_factory=dict)
    """Chunks that it says it has, but with another checksum than we know: not to be taken from it, nor given to it."""
    wants: dict[Digest, float] = field(default_factory=dict)
    """Blobs whose rest it wants, and since when we know."""
    cursors: dict[Digest, int] = field(default_factory=dict)
    """How much of each blob's log it has been told; a blob is absent until we sent a Share."""
    downloads: dict[int, Download] = field(default_factory=dict)
    uploads: dict[int, Upload] = field(default_factory=dict)
    next_number: int = 1
    passed_until: float = 0.0
    """It declined a grant, and is passed over until then; its Room ends this early."""
    hungry_until: float = 0.0
    """It has said Room lately, and no grant has gone to it since."""
    full: bool = False
    """It declined for want of room; else for want of anything new: then our next gain ends it early too."""
    idle_at: int = -1
    """Our gains when it declined."""
    lapses: int = 0
    """Grants in a row that it did not answer."""
    passed: dict[Digest, int] = field(default_factory=dict)
    """What we had then: as long as it is passed over for want of anything new, only chunks beyond these count."""
    told_at: int = -1
    """Our gains when it was last told of them."""
    good: int = 0
    """Chunks that were taken from it, and were what was expected then."""
    wrong: int = 0
    """Checksums that it was the first to say, and that proved wrong."""
    failures: int = 0
    granted: int = -1
    """The last grant of its: their numbers grow."""
    mute: bool = False
    """It says that it has what we lack, and has granted nothing for long: that is not counted on until it does."""
    received: int = 0
    """Bytes of chunks that had come on its link when they last grew by MOVED_BYTES, ..."""
    moved_at: float = 0.0
    """... and when that was."""
    refusals: int = 0
    """Chunks that it announced and did not send, one by one forgiven for those that it sent."""
    clogged: set[int] = field(default_factory=set)
    """Chunks of ours that it took and hardly reads, ..."""
    clogged_at: float = 0.0
    """... and since when the last of them is on its way."""
    down_bytes: int = 0
    up_bytes: int = 0

    def number(self) -> int:
        """Return the next grant's number: unique on this connection, in this direction."""
        number = self.next_number
        self.next_number += 1
        return number

    def moved(self, received: int, now: float) -> None:
        """Note how many bytes of chunks have come on its link so far."""
        if received - max(self.received, self.down_bytes) >= MOVED_BYTES:
            self.received, self.moved_at = received, now

    def lacks(self, blob: Digest, offered: int) -> int:
        """Return the chunks of `offered` that it neither has, nor says it has, nor is being sent by us."""
        bits = offered & ~(self.shared.get(blob, 0) | self.doubted.get(blob, 0))
        for upload in self.uploads.values():
            if upload.blob == blob:
                bits &= ~(1 << upload.index)
        return bits


@dataclass(slots=True)
class PeerBook:
    """All connected peers, and what is remembered of those that did wrong."""

    peers: dict[PeerId, Peer] = field(default_factory=dict)
    racks: dict[str, dict[PeerId, Peer]] = field(default_factory=dict)
    """The peers of each rack that has a name."""
    reputation: Reputation = field(default_factory=Reputation)

    def add(self, peer: Peer) -> Peer:
        """Take in a peer, in the place of an earlier connection of its."""
        self.pop(peer.peer_id)
        self.peers[peer.peer_id] = peer
        if peer.rack:
            self.racks.setdefault(peer.rack, {})[peer.peer_id] = peer
        return peer

    def pop(self, peer_id: PeerId) -> Peer | None:
        """Forget a peer; return what was known of it."""
        peer = self.peers.pop(peer_id, None)
        mates = self.racks.get(peer.rack, {}) if peer is not None else {}
        if mates.pop(peer_id, None) is not None and not mates and peer is not None:
            del self.racks[peer.rack]
        return peer

    def is_banned(self, peer_id: PeerId, now: float, host: str = "") -> bool:
        """Whether to have nothing to do with the peer yet."""
        return self.reputation.is_banned(peer_id, now, host)
