# SPDX-License-Identifier: Apache-2.0
"""The BitTorrent swarm that p2pdist is compared with."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from bench.lab.hosts import Lab, loopback_lab
from bench.lab.images import Image, make_random_image
from bench.lab.processes import ProcessGroup
from bench.lab.pullers import Pull
from bench.lab.torrents import Torrents, start_torrents
from bench.lab.workspace import Workspace

MIB = 1 << 20
pytestmark = pytest.mark.real


@dataclass
class Swarm:
    lab: Lab
    image: Image
    torrents: Torrents
    data: Path

    async def pull(self, name: str, held: set[str] | None = None) -> Pull:
        record = Pull(name)
        await self.torrents.pull(record, self.lab[name], self.image, deadline_s=60, held=held or set())
        return record


@pytest.fixture
async def swarm(require_libtorrent: None, tmp_path: Path) -> AsyncIterator[Swarm]:
    """A swarm with an image on offer, without super-seeding, which would wait ten seconds."""
    space, data = Workspace(tmp_path, on_tmpfs=False), tmp_path / "data"
    image = await make_random_image(tmp_path / "image", image_bytes=4 * MIB, layers=2, seed=1)
    with loopback_lab(["seed", "node1", "node2"]) as lab, ProcessGroup(space.logs) as group:
        nodes = [lab["node1"], lab["node2"]]
        torrents = await start_torrents(group, lab["seed"], nodes, data, super_seeding=False)
        await torrents.offer(image)
        yield Swarm(lab, image, torrents, data)


async def test_all_nodes_get_the_image_and_what_moved_is_counted(swarm: Swarm) -> None:
    pulls: list[Pull] = []

    async def pull(name: str) -> None:
        pulls.append(await swarm.pull(name))

    async with trio.open_nursery() as nursery:
        for name in ("node1", "node2"):
            nursery.start_soon(pull, name)
    assert [pull.error for pull in pulls] == [None, None]
    assert all(pull.done_bytes == swarm.image.pull_bytes and len(pull.ttfb_s) == 1 for pull in pulls)
    sent = await swarm.torrents.seed.counters()
    assert sent["uploaded_bytes"] >= swarm.image.pull_bytes
    got = await swarm.torrents.leechers["node1"].counters()
    assert got["downloaded_bytes"] >= swarm.image.pull_bytes


async def test_a_layer_from_before_is_not_fetched(swarm: Swarm) -> None:
    held = swarm.image.layers[0]
    record = await swarm.pull("node1", {held.digest})
    assert record.error is None
    assert record.done_bytes == swarm.image.pull_bytes - held.size_bytes
    assert not list((swarm.data / "torrent-node1").rglob(swarm.image.blob_path(held).name))


async def test_a_peer_that_is_gone_fails_the_pull(swarm: Swarm) -> None:
    swarm.torrents.leechers["node1"].process.kill()
    record = await swarm.pull("node1")
    assert record.ended
    assert not record.right
    assert record.error is not None
    assert "does not answer to leech" in record.error
