# SPDX-License-Identifier: Apache-2.0
"""How fast chunks leave this agent, and how much of them may be under way at a time. Pure.

A way out that is slow is found in two ways: by what waits before it (core/uplink.py), and here, by chunks: each takes
long to leave, and peers gain many meanwhile. Until it is known, chunks leave two by two, with little of each
unacknowledged, and where it is slow one by one, with less: six chunks that waited before 2 Mbit/s held up all that the
agent said and received, and it took four to twelve seconds to notice (docs/performance.md, Slow uplinks).

Invariants: `at_once` is 1 or more; whoever is taken for slow is looked at with a wide window again, every PROBE_EVERY
chunks.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from p2pdist.core.uplink import FORGET_S

if TYPE_CHECKING:
    from p2pdist.core.state import SwarmState

COPY_S = 1.5
"""As many chunks are given at a time as leave together within this: all six slots down to 8 Mbit/s for chunks of
256 KiB. Where the way out is slower, six copies of a chunk left before the next one did, while all waited for what
only this agent had (docs/performance.md, Slow uplinks)."""
RECENT = 8
"""Chunks sent that tell how fast the way out is. A single receiver that is slow must not look like it."""
OUTPACED, FADING = 4.0, 0.98
"""The way out counts as slow where each peer gains so many chunks while one leaves, and from then on for some fifty
chunks: where all wait for what leaves a slow one, they gain little. Among equals they gain one, and many at a time are
best however long they take."""
PROOF_S, PROOFS, TRIALS = 0.25, 3, 8
"""So many chunks in a row that left within that time prove that the way out is fast. More than so many in all are not
tried, and after FORGET_S in which nothing was sent it is tried again."""
LONG_TRIAL = 0.25
"""What a chunk that took CAREFUL_S counts of them: in its first seconds a swarm gains little, and outpaces nobody."""
PROBE_EVERY = 8
"""Of the chunks that leave a slow way out, every so many-th shows whether it still is slow."""
TRIED_AT_ONCE, TRIAL_SLOTS = 2, 4
"""Chunks that leave at a time meanwhile, and that are granted: a peer that answers no grant must not hold all slots."""
CAREFUL_S = 0.5
"""Where a chunk takes so long to leave, and peers outpace it, the way out is slow even if nothing else left with it."""
WIDE_BYTES, NARROW_BYTES = 64 * 1024, 24 * 1024
"""What may be unacknowledged of a chunk when its next frame is sent: wide enough to get its part of a busy receiver's
link, and narrow, once the way out is slow: what is said and acknowledged behind it waits a tenth of a second."""


class WayOut:
    """What is known of the way out of one agent. `state.slow_s` and `state.sent_at` are its to set."""

    def __init__(self, state: SwarmState) -> None:
        self._state = state
        self._leaving: deque[tuple[float, float]] = deque(maxlen=RECENT)
        """For each chunk sent lately how long it took after the one before, and what a peer gained meanwhile."""
        self._since = 0.0, 0
        """When the last chunk had left, or the first began to, and what peers had gained by then."""
        self._outpaced = 0.0
        self._trials, self._proofs = 0.0, 0
        self._sent = 0

    @property
    def _trying(self) -> bool:
        return self._trials < TRIALS and self._proofs < PROOFS

    @property
    def _slow(self) -> bool:
        return self._state.leaving_s >= CAREFUL_S

    @property
    def slots(self) -> int:
        """Return how many chunks to give at a time, leaving and granted."""
        most, each_s = self._state.settings.upload_slots, self._state.leaving_s
        if each_s:
            return max(1, min(most, int(COPY_S / each_s)))
        return min(most, TRIAL_SLOTS) if self._trying else most

    @property
    def at_once(self) -> int:
        """Return how many chunks may leave at a time."""
        if self._trying:
            return TRIED_AT_ONCE
        return 1 if self._slow else self.slots

    @property
    def window_bytes(self) -> int:
        """Return what may be unacknowledged when the next frame of a chunk is sent; 0: no matter how much."""
        if self._slow and self._sent % PROBE_EVERY and not self._trying:
            return NARROW_BYTES
        return WIDE_BYTES if self._slow or self._trying else 0

    def begins(self) -> None:
        """Note that a chunk begins to leave while no other does."""
        state = self._state
        if state.now - state.sent_at > FORGET_S:
            self._trials, self._proofs = 0.0, 0
        self._since = state.now, state.peers_gained

    def left(self, *, counts: bool) -> None:
        """Measure by a chunk that has left; one called off, or small, says little."""
        state, (since, gained), trying = self._state, self._since, self._trying
        self._since, state.sent_at = (state.now, state.peers_gained), state.now
        if not counts:
            self._trials += 1
            return
        took_s = state.now - since
        self._proofs = self._proofs + 1 if took_s <= PROOF_S else 0
        if self._slow:
            self._look_again(took_s, trying=trying)
        self._sent += 1
        leaving = self._leaving
        leaving.append((took_s, (state.peers_gained - gained) / max(len(state.book.peers), 1)))
        self._outpaced = max(sum(gains for _, gains in leaving) / len(leaving), FADING * self._outpaced)
        each_s = sum(taken_s for taken_s, _ in leaving) / len(leaving)
        if trying and self._trying:
            self._trials += 1 if each_s < CAREFUL_S else LONG_TRIAL
        # A chunk that left alone may have waited for its receiver.
        slow = self._outpaced > OUTPACED and not (trying and each_s < CAREFUL_S)
        state.slow_s = each_s if slow else 0.0
        if trying and not self._trying and not slow:
            self._forget()

    def _look_again(self, took_s: float, *, trying: bool) -> None:
        """Take in how long a chunk took while the way out counts as slow: only several fast ones say that it is not,
        for links that have rested let a burst pass."""
        if took_s >= CAREFUL_S:
            self._trials = TRIALS
        elif self._proofs >= PROOFS:
            self._forget()
        elif not trying and self.window_bytes == WIDE_BYTES:
            self._trials = 0

    def _forget(self) -> None:
        self._leaving.clear()
        self._outpaced = self._state.slow_s = 0.0
