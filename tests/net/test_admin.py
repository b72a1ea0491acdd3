# SPDX-License-Identifier: Apache-2.0
"""The admin endpoint: four paths, and no answer to a page that found its way here by DNS rebinding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from prometheus_client import CollectorRegistry, Counter

from p2pdist.net.admin import Admin
from p2pdist.net.http_messages import Request
from tests.http_client import start_server

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    import trio

    from tests.http_client import Client


class Node:
    """What the callables report."""

    ready = True
    parts: Mapping[str, object]

    def __init__(self) -> None:
        self.parts = {"store": "ok", "scheduler": "gone since 12 s"}
        self.registry = CollectorRegistry()
        Counter("p2pdist_things", "Things.", registry=self.registry).inc(3)
        self.admin = Admin(
            self.registry, lambda: (self.ready, self.parts), lambda: {"peers": 2}, names=["Node7.example"]
        )


@pytest.fixture
async def client(nursery: trio.Nursery, connect: Callable[[int], Awaitable[Client]]) -> tuple[Node, Client]:
    node = Node()
    _, port = await start_server(nursery, node.admin)
    return node, await connect(port)


async def test_it_says_that_it_is_alive(client: tuple[Node, Client]) -> None:
    assert (await client[1].get("/livez")).body == b"ok\n"
    assert (await client[1].head("/livez")).status == 200


@pytest.mark.parametrize(("ready", "status"), [(True, 200), (False, 503)])
async def test_readiness_names_the_parts(client: tuple[Node, Client], ready: bool, status: int) -> None:
    client[0].ready = ready
    answer = await client[1].get("/readyz")
    assert (answer.status, answer.json) == (status, {"ready": ready, "parts": client[0].parts})


async def test_metrics_are_in_prometheus_text(client: tuple[Node, Client]) -> None:
    answer = await client[1].get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert b"p2pdist_things_total 3.0" in answer.body


async def test_status_is_json(client: tuple[Node, Client]) -> None:
    answer = await client[1].get("/status?x=1")
    assert (answer.headers["content-type"], answer.json) == ("application/json", {"peers": 2})


async def test_what_fails_to_report_is_a_500_and_the_rest_goes_on(client: tuple[Node, Client]) -> None:
    client[0].parts = {"unprintable": object()}
    assert (await client[1].get("/readyz")).status == 500
    assert (await client[1].get("/livez")).status == 200


async def test_there_is_nothing_else(client: tuple[Node, Client]) -> None:
    assert (await client[1].get("/")).status == 404
    answer = await client[1].get("/status", method="DELETE")
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (None, 200),
        ("127.0.0.1:5052", 200),
        ("[::1]:5052", 200),
        ("[::1]", 200),
        ("localhost", 200),
        ("LOCALHOST:5052", 200),
        ("node7.example:5052", 200),
        ("evil.example", 403),
        ("evil.example:5052", 403),
        ("127.0.0.1.evil.example", 403),
        ("127.0.0.1@evil.example", 403),
        ("localhost:5052:1", 403),
        ("", 403),
    ],
)
async def test_only_addresses_and_known_names_are_answered(host: str | None, status: int) -> None:
    headers = () if host is None else (("host", host),)
    assert (await Node().admin.handle(Request("GET", "/livez", headers))).status == status
