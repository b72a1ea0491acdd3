# SPDX-License-Identifier: Apache-2.0
"""How one question to a registry gets its answer: errors in words, retries, redirects; over real sockets."""

from __future__ import annotations

import json

import pytest
import trio
import trio.testing

from p2pdist.errors import (
    DeniedByOrigin,
    NotFoundAtOrigin,
    OriginError,
)
from p2pdist.net.credentials import Credentials
from p2pdist.net.origin import OriginClient
from p2pdist.net.origin_upstream import Deadlines
from tests.fake_registry import FakeRegistry, Fault, digest_of
from tests.net.origins import BLOB, CANARY, MANIFEST, PATIENT, REPO, Vault, client_of, fetched

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
