# SPDX-License-Identifier: Apache-2.0
"""The wire between agents and to the scheduler: frames, messages, and a decoder without I/O.

A frame is a 4-byte big-endian length of what follows, one kind byte, and a body. Kind 0 is a
message: a msgpack array of a type code and the fields in order. Kind 1 is a span of a chunk: the
4-byte number of the grant that it answers and raw bytes; a chunk is one or more such frames, in
order. docs/wire.md has the tables.

Everything that comes in is checked here: types, bounds, digests. What breaks a rule raises
RemoteProtocolError, and the connection ends: there is no resynchronising.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, get_type_hints

import msgpack

from p2pdist.core.fields import (
    Number,
    Port,
    Size,
    check_bool,
    check_bytes,
    check_int,
    check_number,
    check_port,
    check_size,
    check_str,
)
from p2pdist.core.types import Digest, PeerId, parse_digest, parse_peer_id
from p2pdist.errors import InvalidInput, RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

VERSION = 1
MAX_MESSAGE_BYTES = 2 * 1024 * 1024
"""The largest is a Share with the checksums of 65,536 chunks: 1 MiB and its bitmap."""
SPAN_BYTES = 64 * 1024
"""Payload of one chunk frame: small enough that a message between two waits under 50 ms on 10 Mbit/s."""
MAX_SPAN_BYTES = 1024 * 1024
MAX_SCHEDULERS = 8
"""That one agent may be given: it keeps a connection to each."""

MESSAGE_BYTES = 512
"""What the smallest message counts for: dealing with one costs as much as reading so many bytes of a large one."""

_LENGTH = struct.Struct(">IB")
_SPAN = struct.Struct(">IBI")
SPAN_HEADER_BYTES = _SPAN.size
_MESSAGE, _CHUNK_SPAN = 0, 1
_TLS = (0x1503, 0x1603)
"""How an alert and a handshake of TLS begin: as a frame it would be one of 350 MiB."""


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """Where a peer listens."""

    peer_id: PeerId
    host: str
    port: int
    site: str = ""
    rack: str = ""


class Message:
    """A message; the concrete classes' fields are what is sent, in order."""

    __slots__ = ()
    CODE: ClassVar[int]


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """First on each connection, both ways: who speaks, and where it listens (port 0: it does not)."""

    CODE: ClassVar[int] = 1
    version: int
    cluster: str
    peer_id: PeerId
    port: Port
    site: str
    rack: str
    host: str
    """The address to dial where it differs from the connection's source; else empty."""
    software: str = ""
    """The sender's version of p2pdist, for people."""


@dataclass(frozen=True, slots=True)
class Share(Message):
    """What the sender has of a blob, and whether it wants the rest.

    `size_bytes` -1: not known yet (the sender asks for content of which it has only the digest).
    `checksums` are those of the chunks in `have`, in order, 16 bytes each.
    """

    CODE: ClassVar[int] = 2
    blob: Digest
    size_bytes: Size
    have: bytes
    checksums: bytes
    wants: bool
    media_type: str
    reply: bool
    """Whether this answers a Share of the receiver's; one that does not is answered where the blob is known."""


@dataclass(frozen=True, slots=True)
class Have(Message):
    """Chunks that the sender has since its last Share or Have; `indices` are 4-byte little-endian."""

    CODE: ClassVar[int] = 3
    blob: Digest
    indices: bytes
    checksums: bytes


@dataclass(frozen=True, slots=True)
class Unshare(Message):
    """The sender neither has nor wants the blob any more."""

    CODE: ClassVar[int] = 4
    blob: Digest


@dataclass(frozen=True, slots=True)
class Grant(Message):
    """An upload slot is free for the receiver; it answers with Take or Decline."""

    CODE: ClassVar[int] = 5
    number: Number


@dataclass(frozen=True, slots=True)
class Take(Message):
    """Use the grant for this chunk."""

    CODE: ClassVar[int] = 6
    number: Number
    blob: Digest
    index: Number


@dataclass(frozen=True, slots=True)
class Decline(Message):
    """Leave the grant: the link is full (a Room follows when it is not), or nothing new is there."""

    CODE: ClassVar[int] = 7
    number: Number
    full: bool


@dataclass(frozen=True, slots=True)
class Room(Message):
    """The sender, who declined because it was full, can take a chunk now."""

    CODE: ClassVar[int] = 8


