# SPDX-License-Identifier: Apache-2.0
"""Which registries the origin client connects to, and how: TLS, names, addresses; over real sockets."""

from __future__ import annotations

import ssl
from random import Random
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
import trustme

from p2pdist.core.types import Repository
from p2pdist.errors import (
    ConfigError,
    DeniedByOrigin,
    NotFoundAtOrigin,
    OriginError,
)
from p2pdist.net.credentials import Credentials
from p2pdist.net.origin import OriginClient, RegistrySettings, default_url
from tests.fake_registry import FakeRegistry, Fault
from tests.net.origins import BLOB, CANARY, MANIFEST, QUICK, REPO, Vault, client_of, fetched

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

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
