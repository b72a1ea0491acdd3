# SPDX-License-Identifier: Apache-2.0
"""What agents do that are not honest: around a production machine, so that all else is as others expect it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bench.schedules.agent import ChunkBytes
from p2pdist.core import wire
from p2pdist.core.chunkmap import MIN_CHUNK_BYTES, ChunkMap, from_bytes, members, to_bytes
from p2pdist.core.packing import unpack_checksums
from p2pdist.core.verify import checksum_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.schedules.agent import Agent, Link
    from bench.schedules.plan import Fault
    from bench.schedules.world import Blob
    from p2pdist.core.types import Checksum, Digest, PeerId

_GRANT_S = 0.3
_BOAST_S = 0.3


class Liar:
    """The conduct of one agent; each kind of lie with the ratio of its fault."""

    def __init__(self, agent: Agent, faults: list[Fault]) -> None:
        self._agent = agent
        self._ratios = {fault.kind: fault.ratio for fault in faults}
        self._rng = agent.network.rng(f"{agent.peer_id}/lies")
        self._grants: set[tuple[PeerId, int]] = set()
        """Its own, not its machine's."""
        self._stalled: dict[int, bool] = {}
        self._sizes: dict[Digest, int] = {}
        """What it says of each blob's size."""
        if self._ratios.keys() & {"claims", "resizes"}:
            agent.spawn(self._grant())
        if "boasts" in self._ratios:
            agent.spawn(self._boast())

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
        """Return what it says to a peer in the place of what its machine says."""
        if not isinstance(message, wire.Share):
            return message
        size_bytes = self._size(message.blob, message.size_bytes)
        claims = "claims" in self._ratios and message.size_bytes >= 0
        if size_bytes == message.size_bytes and not claims:
            return message
        have, checksums = self._shares(message, size_bytes, everything=claims or message.size_bytes < 0)
        return replace(message, size_bytes=size_bytes, have=have, checksums=checksums, media_type="")

    def tells(self, message: wire.Message) -> wire.Message:
        """Return what it tells a scheduler in the place of what its machine tells."""
        if not isinstance(message, wire.Join | wire.Done):
            return message
        size_bytes = self._size(message.blob, message.size_bytes)
        if size_bytes == message.size_bytes:
            return message
        if isinstance(message, wire.Done):
            return replace(message, size_bytes=size_bytes)
        have, checksums = self._shares(message, size_bytes, everything=False)
        return replace(message, size_bytes=size_bytes, have=have, checksums=checksums)

    def _size(self, blob: Digest, size_bytes: int) -> int:
        """Return what it says of a blob's size: always the same, but where it is honest about this blob."""
        if "resizes" not in self._ratios:
            return size_bytes
        if blob not in self._sizes:
            right = self._agent.world.blobs[blob].size_bytes
            wrong = self._rng.choice((0, 1, right // 2, right + 1, right + MIN_CHUNK_BYTES))
            self._sizes[blob] = wrong if self._does("resizes") else -1
        return size_bytes if self._sizes[blob] < 0 else self._sizes[blob]

    def _shares(self, message: wire.Share | wire.Join, size_bytes: int, *, everything: bool) -> tuple[bytes, bytes]:
        """Return what it says to have of a blob of this size, and the checksums of that."""
        known = 0 if message.size_bytes < 0 else ChunkMap.of(message.size_bytes).count
        bits, cut = from_bytes(message.have, known) if known else 0, ChunkMap.of(size_bytes)
        own = dict(zip(members(bits), unpack_checksums(message.checksums, bits.bit_count()), strict=True))
        said = cut.full if everything else bits & cut.full
        checksums = (own[index] if index in own else self._fake(message.blob, index) for index in members(said))
        return to_bytes(said, cut.count), b"".join(checksums)

    def hears(self, link: Link, message: wire.Message) -> bool:
        """Deal with what concerns its own grants; return whether its machine is not to hear of it."""
        if not isinstance(message, wire.Take | wire.Decline | wire.Cancel):
            return False
        if (link.peer.peer_id, message.number) not in self._grants:
            return False
        if isinstance(message, wire.Take):
            answers: list[object] = [ChunkBytes(message.number, self._fake(message.blob, message.index)), None]
            answers += [ChunkBytes(message.number, checksum_of(b"noise")), wire.Refuse(message.number)]
            lies = "claims" in self._ratios or self._sizes.get(message.blob, -1) >= 0
            answer = self._rng.choice(answers if lies else answers[-1:])
            if answer is not None:
                late_s = self._agent.world.chunk_s(self._agent)
                link.connection.post(self._agent, answer, late_s)
        return True

    def _grant(self) -> Iterator[float]:
        while True:
            yield _GRANT_S
            for link in list(self._agent.links.values()):
                known = self._agent.machine.book.peers.get(link.peer.peer_id)
                if known is not None and (self._does("claims") or self._does("resizes")):
                    number = known.number()
                    self._grants.add((link.peer.peer_id, number))
                    link.connection.post(self._agent, wire.Grant(number))

    def _boast(self) -> Iterator[float]:
        while True:
            yield _BOAST_S
            for line in list(self._agent.tracking.lines.values()):
                if self._does("boasts"):
                    line.post(self._agent, wire.Stored(sorted(self._agent.world.blobs)))
