# SPDX-License-Identifier: Apache-2.0
"""What a program tells the service manager that started it: sd_notify(3), without a library.

Owns: the messages READY, RELOADING, STOPPING, STATUS and WATCHDOG to the socket that `NOTIFY_SOCKET` names. Without
that variable every call does nothing. Invariants: no call raises, and none waits for more than SEND_S; the watchdog
is fed by the event loop itself, so that a loop that is stuck is noticed.
"""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

import structlog
import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

log = structlog.get_logger(__name__)

SEND_S = 1.0
"""How long the manager's socket may be full."""
STATUS_S = 30.0
"""Between two STATUS lines where no watchdog asks more often."""


class ServiceManager:
    """The service manager, or nobody.

    Args:
        environ: the process's environment, with `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID` as sd_notify(3)
            and sd_watchdog_enabled(3) have them.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self._watchdog_s = _watchdog_s(environ)

    def ready(self) -> None:
        """Say that the start, or a reload, is done."""
        self._send("READY=1")

    def reloading(self) -> None:
        """Say that the settings are being read again; `ready` follows."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, within_s: float) -> None:
        """Say that the program ends, and how long that may take."""
        self._send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(within_s * 1e6)}")

    async def watch(self, status: Callable[[], str]) -> None:
        """Feed the watchdog at twice the pace that it asks for, with a line on how things are, until cancelled."""
        if self._address is None:
            return
        interval_s = min(STATUS_S, self._watchdog_s / 2)
        while True:
            self._send("WATCHDOG=1", f"STATUS={status()}")
            await trio.sleep(interval_s)

    def _send(self, *fields: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(SEND_S)
                sender.connect(self._address)
                sender.send("\n".join(fields).encode())
        except OSError as error:
            log.warning("the service manager does not hear us", why=str(error), message=fields[0])


def _address(text: str) -> str | bytes | None:
    """Return what to connect to; `@name` is a name in the abstract namespace."""
    if text.startswith("@"):
        return b"\0" + os.fsencode(text[1:])
    return text if text.startswith("/") else None


def _watchdog_s(environ: Mapping[str, str]) -> float:
    """Return how long the manager waits for a sign of life; endless where none is asked of this process."""
    text, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not text.isdecimal() or int(text) == 0 or pid not in ("", str(os.getpid())):
        return float("inf")
    return int(text) / 1e6
