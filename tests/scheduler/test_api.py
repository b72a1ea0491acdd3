# SPDX-License-Identifier: Apache-2.0
"""The scheduler's HTTP API: what it answers, to whom."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from p2pdist.config import Address
from p2pdist.core.chunkmap import MIN_CHUNK_BYTES
from p2pdist.core.types import Digest, PeerId
from p2pdist.core.wire import Done, Join, PeerAddress
from scheduler import api
from scheduler.api import make_api
from scheduler.config import SchedulerConfig
from scheduler.server import SchedulerServer
from tests.identities import CLUSTER, make_authority

BLOB = Digest("sha256:" + "1" * 64)
ONE, TWO = PeerId("1" * 32), PeerId("2" * 32)


def server_at(host: str = "127.0.0.1") -> SchedulerServer:
    return SchedulerServer(SchedulerConfig(api_listen=Address(host, 5061), cluster="lab"))


def busy_server() -> SchedulerServer:
    """Return a scheduler with two agents, of which one pulls a blob of three chunks and has one."""
    server = server_at()
    for peer, port in ((ONE, 1), (TWO, 2)):
        server.state.connected(PeerAddress(peer, "10.0.0.1", port, "here"))
    server.state.said(ONE, Join(BLOB, 3 * MIN_CHUNK_BYTES, "reg.test", b"\0", b""), 100.0)
    server.state.said(ONE, Done(BLOB, 3 * MIN_CHUNK_BYTES, 0, b"s" * 16), 100.0)
    return server


async def ask(server: SchedulerServer, target: str, *, host: str = "localhost", method: str = "GET") -> httpx.Response:
    transport = httpx.ASGITransport(make_api(server))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        return await client.request(method, target, headers={"host": host})


async def test_health_is_answered() -> None:
    answer = await ask(server_at(), "/livez")
    assert (answer.status_code, answer.text) == (200, "ok\n")
    ready = await ask(server_at(), "/readyz")
    assert (ready.status_code, ready.json()["ready"], ready.json()["parts"]["agents"]) == (200, True, 0)
    assert ready.json()["parts"]["identity"].startswith("off: ")


async def test_a_scheduler_with_an_identity_says_who_it_is_and_until_when(tmp_path: Path) -> None:
    server = SchedulerServer(SchedulerConfig(ca_dir=make_authority(tmp_path / "ca").directory))
    ready = (await ask(server, "/readyz")).json()
    assert ready["parts"]["identity"].startswith("ok: scheduler/")
    status = (await ask(server, "/status")).json()
    assert (status["cluster"], status["identity"]["state"]) == (CLUSTER, "ok")
    metrics = (await ask(server, "/metrics")).text
    assert "\np2pdist_identity_ends_timestamp_seconds " in metrics
    assert 'p2pdist_connections_refused_total{reason="no-certificate"} 0.0' in metrics


async def test_the_status_tells_agents_and_swarms() -> None:
    status = (await ask(busy_server(), "/status")).json()
    assert status["cluster"] == "lab"
    assert status["schedulers"] == [status["scheduler"]]
    assert status["agents"] == 2
    first = {"peer_id": ONE, "host": "10.0.0.1", "port": 1, "site": "here", "leases": 2}
    assert status["agent_list"][0] == first
    assert status["swarms"] == [
        {
            "blob": BLOB,
            "size_bytes": 3 * MIN_CHUNK_BYTES,
            "members": 1,
            "chunks_done": 1,
            "chunks": 3,
            "leases": 2,
            "led": True,
        }
    ]
    assert (status["leases_granted"], status["leases_lapsed"]) == (3, 0)


async def test_a_long_status_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MAX_LISTED", 1)
    status = (await ask(busy_server(), "/status")).json()
    assert (status["agents"], len(status["agent_list"])) == (2, 1)


async def test_metrics_are_read_from_the_state_at_each_scrape() -> None:
    server = busy_server()
    text = (await ask(server, "/metrics")).text
    for line in (
        "p2pdist_scheduler_agents 2.0",
        "p2pdist_scheduler_swarms 1.0",
        "p2pdist_scheduler_swarms_led 1.0",
        "p2pdist_scheduler_schedulers 1.0",
        "p2pdist_scheduler_leases 2.0",
        "p2pdist_scheduler_leases_granted_total 3.0",
        "p2pdist_scheduler_messages_received_total 0.0",
    ):
        assert f"\n{line}\n" in text
    server.state.gone(ONE, 101.0)
    assert "\np2pdist_scheduler_agents 1.0\n" in (await ask(server, "/metrics")).text


@pytest.mark.parametrize("host", ["localhost", "localhost:5061", "127.0.0.1:5061", "[::1]:5061", "LOCALHOST"])
async def test_it_answers_to_the_names_of_this_machine(host: str) -> None:
    assert (await ask(server_at(), "/status", host=host)).status_code == 200


@pytest.mark.parametrize("host", ["attacker.test", "attacker.test:5061", "127.0.0.1.attacker.test", ""])
async def test_a_browser_lured_here_by_another_name_is_refused(host: str) -> None:
    for target in ("/status", "/metrics", "/livez"):
        assert (await ask(server_at(), target, host=host)).status_code == 400


@pytest.mark.parametrize(
    ("listen", "host"),
    [
        pytest.param("10.1.2.3", "10.1.2.3:5061", id="one address"),
        pytest.param("fd00::1", "[fd00::1]:5061", id="one IPv6 address"),
        pytest.param("node1.lan", "node1.lan", id="one name"),
        pytest.param("0.0.0.0", "10.9.9.9:5061", id="all addresses, asked by one"),
        pytest.param("::", "[fd00::9]", id="all addresses, asked by an IPv6 one"),
        pytest.param("0.0.0.0", "scheduler.lan", id="all addresses, asked by a name"),
    ],
)
async def test_it_answers_to_what_it_listens_on(listen: str, host: str) -> None:
    assert (await ask(server_at(listen), "/livez", host=host)).status_code == 200


@pytest.mark.parametrize(("method", "target", "status"), [("POST", "/status", 405), ("GET", "/nothing", 404)])
async def test_nothing_can_be_changed(method: str, target: str, status: int) -> None:
    assert (await ask(server_at(), target, method=method)).status_code == status
