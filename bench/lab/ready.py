# SPDX-License-Identifier: Apache-2.0
"""Waits, bounded, until a process that was started answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from bench.lab.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from bench.lab.hosts import Host
    from bench.lab.processes import Process

_POLL_S = 0.1


async def until(
    condition: Callable[[], Awaitable[bool]], process: Process, timeout_s: float, *, poll_s: float = _POLL_S
) -> None:
    """Wait until `condition` holds. Raises LabError: the process ended, or time is up."""
    with trio.move_on_after(timeout_s):
        while not await condition():
            process.check()
            await trio.sleep(poll_s)
        return
    raise LabError(f"{process.name} is not ready after {timeout_s:.0f} s", log=process.tail())


async def accepting(host: Host, port: int, process: Process, timeout_s: float) -> None:
    """Wait until a port of `host` accepts connections, which `host` itself makes. Raises LabError."""

    async def accepts() -> bool:
        connection = trio.socket.from_stdlib_socket(host.socket())
        try:
            await connection.connect((host.address, port))
        except OSError:
            return False
        finally:
            connection.close()
        return True

    await until(accepts, process, timeout_s)
