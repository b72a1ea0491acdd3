# SPDX-License-Identifier: Apache-2.0
"""Peers and origins that send wrong bytes: no runtime gets a complete wrong blob, nothing wrong is kept."""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from bench.lab import agents as lab_agents
from bench.lab import http
from bench.lab.hosts import Link, loopback_lab
from bench.lab.http import HttpFailure
from bench.lab.lying_peer import LyingPeer
from bench.lab.processes import ProcessGroup
from bench.lab.pullers import Pull
from tests.fake_registry import FakeRegistry
from tests.real.cluster import ALONE, REPOSITORY, SCHEDULER, BlobReading, until
from tests.real.runtimes import Runtime, expect_only_agents_at_the_origin, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from bench.lab.agents import Agent
    from bench.lab.images import Image
    from tests.real.cluster import Cluster

ORIGIN = Link(100, 100)
"""Slower than a peer, so that an agent with both takes much from the peer."""

BLOB = bytes(range(256)) * 8192
"""2 MiB: eight chunks."""


@pytest.mark.parametrize("found_by", [SCHEDULER, ALONE])
async def test_a_peer_that_sends_wrong_bytes_is_dropped_and_named_and_the_pull_ends_right(
    cluster_of: Callable[..., AbstractAsyncContextManager[Cluster]], large_image: Image, found_by: str
) -> None:
    async with cluster_of(large_image, nodes=2, found_by=found_by, origin=ORIGIN) as cluster:
        await cluster.start("node1")
        liar = LyingPeer(cluster.lab["node2"], (cluster.lab["node1"].address, 5051))
        async with liar.running():
            await until(lambda: knows(cluster, liar), "the agent is connected to the lying peer")
            await cluster.pull("node1", large_image)
            # Most often its word is refuted before a byte was taken.
            await until(liar.dropped.is_set, "the lying peer was dropped")
        told = [line for line in cluster.log("node1").splitlines() if "peer dropped" in line and liar.peer_id in line]
        assert told, "the log does not name the liar"
        assert "sha256:" in told[0]


async def test_a_liar_that_takes_part_in_leasing_does_not_get_a_whole_wrong_blob_to_a_runtime(
    cluster_of: Callable[..., AbstractAsyncContextManager[Cluster]], large_image: Image
) -> None:
    """Where no scheduler is, the word of a chunk's lease holder counts: wrong bytes may flow, but not to the end."""
    async with cluster_of(large_image, nodes=2, found_by=ALONE, origin=ORIGIN) as cluster:
        await cluster.start("node1")
        liar = LyingPeer(cluster.lab["node2"], (cluster.lab["node1"].address, 5051), wants=True)
        async with liar.running():
            await until(lambda: knows(cluster, liar), "the agent is connected to the lying peer")
            first = Pull("node1")
            await cluster.pull_into(first, large_image)
            assert first.right or re.search("cut off|reset", str(first.error)), first.error
            await until(liar.dropped.is_set, "the lying peer was dropped")
        await cluster.pull("node1", large_image)


async def test_every_runtime_gets_its_image_right_beside_a_peer_that_sends_wrong_bytes(
    kind: type[Runtime], image: Image, cluster_of: Callable[..., AbstractAsyncContextManager[Cluster]]
) -> None:
    async with cluster_of(image, nodes=2, origin=ORIGIN) as cluster:
        (agent,) = await cluster.start("node1")
        liar = LyingPeer(cluster.lab["node2"], (cluster.lab["node1"].address, 5051))
        async with running(kind, cluster, agent) as runtime, liar.running():
            await until(lambda: knows(cluster, liar), "the agent is connected to the lying peer")
            await runtime.pull(":v1")
            await runtime.expect(image)
            # Most often its word is refuted before a byte was taken.
            await until(liar.dropped.is_set, "the lying peer was dropped")
        expect_only_agents_at_the_origin(cluster, kind)


async def knows(cluster: Cluster, liar: LyingPeer) -> bool:
    return liar.peer_id in [peer["peer_id"] for peer in (await cluster.status("node1"))["peers"]]


@pytest.mark.parametrize("wrong_at", [0, len(BLOB) // 2, len(BLOB) - 1], ids=["first", "middle", "last"])
async def test_no_runtime_gets_a_whole_wrong_blob_from_an_origin(tmp_path: Path, wrong_at: int) -> None:
    registry = FakeRegistry()
    digest = registry.add_blob(BLOB)
    manifest = registry.add_image(REPOSITORY, "v1", [BLOB])
    wrong = bytearray(BLOB)
    wrong[wrong_at] ^= 1
    registry.blobs[digest] = bytes(wrong)
    async with registry.running(), agent_of(registry, tmp_path) as agent:
        for named in (False, True):
            if named:
                await get(agent, "manifests", manifest)
            with pytest.raises((HttpFailure, AssertionError)) as failure:
                await get(agent, "blobs", digest)
            assert re.search("cut off|reset|status 5", str(failure.value))
        status = await until(agent.status, "the agent tells its status")
        assert status["store"]["blobs"] <= 2, "more is kept than the manifest and the config"
        assert digest in agent.process.log.read_text(), "the log does not name the blob"
        registry.blobs[digest] = BLOB
        assert await get(agent, "blobs", digest) == digest


@asynccontextmanager
async def agent_of(registry: FakeRegistry, place: Path) -> AsyncIterator[Agent]:
    """Give an agent on an address of the loopback interface, in front of this registry."""
    with loopback_lab(["node1"]) as lab, ProcessGroup(place) as group:
        agent = lab_agents.start_agent(group, lab["node1"], place, registry.url, ["--no-mdns"])
        await agent.wait_ready()
        yield agent


async def get(agent: Agent, kind: str, reference: str) -> str:
    """Return the digest of what the agent answers; raises HttpFailure where it is cut, AssertionError on an error."""
    async with http.HttpConnection(agent.host, agent.source.base_url) as connection:
        head = await connection.request("GET", agent.source.target(REPOSITORY, kind, reference))
        assert head.status_code == 200, f"status {head.status_code}: {(await connection.read_all())[:300]!r}"
        return await BlobReading(connection).read_to_end()
