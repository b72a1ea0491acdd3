# SPDX-License-Identifier: Apache-2.0
"""Origins that leave out what others rely on: lengths, ranges, HEAD, types, digests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conformance.content import LARGE, MANIFESTS, PLAIN, SMALL, fill, without_media_type
from tests.conformance.scene import IMAGE, NAME
from tests.fake_registry import Fault, digest_of

if TYPE_CHECKING:
    from tests.conformance.scene import Scene

HELD = MANIFESTS["OCI image"]
NO_LENGTH = Fault(chunked=True)
NO_RANGE = Fault(ignore_range=True)
NEITHER = Fault(chunked=True, ignore_range=True)
NO_HEAD = Fault(status=405)
WITH_PARAMETERS = Fault(headers=(("Content-Type", f"{HELD.media_type}; charset=utf-8"),))
NO_TYPE = Fault(headers=(("Content-Type", ""),))
NO_DIGEST = Fault(headers=(("Docker-Content-Digest", ""),))


@pytest.mark.parametrize("fault", [NO_LENGTH, NO_RANGE, NEITHER], ids=["no length", "no ranges", "neither"])
async def test_an_image_of_an_origin_without_lengths_or_ranges(scene: Scene, fault: Fault) -> None:
    fill(scene.registry, "v1")
    scene.registry.every = fault
    ask = await scene.ready(f"manifests/{HELD.digest}")
    reference = HELD.digest if scene.origin_is_gone else "v1"
    for method in ("HEAD", "GET"):
        answer = await ask.get(f"{IMAGE}/manifests/{reference}", method=method)
        assert (answer.status, answer.headers["content-length"]) == (200, str(len(PLAIN)))
        assert answer.headers["docker-content-digest"] == HELD.digest
    assert answer.body == PLAIN
    for body in (SMALL, LARGE):
        answer = await ask.head(f"{IMAGE}/blobs/{digest_of(body)}")
        assert (answer.status, answer.headers["content-length"]) == (200, str(len(body)))
        answer = await ask.get(f"{IMAGE}/blobs/{digest_of(body)}", ("Range", "bytes=3-"))
        assert (answer.status, answer.body) == (206, body[3:])
        assert (await ask.get(f"{IMAGE}/blobs/{digest_of(body)}")).body == body


@pytest.mark.parametrize("fault", [NO_LENGTH, NO_RANGE, NEITHER], ids=["no length", "no ranges", "neither"])
async def test_a_blob_that_no_manifest_named_of_such_an_origin(cold: Scene, fault: Fault) -> None:
    fill(cold.registry)
    cold.registry.every = fault
    ask = await cold.ready()
    for body in (SMALL, LARGE, b""):
        answer = await ask.head(f"{IMAGE}/blobs/{digest_of(body)}")
        assert (answer.status, answer.headers["content-length"]) == (200, str(len(body)))
        answer = await ask.get(f"{IMAGE}/blobs/{digest_of(body)}")
        assert (answer.status, answer.body) == (200, body)


@pytest.mark.parametrize("fault", [WITH_PARAMETERS, NO_TYPE, NO_DIGEST], ids=["parameters", "no type", "no digest"])
async def test_headers_of_a_manifest_that_are_odd_or_missing(scene: Scene, fault: Fault) -> None:
    fill(scene.registry, "v1")
    scene.registry.every = fault
    ask = await scene.ready(f"manifests/{HELD.digest}")
    for reference in (HELD.digest,) if scene.origin_is_gone else (HELD.digest, "v1"):
        for method in ("HEAD", "GET"):
            answer = await ask.get(f"{IMAGE}/manifests/{reference}", method=method)
            assert (answer.status, answer.headers["content-type"]) == (200, HELD.media_type)
            assert answer.headers["docker-content-digest"] == HELD.digest


async def test_an_origin_without_head(cold: Scene) -> None:
    fill(cold.registry, "v1")
    cold.registry.script("HEAD ", *[NO_HEAD] * 20)
    ask = await cold.ready()
    assert (await ask.head(f"{IMAGE}/manifests/v1")).headers["docker-content-digest"] == HELD.digest
    assert (await ask.head(f"{IMAGE}/blobs/{digest_of(LARGE)}")).headers["content-length"] == str(len(LARGE))


async def test_a_manifest_of_no_known_kind_is_still_the_origins(cold: Scene) -> None:
    body = without_media_type(PLAIN)
    digest = cold.registry.add_manifest(NAME, body, tag="v1", media_type="application/vnd.example.thing.v9+json")
    ask = await cold.ready()
    for reference in ("v1", digest):
        answer = await ask.get(f"{IMAGE}/manifests/{reference}")
        assert (answer.status, answer.body) == (200, body)
        assert answer.headers["content-type"] == "application/vnd.example.thing.v9+json"
    assert "*/*" in cold.registry.asked("GET ")[0].headers["accept"]


async def test_where_an_origin_redirects_to_is_not_passed_on(cold: Scene) -> None:
    fill(cold.registry)
    target = f"/v2/{NAME}/blobs/{digest_of(LARGE)}"
    cold.registry.script(f"GET {target}", Fault(redirect=f"{cold.registry.url}{target}?signed=1"))
    answer = await (await cold.ready()).get(f"{IMAGE}/blobs/{digest_of(LARGE)}")
    assert (answer.status, answer.body) == (200, LARGE)
    assert "location" not in answer.headers
