# SPDX-License-Identifier: Apache-2.0
"""Clients of the mirror that nobody wants: slow, silent, malformed. Each comes again as soon as it is sent away."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

SLOWLY_S = 0.5
AGAIN_S = 3.0
"""Between two visits: hundreds at once are to keep their places, not the processor."""
_TAKEN_BYTES_MAX = 1 << 16


async def silent(stream: trio.SocketStream, blob: str) -> None:
    """Say nothing."""
    await _until_ended(stream)


async def byte_by_byte(stream: trio.SocketStream, blob: str) -> None:
    """Send a header without end (slow loris)."""
    for letter in b"GET /v2/ HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 1000:
        await stream.send_all(bytes([letter]))
        await trio.sleep(SLOWLY_S)


async def takes_a_byte_a_second(stream: trio.SocketStream, blob: str) -> None:
    """Ask for a large blob and take next to nothing of it."""
    await stream.send_all(_request(blob))
    for _ in range(10_000):
        await trio.sleep(1)
        if not await stream.receive_some(1):
            return


async def takes_nothing(stream: trio.SocketStream, blob: str) -> None:
    """Ask for a large blob and take nothing of it."""
    await stream.send_all(_request(blob))
    await trio.sleep_forever()


async def talks_garbage(stream: trio.SocketStream, blob: str) -> None:
    """Send what is no HTTP, or TLS."""
    await stream.send_all(
        random.choice([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\0" * 500, b"SSH-2.0-x\r\n"])
    )
    await _until_ended(stream)


async def has_a_huge_header(stream: trio.SocketStream, blob: str) -> None:
    await stream.send_all(_request(blob, *(f"X-{number}: {'a' * 1000}" for number in range(100))))
    await _until_ended(stream)


async def asks_for_odd_ranges(stream: trio.SocketStream, blob: str) -> None:
    for value in (",".join(["0-0"] * 200), "99999999999999999999-", "5-5,-0" + ",1-1" * 200):
        await stream.send_all(_request(blob, f"Range: bytes={value}"))
        answer = await stream.receive_some(_TAKEN_BYTES_MAX)
        if not answer:
            return
        assert answer[9:12] in (b"400", b"416"), answer[:100]
    await _until_ended(stream)


async def sends_ahead(stream: trio.SocketStream, blob: str) -> None:
    """Send hundreds of requests and read no answer."""
    for _ in range(20):
        await stream.send_all(_request("/v2/") * 20)
    await trio.sleep_forever()


async def sends_a_body(stream: trio.SocketStream, blob: str) -> None:
    await stream.send_all(_request(blob, "Content-Length: 100000") + b"a" * 5000)
    await _until_ended(stream)


VISITS = (
    silent,
    byte_by_byte,
    takes_a_byte_a_second,
    takes_nothing,
    talks_garbage,
    has_a_huge_header,
    asks_for_odd_ranges,
    sends_ahead,
    sends_a_body,
)


@dataclass
class Crowd:
    """So many bad clients at one port, of each kind as many.

    Attributes:
        arrived: how many have been there once.
        sent_away: how often one of them lost its connection.
    """

    port: int
    blob: str
    arrived: int = 0
    sent_away: int = 0
    strange: list[str] = field(default_factory=list)

    async def run(self, count: int) -> None:
        """Crowd until cancelled."""
        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(self._come_again, VISITS[number % len(VISITS)])
                if number % 50 == 49:
                    await trio.sleep(0.05)

    async def _come_again(self, visit: Callable[[trio.SocketStream, str], Awaitable[None]]) -> None:
        first = True
        while True:
            with suppress(OSError, trio.BrokenResourceError):
                async with await self._connect() as stream:
                    self.arrived += first
                    first = False
                    try:
                        await visit(stream, self.blob)
                    except AssertionError as error:
                        self.strange.append(f"{visit.__name__}: {error}")
            self.sent_away += 1
            await trio.sleep(AGAIN_S)

    async def _connect(self) -> trio.SocketStream:
        sock = trio.socket.socket()
        # What is sent ahead of a reader that takes nothing waits in the kernel; hundreds of these are not to fill it.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        try:
            await sock.connect(("127.0.0.1", self.port))
        except BaseException:
            sock.close()
            raise
        return trio.SocketStream(sock)


async def _until_ended(stream: trio.SocketStream) -> None:
    while await stream.receive_some(_TAKEN_BYTES_MAX):
        pass


def _request(target: str, *headers: str) -> bytes:
    return "\r\n".join([f"GET {target} HTTP/1.1", "Host: x", *headers, "", ""]).encode()
