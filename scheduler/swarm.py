# SPDX-License-Identifier: Apache-2.0
"""What the scheduler knows and decides: members, swarms, leases, checksums; tags.py and reports.py have the rest. Pure.

Every call takes `now` (monotonic seconds) and returns the messages to send. The work per image is
O(agents + chunks): the scheduler hands out neighbours and leases and hears of joins and of leased
chunks done; it never decides a transfer between peers. All state is soft: after a restart it comes
back from the agents' Join and Stored.

Invariants: a chunk is leased to at most one member at a time; a chunk that a member has is not
leased; of leases whose holders are not silent no more are out than the registry's pace says for so large a swarm; a
swarm with a chunk to lease is in its registry's line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2pdist.core.addresses import telling
from p2pdist.core.chunkmap import ChunkMap, lowest, members
from p2pdist.core.ladder import MISSING_AT_ONCE
from p2pdist.core.lease import DOUBTERS, FIRST_AHEAD, NEVER
from p2pdist.core.packing import pack_indices, unpack_checksums, unpack_indices
from p2pdist.core.progress import read_share
from p2pdist.core.reputation import Offence
from p2pdist.core.runs import MAX_RUN_BYTES, run_from
from p2pdist.core.types import Digest, PeerId
from p2pdist.core.verify import CHECKSUM_BYTES
from p2pdist.core.wire import (
    Banned,
    Checksums,
    Done,
    Failed,
    Join,
    Lease,
    Leave,
    Message,
    Missing,
    PeerAddress,
    Present,
    Refuted,
    Renew,
    Resolve,
    Resolved,
    Stored,
    View,
    Withdrawn,
)
from p2pdist.errors import RemoteProtocolError
from scheduler.checksums import Archive
from scheduler.disputes import Case, Court, refuted, revoke
from scheduler.handout import Crowd, Introductions
from scheduler.leading import Leading
from scheduler.ledger import QUIET_S, Member, Registry, Run, Swarm
from scheduler.pace import MEMBER_LEASES, Begun
from scheduler.reports import REPORT_S, Reports
from scheduler.tags import Tags

if TYPE_CHECKING:
    from collections.abc import Iterable
    from random import Random

    from p2pdist.core.types import Checksum

ALONE = PeerId("0" * 32)
"""The id of a scheduler that has no others beside it."""
LEASE_S = 6.0
"""Without a Renew a lease lapses; its holder renews every second while its fetch runs."""
PUSH_S = 0.1
"""Between two ticks: checksums wait so long for company, and longer where there are thousands to tell. Until told, only
a chunk's first holder may pass it on."""
PUSH_S_PER_MEMBER = 0.00005
"""Telling one member costs a tenth of that (measured): all pushes together take that part of a core at most. With four
times as much, 10,000 members were told every 2.1 s, and the swarm needed 1.38 times the bound (simulated)."""
RESETTLE_S = 1.0
"""After a start: members that were in mid-pull come back before anything that they may have is leased."""
ADOPTED = 64
"""Adjacent chunks of a closed swarm that one member may say it is fetching already."""
STALE_DONE_S = 10.0
"""A chunk still reported missing so long after the first report is leased again, whoever is said to have it."""
FAILED_PAUSE_S = 2.0
"""An agent whose fetch failed gets no lease of that blob for so long: its own way to the origin may be broken."""
MAX_PAUSE_S = 30.0
"""How long one agent's Failed may keep all from a registry."""
SAMPLE = 8
"""Members looked at for a lease in a large swarm."""
MAX_SWARMS = 20_000
MAX_JOINED = 4096
"""Blobs that one agent may want at a time."""
MAX_STORED = 10_000
"""Blobs remembered per agent."""

LIES = (Offence.CORRUPT, Offence.FALSE_CHECKSUM)
"""Reasons of bans after which a word is worth nothing; who was unplugged is shut out for a while, and was right."""
_NOBODY = Crowd()

Outbox = list[tuple[PeerId, Message]]


