# SPDX-License-Identifier: Apache-2.0
"""A schedule: a small swarm, what it pulls, and what goes wrong when. Plain data, drawn from a seed. Pure.

Nodes are numbered from 0. Times are virtual seconds; a fault lasts `for_s`, for good where that is 0 and its kind
has a duration at all. Dropping a fault or a node leaves the randomness of all others as it is (network.py), so that a
failing schedule can be made smaller.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Any

ORIGIN_KINDS = ("error", "busy", "refused", "silent", "slow", "wrong", "denied")
"""What a registry does: answers 503; 429 with Retry-After; refuses connections; says nothing; gives a chunk in seconds;
gives wrong bytes; denies the blob."""
LIAR_KINDS = ("corrupts", "stalls", "claims", "poisons", "resizes", "boasts")
"""What a peer does that is not honest: damages chunks that it sends; grants and sends nothing; claims chunks that it
does not have; damages what it fetches, and vouches for it; says another size of a blob; tells schedulers again and
again that it has stored all."""
NODE_KINDS = ("killed", "unplugged", "frozen", "parted", "slow link", "disk full", "evicts", "loses scheduler", "reset")
"""What befalls a node: kill -9 (with `for_s`, it comes back); the same without a word to its peers; SIGSTOP; a
partition between `nodes` and all others; a link `ratio` times as slow; writes fail; a stored blob goes, and is wanted
again later; the way to the schedulers is cut; all of its connections break, with what is on its way."""
SCHEDULER_KINDS = ("scheduler killed", "scheduler frozen")
"""`nodes` are numbers of schedulers here."""
KINDS = (*ORIGIN_KINDS, *LIAR_KINDS, *NODE_KINDS, *SCHEDULER_KINDS)
MOMENTARY = ("evicts", "reset")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong. `nodes` empty, for what the origin does: with all nodes."""

    kind: str
    at_s: float
    for_s: float = 0.0
    nodes: tuple[int, ...] = ()
    ratio: float = 1.0

    @property
    def until_s(self) -> float:
        return self.at_s + self.for_s if self.for_s or self.kind in MOMENTARY else float("inf")

    def hits(self, node: int, now: float) -> bool:
        """Whether it befalls this node now."""
        return self.at_s <= now < self.until_s and (not self.nodes or node in self.nodes)

    def __str__(self) -> str:
        numbers = ", ".join(map(str, self.nodes))
        if self.kind in ORIGIN_KINDS:
            what = f"origin: {self.kind} to {f'node {numbers}' if self.nodes else 'all'}"
        elif self.kind in SCHEDULER_KINDS:
            what = f"scheduler {numbers}: {self.kind.removeprefix('scheduler ')}"
        else:
            what = f"node {numbers}: {self.kind}"
        lasts = "" if self.kind in MOMENTARY else f" for {self.for_s:.2f} s" if self.for_s else " for good"
        return f"{self.at_s:7.2f} s  {what}{lasts}" + (f" ({self.ratio:g})" if self.ratio != 1.0 else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A swarm and its faults.

    Args:
        chunks: of each blob.
        manifest: whether each node also pulls one blob of which it knows only the digest.
        schedulers: 0, 1 or 2.
        mdns: whether all nodes know each other without one; they do where there is none.
        chunk_s: what a chunk takes from node to node at least, and four times that at most.
        spread_s: the pulls start within so long.
        racks: 0 for none.
    """

    seed: int
    nodes: int
    chunks: tuple[int, ...]
    manifest: bool = False
    schedulers: int = 0
    mdns: bool = True
    chunk_s: float = 0.05
    spread_s: float = 1.0
    racks: int = 0
    faults: tuple[Fault, ...] = ()

    @property
    def liars(self) -> frozenset[int]:
        return frozenset(node for fault in self.faults if fault.kind in LIAR_KINDS for node in fault.nodes)

    @property
    def quiet_s(self) -> float:
        """When the last fault that ends has ended, and the last that does not has begun."""
        ends = (fault.at_s if fault.until_s == float("inf") else fault.until_s for fault in self.faults)
        return max(ends, default=0.0)

    def without_node(self, node: int) -> Schedule:
        """Return it without the last node, or without a node in the middle, whose followers move up."""

        def moved(fault: Fault) -> Fault | None:
            if fault.kind in SCHEDULER_KINDS or not fault.nodes:
                return fault
            left = tuple(each - (each > node) for each in fault.nodes if each != node)
            return replace(fault, nodes=left) if left else None

        faults = tuple(fault for fault in map(moved, self.faults) if fault is not None)
        return replace(self, nodes=self.nodes - 1, faults=faults)

    def __str__(self) -> str:
        blobs = " + ".join(map(str, self.chunks)) + (" chunks and a manifest" if self.manifest else " chunks")
        schedulers = {0: "no scheduler", 1: "a scheduler"}.get(self.schedulers, f"{self.schedulers} schedulers")
        schedulers += " and mDNS" if self.schedulers and self.mdns else ""
        racks = f", {self.racks} racks" if self.racks else ""
        head = f"{self.nodes} nodes, {schedulers}{racks}, {blobs} of {self.chunk_s:g} s, within {self.spread_s:g} s"
        return "\n".join([f"seed {self.seed}: {head}", *map(str, sorted(self.faults, key=lambda fault: fault.at_s))])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Schedule:
        """Return what `as_dict` gave. Raises TypeError, KeyError where it is none."""
        faults = tuple(Fault(**{**fault, "nodes": tuple(fault["nodes"])}) for fault in facts["faults"])
        return cls(**{**facts, "chunks": tuple(facts["chunks"]), "faults": faults})


def draw(seed: int) -> Schedule:
    """Return the schedule of a seed: 3 to 8 nodes, 4 to 24 chunks in 1 to 3 blobs, and up to 6 faults."""
    rng = Random(f"{seed}/schedule")
    nodes, schedulers = rng.randint(3, 8), rng.choice((0, 1, 1, 2))
    blobs = rng.randint(1, 3)
    base = Schedule(
        seed=seed,
        nodes=nodes,
        chunks=tuple(rng.randint(4 if blobs == 1 else 1, 24 // blobs) for _ in range(blobs)),
        manifest=rng.random() < 0.3,
        schedulers=schedulers,
        mdns=not schedulers or rng.random() < 0.5,
        chunk_s=rng.choice((0.02, 0.05, 0.2, 0.6)),
        spread_s=round(rng.uniform(0.1, 3), 2),
        racks=rng.choice((0, 0, 0, 2)),
    )
    return replace(base, faults=tuple(_fault(rng, base) for _ in range(rng.randint(1, 6))))


def _fault(rng: Random, schedule: Schedule) -> Fault:
    families = [ORIGIN_KINDS, LIAR_KINDS, NODE_KINDS, NODE_KINDS] + [SCHEDULER_KINDS] * bool(schedule.schedulers)
    kind = rng.choice(rng.choice(families))
    about_s = 0.5 + schedule.spread_s + sum(schedule.chunks) * schedule.chunk_s
    at_s, for_s = round(rng.uniform(0, about_s), 2), round(rng.uniform(0.1, 2) * rng.choice((1, 5, 20)), 2)

    def some(most: int) -> tuple[int, ...]:
        return tuple(sorted(rng.sample(range(schedule.nodes), most)))

    nodes, ratio = some(1), 1.0
    if kind in ORIGIN_KINDS:
        nodes = () if rng.random() < 0.6 else some(rng.randint(1, schedule.nodes - 1))
        ratio = {"busy": rng.choice((1.0, 5.0, 30.0)), "wrong": rng.choice((0.2, 1.0))}.get(kind, 1.0)
    elif kind in LIAR_KINDS:
        nodes = some(1 if rng.random() < 0.8 else 2)
        at_s, for_s, ratio = 0.0, 0.0, rng.choice((0.1, 0.5, 1.0))
    elif kind in SCHEDULER_KINDS:
        nodes = (rng.randrange(schedule.schedulers),)
        for_s *= rng.random() < 0.8
    elif kind == "parted":
        nodes = some(rng.randint(1, schedule.nodes - 1))
    elif kind == "slow link":
        ratio = rng.choice((5.0, 30.0, 200.0))
    elif kind in ("killed", "unplugged"):
        for_s *= rng.random() < 0.7
    elif kind in MOMENTARY:
        for_s = 0.0
    return Fault(kind=kind, at_s=at_s, for_s=for_s, nodes=nodes, ratio=ratio)
