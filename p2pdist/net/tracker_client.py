# SPDX-License-Identifier: Apache-2.0
"""The agent's connection to the scheduler: one at a time, re-made for as long as the agent runs.

Tries the configured addresses in turn, with a pause that grows and is jittered, so that a scheduler
that comes back is not run over. Decides nothing: messages go to a TrackerHandler.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Protocol

import structlog
import trio

from p2pdist.core.wire import VERSION, ChunkSpan, Decoder, Hello, Message, encode
from p2pdist.errors import IdentityRefused, P2PDistError, PeerUnavailable, RemoteProtocolError, TransferTimeout
from p2pdist.identity.channel import secured

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

    from p2pdist.identity.channel import TlsStream
    from p2pdist.identity.credentials import Identity
    from p2pdist.identity.refusals import Refusals

log = structlog.get_logger(__name__)

CONNECT_S = 5.0
DEAD_S = 15
"""A scheduler that acknowledges nothing for so long is given up (a frozen or unreachable host)."""
FIRST_PAUSE_S = 0.25
LAST_PAUSE_S = 5.0
RECEIVE_BYTES = 64 * 1024
MAX_QUEUED_BYTES = 16 * 1024 * 1024
"""Messages that wait for a scheduler that reads nothing, before it is given up."""


class TrackerHandler(Protocol):
    """Who is told of the scheduler. Calls are synchronous; RemoteProtocolError ends the connection."""

    def scheduler_connected(self, address: str) -> None: ...

    def scheduler_lost(self, address: str, why: str) -> None: ...

    def scheduler_said(self, message: Message) -> None: ...


class TrackerClient:
    """Keeps a connection to one of `addresses`, while `run` runs."""

    identity: Identity | None = None
    refusals: Refusals
    """Set with the identity."""

    def __init__(
        self, addresses: Sequence[tuple[str, int]], hello: Callable[[], Hello], handler: TrackerHandler, rng: Random
    ) -> None:
        self.connected_to: str | None = None
        self.trouble = ""
        """Why there is no connection."""
        self.control_bytes = 0
        self.resting: Callable[[], bool] = lambda: False
        """Whether no connection is wanted for now."""
        self._addresses = addresses
        self._hello = hello
        self._handler = handler
        self._rng = rng
        self._pending = bytearray()
        self._wake = trio.Event()
        self._scope = trio.CancelScope()
        self._given_up = ""
        self._reported: set[tuple[str, str]] = set()

    def send(self, message: Message) -> None:
        """Queue a message; without a connection it is dropped, for a new one begins with all that matters."""
        if self.connected_to is None:
            return
        if len(self._pending) > MAX_QUEUED_BYTES:
            self.give_up("reads nothing")
            return
        frame = encode(message)
        self.control_bytes += len(frame)
        self._pending += frame
        self._wake.set()

    def give_up(self, why: str) -> None:
        """End the connection, if there is one, and try again later."""
        self._given_up = why
        self._scope.cancel()

    async def run(self) -> None:
        """Stay connected until cancelled; never raises for what a scheduler does."""
        pause_s = FIRST_PAUSE_S
        turn = 0
        while True:
            while self.resting():  # noqa: ASYNC110 - it is looked at again as seldom as a lost scheduler is tried
                await trio.sleep(LAST_PAUSE_S)
            host, port = self._addresses[turn % len(self._addresses)]
            turn += 1
            began = trio.current_time()
            why = "it closed the connection"
            try:
                await self._session(host, port)
            except* (P2PDistError, OSError, trio.BrokenResourceError) as group:
                # Reader and writer may find it broken at the same time.
                why = str(group.exceptions[0]) or type(group.exceptions[0]).__name__
            self.trouble = why
            if self.connected_to is not None:
                self.connected_to = None
                self._handler.scheduler_lost(f"{host}:{port}", why)
            else:
                self._report(f"{host}:{port}", why)
            pause_s = FIRST_PAUSE_S if trio.current_time() - began > LAST_PAUSE_S else min(2 * pause_s, LAST_PAUSE_S)
            await trio.sleep(pause_s * (0.5 + self._rng.random()))

    def _report(self, address: str, why: str) -> None:
        """Log why a scheduler is not reached, each reason once until one is."""
        if (address, why) not in self._reported:
            self._reported.add((address, why))
            log.warning("scheduler not reached; the agents do without it meanwhile", address=address, why=why)

    async def _session(self, host: str, port: int) -> None:
        try:
            with trio.fail_after(CONNECT_S):
                stream = await trio.open_tcp_stream(host, port)
        except trio.TooSlowError as error:
            raise PeerUnavailable(f"scheduler {host}:{port} does not answer") from error
        except ValueError as error:
            raise PeerUnavailable(f"scheduler {host}:{port} cannot be a host's name: {error}") from error
        async with stream, await self._secured(stream, host) as secured:
            await self._converse(secured, f"{host}:{port}")

    async def _secured(self, stream: trio.SocketStream, host: str) -> trio.SocketStream | TlsStream:
        """Return the connection, with TLS where this agent has an identity."""
        if self.identity is None:
            return stream
        try:
            return await secured(stream, self.identity, server_side=False, role="scheduler", deadline_s=CONNECT_S)
        except IdentityRefused as error:
            self.refusals.note("scheduler", host, error)
            raise

    async def _converse(self, stream: trio.SocketStream | TlsStream, address: str) -> None:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, DEAD_S // 3)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, DEAD_S // 3)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_S * 1000)
        decoder = Decoder()
        early = await self._greet(stream, decoder, address)
        with trio.CancelScope() as self._scope:
            self._pending.clear()
            self.connected_to, self.trouble = address, ""
            self._reported.clear()
            self._handler.scheduler_connected(address)
            self._take_in(early)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, stream)
                while data := await stream.receive_some(RECEIVE_BYTES):
                    self._take_in(decoder.feed(memoryview(data)))
                nursery.cancel_scope.cancel()
        if self._scope.cancelled_caught:
            raise PeerUnavailable(f"scheduler {address} {self._given_up}")

    async def _greet(
        self, stream: trio.SocketStream | TlsStream, decoder: Decoder, address: str
    ) -> list[Message | ChunkSpan]:
        try:
            with trio.fail_after(CONNECT_S):
                await stream.send_all(encode(self._hello()))
                items: list[Message | ChunkSpan] = []
                while not items:
                    data = await stream.receive_some(RECEIVE_BYTES)
                    if not data:
                        raise PeerUnavailable(f"scheduler {address} hung up: does it run the same cluster and version?")
                    items = decoder.feed(memoryview(data))
        except trio.TooSlowError as error:
            raise TransferTimeout(f"scheduler {address} sent no hello") from error
        hello = items[0]
        if not isinstance(hello, Hello) or hello.version != VERSION or hello.cluster != self._hello().cluster:
            raise RemoteProtocolError(f"scheduler {address} is of another version or cluster: {hello!r:.200}")
        return items[1:]

    def _take_in(self, items: list[Message | ChunkSpan]) -> None:
        for item in items:
            if isinstance(item, ChunkSpan):
                raise RemoteProtocolError("the scheduler sends chunk bytes")
            self._handler.scheduler_said(item)

    async def _write(self, stream: trio.SocketStream | TlsStream) -> None:
        while True:
            if not self._pending:
                self._wake = trio.Event()
                await self._wake.wait()
            data = bytes(self._pending)
            self._pending.clear()
            await stream.send_all(data)
