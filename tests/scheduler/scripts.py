# SPDX-License-Identifier: Apache-2.0
"""Agents' words to a scheduler and its answers, with small numbers in the place of ids."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

from p2pdist.core.chunkmap import chunk_set, to_bytes
from p2pdist.core.packing import pack_indices
from p2pdist.core.wire import (
    Checksums,
    Done,
    Join,
    Lease,
    Message,
    Neighbours,
    PeerAddress,
)
from scheduler.pace import LEASES_MAX
from scheduler.swarm import ALONE, SchedulerState
from tests.strategies import CHUNK, checksum, digest, peer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from p2pdist.core.types import Digest, PeerId

B = digest(1)


def joining(
    have: Iterable[int] = (), *, chunks: int = 100, blob: Digest = B, registry: str = "r", size: int | None = None
) -> Join:
    listed = sorted(have)
    size = chunks * CHUNK if size is None else size
    bits = to_bytes(chunk_set(listed), chunks) if size >= 0 else b""
    return Join(blob, size, registry, bits, b"".join(checksum(index) for index in listed))


def done(index: int, *, chunks: int = 100, blob: Digest = B) -> Done:
    return Done(blob, chunks * CHUNK, index, checksum(index))


def pushed(*indices: int, chunks: int = 100) -> Checksums:
    return Checksums(B, chunks * CHUNK, pack_indices(indices), b"".join(checksum(index) for index in indices))


def address(number: int, site: str = "", port: int = 5051) -> PeerAddress:
    return PeerAddress(peer(number), f"host{number}", port, site)


class Script:
    """A scheduler and its clock, past the time after its start; `tried` agents have brought chunks before."""

    def __init__(
        self,
        *agents: int,
        degree: int = 20,
        seed: int = 0,
        started: float = -10.0,
        tried: bool = True,
        own_id: PeerId = ALONE,
    ) -> None:
        self.state = SchedulerState(Random(seed), degree=degree, started=started, own_id=own_id)
        self.now = 0.0
        for number in agents:
            self.state.connected(address(number))
            self.state.members[peer(number)].tried = tried

    def says(self, number: int, *said: Message) -> list[tuple[int, Message]]:
        out = [entry for message in said for entry in self.state.said(peer(number), message, self.now)]
        return plain(out)

    def gone(self, number: int) -> list[tuple[int, Message]]:
        return plain(self.state.gone(peer(number), self.now))

    def tick(self, at: float) -> list[tuple[int, Message]]:
        self.now = at
        return plain(self.state.tick(at))


def plain(out: list[tuple[object, Message]]) -> list[tuple[int, Message]]:  # type: ignore[misc]
    return [(int(str(to), 16), message) for to, message in out]


def leases(out: list[tuple[int, Message]]) -> list[tuple[int, int]]:
    """The leases among these messages: to whom, which chunk."""
    return [(to, message.index) for to, message in out if isinstance(message, Lease)]


def named(out: list[tuple[int, Message]]) -> dict[int, list[int]]:
    return {
        to: [int(entry.peer_id, 16) for entry in message.peers]
        for to, message in out
        if isinstance(message, Neighbours)
    }


def runs(out: list[tuple[int, Message]]) -> list[tuple[int, int]]:
    """The leases among these messages: from which chunk on, how many."""
    return [(message.index, message.count) for _, message in out if isinstance(message, Lease)]


def fast(index: int, *, chunks: int = 100) -> Done:
    """A chunk done by an agent that would fetch sixteen at once."""
    return replace(done(index, chunks=chunks), run_bytes=16 * CHUNK)


def check(state: SchedulerState) -> None:
    """The invariants."""
    out = 0
    for swarm in state.swarms.values():
        assert swarm.leased_bits == chunk_set(swarm.leases)
        assert not swarm.leased_bits & ~swarm.full
        assert len(swarm.members)
        assert all(peer in swarm.members for peer, _ in swarm.leases.values())
        assert not swarm.pending or swarm.key in state._registries[swarm.registry].rest
        assert not swarm.pending & 1 or swarm.key in state._registries[swarm.registry].first
        out += len(swarm.leases)
    assert out == sum(len(registry.leases) for registry in state._registries.values())
    for registry in state._registries.values():
        runs = {id(run): run for _, run in registry.leases.values()}
        assert registry.runs == sum(run.counted for run in runs.values()) <= LEASES_MAX
        assert sum(run.left for run in runs.values()) == len(registry.leases)
    every = [{id(run) for _, run in registry.leases.values()} for registry in state._registries.values()]
    assert sum(map(len, every)) == sum(member.leases for member in state.members.values())
    for number, member in state.members.items():
        assert all(number in state.swarms[key].members for key in member.swarms.values())
        assert all(number in state._holders[blob] for blob in member.stored)
