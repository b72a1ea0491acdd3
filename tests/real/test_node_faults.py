# SPDX-License-Identifier: Apache-2.0
"""What goes wrong on one node: its disk, its files, its descriptors, its process. All pulls that can, end right."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio

from bench.lab.hosts import Link
from bench.lab.images import Image
from bench.lab.pullers import Pull
from tests.real.cluster import ALONE, MDNS, SCHEDULER, Cluster, part_done, run_to_end, until
from tests.real.runtimes import OWN_MOUNTS

ClusterOf = Callable[..., AbstractAsyncContextManager[Cluster]]

NODES = ("node1", "node2", "node3", "node4")
LINK = Link(40, 40)


def data_of(cluster: Cluster, name: str) -> Path:
    return cluster.data / f"agent-{name}"


def flip(path: Path) -> None:
    """Change a bit in the middle of a file."""
    at = path.stat().st_size // 2
    with path.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), at)


async def test_blobs_that_rotted_on_disk_reach_neither_the_runtime_nor_a_peer(
    cluster_of: ClusterOf, large_image: Image
) -> None:
    async with cluster_of(large_image, nodes=2) as cluster:
        (agent,) = await cluster.start("node1")
        await cluster.pull("node1", large_image)
        await cluster.settled()
        agent.process.kill()
        layers = [large_image.layers[0].digest, large_image.layers[1].digest]
        for digest in layers:
            flip(data_of(cluster, "node1") / "blobs/sha256" / digest[7:9] / digest[7:])
        await cluster.start("node1", "node2")
        await cluster.pull("node2", large_image)
        await cluster.pull("node1", large_image)
        await until(lambda: damaged(cluster), "both damaged layers are dropped")
        assert cluster.log("node1").count("stored blob is damaged") == 2
        assert "banned" not in cluster.log("node2")
        await cluster.settled()
        before_bytes = cluster.registry.sent_bytes()
        await cluster.pull("node1", large_image, large_image.root.digest)
        assert cluster.registry.sent_bytes() - before_bytes < 100_000


async def damaged(cluster: Cluster) -> bool:
    return bool((await cluster.status("node1"))["store"]["damaged_blobs"] == 2)


async def test_state_files_full_of_garbage_cost_what_they_said_and_no_more(
    cluster_of: ClusterOf, large_image: Image, small_image: Image
) -> None:
    async with cluster_of(large_image, small_image, nodes=1, found_by=ALONE, origin=LINK) as cluster:
        (agent,) = await cluster.start("node1", settings='tags = ["*/*=stale-if-error"]\n')
        await cluster.pull("node1", small_image)
        await cluster.settled()
        async with cluster.rollout(large_image, "node1") as (cut,):
            await until(lambda: part_done([cut], large_image) > 0.5, "half of the pull")
            agent.process.kill()
        place = data_of(cluster, "node1")
        found = [path for path in place.rglob("*") if path.is_file()]
        state = [path for path in found if path.suffix or path.parent == place]
        kinds = {path.suffix or path.name for path in state}
        assert kinds >= {".journal", ".meta", ".json", "lock", "peer_id"}
        for path in state:
            path.write_bytes(os.urandom(len(path.read_bytes()) + 1))
        await cluster.start("node1")
        await cluster.pull("node1", large_image)
        await cluster.pull("node1", small_image)


async def test_a_disk_that_turns_read_only_serves_what_it_has_and_takes_blobs_again_later(
    cluster_of: ClusterOf, large_image: Image, small_image: Image, require: Callable[[str, str], str]
) -> None:
    nsenter = require("nsenter", "util-linux")
    async with cluster_of(large_image, small_image, nodes=1, found_by=ALONE) as cluster:
        (agent,) = await cluster.start("node1", wrapper=OWN_MOUNTS)
        inside = [nsenter, "--target", str(agent.process.pid), "--mount", "--"]
        places = [str(data_of(cluster, "node1") / name) for name in ("blobs", "partial", "tmp")]
        await cluster.pull("node1", small_image)
        await cluster.settled()
        for place in places:  # each by itself: a disk cannot be remounted under the agent's lock
            await run_to_end([*inside, "mount", "--bind", place, place])
            await run_to_end([*inside, "mount", "-o", "remount,bind,ro", place])
        await cluster.pull("node1", small_image, small_image.root.digest)
        refused = Pull("node1")
        await cluster.pull_into(refused, large_image)
        assert "status 503" in str(refused.error)
        assert "Read-only file system" in str(refused.error)
        for place in places:
            await run_to_end([*inside, "umount", place])
        await cluster.pull("node1", large_image)


async def test_an_agent_without_a_free_descriptor_waits_and_goes_on(
    cluster_of: ClusterOf, large_image: Image, small_image: Image
) -> None:
    async with cluster_of(large_image, small_image, nodes=2, origin=LINK) as cluster:
        first, _ = await cluster.start("node1", "node2")
        await cluster.pull("node1", small_image)
        await cluster.settled()
        usual = resource.prlimit(first.process.pid, resource.RLIMIT_NOFILE)
        for spare in (0, 4):
            used = len(os.listdir(f"/proc/{first.process.pid}/fd"))
            resource.prlimit(first.process.pid, resource.RLIMIT_NOFILE, (used + spare, usual[1]))
            starved = Pull("node1")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(cluster.pull_into, starved, large_image)
                await until(lambda: "Too many open files" in cluster.log("node1"), "the agent says what it is short of")
                resource.prlimit(first.process.pid, resource.RLIMIT_NOFILE, usual)
            assert first.process.running
        await cluster.pull("node1", large_image)
        await cluster.pull("node2", large_image)


@pytest.mark.parametrize("found_by", [SCHEDULER, MDNS])
async def test_a_frozen_agent_holds_nobody_up_and_goes_on_when_it_wakes(
    cluster_of: ClusterOf, large_image: Image, found_by: str
) -> None:
    async with cluster_of(large_image, nodes=4, found_by=found_by, link=LINK, origin=LINK) as cluster:
        await cluster.start(*NODES)
        async with cluster.rollout(large_image, *NODES) as pulls:
            await until(lambda: part_done(pulls, large_image) > 0.3, "a third of the rollout")
            frozen = cluster.agents["node4"].process.pid
            os.kill(frozen, signal.SIGSTOP)
            try:
                others = [record for record in pulls if record.node != "node4"]
                await until(lambda: all(record.ended for record in others), "the others' pulls end")
            finally:
                os.kill(frozen, signal.SIGCONT)
        cluster.expect_right(pulls)
        assert cluster.registry.sent_bytes() <= 1.5 * large_image.pull_bytes
        for name in NODES:
            await until(lambda name=name: cluster.joined(name), f"{name} is part of the cluster again")


@pytest.mark.parametrize("found_by", [SCHEDULER, MDNS])
async def test_an_agent_that_is_told_to_stop_in_mid_rollout_leaves_the_others_its_share(
    cluster_of: ClusterOf, large_image: Image, found_by: str
) -> None:
    async with cluster_of(large_image, nodes=4, found_by=found_by, link=LINK, origin=LINK) as cluster:
        await cluster.start(*NODES, settings="shutdown_grace_s = 0.5\n")
        async with cluster.rollout(large_image, *NODES) as pulls:
            await until(lambda: part_done(pulls, large_image) > 0.3, "a third of the rollout")
            leaver = cluster.agents["node4"].process
            leaver.terminate()
            await until(lambda: not leaver.running, "the agent's end")
            assert leaver.exit_code == 0
            assert not all(record.ended for record in pulls), "it left too late to show anything"
        cluster.expect_right([record for record in pulls if record.node != "node4"])
        assert cluster.registry.sent_bytes() <= 1.5 * large_image.pull_bytes


async def test_a_data_directory_that_was_emptied_under_the_agent_fills_again(
    cluster_of: ClusterOf, small_image: Image
) -> None:
    async with cluster_of(small_image, nodes=1, found_by=ALONE) as cluster:
        await cluster.start("node1")
        await cluster.pull("node1", small_image)
        await cluster.settled()
        for path in data_of(cluster, "node1").iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        await cluster.pull("node1", small_image)
