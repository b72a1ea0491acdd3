# SPDX-License-Identifier: Apache-2.0
"""An HTTP/1.1 server for the node's own runtimes and for people: listeners, places and an orderly end.

Owns: accepting, the number of connections, idle ones, and stopping. What happens on a connection is
`http_connection`'s, what is served the `Application`'s. Shared by the mirror and the admin endpoint.

Invariants: at most `Limits.connections` are open, further clients wait in the listen queue; nothing that a client or
the application does ends the server.
"""

from __future__ import annotations

import errno
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

import structlog
import trio

from p2pdist.errors import ConfigError
from p2pdist.net.http_connection import Connection
from p2pdist.net.http_messages import Limits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from p2pdist.net.http_messages import Application

log = structlog.get_logger(__name__)

_BACKLOG = 512
_ACCEPT_PAUSE_S = 0.1
"""Out of file descriptors, accepting fails at once and again: without a pause it would take the processor."""


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
        self._fresh: set[trio.CancelScope] = set()
        self._idle: dict[trio.CancelScope, None] = {}
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
        """Return the connections that are open, and how many of them are between requests."""
        return {"connections": self._limits.connections - self._slots.value, "idle": len(self._idle)}

    @property
    def stopping(self) -> bool:
        return self._stopping

    @contextmanager
    def fresh(self, wait_s: float) -> Iterator[None]:
        """Bound a new connection's wait for its first request; cut short when the server stops."""
        with trio.move_on_after(wait_s) as scope:
            self._fresh.add(scope)
            try:
                yield
            finally:
                self._fresh.remove(scope)

    @contextmanager
    def idle(self, wait_s: float) -> Iterator[None]:
        """Bound a wait for another request; cut short when the server stops or others need the place."""
        with trio.move_on_after(wait_s) as scope:
            if self._stopping or self._slots.statistics().tasks_waiting:
                scope.cancel()
            self._idle[scope] = None
            try:
                yield
            finally:
                del self._idle[scope]

    async def _accept(self, listener: socket.socket, connections: trio.Nursery) -> None:
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
                log.warning("http.accept_failed", error=str(error))
                await trio.sleep(_ACCEPT_PAUSE_S)

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
        """Wait for room; the connection that has been idle longest makes some."""
        try:
            self._slots.acquire_nowait()
        except trio.WouldBlock:
            if self._idle:
                next(iter(self._idle)).cancel()
            await self._slots.acquire()

    async def _connection(self, client: socket.socket) -> None:
        connection = Connection(client, self._application, self._limits, self)
        try:
            await connection.run()
        except OSError as error:
            log.debug("http.connection_lost", error=str(error))
        except Exception:
            log.exception("http.connection_failed")
        finally:
            connection.close()
            self._slots.release()
