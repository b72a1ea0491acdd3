# SPDX-License-Identifier: Apache-2.0
"""Latecomers: what to take from those that have a blob whole, where they are too few for all that want it.

A seed's link carries one image at a time. Where more want a blob than have it, each chunk should leave the seeds
once and go from one latecomer to the next, who all have links to give. So each takes from a seed what none that
wants the blob has yet: of these its own part, which rendezvous hashing deals out as it does leases, in order.
Of several blobs, the one that the fewest seeds have comes first. Among as many seeds as takers nothing is scarce,
and the readers' windows decide (core/take.py). Pure; refuses nothing, owns who has which part.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from p2pdist.core.chunkmap import chunk_set, lowest, members
from p2pdist.core.racks import Importers
from p2pdist.core.select import WINDOW_FRACTION, rarest

if TYPE_CHECKING:
    from p2pdist.core.progress import Progress
    from p2pdist.core.state import SwarmState
    from p2pdist.core.types import Digest

SPAN = 8
"""Of the others' parts, where nothing of ours is left, one of the next chunks at random, so many for each taker."""

Fresh = tuple[int, bool, int]
"""How many have the blob whole, whether the chunk is another's part, and its index: the least is taken."""


class Swap:
    """What one agent takes from seeds so that it has something to swap."""

    def __init__(self, state: SwarmState) -> None:
        self._state = state
        self._parts: dict[Digest, Importers] = {}

    def fresh(self, progress: Progress, free: int) -> Fresh | None:
        """Return what to take of the chunks `free`, which a seed has; None where seeds are many or little is left."""
        blob, others, seeds, swapped = progress.blob, set(), 0, 0
        for peer in self._state.book.peers.values():
            bits = peer.shared.get(blob, 0)
            if blob in peer.wants:
                others.add(peer.peer_id)
                swapped |= bits
            elif bits == progress.full:
                seeds += 1
        fresh = free & ~swapped
        if seeds > len(others) or fresh.bit_count() <= progress.count // WINDOW_FRACTION:
            return None
        parts = self._parts.setdefault(blob, Importers(blob, progress.count))
        if ours := fresh & parts.chunks_of(self._state.peer_id, others | {self._state.peer_id}):
            return seeds, False, lowest(ours)
        some = chunk_set(islice(members(fresh), SPAN * (len(others) + 1)))
        return seeds, True, rarest(some, progress.holders, self._state.rng)

    def prune(self) -> None:
        """Forget blobs that are not wanted any more."""
        blobs = self._state.blobs
        for gone in [blob for blob in self._parts if blob not in blobs or not blobs[blob].wanted]:
            del self._parts[gone]
