# SPDX-License-Identifier: Apache-2.0
"""What the scheduler knows and decides: members, swarms, leases, checksums, tags. Pure.

Every call takes `now` (monotonic seconds) and returns the messages to send. The work per image is
O(agents + chunks): the scheduler hands out neighbours and leases and hears of joins and of leased
chunks done; it never decides a transfer between peers. All state is soft: after a restart it comes
back from the agents' Join and Stored.

Invariants: a chunk is leased to at most one member at a time; a chunk that a member has is not
leased; at most LEASES leases per registry are out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from p2pdist.core.chunkmap import ChunkMap, from_bytes, lowest, members
from p2pdist.core.lease import NEVER
from p2pdist.core.wire import (
    Ask,
    Checksums,
    Done,
    Failed,
    Join,
    Lease,
    Leave,
    Message,
    Missing,
    Neighbours,
    PeerAddress,
    Renew,
    Resolve,
    Resolved,
    Stored,
    pack_indices,
    unpack_checksums,
    unpack_indices,
)
from p2pdist.errors import RemoteProtocolError
from scheduler.handout import neighbours

if TYPE_CHECKING:
    from collections.abc import Iterable
    from random import Random

    from p2pdist.core.types import Checksum, Digest, PeerId

LEASES = 4
"""Chunks in flight from one registry: 1, 2 and 8 measured worse (SWARM)."""
LEASE_S = 15.0
"""Without a Renew a lease lapses; its holder renews every 5 s while bytes come."""
ASK_S = 8.0
"""For the origin's answer to a tag; then the next who waits is asked."""
PUSH_S = 0.1
"""Checksums wait so long for company, and longer in swarms of thousands."""
PUSH_S_PER_MEMBER = 0.0002
RESETTLE_S = 1.0
"""After a start: members that were in mid-pull come back before anything that they may have is leased."""
STALE_DONE_S = 10.0
"""A chunk reported missing this long after it was done is leased again, whoever is said to have it."""
FAILED_PAUSE_S = 2.0
"""An agent whose fetch failed gets no lease of that blob for so long: its own way to the origin may be broken."""
SAMPLE = 8
"""Members looked at for a lease in a large swarm."""
MAX_SWARMS = 20_000
MAX_STORED = 10_000
"""Blobs remembered per agent."""
MAX_TAGS = 10_000

Outbox = list[tuple["PeerId", Message]]


@dataclass(slots=True)
class Member:
    """A connected agent."""

    address: PeerAddress
    swarms: dict[Digest, None] = field(default_factory=dict)
    stored: dict[Digest, None] = field(default_factory=dict)
    leases: int = 0
    leased_ever: int = 0
    degree: int = 0


@dataclass(slots=True)
class Swarm:
    """The agents that want or hold one blob."""

    blob: Digest
    registry: str
    chunks: ChunkMap | None
    members: list[PeerId] = field(default_factory=list)
    """Those that want it; a list, so that one can be drawn at random."""
    done: dict[int, Checksum] = field(default_factory=dict)
    done_by: dict[int, tuple[PeerId, float]] = field(default_factory=dict)
    done_bits: int = 0
    leases: dict[int, tuple[PeerId, float]] = field(default_factory=dict)
    leased_bits: int = 0
    refused: dict[PeerId, float] = field(default_factory=dict)
    """Members that gave a lease back, and until when none is given to them."""
    fresh: list[int] = field(default_factory=list)
    pushed_at: float = 0.0

    @property
    def full(self) -> int:
        return 1 if self.chunks is None else self.chunks.full

    @property
    def size_bytes(self) -> int:
        return -1 if self.chunks is None else self.chunks.size_bytes

    @property
    def pending(self) -> int:
        return self.full & ~(self.done_bits | self.leased_bits)


@dataclass(slots=True)
class Tag:
    """A tag that was asked for: resolved until `expires`, or being asked for by `asked`."""

    answer: tuple[str, str, int] | None = None
    expires: float = 0.0
    asked: tuple[PeerId, int] | None = None
    waiting: dict[tuple[PeerId, int], None] = field(default_factory=dict)


