# SPDX-License-Identifier: Apache-2.0
"""Tags and referrers: the origin's word, page by page, whatever is cached; and what stands in for referrers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.conformance.content import INDEX, MANIFEST, PLAIN, SBOM, described, fill, sha512_of
from tests.conformance.scene import COLD, IMAGE, NAME, REGISTRY
from tests.fake_registry import Fault, digest_of

if TYPE_CHECKING:
    from trio.testing import MockClock

    from tests.conformance.scene import Scene
    from tests.http_client import Answer

SIGNATURE = "application/vnd.example.signature+json"
PLAIN_PATH = f"manifests/{digest_of(PLAIN)}"
TAGS = f"/v2/{NAME}/tags/list"
REFERRERS = f"/v2/{NAME}/referrers/{digest_of(PLAIN)}"
NAMINGS = [(f"/v2/{NAME}", "?ns=reg.test%3A5000"), (IMAGE, "")]


def tags(*names: str) -> bytes:
    return json.dumps({"name": NAME, "tags": names}).encode()


def referrers(*entries: dict[str, Any]) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}).encode()


SIGNED = described(b"signature", MANIFEST, artifactType=SIGNATURE, annotations={"by": "me"})
LISTED = described(b"sbom", MANIFEST, artifactType=SBOM)
BOTH = referrers(SIGNED, LISTED)


def expect_list(answer: Answer, media_type: str, body: bytes) -> None:
    assert (answer.status, answer.body) == (200, body)
    assert answer.headers["content-type"] == media_type
    assert answer.headers["content-length"] == str(len(body))
    assert answer.headers["oci-namespace"] == REGISTRY
    assert answer.headers["docker-distribution-api-version"] == "registry/2.0"


# Tags


async def test_tags_are_the_origins_in_every_state(origin_stays: Scene) -> None:
    fill(origin_stays.registry)
    ask = await origin_stays.ready(PLAIN_PATH)
    for body in (tags("a", "b"), tags("a", "b", "c")):
        origin_stays.registry.lists[TAGS] = {}, body
        expect_list(await ask.get(f"{IMAGE}/tags/list"), "application/json", body)
    answer = await ask.head(f"{IMAGE}/tags/list")
    assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", str(len(body)))


@pytest.mark.parametrize(("base", "query"), NAMINGS)
async def test_tags_can_be_read_page_by_page(cold: Scene, base: str, query: str) -> None:
    cold.registry.lists = {
        f"{TAGS}?n=2": ({"link": f'<{TAGS}?last=b&n=2>; rel="next"'}, tags("a", "b")),
        f"{TAGS}?n=2&last=b": ({"link": f"<{cold.registry.url}{TAGS}?n=2&last=d>; rel=next"}, tags("c", "d")),
        f"{TAGS}?n=2&last=d": ({}, tags("e")),
    }
    ask = await cold.ready()
    target, found = f"{base}/tags/list{query}{'&' if query else '?'}n=2", []
    while target:
        answer = await ask.get(target)
        found += answer.json["tags"]
        link = answer.headers.get("link", "")
        assert link == "" or link.endswith('>; rel="next"')
        target = link.partition(">")[0].removeprefix("<")
        assert target == "" or target.startswith(f"{base}/tags/list?")
    assert found == ["a", "b", "c", "d", "e"]


async def test_a_link_to_elsewhere_is_left_out(cold: Scene) -> None:
    cold.registry.lists[TAGS] = {"link": '<http://evil.example.com/v2/x/tags/list?n=1>; rel="next"'}, tags("a")
    assert "link" not in (await (await cold.ready()).get(f"{IMAGE}/tags/list")).headers


async def test_the_tags_of_what_does_not_exist_are_404(cold: Scene) -> None:
    answer = await (await cold.ready()).get(f"{IMAGE}/tags/list")
    assert (answer.status, answer.code) == (404, "NAME_UNKNOWN")


async def test_a_list_of_more_than_4_mib_is_left_to_the_client(cold: Scene) -> None:
    cold.registry.lists[TAGS] = {}, tags("a" * (4 << 20))
    answer = await (await cold.ready()).get(f"{IMAGE}/tags/list")
    assert (answer.status, answer.code) == (503, "UNAVAILABLE")


async def test_without_the_origin_there_are_no_lists(scene: Scene, quick_clock: MockClock) -> None:
    fill(scene.registry)
    scene.registry.lists = {TAGS: ({}, tags("a")), REFERRERS: ({"content-type": INDEX}, BOTH)}
    ask = await scene.ready(PLAIN_PATH, "tags/list")
    for path in ("tags/list", f"referrers/{digest_of(PLAIN)}"):
        answer = await ask.get(f"{IMAGE}/{path}")
        assert answer.status == (200 if scene.state == COLD else 503)
        assert scene.state == COLD or answer.code == "UNAVAILABLE"


# Referrers


async def test_referrers_are_the_origins_in_every_state(origin_stays: Scene) -> None:
    fill(origin_stays.registry)
    kind = {"content-type": INDEX}
    origin_stays.registry.lists = {
        REFERRERS: ({**kind, "link": f'<{REFERRERS}?artifactType=a&x=1>; rel="next"'}, BOTH),
        f"{REFERRERS}?artifactType={SBOM}": ({**kind, "oci-filters-applied": "artifactType"}, referrers(LISTED)),
    }
    ask = await origin_stays.ready(PLAIN_PATH)
    answer = await ask.get(f"{IMAGE}/referrers/{digest_of(PLAIN)}")
    expect_list(answer, INDEX, BOTH)
    assert answer.headers["link"] == f'<{IMAGE}/referrers/{digest_of(PLAIN)}?artifactType=a>; rel="next"'
    assert "oci-filters-applied" not in answer.headers
    answer = await ask.get(f"{IMAGE}/referrers/{digest_of(PLAIN)}?artifactType={SBOM}")
    expect_list(answer, INDEX, referrers(LISTED))
    assert answer.headers["oci-filters-applied"] == "artifactType"
    assert (await ask.head(f"{IMAGE}/referrers/{digest_of(PLAIN)}")).status == 200


async def test_referrers_that_the_origin_does_not_filter_are_filtered(cold: Scene) -> None:
    escaped = SIGNATURE.replace("/", "%2F").replace("+", "%2B")
    cold.registry.lists[f"{REFERRERS}?artifactType={escaped}"] = {"content-type": INDEX}, BOTH
    answer = await (await cold.ready()).get(f"{IMAGE}/referrers/{digest_of(PLAIN)}?artifactType={escaped}")
    expect_list(answer, INDEX, referrers(SIGNED))
    assert answer.headers["oci-filters-applied"] == "artifactType"


@pytest.mark.parametrize(("base", "query"), NAMINGS)
@pytest.mark.parametrize("subject", [digest_of(PLAIN), sha512_of(PLAIN)])
async def test_an_origin_without_referrers_is_asked_for_the_fallback_tag(
    cold: Scene, base: str, query: str, subject: str
) -> None:
    cold.registry.add_manifest(NAME, BOTH, tag=subject.replace(":", "-")[: len("sha256-") + 64], media_type=INDEX)
    ask = await cold.ready()
    expect_list(await ask.get(f"{base}/referrers/{subject}{query}"), INDEX, BOTH)
    answer = await ask.get(f"{base}/referrers/{subject}{query}{'&' if query else '?'}artifactType={SBOM}")
    expect_list(answer, INDEX, referrers(LISTED))
    assert answer.headers["oci-filters-applied"] == "artifactType"


async def test_a_fallback_list_without_types_is_not_said_to_be_filtered(cold: Scene) -> None:
    untyped = referrers(SIGNED, described(b"old", MANIFEST))
    cold.registry.add_manifest(NAME, untyped, tag=digest_of(PLAIN).replace(":", "-"), media_type=INDEX)
    answer = await (await cold.ready()).get(f"{IMAGE}/referrers/{digest_of(PLAIN)}?artifactType={SBOM}")
    expect_list(answer, INDEX, untyped)
    assert "oci-filters-applied" not in answer.headers


@pytest.mark.parametrize("tagged", [False, True])
async def test_without_any_referrers_the_list_is_empty(cold: Scene, tagged: bool) -> None:
    if tagged:
        cold.registry.add_manifest(NAME, PLAIN, tag=digest_of(PLAIN).replace(":", "-"))
    answer = await (await cold.ready()).get(f"{IMAGE}/referrers/{digest_of(PLAIN)}")
    assert (answer.status, answer.headers["content-type"]) == (200, INDEX)
    assert answer.json == {"schemaVersion": 2, "mediaType": INDEX, "manifests": []}


async def test_referrers_that_the_origin_denies_are_denied(cold: Scene) -> None:
    cold.registry.every = Fault(status=401)
    answer = await (await cold.ready()).get(f"{IMAGE}/referrers/{digest_of(PLAIN)}")
    assert (answer.status, answer.code) == (404, "DENIED")
