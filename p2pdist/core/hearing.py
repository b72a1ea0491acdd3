# SPDX-License-Identifier: Apache-2.0
"""What others say: which chunks a peer has, their checksums, and whose word on these counts.

Peers announce by Share and Have, the scheduler sends what the lease holders found. A better word than its sender's
takes a wrong chunk back out of the store, and falls back on who sent it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2pdist.core.chunkmap import ChunkMap, chunk_set, members
from p2pdist.core.events import ForgetChunks, LookUp
from p2pdist.core.peerbook import MAX_SHARED_BLOBS
from p2pdist.core.progress import MAX_WHOLE_BYTES, read_share
from p2pdist.core.reputation import Offence
from p2pdist.core.wire import unpack_checksums, unpack_indices
from p2pdist.errors import RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from p2pdist.core.lease import Leasing
    from p2pdist.core.membership import Membership
    from p2pdist.core.peerbook import Peer
    from p2pdist.core.progress import Progress
    from p2pdist.core.serve import Giving
    from p2pdist.core.state import SwarmState
    from p2pdist.core.types import Checksum
    from p2pdist.core.wire import Checksums, Have, Share


class Hearing:
    """One agent's ear."""

    def __init__(self, state: SwarmState, leasing: Leasing, giving: Giving, membership: Membership) -> None:
        self._state = state
        self._leasing = leasing
        self._giving = giving
        self._membership = membership

    # --------------------------------------------------------------- peers

    def share_came(self, peer: Peer, message: Share) -> None:
        """Take in a peer's part in a swarm, and answer with ours.

        Raises:
            RemoteProtocolError: it shares too much, or its parts do not fit each other.
        """
        if len(peer.wants) > MAX_SHARED_BLOBS or len(peer.shared) > MAX_SHARED_BLOBS:
            raise RemoteProtocolError(f"more than {MAX_SHARED_BLOBS} blobs shared")
        if message.wants:
            peer.wants.setdefault(message.blob, self._state.now)
        else:
            peer.wants.pop(message.blob, None)
        progress = self._state.blobs.get(message.blob)
        if progress is None:
            if message.wants:
                self._state.out.append(LookUp(blob=message.blob))
            return
        if not progress.shared:
            return
        self._note_share(progress, peer, message)
        if not message.reply:
            self._state.share_with(peer, progress, reply=True)
        peer.passed_until = 0.0
        self._giving.grant()

    def _note_share(self, progress: Progress, peer: Peer, message: Share) -> None:
        """Learn what a peer has of a blob; a Share replaces all that was known."""
        self._membership.unhold(peer, message.blob)
        self._learn_size(progress, message.size_bytes)
        if progress.chunks is None or message.size_bytes != progress.chunks.size_bytes:
            return
        bits, checksums = read_share(message, progress.chunks)
        progress.media_type = progress.media_type or message.media_type
        peer.shared[message.blob] = bits
        self._holds(progress, bits)
        self._heard(progress, peer, zip(members(bits), checksums, strict=True))

    def have_came(self, peer: Peer, message: Have) -> None:
        """Take in what a peer gained. Raises RemoteProtocolError as share_came."""
        progress = self._state.blobs.get(message.blob)
        if progress is None or progress.chunks is None or message.blob not in peer.shared:
            return
        indices = unpack_indices(message.indices, progress.count)
        checksums = unpack_checksums(message.checksums, len(indices))
        known, new = peer.shared[message.blob], chunk_set(indices)
        peer.shared[message.blob] = known | new
        if progress.wanted:
            self._holds(progress, new & ~known)
            self._heard(progress, peer, zip(indices, checksums, strict=True))
        if known | new == progress.full:
            peer.wants.pop(message.blob, None)

    def _learn_size(self, progress: Progress, size_bytes: int) -> None:
        """Learn the size of content of which only the digest was known; one too large is fetched by each for itself."""
        if progress.chunks is not None or size_bytes < 0:
            return
        if size_bytes <= MAX_WHOLE_BYTES:
            progress.size(ChunkMap.of(size_bytes))
        else:
            self._membership.keep_to_ourselves(progress)

    def _holds(self, progress: Progress, bits: int) -> None:
        """Count a peer's chunks."""
        progress.add_holder(bits)
        if progress.news(bits):
            progress.progress_at = self._state.now

    def _heard(self, progress: Progress, peer: Peer, words: Iterable[tuple[int, Checksum]]) -> None:
        """Weigh a peer's word on checksums; a lease holder's own settles it where no scheduler does."""
        settled = progress.vouchers.settled
        swarm = None if self._state.scheduled else self._leasing.elders_and(peer, progress)
        for index, checksum in words:
            if index in settled:
                continue
            if swarm is not None and self._leasing.vouches(peer.peer_id, progress, index, swarm):
                progress.vouchers.settle(index, checksum)
            elif not progress.vouchers.claim(index, checksum, peer.peer_id):
                continue
            self._offer(progress, index)

    def _offer(self, progress: Progress, index: int) -> None:
        self._state.offer(progress, index)
        self._leasing.done(progress, index)

    # ----------------------------------------------------------- checksums

    def checksums_came(self, message: Checksums) -> None:
        """Take in the scheduler's word."""
        progress = self._state.blobs.get(message.blob)
        if progress is None or not progress.wanted or not progress.shared:
            return
        self._learn_size(progress, message.size_bytes)
        if progress.chunks is None or progress.size_bytes != message.size_bytes:
            return
        indices = unpack_indices(message.indices, progress.count)
        checksums = unpack_checksums(message.checksums, len(indices))
        progress.done |= chunk_set(indices)
        settled = progress.vouchers.settled
        new = {index: word for index, word in zip(indices, checksums, strict=True) if index not in settled}
        if not progress.checking:
            self.settled(progress, new)

    def settled(self, progress: Progress, words: dict[int, Checksum]) -> None:
        """Take in checksums that are certain; chunks that only their senders vouched for and that differ go."""
        wrong = [index for index, word in words.items() if progress.have >> index & 1 and progress.own[index] != word]
        if wrong:
            self._state.out.append(ForgetChunks(blob=progress.blob, indices=wrong))
            self.blame(progress, wrong, "sent corrupt chunks of")
        for index, word in words.items():
            progress.vouchers.settle(index, word)
            self._offer(progress, index)

    def blame(self, progress: Progress, indices: list[int], reason: str) -> None:
        """Forget wrong chunks and ban who sent them."""
        liars = dict.fromkeys(progress.senders[index] for index in indices if index in progress.senders)
        self._state.counters.corrupt_chunks += len(indices)
        progress.lose(indices)
        progress.vouchers.forget(indices)
        for liar in liars:
            self._membership.offended(liar, Offence.CORRUPT, f"{reason} {progress.blob}")
        for peer in self._state.book.peers.values():
            if progress.blob in peer.cursors:
                self._state.share_with(peer, progress, reply=True)
