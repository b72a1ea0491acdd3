# SPDX-License-Identifier: Apache-2.0
"""What `/metrics` shows of an agent."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields
from typing import TYPE_CHECKING

import trio
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from p2pdist.agent import Agent
from p2pdist.config import Address, AgentConfig, RegistryConfig
from p2pdist.core.state import Counters
from p2pdist.identity.keeper import Files, FilesKeeper
from tests.fake_registry import FakeRegistry
from tests.http_client import Client
from tests.identities import make_authority, pem_of
from tests.nodes import eventually

if TYPE_CHECKING:
    from pathlib import Path

ANY_PORT = Address("127.0.0.1", 0)


def shown(agent: Agent) -> dict[str, float]:
    """Return every sample, under its name and labels."""
    text = generate_latest(agent.metrics).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        sample.name + "".join(f" {key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for sample in samples
    }


def config_of(data_dir: Path, url: str) -> AgentConfig:
    return AgentConfig(
        mirror_listen=ANY_PORT,
        peer_listen=ANY_PORT,
        admin_listen=ANY_PORT,
        mdns=False,
        scheduler=(Address("127.0.0.1", 1),),
        data_dir=data_dir,
        registries={"reg.test": RegistryConfig(url)},
        store_min_free=0,
    )


async def test_what_a_pull_did_is_shown_in_every_family(tmp_path: Path, nursery: trio.Nursery) -> None:
    async with FakeRegistry().running() as registry:
        registry.add_image("lab/image", "v1", [b"x" * 300_000])
        agent = Agent(config_of(tmp_path, registry.url))
        await nursery.start(agent.run)
        before = shown(agent)
        client = await Client.connect(agent.mirror_at.port)
        await client.get("/v2/reg.test/lab/image/manifests/v1")
        await client.stream.aclose()
        await eventually(lambda: agent.images.pulled == 1 and not agent.puller.arrivals)
        after = shown(agent)
        expected = {
            "p2pdist_swarm_from_origin_bytes_total": 300_002,
            "p2pdist_swarm_from_peers_bytes_total": 0,
            "p2pdist_images_pulled_total": 1,
            "p2pdist_peers": 0,
            "p2pdist_peer_bans_total reason=corrupt": 0,
            "p2pdist_peers_banned": 0,
            "p2pdist_pulls": 0,
            "p2pdist_scheduler_connected": 0,
            "p2pdist_store_blobs": 3,
            "p2pdist_store_partial_blobs": 0,
        }
        assert {name: after[name] for name in expected} == expected
        assert after["p2pdist_origin_requests_total registry=reg.test"] == len(registry.requests)
        assert after["p2pdist_origin_bytes_total registry=reg.test"] > 300_002
        assert before["p2pdist_images_pulled_total"] == 0
        assert before.keys() <= after.keys()
        assert after["p2pdist_tasks"] > 10
        nursery.cancel_scope.cancel()


async def test_every_counter_of_the_machine_is_shown_with_its_unit(tmp_path: Path, nursery: trio.Nursery) -> None:
    agent = Agent(config_of(tmp_path, "http://127.0.0.1:1"))
    await nursery.start(agent.run)
    names = {name for name in shown(agent) if name.startswith("p2pdist_swarm_")}
    for field in fields(Counters):
        assert names & {f"p2pdist_swarm_{field.name}_total", f"p2pdist_swarm_{field.name}_bytes_total"}, field.name
    assert len(names) == len(fields(Counters))
    nursery.cancel_scope.cancel()


async def test_an_agent_with_an_identity_shows_when_it_ends_and_whom_it_keeps_out(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    ours = make_authority(tmp_path / "ca")
    pem, key = pem_of(ours, "node-7")
    for name, data in (("ca.pem", ours.certificate), ("cert.pem", pem), ("key.pem", key)):
        (tmp_path / name).write_bytes(data)
    keeper = FilesKeeper(Files(tmp_path / "ca.pem", tmp_path / "cert.pem", tmp_path / "key.pem"))
    agent = Agent(config_of(tmp_path / "data", "http://127.0.0.1:1"), keeper=keeper)
    await nursery.start(agent.run)
    async with await trio.open_tcp_stream("127.0.0.1", agent.peers_at.port) as stream:
        await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
        with suppress(trio.BrokenResourceError):
            await stream.receive_some(100)
    await eventually(lambda: agent.refusals.counts["plain"] == 1)
    after = shown(agent)
    assert after["p2pdist_identity_ends_timestamp_seconds"] == keeper.identity.credential.not_after
    assert after["p2pdist_connections_refused_total reason=plain"] == 1
    assert agent.peer_id == keeper.identity.name.peer_id
    assert agent.status()["cluster"] == "lab"