class SchedulerState:
    """Everything one scheduler knows."""

    def __init__(self, rng: Random, *, degree: int = 20, tag_ttl_s: float = 5.0, started: float = 0.0) -> None:
        self.members: dict[PeerId, Member] = {}
        self.swarms: dict[Digest, Swarm] = {}
        self.leases_granted = 0
        self.leases_lapsed = 0
        self._rng = rng
        self._degree = degree
        self._tag_ttl_s = tag_ttl_s
        self._resettle_until = started + RESETTLE_S
        self._restarting = False
        self._holders: dict[Digest, dict[PeerId, None]] = {}
        self._tags: dict[tuple[str, str, str], Tag] = {}
        self._out_leases: dict[str, int] = {}
        self._paused: dict[str, float] = {}

    # -------------------------------------------------------------- members

    def connected(self, address: PeerAddress) -> None:
        """Take in an agent; one that was here under the same id must have been taken out before."""
        self.members[address.peer_id] = Member(address)

    def gone(self, peer: PeerId, now: float) -> Outbox:
        """Take out an agent and give its leases to others."""
        member = self.members.pop(peer, None)
        if member is None:
            return []
        out: Outbox = []
        for blob in list(member.swarms):
            self._leave(peer, member, blob)
        for blob in member.stored:
            self._unstore(peer, blob)
        for key, tag in list(self._tags.items()):
            tag.waiting = {waiter: None for waiter in tag.waiting if waiter[0] != peer}
            if tag.asked is not None and tag.asked[0] == peer:
                out += self._ask_next(key, tag, now)
        return out + self._hand_out(now)

    def said(self, peer: PeerId, message: Message, now: float) -> Outbox:
        """Act on an agent's message.

        Raises:
            RemoteProtocolError: it is none that agents send, or its parts do not fit.
        """
        member = self.members[peer]
        match message:
            case Join():
                return self._on_join(peer, member, message, now) + self._hand_out(now)
            case Done():
                return self._on_done(peer, message, now) + self._hand_out(now)
            case Failed():
                self._on_failed(peer, message, now)
                return self._hand_out(now)
            case Renew():
                swarm = self.swarms.get(message.blob)
                if swarm is not None and swarm.leases.get(message.index, ("", 0.0))[0] == peer:
                    swarm.leases[message.index] = (peer, now + LEASE_S)
                return []
            case Missing():
                return self._on_missing(peer, message, now) + self._hand_out(now)
            case Stored():
                self._on_stored(peer, member, message.blobs)
                return self._hand_out(now)
            case Leave():
                self._leave(peer, member, message.blob)
                if message.blob in member.stored:
                    del member.stored[message.blob]
                    self._unstore(peer, message.blob)
                return self._hand_out(now)
            case Resolve():
                return self._on_resolve(peer, message, now)
            case Resolved():
                return self._on_resolved(peer, message, now)
            case _:
                raise RemoteProtocolError(f"a {type(message).__name__} from an agent")

    def tick(self, now: float) -> Outbox:
        """Push checksums, let late leases lapse, ask again for tags; every PUSH_S or so."""
        out: Outbox = []
        for swarm in self.swarms.values():
            for index, (peer, deadline) in list(swarm.leases.items()):
                if deadline <= now:
                    self.leases_lapsed += 1
                    self._end_lease(swarm, index, peer)
            if swarm.fresh and now - swarm.pushed_at >= PUSH_S + PUSH_S_PER_MEMBER * len(swarm.members):
                out += self._push(swarm, now)
        for key, tag in list(self._tags.items()):
            if tag.asked is not None and tag.expires <= now:
                out += self._ask_next(key, tag, now)
            elif tag.asked is None and tag.expires <= now:
                del self._tags[key]
        return out + self._hand_out(now)

    # --------------------------------------------------------------- swarms

    def _on_join(self, peer: PeerId, member: Member, message: Join, now: float) -> Outbox:
        swarm = self.swarms.get(message.blob)
        if swarm is None:
            swarm = self._new_swarm(message)
        if swarm.chunks is None and message.size_bytes >= 0:
            swarm.chunks = ChunkMap.of(message.size_bytes)
        if message.blob not in member.swarms:
            member.swarms[message.blob] = None
            swarm.members.append(peer)
        if swarm.chunks is not None and swarm.size_bytes == message.size_bytes:
            self._read_have(swarm, peer, message, now)
        out: Outbox = []
        others = [other for other in swarm.members if other != peer]
        others += [other for other in self._holders.get(message.blob, {}) if other != peer and other not in others]
        chosen = neighbours(
            peer,
            others,
            {other: self.members[other].degree for other in others},
            {other: self.members[other].address.site for other in [*others, peer]},
            self._degree,
            self._rng,
        )
        if chosen:
            for other in chosen:
                self.members[other].degree += 1
            member.degree += len(chosen)
            out.append((peer, Neighbours(message.blob, [self.members[other].address for other in chosen])))
        if swarm.done:
            out.append((peer, self._checksums(swarm, swarm.done)))
        return out

    def _new_swarm(self, message: Join) -> Swarm:
        if len(self.swarms) >= MAX_SWARMS:
            raise RemoteProtocolError(f"more than {MAX_SWARMS} blobs at once")
        chunks = ChunkMap.of(message.size_bytes) if message.size_bytes >= 0 else None
        swarm = self.swarms[message.blob] = Swarm(message.blob, message.registry, chunks)
        if self._holders.get(message.blob):
            swarm.done_bits = swarm.full
        return swarm

    def _read_have(self, swarm: Swarm, peer: PeerId, message: Join, now: float) -> None:
        assert swarm.chunks is not None
        try:
            bits = from_bytes(message.have, swarm.chunks.count)
        except ValueError as error:
            raise RemoteProtocolError(str(error)) from error
        checksums = unpack_checksums(message.checksums, bits.bit_count())
        if bits and now < self._resettle_until:
            self._restarting = True
        for index, checksum in zip(members(bits), checksums, strict=True):
            if index not in swarm.done:
                self._note_done(swarm, index, checksum, peer, now)

    def _note_done(self, swarm: Swarm, index: int, checksum: Checksum, peer: PeerId, now: float) -> None:
        swarm.done[index] = checksum
        swarm.done_bits |= 1 << index
        swarm.done_by[index] = (peer, now)
        swarm.fresh.append(index)

    def _leave(self, peer: PeerId, member: Member, blob: Digest) -> None:
        swarm = self.swarms.get(blob)
        if swarm is None or blob not in member.swarms:
            return
        del member.swarms[blob]
        swarm.members.remove(peer)
        swarm.refused.pop(peer, None)
        for index, (holder, _) in list(swarm.leases.items()):
            if holder == peer:
                self._end_lease(swarm, index, peer)
        if not swarm.members:
            del self.swarms[blob]

    def _on_stored(self, peer: PeerId, member: Member, blobs: Iterable[Digest]) -> None:
        for blob in blobs:
            if len(member.stored) >= MAX_STORED:
                break
            member.stored[blob] = None
            self._holders.setdefault(blob, {})[peer] = None
            swarm = self.swarms.get(blob)
            if swarm is not None:
                swarm.done_bits = swarm.full
                self._leave(peer, member, blob)

    def _unstore(self, peer: PeerId, blob: Digest) -> None:
        holders = self._holders.get(blob)
        if holders is not None:
            holders.pop(peer, None)
            if not holders:
                del self._holders[blob]

    def _checksums(self, swarm: Swarm, indices: Iterable[int]) -> Checksums:
        listed = [index for index in indices if index in swarm.done]
        packed = b"".join(swarm.done[index] for index in listed)
        return Checksums(swarm.blob, swarm.size_bytes, pack_indices(listed), packed)

    def _push(self, swarm: Swarm, now: float) -> Outbox:
        message = self._checksums(swarm, swarm.fresh)
        swarm.fresh.clear()
        swarm.pushed_at = now
        return [(peer, message) for peer in swarm.members]

    # --------------------------------------------------------------- leases

    def _hand_out(self, now: float) -> Outbox:
        """Lease what nobody has, the first chunk of each blob first, then in the order of the joins."""
        if self._restarting and now < self._resettle_until:
            return []
        out: Outbox = []
        for first in (True, False):
            for swarm in self.swarms.values():
                while self._out_leases.get(swarm.registry, 0) < LEASES and self._paused.get(swarm.registry, 0.0) <= now:
                    pending = swarm.pending & 1 if first else swarm.pending
                    peer = self._draw(swarm, now) if pending else None
                    if peer is None:
                        break
                    index = lowest(pending)
                    swarm.leases[index] = (peer, now + LEASE_S)
                    swarm.leased_bits |= 1 << index
                    self._out_leases[swarm.registry] = self._out_leases.get(swarm.registry, 0) + 1
                    self.members[peer].leases += 1
                    self.members[peer].leased_ever += 1
                    self.leases_granted += 1
                    out.append((peer, Lease(swarm.blob, index, int(LEASE_S * 1000))))
        return out

    def _draw(self, swarm: Swarm, now: float) -> PeerId | None:
        """Return the member to lease a chunk to: one without a lease, and of those one with few so far."""
        if not swarm.members:
            return None
        most = -(-LEASES // len(swarm.members))
        drawn = swarm.members if len(swarm.members) <= 2 * SAMPLE else self._rng.sample(swarm.members, SAMPLE)
        free = [peer for peer in drawn if self.members[peer].leases < most and swarm.refused.get(peer, 0.0) <= now]
        if not free:
            return None
        fewest = min(self.members[peer].leased_ever for peer in free)
        return self._rng.choice([peer for peer in free if self.members[peer].leased_ever == fewest])

    def _end_lease(self, swarm: Swarm, index: int, peer: PeerId) -> bool:
        if swarm.leases.get(index, ("", 0.0))[0] != peer:
            return False
        del swarm.leases[index]
        swarm.leased_bits &= ~(1 << index)
        self._out_leases[swarm.registry] -= 1
        if peer in self.members:
            self.members[peer].leases -= 1
        return True

    def _on_done(self, peer: PeerId, message: Done, now: float) -> Outbox:
        swarm = self.swarms.get(message.blob)
        if swarm is None:
            return []
        if swarm.chunks is None and message.size_bytes >= 0:
            swarm.chunks = ChunkMap.of(message.size_bytes)
        count = 0 if swarm.chunks is None else swarm.chunks.count
        if not 0 <= message.index < max(count, 1):
            raise RemoteProtocolError(f"chunk {message.index} of a blob of {count}")
        checksum = unpack_checksums(message.checksum, 1)[0]
        held = self._end_lease(swarm, message.index, peer)
        # Without the lease (it lapsed, or an earlier scheduler gave it) the word counts only where no other has it.
        if message.index not in swarm.done and (held or message.index not in swarm.leases):
            self._note_done(swarm, message.index, checksum, peer, now)
        return []

    def _on_failed(self, peer: PeerId, message: Failed, now: float) -> None:
        swarm = self.swarms.get(message.blob)
        if swarm is None or not self._end_lease(swarm, message.index, peer):
            return
        swarm.refused[peer] = float("inf") if message.pause_ms == NEVER else now + FAILED_PAUSE_S
        if message.pause_ms > 0:
            self._paused[swarm.registry] = now + min(message.pause_ms, 30_000) / 1000

    def _on_missing(self, peer: PeerId, message: Missing, now: float) -> Outbox:
        """Help an agent that sees no holder of some chunks: name one, or lease them again."""
        swarm = self.swarms.get(message.blob)
        if swarm is None:
            return []
        named: dict[PeerId, None] = {}
        for index in unpack_indices(message.indices, max(swarm.full.bit_length(), 1)):
            if index in swarm.leases:
                continue
            holder, since = swarm.done_by.get(index, (None, now))
            holders = [] if holder is None else [holder]
            holders += list(self._holders.get(message.blob, {}))
            there = [other for other in holders if other in self.members and other != peer]
            if there and now - since < STALE_DONE_S:
                named[there[0]] = None
                continue
            swarm.done_bits &= ~(1 << index)
            swarm.done.pop(index, None)
            swarm.done_by.pop(index, None)
        if not named:
            return []
        return [(peer, Neighbours(message.blob, [self.members[other].address for other in named]))]

    # ----------------------------------------------------------------- tags

    def _on_resolve(self, peer: PeerId, message: Resolve, now: float) -> Outbox:
        key = (message.registry, message.repository, message.tag)
        tag = self._tags.get(key)
        if tag is None:
            if len(self._tags) >= MAX_TAGS:
                return [(peer, Resolved(message.number, "", "", 0))]
            tag = self._tags[key] = Tag()
        if tag.answer is not None and tag.expires > now:
            return [(peer, Resolved(message.number, *tag.answer))]
        tag.answer = None
        tag.waiting[peer, message.number] = None
        return [] if tag.asked is not None else self._ask_next(key, tag, now)

    def _ask_next(self, key: tuple[str, str, str], tag: Tag, now: float) -> Outbox:
        """Let the next who waits ask the origin."""
        tag.asked = None
        if not tag.waiting:
            self._tags.pop(key, None)
            return []
        tag.asked = next(iter(tag.waiting))
        del tag.waiting[tag.asked]
        tag.expires = now + ASK_S
        return [(tag.asked[0], Ask(tag.asked[1]))]

    def _on_resolved(self, peer: PeerId, message: Resolved, now: float) -> Outbox:
        for tag in self._tags.values():
            if tag.asked == (peer, message.number):
                break
        else:
            return []
        tag.asked = None
        waiting, tag.waiting = list(tag.waiting), {}
        if message.digest:
            tag.answer = (message.digest, message.media_type, message.size_bytes)
            tag.expires = now + self._tag_ttl_s
        else:
            tag.expires = now
        answer = (message.digest, message.media_type, message.size_bytes)
        return [(waiter, Resolved(number, *answer)) for waiter, number in waiting]
