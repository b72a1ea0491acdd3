# SPDX-License-Identifier: Apache-2.0
"""Which peers to be connected to: a nearly regular random graph, the newcomer's own rack and site first.

Pure. `neighbours` chooses among candidates; Introductions keeps who was told of whom. Simulated: a regular graph of
degree 20 costs 1.07 times the bound, an irregular one 1.22 and more origin egress (LIMITS, section 3). Each newcomer
is given half the degree and dials them, so that the degrees even out around `degree` as later ones arrive. The
newcomer is not given those with the fewest neighbours: these are the ones that came just before it, and the swarm
would be a band in the order of arrival, which news crosses step by step. Of two at random the one with fewer evens
the degrees out as well and keeps the graph's diameter at that of a random one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2pdist.core.wire import Neighbours

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from random import Random

    from p2pdist.core.types import Digest, PeerId
    from p2pdist.core.wire import Message
    from scheduler.leading import Leading
    from scheduler.ledger import Member, Swarm
    from scheduler.reports import Reports

LOCAL_SHARE = 0.8
"""Of a newcomer's neighbours, at most this part from its own site, and of these from its own rack: a few links must
join the sites, and the racks."""
CANDIDATES = 16
"""Members looked at for each neighbour that a newcomer wants in a large swarm."""
MAX_NAMED = 100
"""Addresses in one Neighbours."""


class Crowd:
    """A set of peers of which some can be drawn at random; every call but iteration takes constant time."""

    def __init__(self) -> None:
        self._peers: list[PeerId] = []
        self._at: dict[PeerId, int] = {}

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[PeerId]:
        return iter(self._peers)

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._at

    def add(self, peer: PeerId) -> None:
        if peer not in self._at:
            self._at[peer] = len(self._peers)
            self._peers.append(peer)

    def discard(self, peer: PeerId) -> None:
        at = self._at.pop(peer, None)
        if at is None:
            return
        last = self._peers.pop()
        if last != peer:
            self._peers[at] = last
            self._at[last] = at

    def sample(self, most: int, rng: Random) -> list[PeerId]:
        """Return all peers where there are no more than `most`, else so many different ones at random."""
        peers, count = self._peers, len(self._peers)
        if count <= most:
            return list(peers)
        if count < 2 * most:
            return rng.sample(peers, most)
        # Three times as fast as the library's, which must also draw where a place is rarely free.
        drawn: dict[int, None] = {}
        while len(drawn) < most:
            drawn[int(rng.random() * count)] = None
        return [peers[place] for place in drawn]


_NOBODY = Crowd()


def neighbours(
    newcomer: PeerId,
    candidates: Sequence[PeerId],
    degrees: Mapping[PeerId, int],
    places: Mapping[PeerId, tuple[str, str]],
    wanted: int,
    rng: Random,
) -> list[PeerId]:
    """Return up to `wanted` peers that the newcomer should dial.

    Args:
        candidates: other members of the swarm, each once.
        degrees: how many neighbours each candidate has.
        places: site and rack of the candidates and the newcomer.
    """
    ordered = _better_of_two(rng.sample(candidates, len(candidates)), degrees)
    site, rack = places[newcomer]
    local = [peer for peer in ordered if places[peer][0] == site]
    remote = [peer for peer in ordered if places[peer][0] != site]
    if rack:
        mates = [peer for peer in local if places[peer][1] == rack]
        others = [peer for peer in local if places[peer][1] != rack]
        local = _mixed(mates, others, round(LOCAL_SHARE * wanted) if remote else wanted)
    return _mixed(local, remote, wanted)[:wanted]


def _better_of_two(shuffled: list[PeerId], degrees: Mapping[PeerId, int]) -> list[PeerId]:
    """Return first those that have no more neighbours than the one that they were paired with, then the others."""
    pairs = [sorted(pair, key=degrees.__getitem__) for pair in zip(shuffled[::2], shuffled[1::2], strict=False)]
    odd = shuffled[len(shuffled) & ~1 :]
    return [fewer for fewer, _ in pairs] + odd + [more for _, more in pairs]


def _mixed(near: list[PeerId], far: list[PeerId], wanted: int) -> list[PeerId]:
    """Return all of these in such an order that near ones are most of the first `wanted`."""
    some = near[: round(LOCAL_SHARE * wanted)] if far else near
    return some + far + near[len(some) :]


class Introductions:
    """Who is told of whom. `members` and `holders` are the scheduler's own records."""

    def __init__(
        self,
        members: dict[PeerId, Member],
        holders: dict[Digest, Crowd],
        leading: Leading,
        reports: Reports,
        degree: int,
        rng: Random,
    ) -> None:
        self.degree = degree
        self.everybody = Crowd()
        self._members = members
        self._holders = holders
        self._leading = leading
        self._reports = reports
        self._rng = rng

    def introduce(self, peer: PeerId, swarm: Swarm) -> list[tuple[PeerId, Message]]:
        """Name a newcomer's neighbours in a swarm: those that it has already, for the sake of another blob, first."""
        member, holders = self._members[peer], self._holders.get(swarm.blob, _NOBODY)
        known = [other for other in member.neighbours if other in swarm.members or other in holders]
        small = max(len(swarm.members), len(holders)) <= self.degree + 1
        others = self._others(peer, swarm, 4 * (self.degree + 1)) if small else []
        if not small or len(others) > self.degree:
            wanted = -(-self.degree // 2) - len(known)
            others = known[:MAX_NAMED] + self._strangers(peer, member, swarm, wanted)
        if not self._leading.leads(swarm.blob):
            # Its swarm is at another scheduler, which this agent alone may not reach.
            drawn = self.everybody.sample(self.degree, self._rng)
            others = [*others, *(other for other in drawn if other != peer and other not in others)]
        for other in others:
            self._members[other].neighbours[peer] = None
            member.neighbours[other] = None
        return self.name(peer, swarm, others)

    def _others(self, peer: PeerId, swarm: Swarm, most: int) -> list[PeerId]:
        """Return up to `most` members and holders that can be dialled, of either at least half where there are."""
        holders, wanting = self._holders.get(swarm.blob, _NOBODY), swarm.members
        from_holders = min(len(holders), max(most // 2, most - len(wanting)))
        drawn = [*wanting.sample(most - from_holders, self._rng), *holders.sample(from_holders, self._rng)]
        shut_out = {peer, *self._reports.out}
        return [other for other in dict.fromkeys(drawn) if other not in shut_out and self._members[other].address.port]

    def _strangers(self, peer: PeerId, member: Member, swarm: Swarm, wanted: int) -> list[PeerId]:
        """Return up to `wanted` peers of a swarm that are no neighbours yet, those with few neighbours first."""
        if wanted <= 0:
            return []
        drawn = self._others(peer, swarm, CANDIDATES * wanted)
        others = [other for other in drawn if other not in member.neighbours]
        degrees = {other: len(self._members[other].neighbours) for other in others}
        addresses = ((other, self._members[other].address) for other in [*others, peer])
        places = {other: (address.site, address.rack) for other, address in addresses}
        return neighbours(peer, others, degrees, places, wanted, self._rng)

    def name(self, peer: PeerId, swarm: Swarm, others: Iterable[PeerId]) -> list[tuple[PeerId, Message]]:
        """Tell an agent of others, of those that are fit to be told of."""
        fit = (other for other in others if other not in self._reports.out)
        addresses = [self._members[other].address for other in fit if self._members[other].address.port]
        return [(peer, Neighbours(swarm.blob, addresses))] if addresses else []
