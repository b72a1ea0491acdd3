# SPDX-License-Identifier: Apache-2.0
"""Accepting connections through bad times: out of descriptors, or the system out of memory.

Owns: that none of these ends the program, that accepting pauses meanwhile, and that the log says so once a minute and
not at each try. What is open already is served on.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import structlog
import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

log = structlog.get_logger(__name__)

PAUSE_S = 0.1
"""Out of descriptors, accepting fails at once and again: without a pause it would take the processor."""
SAY_S = 60.0
_OUT_OF_FILES = {errno.EMFILE, errno.ENFILE}


class Trouble:
    """What is said of one listening port whose connections cannot be accepted."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._said_at = float("-inf")

    async def pause(self, error: OSError) -> None:
        """Say why, unless that was said lately, and wait a little."""
        now = trio.current_time()
        if now - self._said_at >= SAY_S:
            self._said_at = now
            mend = "raise the limit on open files (LimitNOFILE, ulimit -n)" if error.errno in _OUT_OF_FILES else None
            log.warning(
                "connections cannot be accepted; those that are open go on", port=self._port, why=str(error), mend=mend
            )
        await trio.sleep(PAUSE_S)


async def serve(
    handler: Callable[[trio.SocketStream], Awaitable[None]],
    listeners: Sequence[trio.SocketListener],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run `handler` in a task for each connection, until cancelled; closes the listeners and the connections."""
    async with trio.open_nursery() as nursery:
        for listener in listeners:
            nursery.start_soon(_accept, listener, handler, nursery)
        task_status.started()


async def _accept(
    listener: trio.SocketListener, handler: Callable[[trio.SocketStream], Awaitable[None]], nursery: trio.Nursery
) -> None:
    trouble = Trouble(listener.socket.getsockname()[1])
    async with listener:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:
                await trouble.pause(error)
            else:
                nursery.start_soon(_run, handler, stream)


async def _run(handler: Callable[[trio.SocketStream], Awaitable[None]], stream: trio.SocketStream) -> None:
    try:
        await handler(stream)
    finally:
        await trio.aclose_forcefully(stream)
