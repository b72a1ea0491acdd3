# SPDX-License-Identifier: Apache-2.0
"""Which peers to be connected to: a nearly regular random graph, the newcomer's own rack and site first.

Pure. Simulated: a regular graph of degree 20 costs 1.07 times the bound, an irregular one 1.22 and
more origin egress (LIMITS, section 3). Each newcomer is given half the degree and dials them, so
that the degrees even out around `degree` as later ones arrive. The newcomer is not given those with
the fewest neighbours: these are the ones that came just before it, and the swarm would be a band in
the order of arrival, which news crosses step by step. Of two at random the one with fewer evens
the degrees out as well and keeps the graph's diameter at that of a random one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from random import Random

    from p2pdist.core.types import PeerId

LOCAL_SHARE = 0.8
"""Of a newcomer's neighbours, at most this part from its own site, and of these from its own rack: a few links must
join the sites, and the racks."""


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
