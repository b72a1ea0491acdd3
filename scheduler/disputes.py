# SPDX-License-Identifier: Apache-2.0
"""Checksums that agents have read otherwise than the lease holder said: whose word stands. Pure.

An agent that reads another checksum from the origin than it was sent says so. VOTES agents of different addresses that
read the same overturn what was pushed; each is a report against whoever had said it (reports.py), and with an agent
that is shut out goes all that rests on its word: it is leased again to others.

Invariants: a single agent overturns nothing; each address has one vote on a chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from p2pdist.core.types import Checksum, PeerId
    from scheduler.ledger import Swarm

VOTES = 2


def refuted(swarm: Swarm, index: int, checksum: Checksum, reader: PeerId, place: str) -> PeerId | None:
    """Count an agent's reading of a chunk against what was pushed, and overturn that where enough have read the same.

    Returns:
        Whose word was refuted; None where nobody's, or the reader's own.
    """
    before = swarm.done.get(index)
    if before is None or before == checksum:
        return None
    teller = swarm.done_by.get(index)
    if teller == reader:
        return None
    votes = swarm.votes.setdefault(index, {})
    votes[place] = checksum
    if sum(vote == checksum for vote in votes.values()) >= VOTES:
        del swarm.votes[index]
        swarm.done[index], swarm.done_by[index] = checksum, reader
        swarm.fresh.append(index)
    return teller


def revoke(swarm: Swarm, liar: PeerId) -> bool:
    """Forget what an agent said of a blob's chunks, so that others read them; return whether there was anything."""
    words = [index for index, teller in swarm.done_by.items() if teller == liar]
    for index in words:
        swarm.done_bits &= ~(1 << index)
        for known in (swarm.done, swarm.done_by, swarm.missing, swarm.votes):
            known.pop(index, None)
    swarm.fresh = [index for index in swarm.fresh if index in swarm.done]
    return bool(words)
