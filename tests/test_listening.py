# SPDX-License-Identifier: Apache-2.0
"""Connections that cannot be accepted end nothing; the log says so now and then."""

from __future__ import annotations

import errno
import os

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from p2pdist.listening import PAUSE_S, SAY_S, serve


class ShortSocket:
    """A listening socket of a system that is short of something: so many accepts fail."""

    def __init__(self, real: trio.socket.SocketType, error: int, failures: int) -> None:
        self._real, self._error, self.failures = real, error, failures

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    async def accept(self) -> object:
        await trio.lowlevel.checkpoint()
        if self.failures:
            self.failures -= 1
            raise OSError(self._error, os.strerror(self._error))
        return await self._real.accept()


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENOBUFS], ids=errno.errorcode.get)
async def test_accepting_goes_on_after_it_failed_and_is_complained_about_once_a_minute(
    error: int, quick_clock: MockClock
) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = listener.socket.getsockname()
    failures = int(1.5 * SAY_S / PAUSE_S)
    short = ShortSocket(listener.socket, error, failures)
    listener.socket = short  # type: ignore[assignment]

    async def handler(stream: trio.SocketStream) -> None:
        await stream.send_all(b"hello")

    with capture_logs() as logs:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, handler, [listener])
            await trio.sleep((failures + 1) * PAUSE_S)
            assert short.failures == 0
            client = await trio.open_tcp_stream(*address)
            assert await client.receive_some() == b"hello"
            assert await client.receive_some() == b""
            await client.aclose()
            nursery.cancel_scope.cancel()
    assert [entry["event"] for entry in logs] == ["connections cannot be accepted; those that are open go on"] * 2
    assert logs[0]["port"] == address[1]
    assert (logs[0]["mend"] is not None) == (error == errno.EMFILE)
