# SPDX-License-Identifier: Apache-2.0
"""The promises of p2pdist.net.origin, against a scriptable registry over real sockets."""

from __future__ import annotations

import hashlib
import json
import logging
import ssl
from contextlib import asynccontextmanager
from random import Random
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
import trustme

from p2pdist.core.access import NOBODY, AccessRule, Caller
from p2pdist.core.rate import TokenBucket
from p2pdist.core.types import Digest, Repository
from p2pdist.errors import (
    ConfigError,
    DeniedByOrigin,
    IntegrityError,
    InvalidInput,
    NotFoundAtOrigin,
    OriginError,
)
from p2pdist.net.credentials import Credentials
from p2pdist.net.origin import OriginClient, RegistrySettings, default_url
from p2pdist.net.origin_upstream import Deadlines
from tests.fake_registry import OCI_MANIFEST, FakeRegistry, Fault, digest_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping
    from pathlib import Path

REPO = Repository("reg.lab", "team/app")
BLOB = bytes(range(256)) * 40
CANARY = "canary-7c1e"
QUICK = Deadlines(backoff_s=0.001, backoff_max_s=0.002)
PATIENT = Deadlines(connect_s=2000, header_s=2000, stall_s=2000, manifest_s=2000, fetch_s=2000)
"""For tests that let the clock run or jump."""
MANIFEST = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": []}).encode()


class Vault:
    """Credentials by registry; counts and answers anew what `fresh` holds."""

    def __init__(self, known: Mapping[str, Credentials], fresh: Credentials | None = None) -> None:
        self.known = dict(known)
        self.fresh = fresh
        self.asked: list[tuple[str, bool]] = []

    async def get(self, repository: Repository, *, file: Path | None, fresh: bool = False) -> Credentials | None:
        self.asked.append((repository.registry, fresh))
        return self.fresh if fresh and self.fresh else self.known.get(repository.registry)


@asynccontextmanager
async def client_of(
    registry: FakeRegistry,
    *,
    deadlines: Deadlines = QUICK,
    credentials: Vault | None = None,
    ca_file: Path | None = None,
    allow_any: bool = False,
    connections: int = 8,
    limit: TokenBucket | None = None,
    rule_of: Callable[[Repository], AccessRule] | None = None,
) -> AsyncIterator[OriginClient]:
    client = OriginClient(
        {REPO.registry: RegistrySettings(registry.url, ca_file)},
        allow_any=allow_any,
        credentials=credentials,
        connections=connections,
        rng=Random(1),
        deadlines=deadlines,
        limit=limit,
        rule_of=rule_of,
    )
    try:
        yield client
    finally:
        await client.aclose()


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry().running() as running:
        running.add_blob(BLOB)
        running.add_manifest(REPO.name, MANIFEST, tag="v1")
        yield running


@pytest.fixture
async def storage() -> AsyncIterator[FakeRegistry]:
    """Another server, where the registry redirects to."""
    async with FakeRegistry().running() as running:
        running.add_blob(BLOB)
        yield running


@pytest.fixture
async def origin(registry: FakeRegistry) -> AsyncIterator[OriginClient]:
    async with client_of(registry) as client:
        yield client


async def fetched(client: OriginClient, start: int, stop: int, blob: bytes = BLOB) -> bytes:
    into, told = bytearray(stop - start), [0]
    await client.fetch(REPO, digest_of(blob), start, memoryview(into), blob_bytes=len(blob), progress=told.append)
    assert told[-1] == len(into)
    assert told == sorted(set(told))
    return bytes(into)


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


# Errors and retries


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        (404, NotFoundAtOrigin, "reg.lab/team/app v1: not found at 127.0.0.1:{port}"),
        (403, DeniedByOrigin, "does not give it to everybody"),
        (401, DeniedByOrigin, "does not give it to everybody"),
        (418, OriginError, "answered HTTP 418"),
    ],
)
async def test_a_final_status_is_asked_once_and_said_in_words(
    registry: FakeRegistry, origin: OriginClient, status: int, kind: type[OriginError], text: str
) -> None:
    registry.every = Fault(status=status)
    with pytest.raises(kind) as refusal:
        await origin.get_manifest(REPO, "v1")
    assert refusal.value.status_code == status
    assert text.format(port=registry.port) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(registry.requests) == 1
    assert origin.statistics()["reg.lab"]["errors"] == 1


async def test_the_code_of_an_oci_error_is_passed_on_and_its_message_is_not(
    registry: FakeRegistry, origin: OriginClient
) -> None:
    body = json.dumps({"errors": [{"code": "NAME_UNKNOWN", "message": CANARY}]}).encode()
    registry.every = Fault(status=404, body=body)
    with pytest.raises(NotFoundAtOrigin, match="HTTP 404 NAME_UNKNOWN") as refusal:
        await origin.get_manifest(REPO, "v1")
    assert CANARY not in str(refusal.value)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_a_passing_failure_is_tried_again(registry: FakeRegistry, origin: OriginClient, status: int) -> None:
    registry.script("GET", *[Fault(status=status)] * 3)
    assert (await origin.get_manifest(REPO, "v1")).body == MANIFEST
    assert len(registry.requests) == 4
    assert origin.statistics()["reg.lab"]["retries"] == 3
    assert registry.connections == 1


