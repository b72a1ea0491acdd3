# SPDX-License-Identifier: Apache-2.0
"""What p2pdist.net.origin asks and what it takes for an answer, against a scriptable registry over real sockets."""

from __future__ import annotations

import hashlib
import json
from random import Random

import pytest
import trio
import trio.testing

from p2pdist.core.rate import TokenBucket
from p2pdist.core.types import Digest, Repository
from p2pdist.errors import (
    DeniedByOrigin,
    IntegrityError,
    InvalidInput,
    NotFoundAtOrigin,
    OriginError,
)
from p2pdist.net.origin import OriginClient
from p2pdist.net.origin_upstream import Deadlines
from tests.fake_registry import OCI_MANIFEST, FakeRegistry, Fault, digest_of
from tests.net.origins import BLOB, CANARY, MANIFEST, PATIENT, REPO, client_of, fetched

# Manifests


async def test_a_head_resolves_a_tag(registry: FakeRegistry, origin: OriginClient) -> None:
    info = await origin.head_manifest(REPO, "v1")
    assert (info.digest, info.media_type, info.size_bytes) == (digest_of(MANIFEST), OCI_MANIFEST, len(MANIFEST))
    (request,) = registry.requests
    assert request.method == "HEAD"
    assert request.headers["accept"].count(",") == 4
    assert request.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=405),
        Fault(headers=(("Docker-Content-Digest", ""),)),
        Fault(headers=(("Docker-Content-Digest", "sha256:../../etc/passwd"),)),
        Fault(headers=(("Content-Type", ""),)),
        Fault(chunked=True),
    ],
    ids=["405", "no digest", "bad digest", "no type", "no length"],
)
async def test_a_head_that_says_too_little_is_asked_again_by_get(
    registry: FakeRegistry, origin: OriginClient, fault: Fault
) -> None:
    registry.script("HEAD", fault)
    info = await origin.head_manifest(REPO, "v1")
    assert (info.digest, info.media_type, info.size_bytes) == (digest_of(MANIFEST), OCI_MANIFEST, len(MANIFEST))
    assert [request.method for request in registry.requests] == ["HEAD", "GET"]


@pytest.mark.parametrize("reference", ["v1", digest_of(MANIFEST)])
async def test_a_manifest_comes_byte_for_byte(origin: OriginClient, reference: str) -> None:
    manifest = await origin.get_manifest(REPO, reference)
    assert (manifest.body, manifest.digest, manifest.media_type) == (MANIFEST, digest_of(MANIFEST), OCI_MANIFEST)
    assert origin.statistics()["reg.lab"] == {"requests": 1, "bytes": len(MANIFEST), "retries": 0, "errors": 0}


async def test_a_content_type_loses_its_parameters_and_is_else_kept(
    registry: FakeRegistry, origin: OriginClient
) -> None:
    registry.script("GET", Fault(headers=(("Content-Type", "application/vnd.Example+json; charset=utf-8"),)))
    assert (await origin.get_manifest(REPO, "v1")).media_type == "application/vnd.Example+json"


async def test_a_manifest_without_content_type_takes_its_own(registry: FakeRegistry, origin: OriginClient) -> None:
    config = {"mediaType": "a/b", "size": 0, "digest": digest_of(b"")}
    body = json.dumps({**json.loads(MANIFEST), "config": config}).encode()
    registry.add_manifest(REPO.name, body, tag="v2")
    registry.script("GET", Fault(headers=(("Content-Type", ""),)))
    assert (await origin.get_manifest(REPO, "v2")).media_type == OCI_MANIFEST
    registry.script("GET", Fault(headers=(("Content-Type", ""), ("Docker-Content-Digest", "")), body=b"{}"))
    with pytest.raises(OriginError, match="of what kind"):
        await origin.get_manifest(REPO, "v2")


@pytest.mark.parametrize("reference", ["v1", digest_of(MANIFEST)])
async def test_a_manifest_that_is_not_what_was_asked_for_is_refused(
    registry: FakeRegistry, origin: OriginClient, reference: str
) -> None:
    registry.script("GET", Fault(body=b"{}"))
    with pytest.raises(IntegrityError, match=r"reg\.lab/team/app") as refusal:
        await origin.get_manifest(REPO, reference)
    assert (refusal.value.expected, refusal.value.actual) == (digest_of(MANIFEST), digest_of(b"{}"))


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_manifest_of_more_than_4_mib_is_not_read_to_its_end(
    registry: FakeRegistry, origin: OriginClient, chunked: bool
) -> None:
    registry.script("GET", Fault(body=bytes(20 * 1024 * 1024), chunked=chunked))
    with pytest.raises(OriginError, match="4194304 bytes"):
        await origin.get_manifest(REPO, "v1")
    await registry.wait_connections(0)


