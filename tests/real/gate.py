# SPDX-License-Identifier: Apache-2.0
"""A TCP relay in front of a registry that holds its answers back after so many bytes, until it is opened."""

from __future__ import annotations

import contextlib
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bench.lab.hosts import Host

PORT = 5001
_BACKLOG = 64
_RECEIVE_BYTES = 16 << 10
"""Small: the gate shuts in the middle of a chunk, not behind it."""


class Gate:
    """Relays connections to `PORT` of the registry's host to the registry; see the module.

    Every byte of an answer counts, heads included.
    """

    def __init__(self, host: Host, registry_port: int) -> None:
        self.base_url = f"http://{host.address}:{PORT}"
        self._host = host
        self._registry = (host.address, registry_port)
        self._left_bytes: float = float("inf")
        self._open = trio.Event()
        self.held = trio.Event()
        """Set once there was more to pass on than may pass."""

    def hold_after(self, count_bytes: int) -> None:
        """Let so many more bytes pass and hold back what follows."""
        self._left_bytes = count_bytes
        self._open, self.held = trio.Event(), trio.Event()

    def open(self) -> None:
        """Let everything pass, also what was held back."""
        self._left_bytes = float("inf")
        self._open.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Gate]:
        plain = self._host.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        plain.bind((self._host.address, PORT))
        plain.listen(_BACKLOG)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(plain))
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, self._relay, [listener])
            yield self
            nursery.cancel_scope.cancel()

    async def _relay(self, client: trio.SocketStream) -> None:
        plain = trio.socket.from_stdlib_socket(self._host.socket())
        with contextlib.suppress(OSError):
            await plain.connect(self._registry)
        async with client, trio.SocketStream(plain) as server, trio.open_nursery() as nursery:
            nursery.start_soon(self._pass_on, client, server, False, nursery.cancel_scope)
            nursery.start_soon(self._pass_on, server, client, True, nursery.cancel_scope)

    async def _pass_on(
        self, source: trio.SocketStream, target: trio.SocketStream, gated: bool, both: trio.CancelScope
    ) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await source.receive_some(_RECEIVE_BYTES):
                if gated:
                    data = await self._let_pass(data, target)
                await target.send_all(data)
        both.cancel()

    async def _let_pass(self, data: bytes, target: trio.SocketStream) -> bytes:
        """Pass on what may pass, wait for the gate to be opened where that is not all, and return the rest."""
        if self._left_bytes < len(data):
            first, data = data[: int(self._left_bytes)], data[int(self._left_bytes) :]
            self._left_bytes = 0
            await target.send_all(first)
            self.held.set()
            await self._open.wait()
        else:
            self._left_bytes -= len(data)
        return data