@dataclass(frozen=True, slots=True)
class Refuse(Message):
    """The chunk that was taken will not come, or no more of it."""

    CODE: ClassVar[int] = 9
    number: Number


@dataclass(frozen=True, slots=True)
class Cancel(Message):
    """The chunk that was taken is not needed any more."""

    CODE: ClassVar[int] = 10
    number: Number


@dataclass(frozen=True, slots=True)
class Join(Message):
    """To the scheduler: the agent wants this blob (or, all of it in `have`, holds it)."""

    CODE: ClassVar[int] = 20
    blob: Digest
    size_bytes: Size
    registry: str
    have: bytes
    checksums: bytes


@dataclass(frozen=True, slots=True)
class Leave(Message):
    """To the scheduler: the agent neither wants nor holds the blob any more."""

    CODE: ClassVar[int] = 21
    blob: Digest


@dataclass(frozen=True, slots=True)
class Done(Message):
    """To the scheduler: a leased chunk is here, read from the origin, with this checksum.

    `size_bytes` is the blob's, which the scheduler may not know yet; `run_bytes` what the agent would ask the origin
    for at once.
    """

    CODE: ClassVar[int] = 22
    blob: Digest
    size_bytes: Size
    index: Number
    checksum: bytes
    run_bytes: Number = 0


@dataclass(frozen=True, slots=True)
class Failed(Message):
    """To the scheduler: the lease is given back, and the origin should be left alone for so long. Without one, to
    peers: the chunk is not being fetched any more.

    `pause_ms` -1: this agent will never get the blob from the origin; lease it to others.
    """

    CODE: ClassVar[int] = 23
    blob: Digest
    index: Number
    pause_ms: int


@dataclass(frozen=True, slots=True)
class Renew(Message):
    """To the scheduler: bytes of the leased chunk are still coming. Without one, to peers: it is being fetched."""

    CODE: ClassVar[int] = 24
    blob: Digest
    index: Number


@dataclass(frozen=True, slots=True)
class Missing(Message):
    """To the scheduler: none of the agent's neighbours has these chunks, for a while now."""

    CODE: ClassVar[int] = 25
    blob: Digest
    indices: bytes


@dataclass(frozen=True, slots=True)
class Resolve(Message):
    """To the scheduler: which manifest has this tag? Answered by Resolved or Ask."""

    CODE: ClassVar[int] = 26
    number: Number
    registry: str
    repository: str
    tag: str


@dataclass(frozen=True, slots=True)
class Resolved(Message):
    """The tag's manifest, from the agent that asked the origin or to those that asked the scheduler.

    An empty `digest` says that the origin did not tell: whoever needs the tag asks for itself.
    """

    CODE: ClassVar[int] = 27
    number: Number
    digest: str
    media_type: str
    size_bytes: Size


@dataclass(frozen=True, slots=True)
class Ask(Message):
    """From the scheduler: nobody knows the tag; ask the origin and send Resolved with this number."""

    CODE: ClassVar[int] = 28
    number: Number


@dataclass(frozen=True, slots=True)
class Neighbours(Message):
    """From the scheduler: peers to be connected to, for the sake of a blob."""

    CODE: ClassVar[int] = 30
    blob: Digest
    peers: list[PeerAddress]


@dataclass(frozen=True, slots=True)
class Lease(Message):
    """From the scheduler: fetch `count` chunks from `index` on from the origin; without Renew each lapses after
    `deadline_ms`."""

    CODE: ClassVar[int] = 31
    blob: Digest
    index: Number
    deadline_ms: Number
    count: Number = 1


@dataclass(frozen=True, slots=True)
class Checksums(Message):
    """From the scheduler: what the lease holders found; `size_bytes` is the blob's."""

    CODE: ClassVar[int] = 32
    blob: Digest
    size_bytes: Size
    indices: bytes
    checksums: bytes


@dataclass(frozen=True, slots=True)
class Stored(Message):
    """To the scheduler: blobs that the agent holds whole and may share."""

    CODE: ClassVar[int] = 33
    blobs: list[Digest]


@dataclass(frozen=True, slots=True)
class Revoked(Message):
    """Names whose certificates count no more, signed by the cluster's CA; agents carry it to who has not heard."""

    CODE: ClassVar[int] = 42
    signed: bytes


