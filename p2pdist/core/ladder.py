# SPDX-License-Identifier: Apache-2.0
"""The last rung of the ladder: fetching from the origin without a lease, so that no other rung can block a pull.

With a scheduler a chunk that has been fetched somewhere reaches us through neighbours, unless none of
them can be reached. Such an orphan is reported, so that the scheduler names a holder or leases the
chunk again, and is fetched when that does not help either. And an agent that nobody has helped for a
while, with a chunk or a lease, goes on alone until somebody does: slower than the swarm, but about as
fast as a direct pull.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from p2pdist.core.chunkmap import lowest, members
from p2pdist.core.lease import LEASES, rank_of
from p2pdist.core.packing import pack_indices
from p2pdist.core.wire import Missing

if TYPE_CHECKING:
    from p2pdist.core.lease import Leasing
    from p2pdist.core.progress import Progress
    from p2pdist.core.state import SwarmState

MISSING_S = 2.0
"""With a scheduler: chunks that no neighbour has are reported after so long without progress."""
DOUBT_S = 1.5
"""With a scheduler: chunks for which nobody but their senders has spoken for so long, at most twice that, are reported
too. A peer that forges chunks is found out by what somebody fetches from the origin, and in the order of the blob
that may be at its very end."""
MISSING_AT_ONCE = 128
"""Chunks in one report: where a blob's only holder goes, all the rest is missing."""
ORPHAN_S = 4.0
"""A chunk that was fetched somewhere but that no neighbour has got for so long is fetched again: several hops of
a chunk on a slow link take less."""
SPREADING_CHUNKS = 20
MAX_SPREADING_S = 20.0
"""Where other chunks come all the time, an orphan is waited for as long as so many of them take, up to this: through
thousands of nodes a chunk is on its way for longer than ORPHAN_S, and when each fetched what it waited for nothing new
left the origin (simulated, 1,000 nodes, 512 KiB at 50 Mbit/s: the swarm stood still)."""
LARGE = 16
"""Peers from which on the swarm may be so large that not all may lose patience together: what the first few then fetch
reaches the others first. Simulated, 500 nodes: one left with the only copy of a chunk, all fetched that chunk after the
same time, and the registry's link carried nothing else any more."""
TURN_S = 1.0
"""In a smaller swarm the members take turns, by rendezvous: the next one waits so long for what the one before fetches.
Where they lost patience together, each fetched what a frozen lease holder had (simulated, 7 nodes: 2.8 copies)."""
MAX_TURNS = 5
FLOWING_S = 1.0
"""Chunks come all the time where the last has come within this."""
STALL_S = 6.0
"""Without help for so long, and up to twice that, an agent goes on alone; jittered, not all in the same moment."""
DISPUTE_S = 2.0
"""For a better word on a chunk that peers dispute, before it is read from the origin."""
LONELY_S = 2.0
"""The same where it has no peer at all."""


class Ladder:
    """One agent's patience with the others."""

    def __init__(self, state: SwarmState, leasing: Leasing) -> None:
        self._state = state
        self._leasing = leasing
        self._jitter = 1 + state.rng.random()
        self._turn: float = 1 + state.rng.random() ** 0.25
        """Between 1 and 2; one agent in 250 is below 1.25."""

    def climb(self, progress: Progress) -> None:
        """Report what is missing, and fetch what nobody brings."""
        state = self._state
        if progress.complete or not progress.shared:
            return
        free = progress.full & ~(progress.have | progress.inflight)
        unheld = free & ~progress.held
        self._note_orphans(progress, unheld & progress.done if state.scheduled else 0)
        if state.scheduled:
            self._report(progress, unheld)
            self._doubt(progress)
        if progress.final or progress.retry_at > state.now:
            return
        self._arbitrate(progress)
        patience_s, free_requests = self._patience_s(), LEASES - self._leasing.fetching()
        old = (index for index, since in progress.orphans.items() if state.now - since > patience_s)
        ours = (index for index in old if self._is_our_turn(progress, index, patience_s))
        for index in list(islice(ours, max(0, free_requests))):
            self._leasing.fetch(progress, [index])
        if free and self._alone():
            while free and self._leasing.fetching() < LEASES:
                begun = self._leasing.fetch_run(progress, lowest(unheld or free), unheld or free)
                free, unheld = free & ~begun, unheld & ~begun

    def _arbitrate(self, progress: Progress) -> None:
        """Read a chunk that peers dispute, one at a time: that convicts who lied, and settles what else it said."""
        if any(self._leasing.is_fetching(progress, index) for index in progress.disputed):
            return
        for index, (_, _, since) in progress.disputed.items():
            if self._state.now - since >= DISPUTE_S:
                self._leasing.fetch(progress, [index])
                return

    def _is_our_turn(self, progress: Progress, index: int, patience_s: float) -> bool:
        """Whether those that come before us have had time to fetch an orphan that is old enough."""
        state = self._state
        turns = int((state.now - progress.orphans[index] - patience_s) / TURN_S)
        if turns >= MAX_TURNS or len(state.book.peers) >= LARGE:
            return True
        return rank_of(state.peer_id, progress.blob, index, self._leasing.swarm_of(progress)) <= turns

    def _note_orphans(self, progress: Progress, bits: int) -> None:
        """Keep since when each orphan has been one."""
        progress.orphans = {index: progress.orphans.get(index, self._state.now) for index in members(bits)}

    def _report(self, progress: Progress, unheld: int) -> None:
        """Tell the scheduler what no neighbour has, when the pull is quiet or an orphan is old enough."""
        now = self._state.now
        orphaned_at = min(progress.orphans.values(), default=now) + self._patience_s() - ORPHAN_S
        quiet_since = min(max(progress.progress_at, self._state.helped_at), orphaned_at)
        if not unheld or now - max(quiet_since, progress.missing_told_at) <= MISSING_S:
            return
        progress.missing_told_at = now
        self._tell_missing(progress, unheld)

    def _doubt(self, progress: Progress) -> None:
        """Tell the scheduler for which chunks only their senders speak, so that these are fetched next."""
        now, unvouched = self._state.now, progress.have & ~progress.offered
        # Before it has told of any, chunks may come from one that holds them all: nobody fetches any.
        if not progress.done or now - progress.doubted_at < DOUBT_S:
            return
        if old := unvouched & progress.doubted & ~progress.done:
            self._tell_missing(progress, old)
        progress.doubted, progress.doubted_at = unvouched, now

    def _tell_missing(self, progress: Progress, bits: int) -> None:
        first = [index for index, _ in zip(members(bits), range(MISSING_AT_ONCE), strict=False)]
        self._leasing.tell(Missing(progress.blob, pack_indices(first)))

    def _patience_s(self) -> float:
        """Return how long an orphan is waited for."""
        state, patience_s = self._state, ORPHAN_S
        if state.now - state.helped_at < FLOWING_S:
            patience_s = max(ORPHAN_S, min(SPREADING_CHUNKS * state.chunk_s, MAX_SPREADING_S))
        return patience_s * self._turn if len(state.book.peers) >= LARGE else patience_s

    def _alone(self) -> bool:
        """Whether nobody has helped for so long that this agent fetches for itself."""
        state = self._state
        patience_s = (STALL_S if state.book.peers else LONELY_S) * self._jitter
        return not self._leasing.granted and state.now - state.helped_at > patience_s
