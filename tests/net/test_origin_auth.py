# SPDX-License-Identifier: Apache-2.0
"""How the origin client becomes entitled to read: challenges, whose rights count, and that no secret gets out."""

from __future__ import annotations

import logging
from random import Random
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from p2pdist.core.access import NOBODY, AccessRule, Caller
from p2pdist.core.types import Repository
from p2pdist.errors import (
    ConfigError,
    DeniedByOrigin,
    NotFoundAtOrigin,
    OriginError,
)
from p2pdist.net.credentials import Credentials
from p2pdist.net.origin import OriginClient, RegistrySettings
from tests.fake_registry import FakeRegistry, Fault, digest_of
from tests.net.origins import BLOB, CANARY, MANIFEST, PATIENT, QUICK, REPO, Vault, client_of, fetched

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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
