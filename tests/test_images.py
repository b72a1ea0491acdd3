# SPDX-License-Identifier: Apache-2.0
"""Tags, manifests and images on one node, and the line that says where an image came from."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest
import structlog
import trio

from p2pdist.core.chunkmap import MIN_CHUNK_BYTES
from p2pdist.core.types import Manifest
from p2pdist.core.verify import checksum_of
from p2pdist.errors import IntegrityError, InvalidInput, OriginError, P2PDistError
from p2pdist.store.memory import MemoryStore
from tests.fake_registry import OCI_MANIFEST, digest_of
from tests.nodes import REPOSITORY, FakeOrigin, Node, cluster, eventually, running

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trio.testing import MockClock


CHUNK = MIN_CHUNK_BYTES
LAYER = random.Random(11).randbytes(4 * CHUNK)


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    store = MemoryStore(max_bytes=1 << 30)
    yield store
    store.close()


@pytest.fixture
def origin() -> FakeOrigin:
    return FakeOrigin()


@pytest.fixture
def node(origin: FakeOrigin, store: MemoryStore) -> Node:
    return Node(1, origin, store)


# ------------------------------------------------------------------- manifests


async def test_a_manifest_is_kept_byte_for_byte_with_its_media_type(
    node: Node, origin: FakeOrigin, quick_clock: MockClock
) -> None:
    digest = origin.add_image("v1", [LAYER])
    async with running(node):
        first = await node.manifest("v1")
        origin.error = OriginError("down")
        assert await node.manifest(digest) == first == origin.manifests["v1"]
        assert await node.resolve(digest) == first.info


async def test_a_manifest_other_than_asked_for_is_refused_and_not_kept(
    node: Node, origin: FakeOrigin, store: MemoryStore, quick_clock: MockClock
) -> None:
    digest = digest_of(b"{}")
    origin.manifests[digest] = Manifest(digest, OCI_MANIFEST, b"[]")
    async with running(node):
        with pytest.raises(P2PDistError, match="does not match") as caught:
            await node.manifest(digest)
        assert isinstance(getattr(caught.value, "causes", [caught.value])[0], IntegrityError)
        assert not store.contains(digest)
        assert not node.puller.arrivals


async def test_a_digest_that_is_none_is_refused(node: Node, quick_clock: MockClock) -> None:
    async with running(node):
        with pytest.raises(InvalidInput):
            await node.manifest("sha256:short")


async def test_what_is_not_understood_is_passed_on_all_the_same(
    node: Node, origin: FakeOrigin, quick_clock: MockClock
) -> None:
    """An artifact of a kind that we do not know."""
    body = b'{"schemaVersion": 9, "strange": []}'
    digest = digest_of(body)
    origin.manifests["odd"] = origin.manifests[digest] = Manifest(digest, "application/vnd.odd+json", body)
    async with running(node):
        assert (await node.manifest("odd")).body == body
        assert (await node.manifest(digest)).media_type == "application/vnd.odd+json"


@pytest.mark.parametrize("prefetch", [True, False])
async def test_a_manifest_starts_the_pull_of_all_that_it_names(
    origin: FakeOrigin, store: MemoryStore, prefetch: bool, quick_clock: MockClock
) -> None:
    origin.add_image("v1", [LAYER, LAYER[:100]])
    node = Node(1, origin, store, prefetch=prefetch)
    async with running(node):
        await node.manifest("v1")
        await trio.sleep(20)
        assert all(store.contains(digest) == prefetch for digest in origin.blobs)


async def test_foreign_layers_are_left_to_the_runtime(
    node: Node, origin: FakeOrigin, store: MemoryStore, quick_clock: MockClock
) -> None:
    digest = origin.add_image("v1", [LAYER])
    document = json.loads(origin.manifests[digest].body)
    document["layers"][0]["urls"] = ["https://elsewhere.test/layer"]
    body = json.dumps(document).encode()
    origin.manifests["v1"] = origin.manifests[digest_of(body)] = Manifest(digest_of(body), OCI_MANIFEST, body)
    async with running(node):
        await node.manifest("v1")
        await trio.sleep(20)
        assert not store.contains(digest_of(LAYER))
        assert store.contains(digest_of(b"{}"))


async def test_the_size_of_a_named_blob_costs_no_request(
    node: Node, origin: FakeOrigin, quick_clock: MockClock
) -> None:
    origin.add_image("v1", [LAYER])
    async with running(node):
        await node.manifest("v1")
        assert await node.images.blob_size(REPOSITORY, digest_of(LAYER)) == len(LAYER)
        assert origin.count("blob_size") == 0


async def test_of_blobs_that_no_manifest_named_those_here_are_served_without_the_origin(
    node: Node, origin: FakeOrigin, store: MemoryStore, quick_clock: MockClock
) -> None:
    here, elsewhere = origin.add_blob(LAYER), origin.add_blob(LAYER[:-1])
    store.add(here, LAYER, media_type="", public=True, home=str(REPOSITORY))
    origin.error = OriginError("down")
    async with running(node):
        assert await node.images.blob_size(REPOSITORY, here) == len(LAYER)
        assert await node.read_blob(here) == LAYER
        with pytest.raises(OriginError, match="down"):
            await node.read_blob(elsewhere)


async def test_a_listing_is_the_origins(node: Node, origin: FakeOrigin, quick_clock: MockClock) -> None:
    async with running(node):
        assert (await node.images.relay(REPOSITORY, "tags/list", "*/*")).status_code == 404
    assert origin.asked == [("relay", "tags/list")]


# -------------------------------------------------------------- the image's line


def pulled(logs: list[Any]) -> list[dict[str, Any]]:
    return [entry for entry in logs if entry["event"] == "image pulled"]


async def test_the_line_says_where_the_bytes_came_from(
    node: Node, origin: FakeOrigin, store: MemoryStore, quick_clock: MockClock
) -> None:
    """One layer is here, of another two chunks are, the third comes from the origin."""
    cached, begun, missing = LAYER[:1000], LAYER, LAYER[:50]
    digest = origin.add_image("v1", [cached, begun, missing])
    store.add(digest_of(cached), cached, media_type="", public=True)
    partial = store.start(digest_of(begun), len(begun), CHUNK)
    for index in (0, 2):
        span = begun[index * CHUNK : (index + 1) * CHUNK]
        partial.write_chunk(index, span, checksum_of(span))
    partial.close()
    with structlog.testing.capture_logs() as logs:
        async with running(node):
            await node.manifest("v1")
            await node.read_blob(digest_of(begun))
            await eventually(lambda: node.images.pulled == 1)
    (line,) = pulled(logs)
    assert line["image"] == f"{REPOSITORY}@{digest}"
    assert line["bytes"] == 2 + 1000 + 4 * CHUNK + 50
    assert line["from_cache"] == 1000 + 2 * CHUNK
    assert line["from_origin"] == 2 + 2 * CHUNK + 50
    assert line["from_peers"] == 0
    assert 0 <= line["first_byte_s"] <= line["seconds"]


async def test_the_line_of_an_image_that_came_from_peers(quick_clock: MockClock) -> None:
    origin = FakeOrigin()
    digest = origin.add_image("v1", [LAYER])
    async with cluster(2, origin) as nodes:
        await nodes[0].manifest("v1")
        await eventually(lambda: nodes[0].images.pulled == 1)
        with structlog.testing.capture_logs() as logs:
            await nodes[1].manifest(digest)
            await eventually(lambda: nodes[1].images.pulled == 1)
    (line,) = pulled(logs)
    assert (line["from_cache"], line["from_peers"], line["from_origin"]) == (0, 2 + len(LAYER), 0)


async def test_an_image_that_is_here_already_is_counted_once_per_pull(
    node: Node, origin: FakeOrigin, quick_clock: MockClock
) -> None:
    digest = origin.add_image("v1", [LAYER])
    async with running(node):
        await node.manifest("v1")
        await node.manifest(digest)
        await eventually(lambda: node.images.pulled == 1)
        await eventually(lambda: not node.puller.arrivals)
        with structlog.testing.capture_logs() as logs:
            await node.manifest(digest)
        (line,) = pulled(logs)
        assert line["from_cache"] == line["bytes"] == 2 + len(LAYER)


async def test_an_image_that_fails_says_why_and_may_be_asked_for_again(
    node: Node, origin: FakeOrigin, quick_clock: MockClock
) -> None:
    digest = origin.add_image("v1", [LAYER])
    layer = origin.blobs.pop(digest_of(LAYER))
    with structlog.testing.capture_logs() as logs:
        async with running(node):
            await node.manifest("v1")
            await eventually(lambda: any(entry["event"] == "image not pulled" for entry in logs))
            assert node.images.pulled == 0
            origin.blobs[digest_of(LAYER)] = layer
            await node.manifest(digest)
            await eventually(lambda: node.images.pulled == 1)
    (line,) = pulled(logs)
    assert line["bytes"] == 2 + len(LAYER)
    assert "is not here" in next(entry["why"] for entry in logs if entry["event"] == "image not pulled")
