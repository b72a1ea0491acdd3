# SPDX-License-Identifier: Apache-2.0
"""The scheduler's sockets: one task pair per agent around the pure state, and the HTTP API beside it.

Invariants: a message that goes to many agents is encoded once; what waits for a slow agent is
bounded (it is dropped and comes back); an agent that returns under its id takes its old
connection's place.
"""

from __future__ import annotations

import errno
import os
import random
import secrets
import signal
import socket
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, cast

import hypercorn.config
import hypercorn.trio
import structlog
import trio

from p2pdist import listening, logs
from p2pdist.config import Address
from p2pdist.core.types import PeerId
from p2pdist.core.wire import VERSION, ChunkSpan, Decoder, Hello, Message, PeerAddress, Revoked, encode
from p2pdist.errors import ConfigError, IdentityRefused, P2PDistError, RemoteProtocolError
from p2pdist.identity.channel import TlsStream
from p2pdist.identity.revocations import MAX_LISTS
from p2pdist.reload import Reloader, read_when_used
from p2pdist.service import ServiceManager
from scheduler.api import make_api
from scheduler.doorway import Doorway
from scheduler.swarm import PUSH_S, SchedulerState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hypercorn.typing import ASGIFramework

    from p2pdist.reload import Commit, Prepare
    from scheduler.config import SchedulerConfig

log = structlog.get_logger("scheduler")

SCHEDULER_ID = PeerId("0" * 32)
"""What the scheduler calls itself in its Hello; agents' ids are random."""
HELLO_S = 5.0
DEAD_S = 6
"""Bytes that are unacknowledged for so long end the connection: until then what an agent beyond a partition has fetched
counts as there."""
IDLE_S = 10
"""A connection that carried nothing for so long is asked by keep-alives, every 3 s."""
RECEIVE_BYTES = 64 * 1024
MAX_QUEUED_BYTES = 8 * 1024 * 1024
DELIVERED_AT_ONCE = 250
"""Of what a tick sends to thousands: some milliseconds of sending, then others get their answers."""
LOOK_S = 2.0
"""How often the list of revoked names and certificates' ends are looked at."""
MAX_GREETING = 1024
"""Connections that have not said who they are; after a restart all agents come back within seconds."""


class AgentConnection:
    """One agent's connection, and what waits to be sent on it."""

    def __init__(self, stream: trio.SocketStream | TlsStream) -> None:
        self.stream = stream
        self.peer: PeerId | None = None
        """Set once it has been admitted."""
        self.knows_revoked: tuple[bytes, ...] = ()
        """The lists of revoked names that it has told us, or we it."""
        self.pending = bytearray()
        self.blocked = trio.Event()
        """Set while the socket is full and what is pending is the writer's to send."""
        self.scope = trio.CancelScope()

    def send(self, frame: bytes) -> None:
        """Queue a frame; `flush` sends it."""
        if len(self.pending) > MAX_QUEUED_BYTES:
            self.scope.cancel()
            return
        self.pending += frame

    def flush(self) -> None:
        """Send what the socket takes at once: nearly always all, and that without waking a task."""
        if self.blocked.is_set():
            return
        stream, unsent = self.stream, False
        with suppress(OSError):  # The writer finds a broken connection, too, and says so.
            if isinstance(stream, TlsStream):
                del self.pending[: stream.channel.send_some(self.pending)]
                unsent = stream.channel.unsent
            else:
                del self.pending[: os.write(stream.socket.fileno(), self.pending)]
        if self.pending or unsent:
            self.blocked.set()

    async def write(self) -> None:
        """Send what the socket did not take at once, until cancelled."""
        while True:
            await self.blocked.wait()
            while True:
                data = bytes(self.pending)
                self.pending.clear()
                await self.stream.send_all(data)
                if not self.pending:
                    break
            self.blocked = trio.Event()