async def test_after_four_tries_the_failure_is_the_last_answers(registry: FakeRegistry, origin: OriginClient) -> None:
    registry.every = Fault(status=503)
    with pytest.raises(OriginError, match="HTTP 503") as refusal:
        await origin.get_manifest(REPO, "v1")
    assert refusal.value.status_code == 503
    assert len(registry.requests) == 4


async def test_a_wait_longer_than_the_deadline_is_not_begun(registry: FakeRegistry, origin: OriginClient) -> None:
    registry.every = Fault(status=429, headers=(("Retry-After", "20"),))
    with pytest.raises(OriginError) as refusal:
        await origin.get_manifest(REPO, "v1")
    assert (refusal.value.status_code, refusal.value.retry_after_s) == (429, 20)
    assert len(registry.requests) == 1


async def test_a_retry_after_with_a_date_counts_by_the_clock_of_the_registry(
    registry: FakeRegistry, origin: OriginClient
) -> None:
    dates = (("Date", "Thu, 01 Jan 2099 00:00:00 GMT"), ("Retry-After", "Thu, 01 Jan 2099 00:01:00 GMT"))
    registry.every = Fault(status=503, headers=dates)
    with pytest.raises(OriginError) as refusal:
        await origin.get_manifest(REPO, "v1")
    assert refusal.value.retry_after_s == 60


async def test_retry_after_is_waited_for(registry: FakeRegistry, mock_clock: trio.testing.MockClock) -> None:
    mock_clock.rate = 20
    registry.script("GET", Fault(status=429, headers=(("Retry-After", "5"),)))
    async with client_of(registry, deadlines=PATIENT) as origin:
        began = trio.current_time()
        await fetched(origin, 0, 100)
        assert trio.current_time() - began >= 5


async def test_a_closed_port_is_tried_again_and_then_named(registry: FakeRegistry) -> None:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    async with client_of(FakeRegistry(port=port)) as origin:
        with pytest.raises(OriginError, match=f"cannot connect to 127.0.0.1:{port}: Connection refused") as refusal:
            await origin.get_manifest(REPO, "v1")
        assert refusal.value.status_code is None
        assert origin.statistics()["reg.lab"]["retries"] == 3


async def test_a_silent_registry_is_given_up_at_the_deadline(registry: FakeRegistry, origin: OriginClient) -> None:
    registry.every = Fault(stall_after=-1)
    with pytest.raises(OriginError, match=r"reg\.lab did not deliver within 0\.2 s"):
        await origin.get_manifest(REPO, "v1", deadline_s=0.2)
    await registry.wait_connections(0)


async def test_headers_that_never_come_cost_one_try(registry: FakeRegistry) -> None:
    registry.script("GET", Fault(stall_after=-1))
    async with client_of(registry, deadlines=Deadlines(header_s=0.2, backoff_s=0.001)) as origin:
        assert (await origin.get_manifest(REPO, "v1")).body == MANIFEST


async def test_a_dropped_connection_is_tried_again(registry: FakeRegistry, origin: OriginClient) -> None:
    registry.script("GET", Fault(cut_after=5))
    assert (await origin.get_manifest(REPO, "v1")).body == MANIFEST


async def test_a_server_that_speaks_no_http_is_said_so(registry: FakeRegistry) -> None:
    async def babble(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.send_all(b"SSH-2.0-OpenSSH\r\n\r\n")

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, babble, listeners)
        async with client_of(FakeRegistry(port=listeners[0].socket.getsockname()[1])) as origin:
            with pytest.raises(OriginError, match="broke off or spoke no HTTP"):
                await origin.get_manifest(REPO, "v1")
        nursery.cancel_scope.cancel()


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


# Redirects


async def test_a_redirect_is_followed_without_authorisation_and_remembered(
    registry: FakeRegistry, storage: FakeRegistry
) -> None:
    registry.auth = "basic"
    where = f"{storage.url}/v2/x/blobs/{digest_of(BLOB)}?signature={CANARY}"
    registry.script(
        "/blobs/", Fault(status=401, headers=(("WWW-Authenticate", "Basic realm=x"),)), Fault(redirect=where)
    )
    async with client_of(registry, credentials=Vault({"reg.lab": Credentials("me", "pw")})) as origin:
        for start in (0, 100, 200):
            assert await fetched(origin, start, start + 100) == BLOB[start : start + 100]
    assert len(registry.asked("/blobs/")) == 2
    assert len(storage.requests) == 3
    assert all("authorization" not in request.headers for request in storage.requests)
    assert {request.headers["host"] for request in storage.requests} == {storage.netloc}


@pytest.mark.parametrize("status", [401, 403, 404, 410, 500])
async def test_a_place_that_serves_no_more_is_asked_for_again(
    registry: FakeRegistry, storage: FakeRegistry, status: int
) -> None:
    where = f"{storage.url}/v2/x/blobs/{digest_of(BLOB)}"
    registry.script("/blobs/", *[Fault(redirect=where)] * 2)
    async with client_of(registry) as origin:
        await fetched(origin, 0, 100)
        storage.script("GET", Fault(status=status))
        assert await fetched(origin, 100, 200) == BLOB[100:200]
    assert len(registry.requests) == 2