class SchedulerState:
    """Everything one scheduler knows."""

    def __init__(
        self,
        rng: Random,
        *,
        degree: int = 20,
        tag_ttl_s: float = 5.0,
        started: float = 0.0,
        own_id: PeerId = ALONE,
    ) -> None:
        self.members: dict[PeerId, Member] = {}
        self.swarms: dict[Digest, Swarm] = {}
        self.leases_granted = 0
        self.leases_lapsed = 0
        self._rng = rng
        self.leading = Leading(own_id)
        self._started = started
        self._resettle_until = started + RESETTLE_S
        self._restarting = False
        self._orders = 0
        self._holders: dict[Digest, Crowd] = {}
        self._registries: dict[str, Registry] = {}
        self._fresh: dict[Digest, Swarm] = {}
        """Swarms with checksums to push, those that have waited longest first."""
        self._push_from = float("-inf")
        self._tags = Tags(tag_ttl_s)
        self._archive = Archive()
        self.reports = Reports()
        self._naming = Introductions(self.members, self._holders, self.leading, self.reports, degree, rng)
        self._court = Court(rng)

    def tune(self, *, degree: int, tag_ttl_s: float) -> None:
        """Take other values for what is handed out and remembered from now on."""
        self._naming.degree = degree
        self._tags.ttl_s = tag_ttl_s

    # -------------------------------------------------------------- members

    def connected(self, address: PeerAddress) -> None:
        """Take in an agent; one that was here under the same id must have been taken out before."""
        self.members[address.peer_id] = Member(address)
        self._naming.everybody.add(address.peer_id)

    def gone(self, peer: PeerId, now: float) -> Outbox:
        """Take out an agent and give its leases to others."""
        member = self.members.pop(peer, None)
        if member is None:
            return []
        for other in member.neighbours:
            self.members[other].neighbours.pop(peer, None)
        for blob in list(member.swarms):
            self._leave(peer, member, blob)
        for blob in member.stored:
            self._unstore(peer, blob)
        self._naming.everybody.discard(peer)
        self._viewed(peer, (), now)
        return self._tags.gone(peer, now) + self._hand_out(now)

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
                self._on_renew(peer, member, message, now)
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
            case Banned():
                return self._on_banned(peer, member, message, now)
            case Refuted():
                return self._on_refuted(peer, member, message, now)
            case Resolve() if peer in self.reports.out:
                return [(peer, Resolved(message.number, "", "", 0))]
            case Resolve():
                return self._tags.resolve(peer, message, now, self._place(peer))
            case Resolved():
                return self._tags.resolved(peer, message, now)
            case View():
                self._viewed(peer, message.schedulers, now)
                return [(peer, Present(self.leading.own_id, int(1000 * (now - self._started))))]
            case _:
                raise RemoteProtocolError(f"a {type(message).__name__} from an agent")

    def tick(self, now: float) -> Outbox:
        """Push checksums, let late leases lapse, ask again for tags; every PUSH_S or so."""
        out: Outbox = []
        for name, registry in list(self._registries.items()):
            for (_, index), (swarm, run) in list(registry.leases.items()):
                peer, deadline = swarm.leases[index]
                registry.count(run, deadline - LEASE_S > now - QUIET_S)
                if deadline <= now:
                    self.leases_lapsed += 1
                    swarm.distrust(self.members[peer], now, FAILED_PAUSE_S)
                    self._end_lease(swarm, index, peer)
            if registry.idle and registry.paused_until <= now:
                del self._registries[name]
        for swarm in list(self._fresh.values()):
            if now >= self._push_from:
                out += self._push(swarm, now)
        for swarm in self.leading.turned(self.swarms, now):
            self._registry(swarm).line_up(swarm)
        self.reports.expire(now)
        if self._court.due_at <= now:
            out += self._court.tick(self._places(), now)
        return out + self._tags.tick(now) + self._hand_out(now)

    def _on_banned(self, peer: PeerId, member: Member, message: Banned, now: float) -> Outbox:
        """Count a report; whom a quorum has banned gives its leases back, and its word goes where it lied."""
        return self._report(peer, message.peer, now, message.ban_ms / 1000, lies=message.reason in LIES)

    def _place(self, peer: PeerId) -> str:
        """Return what tells where an agent stands from where others do."""
        return telling(self.members[peer].address.host) or peer

    def _on_refuted(self, peer: PeerId, member: Member, message: Refuted, now: float) -> Outbox:
        """Count an agent's own reading of a chunk as a report against who said otherwise, and have it looked into."""
        swarm, index = self._swarm(member, message.blob), message.index
        if swarm is None or peer in self.reports.out or peer in swarm.unheard:
            return []
        checksum, told = unpack_checksums(message.checksum, 1)[0], swarm.done.get(index)
        teller = refuted(swarm, index, checksum, peer, self._place(peer))
        if swarm.fresh:
            self._fresh[swarm.key] = swarm
        if verdict := self._court.heard(swarm, index, checksum, peer):
            return self._judged(peer, *verdict, now)
        if teller is None or told is None or teller not in self.members:
            return []
        case = Case(swarm, index, checksum, peer, told, teller)
        return self._report(peer, teller, now) + self._court.accuse(case, self._places(swarm), now)

    def _places(self, swarm: Swarm | None = None) -> dict[PeerId, str]:
        """Return where those stand who are not shut out: of a swarm, or all."""
        peers = self.members if swarm is None else [*swarm.members, *swarm.done_by.values()]
        return {peer: self._place(peer) for peer in peers if peer in self.members and peer not in self.reports.out}

    def _judged(self, arbiter: PeerId, wrong: PeerId, lied: bool, now: float) -> Outbox:
        """Shut out who has lied; count what an arbiter has found against who was merely wrong."""
        if not lied:
            return self._report(arbiter, wrong, now)
        return self._without(wrong, lies=True, now=now) if self.reports.found(wrong, now) else []

    def _report(self, by: PeerId, suspect: PeerId, now: float, ban_s: float = REPORT_S, lies: bool = True) -> Outbox:
        """Note a report; with an agent that is shut out go its leases, and its word where it lies."""
        if suspect not in self.members:
            return []
        if not self.reports.note(by, self._place(by), suspect, now, len(self.members), ban_s):
            return []
        return self._without(suspect, lies=lies, now=now)

    def _without(self, suspect: PeerId, *, lies: bool, now: float) -> Outbox:
        """Give to others what an agent leases that was shut out; take back what is its word alone if it lies."""
        out: Outbox = []
        for registry in self._registries.values():
            for (_, index), (swarm, _) in list(registry.leases.items()):
                self._end_lease(swarm, index, suspect)
        for swarm in self.swarms.values() if lies else ():
            if words := revoke(swarm, suspect):
                self._registry(swarm).line_up(swarm)
                message = Withdrawn(swarm.blob, pack_indices(words), suspect)
                out += [(member, message) for member in swarm.members if member != suspect]
        return out + self._hand_out(now)

    # ------------------------------------------------- among other schedulers

    def _viewed(self, peer: PeerId, schedulers: Iterable[PeerId], now: float) -> None:
        """Take in whom an agent counts on; where most see it otherwise now, swarms come and go."""
        if self.leading.viewed(peer, schedulers, now):
            self.leading.changed(self.swarms, now)

    def _on_renew(self, peer: PeerId, member: Member, message: Renew, now: float) -> None:
        swarm, index = self._swarm(member, message.blob), message.index
        if swarm is None:
            return
        if index in swarm.leases:
            registry = self._registry(swarm)
            run, length = registry.leases[swarm.key, index][1], swarm.length(index)
            if swarm.leases[index][0] == peer and not run.overdue(registry.byte_s, length * run.left, now):
                swarm.leases[index] = (peer, now + LEASE_S)
        elif (swarm.closed or now < self._resettle_until) and peer in swarm.members:
            self._adopt(swarm, peer, member, index, now)

    def _adopt(self, swarm: Swarm, peer: PeerId, member: Member, index: int, now: float) -> None:
        """Count a chunk as leased that a member is fetching for another scheduler, or for one before."""
        if not swarm.full >> index & 1 or swarm.done_bits >> index & 1:
            return
        registry = self._registry(swarm)
        beside = registry.leases.get((swarm.key, index - 1))
        if beside is not None and swarm.leases[index - 1][0] == peer and beside[1].left < ADOPTED:
            run = beside[1]
            run.left += 1
        elif member.leases < MEMBER_LEASES:
            # What it measures is from before: of no use to the pace.
            run = Run(Begun(now, -1), 1)
            registry.count(run, True)
            member.leases += 1
        else:
            return
        self._note_lease(registry, swarm, run, index, peer, now)

    # --------------------------------------------------------------- swarms

    def _on_join(self, peer: PeerId, member: Member, message: Join, now: float) -> Outbox:
        if message.blob not in member.swarms and len(member.swarms) >= MAX_JOINED:
            raise RemoteProtocolError(f"more than {MAX_JOINED} blobs wanted")
        swarm = self._swarm_to_join(peer, member, message, now)
        member.swarms[message.blob] = swarm.key
        swarm.members.add(peer)
        self._learn_size(swarm, message.size_bytes)
        if swarm.chunks is not None and swarm.size_bytes == message.size_bytes:
            self._read_have(swarm, peer, message, now)
        if not swarm.done and len(swarm.members) == DOUBTERS and len(self._holders.get(swarm.blob, _NOBODY)) == 1:
            swarm.done_bits = 0
            self._registry(swarm).line_up(swarm)
        out = self._naming.introduce(peer, swarm)
        if swarm.done:
            out.append((peer, self._checksums(swarm, swarm.done)))
        return out

    def _swarm(self, member: Member, blob: Digest) -> Swarm | None:
        """Return the swarm of a blob that concerns an agent."""
        return self.swarms.get(member.swarms.get(blob, blob))

    def _swarm_to_join(self, peer: PeerId, member: Member, message: Join, now: float) -> Swarm:
        """Return the swarm of those who say the same of a blob's size: who lies about it is left to its kind."""
        key, size_bytes = message.blob, message.size_bytes
        swarm, apart = self._swarm(member, key), Digest(f"{key} {size_bytes}")
        # With one who calls it empty those who do not know yet would have nothing to lease.
        if not size_bytes or (size_bytes > 0 and swarm is not None and swarm.size_bytes not in (-1, size_bytes)):
            self._leave(peer, member, key)
            key, swarm = apart, None
        return swarm or self.swarms.get(apart) or self._new_swarm(key, message, now)

    def _new_swarm(self, key: Digest, message: Join, now: float) -> Swarm:
        if len(self.swarms) >= MAX_SWARMS:
            raise RemoteProtocolError(f"more than {MAX_SWARMS} blobs at once")
        self._orders += 1
        swarm = self.swarms[key] = Swarm(message.blob, message.registry, self._orders, None, key=key)
        self.leading.begun(swarm, now)
        self._learn_size(swarm, message.size_bytes)
        if message.blob in self._holders:
            self._recall(swarm)
        self._registry(swarm).line_up(swarm)
        return swarm

    def _recall(self, swarm: Swarm) -> None:
        """Lease nothing of a blob that is held; take its checksums from an earlier swarm."""
        kept = self._archive.get(swarm.blob)
        if kept is not None:
            size_bytes, packed = kept
            self._learn_size(swarm, size_bytes)
            if swarm.size_bytes == size_bytes:
                swarm.done = dict(enumerate(unpack_checksums(packed, len(packed) // CHECKSUM_BYTES)))
        swarm.done_bits = swarm.full

    def _learn_size(self, swarm: Swarm, size_bytes: int) -> None:
        if swarm.chunks is None and size_bytes >= 0:
            swarm.chunks = ChunkMap.of(size_bytes)
            self._registry(swarm).line_up(swarm)

    def _registry(self, swarm: Swarm) -> Registry:
        return self._registries.setdefault(swarm.registry, Registry())

    def _read_have(self, swarm: Swarm, peer: PeerId, message: Join, now: float) -> None:
        assert swarm.chunks is not None
        bits, checksums = read_share(message, swarm.chunks)
        if bits and now < self._resettle_until:
            self._restarting = True
        for index, checksum in zip(members(bits), checksums, strict=True):
            if index not in swarm.done:
                self._note_done(swarm, index, checksum, peer)

    def _note_done(self, swarm: Swarm, index: int, checksum: Checksum, peer: PeerId) -> None:
        if peer not in self.reports.out:
            swarm.note_done(index, checksum, peer)
            self._fresh[swarm.key] = swarm

    def _leave(self, peer: PeerId, member: Member, blob: Digest) -> None:
        swarm = self._swarm(member, blob)
        if swarm is None or blob not in member.swarms:
            return
        del member.swarms[blob]
        swarm.members.discard(peer)
        swarm.refused.pop(peer, None)
        for index, (holder, _) in list(swarm.leases.items()):
            if holder == peer:
                self._end_lease(swarm, index, peer)
        if not swarm.members:
            del self.swarms[swarm.key]
            self._fresh.pop(swarm.key, None)
            self._court.ended(swarm)
            self.leading.ended(swarm.key)
            registry = self._registry(swarm)
            registry.first.pop(swarm.key, None)
            registry.rest.pop(swarm.key, None)

    def _on_stored(self, peer: PeerId, member: Member, blobs: Iterable[Digest]) -> None:
        for blob in blobs:
            if len(member.stored) < MAX_STORED:
                member.stored[blob] = None
                self._holders.setdefault(blob, Crowd()).add(peer)
            swarm = self._swarm(member, blob)
            if swarm is not None:
                swarm.done_bits = swarm.full
                if swarm.chunks is not None and len(swarm.done) == swarm.chunks.count:
                    packed = b"".join(checksum for _, checksum in sorted(swarm.done.items()))
                    self._archive.put(blob, swarm.size_bytes, packed)
                self._leave(peer, member, blob)

    def _unstore(self, peer: PeerId, blob: Digest) -> None:
        holders = self._holders[blob]
        holders.discard(peer)
        if not holders:
            del self._holders[blob]

    def _checksums(self, swarm: Swarm, indices: Iterable[int]) -> Checksums:
        listed = [index for index in indices if index in swarm.done]
        packed = b"".join(swarm.done[index] for index in listed)
        return Checksums(swarm.blob, swarm.size_bytes, pack_indices(listed), packed)

    def _push(self, swarm: Swarm, now: float) -> Outbox:
        message = self._checksums(swarm, swarm.fresh)
        swarm.fresh.clear()
        del self._fresh[swarm.key]
        self._push_from = max(self._push_from, now - PUSH_S) + PUSH_S_PER_MEMBER * len(swarm.members)
        return [(peer, message) for peer in swarm.members]

    # --------------------------------------------------------------- leases

    def _hand_out(self, now: float) -> Outbox:
        """Lease what nobody has, the first chunk of each of the next blobs first, then in the order of the joins."""
        if self._restarting and now < self._resettle_until:
            return []
        out: Outbox = []
        for registry in self._registries.values():
            if registry.paused_until <= now:
                self._lease_along(registry, registry.first, 1, now, out)
                self._lease_along(registry, registry.rest, -1, now, out)
        return out

    def _lease_along(self, registry: Registry, line: dict[Digest, Swarm], which: int, now: float, out: Outbox) -> None:
        """Lease chunks of the set `which` of the swarms in line, as far as the registry's number of leases goes."""
        through = []
        ahead = next((swarm.order for swarm in registry.rest.values()), 0) + FIRST_AHEAD
        for swarm in line.values():
            if which == 1 and swarm.order >= ahead:
                break
            most = registry.pace.among(len(swarm.members))
            while registry.runs < most and swarm.pending & which:
                peer = self._draw(swarm, most, now)
                if peer is None:
                    break
                self._lease(registry, swarm, self._run(swarm, peer), peer, now, out)
            if not swarm.pending & which:
                through.append(swarm.key)
            if registry.runs >= most:
                break
        for key in through:
            del line[key]

    def _run(self, swarm: Swarm, peer: PeerId) -> range:
        """Return the next chunks to lease to a member: no more than its share of what is left to lease."""
        pending = swarm.pending
        first = lowest(pending & swarm.urgent or pending)
        if swarm.chunks is None:
            return range(first, first + 1)
        share_bytes = -(-pending.bit_count() // len(swarm.members)) * swarm.chunks.chunk_bytes
        most_bytes = min(self.members[peer].run_bytes, MAX_RUN_BYTES, share_bytes)
        return run_from(first, pending, most_bytes, swarm.chunks.chunk_bytes)

    def _lease(self, registry: Registry, swarm: Swarm, indices: range, peer: PeerId, now: float, out: Outbox) -> None:
        run, member = Run(registry.pace.began(now), len(indices)), self.members[peer]
        for index in indices:
            self._note_lease(registry, swarm, run, index, peer, now)
        registry.count(run, True)
        member.leases += 1
        member.leased_ever += len(indices)
        self.leases_granted += len(indices)
        out.append((peer, Lease(swarm.blob, indices.start, int(LEASE_S * 1000), len(indices))))

    def _note_lease(self, registry: Registry, swarm: Swarm, run: Run, index: int, peer: PeerId, now: float) -> None:
        swarm.leases[index] = (peer, now + LEASE_S)
        swarm.leased_bits |= 1 << index
        registry.leases[swarm.key, index] = swarm, run

    def _draw(self, swarm: Swarm, leases: int, now: float) -> PeerId | None:
        """Return the member to lease a chunk to: one with less than its share, and of those one with few so far."""
        most = min(MEMBER_LEASES, -(-leases // len(swarm.members)))
        drawn = swarm.members.sample(2 * SAMPLE if len(swarm.members) <= 2 * SAMPLE else SAMPLE, self._rng)
        free = [
            peer
            for peer in drawn
            if self.members[peer].leases < self.members[peer].worth(most)
            and swarm.refused.get(peer, 0.0) <= now
            and peer not in self.reports.out
        ]
        if not free:
            return None
        fewest = min(self.members[peer].leased_ever for peer in free)
        return self._rng.choice([peer for peer in free if self.members[peer].leased_ever == fewest])

    def _end_lease(self, swarm: Swarm, index: int, peer: PeerId) -> bool:
        if swarm.leases.get(index, ("", 0.0))[0] != peer:
            return False
        del swarm.leases[index]
        swarm.leased_bits &= ~(1 << index)
        registry = self._registry(swarm)
        run = registry.leases.pop((swarm.key, index))[1]
        registry.line_up(swarm)
        run.left -= 1
        if not run.left:
            registry.count(run, False)
            if peer in self.members:
                self.members[peer].leases -= 1
        return True

    def _on_done(self, peer: PeerId, message: Done, now: float) -> Outbox:
        swarm = self._swarm(self.members[peer], message.blob)
        if swarm is None:
            return []
        if message.size_bytes and swarm.leases.get(message.index, ("", 0.0))[0] == peer:
            self._learn_size(swarm, message.size_bytes)
        if message.size_bytes != swarm.size_bytes:
            return []
        if not swarm.full >> message.index & 1:
            raise RemoteProtocolError(f"chunk {message.index} of a blob of {message.size_bytes} bytes")
        checksum = unpack_checksums(message.checksum, 1)[0]
        member = self.members[peer]
        member.run_bytes, member.lapses, member.tried = message.run_bytes, 0, True
        self._registry(swarm).measure(swarm, message.index, peer, now)
        held = self._end_lease(swarm, message.index, peer)
        # Without the lease (it lapsed, or an earlier scheduler gave it) the word counts only where no other has it.
        if message.index not in swarm.done and (held or message.index not in swarm.leases):
            self._note_done(swarm, message.index, checksum, peer)
        verdict = self._court.heard(swarm, message.index, checksum, peer)
        return [] if verdict is None else self._judged(peer, *verdict, now)

    def _on_failed(self, peer: PeerId, message: Failed, now: float) -> None:
        swarm = self._swarm(self.members[peer], message.blob)
        if swarm is None or not self._end_lease(swarm, message.index, peer):
            return
        swarm.refused[peer] = float("inf") if message.pause_ms == NEVER else now + FAILED_PAUSE_S
        if message.pause_ms > 0:
            registry = self._registry(swarm)
            registry.paused_until = now + min(message.pause_ms / 1000, MAX_PAUSE_S)
            registry.pace.refused(now)

    def _on_missing(self, peer: PeerId, message: Missing, now: float) -> Outbox:
        """Help an agent that sees no holder of some chunks: name one, or lease them again."""
        swarm = self._swarm(self.members[peer], message.blob)
        if swarm is None:
            return []
        stored = [
            other
            for other in self._holders.get(message.blob, Crowd()).sample(SAMPLE, self._rng)
            if other != peer and other not in self.reports.out
        ]
        named: dict[PeerId, None] = {}
        for index in unpack_indices(message.indices, 1 << 32)[:MISSING_AT_ONCE]:
            if index in swarm.leases:
                continue
            if not swarm.done_bits >> index & 1:
                swarm.urgent |= swarm.full & 1 << index
                continue
            holder = swarm.done_by.get(index, peer)
            gone = holder == peer or holder not in self.members or holder in self.reports.out
            there = stored if gone else [*stored, holder]
            since = swarm.missing.setdefault(index, now)
            if now - since >= 2 * STALE_DONE_S:
                # An old report, of another agent: it has found the chunk since.
                since = swarm.missing[index] = now
            if there and now - since < STALE_DONE_S:
                named[self._rng.choice(there)] = None
                continue
            swarm.done_bits &= ~(1 << index)
            for known in (swarm.done, swarm.done_by, swarm.missing):
                known.pop(index, None)
        self._registry(swarm).line_up(swarm)
        return self._naming.name(peer, swarm, named)
