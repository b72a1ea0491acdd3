# SPDX-License-Identifier: Apache-2.0
"""What the parts of the pull state machine share: blobs, peers, the clock, and the commands so far.

Owned by PullMachine (core/pull.py); taking, giving and leasing each work on it. Holds no policy of its
own but what all parts need: telling peers what is new.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from p2pdist.core.chunkmap import MIN_CHUNK_BYTES
from p2pdist.core.events import Send
from p2pdist.core.peerbook import PeerBook

if TYPE_CHECKING:
    from random import Random

    from p2pdist.core.events import Command
    from p2pdist.core.peerbook import Peer
    from p2pdist.core.progress import Progress
    from p2pdist.core.types import Digest, PeerId
    from p2pdist.core.wire import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class PullSettings:
    upload_slots: int = 6
    downloads: int = 8
    """Chunks on their way from peers at a time: a little more than slots, to fill the gaps between."""
    peer_chunks: int = 4
    """Of them from one peer, late ones too: an honest one grants two at a time."""
    stranger_chunks: int = 2
    """The same from a peer that has never sent one."""
    download_bytes_per_s: int = 0
    """What may be taken from peers; 0: no limit."""
    rack: str = ""
    """This agent's, among all sites (core/racks.py); empty: not known, so that everybody is near."""


@dataclass(slots=True)
class Counters:
    """Bytes and chunks since the start."""

    from_peers: int = 0
    from_origin: int = 0
    to_peers: int = 0
    duplicate: int = 0
    corrupt_chunks: int = 0
    late_chunks: int = 0
    grants: int = 0
    declines: int = 0


@dataclass(slots=True, kw_only=True)
class SwarmState:
    """One agent's view of all its swarms."""

    peer_id: PeerId
    rng: Random
    settings: PullSettings
    blobs: dict[Digest, Progress] = field(default_factory=dict)
    book: PeerBook = field(default_factory=PeerBook)
    counters: Counters = field(default_factory=Counters)
    now: float = 0.0
    out: list[Command] = field(default_factory=list)
    scheduled: bool = False
    """Whether a scheduler is connected: then it leases, otherwise rendezvous hashing does."""
    gains: int = 0
    """Grows whenever this agent has something new to give."""
    gains_before: int = 0
    """Gains before the pulls that go on were started."""
    chunk_s: float = 0.0
    """What a chunk from a peer takes lately, from its grant on; 0 before the first."""
    peers_gained: int = 0
    """Grows with each chunk that a peer says it has gained."""
    slow_s: float = 0.0
    """What each chunk takes of our way out, where that is much slower than what the peers gain; else 0."""
    held_to_bytes_per_s: int = 0
    """What our way out carries, where a queue before it has shown that sooner than chunks could; else 0."""
    sent_at: float = float("-inf")
    """When the last chunk had left."""
    helped_at: float = 0.0
    """When somebody last helped: a chunk came from a peer, or the scheduler leased one to us."""
    _wanted: list[Progress] | None = None

    @property
    def leaving_s(self) -> float:
        """What a chunk takes of our way out where that is slow; 0 where it is not."""
        held_to = self.held_to_bytes_per_s
        return max(self.slow_s, MIN_CHUNK_BYTES / held_to) if held_to else self.slow_s

    def wanted(self) -> list[Progress]:
        """Return the pulls that go on, in the order started."""
        if self._wanted is None:
            self._wanted = [progress for progress in self.blobs.values() if progress.wanted]
            self._wanted.sort(key=lambda progress: progress.order)
            if not self._wanted:
                self.gains_before = self.gains
        return self._wanted

    def wanted_changed(self) -> None:
        self._wanted = None

    def send(self, peer: Peer, message: Message) -> None:
        self.out.append(Send(peer=peer.peer_id, message=message))

    def answer(self, peer: Peer, message: Message) -> None:
        """Send a message about chunks: the peer decides on it, so it hears first what is new here."""
        self.tell_haves(peer)
        self.send(peer, message)

    def share_with(self, peer: Peer, progress: Progress, *, reply: bool) -> None:
        """Tell a peer our part in a blob's swarm; from then on it is told of what we gain."""
        peer.cursors[progress.blob] = len(progress.log)
        self.send(peer, progress.share(reply=reply))

    def tell_haves(self, peer: Peer) -> None:
        """Bring a peer up to date on the blobs that it takes part in."""
        if peer.told_at == self.gains:
            return
        peer.told_at = self.gains
        for blob, cursor in peer.cursors.items():
            progress = self.blobs[blob]
            if len(progress.log) > cursor:
                peer.cursors[blob] = len(progress.log)
                self.send(peer, progress.have_since(cursor))

    def offer(self, progress: Progress, index: int) -> None:
        """Let a chunk be given away, if it is here and vouched for."""
        if progress.offer(index):
            self.gains += 1