@dataclass(frozen=True, slots=True)
class Banned(Message):
    """To the scheduler: the agent has nothing to do with this peer for so long; `reason` is an Offence's text."""

    CODE: ClassVar[int] = 40
    peer: PeerId
    reason: str
    ban_ms: Number


@dataclass(frozen=True, slots=True)
class View(Message):
    """To the scheduler: the schedulers that the agent counts on (core/schedulers.py). Answered by Present."""

    CODE: ClassVar[int] = 34
    schedulers: list[PeerId]


@dataclass(frozen=True, slots=True)
class Present(Message):
    """From the scheduler: who it is, an id drawn at its start, and for how long it has run."""

    CODE: ClassVar[int] = 35
    scheduler: PeerId
    age_ms: int


@dataclass(frozen=True, slots=True)
class Refuted(Message):
    """To the scheduler: the agent has read this chunk from the origin, and the checksum that was pushed is wrong."""

    CODE: ClassVar[int] = 41
    blob: Digest
    index: Number
    checksum: bytes


@dataclass(frozen=True, slots=True)
class Reread(Message):
    """From the scheduler: read this chunk from the origin, also if it is here; others disagree. Answered by Done."""

    CODE: ClassVar[int] = 43
    blob: Digest
    index: Number


@dataclass(frozen=True, slots=True)
class Withdrawn(Message):
    """From the scheduler: this agent was found to lie, and what Checksums said of these chunks was its word alone."""

    CODE: ClassVar[int] = 44
    blob: Digest
    indices: bytes
    peer: PeerId


_BLOBS_LIMIT = 1000
_PEERS_LIMIT = 200
_ARRAYS_LIMIT = _PEERS_LIMIT + 2
"""In one message: itself, a list, and what that holds."""


def _address(value: object) -> PeerAddress:
    if type(value) is not list or len(value) != 5:
        raise ValueError("not an address")
    peer_id, host, port, site, rack = value
    if not check_port(port):
        raise ValueError("not a port to dial")
    return PeerAddress(parse_peer_id(check_str(peer_id)), check_str(host), port, check_str(site), check_str(rack))


def _addresses(value: object) -> list[PeerAddress]:
    if type(value) is not list or len(value) > _PEERS_LIMIT:
        raise ValueError("not a list of addresses")
    return [_address(item) for item in value]


def _digests(value: object) -> list[Digest]:
    if type(value) is not list or len(value) > _BLOBS_LIMIT:
        raise ValueError("not a list of digests")
    return [parse_digest(check_str(item)) for item in value]


def _schedulers(value: object) -> list[PeerId]:
    if type(value) is not list or len(value) > MAX_SCHEDULERS:
        raise ValueError("not a list of schedulers")
    return [parse_peer_id(check_str(item)) for item in value]


_CHECKS: dict[object, Callable[[object], object]] = {
    int: check_int,
    Number: check_number,
    Size: check_size,
    Port: check_port,
    bool: check_bool,
    str: check_str,
    bytes: check_bytes,
    Digest: lambda value: parse_digest(check_str(value)),
    PeerId: lambda value: parse_peer_id(check_str(value)),
    list[PeerAddress]: _addresses,
    list[Digest]: _digests,
    list[PeerId]: _schedulers,
}


def _layout(cls: type[Message]) -> tuple[type[Message], tuple[str, ...], tuple[Callable[[object], object], ...]]:
    hints = get_type_hints(cls, include_extras=True)
    names = tuple(field.name for field in fields(cls))  # type: ignore[arg-type]
    return cls, names, tuple(_CHECKS[hints[name]] for name in names)


_TYPES = {cls.CODE: _layout(cls) for cls in Message.__subclasses__()}
_NAMES = {layout[0]: layout[1] for layout in _TYPES.values()}


def _plain(value: object) -> object:
    if isinstance(value, PeerAddress):
        return [value.peer_id, value.host, value.port, value.site, value.rack]
    raise TypeError(f"{type(value).__name__} is not sent on the wire")


def encode(message: Message) -> bytes:
    """Return the message as one frame."""
    cls = type(message)
    body = msgpack.packb([cls.CODE, *(getattr(message, name) for name in _NAMES[cls])], default=_plain)
    return _LENGTH.pack(len(body) + 1, _MESSAGE) + bytes(body)