async def test_a_place_is_forgotten_after_its_time(
    registry: FakeRegistry, storage: FakeRegistry, mock_clock: trio.testing.MockClock
) -> None:
    mock_clock.rate = 1
    registry.every = Fault(redirect=f"{storage.url}/v2/x/blobs/{digest_of(BLOB)}")
    async with client_of(registry, deadlines=PATIENT) as origin:
        await fetched(origin, 0, 100)
        mock_clock.jump(30)
        await fetched(origin, 0, 100)
        await fetched(origin, 0, 100)
    assert len(registry.requests) == 2


async def test_a_redirect_within_the_registry_keeps_the_authorisation(registry: FakeRegistry) -> None:
    registry.auth = "basic"
    registry.script("/v2/team/app/blobs/", Fault(), Fault(redirect=f"/v2/other/blobs/{digest_of(BLOB)}"))
    async with client_of(registry, credentials=Vault({"reg.lab": Credentials("me", "pw")})) as origin:
        assert await fetched(origin, 0, 100) == BLOB[:100]


async def test_endless_redirects_are_ended(registry: FakeRegistry, origin: OriginClient) -> None:
    registry.every = Fault(redirect="/v2/again")
    with pytest.raises(OriginError, match="more than 5 times"):
        await fetched(origin, 0, 100)
    assert len(registry.requests) == 6


@pytest.mark.parametrize("location", ["ftp://x/y", f"http://user:{CANARY}@127.0.0.1/", "http://[::1", f"\x00{CANARY}"])
async def test_a_redirect_to_nowhere_is_refused(registry: FakeRegistry, origin: OriginClient, location: str) -> None:
    registry.every = Fault(status=307, headers=(("Location", location.replace("\x00", "http://a b:x/")),))
    with pytest.raises(OriginError, match="redirects to") as refusal:
        await fetched(origin, 0, 100)
    assert CANARY not in str(refusal.value)


async def test_the_size_is_asked_by_get_where_the_redirect_is_good_for_nothing_else(
    registry: FakeRegistry, storage: FakeRegistry, origin: OriginClient
) -> None:
    registry.every = Fault(redirect=f"{storage.url}/v2/x/blobs/{digest_of(BLOB)}")
    storage.script("HEAD", Fault(status=403))
    assert await origin.blob_size(REPO, digest_of(BLOB)) == len(BLOB)
    assert await fetched(origin, 0, 100) == BLOB[:100]
    assert len(registry.requests) == 2


# Challenges


async def test_what_is_served_openly_is_public(origin: OriginClient) -> None:
    assert not origin.is_public(REPO)
    await origin.head_manifest(REPO, "v1")
    assert origin.is_public(REPO)
    assert not origin.is_public(Repository("reg.lab", "other"))
    assert not origin.is_public(Repository("unknown", "team/app"))


async def test_what_is_not_found_is_not_public(origin: OriginClient) -> None:
    with pytest.raises(NotFoundAtOrigin):
        await origin.head_manifest(REPO, "absent")
    assert not origin.is_public(REPO)


async def test_an_anonymous_token_is_asked_once_and_reused(registry: FakeRegistry) -> None:
    registry.auth = "bearer"
    vault = Vault({"reg.lab": Credentials("me", "pw")})
    async with client_of(registry, credentials=vault) as origin:
        await origin.get_manifest(REPO, "v1")
        await fetched(origin, 0, 100)
        assert origin.is_public(REPO)
    (asked,) = registry.asked("/token")
    assert "scope=repository%3Ateam%2Fapp%3Apull" in asked.target
    assert "service=fake" in asked.target
    assert "authorization" not in asked.headers
    assert vault.asked == []
    assert [request.status for request in registry.asked("/v2/")] == [401, 200, 206]


async def test_concurrent_requests_share_one_token(registry: FakeRegistry) -> None:
    registry.auth = "bearer"
    async with client_of(registry) as origin, trio.open_nursery() as nursery:
        for start in range(8):
            nursery.start_soon(fetched, origin, start, start + 100)
    assert len(registry.asked("/token")) == 1


async def test_each_repository_has_a_token_of_its_own(registry: FakeRegistry) -> None:
    registry.auth = "bearer"
    registry.add_manifest("other", MANIFEST, tag="v1")
    async with client_of(registry) as origin:
        await origin.get_manifest(REPO, "v1")
        await origin.get_manifest(Repository("reg.lab", "other"), "v1")
    assert len(registry.asked("/token")) == 2


async def test_a_token_is_renewed_before_it_expires(registry: FakeRegistry, mock_clock: trio.testing.MockClock) -> None:
    mock_clock.rate = 1
    registry.auth, registry.expires_in = "bearer", 300
    async with client_of(registry, deadlines=PATIENT) as origin:
        for jump_s in (0, 250, 45):
            mock_clock.jump(jump_s)
            await origin.get_manifest(REPO, "v1")
    assert [request.status for request in registry.asked("/v2/")] == [401, 200, 200, 200]
    shown = [request.headers.get("authorization") for request in registry.asked("/v2/")]
    assert shown == [None, "Bearer token-1", "Bearer token-1", "Bearer token-2"]


