# SPDX-License-Identifier: Apache-2.0
"""What must hold in every schedule. Each invariant has a name, by which a failing schedule is made smaller (shrink.py).

written once     no chunk is written that is in the store already, in the same life of a node
banned           nothing is taken, and nothing written, of a peer that is banned
ends right       once what was wrong has ended, every pull of an honest node that is there ends, and ends right
promise          a pull fails only where, for PROMISE_S, neither the origin nor peers could have given what it lacked
lease            of each scheduler: no chunk is leased twice at a time; who holds a lease is there; who has died or says
                 nothing has none left after DEAD_S; what is free goes to who may have it within one tick
egress           nobody fetches what it has, but what peers dispute; the origin gives each byte once, and again only for
                 what went wrong: a copy of the image for each node hit and each pull that failed, two for a scheduler,
                 one for each node where a partition, a lost scheduler without mDNS, or one that got all and gives
                 nothing leaves each alone, RECHECKS + 1 for each node that is lied to, LEASES chunks for each node that
                 waits while the origin fails, for each node what only a silent one had, and one copy where there is no
                 scheduler: who had all before the others came is not taken at its word (core/lease.py, DOUBTERS)
bounded          what an agent keeps in memory, and what waits on a connection, keeps within the limits
consistent       what a machine believes to have is what the store has; counts are what they count
protocol         no honest process finds that another honest one broke the protocol, or is banned by it without a cause
nothing left     45 s after the last pull no slot is in use, and nothing waits for anything
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.schedules.agent import MAX_INCOMING, RECHECKS, Agent
from bench.schedules.network import DEAD_S
from bench.schedules.plan import LIAR_KINDS, ORIGIN_KINDS, SCHEDULER_KINDS
from p2pdist.core import events as ev
from p2pdist.core import wire
from p2pdist.core.lease import LEASES
from p2pdist.core.reputation import Offence
from p2pdist.core.serve import GRANT_TIMEOUT_S
from p2pdist.errors import DeniedByOrigin, IntegrityError, StoreError
from scheduler.pace import MEMBER_LEASES
from scheduler.swarm import PUSH_S

if TYPE_CHECKING:
    from bench.schedules.agent import Link, Pull
    from bench.schedules.network import Actor
    from bench.schedules.tracker import Scheduler
    from bench.schedules.world import Blob, World
    from p2pdist.core.types import Digest, PeerId
    from p2pdist.errors import RemoteProtocolError
    from scheduler.ledger import Registry, Swarm

PROMISE_S = 25.0
"""ERROR_GIVE_UP_S, and what the last try had begun with: a source that was well for so long has been asked."""
LOOK_EVERY = 10
"""Ticks of an agent between two looks at its state."""
MAX_FETCHES = 12
MAX_QUEUED = 4000
"""Messages that a partition may hold up on one connection, in 20 s."""


class Violation(Exception):
    """Something does not hold."""

    def __init__(self, invariant: str, what: str, now: float) -> None:
        super().__init__(f"{invariant}: {what}, at {now:.2f} s")
        self.invariant = invariant


class Watch:
    """Looks at everything that happens in one world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.finished_s = 0.0
        self.failures = 0
        """Pulls that failed as they may."""
        self._ticks = 0
        self._leases: dict[tuple[str, int], dict[tuple[Digest, int], PeerId]] = {}
        self._absent: dict[str, float] = {}
        """Since when agents are dead or frozen."""
        self._silent_chunks = 0
        """Chunks that only a node had when it was frozen or unplugged."""

    @property
    def _somebody_lies(self) -> bool:
        """Whether wrong bytes are about, so that the honest may blame each other."""
        return bool(self.world.schedule.liars or self.world.origin.misled)

    def _fail(self, invariant: str, what: str) -> None:
        raise Violation(invariant, what, self.world.now)

    # ---------------------------------------------------------------- agents

    def writes(self, agent: Agent, event: ev.Event, command: ev.WriteChunk) -> None:
        what = f"node {agent.number} writes chunk {command.index} of {_short(command.blob)}"
        if command.index in agent.store.get(command.blob, {}):
            self._fail("written once", f"{what} again")
        if isinstance(event, ev.ChunkArrived) and event.source is not None:
            if agent.banned.get(event.source, 0.0) > self.world.now:
                self._fail("banned", f"{what}, which a banned peer sent")
            if event.index != command.index or event.blob != command.blob:
                self._fail("consistent", f"{what} when another came")

    def takes(self, agent: Agent, command: ev.TakeChunk) -> None:
        if agent.banned.get(command.peer, 0.0) > self.world.now:
            self._fail("banned", f"node {agent.number} takes chunk {command.index} from a banned peer")

    def banned(self, agent: Agent, command: ev.DropPeer) -> None:
        peer = self.world.agents[command.peer]
        slow = command.offence in (Offence.STALLED, Offence.SLOW_READER)
        if agent.liar is None and not self._somebody_lies and not slow:
            self._fail("protocol", f"node {agent.number} bans node {peer.number}, which is honest: {command.reason}")

    def broke_protocol(self, finder: Actor, sender: Actor, error: RemoteProtocolError) -> None:
        if not (isinstance(sender, Agent) and sender.liar is not None):
            self._fail("protocol", f"{_name(finder)} on {_name(sender)}: {error}")

    def overflows(self, agent: Agent, link: Link) -> None:
        if link.peer.liar is None:
            self._fail("bounded", f"node {agent.number} waits for {MAX_INCOMING} chunks of node {link.peer.number}")

    def fetches(self, agent: Agent, command: ev.FetchOrigin) -> None:
        progress = agent.machine.blobs.get(command.blob)
        for index in range(command.index, command.index + command.count):
            if progress is not None and progress.offered >> index & 1 and index not in progress.disputed:
                self._fail(
                    "egress", f"node {agent.number} fetches chunk {index} of {_short(command.blob)}, which it has"
                )

    def failed(self, agent: Agent, pull: Pull, causes: list[Exception]) -> None:
        """A pull has failed: was that allowed?"""
        self.failures += 1
        if agent.liar is not None:
            return
        blob = pull.blob
        what = f"node {agent.number} fails {_short(blob.digest)}: {causes[-1]!r}"
        if isinstance(causes[-1], StoreError):
            if not self.world.disk_is_full(agent):
                self._fail("promise", f"{what}, and the disk has room")
        elif isinstance(causes[-1], IntegrityError):
            if (agent.name, blob) not in self.world.origin.misled:
                self._fail("promise", f"{what}, and the origin gave it nothing wrong")
        elif isinstance(causes[-1], DeniedByOrigin):
            if not self.world.origin.denied(agent, pull.began_s):
                self._fail("promise", f"{what}, which the origin did not")
        elif self.world.now - self.world.origin.well_since(agent) > PROMISE_S:
            self._fail("promise", f"{what}, and the origin has been well for {PROMISE_S:.0f} s")
        elif not self._somebody_lies and self._could_get(agent, blob):
            self._fail("promise", f"{what}, and its peers have had what it lacked for {PROMISE_S:.0f} s")

    def _could_get(self, agent: Agent, blob: Blob) -> bool:
        """Whether undisturbed peers have had all that a node lacks of a blob for long."""
        then = self.world.now - PROMISE_S
        if self._disturbed(agent, then):
            return False
        lacking = set(range(blob.count)) - agent.store.get(blob.digest, {}).keys()
        for link in agent.links.values():
            other = link.peer
            if link.since <= then and other.alive and not self._disturbed(other, then):
                lacking -= {index for index in lacking if other.stored_at.get((blob.digest, index), then + 1) <= then}
        return not lacking

    def _disturbed(self, agent: Agent, since: float) -> bool:
        """Whether something that concerns its way to others has befallen a node since then."""
        now = self.world.now
        hits = (fault for fault in self.world.schedule.faults if fault.at_s <= now and fault.until_s >= since)
        return any(not fault.nodes or agent.number in fault.nodes or fault.kind == "parted" for fault in hits)

    def falls_silent(self, agent: Agent) -> None:
        """An agent is about to be frozen or unplugged."""
        others = [other.store for other in self.world.agents.values() if other is not agent and other.alive]
        for digest, here in agent.store.items():
            self._silent_chunks += sum(all(index not in store.get(digest, {}) for store in others) for index in here)

    def looked(self, agent: Agent) -> None:
        """An agent has ticked."""
        self._ticks += 1
        if self._ticks % LOOK_EVERY == 0:
            self.look_at(agent)

    def look_at(self, agent: Agent) -> None:
        """Compare an agent's state with its store and with the limits."""
        machine, who = agent.machine, f"node {agent.number}"
        peers, settings = machine.book.peers.values(), machine.state.settings
        taking, giving, leasing = machine._taking, machine._giving, machine._leasing
        under_way = [download for peer in peers for download in peer.downloads.values()]
        uploads = sum(len(peer.uploads) for peer in peers)
        counts = {
            "slots": (giving.slots_used, uploads),
            "downloads": (taking._downloads, sum(not download.late for download in under_way)),
            "requests": (leasing._requests, len({id(request) for request in leasing._fetching.values()})),
        }
        for name, (count, real) in counts.items():
            if count != real:
                self._fail("consistent", f"{who} counts {count} {name} where there are {real}")
        limits = {
            "slots": (uploads, settings.upload_slots),
            "downloads": (taking._downloads, settings.downloads),
            "requests to the origin": (leasing._requests, MAX_FETCHES),
            "blobs": (len(machine.blobs), len(self.world.blobs)),
            "messages held up": (max((link.connection.held() for link in agent.links.values()), default=0), MAX_QUEUED),
        }
        for name, (count, most) in limits.items():
            if count > most:
                self._fail("bounded", f"{who} has {count} {name}, more than {most}")
        for digest, pull in agent.pulls.items():
            progress = machine.blobs.get(digest)
            if progress is None:
                self._fail("ends right", f"{who} has forgotten its pull of {_short(digest)}")
            elif pull.blob.sized:
                here = sum(1 << index for index in agent.store.get(digest, {}))
                if progress.have != here or progress.offered & ~here:
                    self._fail("consistent", f"{who} has {here:b} of {_short(digest)} and believes {progress.have:b}")
                asked = sum(1 << index for index in progress.asked)
                if progress.inflight != asked:
                    self._fail("consistent", f"{who} waits for {progress.inflight:b} and asked for {asked:b}")

    # ------------------------------------------------------------ schedulers

    def leased(self, scheduler: Scheduler, peer: PeerId, message: wire.Lease) -> None:
        leases, state = self._leases.setdefault((scheduler.name, scheduler.life), {}), scheduler.state
        # Who says another size of a blob than others is in a swarm of its own.
        swarm = state._swarm(state.members[peer], message.blob)
        assert swarm is not None
        for index in range(message.index, message.index + message.count):
            holder = leases.get((swarm.key, index))
            if holder is not None and holder != peer and swarm.leases.get(index, ("", 0.0))[0] == holder:
                self._fail("lease", f"chunk {index} of {_short(message.blob)} is leased twice")
            leases[swarm.key, index] = peer

    def looked_at_scheduler(self, scheduler: Scheduler) -> None:
        """A scheduler has ticked."""
        for agent in self.world.agents.values():
            # A frozen one's kernel answers for it: it stays a member, and is tried again after growing pauses.
            if agent.alive:
                self._absent.pop(agent.peer_id, None)
            else:
                self._absent.setdefault(agent.peer_id, self.world.now)
        for registry in scheduler.state._registries.values():
            self._look_at_registry(scheduler, registry)
        for peer in scheduler.state.reports.out:
            # Who was unplugged or frozen has let chunks of all others go late.
            if not self._somebody_lies and not self._disturbed(self.world.agents[peer], 0.0):
                self._fail("protocol", f"{scheduler.name} shuts out who is honest")

    def _look_at_registry(self, scheduler: Scheduler, registry: Registry) -> None:
        state, now = scheduler.state, self.world.now
        runs: dict[int, int] = {}
        held: dict[PeerId, set[int]] = {}
        for (blob, index), (swarm, run) in registry.leases.items():
            holder, deadline = swarm.leases[index]
            runs[id(run)] = runs.get(id(run), 0) + 1
            held.setdefault(holder, set()).add(id(run))
            if holder not in state.members or holder not in swarm.members:
                self._fail("lease", f"chunk {index} of {_short(blob)} is leased to one that has gone")
            # One that was frozen ticks before it takes in what came meanwhile, also that a connection has ended.
            since = now if scheduler.thawed_at == now else self._absent.get(holder, now)
            if deadline <= now or now - since > DEAD_S + PUSH_S:
                self._fail("lease", f"chunk {index} of {_short(blob)} is leased to one that has been silent for long")
        counted = {id(run) for _, run in registry.leases.values() if run.counted}
        if registry.runs != len(counted) or any(run.left != runs[id(run)] for _, run in registry.leases.values()):
            self._fail("lease", f"{registry.runs} requests are counted where there are {len(counted)}")
        for peer, member in state.members.items():
            if member.leases != len(held.get(peer, ())):
                self._fail("lease", f"{member.leases} requests of a member are counted of {len(held.get(peer, ()))}")
        if registry.paused_until <= now and not (state._restarting and now < state._resettle_until):
            for swarm in state.swarms.values():
                self._look_at_swarm(scheduler, registry, swarm)

    def _look_at_swarm(self, scheduler: Scheduler, registry: Registry, swarm: Swarm) -> None:
        if not swarm.pending or registry.runs >= registry.pace.leases:
            return
        most = min(MEMBER_LEASES, -(-registry.pace.leases // len(swarm.members)))
        for peer in swarm.members:
            refused = swarm.refused.get(peer, 0.0) > self.world.now
            out = peer in scheduler.state.reports.out
            member = scheduler.state.members[peer]
            if member.leases < member.worth(most) and not refused and not out:
                self._fail("lease", f"chunks {swarm.pending:b} of {_short(swarm.blob)} are free, and leased to nobody")

    # ------------------------------------------------------------------- end

    def is_over(self) -> bool:
        """Whether every honest agent that is there has everything."""
        return all(agent.whole == self.world.blobs.keys() and not agent.pulls for agent in self.world.honest)

    def ended(self) -> None:
        """Check what must hold once all pulls should have ended."""
        world = self.world
        self.finished_s = world.now
        for agent in world.honest:
            for digest, blob in world.blobs.items():
                if digest in agent.pulls:
                    self._fail("ends right", f"node {agent.number} still pulls {_short(digest)}")
                if digest not in agent.whole:
                    self._fail("ends right", f"node {agent.number} has not got {_short(digest)}")
                if agent.store[digest] != dict(enumerate(blob.checksums)):
                    self._fail("ends right", f"node {agent.number} has wrong bytes of {_short(digest)}")
        read, most = sum(world.origin.reads[agent.name] for agent in world.agents.values()), self.egress_bound()
        if read > most:
            self._fail("egress", f"{read} chunks were read from the origin, more than {most:.0f}")

    def egress_bound(self) -> float:
        """Return the most chunks that the origin may give: all of them once, and what the faults may cost."""
        schedule, blobs = self.world.schedule, self.world.blobs.values()
        copies: float = 1 + (not schedule.schedulers) + self.failures
        # Its connections look well, those of an unplugged one for DEAD_S: the others wait for it, and each may then
        # fetch for itself what only it has.
        waiting = schedule.nodes * self._silent_chunks
        for fault in schedule.faults:
            if fault.kind in ("claims", "poisons", "wrong"):
                copies += (RECHECKS + 1) * schedule.nodes * max(1, len(fault.nodes))
            if fault.kind in ORIGIN_KINDS:
                waiting += schedule.nodes * LEASES
            elif fault.kind in ("parted", "stalls", "boasts") or (fault.kind in SCHEDULER_KINDS and not schedule.mdns):
                copies += schedule.nodes
            elif fault.kind == "slow link":
                # It fetches for itself after a while, and what it was leased lapses: others fetch that, and it again.
                copies += 2 * len(fault.nodes)
            elif fault.kind in SCHEDULER_KINDS:
                # Without it what a single node has is read again (core/lease.py, DOUBTERS), and the next life, or the
                # same one when its agents come back to it, does not know what is where: it leases all once more.
                copies += 2
            elif fault.kind not in LIAR_KINDS or fault.kind in ("corrupts", "resizes"):
                # Who says another size is in a swarm of its own, ...
                copies += len(fault.nodes)
                # ... and who is told that a manifest is larger than a chunk fetches it for itself.
                waiting += schedule.nodes * (fault.kind == "resizes" and schedule.manifest)
        return copies * sum(blob.count for blob in blobs) + waiting

    @property
    def egress_ratio(self) -> float:
        """Chunks read from the origin per chunk of all blobs."""
        return self.world.origin.egress.total() / sum(blob.count for blob in self.world.blobs.values())

    def nothing_left(self) -> None:
        """Check that no entry of a pull outlives it."""
        # Grants go on for as long as a liar says that it wants something.
        old = self.world.now - GRANT_TIMEOUT_S - 1
        for agent in self.world.honest:
            self.look_at(agent)
            machine, who = agent.machine, f"node {agent.number}"
            uploads = [upload for peer in machine.book.peers.values() for upload in peer.uploads.values()]
            left: dict[str, object] = {
                "fetches": machine._leasing._fetching,
                "due": machine._leasing._due,
                "granted": machine._leasing._granted,
                "ranked": machine._leasing._ranked,
                "waiting": machine._taking._waiting,
                "uploads": [upload for upload in uploads if upload.since < old],
                "downloads": [peer.downloads for peer in machine.book.peers.values() if peer.downloads],
                "asked": [progress.asked for progress in machine.blobs.values() if progress.asked],
                "late": [progress.late for progress in machine.blobs.values() if progress.late],
            }
            for name, entries in left.items():
                if entries:
                    self._fail("nothing left", f"{who} keeps {name}: {entries!r:.300}")
        for scheduler in self.world.schedulers:
            there = scheduler.alive and not scheduler.frozen
            if there and any(registry.leases for registry in scheduler.state._registries.values()):
                self._fail("nothing left", f"{scheduler.name} keeps leases")


def _short(digest: Digest) -> str:
    return f"blob {int(digest.partition(':')[2], 16)}"


def _name(actor: Actor) -> str:
    return f"node {actor.number}" if isinstance(actor, Agent) else actor.name
