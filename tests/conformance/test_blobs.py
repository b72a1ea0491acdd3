# SPDX-License-Identifier: Apache-2.0
"""Blobs: whole and in ranges, as RFC 9110 and distribution-spec want them answered."""

from __future__ import annotations

from email.parser import BytesParser
from typing import TYPE_CHECKING

import pytest

from tests.conformance.content import BLOBS, EMPTY_LAYER, LARGE, MANIFESTS, PLAIN, SMALL, fill, sha512_of
from tests.conformance.scene import IMAGE, REGISTRY
from tests.fake_registry import digest_of

if TYPE_CHECKING:
    from tests.conformance.scene import Scene
    from tests.http_client import Answer

IMAGES = (f"manifests/{digest_of(PLAIN)}", f"manifests/{digest_of(EMPTY_LAYER)}")
DIGEST, SIZE = digest_of(LARGE), len(LARGE)
BLOB, ETAG = f"{IMAGE}/blobs/{DIGEST}", f'"{DIGEST}"'


def expect_headers(answer: Answer, digest: str, size_bytes: int, status: int = 200) -> None:
    assert answer.status == status, answer
    assert answer.headers["content-length"] == str(size_bytes)
    assert answer.headers["docker-content-digest"] == digest
    assert answer.headers["etag"] == f'"{digest}"'
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["oci-namespace"] == REGISTRY
    assert answer.headers["docker-distribution-api-version"] == "registry/2.0"


@pytest.mark.parametrize("kind", BLOBS)
async def test_a_blob_comes_whole(scene: Scene, kind: str) -> None:
    body, digest = BLOBS[kind], digest_of(BLOBS[kind])
    fill(scene.registry)
    ask = await scene.ready(*IMAGES, proved=True)
    expect_headers(await ask.head(f"{IMAGE}/blobs/{digest}"), digest, len(body))
    answer = await ask.get(f"{IMAGE}/blobs/{digest}")
    expect_headers(answer, digest, len(body))
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.body == body


async def test_a_blob_by_its_sha512(scene: Scene) -> None:
    fill(scene.registry)
    ask = await scene.ready(f"manifests/{MANIFESTS['sha512 layer'].digest}", proved=True)
    digest = sha512_of(LARGE)
    expect_headers(await ask.head(f"{IMAGE}/blobs/{digest}"), digest, SIZE)
    answer = await ask.get(f"{IMAGE}/blobs/{digest}", ("Range", "bytes=300000-"))
    expect_headers(answer, digest, SIZE - 300_000, 206)
    assert (await ask.get(f"{IMAGE}/blobs/{digest}")).body == LARGE


ONE_RANGE = {
    "first byte": ("0-0", 0, 1),
    "across chunks": ("262000-263000", 262_000, 263_001),
    "open-ended from the start": ("0-", 0, SIZE),
    "open-ended": ("699000-", 699_000, SIZE),
    "suffix": ("-1000", SIZE - 1000, SIZE),
    "suffix of more than there is": ("-800000", 0, SIZE),
    "clipped": ("699999-9999999", SIZE - 1, SIZE),
    "one of two within": ("9999999-,5-9", 5, 10),
}


@pytest.mark.parametrize("kind", ONE_RANGE)
async def test_one_range_is_206_with_just_that(scene: Scene, kind: str) -> None:
    value, start, stop = ONE_RANGE[kind]
    fill(scene.registry)
    ask = await scene.ready(*IMAGES, proved=True)
    answer = await ask.get(BLOB, ("Range", f"bytes={value}"))
    expect_headers(answer, DIGEST, stop - start, 206)
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.body == LARGE[start:stop]


async def test_several_ranges_are_multipart_in_the_order_asked_for(scene: Scene) -> None:
    fill(scene.registry)
    ask = await scene.ready(*IMAGES, proved=True)
    spans = [(690_000, 690_100), (0, 1), (262_100, 524_300), (SIZE - 3, SIZE)]
    value = "bytes=690000-690099,0-0, 262100-524299,-3"
    answer = await ask.get(BLOB, ("Range", value))
    expect_headers(answer, DIGEST, len(answer.body), 206)
    assert "content-range" not in answer.headers
    parts = multipart(answer)
    assert [part for _, part in parts] == [LARGE[start:stop] for start, stop in spans]
    assert [said for said, _ in parts] == [f"bytes {start}-{stop - 1}/{SIZE}" for start, stop in spans]
    assert (await ask.get(BLOB, ("Range", "bytes=1-2"))).body == LARGE[1:3]


def multipart(answer: Answer) -> list[tuple[str, bytes]]:
    """Return the parts of a multipart/byteranges body as another's parser sees them, with their Content-Range."""
    kind = answer.headers["content-type"]
    assert kind.startswith("multipart/byteranges; boundary=")
    message = BytesParser().parsebytes(b"Content-Type: " + kind.encode() + b"\r\n" + answer.body)
    boundary = message.get_boundary()
    assert boundary is not None
    whole = answer.body.split(f"\r\n--{boundary}".encode())
    assert (whole[0], whole[-1]) == (b"", b"--\r\n")
    parts = []
    for part in whole[1:-1]:
        head, _, body = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        assert fields["Content-Type"] == "application/octet-stream"
        parts.append((fields["Content-Range"], body))
    return parts


