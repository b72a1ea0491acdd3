# SPDX-License-Identifier: Apache-2.0
"""Two scheduler processes, one of which dies or stands still while real agents pull."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from bench.lab.hosts import Link
from tests.real.cluster import part_done, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from bench.lab.images import Image
    from tests.real.cluster import Cluster

    ClusterOf = Callable[..., AbstractAsyncContextManager[Cluster]]

NODES = ("node1", "node2", "node3", "node4")
LINK = Link(40, 40)
"""Slow enough that there is a middle of a rollout: 16 MiB take 3.5 s."""


async def each_of(cluster: Cluster, name: str) -> list[dict[str, Any]]:
    """Return what an agent says of each scheduler."""
    each: list[dict[str, Any]] = (await cluster.status(name))["scheduler"]["each"]
    return each


async def states(cluster: Cluster, name: str) -> list[str]:
    return sorted(entry["state"] for entry in await each_of(cluster, name))


async def all_say(cluster: Cluster, *expected: str) -> None:
    for name in NODES:

        async def says(name: str = name) -> bool:
            return await states(cluster, name) == sorted(expected)

        await until(says, f"{name} says that its schedulers are {expected}")


@pytest.mark.parametrize("freeze", [False, True], ids=["killed", "frozen"])
async def test_one_of_two_schedulers_lost_mid_rollout_is_replaced_and_is_used_again_once_it_is_back(
    cluster_of: ClusterOf, large_image: Image, freeze: bool
) -> None:
    async with cluster_of(large_image, nodes=4, schedulers=2, link=LINK, origin=LINK) as cluster:
        await cluster.start(*NODES)
        await all_say(cluster, "connected", "connected")
        async with cluster.rollout(large_image, *NODES) as pulls:
            await until(lambda: part_done(pulls, large_image) > 0.25, "a quarter of the rollout")
            busiest = max(await each_of(cluster, "node1"), key=lambda entry: entry["swarms"])
            lost = cluster.schedulers[busiest["address"]]
            lost.freeze() if freeze else lost.kill()
        cluster.expect_right(pulls)
        # Frozen, it is given up after 6 s; by then nodes may have begun to fetch for themselves.
        assert cluster.registry.sent_bytes() <= (2.0 if freeze else 1.25) * large_image.pull_bytes
        if not freeze:
            await all_say(cluster, "connected", "lost")
            assert "1 of 2" in (await cluster.ready_parts("node1"))["scheduler"]
        lost.thaw() if freeze else lost.start_again()
        await all_say(cluster, "connected", "connected")
