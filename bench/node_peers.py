# SPDX-License-Identifier: Apache-2.0
"""An agent's peer port under peers that take chunks as fast as it gives them: the cost of giving alone.

The peers are played by a process of their own (node_peer_client.py). Each wants the whole blob.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import trio

from bench.lab import meters
from bench.lab.errors import LabError
from bench.lab.images import make_random_image
from bench.lab.workspace import workspace
from bench.node_figures import P2PDIST, Figure
from bench.node_peer_client import Wish
from bench.node_stage import CLIENT_CPU, COPIES, PEER_PORT, open_stage

if TYPE_CHECKING:
    from bench.node_stage import NodeStage

PEERS = 8
_LATEST_S = 150.0


async def measure_peers(blob_bytes: int, *, runs: int) -> list[Figure]:
    """Return a figure of each run, in each of which new peers take all of a blob.

    Raises:
        LabError: the agent does not come up, or does not serve its peers.
        ClientError: it does not get the blob from the registry.
    """
    with workspace(COPIES * blob_bytes) as space:
        image = await make_random_image(space.path / "image", image_bytes=blob_bytes, layers=1, seed=1)
        layer = image.layers[0]
        async with open_stage([image], space) as stage:
            await stage.mirror.serve(stage.mirror.ask([layer.digest]), check=True)
            host = stage.agent.host.address
            return [
                await _take_all(stage, Wish(host, PEER_PORT, layer.digest, layer.size_bytes, PEERS, run, CLIENT_CPU))
                for run in range(runs)
            ]


async def _take_all(stage: NodeStage, wish: Wish) -> Figure:
    machine, before_s = meters.machine_cpu(), stage.mirror.cpu_s()
    command = [sys.executable, "-m", "bench.node_peer_client", json.dumps(asdict(wish))]
    with trio.fail_after(_LATEST_S):
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise LabError(f"the peers got no chunks: {said}", log=stage.agent.process.tail())
    seen = json.loads(done.stdout)
    return Figure(
        part="peers",
        system=P2PDIST,
        seconds=seen["seconds"],
        payload_bytes=seen["payload_bytes"],
        cpu_s=stage.mirror.cpu_s() - before_s,
        rss_mib_max=stage.agent.process.peak_rss_mib(),
        image_bytes=wish.size_bytes,
        ttfb_s=seen["first_s"],
        idle_cpu_ratio=meters.machine_cpu().idle_ratio_since(machine),
    )
