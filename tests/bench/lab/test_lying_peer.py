# SPDX-License-Identifier: Apache-2.0
"""What lying peers say and send on a connection, as a script."""

from __future__ import annotations

import pytest
import trio.testing

from bench.lab.lying_peer import GRANTS, Behaviour, Conversation
from p2pdist.core.chunkmap import ChunkMap, from_bytes
from p2pdist.core.types import Checksum, PeerId, parse_digest
from p2pdist.core.verify import checksum_of
from p2pdist.core.wire import VERSION, ChunkSpan, Decoder, Grant, Have, Hello, Message, Share, Take, encode

DIGEST = parse_digest("sha256:" + "a" * 64)
CHUNKS = ChunkMap.of(2 << 20)
AGENT = PeerId("1" * 32)
TRUTH = Checksum(b"t" * 16)
WISH = Share(DIGEST, CHUNKS.size_bytes, bytes(1), b"", True, "", False)


class Agent:
    """The other end of a liar's connection."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream, self._decoder = stream, Decoder()
        self.heard: list[Message | ChunkSpan] = []
        self.chunk = b""

    async def say(self, *messages: Message) -> None:
        await self._stream.send_all(b"".join(encode(message) for message in messages))

    async def hear(self, count: int) -> list[Message | ChunkSpan]:
        """Return the next `count` things that are not parts of a chunk."""
        while len(self.heard) < count:
            for item in self._decoder.feed(memoryview(await self._stream.receive_some(1 << 16))):
                if isinstance(item, ChunkSpan):
                    self.chunk += bytes(item.data)
                else:
                    self.heard.append(item)
        said, self.heard = self.heard[:count], self.heard[count:]
        return said


async def introduced(
    behaviour: Behaviour, nursery: trio.Nursery, sent: list[object]
) -> tuple[Agent, Conversation, Share]:
    ours, theirs = trio.testing.memory_stream_pair()
    truths = {DIGEST: {2: TRUTH}}
    liar = Conversation(
        stream=theirs,  # type: ignore[arg-type]  # any stream will do
        behaviour=behaviour,
        truths=truths,
        on_chunk=lambda *what: sent.append(what),
    )
    nursery.start_soon(liar.run)
    agent = Agent(ours)
    await agent.say(Hello(VERSION, "default", AGENT, 5051, "", "", ""), WISH)
    share, *grants = await agent.hear(1 + GRANTS)
    assert isinstance(share, Share)
    assert all(isinstance(grant, Grant) for grant in grants)
    return agent, liar, share


async def test_a_forger_has_all_chunks_and_sends_what_fits_its_own_checksums(nursery: trio.Nursery) -> None:
    sent: list[object] = []
    agent, _, share = await introduced(Behaviour.FORGE, nursery, sent)
    assert from_bytes(share.have, CHUNKS.count) == CHUNKS.full
    await agent.say(Take(1, DIGEST, 3))
    await agent.hear(1)
    assert checksum_of(agent.chunk) == share.checksums[3 * 16 : 4 * 16]
    assert sent == [(AGENT, DIGEST, 3)]


async def test_who_corrupts_says_what_is_right_and_sends_other_bytes(nursery: trio.Nursery) -> None:
    agent, liar, share = await introduced(Behaviour.CORRUPT, nursery, [])
    assert (from_bytes(share.have, CHUNKS.count), share.checksums) == (1 << 2, TRUTH)
    await liar.tell(DIGEST, {5: TRUTH})
    (have,) = await agent.hear(1)
    assert isinstance(have, Have)
    await agent.say(Take(1, DIGEST, 2))
    await agent.hear(1)
    assert len(agent.chunk) == CHUNKS.length(2)
    assert checksum_of(agent.chunk) != TRUTH


@pytest.mark.parametrize(("behaviour", "after_10_s"), [(Behaviour.STALL, 0), (Behaviour.TRICKLE, 10)])
async def test_who_stalls_takes_orders_and_sends_next_to_nothing(
    behaviour: Behaviour, after_10_s: int, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    agent, _, share = await introduced(behaviour, nursery, [])
    assert share.checksums == TRUTH
    await agent.say(Take(1, DIGEST, 2))
    with trio.move_on_after(9.5):
        await agent.hear(1)
    assert len(agent.chunk) == after_10_s