def span_header(number: int, payload_bytes: int) -> bytes:
    """Return what precedes `payload_bytes` bytes of the chunk that the grant `number` was taken for."""
    return _SPAN.pack(payload_bytes + 5, _CHUNK_SPAN, number)


def _unpack(body: bytes | bytearray | memoryview) -> object:
    """Return what the msgpack holds; gives up before hostile nesting takes 60 times its own size in memory."""
    left = _ARRAYS_LIMIT

    def counted(items: list[object]) -> list[object]:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("too many arrays")
        return items

    def refused(_items: object) -> None:
        raise ValueError("a map")

    return msgpack.unpackb(
        body, max_array_len=_BLOBS_LIMIT, max_map_len=0, max_ext_len=0, list_hook=counted, object_hook=refused
    )


def decode_message(body: bytes | bytearray | memoryview) -> Message:
    """Return the message in a frame's body, without the kind byte.

    Raises:
        RemoteProtocolError: not msgpack, no known type, a wrong number of fields, a field out of bounds.
    """
    try:
        parts = _unpack(body)
        if type(parts) is not list or not parts or type(parts[0]) is not int:
            raise ValueError("not an array that begins with a type")
        cls, _, checks = _TYPES[parts[0]]
        if len(parts) - 1 != len(checks):
            raise ValueError(f"{cls.__name__} with {len(parts) - 1} fields")
        return cls(*[check(value) for check, value in zip(checks, parts[1:], strict=True)])
    except (ValueError, KeyError, InvalidInput, RecursionError, msgpack.UnpackException) as error:
        raise RemoteProtocolError(f"malformed message: {type(error).__name__}: {str(error)[:200]}") from error


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """The next bytes of a chunk; `data` is a view into what was fed and must be used before the next feed."""

    number: int
    data: memoryview


class Decoder:
    """Bytes in, messages and chunk spans out; what is incomplete waits for the next feed.

    Memory: at most one message (MAX_MESSAGE_BYTES); chunk bytes are never kept.
    """

    def __init__(self, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._pending = bytearray()
        self._max_message_bytes = max_message_bytes
        self.message_bytes = 0
        """Of all messages so far, each at least MESSAGE_BYTES: what a flood is measured by."""
        self.span_left = 0
        """Bytes of the current chunk frame still to come; whoever takes some of them elsewhere subtracts these."""
        self.span_number = 0

    def feed(self, data: memoryview) -> list[Message | ChunkSpan]:
        """Return what `data` completes, in order.

        Raises:
            RemoteProtocolError: the stream breaks the protocol; nothing after it can be trusted.
        """
        out: list[Message | ChunkSpan] = []
        at, stop = 0, len(data)
        while at < stop:
            if self.span_left:
                take = min(self.span_left, stop - at)
                out.append(ChunkSpan(self.span_number, data[at : at + take]))
                self.span_left -= take
                at += take
                continue
            at += self._header_or_message(data[at:], out)
        return out

    def _header_or_message(self, data: memoryview, out: list[Message | ChunkSpan]) -> int:
        """Consume what completes the pending header or message; return the bytes used."""
        used = self._fill(data, _LENGTH.size)
        if len(self._pending) < _LENGTH.size:
            return used
        length, kind = _LENGTH.unpack_from(self._pending)
        if length >> 16 in _TLS:
            raise RemoteProtocolError("it speaks TLS: it has an identity, and this program has none (docs/identity.md)")
        if kind == _CHUNK_SPAN:
            if not 5 < length <= MAX_SPAN_BYTES + 5:
                raise RemoteProtocolError(f"a chunk frame of {length} bytes")
            used += self._fill(data[used:], _SPAN.size)
            if len(self._pending) == _SPAN.size:
                self.span_number = _SPAN.unpack(self._pending)[2]
                self.span_left = length - 5
                self._pending.clear()
            return used
        if kind != _MESSAGE or not 1 < length <= self._max_message_bytes:
            raise RemoteProtocolError(f"a frame of kind {kind} and {length} bytes")
        used += self._fill(data[used:], 4 + length)
        if len(self._pending) == 4 + length:
            body = bytes(self._pending[_LENGTH.size :])
            self._pending.clear()
            self.message_bytes += max(length, MESSAGE_BYTES)
            out.append(decode_message(body))
        return used

    def _fill(self, data: memoryview, upto: int) -> int:
        take = max(0, min(upto - len(self._pending), len(data)))
        self._pending += data[:take]
        return take
