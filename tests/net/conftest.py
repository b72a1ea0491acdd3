# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of net/."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.http_client import Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable


@pytest.fixture
async def connect() -> AsyncIterator[Callable[[int], Awaitable[Client]]]:
    """Yield a function (loopback port) -> `Client`; every connection is closed in the end."""
    clients: list[Client] = []

    async def connect(port: int) -> Client:
        clients.append(await Client.connect(port))
        return clients[-1]

    yield connect
    for client in clients:
        client.stream.socket.close()
