# SPDX-License-Identifier: Apache-2.0
"""Our part in the swarms, and the peers in ours: joining and leaving, peers that come, go, or are sent away.

Owns what is told to scheduler and peers when a part begins or ends, and what has to be given up with a peer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2pdist.core.chunkmap import members, to_bytes
from p2pdist.core.events import DropPeer
from p2pdist.core.peerbook import Peer
from p2pdist.core.wire import Banned, Join, Leave, Unshare

if TYPE_CHECKING:
    from p2pdist.core.lease import Leasing
    from p2pdist.core.progress import Progress
    from p2pdist.core.reputation import Offence
    from p2pdist.core.serve import Giving
    from p2pdist.core.state import SwarmState
    from p2pdist.core.take import Taking
    from p2pdist.core.types import Digest, PeerId


class Membership:
    """Who takes part in what."""

    def __init__(self, state: SwarmState, leasing: Leasing, taking: Taking, giving: Giving) -> None:
        self._state = state
        self._leasing = leasing
        self._taking = taking
        self._giving = giving

    # ---------------------------------------------------------- our own part

    def join(self, progress: Progress) -> None:
        """Tell the scheduler that we want a blob, what of it is here, and what is coming."""
        if not progress.shared:
            return
        # Only what is vouched for: the scheduler passes the checksums on as certain.
        have = b"" if progress.chunks is None else to_bytes(progress.offered, progress.count)
        checksums = b"".join(progress.own[index] for index in members(progress.offered))
        self._leasing.tell(Join(progress.blob, progress.size_bytes, progress.registry, have, checksums))
        self._leasing.retell(progress.blob)

    def leave(self, progress: Progress) -> None:
        """Tell the scheduler that we neither want nor hold a blob any more."""
        if progress.shared:
            self._leasing.tell(Leave(progress.blob))

    def unshare(self, progress: Progress) -> None:
        """Tell the peers the same."""
        for peer in self._state.book.peers.values():
            if peer.cursors.pop(progress.blob, None) is not None:
                self._state.send(peer, Unshare(progress.blob))

    def keep_to_ourselves(self, progress: Progress) -> None:
        """Leave a blob's swarm, and go on alone."""
        self.leave(progress)
        progress.shared = False
        self._leasing.hush(progress.blob)
        self.unshare(progress)

    # ------------------------------------------------------------- the peers

    def connected(self, peer_id: PeerId, rack: str, host: str) -> None:
        """Take in a peer and ask it for what we want."""
        self.lost(peer_id)
        peer = self._state.book.add(Peer(peer_id, rack, host))
        self._leasing.met()
        for progress in self._state.wanted():
            if progress.shared:
                self._state.share_with(peer, progress, reply=False)

    def lost(self, peer_id: PeerId) -> None:
        """Give up what was under way with a peer that has gone."""
        if (peer := self._state.book.pop(peer_id)) is None:
            return
        if not self._state.book.peers and not self._state.book.is_banned(peer_id, self._state.now):
            self._leasing.lost_all()
        self._giving.lost(peer)
        self._leasing.gone(peer_id)
        for blob in list(peer.shared):
            self.unhold(peer, blob)
        for progress in self._state.wanted():
            progress.fetches.drop(peer_id)
            progress.disputed = {index: said for index, said in progress.disputed.items() if said[0] != peer_id}
        self._taking.lost(peer)
        self._giving.grant()

    def unshared(self, peer: Peer, blob: Digest) -> None:
        """Forget a peer's part in a blob's swarm."""
        self.unhold(peer, blob)
        peer.wants.pop(blob, None)
        peer.cursors.pop(blob, None)
        if (progress := self._state.blobs.get(blob)) is not None:
            progress.fetches.drop(peer.peer_id)

    def offended(self, peer_id: PeerId, offence: Offence, reason: str) -> bool:
        """Count what a peer did; where that is enough, send it away, tell the scheduler, and return True."""
        state, peer = self._state, self._state.book.peers.get(peer_id)
        host = peer.host if peer is not None else ""
        ban_s = state.book.reputation.offended(peer_id, offence, state.now, host)
        if not ban_s:
            return False
        self.lost(peer_id)
        self._leasing.tell(Banned(peer_id, offence, int(ban_s * 1000)))
        state.out.append(DropPeer(peer=peer_id, offence=offence, reason=reason, ban_s=ban_s))
        return True

    def unhold(self, peer: Peer, blob: Digest) -> None:
        """Forget what a peer has of a blob."""
        peer.doubted.pop(blob, None)
        bits = peer.shared.pop(blob, 0)
        progress = self._state.blobs.get(blob)
        if progress is not None and progress.wanted and bits:
            others = (other.shared.get(blob, 0) for other in self._state.book.peers.values() if other is not peer)
            progress.drop_holder(bits, others)
