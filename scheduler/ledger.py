# SPDX-License-Identifier: Apache-2.0
"""The scheduler's records: members, swarms, the runs of chunks that are leased, and each registry's line. Pure.

Owns their shape; who may be in them and what follows from them is decided in swarm.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scheduler.handout import Crowd
from scheduler.pace import Begun, Pace

if TYPE_CHECKING:
    from p2pdist.core.chunkmap import ChunkMap
    from p2pdist.core.types import Checksum, Digest, PeerId
    from p2pdist.core.wire import PeerAddress


@dataclass(slots=True)
class Member:
    """A connected agent."""

    address: PeerAddress
    swarms: dict[Digest, None] = field(default_factory=dict)
    stored: dict[Digest, None] = field(default_factory=dict)
    neighbours: dict[PeerId, None] = field(default_factory=dict)
    """Whom it was told to dial, and who was told to dial it."""
    leases: int = 0
    """Runs of chunks that it fetches now."""
    leased_ever: int = 0
    """Chunks."""
    run_bytes: int = 0
    """What it would fetch in one request, as it said last."""


@dataclass(slots=True)
class Swarm:
    """The agents that want or hold one blob."""

    blob: Digest
    registry: str
    order: int
    chunks: ChunkMap | None
    members: Crowd = field(default_factory=Crowd)
    """Those that want it."""
    done: dict[int, Checksum] = field(default_factory=dict)
    done_by: dict[int, PeerId] = field(default_factory=dict)
    done_bits: int = 0
    leases: dict[int, tuple[PeerId, float]] = field(default_factory=dict)
    leased_bits: int = 0
    refused: dict[PeerId, float] = field(default_factory=dict)
    """Members that gave a lease back or let it lapse, and until when none is given to them."""
    missing: dict[int, float] = field(default_factory=dict)
    """Chunks that are said to be somewhere, but were reported missing: when first."""
    votes: dict[int, dict[str, Checksum]] = field(default_factory=dict)
    """Chunks that agents read otherwise than was pushed: what, by the agents' addresses."""
    fresh: list[int] = field(default_factory=list)
    closed: bool = False
    """Whether only what is urgent is leased: another scheduler leads, or it is not known yet what members have."""
    urgent: int = 0
    """Chunks of a closed swarm that members have missed for long."""

    @property
    def full(self) -> int:
        return 1 if self.chunks is None else self.chunks.full

    @property
    def size_bytes(self) -> int:
        return -1 if self.chunks is None else self.chunks.size_bytes

    @property
    def pending(self) -> int:
        return (self.urgent if self.closed else self.full) & ~(self.done_bits | self.leased_bits)

    def note_done(self, index: int, checksum: Checksum, peer: PeerId) -> None:
        """Take down what a member says of a chunk, which is somewhere from now on."""
        self.done[index] = checksum
        self.done_bits |= 1 << index
        self.done_by[index] = peer
        self.missing.pop(index, None)
        self.fresh.append(index)


@dataclass(slots=True)
class Run:
    """Adjacent chunks leased to one member, who fetches them in one request."""

    begun: Begun
    left: int
    """Chunks of which the lease has not ended."""
    done_bytes: int = 0


@dataclass(slots=True)
class Registry:
    """The leases that are out for one origin, and the swarms in line for the next, in the order of the joins."""

    leases: dict[tuple[Digest, int], tuple[Swarm, Run]] = field(default_factory=dict)
    runs: int = 0
    """Those that have chunks left."""
    pace: Pace = field(default_factory=Pace)
    first: dict[Digest, Swarm] = field(default_factory=dict)
    """Swarms whose first chunk is to be leased; they leave the line when they come up and have nothing to lease."""
    rest: dict[Digest, Swarm] = field(default_factory=dict)
    paused_until: float = 0.0

    def line_up(self, swarm: Swarm) -> None:
        """Put a swarm in line that may have something to lease."""
        for line in (self.first, self.rest) if swarm.pending & 1 else (self.rest,):
            behind = next(reversed(line.values())).order if line else -1
            if line.setdefault(swarm.blob, swarm).order < behind:
                ordered = sorted(line.items(), key=lambda entry: entry[1].order)
                line.clear()
                line.update(ordered)

    @property
    def idle(self) -> bool:
        return not (self.leases or self.first or self.rest)
