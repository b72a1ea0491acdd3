# SPDX-License-Identifier: Apache-2.0
"""The client of a mirror: what it asks, what it believes, and what it does about a mirror that fails."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
import trio

from p2pdist.commands.layout import BlobSink
from p2pdist.commands.mirror_client import TRIES, MirrorClient
from p2pdist.core.oci import MANIFEST_BYTES_MAX, OCI_MANIFEST
from p2pdist.core.types import Descriptor, Repository, Split, parse_digest
from p2pdist.errors import IntegrityError, P2PDistError, TransferError
from tests.commands.fake_mirror import FakeMirror, Fault, describe_bytes

if TYPE_CHECKING:
    from trio.testing import MockClock

REPOSITORY = Repository("reg.lab:5000", "team/app")
LAYER = random.Random(1).randbytes(12_345)


async def fetch(mirror: FakeMirror, blob: Descriptor, sources: list[str] | None = None) -> BlobSink:
    sink = BlobSink(blob, None)
    async with MirrorClient("http://mirror:5050/", transport=mirror) as client:
        await client.blob(REPOSITORY, blob, sink, (sources if sources is not None else []).append)
    sink.check()
    return sink


async def fetch_manifest(mirror: FakeMirror, reference: str) -> bytes:
    async with MirrorClient("http://mirror:5050", transport=mirror) as client:
        return (await client.manifest(REPOSITORY, reference)).body


async def test_requests_are_named_as_containerd_names_them() -> None:
    mirror = FakeMirror()
    blob = mirror.add_blob(LAYER)
    await fetch(mirror, blob)
    (request,) = mirror.requests
    assert request.url.path == f"/v2/team/app/blobs/{blob.digest}"
    assert request.url.params["ns"] == "reg.lab:5000"
    assert request.headers["Accept-Encoding"] == "identity"
    assert "Range" not in request.headers


async def test_a_manifest_comes_with_its_type_and_computed_digest() -> None:
    mirror = FakeMirror()
    expected = mirror.add_image([LAYER], tag="v1")
    async with MirrorClient("http://mirror:5050", transport=mirror) as client:
        manifest = await client.manifest(REPOSITORY, "v1")
    assert (manifest.digest, manifest.media_type) == (expected.digest, OCI_MANIFEST)
    assert OCI_MANIFEST in mirror.requests[0].headers["Accept"]


@pytest.mark.parametrize("by_digest", [True, False], ids=["by digest", "by tag"])
async def test_a_manifest_that_is_not_what_was_named_is_refused(by_digest: bool) -> None:
    mirror = FakeMirror()
    reference = mirror.add_image([LAYER], tag="v1").digest if by_digest else "v1"
    mirror.add_image([LAYER], tag="v1")
    mirror.faults[reference] = [Fault(body=b"{}")]
    with pytest.raises(IntegrityError, match=r"manifest reg\.lab:5000/team/app .* is wrong"):
        await fetch_manifest(mirror, reference)
    assert len(mirror.requests) == 1


async def test_a_manifest_without_end_is_refused() -> None:
    mirror = FakeMirror()
    mirror.add_image([LAYER], tag="v1")
    mirror.faults["v1"] = [Fault(body=b" " * (MANIFEST_BYTES_MAX + 1))]
    with pytest.raises(P2PDistError, match="has more than"):
        await fetch_manifest(mirror, "v1")


async def test_a_cut_blob_is_resumed_where_it_stopped(autojump_clock: MockClock) -> None:
    mirror = FakeMirror()
    blob = mirror.add_blob(LAYER)
    mirror.faults[blob.digest] = [Fault(cut_after=5000), Fault(cut_after=300)]
    sink = await fetch(mirror, blob)
    assert sink.written_bytes == len(LAYER)
    assert [request.headers.get("Range") for request in mirror.requests] == [None, "bytes=5000-", "bytes=5300-"]


async def test_a_body_that_ends_early_without_an_error_is_resumed_too(autojump_clock: MockClock) -> None:
    mirror = FakeMirror()
    blob = mirror.add_blob(LAYER)
    mirror.faults[blob.digest] = [Fault(body=LAYER[:4000])]
    await fetch(mirror, blob)
    assert mirror.requests[1].headers["Range"] == "bytes=4000-"


async def test_a_mirror_that_passes_over_range_is_read_from_the_start(autojump_clock: MockClock) -> None:
    mirror = FakeMirror()
    blob = mirror.add_blob(LAYER)
    mirror.faults[blob.digest] = [Fault(cut_after=5500), Fault(ignore_range=True)]
    await fetch(mirror, blob)


async def test_a_resumed_body_that_starts_elsewhere_is_refused(autojump_clock: MockClock) -> None:
    mirror = FakeMirror()
    blob = mirror.add_blob(LAYER)
    mirror.faults[blob.digest] = [Fault(cut_after=5000), Fault(content_range="bytes 50-100/12345")]
    with pytest.raises(P2PDistError, match="not at byte 5000"):
        await fetch(mirror, blob)


async def test_pauses_double_and_tries_end(autojump_clock: MockClock) -> None:
    mirror = FakeMirror()
    blob = mirror.add_blob(LAYER)
    mirror.faults[blob.digest] = [Fault(status=503)] * TRIES
    with pytest.raises(TransferError, match="answered 503"):
        await fetch(mirror, blob)
    assert len(mirror.requests) == TRIES
    assert trio.current_time() == 0.5 + 1 + 2 + 4


@pytest.mark.parametrize("status", [400, 401, 403, 404])
async def test_a_refusal_is_not_repeated(status: int) -> None:
    mirror = FakeMirror()
    mirror.faults["v1"] = [Fault(status=status, body=b'{"errors":[{"code":"DENIED","message":"not for you"}]}')]
    with pytest.raises(
        P2PDistError, match=rf"answered {status} to reg\.lab:5000/team/app manifests/v1: DENIED not for"
    ):
        await fetch_manifest(mirror, "v1")
    assert len(mirror.requests) == 1


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"errors":[]}', b'{"errors":[7]}', b"\xff" * 5_000_000])
async def test_a_refusal_may_have_any_body(body: bytes) -> None:
    mirror = FakeMirror()
    mirror.faults["v1"] = [Fault(status=404, body=body)]
    with pytest.raises(P2PDistError):
        await fetch_manifest(mirror, "v1")


async def test_a_mirror_that_never_answered_is_not_waited_for() -> None:
    mirror = FakeMirror(faults={"v1": [Fault(status=0)]})
    with pytest.raises(P2PDistError, match=r"nothing answers at http://mirror:5050 .*start `p2pdist agent`"):
        await fetch_manifest(mirror, "v1")
    assert len(mirror.requests) == 1


async def test_a_mirror_that_went_away_is_waited_for(autojump_clock: MockClock) -> None:
    mirror = FakeMirror()
    blob = mirror.add_blob(LAYER)
    mirror.faults[blob.digest] = [Fault(cut_after=1), Fault(status=0), Fault(status=0)]
    await fetch(mirror, blob)


async def test_more_bytes_than_the_manifest_says_are_refused() -> None:
    mirror = FakeMirror()
    blob = mirror.add_blob(LAYER)
    mirror.faults[blob.digest] = [Fault(body=LAYER + b"x")]
    with pytest.raises(IntegrityError, match=blob.digest):
        await fetch(mirror, blob)


async def test_wrong_bytes_are_refused_with_the_blobs_name() -> None:
    mirror = FakeMirror()
    blob = mirror.add_blob(LAYER)
    mirror.faults[blob.digest] = [Fault(body=b"\0" + LAYER[1:])]
    with pytest.raises(IntegrityError, match=f"blob {blob.digest} is wrong"):
        await fetch(mirror, blob)


async def test_a_blob_of_nothing_is_fetched() -> None:
    mirror = FakeMirror()
    await fetch(mirror, mirror.add_blob(b""))


async def test_the_mirrors_word_on_the_source_is_passed_on() -> None:
    mirror = FakeMirror(source="cache")
    sources: list[str] = []
    await fetch(mirror, mirror.add_blob(LAYER), sources)
    assert sources == ["cache"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"from_peers": 3, "from_origin": 2, "from_cache": 1}, Split(3, 2, 1)),
        ({"from_peers": 3}, Split(3, 0, 0)),
        ({"from_peers": "3"}, None),
        ([1], None),
    ],
)
async def test_the_split_is_what_the_agent_tells_or_nothing(answer: object, expected: Split | None) -> None:
    blob = describe_bytes(LAYER)
    mirror = FakeMirror(splits={blob.digest: answer})
    async with MirrorClient("http://mirror:5050", transport=mirror) as client:
        assert await client.split(blob.digest) == expected
        assert await client.split(parse_digest("sha256:" + "0" * 64)) is None
