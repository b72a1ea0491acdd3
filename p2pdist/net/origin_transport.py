# SPDX-License-Identifier: Apache-2.0
"""The origin client's pool of connections, and the answers that come on them.

Owns: how many connections there are, which of them is used again, and until when an answer keeps its own. Refuses to
follow redirects, keep cookies, obey proxy variables or log. Invariants: no more connections than allowed are open;
a connection is used again only where its last answer was read to the end and nothing has come since; closing never
blocks.

Why not a library: httpcore, the engine of httpx, cost 1.3 CPU-s/GiB for ranges of 4 MiB and 3.0 for 256 KiB
(docs/performance.md), for it copies what comes four times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import trio

from p2pdist.net.origin_connection import Unreachable, open_connection

if TYPE_CHECKING:
    import ssl

    from p2pdist.net.origin_connection import Connection, Headers

_KEEPALIVE_S = 30.0
_PART_BYTES = 64 * 1024


class Transport:
    """A bounded pool of HTTP/1.1 connections.

    Args:
        context: TLS settings; its trust store says which servers are believed.
        connections: the most that are open at once.
        guarded: connect only to public addresses and by names.
        connect_s: how long a dial, and then a TLS handshake, may take.
        stall_s: how long one read or write may take.
        wait_s: how long a request may wait for one of the connections.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        *,
        connections: int,
        guarded: bool,
        connect_s: float,
        stall_s: float,
        wait_s: float,
    ) -> None:
        context.set_alpn_protocols(["http/1.1"])
        self._context = context
        self._connections = connections
        self._guarded = guarded
        self._connect_s = connect_s
        self._stall_s = stall_s
        self._wait_s = wait_s
        self._places = trio.Semaphore(connections)
        self._open: set[Connection] = set()
        self._idle: dict[Connection, tuple[str, float]] = {}
        """Whom they lead to and since when they are idle, the longest first."""

    async def send(self, method: str, url: httpx.URL, headers: Headers, content: bytes = b"") -> Answer:
        """Return the answer as soon as its headers are here; the caller closes it.

        Raises:
            Unreachable: the connection failed.
            OriginError: it must not be made, or cannot be on another try either.
        """
        with trio.move_on_after(self._wait_s) as waiting:
            await self._places.acquire()
        if waiting.cancelled_caught:
            raise Unreachable(f"no connection to {url.netloc.decode('ascii')} in time")
        connection = None
        try:
            connection = self._take_idle(_place(url)) or await self._connect(url)
            head = await connection.ask(method, url.raw_path, headers, content)
        except BaseException:
            if connection is not None:
                self._drop(connection)
            self._places.release()
            raise
        return Answer(head.status_code, httpx.Headers(head.headers.raw_items()), url, connection, self)

    def _take_idle(self, place: str) -> Connection | None:
        """Return an open connection to a place, the one used last, and close those that are of no more use."""
        now, found = trio.current_time(), None
        for connection, (where, since) in list(self._idle.items()):
            if now - since > _KEEPALIVE_S or (where == place and not connection.reusable):
                self._drop(connection)
            elif where == place:
                found = connection
        if found is not None:
            del self._idle[found]
        return found

    async def _connect(self, url: httpx.URL) -> Connection:
        if len(self._open) >= self._connections and self._idle:
            self._drop(next(iter(self._idle)))
        connection = await open_connection(
            url, self._context, guarded=self._guarded, connect_s=self._connect_s, stall_s=self._stall_s
        )
        self._open.add(connection)
        return connection

    def _drop(self, connection: Connection) -> None:
        self._idle.pop(connection, None)
        self._open.discard(connection)
        connection.close()

    def give_back(self, connection: Connection, url: httpx.URL) -> None:
        """Keep a connection for the next request, or close it where its answer has not been read to the end."""
        if connection in self._open and connection.reusable:
            self._idle[connection] = (_place(url), trio.current_time())
        else:
            self._drop(connection)
        self._places.release()

    async def aclose(self) -> None:
        """Close all connections at once."""
        for connection in list(self._open):
            self._drop(connection)


def _place(url: httpx.URL) -> str:
    return f"{url.scheme}://{url.netloc.decode('ascii')}"


class Answer:
    """A response whose body is still arriving; iterate over it for the parts, undecoded."""

    def __init__(
        self, status: int, headers: httpx.Headers, url: httpx.URL, connection: Connection, transport: Transport
    ) -> None:
        self.status = status
        self.headers = headers
        self.url = url
        self._connection: Connection | None = connection
        self._transport = transport
        self._small: bytes | None = None

    @property
    def server(self) -> str:
        """Return who answered, `HOST[:PORT]`: all of the URL that may be shown."""
        return self.url.netloc.decode("ascii")

    async def read_into(self, buffer: memoryview) -> int:
        """Put the next bytes of the body into `buffer`, which is not empty; return how many, 0 at its end.

        Raises:
            Unreachable: it broke off.
        """
        return 0 if self._connection is None else await self._connection.read_into(buffer)

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> bytes:
        part = memoryview(bytearray(_PART_BYTES))
        count = await self.read_into(part)
        if not count:
            raise StopAsyncIteration
        return bytes(part[:count])

    async def read(self, limit_bytes: int) -> bytes:
        """Return the body and close; at most `limit_bytes` + 1, so that a longer one shows. May be repeated."""
        if self._small is None:
            body = bytearray()
            async for part in self:
                body += part
                if len(body) > limit_bytes:
                    break
            self._small = bytes(body[: limit_bytes + 1])
            await self.aclose()
        return self._small

    async def aclose(self) -> None:
        """Give the connection back, or close it where the body has not been read to its end."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._transport.give_back(connection, self.url)
