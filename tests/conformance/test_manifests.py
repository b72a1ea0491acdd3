# SPDX-License-Identifier: Apache-2.0
"""Manifests: byte for byte, under the media type that the registry gave them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conformance.content import HUGE, MANIFESTS, PLAIN, fill, sha512_of
from tests.conformance.scene import IMAGE, NAME, PEER, REGISTRY
from tests.fake_registry import digest_of

if TYPE_CHECKING:
    from trio.testing import MockClock

    from tests.conformance.scene import Scene
    from tests.http_client import Answer

PLAIN_PATH = f"manifests/{digest_of(PLAIN)}"
NAMINGS = [f"/v2/{NAME}/{{}}?ns=reg.test%3A5000", f"{IMAGE}/{{}}", f"/v2/{NAME}/{{}}"]


def expect_headers(answer: Answer, media_type: str, digest: str, size_bytes: int) -> None:
    assert answer.status == 200, answer
    assert answer.headers["content-type"] == media_type
    assert answer.headers["content-length"] == str(size_bytes)
    assert answer.headers["docker-content-digest"] == digest
    assert answer.headers["etag"] == f'"{digest}"'
    assert answer.headers["oci-namespace"] == REGISTRY
    assert answer.headers["docker-distribution-api-version"] == "registry/2.0"


@pytest.mark.parametrize("kind", MANIFESTS)
async def test_a_manifest_of_any_kind_comes_as_it_is(scene: Scene, kind: str) -> None:
    held = MANIFESTS[kind]
    fill(scene.registry)
    ask = await scene.ready(f"manifests/{held.digest}")
    answer = await ask.head(f"{IMAGE}/manifests/{held.digest}")
    expect_headers(answer, held.media_type, held.digest, len(held.body))
    answer = await ask.get(f"{IMAGE}/manifests/{held.digest}")
    expect_headers(answer, held.media_type, held.digest, len(held.body))
    assert answer.body == held.body


async def test_a_manifest_of_nearly_4_mib_comes_whole_but_from_no_peer(scene: Scene, quick_clock: MockClock) -> None:
    fill(scene.registry)
    ask = await scene.ready(f"manifests/{HUGE.digest}")
    answer = await ask.get(f"{IMAGE}/manifests/{HUGE.digest}")
    if scene.state == PEER:
        assert (answer.status, answer.code) == (503, "UNAVAILABLE")
    else:
        expect_headers(answer, HUGE.media_type, HUGE.digest, len(HUGE.body))
        assert answer.body == HUGE.body


async def test_a_manifest_by_its_sha512(scene: Scene) -> None:
    fill(scene.registry)
    held, digest = MANIFESTS["OCI image"], sha512_of(PLAIN)
    ask = await scene.ready(f"manifests/{digest}")
    for method in ("HEAD", "GET"):
        answer = await ask.get(f"{IMAGE}/manifests/{digest}", method=method)
        expect_headers(answer, held.media_type, digest, len(held.body))
    assert answer.body == held.body


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize(
    "accept", [(), (("Accept", "application/json"),), (("Accept", "a/b"), ("Accept", "*/*")), (("Range", "bytes=0-3"),)]
)
async def test_neither_naming_nor_accept_nor_range_changes_a_manifest(
    cold: Scene, naming: str, accept: tuple[tuple[str, str], ...]
) -> None:
    fill(cold.registry, "v1")
    ask = await cold.ready()
    for reference in ("v1", digest_of(PLAIN)):
        answer = await ask.get(naming.format(f"manifests/{reference}"), *accept)
        expect_headers(answer, MANIFESTS["OCI image"].media_type, digest_of(PLAIN), len(PLAIN))
        assert answer.body == PLAIN


async def test_a_manifest_that_the_client_has_is_not_sent_again(scene: Scene) -> None:
    fill(scene.registry)
    ask = await scene.ready(PLAIN_PATH)
    etag = f'"{digest_of(PLAIN)}"'
    for known in (etag, f'W/{etag}, "other"', "*"):
        for method in ("GET", "HEAD"):
            answer = await ask.get(f"{IMAGE}/{PLAIN_PATH}", ("If-None-Match", known), method=method)
            assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", etag)
    assert (await ask.get(f"{IMAGE}/{PLAIN_PATH}", ("If-None-Match", '"other"'))).body == PLAIN


async def test_a_tag_is_what_the_origin_says(origin_stays: Scene) -> None:
    fill(origin_stays.registry, "v1")
    ask = await origin_stays.ready("manifests/v1")
    for method in ("HEAD", "GET"):
        answer = await ask.get(f"{IMAGE}/manifests/v1", method=method)
        expect_headers(answer, MANIFESTS["OCI image"].media_type, digest_of(PLAIN), len(PLAIN))
    assert answer.body == PLAIN


async def test_what_does_not_exist_is_404(origin_stays: Scene) -> None:
    fill(origin_stays.registry, "v1")
    ask = await origin_stays.ready("manifests/v1")
    for reference in ("v2", digest_of(b"nothing"), sha512_of(b"nothing")):
        answer = await ask.head(f"{IMAGE}/manifests/{reference}")
        assert (answer.status, answer.body) == (404, b"")
        answer = await ask.get(f"{IMAGE}/manifests/{reference}")
        assert (answer.status, answer.code) == (404, "MANIFEST_UNKNOWN")
        assert answer.headers["oci-namespace"] == REGISTRY


async def test_all_of_a_multi_arch_image_can_be_walked(scene: Scene) -> None:
    fill(scene.registry)
    top = MANIFESTS["OCI index"]
    paths = [f"manifests/{digest}" for digest in (top.digest, digest_of(PLAIN))]
    ask = await scene.ready(*paths)
    children = (await ask.get(f"{IMAGE}/{paths[0]}")).json["manifests"]
    child = (await ask.get(f"{IMAGE}/manifests/{children[0]['digest']}")).json
    for descriptor in (child["config"], *child["layers"]):
        answer = await ask.get(f"{IMAGE}/blobs/{descriptor['digest']}")
        assert (answer.status, digest_of(answer.body)) == (200, descriptor["digest"])
