# SPDX-License-Identifier: Apache-2.0
"""How a node gets its certificate, keeps it, and what is refused to whom, against a real scheduler's port."""

from __future__ import annotations

import json
import os
import random
import ssl
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from structlog.testing import capture_logs

from p2pdist.config import Address, AgentConfig
from p2pdist.core.identity import Name, Token, parse_token
from p2pdist.errors import ConfigError, IdentityRefused, InvalidInput, PeerUnavailable
from p2pdist.identity import certificates, enrolment
from p2pdist.identity.authority import Authority
from p2pdist.identity.channel import TlsChannel, TlsStream, detached
from p2pdist.identity.credentials import stranger
from p2pdist.identity.keeper import Files, FilesKeeper, JoinedKeeper, files_of
from p2pdist.joining import keeper_of
from scheduler.config import SchedulerConfig
from scheduler.doorway import Doorway
from scheduler.server import SchedulerServer
from tests.identities import make_authority, pem_of
from tests.nodes import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

RNG = random.Random(1)


@asynccontextmanager
async def scheduler(ours: Authority, **settings: float) -> AsyncIterator[tuple[str, int]]:
    server = SchedulerServer(SchedulerConfig(ca_dir=ours.directory, **settings))  # type: ignore[arg-type]
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve_agents, listeners)
        yield "127.0.0.1", listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return make_authority(tmp_path / "ca")


def token_of(authority: Authority, *, uses: int = 1, lifetime_s: float = 600.0, made: float = 0.0) -> Token:
    return authority.make_token(uses=uses, lifetime_s=lifetime_s, now=time.time() + made)


async def test_a_token_gets_a_certificate_whose_name_is_the_hash_of_its_key(ours: Authority, tmp_path: Path) -> None:
    async with scheduler(ours) as at:
        keeper = await JoinedKeeper.join(tmp_path / "identity", [at], RNG, str(token_of(ours)))
    name = keeper.identity.name
    pem = (tmp_path / "identity/agent.pem").read_bytes()
    assert (name.cluster, name.role) == ("lab", "agent")
    assert name.peer_id == certificates.peer_id_of(certificates.key_of(pem))
    assert (tmp_path / "identity/agent.pem").stat().st_mode & 0o777 == 0o600
    again = JoinedKeeper(tmp_path / "identity", [at], RNG)
    assert again.identity.name == name


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("spent", "is spent"),
        ("expired", "has expired"),
        ("unknown", "not one of this scheduler's"),
        ("another CA's", "another CA"),
        ("another cluster's", "cluster"),
    ],
)
async def test_a_token_that_is_no_good_is_refused_with_the_reason(
    ours: Authority, tmp_path: Path, wrong: str, why: str
) -> None:
    token = token_of(ours)
    other = make_authority(tmp_path / "other")
    tokens = {
        "spent": token,
        "expired": token_of(ours, made=-1000),
        "unknown": Token(token.cluster, "s" * 22, token.pin),
        "another CA's": token_of(other),
        "another cluster's": Token("lab2", token.secret, token.pin),
    }
    async with scheduler(ours) as at:
        if wrong == "spent":
            await enrolment.join(*at, token)
        with capture_logs() as logs, pytest.raises(ConfigError, match=why) as caught:
            await JoinedKeeper.join(tmp_path / "identity", [at], RNG, str(tokens[wrong]))
    assert tokens[wrong].secret not in str(caught.value) + json.dumps(logs)
    assert not (tmp_path / "identity").exists()
    if wrong in ("spent", "expired", "unknown"):
        assert any(line.get("reason") == "not-enrolled" and line["source"] == "127.0.0.1" for line in logs)


async def test_a_token_is_for_as_many_nodes_as_it_says_however_many_ask_at_once(ours: Authority) -> None:
    token = token_of(ours, uses=3)
    given: list[enrolment.Enrolled] = []

    async def ask(at: tuple[str, int]) -> None:
        with suppress(IdentityRefused):
            given.append(await enrolment.join(*at, token))

    async with scheduler(ours) as at, trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(ask, at)
    assert len({each.certificate for each in given}) == 3


async def test_a_scheduler_that_does_not_answer_is_named(
    ours: Authority, autojump_clock: object, tmp_path: Path
) -> None:
    with pytest.raises(PeerUnavailable):
        await enrolment.join("127.0.0.1", 1, token_of(ours))
    with pytest.raises(ConfigError, match="no scheduler answers"):
        await JoinedKeeper.join(tmp_path / "identity", [("127.0.0.1", 1)], RNG, str(token_of(ours)))