async def test_a_private_repository_is_asked_openly_again_after_a_while(
    registry: FakeRegistry, mock_clock: trio.testing.MockClock
) -> None:
    mock_clock.rate = 1
    registry.auth = "basic"
    vault = Vault({"reg.lab": Credentials("me", "pw")})
    async with client_of(registry, deadlines=PATIENT, credentials=vault) as origin:
        await origin.get_manifest(REPO, "v1")
        registry.auth = ""
        await origin.get_manifest(REPO, "v1")
        assert not origin.is_public(REPO)
        mock_clock.jump(601)
        await origin.get_manifest(REPO, "v1")
        assert origin.is_public(REPO)


async def test_a_revoked_token_is_replaced(registry: FakeRegistry) -> None:
    registry.auth = "bearer"
    async with client_of(registry) as origin:
        await origin.get_manifest(REPO, "v1")
        registry.revoke()
        await origin.get_manifest(REPO, "v1")
        assert origin.is_public(REPO)
    assert len(registry.asked("/token")) == 2


@pytest.mark.parametrize("auth", ["basic", "bearer"])
async def test_credentials_are_used_where_nobody_is_let_in_and_the_repository_is_private(
    registry: FakeRegistry, auth: str
) -> None:
    registry.auth, registry.anonymous = auth, False
    async with client_of(registry, credentials=Vault({"reg.lab": Credentials("me", "pw")})) as origin:
        assert (await origin.get_manifest(REPO, "v1")).body == MANIFEST
        assert await fetched(origin, 0, 100) == BLOB[:100]
        assert not origin.is_public(REPO)
    assert [request.status for request in registry.asked("/v2/")] == [401, 200, 206]


async def test_a_repository_that_turns_private_is_public_no_more(registry: FakeRegistry) -> None:
    async with client_of(registry, credentials=Vault({"reg.lab": Credentials("me", "pw")})) as origin:
        await origin.get_manifest(REPO, "v1")
        assert origin.is_public(REPO)
        registry.auth = "basic"
        await origin.get_manifest(REPO, "v1")
        assert not origin.is_public(REPO)


async def test_a_limit_on_anonymous_pulls_does_not_keep_a_repository_public_for_ever(
    registry: FakeRegistry, mock_clock: trio.testing.MockClock
) -> None:
    """It may have turned private behind the limit, which then hides that."""
    mock_clock.rate = 1
    registry.auth = "bearer"
    vault = Vault({"reg.lab": Credentials("me", "pw")})
    async with client_of(registry, deadlines=PATIENT, credentials=vault) as origin:
        await origin.head_manifest(REPO, "v1")
        mock_clock.jump(601)
        registry.script("GET /v2/", Fault(status=429))
        await origin.get_manifest(REPO, "v1")
        assert not origin.is_public(REPO)


async def test_a_limit_on_anonymous_pulls_is_met_with_credentials_and_leaves_the_repository_public(
    registry: FakeRegistry,
) -> None:
    registry.auth = "bearer"
    async with client_of(registry, credentials=Vault({"reg.lab": Credentials("me", "pw")})) as origin:
        await origin.head_manifest(REPO, "v1")
        registry.script("GET /v2/", Fault(status=429))
        await origin.get_manifest(REPO, "v1")
        assert origin.is_public(REPO)
    assert "authorization" in registry.asked("/token")[1].headers


async def test_an_identity_token_is_traded_by_post(registry: FakeRegistry) -> None:
    registry.auth, registry.anonymous = "bearer", False
    identity = Credentials("<token>", "refresh", identity=True)
    async with client_of(registry, credentials=Vault({"reg.lab": identity})) as origin:
        assert (await origin.get_manifest(REPO, "v1")).body == MANIFEST
    asked = registry.asked("POST /token")[0]
    assert "authorization" not in asked.headers
    assert b"grant_type=refresh_token" in asked.body
    assert b"scope=repository%3Ateam%2Fapp%3Apull" in asked.body


async def test_refused_credentials_are_asked_for_anew_once(registry: FakeRegistry) -> None:
    registry.auth = "basic"
    vault = Vault({"reg.lab": Credentials("me", "old")}, fresh=Credentials("me", "pw"))
    async with client_of(registry, credentials=vault) as origin:
        assert (await origin.get_manifest(REPO, "v1")).body == MANIFEST
    assert vault.asked == [("reg.lab", False), ("reg.lab", True)]


@pytest.mark.parametrize("auth", ["basic", "bearer"])
async def test_wrong_credentials_are_denied_by_name(registry: FakeRegistry, auth: str) -> None:
    registry.auth, registry.anonymous = auth, False
    async with client_of(registry, credentials=Vault({"reg.lab": Credentials("me", CANARY)})) as origin:
        with pytest.raises(DeniedByOrigin, match=r"the credentials configured for reg\.lab") as refusal:
            await origin.get_manifest(REPO, "v1")
    assert refusal.value.status_code == 401
    assert CANARY not in str(refusal.value)
    assert len(registry.asked("/v2/")) + len(registry.asked("/token")) == (2 if auth == "basic" else 3)