async def test_a_compressed_manifest_is_refused(registry: FakeRegistry, origin: OriginClient) -> None:
    registry.script("GET", Fault(headers=(("Content-Encoding", "gzip"),)))
    with pytest.raises(OriginError, match="compresses"):
        await origin.get_manifest(REPO, "v1")


@pytest.mark.parametrize(
    ("name", "reference"), [("../x", "v1"), ("a//b", "v1"), ("app", "../v1"), ("app", "sha256:00"), ("app", "a?b")]
)
async def test_what_no_registry_could_have_is_never_asked_for(
    registry: FakeRegistry, origin: OriginClient, name: str, reference: str
) -> None:
    for call in (origin.head_manifest, origin.get_manifest):
        with pytest.raises(InvalidInput):
            await call(Repository("reg.lab", name), reference)
    with pytest.raises(InvalidInput):
        await origin.blob_size(REPO, Digest("sha256:../x"))
    assert registry.requests == []


# Ranges


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, len(BLOB)), (100, 5000), (len(BLOB) - 1, len(BLOB)), (7, 7)])
async def test_a_range_is_fetched_exactly(registry: FakeRegistry, origin: OriginClient, start: int, stop: int) -> None:
    assert await fetched(origin, start, stop) == BLOB[start:stop]
    assert [request.headers["range"] for request in registry.requests] == (
        [f"bytes={start}-{stop - 1}"] if start < stop else []
    )
    assert origin.statistics()["reg.lab"]["bytes"] == stop - start


async def test_ranges_share_connections(registry: FakeRegistry, origin: OriginClient) -> None:
    for start in range(0, 1000, 100):
        assert await fetched(origin, start, start + 100) == BLOB[start : start + 100]
    assert registry.connections == 1


@pytest.mark.parametrize(("start", "stop"), [(0, len(BLOB)), (0, 100), (5000, 6000), (5000, len(BLOB))])
@pytest.mark.parametrize("chunked", [False, True])
async def test_an_origin_that_ignores_range_still_serves(
    registry: FakeRegistry, origin: OriginClient, start: int, stop: int, chunked: bool
) -> None:
    registry.every = Fault(ignore_range=True, chunked=chunked)
    assert await fetched(origin, start, stop) == BLOB[start:stop]


async def test_a_range_far_into_a_blob_needs_an_origin_that_knows_ranges(
    registry: FakeRegistry, origin: OriginClient
) -> None:
    blob_bytes = 100 * 1024 * 1024
    registry.every = Fault(ignore_range=True, headers=(("Content-Length", str(blob_bytes)),))
    with pytest.raises(OriginError, match="ignores Range requests"):
        await origin.fetch(
            REPO, digest_of(BLOB), blob_bytes - 10, memoryview(bytearray(10)), blob_bytes=blob_bytes, progress=print
        )


WRONG: dict[str, Fault] = {
    "another range": Fault(headers=(("Content-Range", f"bytes 101-200/{len(BLOB)}"),)),
    "no Content-Range": Fault(headers=(("Content-Range", ""),)),
    "another size": Fault(headers=(("Content-Range", f"bytes 100-199/{len(BLOB) + 1}"),)),
    "a longer body": Fault(body=BLOB[100:201]),
    "a shorter body, said so": Fault(body=BLOB[100:150]),
    "a longer body of unsaid length": Fault(body=BLOB[100:300], chunked=True),
    "a whole blob of another size": Fault(ignore_range=True, body=BLOB[:-1]),
    "416": Fault(status=416),
}


@pytest.mark.parametrize("fault", WRONG.values(), ids=WRONG.keys())
async def test_a_wrong_range_is_refused_at_once(registry: FakeRegistry, origin: OriginClient, fault: Fault) -> None:
    registry.script("/blobs/", fault)
    with pytest.raises(OriginError, match=f"reg.lab/team/app@{digest_of(BLOB)}: 127.0.0.1"):
        await fetched(origin, 100, 200)
    assert len(registry.requests) == 1
    if fault.status is None:
        await registry.wait_connections(0)


