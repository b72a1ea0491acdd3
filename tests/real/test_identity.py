# SPDX-License-Identifier: Apache-2.0
"""A rollout whose every packet is looked at: with identity nothing of an image, and no token, passes between hosts in
the clear; without it the same look finds both, so that it would.

What passes between a node and the registry is the registry's matter, and left out.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
from collections import defaultdict
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from bench.lab import netns
from bench.lab.images import make_random_image
from bench.lab.registry import PORT as REGISTRY_PORT
from p2pdist.identity.authority import Authority
from tests.real.cluster import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from bench.lab.hosts import Host
    from bench.lab.images import Image
    from tests.real.cluster import Cluster

NODES = ("node1", "node2", "node3")
IMAGE_BYTES = 8 << 20
PROBE_BYTES, PROBE_EVERY = 16, 100_000
"""Of each layer, so much is looked for at each so many bytes."""
_ALL_PROTOCOLS = socket.htons(3)
_SO_RCVBUFFORCE = 33


class Capture:
    """The TCP payload of all packets at some hosts' interfaces, by connection and direction; not the registry's."""

    def __init__(self) -> None:
        self.flows: dict[bytes, bytearray] = defaultdict(bytearray)

    @property
    def count(self) -> int:
        return sum(len(flow) for flow in self.flows.values())

    async def watch(self, host: Host) -> None:
        assert host.namespace is not None
        with netns.entered(host.namespace):
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, _ALL_PROTOCOLS)
        with sock:
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
            sock.setblocking(False)
            while True:
                await trio.lowlevel.wait_readable(sock)
                packet, address = sock.recvfrom(1 << 17)
                if address[0] != "lo":
                    self._take(packet)

    def _take(self, packet: bytes) -> None:
        if packet[0] >> 4 != 4 or packet[9] != socket.IPPROTO_TCP:
            return
        at = (packet[0] & 15) * 4
        ports = struct.unpack_from(">HH", packet, at)
        if REGISTRY_PORT not in ports:
            self.flows[packet[12:20] + packet[at : at + 4]] += packet[at + (packet[at + 12] >> 4) * 4 :]

    def finds(self, probe: bytes) -> bool:
        return any(probe in flow for flow in self.flows.values())


@asynccontextmanager
async def captured(cluster: Cluster) -> AsyncIterator[Capture]:
    capture = Capture()
    async with trio.open_nursery() as nursery:
        for name in ("scheduler", *NODES):
            nursery.start_soon(capture.watch, cluster.lab[name])
        yield capture
        nursery.cancel_scope.cancel()


def probes(image: Image) -> list[bytes]:
    """Return samples of an image's blobs, and all of their digests as they are written."""
    found = []
    for blob in image.blobs():
        data = image.blob_path(blob).read_bytes()
        found += [data[at : at + PROBE_BYTES] for at in range(0, len(data) - PROBE_BYTES, PROBE_EVERY)]
        found.append(blob.digest.encode())
    return found


@pytest.mark.parametrize("identity", [True, False], ids=["with identity", "without, where it would be found"])
async def test_no_byte_of_an_image_and_no_token_passes_between_hosts_in_the_clear(
    cluster_of: Callable[..., AbstractAsyncContextManager[Cluster]], tmp_path: Path, identity: bool
) -> None:
    image = await make_random_image(tmp_path / "layout", image_bytes=IMAGE_BYTES, layers=2, seed=5)
    async with cluster_of(image, nodes=len(NODES), identity=identity) as cluster, captured(cluster) as capture:
        await cluster.start(*NODES)
        async with cluster.rollout(image, *NODES) as pulls:
            pass
        cluster.expect_right(pulls)
        moved = [await cluster.moved(name) for name in NODES]
        from_peers = sum(each["from_peers"] for each in moved)
        assert from_peers > IMAGE_BYTES / 2
        # Each packet between two nodes is seen at both.
        await until(lambda: capture.count >= from_peers, "all that peers sent was captured")
        seen = [probe for probe in probes(image) if capture.finds(probe)]
        if not identity:
            assert len(seen) > len(probes(image)) / 4
            return
        assert not seen
        secret = cluster.agent_flags[-1].split(":")[1]
        assert len(secret) == 22
        assert not capture.finds(secret.encode())
        for name in NODES:
            assert not capture.finds((await cluster.status(name))["peer_id"].encode())


async def test_a_node_that_is_revoked_in_the_middle_is_left_by_all_and_still_pulls_from_the_registry(
    cluster_of: Callable[..., AbstractAsyncContextManager[Cluster]], tmp_path: Path
) -> None:
    image = await make_random_image(tmp_path / "layout", image_bytes=IMAGE_BYTES, layers=2, seed=6)
    async with cluster_of(image, nodes=len(NODES), identity=True) as cluster:
        await cluster.start(*NODES)
        await cluster.pull("node1", image)
        out = await cluster.status("node3")
        Authority.open(cluster.data / "ca").revoke(f"agent/{out['peer_id']}")
        assert cluster.scheduler is not None
        os.kill(cluster.scheduler.pid, signal.SIGHUP)
        await until(lambda: "is revoked" in cluster.log("node3"), "node3 says that it is revoked")
        await until(lambda: "names are revoked" in cluster.log("node1"), "node1 knows")
        await cluster.pull("node2", image)
        await cluster.pull("node3", image)
        assert (await cluster.moved("node3"))["from_peers"] == 0
        assert (await cluster.moved("node2"))["from_peers"] > 0
