# SPDX-License-Identifier: Apache-2.0
"""A played peer as a script: what the agent says goes in, what the peer says comes out."""

from __future__ import annotations

import pytest

from bench.node_peer_client import PlayedPeer, Wish
from p2pdist.core.chunkmap import ChunkMap, to_bytes
from p2pdist.core.packing import pack_indices
from p2pdist.core.types import parse_digest
from p2pdist.core.verify import checksum_of
from p2pdist.core.wire import (
    SPAN_BYTES,
    ChunkSpan,
    Decline,
    Decoder,
    Grant,
    Have,
    Hello,
    Message,
    Refuse,
    Share,
    Take,
    encode,
    span_header,
)

DIGEST = parse_digest("sha256:" + "a" * 64)
CHUNKS = ChunkMap.of(600_000)
CONTENT = bytes(range(251)) * 2391
WISH = Wish("127.0.0.1", 5051, DIGEST, CHUNKS.size_bytes, 1, 0, 0)


def chunk(index: int) -> bytes:
    return CONTENT[CHUNKS.start(index) : CHUNKS.start(index) + CHUNKS.length(index)]


def sent(index: int, number: int) -> bytes:
    data = chunk(index)
    spans = [data[at : at + SPAN_BYTES] for at in range(0, len(data), SPAN_BYTES)]
    return b"".join(span_header(number, len(span)) + span for span in spans)


def said(data: bytes) -> list[Message | ChunkSpan]:
    return Decoder().feed(memoryview(data))


def hear(peer: PlayedPeer, data: bytes) -> list[Message | ChunkSpan]:
    return said(peer.receive(memoryview(data)))


def introduced() -> PlayedPeer:
    """A peer that knows that the agent has all three chunks."""
    peer = PlayedPeer(WISH, 0)
    checksums = b"".join(checksum_of(chunk(index)) for index in range(3))
    assert not hear(peer, encode(Share(DIGEST, CHUNKS.size_bytes, to_bytes(7, 3), checksums, False, "", True)))
    return peer


def taken(messages: list[Message | ChunkSpan]) -> Take:
    (take,) = (message for message in messages if isinstance(message, Take))
    return take


def test_it_greets_and_wants_the_whole_blob() -> None:
    hello, share = said(PlayedPeer(WISH, 0).greeting())
    assert isinstance(hello, Hello)
    assert isinstance(share, Share)
    assert (share.blob, share.size_bytes, share.have, share.wants) == (DIGEST, 600_000, b"\0", True)


def test_peers_have_names_and_orders_of_their_own() -> None:
    names = {said(PlayedPeer(WISH, number).greeting())[0] for number in range(4)}
    assert len(names) == 4


def test_it_takes_each_chunk_once_says_what_it_has_and_declines_when_it_has_all() -> None:
    peer, indices, announced = introduced(), [], []
    for number in range(3):
        messages = hear(peer, encode(Grant(number)))
        announced += [message.indices for message in messages if isinstance(message, Have)]
        indices.append(taken(messages).index)
        assert not peer.done
        hear(peer, sent(indices[-1], number))
    assert sorted(indices) == [0, 1, 2]
    assert peer.done
    assert peer.payload_bytes == 600_000
    assert hear(peer, encode(Grant(3))) == [
        Have(DIGEST, pack_indices([indices[2]]), checksum_of(chunk(indices[2]))),
        Decline(3, False),
    ]
    assert announced == [pack_indices([index]) for index in indices[:2]]


def test_a_chunk_that_is_not_what_was_announced_ends_the_measurement() -> None:
    peer = introduced()
    index = taken(hear(peer, encode(Grant(0)))).index
    with pytest.raises(ValueError, match="not what was announced"):
        peer.receive(memoryview(sent(index, 0)[:-1] + b"\xff"))


def test_a_refused_chunk_ends_the_measurement() -> None:
    peer = introduced()
    peer.receive(memoryview(encode(Grant(0))))
    with pytest.raises(ValueError, match="refused"):
        peer.receive(memoryview(encode(Refuse(0))))
