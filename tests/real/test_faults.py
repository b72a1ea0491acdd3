# SPDX-License-Identifier: Apache-2.0
"""What breaks while real processes pull an image: the others must not notice, or say so in a line."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from bench.lab import agents as lab_agents
from bench.lab.hosts import Link
from bench.lab.http import HttpFailure
from bench.lab.pullers import Pull
from tests.real.cluster import ALONE, MDNS, SCHEDULER, part_done, until
from tests.real.runtimes import OWN_MOUNTS

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from bench.lab.images import Image
    from tests.real.cluster import Cluster

    ClusterOf = Callable[..., AbstractAsyncContextManager[Cluster]]

NODES = ("node1", "node2", "node3", "node4")
LINK = Link(40, 40)
"""Slow enough that there is a middle of a rollout: 16 MiB take 3.5 s."""


async def test_a_scheduler_killed_mid_rollout_and_started_again_costs_no_pull(
    cluster_of: ClusterOf, large_image: Image
) -> None:
    async with cluster_of(large_image, nodes=4, link=LINK, origin=LINK) as cluster:
        await cluster.start(*NODES)
        async with cluster.rollout(large_image, *NODES) as pulls:
            await until(lambda: part_done(pulls, large_image) > 0.25, "a quarter of the rollout")
            assert cluster.scheduler is not None
            cluster.scheduler.kill()
            for name in NODES:
                await until(lambda name=name: says_lost(cluster, name), f"{name} says that the scheduler is lost")
            await cluster.start_scheduler()
        cluster.expect_right(pulls)
        for name in NODES:
            await until(lambda name=name: cluster.joined(name), f"{name} is back at the scheduler")
        assert cluster.registry.sent_bytes() <= 1.5 * large_image.pull_bytes


async def says_lost(cluster: Cluster, name: str) -> bool:
    return str((await cluster.ready_parts(name)).get("scheduler", "")).startswith("lost")


@pytest.mark.parametrize("found_by", [SCHEDULER, MDNS])
async def test_a_peer_killed_mid_rollout_costs_only_its_own_pull(
    cluster_of: ClusterOf, large_image: Image, found_by: str
) -> None:
    async with cluster_of(large_image, nodes=4, found_by=found_by, link=LINK, origin=LINK) as cluster:
        await cluster.start(*NODES)
        async with cluster.rollout(large_image, *NODES) as pulls:
            await until(lambda: part_done(pulls, large_image) > 0.3, "a third of the rollout")
            cluster.agents["node4"].process.kill()
        cluster.expect_right([record for record in pulls if record.node != "node4"])


async def test_an_origin_stopped_once_one_agent_has_the_image_is_not_missed(
    cluster_of: ClusterOf, large_image: Image
) -> None:
    async with cluster_of(large_image, nodes=4, link=LINK, origin=LINK) as cluster:
        await cluster.start(*NODES)
        async with cluster.rollout(large_image, "node1") as (first,):
            await until(lambda: part_done([first], large_image) > 0.5, "half of the first pull")
            async with cluster.rollout(large_image, *NODES[1:]) as others:
                await until(lambda: first.ended, "the first pull's end")
                cluster.registry.process.kill()
                assert not all(record.ended for record in others), "the origin was stopped too late to show anything"
        cluster.expect_right([first, *others])


@pytest.mark.parametrize("found_by", [SCHEDULER, MDNS])
async def test_an_origin_that_falls_silent_does_not_hold_up_what_a_peer_has(
    cluster_of: ClusterOf, large_image: Image, found_by: str
) -> None:
    async with cluster_of(large_image, nodes=2, found_by=found_by) as cluster:
        await cluster.start("node1", "node2")
        await cluster.pull("node1", large_image)
        await cluster.settled()
        os.kill(cluster.registry.process.pid, signal.SIGSTOP)
        try:
            await cluster.pull("node2", large_image, large_image.root.digest)
        finally:
            os.kill(cluster.registry.process.pid, signal.SIGCONT)
        assert (await cluster.moved("node2"))["from_origin"] == 0


async def test_a_runtime_that_hangs_up_mid_blob_does_not_disturb_another_reader(
    cluster_of: ClusterOf, large_image: Image
) -> None:
    blob = large_image.layers[0]
    async with cluster_of(large_image, nodes=1, found_by=ALONE, origin=Link(20, 20)) as cluster:
        await cluster.start("node1")
        async with cluster.reading("node1", blob.digest) as staying:
            async with cluster.reading("node1", blob.digest) as leaving:
                while leaving.done_bytes < blob.size_bytes // 4:
                    await leaving.read_some()
            assert await staying.read_to_end() == blob.digest
        await cluster.settled()
        assert cluster.registry.sent_bytes() <= 1.1 * blob.size_bytes


async def test_an_agent_killed_mid_pull_goes_on_from_where_it_was(cluster_of: ClusterOf, large_image: Image) -> None:
    async with cluster_of(large_image, nodes=1, found_by=ALONE, origin=LINK) as cluster:
        (agent,) = await cluster.start("node1")
        async with cluster.rollout(large_image, "node1") as (cut,):
            await until(lambda: part_done([cut], large_image) > 0.5, "half of the pull")
            agent.process.kill()
        assert not cut.right
        before_bytes = cluster.registry.sent_bytes()
        await cluster.start("node1")
        await cluster.pull("node1", large_image)
        again_bytes = cluster.registry.sent_bytes() - before_bytes
        assert again_bytes <= 0.6 * large_image.pull_bytes


async def test_a_second_agent_on_the_same_data_directory_refuses_in_one_line(
    cluster_of: ClusterOf, small_image: Image
) -> None:
    async with cluster_of(small_image, nodes=2, found_by=ALONE) as cluster:
        (first,) = await cluster.start("node1")
        taken = str(cluster.data / "agent-node1")
        flags = ["--no-mdns", "--data-dir", taken]
        origin_url = cluster.registry.base_url
        second = lab_agents.start_agent(cluster.group, cluster.lab["node2"], cluster.data, origin_url, flags)
        await until(lambda: not second.process.running, "the second agent's end")
        assert second.process.exit_code == 1
        (said,) = second.process.log.read_text().splitlines()
        assert taken in said
        assert str(first.process.pid) in said
        await cluster.pull("node1", small_image)


async def test_a_full_disk_is_told_to_the_runtime_and_does_not_keep_small_images_out(
    cluster_of: ClusterOf, large_image: Image, small_image: Image
) -> None:
    async with cluster_of(large_image, small_image, nodes=1, found_by=ALONE) as cluster:
        settings = 'store_max = "1GiB"\nstore_min_free = 0\n'
        await cluster.start("node1", settings=settings, wrapper=small_disk(cluster))
        for image in (large_image, small_image, large_image):
            record = Pull("node1")
            await cluster.pull_into(record, image)
            if image is large_image:
                assert "status 503" in str(record.error)
                assert "no room for sha256:" in str(record.error)
            else:
                cluster.expect_right([record])
        assert (await cluster.status("node1"))["images_pulled"] == 1


async def test_a_disk_too_full_for_even_a_manifest_is_told_as_such(cluster_of: ClusterOf, small_image: Image) -> None:
    async with cluster_of(small_image, nodes=1, found_by=ALONE) as cluster:
        await cluster.start("node1", settings='store_min_free = "1GiB"\n', wrapper=small_disk(cluster))
        record = Pull("node1")
        await cluster.pull_into(record, small_image)
        assert "status 503" in str(record.error)
        assert "no room for sha256:" in str(record.error)


def small_disk(cluster: Cluster) -> list[str]:
    """Return what gives node1's agent a data directory on a disk of 4 MiB, which is gone with it."""
    place = cluster.data / "agent-node1"
    mount = f"mkdir -p {place}; mount -t tmpfs -o size=4m p2pdist {place}"
    return [*OWN_MOUNTS, "sh", "-ec", f'{mount}; exec "$@"', "sh"]