class SchedulerServer:
    """Serves agents and the API until cancelled."""

    def __init__(self, config: SchedulerConfig, load: Callable[[], SchedulerConfig] | None = None) -> None:
        self.started = time.monotonic()
        self.messages_in = 0
        self.messages_out = 0
        self.state = SchedulerState(
            random.Random(),
            degree=config.degree,
            tag_ttl_s=config.tag_ttl_s,
            started=trio.current_time(),
            own_id=PeerId(secrets.token_hex(16)),
        )
        self.settings = Reloader(config, load, self._live())
        self.doorway = Doorway(config)
        self.agents_at, self.api_at = config.listen, config.api_listen
        """Where it listens; while it runs, with the port that the system gave for a 0."""
        self._connections: dict[PeerId, AgentConnection] = {}
        self._greeting = 0
        self._look = trio.Event()
        """Set: the list of revoked names is to be looked at now."""
        self._service = ServiceManager(os.environ)

    @property
    def config(self) -> SchedulerConfig:
        """The settings in force; SIGHUP swaps them."""
        return self.settings.config

    def _live(self) -> dict[str, Prepare[SchedulerConfig]]:
        """Return how each setting comes into force that SIGHUP may change; the others wait for a restart."""

        def logging(new: SchedulerConfig) -> Commit:
            return partial(logs.configure, new.log_level, new.log_format)

        def state(new: SchedulerConfig) -> Commit:
            return partial(self.state.tune, degree=new.degree, tag_ttl_s=new.tag_ttl_s)

        return {
            "degree": state,
            "tag_ttl_s": state,
            "max_agents": read_when_used,
            "log_level": logging,
            "log_format": logging,
        }

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen and serve until SIGTERM or SIGINT.

        Raises:
            ConfigError: an address cannot be listened on.
        """
        agents = await _listen(self.config.listen, "listen")
        try:
            # Bound here, so that a port in use is one clear line; hypercorn takes over the descriptors.
            apis = await _listen(self.config.api_listen, "api_listen")
        except BaseException:
            for listener in agents:
                listener.socket.close()
            raise
        self.agents_at = _bound(self.config.listen, agents)
        self.api_at = _bound(self.config.api_listen, apis)
        settings = hypercorn.config.Config()
        settings.bind = [f"fd://{listener.socket.detach()}" for listener in apis]
        settings.graceful_timeout = self.config.shutdown_grace_s
        settings.loglevel = "WARNING"
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            await nursery.start(self._heed_signals, stop)
            await nursery.start(self.serve_agents, agents)
            log.info("scheduler listens", agents=str(self.agents_at), api=str(self.api_at))
            nursery.start_soon(self._service.watch, self._state_line)
            task_status.started()
            self._service.ready()
            await hypercorn.trio.serve(cast("ASGIFramework", make_api(self)), settings, shutdown_trigger=stop.wait)
            nursery.cancel_scope.cancel()

    async def serve_agents(
        self, listeners: list[trio.SocketListener], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve agents on these listeners until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tick)
            nursery.start_soon(self._watch_identities)
            await nursery.start(listening.serve, self._serve, listeners)
            task_status.started()

    async def _heed_signals(
        self, stop: trio.Event, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            task_status.started()
            async for number in signals:
                if number == signal.SIGHUP:
                    self._service.reloading()
                    self.settings.reload()
                    self.doorway.reload()
                    self._look.set()
                    self._service.ready()
                    continue
                log.info("scheduler stops", signal=signal.Signals(number).name)
                self._service.stopping(self.config.shutdown_grace_s)
                stop.set()
                return

    def _state_line(self) -> str:
        return f"{len(self.state.members)} agents, {len(self.state.swarms)} swarms"

    async def _tick(self) -> None:
        while True:
            await trio.sleep(PUSH_S)
            out = self.state.tick(trio.current_time())
            for first in range(0, len(out), DELIVERED_AT_ONCE):
                self._deliver(out[first : first + DELIVERED_AT_ONCE])
                await trio.lowlevel.checkpoint()

    @property
    def cluster(self) -> str:
        """Whose agents may join: what the certificate says, else the setting."""
        identity = self.doorway.identity
        return identity.name.cluster if identity is not None else self.config.cluster

    async def _watch_identities(self) -> None:
        """Tell agents of a new list of revoked names, and end the connections of those that may not stay."""
        while (identity := self.doorway.identity) is not None:
            with trio.move_on_after(LOOK_S):
                await self._look.wait()
            await trio.lowlevel.checkpoint()
            self._look = trio.Event()
            self.doorway.look()
            for signed in self.doorway.revoked:
                self._tell_revoked(self._connections.values(), signed)
            for peer, connection in list(self._connections.items()):
                stream = connection.stream
                if not isinstance(stream, TlsStream) or stream.channel.holder is None:
                    continue
                if why := identity.still(stream.channel.holder):
                    log.warning("agent dropped", peer=peer, why=why)
                    connection.scope.cancel()

    def _tell_revoked(self, connections: Iterable[AgentConnection], signed: bytes) -> None:
        """Send a list of revoked names to those that do not know it."""
        told = Revoked(signed)
        out: list[tuple[PeerId, Message]] = []
        for connection in connections:
            if signed not in connection.knows_revoked and connection.peer is not None:
                connection.knows_revoked = (*connection.knows_revoked, signed)[-MAX_LISTS:]
                out.append((connection.peer, told))
        self._deliver(out)

    def _deliver(self, out: Iterable[tuple[PeerId, Message]]) -> None:
        touched: dict[AgentConnection, None] = {}
        last: Message | None = None
        frame = b""
        for peer, message in out:
            if message is not last:
                last, frame = message, encode(message)
            connection = self._connections.get(peer)
            if connection is not None:
                self.messages_out += 1
                connection.send(frame)
                touched[connection] = None
        for connection in touched:
            connection.flush()

    async def _serve(self, stream: trio.SocketStream) -> None:
        """Serve one agent until it goes; nothing that it does ends the scheduler."""
        try:
            secured = await self.doorway.enter(stream)
        except (P2PDistError, OSError, trio.TooSlowError) as error:
            log.debug("nobody came in", why=str(error) or "it said nothing for too long")
            return
        if secured is not None:
            await self._serve_agent(AgentConnection(secured))

    async def _serve_agent(self, connection: AgentConnection) -> None:
        why = "closed"
        try:
            with connection.scope:
                await self._converse(connection)
            if connection.scope.cancelled_caught:
                why = "another connection took its place, or it reads nothing"
        except* (RemoteProtocolError, IdentityRefused, trio.BrokenResourceError, trio.TooSlowError, OSError) as group:
            # Reader and writer may find it broken at the same time.
            why = str(group.exceptions[0]) or type(group.exceptions[0]).__name__
        finally:
            # A scheduler that ends leases to nobody what those hold who are cut off first: they go on elsewhere.
            if trio.current_effective_deadline() > float("-inf"):
                self._take_out(connection)
            (log.info if connection.peer else log.debug)("agent left", peer=connection.peer, why=why)
            with trio.move_on_after(1, shield=True):
                await trio.aclose_forcefully(connection.stream)

    async def _converse(self, connection: AgentConnection) -> None:
        stream, decoder = connection.stream, Decoder()
        hello, early = await self._greet(stream, decoder)
        if isinstance(stream, TlsStream):
            self.doorway.compare(stream.channel, hello.peer_id)
        self._admit(connection, hello)
        self._take_in(connection, early)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.write)
            while data := await stream.receive_some(RECEIVE_BYTES):
                self._take_in(connection, decoder.feed(memoryview(data)))
            nursery.cancel_scope.cancel()

    async def _greet(
        self, stream: trio.SocketStream | TlsStream, decoder: Decoder
    ) -> tuple[Hello, list[Message | ChunkSpan]]:
        if self._greeting >= MAX_GREETING:
            raise RemoteProtocolError(f"{MAX_GREETING} connections have not said who they are")
        self._greeting += 1
        try:
            _tune(stream)
            with trio.fail_after(HELLO_S):
                items: list[Message | ChunkSpan] = []
                while not items:
                    data = await stream.receive_some(RECEIVE_BYTES)
                    if not data:
                        raise RemoteProtocolError("it hung up before its hello")
                    items = decoder.feed(memoryview(data))
                own = Hello(VERSION, self.cluster, SCHEDULER_ID, 0, "", "", "")
                await stream.send_all(encode(own))
        finally:
            self._greeting -= 1
        return self._checked(items[0]), items[1:]

    def _checked(self, hello: Message | ChunkSpan) -> Hello:
        """Return the agent's hello if it may join."""
        if not isinstance(hello, Hello):
            raise RemoteProtocolError(f"a {type(hello).__name__} where a hello should be")
        if hello.version != VERSION or hello.cluster != self.cluster:
            raise RemoteProtocolError(f"protocol {hello.version} or cluster {hello.cluster!r} is not ours")
        if not 0 < hello.port < 65536:
            # Its address goes to other agents, who would take it for a breach of the protocol by us.
            raise RemoteProtocolError(f"it listens on no port that there is: {hello.port}")
        if len(self._connections) >= self.config.max_agents and hello.peer_id not in self._connections:
            raise RemoteProtocolError(f"there are {self.config.max_agents} agents already (max_agents)")
        return hello

    def _admit(self, connection: AgentConnection, hello: Hello) -> None:
        host = hello.host or connection.stream.socket.getpeername()[0]
        old = self._connections.get(hello.peer_id)
        if old is not None:
            old.scope.cancel()
            self._take_out(old)
        connection.peer = hello.peer_id
        self._connections[hello.peer_id] = connection
        self.state.connected(PeerAddress(hello.peer_id, host, hello.port, hello.site, hello.rack))
        for signed in self.doorway.revoked:
            self._tell_revoked([connection], signed)
        log.info("agent joined", peer=hello.peer_id, host=host, port=hello.port)

    def _take_out(self, connection: AgentConnection) -> None:
        """Forget an agent's connection, unless another has its place."""
        peer = connection.peer
        if peer is not None and self._connections.get(peer) is connection:
            del self._connections[peer]
            self._deliver(self.state.gone(peer, trio.current_time()))

    def _take_in(self, connection: AgentConnection, items: list[Message | ChunkSpan]) -> None:
        peer = connection.peer
        if peer is None or self._connections.get(peer) is not connection:
            return
        out: list[tuple[PeerId, Message]] = []
        try:
            for item in items:
                if isinstance(item, ChunkSpan):
                    raise RemoteProtocolError("it sends chunk bytes to the scheduler")
                self.messages_in += 1
                if isinstance(item, Revoked):
                    self._hear_revoked(connection, item.signed)
                    continue
                out += self.state.said(peer, item, trio.current_time())
        finally:
            self._deliver(out)
        for suspect, why in self.state.reports.news:
            log.warning("agent shut out", peer=suspect, why=why)
        self.state.reports.news.clear()

    def _hear_revoked(self, connection: AgentConnection, signed: bytes) -> None:
        """Take in a list that an agent brings from another scheduler. Raises RemoteProtocolError."""
        if self.doorway.heard(signed):
            self._look.set()
        kept = tuple(each for each in self.doorway.revoked if each == signed)
        connection.knows_revoked = (*connection.knows_revoked, *kept)[-MAX_LISTS:]


def _tune(stream: trio.SocketStream | TlsStream) -> None:
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_S)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 3)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_S * 1000)


async def _listen(address: Address, key: str) -> list[trio.SocketListener]:
    try:
        return await trio.open_tcp_listeners(address.port, host=address.host)
    except OSError as error:
        what = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror or error}"
        raise ConfigError(f"{key}: {address} {what}; choose another address or stop what holds it") from error


def _bound(address: Address, listeners: list[trio.SocketListener]) -> Address:
    """Return the address with the port that it came to."""
    return Address(address.host, listeners[0].socket.getsockname()[1])
