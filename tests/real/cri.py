# SPDX-License-Identifier: Apache-2.0
"""A client of containerd's CRI plugin: the calls that a kubelet makes for an image, over gRPC on a Unix socket.

HTTP/2 is h2's; the few protobuf messages, of nothing but nested messages and strings, are written and read here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import unquote

import h2.config
import h2.connection
import h2.events
import trio

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_RECEIVE_BYTES = 64 << 10
_LENGTH_DELIMITED, _VARINT = 2, 0


class CriError(Exception):
    """The plugin answered with an error, or not at all."""


class ImageService:
    """`runtime.v1.ImageService` of the containerd that listens on this socket."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket

    async def pull(self, image: str) -> str:
        """Pull an image as a kubelet does, with the pod that wants it; return its reference. Raises CriError."""
        pod = field(1, field(1, b"pod") + field(2, b"uid-1") + field(3, b"default"))
        said = await self._call("PullImage", field(1, field(1, image.encode())) + field(3, pod))
        return _strings(said, 1)[0]

    async def status(self, image: str) -> tuple[str, list[str]] | None:
        """Return the id and the digests of an image, or None where the runtime has none. Raises CriError."""
        said = await self._call("ImageStatus", field(1, field(1, image.encode())))
        found = [value for number, value in _fields(said) if number == 1]
        return (_strings(found[0], 1)[0], _strings(found[0], 3)) if found else None

    async def remove(self, image: str) -> None:
        await self._call("RemoveImage", field(1, field(1, image.encode())))

    async def _call(self, method: str, message: bytes) -> bytes:
        async with await trio.open_unix_socket(str(self._socket)) as stream:
            return await _Call(stream).run(f"/runtime.v1.ImageService/{method}", message)


class _Call:
    """One unary call on a connection of its own."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._http = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._body = bytearray()
        self._trailers: dict[str, str] = {}
        self._ended = False

    async def run(self, path: str, message: bytes) -> bytes:
        http = self._http
        http.initiate_connection()
        headers = [(":method", "POST"), (":scheme", "http"), (":authority", "localhost"), (":path", path)]
        http.send_headers(1, [*headers, ("te", "trailers"), ("content-type", "application/grpc")])
        http.send_data(1, b"\0" + len(message).to_bytes(4) + message, end_stream=True)
        while not self._ended:
            await self._stream.send_all(http.data_to_send())
            data = await self._stream.receive_some(_RECEIVE_BYTES)
            if not data:
                raise CriError("the connection was closed before the answer's end")
            for event in http.receive_data(data):
                self._note(event)
        if self._trailers.get("grpc-status") != "0":
            raise CriError(unquote(self._trailers.get("grpc-message", str(self._trailers))))
        return bytes(self._body[5:])

    def _note(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.DataReceived():
                self._body += event.data
                self._http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                self._trailers |= dict(event.headers)
            case h2.events.StreamEnded():
                self._ended = True
            case h2.events.StreamReset() | h2.events.ConnectionTerminated():
                raise CriError(f"the call was broken off: {event}")


def field(number: int, value: bytes) -> bytes:
    """Return a field of bytes, a string or a message."""
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    low = bytearray()
    while value > 0x7F:
        low.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*low, value])


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the fields of bytes, strings and messages; numbers are passed over."""
    at = 0
    while at < len(message):
        key, at = _read_varint(message, at)
        length, at = _read_varint(message, at)
        if key & 7 == _LENGTH_DELIMITED:
            yield key >> 3, message[at : at + length]
            at += length
        else:
            assert key & 7 == _VARINT, f"a field of wire type {key & 7}"


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _strings(message: bytes, number: int) -> list[str]:
    return [value.decode() for found, value in _fields(message) if found == number]
