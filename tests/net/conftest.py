# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of net/."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest

from tests.fake_registry import FakeRegistry
from tests.http_client import Client
from tests.net.links import CHUNK, socket_pair
from tests.net.origins import BLOB, MANIFEST, REPO, client_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from p2pdist.net.origin import OriginClient


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


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry().running() as running:
        running.add_blob(BLOB)
        running.add_manifest(REPO.name, MANIFEST, tag="v1")
        yield running


@pytest.fixture
async def storage() -> AsyncIterator[FakeRegistry]:
    """Another server, where the registry redirects to."""
    async with FakeRegistry().running() as running:
        running.add_blob(BLOB)
        yield running


@pytest.fixture
async def origin(registry: FakeRegistry) -> AsyncIterator[OriginClient]:
    async with client_of(registry) as client:
        yield client


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    pair = socket_pair()
    yield pair
    for sock in pair:
        sock.close()


@pytest.fixture
def chunk_file() -> Iterator[int]:
    """A descriptor of a file in memory that holds CHUNK."""
    descriptor = os.memfd_create("chunk")
    os.pwrite(descriptor, CHUNK, 0)
    yield descriptor
    os.close(descriptor)