@pytest.mark.parametrize(
    "settings",
    [{"join": "nonsense"}, {"join": "nonsense", "scheduler": ()}, {"ca_file": Path("/nowhere")}],
    ids=["no token", "no scheduler", "a CA alone"],
)
async def test_an_agent_that_cannot_have_its_identity_does_not_start_without(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    config = AgentConfig(**{"data_dir": tmp_path, "scheduler": (Address("127.0.0.1", 1),), **settings})  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        await keeper_of(config)


async def test_without_a_word_of_identity_there_is_none(tmp_path: Path) -> None:
    assert await keeper_of(AgentConfig(data_dir=tmp_path)) is None


async def ask_by_hand(at: tuple[str, int], context: ssl.SSLContext, question: object) -> bytes:
    channel = TlsChannel(detached(await trio.open_tcp_stream(*at)), context, server_side=False)
    async with TlsStream(channel) as stream:
        with trio.fail_after(20):
            await channel.handshake()
            await stream.send_all(json.dumps(question).encode() + b"\n")
            answer = b""
            while data := await stream.receive_some():
                answer += data
            return answer


async def test_nobody_gets_the_name_of_another(ours: Authority) -> None:
    """With a good token, but for a peer id that is not the key's; with a certificate, but for another's name."""
    async with scheduler(ours) as at:
        victim = await enrolment.join(*at, token_of(ours))
        name = certificates.described(victim.certificate)[0]
        token, key = token_of(ours), certificates.make_key()
        for wanted in (name, Name("lab", "scheduler", "s"), Name("lab2", "agent", name.name)):
            question = {
                "ask": "certificate",
                "token": token.secret,
                "request": certificates.make_request(key, wanted).decode(),
            }
            assert b"refused" in await ask_by_hand(at, stranger(ours.certificate), question)
        assert await enrolment.join(*at, token)


@pytest.mark.parametrize(
    "question",
    [{}, [], {"ask": "key"}, {"ask": "certificate"}, {"ask": "certificate", "token": "", "request": "x"}, "x" * 20_000],
    ids=["nothing", "a list", "the key", "no request", "no such request", "too much"],
)
async def test_nonsense_gets_no_certificate_and_ends_nothing(ours: Authority, question: object) -> None:
    async with scheduler(ours) as at:
        answer = await ask_by_hand(at, stranger(ours.certificate), question)
        assert b"BEGIN CERTIFICATE" not in answer
        assert await enrolment.join(*at, token_of(ours))


async def test_a_certificate_is_renewed_while_the_agent_runs(ours: Authority, tmp_path: Path) -> None:
    """Certificates for 10 s are renewed after about 5; the key is a new one, the name the same."""
    async with scheduler(ours, certificate_s=10.0) as at:
        keeper = await JoinedKeeper.join(tmp_path / "identity", [at], RNG, str(token_of(ours)))
        first, pem = keeper.identity.credential, (tmp_path / "identity/agent.pem").read_bytes()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper.run)
            await eventually(lambda: keeper.identity.credential is not first)
            nursery.cancel_scope.cancel()
    second = keeper.identity.credential
    assert second.name == first.name
    assert second.not_after > first.not_after
    assert certificates.key_of((tmp_path / "identity/agent.pem").read_bytes()) != certificates.key_of(pem)


async def test_why_a_certificate_is_not_renewed_is_known_until_it_is(ours: Authority, tmp_path: Path) -> None:
    async with scheduler(ours) as at:
        await JoinedKeeper.join(tmp_path / "identity", [at], RNG, str(token_of(ours)))
        nobody = ("127.0.0.1", 1)
        for schedulers, trouble in (([], "no scheduler"), ([nobody], "cannot be asked"), ([nobody, at], "")):
            keeper = JoinedKeeper(tmp_path / "identity", schedulers, RNG)
            assert await keeper._renew(keeper.identity.credential) == (not trouble)
            assert trouble in keeper.trouble
        assert keeper.trouble == ""
        ours.revoke(keeper.identity.name.path)
        assert not await keeper._renew(keeper.identity.credential)
        assert "revoked" in keeper.trouble


async def test_who_is_revoked_gets_no_further_certificate(ours: Authority, tmp_path: Path) -> None:
    async with scheduler(ours) as at:
        keeper = await JoinedKeeper.join(tmp_path / "identity", [at], RNG, str(token_of(ours)))
        ours.revoke(keeper.identity.name.path)
        with pytest.raises(IdentityRefused, match="revoked"):
            await enrolment.renew(*at, keeper.identity.credential, ours.certificate)


async def test_a_list_of_revoked_names_counts_if_the_ca_signed_it_and_it_is_newer(
    ours: Authority, tmp_path: Path
) -> None:
    async with scheduler(ours) as at:
        keeper = await JoinedKeeper.join(tmp_path / "identity", [at], RNG, str(token_of(ours)))
    ours.revoke("agent/" + "1" * 32)
    old = ours.signed_revocations()
    ours.revoke("agent/" + "2" * 32)
    keeper.heed(ours.signed_revocations())
    keeper.heed(old)
    assert len(keeper.identity.revocations.names) == 2
    other = make_authority(tmp_path / "other")
    other.revoke("agent/" + "3" * 32)
    for forged in (other.signed_revocations(), b"x\n{}", old.replace(b"1" * 32, b"4" * 32)):
        with pytest.raises(Exception, match="revoked names"):
            keeper.heed(forged)
    again = JoinedKeeper(tmp_path / "identity", [at], RNG)
    assert again.identity.revocations == keeper.identity.revocations