async def test_a_403_to_an_anonymous_token_is_met_with_credentials(registry: FakeRegistry) -> None:
    registry.auth = "bearer"
    registry.script("/v2/", Fault(), Fault(status=403))
    async with client_of(registry, credentials=Vault({"reg.lab": Credentials("me", "pw")})) as origin:
        assert (await origin.get_manifest(REPO, "v1")).body == MANIFEST
        assert not origin.is_public(REPO)
    assert ["authorization" in request.headers for request in registry.asked("/token")] == [False, True]


async def test_a_broken_credentials_file_is_named_when_it_is_needed(registry: FakeRegistry) -> None:
    class Broken(Vault):
        async def get(self, repository: Repository, *, file: Path | None, fresh: bool = False) -> Credentials | None:
            raise ConfigError("config.json is broken")

    async with client_of(registry, credentials=Broken({})) as origin:
        await origin.get_manifest(REPO, "v1")
        registry.auth = "basic"
        with pytest.raises(DeniedByOrigin, match=r"reg.lab asks for credentials, but config\.json is broken"):
            await origin.get_manifest(REPO, "v1")


async def test_a_failing_token_service_is_tried_again_and_then_named(registry: FakeRegistry) -> None:
    registry.auth = "bearer"
    registry.script("/token", Fault(status=503))
    async with client_of(registry) as origin:
        assert (await origin.get_manifest(REPO, "v1")).body == MANIFEST
        registry.revoke()
        registry.script("/token", *[Fault(status=503)] * 4)
        with pytest.raises(OriginError, match=f"token service {registry.netloc} answered HTTP 503"):
            await origin.get_manifest(REPO, "v1")
        registry.script("/token", Fault(body=CANARY.encode()))
        with pytest.raises(OriginError, match="token service's answer is not JSON") as refusal:
            await origin.get_manifest(REPO, "v1")
        assert CANARY not in str(refusal.value)


async def test_a_challenge_of_a_redirects_target_is_never_answered(
    registry: FakeRegistry, storage: FakeRegistry
) -> None:
    storage.auth = "basic"
    registry.every = Fault(redirect=f"{storage.url}/v2/x/blobs/{digest_of(BLOB)}")
    vault = Vault({"reg.lab": Credentials("me", "pw")})
    async with client_of(registry, credentials=vault) as origin:
        with pytest.raises(DeniedByOrigin, match=f"{storage.netloc}, to which reg.lab redirects"):
            await fetched(origin, 0, 100)
    assert vault.asked == []
    assert all("authorization" not in request.headers for request in storage.requests)


# Whose rights count, and where the registry may send us

ALICE, MALLORY = Caller(f"Bearer {CANARY}"), Caller("Basic bWFsbG9yeTp4")


def rule_of(mode: str) -> Callable[[Repository], AccessRule]:
    return lambda _repository: AccessRule(mode=mode)  # type: ignore[arg-type]


async def test_a_callers_header_goes_to_the_registry_and_nothing_else_is_shown(registry: FakeRegistry) -> None:
    registry.auth = "bearer"
    registry._good.add(CANARY)
    async with client_of(registry, rule_of=rule_of("passthrough")) as origin:
        info = await origin.head_manifest(REPO, "v1", caller=ALICE)
        assert info.digest == digest_of(MANIFEST)
        for caller in (MALLORY, NOBODY):
            with pytest.raises(DeniedByOrigin) as refusal:
                await origin.head_manifest(REPO, "v1", caller=caller)
            realm = f'Bearer realm="{registry.url}/token",service="fake",scope="repository:team/app:pull"'
            assert refusal.value.challenges == (realm,)
            assert CANARY not in str(refusal.value)
        with pytest.raises(DeniedByOrigin):
            await origin.blob_size(REPO, digest_of(BLOB), caller=MALLORY)
        with pytest.raises(DeniedByOrigin):
            await origin.relay(REPO, "tags/list", "*/*", caller=MALLORY)
        assert not origin.is_public(REPO)
    assert registry.asked("/token") == [], "only the caller asks for tokens"


async def test_what_a_caller_lent_fetches_until_it_is_refused(registry: FakeRegistry) -> None:
    registry.auth = "bearer"
    registry._good.add(CANARY)
    async with client_of(registry, rule_of=rule_of("passthrough")) as origin:
        with pytest.raises(DeniedByOrigin):
            await fetched(origin, 0, 100)
        origin.lend(REPO, ALICE)
        assert await fetched(origin, 0, 100) == BLOB[:100]
        assert (await origin.get_manifest(REPO, "v1")).body == MANIFEST
        registry.revoke()
        with pytest.raises(DeniedByOrigin):
            await fetched(origin, 0, 100)
        registry._good.add(CANARY)
        with pytest.raises(DeniedByOrigin):
            await fetched(origin, 0, 100)
        assert registry.requests[-1].headers.get("authorization") is None


