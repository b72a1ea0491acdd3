# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import http.client
import json
from typing import TYPE_CHECKING

import pytest
import trio

from bench.lab.hosts import loopback_lab
from bench.lab.images import Image, make_random_image
from bench.lab.processes import ProcessGroup
from bench.lab.registry import Registry, start_registry
from bench.lab.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 1 << 20


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Registry, Image]]:
    """Our registry with one image, as `team/demo:v1`."""
    space = Workspace(tmp_path_factory.mktemp("space"), on_tmpfs=False)
    with loopback_lab(["registry"]) as lab, ProcessGroup(space.logs) as group:

        async def start() -> tuple[Registry, Image]:
            image = await make_random_image(space.path / "image", image_bytes=SIZE, layers=1, seed=1, multi_arch=True)
            registry = await start_registry(group, lab["registry"], space, program=None)
            registry.push(image, "team/demo")
            return registry, image

        yield trio.run(start)


Answer = tuple[int, dict[str, str], bytes]


def ask(registry: Registry, method: str, target: str, headers: dict[str, str] | None = None) -> Answer:
    connection = http.client.HTTPConnection(registry.base_url.removeprefix("http://"), timeout=20)
    try:
        connection.request(method, target, headers=headers or {})
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def layer_target(image: Image) -> str:
    return f"/v2/team/demo/blobs/{image.layers[0].digest}"


def layer(image: Image) -> bytes:
    return image.blob_path(image.layers[0]).read_bytes()


@pytest.mark.parametrize("reference", ["v1", "digest"])
def test_a_manifest_is_served_by_tag_and_by_digest(served: tuple[Registry, Image], reference: str) -> None:
    registry, image = served
    name = image.root.digest if reference == "digest" else reference
    status, headers, body = ask(registry, "GET", f"/v2/team/demo/manifests/{name}")
    assert status == 200
    assert headers["Content-Type"] == image.root.media_type
    assert headers["Docker-Content-Digest"] == image.root.digest
    assert body == image.blob_path(image.root).read_bytes()


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [
        ("", 0, SIZE),
        ("bytes=0-", 0, SIZE),
        ("bytes=0-0", 0, 1),
        ("bytes=1000-1999", 1000, 2000),
        ("bytes=1048000-", 1_048_000, SIZE),
        ("bytes=1048000-9999999", 1_048_000, SIZE),
        ("bytes=-10", SIZE - 10, SIZE),
        ("bytes=-9999999", 0, SIZE),
        ("bytes=5-2-1", 0, SIZE),
        ("chunks=1-2", 0, SIZE),
    ],
)
def test_a_range_of_a_blob(served: tuple[Registry, Image], header: str, start: int, stop: int) -> None:
    registry, image = served
    status, headers, body = ask(registry, "GET", layer_target(image), {"Range": header} if header else {})
    assert body == layer(image)[start:stop]
    assert headers["Content-Length"] == str(stop - start)
    whole = (start, stop) == (0, SIZE)
    assert status == (200 if whole else 206)
    assert headers.get("Content-Range") == (None if whole else f"bytes {start}-{stop - 1}/{SIZE}")


def test_a_range_past_the_end_is_refused_with_the_size(served: tuple[Registry, Image]) -> None:
    registry, image = served
    status, headers, body = ask(registry, "GET", layer_target(image), {"Range": f"bytes={SIZE}-"})
    assert (status, headers["Content-Range"], body) == (416, f"bytes */{SIZE}", b"")


def test_head_tells_the_size_and_sends_nothing(served: tuple[Registry, Image]) -> None:
    registry, image = served
    status, headers, body = ask(registry, "HEAD", layer_target(image))
    assert (status, headers["Content-Length"], body) == (200, str(SIZE), b"")


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("/v2/team/demo/manifests/v2", "MANIFEST_UNKNOWN"),
        ("/v2/team/other/manifests/v1", "MANIFEST_UNKNOWN"),
        (f"/v2/team/demo/blobs/sha256:{'0' * 64}", "BLOB_UNKNOWN"),
        ("/v2/team/demo/blobs/..", "BLOB_UNKNOWN"),
        ("/v2/../etc/blobs/passwd", "NAME_UNKNOWN"),
        ("/v2/team/demo/tags/list", "NAME_UNKNOWN"),
    ],
)
def test_what_is_not_there_is_refused_as_a_registry_refuses(
    served: tuple[Registry, Image], target: str, code: str
) -> None:
    status, _, body = ask(served[0], "GET", target)
    assert status == 404
    assert json.loads(body)["errors"][0]["code"] == code


def test_a_push_is_refused(served: tuple[Registry, Image]) -> None:
    status, _, _ = ask(served[0], "POST", "/v2/team/demo/blobs/uploads/")
    assert status == 501


def test_the_payload_that_was_sent_is_counted(served: tuple[Registry, Image]) -> None:
    registry, image = served
    before = registry.sent_bytes()
    ask(registry, "HEAD", layer_target(image))
    ask(registry, "GET", layer_target(image), {"Range": "bytes=0-99"})
    ask(registry, "GET", layer_target(image))
    wanted = before + 100 + SIZE
    while registry.sent_bytes() < wanted:
        registry.process.check()
    assert registry.sent_bytes() == wanted