def test_certificates_of_another_pki_are_read_again_and_a_bad_file_changes_nothing(
    ours: Authority, tmp_path: Path
) -> None:
    files = Files(tmp_path / "ca.pem", tmp_path / "cert.pem", tmp_path / "key.pem")

    def put(name: str) -> None:
        pem, key = pem_of(ours, name)
        for path, data in ((files.authority, ours.certificate), (files.certificate, pem), (files.key, key)):
            path.write_bytes(data)

    put("node-7")
    keeper = FilesKeeper(files)
    first = keeper.identity.credential
    put("node-7")
    keeper.reload()
    second = keeper.identity.credential
    assert second is not first
    with capture_logs() as logs:
        put("node-8")
        keeper.reload()
        files.key.write_bytes(b"no key")
        keeper.reload()
    assert keeper.identity.credential is second
    assert [line["log_level"] for line in logs] == ["error", "error"]


def test_files_that_somebody_replaced_are_read_without_a_signal_and_the_trouble_with_bad_ones_is_kept(
    ours: Authority, tmp_path: Path
) -> None:
    files = Files(tmp_path / "ca.pem", tmp_path / "cert.pem", tmp_path / "key.pem")
    pem, key = pem_of(ours, "node-7")
    for path, data in ((files.authority, ours.certificate), (files.certificate, pem), (files.key, key)):
        path.write_bytes(data)
    keeper = FilesKeeper(files)
    first = keeper.identity.credential
    keeper.look()
    assert keeper.identity.credential is first
    # As a PKI may leave them for a moment: the new certificate beside the old key.
    pem, key = pem_of(ours, "node-7")
    files.certificate.write_bytes(pem)
    keeper.look()
    assert (keeper.identity.credential, bool(keeper.trouble)) == (first, True)
    files.key.write_bytes(key + b"\n")
    keeper.look()
    assert keeper.identity.credential is not first
    assert not keeper.trouble


def test_a_scheduler_reads_replaced_files_without_a_signal_too(ours: Authority, tmp_path: Path) -> None:
    files = Files(tmp_path / "ca.pem", tmp_path / "cert.pem", tmp_path / "key.pem")

    def put() -> None:
        pem, key = pem_of(ours, "s", "scheduler")
        for path, data in ((files.authority, ours.certificate), (files.certificate, pem), (files.key, key)):
            path.write_bytes(data)

    put()
    doorway = Doorway(SchedulerConfig(ca_file=files.authority, cert_file=files.certificate, key_file=files.key))
    assert doorway.identity is not None
    first = doorway.identity.credential
    put()
    doorway.look()
    assert doorway.identity.credential is not first
    files.key.write_bytes(b"no key")
    doorway.look()
    assert doorway.standing().state == "not-renewed"


def test_the_files_of_another_pki_go_together(tmp_path: Path) -> None:
    assert files_of(None, None, None, None) is None
    with pytest.raises(ConfigError, match="go together"):
        files_of(tmp_path, None, None, None)


def test_a_directory_has_one_ca_and_its_key_is_the_owners_alone(ours: Authority) -> None:
    assert (ours.directory / "ca-key.pem").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="already"):
        make_authority(ours.directory)
    assert Authority.open(ours.directory).cluster == "lab"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files for others")
def test_a_ca_that_root_makes_belongs_to_whom_the_place_belongs(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, 12345, 12346)
    made = make_authority(state / "cluster")
    for path in (made.directory, made.directory / "tokens", made.directory / "ca-key.pem", made.directory / "ca.pem"):
        assert (path.stat().st_uid, path.stat().st_gid, path.stat().st_mode & 0o077) == (12345, 12346, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files for others")
def test_what_root_makes_belongs_to_the_directorys_owner(ours: Authority) -> None:
    for path in (ours.directory, ours.directory / "tokens"):
        os.chown(path, 12345, 12346)
    token_of(ours)
    ours.revoke("agent/" + "1" * 32)
    (token,) = (ours.directory / "tokens").iterdir()
    for path in (token, ours.directory / "revoked", ours.directory / "lock"):
        assert (path.stat().st_uid, path.stat().st_gid, path.stat().st_mode & 0o777) == (12345, 12346, 0o600)


def test_a_token_is_kept_by_its_hash_alone(ours: Authority) -> None:
    token = parse_token(str(token_of(ours)))
    kept = b"".join(path.read_bytes() for path in ours.directory.rglob("*") if path.is_file())
    names = " ".join(path.name for path in ours.directory.rglob("*"))
    assert token.secret.encode() not in kept
    assert token.secret not in names


def test_a_damaged_token_is_no_token(ours: Authority) -> None:
    token = token_of(ours)
    for path in (ours.directory / "tokens").iterdir():
        path.write_bytes(b"{")
    with pytest.raises(InvalidInput, match="damaged"):
        ours.spend(token.secret, time.time())
