# SPDX-License-Identifier: Apache-2.0
"""Fetching from the origin: by lease, by rendezvous, and at last without asking anybody.

A lease is the right and duty to fetch one chunk. The scheduler hands them out; without one, each member
of the swarm ranks all members for a chunk by a hash of (chunk, member), and the first fetches it: all
that know the same members agree without a word, and when one leaves only its chunks move (rendezvous
hashing, Thaler and Ravishankar 1998). Content that may not be shared, or that nobody else wants, is a
swarm of one member, which leases all to itself. When nothing arrives for a while, a chunk is fetched
without a lease: no rung of the ladder can block the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

from p2pdist.core.chunkmap import lowest, members
from p2pdist.core.events import FetchOrigin, Tell
from p2pdist.core.wire import Done, Failed, Lease, Missing, Renew, pack_indices

if TYPE_CHECKING:
    from collections.abc import Collection

    from p2pdist.core.progress import Progress
    from p2pdist.core.state import SwarmState
    from p2pdist.core.types import Digest, PeerId

SETTLE_S = 0.6
"""After meeting a peer, before leasing by rendezvous: without it egress was 1.53 times the image (SWARM)."""
LEASES = 4
"""Chunks in flight from the origin per swarm: 1, 2 and 8 measured worse (SWARM)."""
REACH_PER_MEMBER = 2
"""Without a scheduler: how many chunks past the first that nobody has may be fetched, per member."""
STEP_IN_S = 3.0
"""Without a scheduler: the next in rank fetches a chunk that nobody has got for so long."""
MISSING_S = 2.0
"""With a scheduler: chunks that no neighbour has are reported after so long without progress."""
MISSING_AT_ONCE = 16
STALL_S = 6.0
"""Without any arrival for so long, and up to twice that, a chunk is fetched without a lease."""
RENEW_S = 5.0
NEVER = -1
"""The pause of a Failed that says: do not lease this blob to this agent again."""


def weight(blob: Digest, index: int, member: PeerId) -> int:
    """Return the 64-bit weight of a member for a chunk; the greatest leases it."""
    return xxh3_64_intdigest(f"{blob}/{index}/{member}".encode())


def rank_of(member: PeerId, blob: Digest, index: int, swarm: Collection[PeerId]) -> int:
    """Return how many of the swarm come before `member` for this chunk: 0 is the lease holder."""
    own = weight(blob, index, member)
    return sum(1 for other in swarm if other != member and weight(blob, index, other) > own)


def holder_of(blob: Digest, index: int, swarm: Collection[PeerId]) -> PeerId:
    """Return the member that leases the chunk; `swarm` is not empty."""
    return max(swarm, key=lambda member: weight(blob, index, member))


class Leasing:
    """The origin fetches of one agent."""

    def __init__(self, state: SwarmState) -> None:
        self.met_at = float("-inf")
        """When the last peer was met or the scheduler lost: until SETTLE_S later members are still found."""
        self._state = state
        self._fetching: dict[tuple[Digest, int], float] = {}
        self._leased: set[tuple[Digest, int]] = set()
        self._owned: dict[Digest, tuple[frozenset[PeerId], int]] = {}

    def fetching(self) -> int:
        """Return how many chunks are being fetched."""
        return len(self._fetching)

    def swarm_of(self, progress: Progress) -> frozenset[PeerId]:
        """Return the members of a blob's swarm as far as we know them: those that want it, and us."""
        me = self._state.peer_id
        if not progress.shared:
            return frozenset((me,))
        peers = self._state.book.peers.values()
        return frozenset((me, *(peer.peer_id for peer in peers if progress.blob in peer.wants)))

    def leased(self, message: Lease) -> None:
        """Take in a lease of the scheduler's: fetch, or give it back."""
        state, key = self._state, (message.blob, message.index)
        progress = state.blobs.get(message.blob)
        if progress is not None and message.index < progress.count and progress.have >> message.index & 1:
            self._leased.add(key)
            self.done(progress, message.index)
        elif progress is None or message.index >= progress.count or progress.final or not progress.wanted:
            state.out.append(Tell(message=Failed(*key, NEVER)))
        else:
            self._leased.add(key)
            self._fetch(progress, message.index)

    def done(self, progress: Progress, index: int) -> None:
        """Report a chunk that was leased to us, now that it is here, whoever it came from."""
        key = (progress.blob, index)
        if key in self._leased:
            self._leased.discard(key)
            report = Done(progress.blob, progress.size_bytes, index, progress.own[index])
            self._state.out.append(Tell(message=report))

    def arrived(self, blob: Digest, index: int) -> None:
        """Note that a fetch has ended well."""
        self._fetching.pop((blob, index), None)

    def failed(self, blob: Digest, index: int, *, final: bool, pause_s: float) -> None:
        """Note that a fetch has ended badly, and give its lease back."""
        key = (blob, index)
        self._fetching.pop(key, None)
        if key in self._leased:
            self._leased.discard(key)
            self._state.out.append(Tell(message=Failed(blob, index, NEVER if final else int(pause_s * 1000))))

    def forget(self, blob: Digest) -> None:
        """Drop all that concerns a blob."""
        self._owned.pop(blob, None)
        for key in [key for key in self._fetching if key[0] == blob]:
            del self._fetching[key]
        self._leased = {key for key in self._leased if key[0] != blob}

    def _fetch(self, progress: Progress, index: int) -> None:
        key = (progress.blob, index)
        if key not in self._fetching:
            self._fetching[key] = self._state.now
            progress.ask(index, None, self._state.now)
            self._state.out.append(FetchOrigin(blob=progress.blob, index=index))

    def renew(self) -> None:
        """Keep the leases whose fetches still run."""
        now = self._state.now
        for key, since in self._fetching.items():
            if key in self._leased and now - since >= RENEW_S:
                self._fetching[key] = now
                self._state.out.append(Tell(message=Renew(*key)))

    def by_rendezvous(self) -> None:
        """Fetch what is ours to fetch where no scheduler leases it."""
        state = self._state
        settled = not state.book.peers or state.now - self.met_at >= SETTLE_S
        for progress in state.wanted():
            if progress.shared and (state.scheduled or not settled):
                continue
            if progress.complete or progress.final or progress.retry_at > state.now:
                continue
            swarm = self.swarm_of(progress)
            while len(self._fetching) < max(1, LEASES // len(swarm)):
                index = self._own_chunk(progress, swarm)
                if index is None:
                    break
                self._fetch(progress, index)

    def _own_chunk(self, progress: Progress, swarm: frozenset[PeerId]) -> int | None:
        """Return the next chunk that this agent leases to itself, or None."""
        state = self._state
        free = progress.full & ~(progress.have | progress.held | progress.inflight)
        if not free:
            return None
        if len(swarm) == 1:
            return lowest(free & progress.window or free)
        owned = self._owned_chunks(progress, swarm)
        patience = int((state.now - progress.progress_at) / STEP_IN_S)
        for nth, index in enumerate(members(free)):
            if nth >= REACH_PER_MEMBER * len(swarm):
                return None
            if owned >> index & 1 or (patience and rank_of(state.peer_id, progress.blob, index, swarm) <= patience):
                return index
        return None

    def _owned_chunks(self, progress: Progress, swarm: frozenset[PeerId]) -> int:
        known = self._owned.get(progress.blob)
        if known is None or known[0] != swarm:
            me, bits = self._state.peer_id, 0
            for index in range(progress.count):
                if holder_of(progress.blob, index, swarm) == me:
                    bits |= 1 << index
            known = self._owned[progress.blob] = (swarm, bits)
        return known[1]

    def climb(self, progress: Progress) -> None:
        """Take the next rung of the ladder where the lower ones bring nothing."""
        state = self._state
        if progress.complete or not progress.shared or progress.retry_at > state.now:
            return
        free = progress.full & ~(progress.have | progress.inflight)
        unheld = free & ~progress.held
        quiet_s = state.now - max(progress.progress_at, progress.missing_told_at)
        if state.scheduled and unheld and quiet_s > MISSING_S:
            progress.missing_told_at = state.now
            first = [index for index, _ in zip(members(unheld), range(MISSING_AT_ONCE), strict=False)]
            state.out.append(Tell(message=Missing(progress.blob, pack_indices(first))))
        stalled_s = state.now - max(state.arrived_at, progress.progress_at)
        if free and not self._fetching and not progress.final and stalled_s > STALL_S * (1 + state.rng.random()):
            state.arrived_at = state.now
            self._fetch(progress, lowest(free))