async def test_agents_that_know_each_other_by_mdns_alone_share(cluster_of: ClusterOf, large_image: Image) -> None:
    async with cluster_of(large_image, nodes=3, found_by=MDNS) as cluster:
        await cluster.start("node1", "node2", "node3")
        await cluster.pull("node1", large_image)
        for name in ("node2", "node3"):
            await cluster.pull(name, large_image)
            assert (await cluster.moved(name))["from_peers"] >= large_image.pull_bytes // 2
        assert cluster.registry.sent_bytes() <= 1.1 * large_image.pull_bytes


async def test_sigterm_lets_a_running_response_end_and_the_agent_exit_with_0(
    cluster_of: ClusterOf, large_image: Image
) -> None:
    blob = large_image.layers[0]
    async with cluster_of(large_image, nodes=1, found_by=ALONE, origin=Link(20, 20)) as cluster:
        (agent,) = await cluster.start("node1", settings="shutdown_grace_s = 60.0\n")
        async with cluster.reading("node1", blob.digest) as response:
            while response.done_bytes < blob.size_bytes // 4:
                await response.read_some()
            agent.process.terminate()
            await until(lambda: refuses(cluster, blob.digest), "new connections are refused")
            assert await response.read_to_end() == blob.digest
        await until(lambda: not agent.process.running, "the agent's end")
        assert agent.process.exit_code == 0


async def refuses(cluster: Cluster, digest: str) -> bool:
    try:
        async with cluster.reading("node1", digest):
            return False
    except HttpFailure:
        return True
