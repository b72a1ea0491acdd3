# SPDX-License-Identifier: Apache-2.0
"""Checksums that agents have read otherwise than the lease holder said: whose word stands. Pure.

An agent that reads another checksum from the origin than it was sent says so. VOTES agents of different addresses that
read the same overturn what was pushed, and each is a report against whoever had said it (reports.py). So that it is
known soon who lies, the first who says so has an arbiter drawn: a member by chance, who reads the chunk too. Where it
reads what the accuser did, who had said otherwise is a liar: it is shut out, and what rests on its word alone is taken
back and leased again to others. Where it reads what was pushed, the accuser is not listened to any more.

Invariants: a single agent overturns nothing, and has nobody shut out; each address has one vote on a chunk; of a swarm
there is one case at a time by each accuser, and an accuser that was wrong has no other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from p2pdist.core.wire import Reread

if TYPE_CHECKING:
    from collections.abc import Mapping
    from random import Random

    from p2pdist.core.types import Checksum, Digest, PeerId
    from p2pdist.core.wire import Message
    from scheduler.ledger import Swarm

    Outbox = list[tuple[PeerId, Message]]

VOTES = 2
ARBITER_S = 6.0
"""For the arbiter to read a chunk; then another is drawn."""
ARBITERS_MAX = 4
"""Drawn for one accusation."""


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """An accusation that is being looked into."""

    swarm: Swarm
    index: int
    checksum: Checksum
    """What the accuser has read."""
    accuser: PeerId
    told: Checksum
    """What was pushed."""
    teller: PeerId
    arbiter: PeerId | None = None
    until: float = 0.0
    nth: int = 0
    """How many arbiters have been drawn."""


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


def revoke(swarm: Swarm, liar: PeerId) -> list[int]:
    """Forget what an agent said of a blob's chunks, so that others read them; return which."""
    words = [index for index, teller in swarm.done_by.items() if teller == liar]
    for index in words:
        swarm.done_bits &= ~(1 << index)
        for known in (swarm.done, swarm.done_by, swarm.missing, swarm.votes):
            known.pop(index, None)
    swarm.fresh = [index for index in swarm.fresh if index in swarm.done]
    return words


class Court:
    """All cases: of a swarm one at a time by each accuser, and one against each agent.

    `places`, of each call: where the agents stand that are there and not shut out.
    """

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._cases: dict[Digest, list[Case]] = {}

    def accuse(self, case: Case, places: Mapping[PeerId, str], now: float) -> Outbox:
        """Have a member that neither has chosen read a chunk of which two say different things."""
        others = self._cases.get(case.swarm.key, ())
        if any(case.accuser == other.accuser or case.teller == other.teller for other in others):
            return []
        return self._draw(case, places, now)

    def _draw(self, case: Case, places: Mapping[PeerId, str], now: float) -> Outbox:
        taken = {places.get(party) for party in (case.accuser, case.teller, case.arbiter) if party is not None}
        fit = [peer for peer in case.swarm.members if peer in places and places[peer] not in taken]
        if not fit:
            return []
        arbiter = self._rng.choice(fit)
        drawn = replace(case, arbiter=arbiter, until=now + ARBITER_S, nth=case.nth + 1)
        self._cases.setdefault(case.swarm.key, []).append(drawn)
        return [(arbiter, Reread(case.swarm.blob, case.index))]

    def heard(self, swarm: Swarm, index: int, checksum: Checksum, reader: PeerId) -> tuple[PeerId, bool] | None:
        """Take in what an agent has read of a chunk.

        Returns:
            Where that decides a case, who was wrong, and whether it has lied: who told what was pushed has. An accuser
            may have been given something else by the registry; it is listened to no more.
        """
        cases = self._cases.get(swarm.key, ())
        case = next((case for case in cases if case.index == index and case.arbiter == reader), None)
        if case is None:
            return None
        self._close(case)
        if checksum == case.checksum:
            return case.teller, True
        if checksum != case.told:
            return None
        swarm.unheard.add(case.accuser)
        return case.accuser, False

    def _close(self, case: Case) -> None:
        cases = self._cases[case.swarm.key]
        cases.remove(case)
        if not cases:
            del self._cases[case.swarm.key]

    def tick(self, places: Mapping[PeerId, str], now: float) -> Outbox:
        """Draw another arbiter in the place of each that has said nothing."""
        out: Outbox = []
        for case in [case for cases in self._cases.values() for case in cases if case.until <= now]:
            self._close(case)
            if case.nth < ARBITERS_MAX and case.accuser in places:
                out += self._draw(case, places, now)
        return out

    def ended(self, swarm: Swarm) -> None:
        """Forget a swarm."""
        self._cases.pop(swarm.key, None)

    @property
    def due_at(self) -> float:
        """When `tick` has something to do."""
        return min((case.until for cases in self._cases.values() for case in cases), default=float("inf"))
