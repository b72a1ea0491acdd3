# SPDX-License-Identifier: Apache-2.0
"""What is refused: with the status and code of distribution-spec, in its error body."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conformance.content import PLAIN, fill
from tests.conformance.scene import IMAGE, NAME
from tests.fake_registry import digest_of

if TYPE_CHECKING:
    from tests.conformance.scene import Scene
    from tests.http_client import Answer

DIGEST = digest_of(PLAIN)
REFUSED = [
    (f"{IMAGE}/manifests/sha256:baddigeststring", 400, "DIGEST_INVALID"),
    (f"{IMAGE}/manifests/sha384:{'0' * 96}", 400, "DIGEST_INVALID"),
    (f"{IMAGE}/manifests/sha256:{'A' * 64}", 400, "DIGEST_INVALID"),
    (f"{IMAGE}/manifests/.tag", 400, "MANIFEST_INVALID"),
    (f"{IMAGE}/manifests/{'t' * 129}", 400, "MANIFEST_INVALID"),
    (f"{IMAGE}/blobs/latest", 400, "DIGEST_INVALID"),
    (f"{IMAGE}/blobs/sha512:{'0' * 64}", 400, "DIGEST_INVALID"),
    (f"{IMAGE}/referrers/sha256:short", 400, "DIGEST_INVALID"),
    (f"/v2/Lab/Image/manifests/{DIGEST}", 400, "NAME_INVALID"),
    (f"/v2/lab//image/manifests/{DIGEST}", 400, "NAME_INVALID"),
    (f"/v2/lab/../image/manifests/{DIGEST}", 400, "NAME_INVALID"),
    (f"/v2/lab%2fimage/manifests/{DIGEST}", 400, "NAME_INVALID"),
    (f"/v2/{'a' * 256}/tags/list", 400, "NAME_INVALID"),
    (f"/v2/{NAME}/manifests/{DIGEST}?ns=other.test", 404, "NAME_UNKNOWN"),
    (f"/v2/{NAME}/manifests/{DIGEST}?ns=127.0.0.1%3A5000", 404, "NAME_UNKNOWN"),
    (f"/v2/{NAME}/manifests/{DIGEST}?ns=a%00b", 404, "NAME_UNKNOWN"),
    (f"/v2/other.test/{NAME}/blobs/{DIGEST}", 404, "NAME_UNKNOWN"),
    ("/v2/_catalog", 404, "UNSUPPORTED"),
    ("/v1/_ping", 404, "UNSUPPORTED"),
    ("/", 404, "UNSUPPORTED"),
]
PUSHES = [
    ("POST", f"{IMAGE}/blobs/uploads/"),
    ("POST", f"{IMAGE}/blobs/uploads/?mount={DIGEST}&from=lab/other"),
    ("PATCH", f"{IMAGE}/blobs/uploads/1234"),
    ("PUT", f"{IMAGE}/blobs/uploads/1234?digest={DIGEST}"),
    ("PUT", f"{IMAGE}/manifests/v1"),
    ("DELETE", f"{IMAGE}/manifests/{DIGEST}"),
    ("DELETE", f"{IMAGE}/blobs/{DIGEST}"),
    ("OPTIONS", "/v2/"),
]


def expect_error(answer: Answer, status: int, code: str) -> None:
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["docker-distribution-api-version"] == "registry/2.0"
    (error,) = answer.json["errors"]
    assert error["code"] == code
    assert error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_root_says_that_this_is_a_registry(scene: Scene, method: str) -> None:
    ask = await scene.ready()
    for target in ("/v2/", "/v2", "/v2/?ns=reg.test%3A5000"):
        answer = await ask.get(target, method=method)
        assert (answer.status, answer.headers["docker-distribution-api-version"]) == (200, "registry/2.0")
        assert answer.headers["content-type"] == "application/json"


async def test_what_no_registry_has_is_refused_unasked(cold: Scene) -> None:
    ask = await cold.ready()
    for target, status, code in REFUSED:
        expect_error(await ask.get(target), status, code)
        answer = await ask.head(target)
        assert (answer.status, answer.body) == (status, b"")
    assert cold.registry.requests == []


@pytest.mark.parametrize(("method", "target"), PUSHES)
async def test_pushes_are_unsupported(scene: Scene, method: str, target: str) -> None:
    fill(scene.registry)
    ask = await scene.ready(f"manifests/{DIGEST}", proved=True)
    asked = len(scene.registry.requests)
    answer = await ask.get(target, ("Content-Length", "0"), method=method)
    expect_error(answer, 405, "UNSUPPORTED")
    assert answer.headers["allow"] == "GET, HEAD"
    assert len(scene.registry.requests) == asked


async def test_a_push_with_a_body_is_unsupported_too(cold: Scene) -> None:
    ask = await cold.ready()
    line = f"PUT {IMAGE}/manifests/v1 HTTP/1.1\r\nHost: x\r\nContent-Length: {len(PLAIN)}\r\n\r\n"
    await ask.send(line.encode() + PLAIN)
    expect_error(await ask.answer(), 405, "UNSUPPORTED")
