# SPDX-License-Identifier: Apache-2.0
"""Which swarms this scheduler leads, where there are several: as most of its agents see it. Pure.

Agents tell which schedulers they count on. The scheduler leads a swarm that is its own by rendezvous hashing over
those that at least half of its agents count; of any other it hands out neighbours, but leases only what agents miss for
long. So an agent that alone does not reach a swarm's scheduler does not make another one fetch it all again.

Invariants: with no word from any agent it leads everything; an agent counts once.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from p2pdist.core.schedulers import home_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from p2pdist.core.types import Digest, PeerId
    from scheduler.ledger import Swarm

TAKEOVER_S = 0.5
"""After the agents' view of the schedulers has changed: until a swarm that comes is leased of here, by when its members
have joined, and one that goes is not any more. The other scheduler takes as long, so that one always leases."""
UNSETTLED_S = 3.0
"""For so long after another scheduler has gone, or this one was counted again, swarms that are new here may come from
another."""


class Leading:
    """What the agents think of the schedulers. `own_id` is this one's."""

    def __init__(self, own_id: PeerId) -> None:
        self.own_id = own_id
        self.live = frozenset((own_id,))
        """The schedulers that count."""
        self._views: dict[PeerId, frozenset[PeerId]] = {}
        self._votes: Counter[PeerId] = Counter()
        self._unsettled_until = float("-inf")
        self._turns: dict[Digest, float] = {}
        """Swarms that close or open, and when."""

    def viewed(self, agent: PeerId, schedulers: Iterable[PeerId], now: float) -> bool:
        """Take in whom an agent counts on, nobody if it has not found out yet; return whether `live` has changed."""
        self._votes.subtract(self._views.pop(agent, ()))
        if view := frozenset(schedulers):
            self._views[agent] = view
            self._votes.update(view)
        self._votes = +self._votes
        live = frozenset(one for one, votes in self._votes.items() if 2 * votes >= len(self._views))
        before, self.live = self.live, live or frozenset((self.own_id,))
        if before - self.live or self.own_id not in before:
            self._unsettled_until = now + UNSETTLED_S
        return self.live != before

    def changed(self, swarms: Mapping[Digest, Swarm], now: float) -> None:
        """Let swarms come and go as `live` has it now."""
        for key, swarm in swarms.items():
            if self.leads(swarm.blob) == swarm.closed:
                self._turns.setdefault(key, now + TAKEOVER_S)
            else:
                self._turns.pop(key, None)

    def begun(self, swarm: Swarm, now: float) -> None:
        """Decide whether a new swarm is leased of at once, a little later, or elsewhere."""
        leads = self.leads(swarm.blob)
        swarm.closed = not leads or now < self._unsettled_until
        if swarm.closed and leads:
            self._turns[swarm.key] = now + TAKEOVER_S

    def ended(self, key: Digest) -> None:
        """Forget a swarm."""
        self._turns.pop(key, None)

    def turned(self, swarms: Mapping[Digest, Swarm], now: float) -> list[Swarm]:
        """Close and open what is due; return it."""
        due = [key for key, at in self._turns.items() if at <= now]
        for key in due:
            del self._turns[key]
            swarms[key].closed, swarms[key].urgent = not swarms[key].closed, 0
        return [swarms[key] for key in due]

    def leads(self, blob: Digest) -> bool:
        """Return whether this scheduler leases the blob's chunks."""
        return home_of(blob, self.live) == self.own_id