@pytest.mark.parametrize("mode", ["public", "passthrough"])
async def test_credentials_of_the_node_are_used_only_where_the_rule_says_so(registry: FakeRegistry, mode: str) -> None:
    registry.auth = "basic"
    vault = Vault({"reg.lab": Credentials("me", "pw")})
    async with client_of(registry, credentials=vault, rule_of=rule_of(mode)) as origin:
        with pytest.raises(DeniedByOrigin):
            await origin.get_manifest(REPO, "v1")
    assert vault.asked == []


async def test_another_rule_drops_what_was_obtained_under_the_old_one(registry: FakeRegistry) -> None:
    registry.auth, rules = "basic", [AccessRule(mode="node-credentials")]
    vault = Vault({"reg.lab": Credentials("me", "pw")})
    async with client_of(registry, credentials=vault, rule_of=lambda _repository: rules[0]) as origin:
        await origin.get_manifest(REPO, "v1")
        rules[0] = AccessRule()
        with pytest.raises(DeniedByOrigin, match="does not give it to everybody"):
            await origin.get_manifest(REPO, "v1")


async def test_a_password_that_was_changed_in_the_file_is_shown_soon(
    registry: FakeRegistry, mock_clock: trio.testing.MockClock
) -> None:
    mock_clock.rate = 1
    registry.auth = "basic"
    vault = Vault({"reg.lab": Credentials("me", "pw")})
    async with client_of(registry, deadlines=PATIENT, credentials=vault) as origin:
        await origin.get_manifest(REPO, "v1")
        vault.known["reg.lab"] = Credentials("me", "new")
        registry.password = "new"
        mock_clock.jump(61)
        await origin.get_manifest(REPO, "v1")
    assert [request.status for request in registry.asked("/v2/")] == [401, 200, 200]


async def test_only_challenges_that_a_client_may_follow_are_passed_on(registry: FakeRegistry) -> None:
    values = 'Negotiate abc, Bearer realm="ftp://x/token", Basic realm="a\\"b", Basic realm="lab"'
    registry.every = Fault(status=401, headers=(("WWW-Authenticate", values),))
    async with client_of(registry, rule_of=rule_of("passthrough")) as origin:
        with pytest.raises(DeniedByOrigin) as refusal:
            await origin.head_manifest(REPO, "v1", caller=NOBODY)
    assert refusal.value.challenges == ('Basic realm="lab"',)


async def test_a_manifest_that_has_not_changed_costs_a_304(registry: FakeRegistry, origin: OriginClient) -> None:
    known = await origin.head_manifest(REPO, "v1")
    registry.script("HEAD /v2/", Fault(status=304))
    assert await origin.head_manifest(REPO, "v1", known=known) is known
    assert registry.requests[-1].headers["if-none-match"] == f'"{known.digest}"'
    assert origin.is_public(REPO)


@pytest.mark.parametrize(
    "place", ["http://169.254.169.254/latest", "http://localhost:1/", "http://10.0.0.1/", "http://[::1]:1/"]
)
@pytest.mark.parametrize("how", ["redirect", "realm"])
async def test_a_registry_does_not_send_us_inside(registry: FakeRegistry, place: str, how: str) -> None:
    if how == "redirect":
        registry.every = Fault(redirect=place)
    else:
        registry.auth, registry.realm = "bearer", place
    vault = Vault({"reg.lab": Credentials("me", CANARY)})
    async with client_of(registry, credentials=vault) as origin:
        with pytest.raises(
            OriginError, match=r'not on the public internet; if that is meant, add hosts = \["'
        ) as refusal:
            await origin.get_manifest(REPO, "v1")
        assert origin.statistics()["reg.lab"]["retries"] == 0
    assert CANARY not in str(refusal.value)


@pytest.mark.parametrize("host", ["localhost", "localhost:{port}"])
async def test_a_host_that_is_configured_with_it_may_be_anywhere(
    registry: FakeRegistry, storage: FakeRegistry, host: str
) -> None:
    registry.every = Fault(redirect=f"http://localhost:{storage.port}/v2/x/blobs/{digest_of(BLOB)}")
    settings = {"reg.lab": RegistrySettings(registry.url, hosts=(host.format(port=storage.port),))}
    origin = OriginClient(settings, allow_any=False, credentials=None, connections=1, rng=Random(1), deadlines=QUICK)
    assert await fetched(origin, 0, 100) == BLOB[:100]
    await origin.aclose()


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
async def tls_registry(authority: trustme.CA) -> AsyncIterator[FakeRegistry]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    async with FakeRegistry(tls=context).running() as running:
        running.host = "localhost"
        running.add_blob(BLOB)
        running.add_manifest(REPO.name, MANIFEST, tag="v1")
        yield running


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> Path:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return tmp_path / "ca.pem"


async def test_a_registry_with_a_ca_of_its_own_is_believed(tls_registry: FakeRegistry, ca_file: Path) -> None:
    async with client_of(tls_registry, ca_file=ca_file) as origin:
        assert (await origin.get_manifest(REPO, "v1")).body == MANIFEST
        assert await fetched(origin, 5, len(BLOB)) == BLOB[5:]
    assert tls_registry.connections == 1


