# SPDX-License-Identifier: Apache-2.0
"""The wire: what is sent is what arrives, however it is cut up, and what is malformed ends the connection."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2pdist.core import wire
from p2pdist.core.chunkmap import MAX_BLOB_BYTES
from p2pdist.core.wire import ChunkSpan, Decoder, Grant, Message, Take, decode_message, encode, span_header
from p2pdist.errors import RemoteProtocolError
from tests.strategies import KINDS, digest, messages, messages_of, peer

BLOB = digest(1)


def frame(*parts: object) -> bytes:
    body = msgpack.packb(list(parts))
    return struct.pack(">IB", len(body) + 1, 0) + body


def fed(stream: bytes, sizes: list[int]) -> list[Message | tuple[int, bytes]]:
    """Feed the stream in parts of these sizes, over and over; copy the chunk bytes out."""
    decoder, out, at, turn = Decoder(), [], 0, 0
    while at < len(stream):
        size = sizes[turn % len(sizes)]
        for item in decoder.feed(memoryview(stream)[at : at + size]):
            out.append((item.number, bytes(item.data)) if isinstance(item, ChunkSpan) else item)  # noqa: PERF401
        at, turn = at + size, turn + 1
    return out


def joined(items: list[Message | tuple[int, bytes]]) -> list[Message | tuple[int, bytes]]:
    """Join the spans of a chunk that come right after each other."""
    out: list[Message | tuple[int, bytes]] = []
    for item in items:
        last = out[-1] if out else None
        if isinstance(item, tuple) and isinstance(last, tuple) and last[0] == item[0]:
            out[-1] = item[0], last[1] + item[1]
        else:
            out.append(item)
    return out


# ------------------------------------------------------------- round trips


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_message_round_trips(kind: type[Message]) -> None:
    @given(messages_of(kind))
    @settings(max_examples=20)
    def round_trips(message: Message) -> None:
        (decoded,) = Decoder().feed(memoryview(encode(message)))
        assert decoded == message

    round_trips()


def test_a_message_counts_by_its_bytes_but_never_for_less_than_a_small_one() -> None:
    decoder = wire.Decoder()
    decoder.feed(memoryview(wire.encode(wire.Room()) * 3))
    assert decoder.message_bytes == 3 * wire.MESSAGE_BYTES
    large = wire.encode(wire.Have(digest(1), b"", bytes(5000)))
    decoder.feed(memoryview(large + wire.span_header(1, 4) + b"byte"))
    assert decoder.message_bytes == 3 * wire.MESSAGE_BYTES + len(large) - 4


def test_the_type_codes_are_those_of_the_protocol() -> None:
    assert {kind.CODE: kind.__name__ for kind in KINDS} == {
        1: "Hello", 2: "Share", 3: "Have", 4: "Unshare", 5: "Grant", 6: "Take", 7: "Decline", 8: "Room", 9: "Refuse",
        10: "Cancel", 20: "Join", 21: "Leave", 22: "Done", 23: "Failed", 24: "Renew", 25: "Missing", 26: "Resolve",
        27: "Resolved", 28: "Ask", 30: "Neighbours", 31: "Lease", 32: "Checksums", 33: "Stored",
        34: "View", 35: "Present", 40: "Banned", 41: "Refuted", 42: "Revoked",
        43: "Reread", 44: "Withdrawn",
    }  # fmt: skip


def test_a_frame_is_laid_out_as_documented() -> None:
    body = b"\x94\x06\x07" + b"\xd9\x47" + BLOB.encode() + b"\x0c"
    assert encode(Take(7, BLOB, 12)) == (len(body) + 1).to_bytes(4, "big") + b"\x00" + body
    assert span_header(7, 65536) == bytes([0, 1, 0, 5, 1, 0, 0, 0, 7])


items = st.one_of(messages(), st.tuples(st.integers(0, 2**32 - 1), st.binary(min_size=1, max_size=300)))


@given(st.lists(items, max_size=6), st.lists(st.integers(1, 200), min_size=1, max_size=5))
@settings(max_examples=60)
def test_a_stream_means_the_same_however_it_is_cut(sent: list[Message | tuple[int, bytes]], sizes: list[int]) -> None:
    stream = b"".join(
        span_header(item[0], len(item[1])) + item[1] if isinstance(item, tuple) else encode(item) for item in sent
    )
    whole = joined(fed(stream, [max(len(stream), 1)]))
    assert whole == joined(sent)
    assert joined(fed(stream, [1])) == whole
    assert joined(fed(stream, sizes)) == whole


def test_what_follows_a_message_waits_for_its_end() -> None:
    decoder, first, second = Decoder(), encode(Grant(1)), encode(Grant(2))
    assert decoder.feed(memoryview(first + second[:-1])) == [Grant(1)]
    assert decoder.feed(memoryview(second[-1:] + first)) == [Grant(2), Grant(1)]


def test_a_chunk_frame_may_come_byte_by_byte() -> None:
    assert joined(fed(span_header(9, 3) + b"abc" + encode(Grant(1)), [1])) == [(9, b"abc"), Grant(1)]


def test_chunk_bytes_are_views_and_the_reader_knows_how_many_are_still_to_come() -> None:
    decoder, data = Decoder(), memoryview(span_header(9, 100) + b"x" * 60)
    (span,) = decoder.feed(data)
    assert isinstance(span, ChunkSpan)
    assert span.data.obj is data.obj
    assert decoder.span_left == 40
    decoder.feed(memoryview(b"x" * 40))
    assert decoder.span_left == 0


# ---------------------------------------------------------- what is malformed


@pytest.mark.parametrize(
    "stream",
    [
        struct.pack(">IB", 10, 2),
        struct.pack(">IB", 1, 0),
        struct.pack(">IB", 0, 0),
        struct.pack(">IB", wire.MAX_MESSAGE_BYTES + 1, 0),
        struct.pack(">IB", 5, 1),
        struct.pack(">IB", wire.MAX_SPAN_BYTES + 6, 1),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
    ],
    ids=["kind", "empty", "zero", "too long", "empty span", "long span", "http", "tls"],
)
def test_a_frame_that_no_peer_sends_ends_it_at_its_header(stream: bytes) -> None:
    for sizes in ([len(stream)], [1]):
        with pytest.raises(RemoteProtocolError):
            fed(stream, sizes)


def test_the_longest_frames_allowed_are_taken() -> None:
    (_, data), = fed(span_header(1, wire.MAX_SPAN_BYTES) + bytes(wire.MAX_SPAN_BYTES), [2**21])  # fmt: skip
    assert len(data) == wire.MAX_SPAN_BYTES
    longest = wire.Have(BLOB, bytes(wire.MAX_MESSAGE_BYTES - 83), b"")
    assert len(encode(longest)) == 4 + wire.MAX_MESSAGE_BYTES
    assert fed(encode(longest), [2**22]) == [longest]


def test_a_hello_can_be_held_to_less() -> None:
    with pytest.raises(RemoteProtocolError):
        Decoder(max_message_bytes=100).feed(memoryview(struct.pack(">IB", 101, 0)))


ADDRESS = [peer(1), "host", 5051, "", ""]


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [99],
        ["Grant", 1],
        [True, 1],
        [5],
        [5, 1, 2],
        [5, "1"],
        [5, 1.0],
        [5, None],
        [5, True],
        [5, -1],
        [5, 2**32],
        [6, 1, BLOB, -1],
        [6, 1, BLOB, 2**32],
        [6, 1, "sha256:" + "A" * 64, 1],
        [6, 1, "md5:" + "a" * 32, 1],
        [6, 1, BLOB.encode(), 1],
        [7, 1, 1],
        [2, BLOB, -2, b"", b"", True, "", True],
        [2, BLOB, MAX_BLOB_BYTES + 1, b"", b"", True, "", True],
        [2, BLOB, 1, "", b"", True, "", True],
        [2, BLOB, 1, b"", b"", True, "x" * 513, True],
        [1, 2**53, "c", peer(1), 1, "", "", ""],
        [1, 1, "c", peer(1)[1:], 1, "", "", ""],
        [1, 1, "c", peer(1), 65536, "", "", ""],
        [1, 1, "c", peer(1), -1, "", "", ""],
        [30, BLOB, {}],
        [30, BLOB, 5],
        [30, BLOB, [ADDRESS] * 201],
        [30, BLOB, [ADDRESS[:4]]],
        [30, BLOB, ["host"]],
        [30, BLOB, [[peer(1), "host", 0, "", ""]]],
        [30, BLOB, [[peer(1), "host", 65536, "", ""]]],
        [30, BLOB, [["someone", "host", 1, "", ""]]],
        [33, BLOB],
        [33, [1]],
        [33, ["sha256:x"]],
        [33, [BLOB] * 1001],
    ],
    ids=str,
)
def test_a_message_out_of_bounds_is_the_peers_fault(parts: list[object]) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        Decoder().feed(memoryview(frame(*parts)))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x92\x05",
        b"\x92\x05\x01\x00",
        b"\x05",
        b"\x81\x05\x01",
        b"\x92\x05\xd4\x00\x00",
        b"\x92\x05\xd9\xff",
        b"\x92\x05\xa1\xff",
        b"\x91" * 3000,
        b"\xdd\xff\xff\xff\xff\x05",
        b"\x92\x05\xd6\xff\x00\x00\x00\x00",
    ],
    ids=["empty", "unused", "short", "trailing", "number", "map", "ext", "cut", "utf8", "deep", "huge array", "time"],
)
def test_bytes_that_are_no_message_are_the_peers_fault(body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_message(body)


@given(st.binary(max_size=200))
@example(b"\x80")
@example(b"\x91\x80")
@example(b"\x91\xc7\x00\x01")
@settings(max_examples=300)
def test_any_bytes_are_a_message_or_the_peers_fault(body: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        assert encode(decode_message(body))


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=80) | st.binary(),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.sampled_from([kind.CODE for kind in KINDS]), st.lists(values, max_size=8))
@settings(max_examples=200)
def test_any_fields_are_a_message_or_the_peers_fault(code: int, parts: list[object]) -> None:
    with contextlib.suppress(RemoteProtocolError):
        Decoder().feed(memoryview(frame(code, *parts)))


@given(messages(), st.data())
@settings(max_examples=200)
def test_a_message_with_bytes_changed_is_a_message_or_the_peers_fault(message: Message, data: st.DataObject) -> None:
    stream = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    decoder = Decoder()
    with contextlib.suppress(RemoteProtocolError):
        decoder.feed(memoryview(bytes(stream)))


def test_a_decoder_keeps_no_more_than_one_message() -> None:
    data = memoryview(span_header(1, wire.MAX_SPAN_BYTES) + bytes(wire.MAX_SPAN_BYTES))
    part = memoryview(struct.pack(">IB", wire.MAX_MESSAGE_BYTES, 0) + bytes(1_000_000))
    decoder = Decoder()
    tracemalloc.start()
    try:
        for _ in range(20):
            decoder.feed(data)
        assert tracemalloc.get_traced_memory()[1] < 100_000
        decoder.feed(part)
        assert tracemalloc.get_traced_memory()[0] < 1_200_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "body",
    [b"\xdc\x03\xe8" * 700_000, b"\xdc\x03\xe8" + (b"\xdc\x03\xe8" + b"\x90" * 1000) * 1000, b"\x9f" + b"\x80" * 15],
    ids=["deep", "wide", "maps"],
)
def test_a_hostile_message_is_refused_before_it_takes_much_memory(body: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            decode_message(body[: wire.MAX_MESSAGE_BYTES])
        assert tracemalloc.get_traced_memory()[1] < 15_000_000
    finally:
        tracemalloc.stop()


def test_only_messages_can_be_sent() -> None:
    with pytest.raises(TypeError, match="not sent on the wire"):
        encode(Grant(object()))  # type: ignore[arg-type]