async def test_a_whole_blob_that_is_longer_than_it_may_be_is_refused(
    registry: FakeRegistry, origin: OriginClient
) -> None:
    registry.every = Fault(ignore_range=True, body=BLOB + b"x", chunked=True)
    with pytest.raises(OriginError, match="more bytes"):
        await fetched(origin, 100, len(BLOB))


async def test_a_fetch_that_broke_off_goes_on_where_it_stopped(registry: FakeRegistry, origin: OriginClient) -> None:
    registry.script("/blobs/", Fault(cut_after=300), Fault(cut_after=0), Fault(cut_after=500))
    assert await fetched(origin, 100, 5000) == BLOB[100:5000]
    ranges = [request.headers["range"] for request in registry.requests]
    assert ranges == ["bytes=100-4999", "bytes=400-4999", "bytes=400-4999", "bytes=900-4999"]


async def test_a_body_that_ends_early_without_a_length_is_continued(
    registry: FakeRegistry, origin: OriginClient
) -> None:
    registry.script("/blobs/", Fault(body=BLOB[100:150], chunked=True))
    assert await fetched(origin, 100, 5000) == BLOB[100:5000]


async def test_a_stalled_body_is_dropped_and_continued(registry: FakeRegistry) -> None:
    registry.script("/blobs/", Fault(stall_after=1000))
    async with client_of(registry, deadlines=Deadlines(stall_s=0.2, backoff_s=0.001)) as origin:
        assert await fetched(origin, 0, 5000) == BLOB[:5000]
    assert registry.asked("/blobs/")[1].headers["range"] == "bytes=1000-4999"


