# SPDX-License-Identifier: Apache-2.0
"""The world of one schedule: its agents, schedulers and origin, and its faults as they come.

`play` runs a schedule to its end and raises Violation where something does not hold (oracle.py). Deterministic: the
same schedule gives the same world.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.schedules.agent import Agent
from bench.schedules.liars import Liar
from bench.schedules.network import Network
from bench.schedules.oracle import Watch
from bench.schedules.origin import Origin
from bench.schedules.plan import LIAR_KINDS, Schedule
from bench.schedules.tracker import Scheduler
from p2pdist.core.chunkmap import MIN_CHUNK_BYTES, ChunkMap
from p2pdist.core.types import Checksum, Digest, PeerId
from p2pdist.core.verify import checksum_of

if TYPE_CHECKING:
    from bench.schedules.plan import Fault

MANIFEST_BYTES = 3000
ENLIST_S = 0.5
"""Schedulers are found, and neighbours met, within so long."""
LIMIT_S = 400.0
"""After the last fault has ended, by when every pull must have: GIVE_UP_S and the retries of failed ones."""
AFTER_S = 45.0
"""Then until all slots must be free: grants that nobody answers, chunks that are late, what is still being fetched."""


@dataclass(frozen=True)
class Blob:
    """A blob of the world. `sized` False: a manifest, of which the agents know only the digest at first."""

    digest: Digest
    size_bytes: int
    checksums: tuple[Checksum, ...]
    sized: bool = True

    @property
    def count(self) -> int:
        return len(self.checksums)

    @classmethod
    def numbered(cls, number: int, size_bytes: int, *, sized: bool = True) -> Blob:
        """Return a blob of this size; its number makes its digest and its content."""
        digest, count = Digest(f"sha256:{number:064x}"), ChunkMap.of(size_bytes).count
        checksums = tuple(checksum_of(f"{digest}/{index}".encode()) for index in range(count))
        return cls(digest, size_bytes, checksums, sized)

    def __hash__(self) -> int:
        return hash(self.digest)


class World(Network):
    """All of it."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule.seed)
        self.schedule = schedule
        self.imports: Counter[str] = Counter()
        """Chunks that came into each rack from another."""
        self.retries = True
        """Whether runtimes ask again for what failed."""
        self.watch = Watch(self)
        self.origin = Origin(self, schedule)
        sizes = [count * MIN_CHUNK_BYTES - 7 for count in schedule.chunks]
        blobs = [Blob.numbered(number, size) for number, size in enumerate(sizes, 1)]
        if schedule.manifest:
            blobs.append(Blob.numbered(len(blobs) + 1, MANIFEST_BYTES, sized=False))
        self.blobs = {blob.digest: blob for blob in blobs}
        self.schedulers = [Scheduler(self, number) for number in range(schedule.schedulers)]
        racks = [f"/r{number % schedule.racks}" if schedule.racks else "" for number in range(schedule.nodes)]
        self.agents = {self.peer_id(number): Agent(self, number, rack) for number, rack in enumerate(racks)}
        self._links = self.rng("links")
        self._slow = [fault for fault in schedule.faults if fault.kind == "slow link"]
        self._full = [fault for fault in schedule.faults if fault.kind == "disk full"]

    @staticmethod
    def peer_id(number: int) -> PeerId:
        return PeerId(f"{number + 1:032x}")

    def agent(self, number: int) -> Agent:
        return self.agents[self.peer_id(number)]

    @property
    def honest(self) -> list[Agent]:
        """The agents that are there and do not lie."""
        return [agent for agent in self.agents.values() if agent.alive and agent.liar is None]

    def chunk_s(self, sender: Agent) -> float:
        """Return what the sender's next chunk takes where nothing is slow."""
        return self.schedule.chunk_s * sender.rng.uniform(1, 4)

    def slowness(self, sender: Agent, receiver: Agent) -> float:
        """Return how many times as long a chunk takes between two nodes now."""
        slow = 1.0
        for fault in self._slow:
            if fault.hits(sender.number, self.now) or fault.hits(receiver.number, self.now):
                slow = max(slow, fault.ratio)
        return slow

    def disk_is_full(self, agent: Agent) -> bool:
        return any(fault.hits(agent.number, self.now) for fault in self._full)

    def enlist(self, agent: Agent) -> None:
        """Let an agent find its schedulers, and by mDNS all other agents."""
        agent.tracking.begin()
        for other in self.agents.values():
            if self.schedule.mdns and other is not agent:
                self.after(agent.rng.uniform(0, ENLIST_S), agent.act, agent.meet, other.peer_id)

    # ------------------------------------------------------------------ play

    def play(self) -> None:
        """Run to the end of all pulls, and check what must hold then.

        Raises:
            Violation: something does not hold.
        """
        self.begin()
        for agent in self.agents.values():
            start_s = ENLIST_S + self.rng(f"start/{agent.number}").uniform(0, self.schedule.spread_s)
            self.at(start_s, agent.act, self.pull_all, agent)
        self.run(max(self.schedule.quiet_s, self.schedule.spread_s + ENLIST_S))
        self.settle()

    def settle(self) -> None:
        """Run until all pulls have ended, and nothing can be under way any more; check what must hold then.

        Raises:
            Violation: something does not hold.
        """
        until = self.now + LIMIT_S
        while self.now < until and not self.watch.is_over():
            self.run(self.now + 1)
        self.retries = False
        self.watch.ended()
        self.run(self.now + AFTER_S)
        self.watch.nothing_left()

    def begin(self) -> None:
        """Let all agents find each other, and put the faults in the calendar; nobody pulls yet."""
        for agent in self.agents.values():
            lies = [fault for fault in self.schedule.faults if fault.kind in LIAR_KINDS and agent.number in fault.nodes]
            if lies:
                agent.liar = Liar(agent, lies)
            self.enlist(agent)
        for fault in self.schedule.faults:
            self.at(fault.at_s, self._strike, fault)

    def pull_all(self, agent: Agent, *, shared: bool = True) -> None:
        for blob in self.blobs.values():
            agent.pull(blob, shared=shared)

    def _strike(self, fault: Fault) -> None:
        names = frozenset(self.peer_id(node) for node in fault.nodes)
        match fault.kind:
            case "parted":
                self.part(names, fault.until_s)
            case "loses scheduler":
                self.part(names, fault.until_s, frozenset(scheduler.name for scheduler in self.schedulers))
            case "killed" | "unplugged":
                for agent in map(self.agent, fault.nodes):
                    self._kill(agent, fault)
            case "frozen":
                for agent in map(self.agent, fault.nodes):
                    self._freeze(agent, fault)
            case "evicts":
                for agent in map(self.agent, fault.nodes):
                    agent.act(self._evict, agent)
            case "reset":
                for agent in map(self.agent, fault.nodes):
                    agent.act(agent.reset)
            case "scheduler killed":
                for scheduler in (self.schedulers[number] for number in fault.nodes):
                    self._kill_scheduler(scheduler, fault)
            case "scheduler frozen":
                for scheduler in (self.schedulers[number] for number in fault.nodes):
                    self._freeze(scheduler, fault)

    def _kill(self, agent: Agent, fault: Fault) -> None:
        if agent.alive:
            if fault.kind == "unplugged":
                self.watch.falls_silent(agent)
            agent.die(silently=fault.kind == "unplugged")
            if fault.for_s:
                self.at(fault.until_s, self._restart, agent, agent.life)

    def _restart(self, agent: Agent, life: int) -> None:
        if agent.life == life and not agent.alive:
            agent.start()
            self.after(agent.rng.uniform(0, ENLIST_S), agent.act, self.pull_all, agent)

    def _kill_scheduler(self, scheduler: Scheduler, fault: Fault) -> None:
        if scheduler.alive:
            scheduler.die()
            if fault.for_s:
                life = scheduler.life
                self.at(fault.until_s, lambda: scheduler.start() if scheduler.life == life else None)

    def _freeze(self, actor: Agent | Scheduler, fault: Fault) -> None:
        if actor.alive and not actor.frozen:
            life = actor.life
            if isinstance(actor, Agent):
                self.watch.falls_silent(actor)
            actor.freeze()
            if fault.for_s:
                self.at(fault.until_s, lambda: actor.thaw() if actor.life == life else None)

    def _evict(self, agent: Agent) -> None:
        if agent.whole:
            blob = self.blobs[agent.rng.choice(sorted(agent.whole))]
            agent.evict(blob)
            self.after(agent.rng.uniform(0, 5), agent.act, agent.pull, blob)
