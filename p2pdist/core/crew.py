# SPDX-License-Identifier: Apache-2.0
"""Without a scheduler: which members of a swarm fetch from the origin, and whom agents know so that they agree on it.

All order peers alike, by a hash of their ids. The foremost members of a swarm are its crew, of all blobs the same: they
fetch, and the others wait for what they bring. Agents keep a connection to everybody on a LAN of some size, and on a
larger one at least to the foremost of all, who are the crew of what most of the LAN wants.
"""

from __future__ import annotations

from heapq import nlargest
from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from p2pdist.core.types import PeerId

CREW = 12
"""Each fetch gets its part of the registry's link: of 40 at a time none ends soon, and nobody has anything to give
meanwhile."""
MESH_PER_DEGREE = 4
"""Without a scheduler as many connections are sought, times the degree, ..."""
MAX_PEERS_PER_DEGREE = 8
"""... and at most so many kept, so that who comes later finds room."""
HUBS = 2 * CREW
"""The foremost of a LAN, to whom all connect: half of the LAN may want an image that the others have."""


def foremost(peers: Iterable[PeerId], most: int) -> list[PeerId]:
    """Return those that come first in an order that is the same on every machine."""
    return nlargest(most, peers, key=lambda peer: xxh3_64_intdigest(peer.encode()))


def crew_of(swarm: frozenset[PeerId]) -> frozenset[PeerId]:
    """Return the members that fetch for a swarm: all of a small one."""
    return swarm if len(swarm) <= CREW else frozenset(foremost(swarm, CREW))