async def test_a_registry_that_stays_keeps_its_connection_and_its_counts(registry: FakeRegistry) -> None:
    same, more = {"reg.lab": RegistrySettings(registry.url)}, {"other.lab": RegistrySettings(registry.url)}
    async with client_of(registry) as origin:
        await origin.get_manifest(REPO, "v1")
        origin.replacing({**same, **more}, allow_any=False)()
        await origin.get_manifest(REPO, "v1")
        assert origin.statistics()["reg.lab"]["requests"] == 2
        await origin.get_manifest(Repository("other.lab", REPO.name), "v1")
        origin.replacing(more, allow_any=False)()
        with pytest.raises(NotFoundAtOrigin, match="not configured"):
            await origin.get_manifest(REPO, "v1")
    assert registry.connections == 1


async def test_a_ca_file_is_read_again(tls_registry: FakeRegistry, authority: trustme.CA, tmp_path: Path) -> None:
    ca_file = tmp_path / "changing.pem"
    settings = {"reg.lab": RegistrySettings(tls_registry.url, ca_file)}
    trustme.CA().cert_pem.write_to_path(str(ca_file))
    async with client_of(tls_registry, ca_file=ca_file) as origin:
        with pytest.raises(OriginError, match="not trusted"):
            await origin.get_manifest(REPO, "v1")
        authority.cert_pem.write_to_path(str(ca_file))
        origin.replacing(settings, allow_any=False)()
        assert (await origin.get_manifest(REPO, "v1")).body == MANIFEST


@pytest.mark.parametrize("content", [None, "", "no certificate"])
async def test_registries_that_cannot_be_used_leave_the_present_ones(
    registry: FakeRegistry, tmp_path: Path, content: str | None
) -> None:
    ca_file = tmp_path / "ca.pem"
    if content is not None:
        ca_file.write_text(content)
    async with client_of(registry) as origin:
        with pytest.raises(ConfigError, match=r"registry x\.lab: cannot use"):
            origin.replacing({"x.lab": RegistrySettings("https://x.lab", ca_file)}, allow_any=False)
        assert (await origin.get_manifest(REPO, "v1")).body == MANIFEST


async def test_an_unknown_certificate_is_refused_at_once(tls_registry: FakeRegistry) -> None:
    async with client_of(tls_registry) as origin:
        with pytest.raises(OriginError, match=r"the certificate of localhost is not trusted.*ca_file"):
            await origin.get_manifest(REPO, "v1")
        assert origin.statistics()["reg.lab"]["retries"] == 0
    await tls_registry.wait_connections(0)


async def test_a_plain_server_where_tls_is_wanted_is_said_so(registry: FakeRegistry) -> None:
    settings = {"reg.lab": RegistrySettings(f"https://{registry.netloc}")}
    origin = OriginClient(settings, allow_any=False, credentials=None, connections=1, rng=Random(1), deadlines=QUICK)
    with pytest.raises(OriginError, match="no TLS there"):
        await origin.get_manifest(REPO, "v1")
    await origin.aclose()


async def test_a_tls_registry_is_not_left_for_http(
    tls_registry: FakeRegistry, storage: FakeRegistry, ca_file: Path
) -> None:
    tls_registry.every = Fault(redirect=f"{storage.url}/?{CANARY}")
    async with client_of(tls_registry, ca_file=ca_file) as origin:
        with pytest.raises(OriginError, match="without https") as refusal:
            await fetched(origin, 0, 100)
    assert CANARY not in str(refusal.value)
    assert storage.requests == []


async def test_a_tls_registrys_token_service_needs_tls(
    tls_registry: FakeRegistry, storage: FakeRegistry, ca_file: Path
) -> None:
    tls_registry.auth, tls_registry.realm = "bearer", f"{storage.url}/token"
    async with client_of(
        tls_registry, ca_file=ca_file, credentials=Vault({"reg.lab": Credentials("me", "pw")})
    ) as origin:
        with pytest.raises(DeniedByOrigin, match="token service without https"):
            await origin.get_manifest(REPO, "v1")
    assert storage.requests == []


async def test_a_handshake_that_hangs_is_ended_when_cancelled() -> None:
    greeted, gone = trio.Event(), trio.Event()

    async def silent(stream: trio.SocketStream) -> None:
        async with stream:
            while await stream.receive_some():
                greeted.set()
        gone.set()

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    settings = {"reg.lab": RegistrySettings(f"https://127.0.0.1:{listeners[0].socket.getsockname()[1]}")}
    origin = OriginClient(settings, allow_any=False, credentials=None, connections=1, rng=Random(1))
    async with trio.open_nursery() as servers:
        servers.start_soon(trio.serve_listeners, silent, listeners)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(origin.get_manifest, REPO, "v1")
            await greeted.wait()
            nursery.cancel_scope.cancel()
        await gone.wait()
        servers.cancel_scope.cancel()


# Registries


async def test_a_registry_that_is_not_configured_is_refused_with_what_to_do(origin: OriginClient) -> None:
    text = "registry quay.io is not configured on this agent; add --registry quay.io=URL"
    with pytest.raises(NotFoundAtOrigin, match=text) as refusal:
        await origin.get_manifest(Repository("quay.io", "a/b"), "v1")
    assert refusal.value.status_code == 404


