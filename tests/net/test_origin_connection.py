# SPDX-License-Identifier: Apache-2.0
"""The origin client's connections against servers that answer byte by byte as told: framing, reuse, and how many."""

from __future__ import annotations

import ssl
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import httpx
import pytest
import trio

from p2pdist.errors import OriginError
from p2pdist.net.origin_connection import WAKE_BYTES, Unreachable
from p2pdist.net.origin_transport import Answer, Transport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

BODY = bytes(range(256)) * 1024


@dataclass
class Server:
    """Answers each request on a connection with the next of `answers`; a None ends the connection instead.

    `ends`: each connection ends after one answer.
    """

    answers: list[bytes | None]
    ends: bool = False
    port: int = 0
    connections: int = 0
    open: int = 0
    closed: trio.Condition = field(default_factory=trio.Condition)

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        self.open += 1
        with suppress(trio.BrokenResourceError):
            async with stream:
                await self._answer(stream)
        async with self.closed:
            self.open -= 1
            self.closed.notify_all()

    async def _answer(self, stream: trio.SocketStream) -> None:
        asked = b""
        while data := await stream.receive_some():
            asked += data
            while b"\r\n\r\n" in asked:
                asked = asked.partition(b"\r\n\r\n")[2]
                answer = self.answers.pop(0)
                if answer is None:
                    return
                await stream.send_all(answer)
                if self.ends:
                    return

    async def wait_open(self, count: int) -> None:
        with trio.fail_after(10):
            async with self.closed:
                while self.open != count:
                    await self.closed.wait()


@asynccontextmanager
async def serving(*answers: bytes | None, ends: bool = False) -> AsyncIterator[Server]:
    server = Server(list(answers), ends)
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        server.port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, server.serve, listeners)
        yield server
        nursery.cancel_scope.cancel()


def transport(connections: int = 4, stall_s: float = 5.0) -> Transport:
    return Transport(
        ssl.create_default_context(),
        connections=connections,
        guarded=False,
        connect_s=5.0,
        stall_s=stall_s,
        wait_s=5.0,
    )


def known(body: bytes, extra: str = "") -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
UNTIL_CLOSED = b"HTTP/1.0 200 OK\r\n\r\nhello world"


async def get(client: Transport, server: Server, method: str = "GET", limit_bytes: int = 1 << 20) -> bytes:
    """Return an answer's body, read to its end."""
    url = httpx.URL(f"http://127.0.0.1:{server.port}/x")
    answer = await client.send(method, url, [(b"Host", url.netloc)])
    return await answer.read(limit_bytes)


@pytest.mark.parametrize(
    ("answer", "body", "reused"),
    [
        (known(BODY), BODY, True),
        (known(b""), b"", True),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + known(b"hello"), b"hello", True),
        (CHUNKED, b"hello world", True),
        (known(b"hello", "Connection: close\r\n"), b"hello", False),
        (known(b"hello") + b"more than it said", b"hello", False),
    ],
    ids=["known length", "empty", "informational", "chunked", "to be closed", "too long"],
)
async def test_a_body_ends_where_it_says_and_its_connection_is_used_again(
    answer: bytes, body: bytes, reused: bool
) -> None:
    async with serving(answer, known(b"next")) as server:
        client = transport()
        assert await get(client, server) == body
        assert await get(client, server) == b"next"
        assert server.connections == (1 if reused else 2)
        await client.aclose()


async def test_an_answer_to_a_head_has_no_body_whatever_length_it_says() -> None:
    async with serving(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", known(b"next")) as server:
        client = transport()
        assert await get(client, server, "HEAD") == b""
        assert await get(client, server) == b"next"
        assert server.connections == 1
        await client.aclose()


async def test_a_body_without_a_length_ends_with_its_connection() -> None:
    async with serving(UNTIL_CLOSED, ends=True) as server:
        client = transport()
        assert await get(client, server) == b"hello world"
        await server.wait_open(0)
        assert not client._idle


@pytest.mark.parametrize("answer", [known(BODY)[:-1], CHUNKED[:-7], b"HTTP/1.1 200 OK\r\nContent-"])
@pytest.mark.parametrize(("ends", "said"), [(True, "broke off"), (False, "stopped answering")])
async def test_an_answer_that_does_not_come_to_its_end_is_unreachable(answer: bytes, ends: bool, said: str) -> None:
    async with serving(answer, ends=ends) as server:
        client = transport(stall_s=0.1)
        with pytest.raises(Unreachable, match=said):
            await get(client, server)
        await client.aclose()


async def test_a_slow_body_is_no_stalled_one() -> None:
    """The reader sleeps until WAKE_BYTES are there, but takes less when that lasts too long."""
    client, part, drop = transport(stall_s=0.2), memoryview(bytearray(2 * WAKE_BYTES)), b"x" * (WAKE_BYTES // 2)
    wanted = trio.Event()

    async def drip(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(f"HTTP/1.1 200 OK\r\nContent-Length: {3 * len(drop)}\r\n\r\n".encode() + drop)
        await wanted.wait()
        await stream.send_all(drop)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, drip, listeners)
        url = httpx.URL(f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}/x")
        answer = await client.send("GET", url, [(b"Host", url.netloc)])
        received = 0
        while received < 2 * len(drop):
            received += await answer.read_into(part)
            if received == len(drop):
                wanted.set()
        with pytest.raises(Unreachable, match="broke off"):
            await read_on(answer, part)
        await answer.aclose()
        nursery.cancel_scope.cancel()


async def read_on(answer: Answer, part: memoryview) -> None:
    while await answer.read_into(part):
        pass


async def test_a_connection_that_ended_while_idle_is_not_used_again() -> None:
    async with serving(known(b"one"), known(b"two")) as server:
        client = transport()
        assert await get(client, server) == b"one"
        idle = next(iter(client._idle))
        server.answers.insert(0, None)
        await idle._stream.send(b"GET / HTTP/1.1\r\n\r\n")
        await server.wait_open(0)
        assert await get(client, server) == b"two"
        assert server.connections == 2
        await client.aclose()


async def test_an_idle_connection_makes_room_for_one_to_another_server() -> None:
    async with serving(known(b"one")) as first, serving(known(b"two")) as second:
        client = transport(connections=1)
        assert await get(client, first) == b"one"
        assert await get(client, second) == b"two"
        await first.wait_open(0)
        await client.aclose()
        await second.wait_open(0)


async def test_a_body_that_is_given_up_costs_its_connection() -> None:
    async with serving(known(BODY), known(b"next")) as server:
        client = transport(connections=1)
        assert await get(client, server, limit_bytes=10) == BODY[:11]
        assert await get(client, server) == b"next"
        assert server.connections == 2
        await client.aclose()


async def test_a_request_that_cannot_be_written_is_not_sent() -> None:
    async with serving(known(b"one")) as server:
        client = transport(connections=1)
        url = httpx.URL(f"http://127.0.0.1:{server.port}/x")
        with pytest.raises(OriginError, match="cannot be sent"):
            await client.send("GET", url, [(b"Host", url.netloc), (b"X", b"a\r\nb")])
        assert await get(client, server) == b"one"
        await client.aclose()
