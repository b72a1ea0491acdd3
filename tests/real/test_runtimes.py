# SPDX-License-Identifier: Apache-2.0
"""Real container runtimes pull a multi-arch image of gzip layers through real agents, from a real registry."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.real.cluster import MDNS, SCHEDULER
from tests.real.runtimes import Containerd, Podman, Runtime, Skopeo, require_runtime, running

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from bench.lab.images import Image
    from tests.real.cluster import Cluster


@pytest.fixture(params=[Skopeo, Containerd, Podman], ids=lambda kind: kind.__name__.lower())
def kind(request: pytest.FixtureRequest, require: Callable[[str, str], str]) -> type[Runtime]:
    chosen: type[Runtime] = request.param
    require_runtime(chosen, require)
    return chosen


async def test_a_cold_pull_by_tag_comes_through_the_agent_and_once_from_the_origin(
    kind: type[Runtime], image: Image, cluster_of: Callable[..., AbstractAsyncContextManager[Cluster]]
) -> None:
    async with cluster_of(image, nodes=1) as cluster:
        (agent,) = await cluster.start("node1")
        async with running(kind, cluster, agent) as runtime:
            await runtime.pull(":v1")
            await runtime.expect(image)
        await cluster.settled()
        moved = await cluster.moved("node1")
        assert moved["to_runtime"] >= image.pull_bytes
        layers_bytes = sum(layer.size_bytes for layer in image.layers)
        assert layers_bytes <= moved["from_origin"] <= image.pull_bytes
        expect_only_agents_at_the_origin(cluster, kind)
        assert cluster.registry.sent_bytes() <= image.pull_bytes + image.root.size_bytes + 4096


@pytest.mark.parametrize("found_by", [SCHEDULER, MDNS])
async def test_with_the_origin_stopped_a_pull_by_digest_comes_from_the_peer_that_has_it(
    kind: type[Runtime],
    found_by: str,
    image: Image,
    cluster_of: Callable[..., AbstractAsyncContextManager[Cluster]],
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


def expect_only_agents_at_the_origin(cluster: Cluster, kind: type[Runtime]) -> None:
    """The origin is configured as what the runtime falls back to: it must not have had to."""
    agents = {entry.get("http.request.useragent", "") for entry in cluster.requests()}
    assert agents == {"p2pdist"}, f"{kind.name} went past the mirror"