@pytest.mark.parametrize(
    "name", ["127.0.0.1:5000", "169.254.169.254", "[::1]:5000", "127.1", "2130706433", "localhost", "intranet"]
)
async def test_any_registry_means_any_public_name(registry: FakeRegistry, name: str) -> None:
    async with client_of(registry, allow_any=True) as origin:
        with pytest.raises(NotFoundAtOrigin, match="is no public name"):
            await origin.get_manifest(Repository(name, "app"), "v1")


class Resolver(trio.abc.HostnameResolver):
    """Says of every name that it is at these addresses."""

    def __init__(self, *addresses: str) -> None:
        self._addresses = addresses

    async def getaddrinfo(self, host: object, port: object, *rest: object) -> list[tuple[object, ...]]:
        return [(trio.socket.AF_INET, trio.socket.SOCK_STREAM, 6, "", (address, port)) for address in self._addresses]

    async def getnameinfo(self, *rest: object) -> tuple[str, str]:
        raise NotImplementedError


@pytest.mark.parametrize("addresses", [("127.0.0.1",), ("192.0.2.1",), ("1.1.1.1", "10.0.0.1"), ("169.254.169.254",)])
async def test_a_public_name_that_points_inside_is_not_dialled(
    registry: FakeRegistry, addresses: tuple[str, ...]
) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver(*addresses))
    async with client_of(registry, allow_any=True) as origin:
        with pytest.raises(NotFoundAtOrigin, match=r"rebind\.example is not on the public internet"):
            await origin.get_manifest(Repository(f"rebind.example:{registry.port}", "app"), "v1")
    assert registry.connections == 0


@pytest.mark.parametrize("text", ["reg.lab", "ftp://reg.lab", "https://", "https://reg.lab/?x", "http://[::1"])
def test_a_url_that_is_none_is_a_configuration_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"registry reg\.lab"):
        OriginClient(
            {"reg.lab": RegistrySettings(text)}, allow_any=False, credentials=None, connections=1, rng=Random(1)
        )


def test_a_password_in_a_url_is_refused_unquoted() -> None:
    settings = {"reg.lab": RegistrySettings(f"https://me:{CANARY}@reg.lab")}
    with pytest.raises(ConfigError, match="credentials file") as refusal:
        OriginClient(settings, allow_any=False, credentials=None, connections=1, rng=Random(1))
    assert CANARY not in str(refusal.value)


@pytest.mark.parametrize("content", [None, b"not a certificate"])
def test_a_ca_file_that_cannot_be_used_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot use the CA file .*ca\.pem"):
        OriginClient(
            {"reg.lab": RegistrySettings("https://reg.lab", path)},
            allow_any=False,
            credentials=None,
            connections=1,
            rng=Random(1),
        )


async def test_a_base_url_may_have_a_path(registry: FakeRegistry) -> None:
    settings = {"reg.lab": RegistrySettings(f"{registry.url}/artifactory/docker/")}
    origin = OriginClient(settings, allow_any=False, credentials=None, connections=1, rng=Random(1))
    with pytest.raises(NotFoundAtOrigin):
        await origin.get_manifest(REPO, "v1")
    await origin.aclose()
    assert registry.requests[0].target == "/artifactory/docker/v2/team/app/manifests/v1"


def test_docker_hub_has_a_host_of_its_own() -> None:
    assert default_url("docker.io") == "https://registry-1.docker.io"
    assert default_url("quay.io") == "https://quay.io"


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


# Secrets


async def test_no_secret_is_in_an_error_a_repr_or_a_log(
    registry: FakeRegistry, storage: FakeRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    registry.auth, registry.anonymous, registry.password, registry.token = "bearer", False, CANARY, CANARY
    vault = Vault({"reg.lab": Credentials("me", CANARY)})
    where = f"{storage.url}/{CANARY}?{CANARY}"
    registry.script("GET /v2/team/app/blobs/", Fault(), *[Fault(redirect=where)] * 20)
    seen: list[str] = []
    async with client_of(registry, credentials=vault) as origin:
        for status in (403, 404, 500, 416):
            storage.every = Fault(status=status, body=f"<StringToSign>{CANARY}</StringToSign>".encode())
            with pytest.raises(OriginError) as refusal:
                await fetched(origin, 0, 100)
            seen += _texts(refusal.value)
        access = origin._configured["reg.lab"].auth.access(REPO)
        seen += [repr(access), repr(origin), str(origin.statistics()), repr(vars(origin)), caplog.text]
    assert len(storage.requests) >= 4
    assert CANARY in registry.asked("/v2/")[-1].headers["authorization"]
    assert not [text for text in seen if CANARY in text]


def _texts(error: BaseException | None) -> list[str]:
    texts = []
    while error is not None:
        texts += [str(error), repr(error)]
        error = error.__cause__ or error.__context__
    return texts


async def test_large_bodies_arrive_whole_through_small_and_large_reads(registry: FakeRegistry) -> None:
    blob = Random(5).randbytes(3_000_001)
    registry.add_blob(blob)
    async with client_of(registry) as origin:
        got = await fetched(origin, 1, len(blob), blob)
    assert hashlib.sha256(got).digest() == hashlib.sha256(blob[1:]).digest()
