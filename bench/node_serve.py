# SPDX-License-Identifier: Apache-2.0
"""One blob from one agent without peers: cold, warm, in ranges to many readers at once, and many small blobs.

nginx and the registry serve the same to the same client in turn. Each first serves a client that compares SHA-256,
which also warms what it caches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.lab.agents import REGISTRY_NAME
from bench.lab.images import make_random_image
from bench.lab.workspace import workspace
from bench.node_figures import P2PDIST, Figure
from bench.node_stage import COPIES, open_stage
from bench.systems import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.lab.images import Image
    from bench.node_stage import NodeStage, Server

WARM_PASSES = 5
"""A reader that waits for its server makes the server wake it, at several times the cost; which of the two is ahead
settles in the first GiB."""
RANGE_BYTES = 1 << 20
RANGE_READERS = 64
SMALL_BYTES = 16 << 10
SMALL_BLOBS, SMALL_LAYERS = 2000, 100
"""So many blobs, in images of so many layers: the most that runtimes can stack is near that."""
SMALL_READERS = 16


async def measure_blob(blob_bytes: int, *, runs: int) -> list[Figure]:
    """Return figures of a blob, cold and warm, to one reader.

    Raises:
        LabError: a server does not come up.
        ClientError: a server does not serve the blob.
    """
    with workspace(COPIES * blob_bytes) as space:
        image = await make_random_image(space.path / "image", image_bytes=blob_bytes, layers=1, seed=1)
        digests = [image.layers[0].digest]
        async with open_stage([image], space) as stage:
            idle = Figure(
                part="idle", system=P2PDIST, seconds=0, payload_bytes=0, cpu_s=0, rss_mib_max=stage.idle_rss_mib
            )
            cold = [await server.measure("cold", server.ask(digests)) for server in (stage.origin, stage.mirror)]
            await _check(stage, digests)
            warm = [
                await server.measure("warm", server.ask(WARM_PASSES * digests))
                for _ in range(runs)
                for server in stage.servers
            ]
            return [idle, *cold, *warm]


async def measure_ranges(blob_bytes: int, *, runs: int) -> list[Figure]:
    """Return figures of a blob of which many readers take 1 MiB each, as containerd 2.x does; raises as above."""
    with workspace(COPIES * blob_bytes) as space:
        image = await make_random_image(space.path / "image", image_bytes=blob_bytes, layers=1, seed=1)
        layer = image.layers[0]
        starts = range(0, layer.size_bytes, RANGE_BYTES)
        spans = [f"bytes={start}-{min(start + RANGE_BYTES, layer.size_bytes) - 1}" for start in starts]
        async with open_stage([image], space) as stage:
            await _check(stage, [layer.digest])
            return [
                await server.measure("ranges", server.ask([layer.digest], spans), connections=RANGE_READERS)
                for _ in range(runs)
                for server in stage.servers
            ]


async def measure_small(*, runs: int) -> list[Figure]:
    """Return figures of many small blobs, cold (all manifests first) and warm; raises as above."""
    with workspace(COPIES * SMALL_BLOBS * SMALL_BYTES) as space:
        images = [
            await make_random_image(
                space.path / f"image-{number}",
                image_bytes=SMALL_LAYERS * SMALL_BYTES,
                layers=SMALL_LAYERS,
                seed=number,
                tag=f"v{number}",
            )
            for number in range(SMALL_BLOBS // SMALL_LAYERS)
        ]
        digests = [layer.digest for image in images for layer in image.layers]
        async with open_stage(images, space) as stage:
            cold = [
                await server.measure("small cold", _pulls(server, images), connections=SMALL_READERS)
                for server in (stage.origin, stage.mirror)
            ]
            await _check(stage, digests)
            warm = [
                await server.measure("small warm", server.ask(digests), connections=SMALL_READERS)
                for _ in range(runs)
                for server in stage.servers
            ]
            return [*cold, *warm]


def _pulls(server: Server, images: Sequence[Image]) -> list[tuple[str, str]]:
    """Return the requests of pulls of all images at once: a runtime knows a blob's name from its manifest."""
    query = f"?ns={REGISTRY_NAME}" if server.system == P2PDIST else ""
    manifests = [(f"/v2/{REPOSITORY}/manifests/{image.manifest.digest}{query}", "") for image in images]
    return manifests + server.ask([layer.digest for image in images for layer in image.layers])


async def _check(stage: NodeStage, digests: Sequence[str]) -> None:
    for server in stage.servers:
        await server.serve(server.ask(digests), connections=min(SMALL_READERS, len(digests)), check=True)
