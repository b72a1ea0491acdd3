# SPDX-License-Identifier: Apache-2.0
"""Real runtimes pull a multi-arch image of gzip and zstd layers through real agents, from a real registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.real.cluster import ALONE, MDNS, SCHEDULER
from tests.real.containerd import Cri2
from tests.real.runtimes import Runtime, expect_only_agents_at_the_origin, running

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from bench.lab.images import Image
    from tests.real.cluster import Cluster

    ClusterOf = Callable[..., AbstractAsyncContextManager[Cluster]]


async def test_a_cold_pull_comes_through_the_agent_and_once_from_the_origin_a_warm_one_from_the_agent_alone(
    kind: type[Runtime], image: Image, cluster_of: ClusterOf
) -> None:
    async with cluster_of(image, nodes=1, found_by=ALONE) as cluster:
        (agent,) = await cluster.start("node1")
        async with running(kind, cluster, agent) as runtime:
            await runtime.pull(":v1")
            await runtime.expect(image)
            await cluster.settled()
            cold = await cluster.moved("node1")
            assert cold["to_runtime"] >= image.pull_bytes
            layers_bytes = sum(layer.size_bytes for layer in image.layers)
            assert layers_bytes <= cold["from_origin"] <= image.pull_bytes
            assert cluster.registry.sent_bytes() <= image.pull_bytes + image.root.size_bytes + 4096
            await runtime.forget(image)
            cluster.registry.process.kill()
            await runtime.pull(f"@{image.root.digest}")
            await runtime.expect(image)
            warm = await cluster.moved("node1")
            assert warm["to_runtime"] - cold["to_runtime"] >= image.pull_bytes
            assert warm["from_origin"] == cold["from_origin"]
        expect_only_agents_at_the_origin(cluster, kind)


async def test_containerd_2_would_fetch_parts_of_a_layer_at_once_and_is_given_one_stream(
    image: Image, cluster_of: ClusterOf, require: Callable[[str, str], str]
) -> None:
    """Its readers of parts do not go on at the origin when the agent is gone; that of a stream does."""
    Cri2.require(require)
    async with cluster_of(image, nodes=1, found_by=ALONE) as cluster:
        (agent,) = await cluster.start("node1")
        async with running(Cri2, cluster, agent) as runtime:
            await runtime.pull(":v1")
            await runtime.expect(image)
            assert runtime.log().count("forcing parallelism to 1") == len((image.root, *image.parts))


@pytest.mark.parametrize("found_by", [SCHEDULER, MDNS])
async def test_with_the_origin_stopped_a_pull_by_digest_comes_from_the_peer_that_has_it(
    kind: type[Runtime],
    found_by: str,
    image: Image,
    cluster_of: ClusterOf,
) -> None:
    async with cluster_of(image, nodes=2, found_by=found_by) as cluster:
        await cluster.start("node1")
        await cluster.pull("node1", image)
        await cluster.settled()
        cluster.registry.process.kill()
        (agent,) = await cluster.start("node2")
        async with running(kind, cluster, agent) as runtime:
            await runtime.pull(f"@{image.root.digest}")
            await runtime.expect(image)
        moved = await cluster.moved("node2")
        assert moved["from_origin"] == 0
        assert moved["from_peers"] >= image.pull_bytes
        assert moved["to_runtime"] >= image.pull_bytes
        assert (await cluster.moved("node1"))["to_peers"] >= image.pull_bytes
        expect_only_agents_at_the_origin(cluster, kind)
