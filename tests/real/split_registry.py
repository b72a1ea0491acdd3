# SPDX-License-Identifier: Apache-2.0
"""One registry made of two: pulls are an agent's, pushes go to the registry behind it.

So a suite that has to push what it then pulls tests the agent with content of its own.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import h11
import trio

if TYPE_CHECKING:
    from collections.abc import Sequence

_READ_BYTES = 1 << 16
_PULLS = (b"/blobs/sha", b"/manifests/", b"/tags/list", b"/referrers/")

Message = tuple[h11.Request | h11.Response, bytes]


@dataclass
class SplitRegistry:
    """Relays each request on a connection of its own; what it holds in memory is one message.

    Attributes:
        pulls: how many requests the agent was sent.
    """

    agent_port: int
    registry_port: int
    pulls: int = 0
    port: int = field(init=False)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        await trio.serve_listeners(self._serve, listeners, task_status=task_status)

    async def _serve(self, stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER)
        async with stream:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError):
                while (request := await _receive(stream, connection)) is not None:
                    (head, body), method = await self._relayed(request), request[0].method
                    headers = _but(head.headers, b"connection")
                    await _send(
                        stream, connection, h11.Response(status_code=head.status_code, headers=headers), body, method
                    )
                    if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                        return
                    connection.start_next_cycle()

    async def _relayed(self, request: Message) -> Message:
        head, body = request
        assert isinstance(head, h11.Request)
        is_pull = head.method in (b"GET", b"HEAD") and any(part in head.target for part in _PULLS)
        self.pulls += is_pull
        headers = [*_but(head.headers, b"connection"), (b"Connection", b"close")]
        connection = h11.Connection(h11.CLIENT)
        async with await trio.open_tcp_stream(
            "127.0.0.1", self.agent_port if is_pull else self.registry_port
        ) as stream:
            await _send(stream, connection, h11.Request(method=head.method, target=head.target, headers=headers), body)
            answer = await _receive(stream, connection)
        assert answer is not None
        return answer


def _but(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> list[tuple[bytes, bytes]]:
    return [header for header in headers if header[0].lower() != name]


async def _receive(stream: trio.SocketStream, connection: h11.Connection) -> Message | None:
    """Return the next message, or None where there is none any more."""
    head, body = None, b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(bytes(await stream.receive_some(_READ_BYTES)))
        elif isinstance(event, h11.Request | h11.Response):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            return head, body
        elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
            return None


async def _send(
    stream: trio.SocketStream,
    connection: h11.Connection,
    head: h11.Request | h11.Response,
    body: bytes,
    method: bytes = b"",
) -> None:
    parts = [connection.send(head)]
    if body and method != b"HEAD":
        parts.append(connection.send(h11.Data(data=body)))
    parts.append(connection.send(h11.EndOfMessage()))
    await stream.send_all(b"".join(part or b"" for part in parts))