IGNORED = {
    "no such unit": (("Range", "items=0-5"),),
    "no number": (("Range", "bytes=a-b"),),
    "nothing": (("Range", "bytes="),),
    "overlapping": (("Range", "bytes=0-,0-,0-"),),
    "other tag": (("Range", "bytes=0-1"), ("If-Range", '"sha256:other"')),
    "weak tag": (("Range", "bytes=0-1"), ("If-Range", f"W/{ETAG}")),
    "date": (("Range", "bytes=0-1"), ("If-Range", "Sat, 29 Oct 1994 19:43:31 GMT")),
}


async def test_a_range_that_means_nothing_gets_the_whole(scene: Scene) -> None:
    fill(scene.registry)
    ask = await scene.ready(*IMAGES, proved=True)
    for headers in IGNORED.values():
        answer = await ask.get(BLOB, *headers)
        expect_headers(answer, DIGEST, SIZE)
        assert answer.body == LARGE


async def test_a_range_outside_is_416_with_the_size(scene: Scene) -> None:
    fill(scene.registry)
    ask = await scene.ready(*IMAGES, proved=True)
    for value in (f"{SIZE}-", f"{SIZE}-{SIZE + 5}", "-0", "500-0", f"{SIZE}-,500-0"):
        answer = await ask.get(BLOB, ("Range", f"bytes={value}"))
        assert (answer.status, answer.code) == (416, "UNSUPPORTED")
        assert answer.headers["content-range"] == f"bytes */{SIZE}"


async def test_more_ranges_than_anyone_needs_are_refused_so_that_the_client_asks_for_fewer(scene: Scene) -> None:
    fill(scene.registry)
    ask = await scene.ready(*IMAGES, proved=True)
    ranges = [f"{4 * number}-{4 * number + 1}" for number in range(129)]
    answer = await ask.get(BLOB, ("Range", "bytes=" + ",".join(ranges)))
    assert (answer.status, answer.code) == (400, "UNSUPPORTED")
    parts = multipart(await ask.get(BLOB, ("Range", "bytes=" + ",".join(ranges[1:]))))
    assert [part for _, part in parts] == [LARGE[4 * number : 4 * number + 2] for number in range(1, 129)]


async def test_a_blob_that_the_client_has_is_not_sent_again(scene: Scene) -> None:
    fill(scene.registry)
    ask = await scene.ready(*IMAGES, proved=True)
    for known in (ETAG, f'"other", W/{ETAG}', "*"):
        for method in ("GET", "HEAD"):
            answer = await ask.get(BLOB, ("If-None-Match", known), ("Range", "bytes=0-1"), method=method)
            assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", ETAG)
    for condition in (("If-None-Match", '"other"'), ("If-Range", ETAG)):
        answer = await ask.get(BLOB, condition, ("Range", "bytes=0-1"))
        assert (answer.status, answer.body) == (206, LARGE[:2])


async def test_the_head_of_a_blob_takes_no_range(scene: Scene) -> None:
    fill(scene.registry)
    ask = await scene.ready(*IMAGES, proved=True)
    expect_headers(await ask.head(BLOB, ("Range", "bytes=0-1")), DIGEST, SIZE)


async def test_an_empty_blob_has_no_ranges(scene: Scene) -> None:
    fill(scene.registry)
    ask = await scene.ready(*IMAGES, proved=True)
    digest = digest_of(b"")
    for value in ("bytes=0-", "bytes=-5", "bytes=5-9"):
        answer = await ask.get(f"{IMAGE}/blobs/{digest}", ("Range", value))
        expect_headers(answer, digest, 0)


async def test_a_blob_that_does_not_exist_is_404(origin_stays: Scene) -> None:
    fill(origin_stays.registry)
    ask = await origin_stays.ready(*IMAGES, proved=True)
    for digest in (digest_of(b"nothing"), sha512_of(b"nothing")):
        answer = await ask.head(f"{IMAGE}/blobs/{digest}")
        assert (answer.status, answer.body) == (404, b"")
        answer = await ask.get(f"{IMAGE}/blobs/{digest}")
        assert (answer.status, answer.code) == (404, "BLOB_UNKNOWN")


async def test_a_foreign_layer_is_left_to_the_client(origin_stays: Scene) -> None:
    fill(origin_stays.registry)
    held = MANIFESTS["foreign layer"]
    ask = await origin_stays.ready(f"manifests/{held.digest}")
    layers = (await ask.get(f"{IMAGE}/manifests/{held.digest}")).json["layers"]
    assert (await ask.get(f"{IMAGE}/blobs/{layers[0]['digest']}")).body == SMALL
    answer = await ask.get(f"{IMAGE}/blobs/{layers[1]['digest']}")
    assert (answer.status, answer.code) == (404, "BLOB_UNKNOWN")
    origin_stays.registry.add_blob(b"elsewhere")
    assert (await ask.get(f"{IMAGE}/blobs/{layers[1]['digest']}")).body == b"elsewhere"
