# SPDX-License-Identifier: Apache-2.0
"""An HTTP/1.1 server for the node's own runtimes and for people: listeners, places and an orderly end.

Owns: accepting, the number of connections, idle ones, and stopping. What happens on a connection is
`http_connection`'s, what is served the `Application`'s. Shared by the mirror and the admin endpoint.

Invariants: at most `Limits.connections` are open; where more clients come, those that do nothing make room for them,
and who is being answered at a fair pace never does; nothing that a client or the application does ends the server.
"""

from __future__ import annotations

import errno
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

import structlog
import trio

from p2pdist.errors import ConfigError
from p2pdist.listening import Trouble
from p2pdist.net.http_connection import Connection
from p2pdist.net.http_messages import Limits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from p2pdist.net.http_messages import Application

log = structlog.get_logger(__name__)

_BACKLOG = 2048
_LOOK_S = 0.25
"""How often a full server looks for slow readers, and who waits for a place tries again."""
_SAY_S = 60.0
"""How often the log says that a server is full."""


async def open_listeners(host: str, port: int) -> list[trio.SocketListener]:
    """Listen on every address that `host` (a name, IPv4 or IPv6 address) has; port 0 takes any.

    Raises:
        ConfigError: it cannot be listened on.
    """
    try:
        return await trio.open_tcp_listeners(port, host=host, backlog=_BACKLOG)
    except (OSError, ValueError) as error:
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        taken = getattr(error, "errno", None) == errno.EADDRINUSE
        mend = "another program listens there: end it or choose another port" if taken else "choose another address"
        raise ConfigError(f"cannot listen on {where}: {error}; {mend}") from error


def _plain(listener: trio.SocketListener) -> socket.socket:
    """Return the listener's socket, which accepts without a trip through the event loop; the listener is used up."""
    return socket.socket(listener.socket.family, listener.socket.type, fileno=listener.socket.detach())


