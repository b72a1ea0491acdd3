# SPDX-License-Identifier: Apache-2.0
"""The agent dies or hangs in the middle of a pull: every runtime still gets its image, from the origin itself."""

from __future__ import annotations

import itertools
import random
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import trio

from bench.lab.registry import PORT as REGISTRY_PORT
from tests.real.cluster import ALONE, DEADLINE_S, until
from tests.real.gate import Gate
from tests.real.runtimes import Runtime, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from bench.lab.images import Image
    from tests.real.cluster import Cluster

    ClusterOf = Callable[..., AbstractAsyncContextManager[Cluster]]


@asynccontextmanager
async def held_cluster(cluster_of: ClusterOf, *images: Image) -> AsyncIterator[tuple[Cluster, Gate]]:
    """Give a cluster whose agent, on node1, gets from the origin what the gate lets pass; runtimes go around that."""
    async with cluster_of(*images, nodes=1, found_by=ALONE) as cluster:
        gate = Gate(cluster.lab["registry"], REGISTRY_PORT)
        async with gate.running():
            await cluster.start("node1", origin_url=gate.base_url)
            yield cluster, gate


async def test_a_pull_survives_an_agent_that_is_killed_in_the_middle_of_a_layer(
    kind: type[Runtime], image: Image, cluster_of: ClusterOf
) -> None:
    async with held_cluster(cluster_of, image) as (cluster, gate):
        agent = cluster.agents["node1"]
        async with running(kind, cluster, agent) as runtime, trio.open_nursery() as nursery:
            gate.hold_after(image.pull_bytes // 2)
            nursery.start_soon(runtime.pull, ":v1")
            with trio.fail_after(DEADLINE_S):
                await gate.held.wait()
            await until(lambda: served(cluster), "the runtime has the manifests from the agent")
            agent.process.kill()
        await runtime.expect(image)
        expect_fallback(cluster, kind)


async def test_twenty_of_twenty_pulls_succeed_while_the_agent_is_killed_at_random_moments(
    kinds: list[type[Runtime]], twenty_images: list[Image], cluster_of: ClusterOf
) -> None:
    """A moment is a number of bytes that the agent has from the origin; it is started again at once, as by systemd."""
    rng = random.Random(4)
    async with held_cluster(cluster_of, *twenty_images) as (cluster, gate), AsyncExitStack() as stack:
        runtimes = [await stack.enter_async_context(running(kind, cluster, cluster.agents["node1"])) for kind in kinds]
        for runtime, image in zip(itertools.cycle(runtimes), twenty_images, strict=False):
            gate.hold_after(rng.randrange(image.pull_bytes))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(runtime.pull, f":{image.tag}")
                with trio.fail_after(DEADLINE_S):
                    await gate.held.wait()
                cluster.agents["node1"].process.kill()
                gate.open()
                await cluster.start("node1", origin_url=gate.base_url)
            await runtime.expect(image)


def expect_fallback(cluster: Cluster, kind: type[Runtime]) -> None:
    agents = {entry["http.request.useragent"] for entry in cluster.requests()}
    assert any(kind.agent in agent for agent in agents), f"{kind.agent} never asked the origin: {agents}"


async def served(cluster: Cluster) -> bool:
    return (await cluster.moved("node1"))["to_runtime"] > 0
