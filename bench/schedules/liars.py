# SPDX-License-Identifier: Apache-2.0
"""What agents do that are not honest: around a production machine, so that all else is as others expect it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.schedules.agent import ChunkBytes
from p2pdist.core import wire
from p2pdist.core.chunkmap import ChunkMap, from_bytes, members, to_bytes
from p2pdist.core.packing import unpack_checksums
from p2pdist.core.verify import checksum_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.schedules.agent import Agent, Link
    from bench.schedules.plan import Fault
    from bench.schedules.world import Blob
    from p2pdist.core.types import Checksum, PeerId

_GRANT_S = 0.3


class Liar:
    """The conduct of one agent; each kind of lie with the ratio of its fault."""

    def __init__(self, agent: Agent, faults: list[Fault]) -> None:
        self._agent = agent
        self._ratios = {fault.kind: fault.ratio for fault in faults}
        self._rng = agent.network.rng(f"{agent.peer_id}/lies")
        self._grants: set[tuple[PeerId, int]] = set()
        """Its own, not its machine's."""
        self._stalled: dict[int, bool] = {}
        if "claims" in self._ratios:
            agent.spawn(self._grant())

    def _does(self, kind: str) -> bool:
        return self._rng.random() < self._ratios.get(kind, 0.0)

    @property
    def misleads(self) -> bool:
        """Whether it takes for right what is wrong."""
        return "poisons" in self._ratios

    def fetches(self, blob: Blob, index: int, checksum: Checksum) -> Checksum:
        """Return what it makes of a chunk from the origin."""
        return self._fake(blob.digest, index) if self._does("poisons") else checksum

    def sends(self, checksum: Checksum) -> Checksum:
        """Return what it makes of a chunk that it sends."""
        return checksum_of(b"damaged") if self._does("corrupts") else checksum

    def stalls(self, number: int) -> bool:
        """Whether it lets a chunk that was taken lie; for good, once it does."""
        if number not in self._stalled:
            self._stalled[number] = self._does("stalls")
        return self._stalled[number]

    def _fake(self, digest: str, index: int) -> Checksum:
        return checksum_of(f"fake {digest}/{index}".encode())

    def says(self, message: wire.Message) -> wire.Message:
        """Return what it says in the place of what its machine says: it has all of each blob."""
        if "claims" not in self._ratios or not isinstance(message, wire.Share) or message.size_bytes < 0:
            return message
        count = ChunkMap.of(message.size_bytes).count
        have = from_bytes(message.have, count)
        own = dict(zip(members(have), unpack_checksums(message.checksums, have.bit_count()), strict=True))
        checksums = [own[index] if have >> index & 1 else self._fake(message.blob, index) for index in range(count)]
        full = to_bytes((1 << count) - 1, count)
        return wire.Share(message.blob, message.size_bytes, full, b"".join(checksums), message.wants, "", message.reply)

    def hears(self, link: Link, message: wire.Message) -> bool:
        """Deal with what concerns its own grants; return whether its machine is not to hear of it."""
        if not isinstance(message, wire.Take | wire.Decline | wire.Cancel):
            return False
        if (link.peer.peer_id, message.number) not in self._grants:
            return False
        if isinstance(message, wire.Take):
            answers: list[object] = [ChunkBytes(message.number, self._fake(message.blob, message.index)), None]
            answers += [ChunkBytes(message.number, checksum_of(b"noise")), wire.Refuse(message.number)]
            answer = self._rng.choice(answers)
            if answer is not None:
                late_s = self._agent.world.chunk_s(self._agent)
                link.connection.post(self._agent, answer, late_s)
        return True

    def _grant(self) -> Iterator[float]:
        while True:
            yield _GRANT_S
            for link in list(self._agent.links.values()):
                known = self._agent.machine.book.peers.get(link.peer.peer_id)
                if known is not None and self._does("claims"):
                    number = known.number()
                    self._grants.add((link.peer.peer_id, number))
                    link.connection.post(self._agent, wire.Grant(number))
