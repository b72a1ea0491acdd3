# SPDX-License-Identifier: Apache-2.0
"""An HTTP client for tests that must see exactly what a server sends: resets, missing bytes, raw requests."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import h11
import trio

from p2pdist.net.http_server import HttpServer, open_listeners

if TYPE_CHECKING:
    from p2pdist.net.http_messages import Application, Limits


class Incomplete(Exception):
    """The connection ended before the answer did."""


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes = b""

    @property
    def json(self) -> Any:  # noqa: ANN401
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of an OCI error body."""
        return str(self.json["errors"][0]["code"])


@dataclass
class Client:
    """One connection; `get` may be called again and again on it."""

    stream: trio.SocketStream
    received: bytearray = field(default_factory=bytearray)

    @classmethod
    async def connect(cls, port: int) -> Client:
        return cls(await trio.open_tcp_stream("127.0.0.1", port))

    async def get(self, target: str, *headers: tuple[str, str], method: str = "GET") -> Answer:
        await self.send(request(target, *headers, method=method))
        return await self.answer(method)

    async def head(self, target: str, *headers: tuple[str, str]) -> Answer:
        return await self.get(target, *headers, method="HEAD")

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def answer(self, method: str = "GET") -> Answer:
        """Read one answer to the end. Raises Incomplete."""
        answer, reading = await self.start(method)
        async for part in self._body(reading):
            answer.body += part
        return answer

    async def start(self, method: str = "GET") -> tuple[Answer, h11.Connection]:
        """Read the headers of an answer."""
        reading = h11.Connection(h11.CLIENT)
        reading.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        reading.send(h11.EndOfMessage())
        reading.receive_data(bytes(self.received)) if self.received else None
        self.received.clear()
        head = await self._event(reading)
        assert isinstance(head, h11.Response), head
        return Answer(head.status_code, {name.decode(): value.decode() for name, value in head.headers}), reading

    async def read_exactly(self, reading: h11.Connection, count: int) -> bytes:
        """Read at least `count` bytes of a body."""
        body = b""
        while len(body) < count:
            event = await self._event(reading)
            assert isinstance(event, h11.Data)
            body += event.data
        return body

    async def rest(self, reading: h11.Connection) -> bytes:
        """Read a body to its end. Raises Incomplete."""
        return b"".join([part async for part in self._body(reading)])

    async def ends(self) -> bytes:
        """Return all that comes until the server closes; a reset counts as an end."""
        data = bytes(self.received)
        try:
            while more := await self.stream.receive_some(65536):
                data += more
        except trio.BrokenResourceError:
            pass
        return data

    async def _body(self, reading: h11.Connection) -> Any:  # noqa: ANN401
        while not isinstance(event := await self._event(reading), h11.EndOfMessage):
            yield event.data
        self.received += reading.trailing_data[0]

    async def _event(self, reading: h11.Connection) -> Any:  # noqa: ANN401
        try:
            while (event := reading.next_event()) is h11.NEED_DATA:
                reading.receive_data(await self.stream.receive_some(65536))
        except (h11.RemoteProtocolError, trio.BrokenResourceError) as error:
            raise Incomplete(str(error)) from error
        if isinstance(event, h11.ConnectionClosed):
            raise Incomplete("closed before the answer")
        return event


def request(target: str, *headers: tuple[str, str], method: str = "GET") -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: 127.0.0.1", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


async def start_server(
    nursery: trio.Nursery, application: Application, limits: Limits | None = None
) -> tuple[HttpServer, int]:
    """Serve on a free loopback port; return the server and the port."""
    listeners = await open_listeners("127.0.0.1", 0)
    port = listeners[0].socket.getsockname()[1]
    server = HttpServer(application, limits)
    await nursery.start(server.serve, listeners)
    return server, port
