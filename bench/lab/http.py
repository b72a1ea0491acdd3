# SPDX-License-Identifier: Apache-2.0
"""One kept-alive HTTP/1.1 connection from a host of the lab, as cheap as Python allows.

h11 parses the heads; bodies go from the socket straight into the caller's buffer. Refuses responses without a
Content-Length, as no registry sends these for what a runtime pulls.
"""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import h11
import trio

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bench.lab.hosts import Host

_HEAD_READ_BYTES = 16 << 10
_LOW_WATER_BYTES = 128 << 10
"""Wake up for no less: wake-ups, not bytes, are what receiving costs."""

_SMALL_BODY_MAX_BYTES = 4 << 20
_CONNECT_TIMEOUT_S = 5.0


class HttpFailure(Exception):
    """The exchange failed; the connection is of no more use."""


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a response."""

    status_code: int
    headers: Mapping[str, str]
    content_bytes: int


class HttpConnection:
    """A connection to one server; requests one after another. Use as an async context manager."""

    def __init__(self, host: Host, base_url: str) -> None:
        url = urlsplit(base_url)
        self._host = host
        self._server = (url.hostname or "", url.port or 80)
        self._authority = url.netloc
        self._socket: socket.socket | None = None
        self._early = b""
        self._unread_bytes = 0

    async def __aenter__(self) -> HttpConnection:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def request(self, method: str, target: str, headers: Mapping[str, str] | None = None) -> Head:
        """Send a request without a body and return the head of its answer.

        Raises:
            HttpFailure: refused, cut off or not HTTP.
        """
        try:
            connection = await self._open()
            self._low_water(connection, 1)
            parser = h11.Connection(h11.CLIENT)
            fields = [("Host", self._authority), *(headers or {}).items()]
            await _send(connection, parser.send(h11.Request(method=method, target=target, headers=fields)))
            await _send(connection, parser.send(h11.EndOfMessage()))
            response = await self._receive_head(connection, parser)
        except (OSError, h11.ProtocolError, trio.TooSlowError) as error:
            self.close()
            raise HttpFailure(f"{method} {target}: {_describe(error)}") from error
        return self._begin_body(method, target, response, parser.trailing_data[0])

    async def read_into(self, view: memoryview) -> int:
        """Receive some of the body, at least a byte; return 0 at its end.

        Raises:
            HttpFailure: the body ended early.
        """
        if not self._unread_bytes:
            return 0
        if self._early:
            count = min(len(self._early), len(view))
            view[:count], self._early = self._early[:count], self._early[count:]
        else:
            count = await self._receive_body(view[: self._unread_bytes])
        self._unread_bytes -= count
        return count

    async def read_all(self) -> bytes:
        """Receive the whole of a small body. Raises HttpFailure."""
        if self._unread_bytes > _SMALL_BODY_MAX_BYTES:
            raise HttpFailure(f"a body of {self._unread_bytes} bytes where {_SMALL_BODY_MAX_BYTES} is the most")
        body = bytearray(self._unread_bytes)
        view, done = memoryview(body), 0
        while count := await self.read_into(view[done:]):
            done += count
        return bytes(body)

    async def _open(self) -> socket.socket:
        assert not self._unread_bytes, "the response before was not read to its end"
        if self._socket is None:
            self._socket = self._host.socket()
            self._socket.setblocking(False)
            with trio.fail_after(_CONNECT_TIMEOUT_S):
                await trio.socket.from_stdlib_socket(self._socket).connect(self._server)
        return self._socket

    @staticmethod
    async def _receive_head(connection: socket.socket, parser: h11.Connection) -> h11.Response:
        while True:
            event = parser.next_event()
            if isinstance(event, h11.Response):
                return event
            if event is h11.NEED_DATA:
                await trio.lowlevel.wait_readable(connection)
                data = connection.recv(_HEAD_READ_BYTES)
                if not data:
                    raise ConnectionError("closed before it answered")
                parser.receive_data(data)

    def _begin_body(self, method: str, target: str, response: h11.Response, early: bytes) -> Head:
        headers = {name.decode("ascii"): value.decode("latin-1") for name, value in response.headers}
        if "content-length" not in headers:
            self.close()
            raise HttpFailure(f"{method} {target}: status {response.status_code} without Content-Length")
        content_bytes = int(headers["content-length"])
        self._unread_bytes = 0 if method == "HEAD" else content_bytes
        self._early = early
        return Head(response.status_code, headers, content_bytes)

    async def _receive_body(self, view: memoryview) -> int:
        assert self._socket is not None, "there is no response to read"
        try:
            await trio.lowlevel.wait_readable(self._socket)
            count = self._socket.recv_into(view)
        except OSError as error:
            self.close()
            raise HttpFailure(f"reading a body: {_describe(error)}") from error
        if count == 0:
            self.close()
            raise HttpFailure(f"the body was cut off {self._unread_bytes} bytes before its end")
        self._low_water(self._socket, min(_LOW_WATER_BYTES, self._unread_bytes - count))
        return count

    @staticmethod
    def _low_water(connection: socket.socket, wanted_bytes: int) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, max(1, wanted_bytes))


async def get_json(host: Host, url: str, *, timeout_s: float) -> dict[str, Any] | None:
    """Return the JSON object that a GET of `url` answers with 200, else None: no answer, in time or of this kind."""
    parts = urlsplit(url)
    with trio.move_on_after(timeout_s):
        async with HttpConnection(host, f"http://{parts.netloc}") as connection:
            with suppress(HttpFailure, ValueError):
                head = await connection.request("GET", parts.path)
                body = json.loads(await connection.read_all())
                return body if head.status_code == 200 and isinstance(body, dict) else None
    return None


async def get_status(host: Host, url: str, *, timeout_s: float) -> int | None:
    """Return the status code of a GET of `url`, or None where there is no answer in time."""
    parts = urlsplit(url)
    with trio.move_on_after(timeout_s):
        async with HttpConnection(host, f"http://{parts.netloc}") as connection:
            with suppress(HttpFailure):
                return (await connection.request("GET", parts.path)).status_code
    return None


async def _send(connection: socket.socket, data: bytes | None) -> None:
    while data:
        await trio.lowlevel.wait_writable(connection)
        data = data[connection.send(data) :]


def _describe(error: Exception) -> str:
    return "no connection in time" if isinstance(error, trio.TooSlowError) else str(error) or type(error).__name__
