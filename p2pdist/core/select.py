# SPDX-License-Identifier: Apache-2.0
"""Which chunk to ask for next: windowed rarest-first (docs/ARCHITECTURE.md, "The swarm").

Pure functions of sets of chunks, holder counts and an rng. Simulation and measurement: in order
costs 1.16 times the bound, pure rarest-first streams nothing until the end, a window of a sixteenth
of the blob at each runtime's read position gives both (LIMITS: 1.04-1.09 at half the latency).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2pdist.core.chunkmap import members

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from random import Random

WINDOW_FRACTION = 16
MIN_WINDOW = 4
"""Chunks; under this a window loses the benefit of order (simulated at 4)."""


def window_set(heads: Iterable[int], count: int) -> int:
    """Return the chunks inside the window at each head, each window max(count / 16, 4) long."""
    ones = (1 << max(count // WINDOW_FRACTION, MIN_WINDOW)) - 1
    bits = 0
    for head in heads:
        bits |= ones << head
    return bits & ((1 << count) - 1)


def rarest(candidates: int, holders: Sequence[int], rng: Random) -> int:
    """Return the candidate with the fewest holders, each of the rarest equally likely.

    Args:
        candidates: a set that is not empty.
        holders: the number of peers known to hold each chunk.
    """
    best: list[int] = []
    fewest = 1 << 62
    for index in members(candidates):
        count = holders[index]
        if count < fewest:
            fewest, best = count, [index]
        elif count == fewest:
            best.append(index)
    return best[int(rng.random() * len(best))]