async def test_a_cancelled_fetch_leaves_no_connection_open(registry: FakeRegistry, origin: OriginClient) -> None:
    registry.script("/blobs/", Fault(stall_after=100), Fault(stall_after=-1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetched, origin, 0, 5000)
        nursery.start_soon(fetched, origin, 0, 5000)
        await registry.wait_connections(2)
        await registry.wait_stalled()
        nursery.cancel_scope.cancel()
    await registry.wait_connections(0)
    assert await fetched(origin, 0, 100) == BLOB[:100]


async def test_all_fetches_together_are_no_faster_than_the_limit(
    registry: FakeRegistry, quick_clock: trio.testing.MockClock
) -> None:
    limit = TokenBucket(1000, len(BLOB) // 2)
    async with client_of(registry, deadlines=PATIENT, limit=limit) as client:
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetched, client, 0, 5000)
            nursery.start_soon(fetched, client, 5000, len(BLOB))
        least_s = (len(BLOB) - len(BLOB) // 2) / 1000
        assert least_s <= trio.current_time() - began < 2 * least_s


async def test_manifests_pass_the_limit(registry: FakeRegistry, mock_clock: trio.testing.MockClock) -> None:
    limit = TokenBucket(1000, 1000)
    limit.reserve(10**9, trio.current_time())
    async with client_of(registry, deadlines=PATIENT, limit=limit) as client:
        assert (await client.get_manifest(REPO, "v1")).body == MANIFEST


async def test_no_more_ranges_than_allowed_are_fetched_at_once_and_manifests_pass_them(registry: FakeRegistry) -> None:
    registry.script("/blobs/", *[Fault(stall_after=-1)] * 2)
    async with client_of(registry, connections=2) as origin, trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(fetched, origin, 0, 5000)
        await registry.wait_connections(2)
        assert (await origin.get_manifest(REPO, "v1")).body == MANIFEST
        assert len(registry.asked("/blobs/")) == 2
        nursery.cancel_scope.cancel()


async def test_closing_ends_what_is_open(registry: FakeRegistry) -> None:
    async with client_of(registry) as origin:
        await fetched(origin, 0, 100)
        await registry.wait_connections(1)
    await registry.wait_connections(0)


async def test_the_span_must_be_inside_the_blob(origin: OriginClient) -> None:
    for start in (-1, len(BLOB) - 5):
        with pytest.raises(ValueError, match="of a blob of"):
            await origin.fetch(
                REPO, digest_of(BLOB), start, memoryview(bytearray(10)), blob_bytes=len(BLOB), progress=print
            )


async def test_large_bodies_arrive_whole_through_small_and_large_reads(registry: FakeRegistry) -> None:
    blob = Random(5).randbytes(3_000_001)
    registry.add_blob(blob)
    async with client_of(registry) as origin:
        got = await fetched(origin, 1, len(blob), blob)
    assert hashlib.sha256(got).digest() == hashlib.sha256(blob[1:]).digest()


# Sizes


async def test_the_size_of_a_blob_is_told_by_head(registry: FakeRegistry, origin: OriginClient) -> None:
    assert await origin.blob_size(REPO, digest_of(BLOB)) == len(BLOB)
    assert [request.method for request in registry.requests] == ["HEAD"]


@pytest.mark.parametrize("fault", [Fault(status=405), Fault(chunked=True)], ids=["405", "no length"])
@pytest.mark.parametrize("blob", [BLOB, b""], ids=["some", "empty"])
async def test_the_size_is_told_by_a_range_where_head_does_not(
    registry: FakeRegistry, origin: OriginClient, fault: Fault, blob: bytes
) -> None:
    registry.add_blob(blob)
    registry.script("HEAD", fault)
    assert await origin.blob_size(REPO, digest_of(blob)) == len(blob)


async def test_the_size_is_told_by_an_origin_that_ignores_range(registry: FakeRegistry, origin: OriginClient) -> None:
    registry.script("HEAD", Fault(status=405))
    registry.every = Fault(ignore_range=True)
    assert await origin.blob_size(REPO, digest_of(BLOB)) == len(BLOB)
    registry.script("HEAD", Fault(status=405))
    registry.every = Fault(ignore_range=True, chunked=True)
    assert await origin.blob_size(REPO, digest_of(BLOB)) == len(BLOB)


async def test_a_size_that_has_to_be_counted_is_not_that_of_a_body_that_broke_off(
    registry: FakeRegistry, origin: OriginClient
) -> None:
    registry.script("HEAD", Fault(chunked=True))
    registry.script("GET", Fault(ignore_range=True, chunked=True, cut_after=10))
    registry.every = Fault(ignore_range=True, chunked=True)
    assert await origin.blob_size(REPO, digest_of(BLOB)) == len(BLOB)


async def test_a_missing_blob_has_no_size(origin: OriginClient) -> None:
    with pytest.raises(NotFoundAtOrigin):
        await origin.blob_size(REPO, digest_of(b"absent"))


# Relaying


async def test_a_tag_list_is_relayed_with_a_link_that_fits_any_host(
    registry: FakeRegistry, origin: OriginClient
) -> None:
    link = f'<{registry.url}/v2/team/app/tags/list?last=v1&n=1>; rel="next"'
    headers = (("Content-Type", "application/json"), ("Link", link), ("Set-Cookie", CANARY))
    fault = Fault(status=200, body=b'{"tags":["v1"]}', headers=headers)
    registry.script("/tags/list?n=1", fault)
    answer = await origin.relay(REPO, "tags/list?n=1", "application/json")
    assert (answer.status_code, answer.body) == (200, b'{"tags":["v1"]}')
    assert answer.headers == [
        ("Content-Type", "application/json"),
        ("Link", '</v2/team/app/tags/list?last=v1&n=1>; rel="next"'),
    ]
    assert not origin.is_public(REPO)


async def test_a_link_to_another_host_is_not_relayed(registry: FakeRegistry, origin: OriginClient) -> None:
    registry.every = Fault(status=200, headers=(("Link", '<https://evil.example/v2/>; rel="next"'),))
    assert (await origin.relay(REPO, "tags/list", "*/*")).headers == []


async def test_a_list_that_is_not_for_everybody_is_refused(registry: FakeRegistry, origin: OriginClient) -> None:
    registry.auth = "basic"
    with pytest.raises(DeniedByOrigin, match="does not give it to everybody"):
        await origin.relay(REPO, "tags/list", "*/*")


@pytest.mark.parametrize("status", [400, 404])
async def test_referrers_are_relayed_with_any_final_status(
    registry: FakeRegistry, origin: OriginClient, status: int
) -> None:
    registry.every = Fault(status=status, body=b"{}")
    answer = await origin.relay(REPO, f"referrers/{digest_of(MANIFEST)}?artifactType=a/b", "*/*\r\nX: y")
    assert (answer.status_code, answer.body) == (status, b"{}")
    assert registry.requests[0].headers["accept"] == "*/*X: y"


@pytest.mark.parametrize(
    "target", ["", "manifests/v1", "tags/list/../x", "tags/list?a b", "referrers/x", "tags/list?\r\nX: y", "../../x"]
)
async def test_nothing_else_is_relayed(registry: FakeRegistry, origin: OriginClient, target: str) -> None:
    with pytest.raises(InvalidInput):
        await origin.relay(REPO, target, "*/*")
    assert registry.requests == []