class HttpServer:
    """Serves one application on any number of listeners."""

    def __init__(self, application: Application, limits: Limits | None = None) -> None:
        self._application = application
        self._limits = limits or Limits()
        self._slots = trio.Semaphore(self._limits.connections)
        self._fresh: dict[trio.CancelScope, float] = {}
        self._asking: dict[trio.CancelScope, float] = {}
        self._idle: dict[trio.CancelScope, float] = {}
        """Who owes us a request (none of it yet, the rest of it, another one), and since when; the oldest first."""
        self._open: dict[Connection, trio.CancelScope] = {}
        self._laggards: list[Connection] = []
        """Those found to lag at the last look, less those that have been dealt with since."""
        self._looked_at = self._said_at = float("-inf")
        self._displaced = 0
        self._accepting = trio.CancelScope()
        self._running = trio.CancelScope()
        self._stopping = False

    async def serve(
        self, listeners: Sequence[trio.SocketListener], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until `stop` and the end of its grace; closes the listeners. Cancelled, it cuts what is running."""
        sockets = [_plain(listener) for listener in listeners]
        with self._running:
            async with trio.open_nursery() as connections:
                try:
                    with self._accepting:
                        async with trio.open_nursery() as acceptors:
                            for plain in sockets:
                                acceptors.start_soon(self._accept, plain, connections)
                            task_status.started()
                finally:
                    for plain in sockets:
                        plain.close()

    def stop(self, grace_s: float) -> None:
        """Accept nothing more, close idle connections, and cut after `grace_s` what has not ended by itself."""
        self._stopping = True
        self._accepting.cancel()
        for scope in (*self._fresh, *self._idle):
            scope.cancel()
        self._running.deadline = trio.current_time() + grace_s

    def statistics(self) -> dict[str, int]:
        """Return the connections that are open, how many are between requests, and how many had to make room so far."""
        return {
            "connections": self._limits.connections - self._slots.value,
            "idle": len(self._idle),
            "displaced": self._displaced,
        }

    @property
    def stopping(self) -> bool:
        return self._stopping

    def fresh(self, wait_s: float) -> AbstractContextManager[trio.CancelScope]:
        """Bound a new connection's wait for its first request; cut short when the server stops or needs the place."""
        return self._waiting(self._fresh, wait_s)

    def asking(self, wait_s: float) -> AbstractContextManager[trio.CancelScope]:
        """Bound the wait for the rest of a request; cut short when others need the place."""
        return self._waiting(self._asking, wait_s)

    def idle(self, wait_s: float) -> AbstractContextManager[trio.CancelScope]:
        """Bound a wait for another request; cut short when the server stops or others need the place."""
        given_up = self._stopping or self._slots.statistics().tasks_waiting
        return self._waiting(self._idle, 0.0 if given_up else wait_s)

    @contextmanager
    def _waiting(self, waits: dict[trio.CancelScope, float], wait_s: float) -> Iterator[trio.CancelScope]:
        with trio.move_on_after(wait_s) as scope:
            waits[scope] = trio.current_time()
            try:
                yield scope
            finally:
                del waits[scope]

    async def _accept(self, listener: socket.socket, connections: trio.Nursery) -> None:
        trouble = Trouble(listener.getsockname()[1])
        while True:
            await trio.lowlevel.wait_readable(listener)
            await self._take_slot()
            try:
                # All that wait, as far as there is room: one a turn of the loop keeps the last of a crowd waiting.
                while self._accept_nowait(listener, connections):
                    self._slots.acquire_nowait()
            except trio.WouldBlock:
                continue
            except OSError as error:
                await trouble.pause(error)

    def _accept_nowait(self, listener: socket.socket, connections: trio.Nursery) -> bool:
        """Serve the next client that waits, on a slot that was taken for it; give that back where there is none."""
        try:
            client, _ = listener.accept()
        except BlockingIOError:
            self._slots.release()
            return False
        except OSError:
            self._slots.release()
            raise
        connections.start_soon(self._connection, client)
        return True

    async def _take_slot(self) -> None:
        """Wait for room; who does nothing with its place makes some."""
        while True:
            try:
                return self._slots.acquire_nowait()
            except trio.WouldBlock:
                self._displace()
            with trio.move_on_after(_LOOK_S):
                return await self._slots.acquire()

    def _displace(self) -> None:
        """End the connection that is missed least, if there is one that may be ended."""
        now = trio.current_time()
        if now >= self._said_at + _SAY_S:
            self._said_at = now
            log.warning("http.full", connections=self._limits.connections, displaced_before=self._displaced)
        scope = self._silent(now) or self._lagging(now)
        if scope is not None:
            self._displaced += 1
            scope.cancel()

    def _silent(self, now: float) -> trio.CancelScope | None:
        """Return the longest wait for a request that has lasted long enough; idle connections' first."""
        for waits, patience_s in (
            (self._idle, 0.0),
            (self._fresh, self._limits.patience_s),
            (self._asking, self._limits.patience_s),
        ):
            scope = next((scope for scope in waits if not scope.cancel_called), None)
            if scope is not None and waits[scope] + patience_s <= now:
                return scope
        return None

    def _lagging(self, now: float) -> trio.CancelScope | None:
        """Return the whole of a connection whose client takes next to nothing of its answer."""
        if not self._laggards and now >= self._looked_at + _LOOK_S:
            self._looked_at = now
            self._laggards = [connection for connection in self._open if connection.lags(now)]
        while self._laggards:
            connection = self._laggards.pop()
            scope = self._open.get(connection)
            if scope is not None and not scope.cancel_called and connection.lags(now):
                return scope
        return None

    async def _connection(self, client: socket.socket) -> None:
        connection = Connection(client, self._application, self._limits, self)
        try:
            with trio.CancelScope() as self._open[connection]:
                await connection.run()
        except OSError as error:
            log.debug("http.connection_lost", error=str(error))
        except Exception:
            log.exception("http.connection_failed")
        finally:
            self._open.pop(connection, None)
            connection.close()
            self._slots.release()
