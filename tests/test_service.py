# SPDX-License-Identifier: Apache-2.0
"""What the service manager is told, on a socket of the kind that systemd gives."""

from __future__ import annotations

import os
import socket
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from p2pdist.service import STATUS_S, ServiceManager

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trio.testing import MockClock


@contextmanager
def manager(address: str | bytes) -> Iterator[socket.socket]:
    """Listen as systemd does; a read that finds nothing fails at once."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(address)
        listener.setblocking(False)
        yield listener


def heard(listener: socket.socket) -> list[list[str]]:
    messages = []
    while True:
        try:
            messages.append(listener.recv(4096).decode().split("\n"))
        except BlockingIOError:
            return messages


def test_each_state_is_one_message(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with manager(path) as listener:
        service = ServiceManager({"NOTIFY_SOCKET": path})
        service.ready()
        service.stopping(12.5)
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        service.reloading()
        ready, stopping, reloading = heard(listener)
    assert ready == ["READY=1"]
    assert stopping == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=12500000"]
    assert reloading[0] == "RELOADING=1"
    name, _, at = reloading[1].partition("=")
    assert name == "MONOTONIC_USEC"
    assert before <= int(at) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_a_name_in_the_abstract_namespace_is_understood() -> None:
    name = f"p2pdist-test-{os.getpid()}"
    with manager(b"\0" + name.encode()) as listener:
        ServiceManager({"NOTIFY_SOCKET": f"@{name}"}).ready()
        assert heard(listener) == [["READY=1"]]


@pytest.mark.parametrize("given", ["", "vsock:2:1", "relative", "/nowhere/at/all"])
def test_nobody_to_tell_is_no_error(given: str) -> None:
    service = ServiceManager({"NOTIFY_SOCKET": given} if given else {})
    service.reloading()
    service.ready()
    service.stopping(1)


@pytest.mark.parametrize(
    ("environ", "interval_s"),
    [
        pytest.param({"WATCHDOG_USEC": "20000000"}, 10, id="twice as often as asked"),
        pytest.param({"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": str(os.getpid())}, 10, id="meant for us"),
        pytest.param({"WATCHDOG_USEC": "20000000", "WATCHDOG_PID": "1"}, STATUS_S, id="meant for another"),
        pytest.param({"WATCHDOG_USEC": "nonsense"}, STATUS_S, id="nonsense"),
        pytest.param({}, STATUS_S, id="no watchdog"),
    ],
)
async def test_the_loop_itself_feeds_the_watchdog(
    tmp_path: Path, autojump_clock: MockClock, environ: dict[str, str], interval_s: float
) -> None:
    path = str(tmp_path / "notify")
    numbers = iter(range(100))
    with manager(path) as listener:
        service = ServiceManager({"NOTIFY_SOCKET": path, **environ})
        with trio.move_on_after(2.5 * interval_s):
            await service.watch(lambda: f"{next(numbers)} peers")
        assert heard(listener) == [["WATCHDOG=1", f"STATUS={number} peers"] for number in range(3)]


async def test_without_a_manager_nothing_is_watched(autojump_clock: MockClock) -> None:
    await ServiceManager({"WATCHDOG_USEC": "20000000"}).watch(lambda: pytest.fail("asked for a status"))
