# SPDX-License-Identifier: Apache-2.0
"""The scheduler's records: members, swarms, the runs of chunks that are leased, and each registry's line. Pure.

Owns their shape; who may be in them and what follows from them is decided in swarm.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from p2pdist.core.types import Digest
from scheduler.handout import Crowd
from scheduler.pace import Begun, Pace

if TYPE_CHECKING:
    from p2pdist.core.chunkmap import ChunkMap
    from p2pdist.core.types import Checksum, PeerId
    from p2pdist.core.wire import PeerAddress

QUIET_S = 1.5
"""A lease that was not renewed for so long takes nobody's place: those beyond a partition had the fewest leases, got
all that were free, and the registry gave nothing until they lapsed (W6-partition)."""
UNTRIED_LEASES = 1
"""For an agent that has brought no chunk yet: the first to join would get all there are, and keep them if it stalls."""
LAPSE_GROWTH, LAPSES_MAX = 4, 4
"""An agent whose lease lapsed gets none for a pause, and four times as long after each further one, up to so many,
until it brings a chunk: one that stalls holds up a chunk each time."""

RENEWED_S = 15.0
"""A lease is renewed for so long, or for RENEWED_FACTOR times what its bytes take lately: then it lapses whatever its
holder says, or one that stalls would keep its chunk from all for ever."""
RENEWED_FACTOR = 8.0
FIRST_RENEWED_S = 60.0
"""The same before the registry has given anything."""


@dataclass(slots=True)
class Member:
    """A connected agent."""

    address: PeerAddress
    swarms: dict[Digest, Digest] = field(default_factory=dict)
    """The blobs it wants, and the key of the swarm of each that it is in."""
    stored: dict[Digest, None] = field(default_factory=dict)
    neighbours: dict[PeerId, None] = field(default_factory=dict)
    """Whom it was told to dial, and who was told to dial it."""
    leases: int = 0
    """Runs of chunks that it fetches now."""
    leased_ever: int = 0
    """Chunks."""
    run_bytes: int = 0
    """What it would fetch in one request, as it said last."""
    tried: bool = False
    """It has brought a chunk."""
    lapses: int = 0
    """Times that it let leases lapse since it brought a chunk."""

    def worth(self, share: int) -> int:
        """Return how many leases it may hold of a share that is its own."""
        return share if self.tried else min(share, UNTRIED_LEASES)


@dataclass(slots=True)
class Swarm:
    """The agents that want or hold one blob, and are of one mind about its size."""

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
    key: Digest = field(default_factory=lambda: Digest(""))
    """The blob's digest; with the size behind it in a swarm of those who say that another one's size is wrong."""
    unheard: set[PeerId] = field(default_factory=set)
    """Agents that accused others, and were found wrong."""
    votes: dict[int, dict[str, Checksum]] = field(default_factory=dict)
    """Chunks that agents read otherwise than was pushed: what, by the agents' addresses."""
    fresh: list[int] = field(default_factory=list)
    closed: bool = False
    """Whether only what is urgent is leased: another scheduler leads, or it is not known yet what members have."""
    urgent: int = 0
    """Chunks that members have missed, or doubted, for long: leased before the others, of a closed swarm alone."""

    def __post_init__(self) -> None:
        self.key = self.key or self.blob

    @property
    def full(self) -> int:
        return 1 if self.chunks is None else self.chunks.full

    @property
    def size_bytes(self) -> int:
        return -1 if self.chunks is None else self.chunks.size_bytes

    @property
    def pending(self) -> int:
        return (self.urgent if self.closed else self.full) & ~(self.done_bits | self.leased_bits)

    def length(self, index: int) -> int:
        """Return a chunk's size in bytes; 0 while that is not known."""
        return 0 if self.chunks is None else self.chunks.length(index)

    def note_done(self, index: int, checksum: Checksum, peer: PeerId) -> None:
        """Take down what a member says of a chunk, which is somewhere from now on."""
        self.done[index] = checksum
        self.done_bits |= 1 << index
        self.done_by[index] = peer
        self.missing.pop(index, None)
        self.fresh.append(index)

    def distrust(self, member: Member, now: float, pause_s: float) -> None:
        """Give no lease for a while to a member that let one lapse, and longer each time."""
        peer = member.address.peer_id
        if self.refused.get(peer, 0.0) <= now:
            self.refused[peer] = now + pause_s * LAPSE_GROWTH ** min(member.lapses, LAPSES_MAX)
            member.lapses += 1


@dataclass(slots=True)
class Run:
    """Adjacent chunks leased to one member, who fetches them in one request."""

    begun: Begun
    left: int
    """Chunks of which the lease has not ended."""
    done_bytes: int = 0
    counted: bool = False
    """Among the registry's runs: it has chunks left, and its member has not been quiet."""

    def overdue(self, byte_s: float, length_bytes: int, now: float) -> bool:
        """Whether it has taken longer than any that goes on, as others bring theirs lately: it is not to be renewed.

        Args:
            byte_s: what a byte from this registry takes lately; 0.0: not known.
        """
        patience_s = max(RENEWED_S, RENEWED_FACTOR * byte_s * length_bytes) if byte_s else FIRST_RENEWED_S
        return now - self.begun.at > patience_s


@dataclass(slots=True)
class Registry:
    """The leases that are out for one origin, and the swarms in line for the next, in the order of the joins."""

    leases: dict[tuple[Digest, int], tuple[Swarm, Run]] = field(default_factory=dict)
    runs: int = 0
    """Those that count."""
    pace: Pace = field(default_factory=Pace)
    first: dict[Digest, Swarm] = field(default_factory=dict)
    """Swarms whose first chunk is to be leased; they leave the line when they come up and have nothing to lease."""
    rest: dict[Digest, Swarm] = field(default_factory=dict)
    paused_until: float = 0.0
    byte_s: float = 0.0
    """What a byte takes lately, in seconds; 0.0: none has come."""

    def measure(self, swarm: Swarm, index: int, peer: PeerId, now: float) -> None:
        """Take in that a member has fetched a chunk: how long its run was on its way, if that is over."""
        if swarm.chunks is None or swarm.leases.get(index, ("", 0.0))[0] != peer:
            return
        run = self.leases[swarm.key, index][1]
        run.done_bytes += swarm.length(index)
        if run.left == 1:
            byte_s = (now - run.begun.at) / run.done_bytes
            self.byte_s = 0.8 * self.byte_s + 0.2 * byte_s if self.byte_s else byte_s
            self.pace.done(run.begun, run.done_bytes, now, out=self.runs, members=len(swarm.members))

    def line_up(self, swarm: Swarm) -> None:
        """Put a swarm in line that may have something to lease."""
        for line in (self.first, self.rest) if swarm.pending & 1 else (self.rest,):
            behind = next(reversed(line.values())).order if line else -1
            if line.setdefault(swarm.key, swarm).order < behind:
                ordered = sorted(line.items(), key=lambda entry: entry[1].order)
                line.clear()
                line.update(ordered)

    def count(self, run: Run, counted: bool) -> None:
        """Let a run count, or no more."""
        self.runs += counted - run.counted
        run.counted = counted

    @property
    def idle(self) -> bool:
        return not (self.leases or self.first or self.rest)
