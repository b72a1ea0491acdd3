# SPDX-License-Identifier: Apache-2.0
"""Lists of revoked names that go round: what they come to, and that every copy of a CA hears of every revocation."""

from __future__ import annotations

import random
import shutil
import time
from contextlib import asynccontextmanager, closing
from itertools import permutations
from typing import TYPE_CHECKING

import pytest
import trio
from structlog.testing import capture_logs

from p2pdist.core.wire import VERSION, Hello, Revoked, encode
from p2pdist.errors import ConfigError, IdentityRefused, InvalidInput, RemoteProtocolError
from p2pdist.identity import enrolment
from p2pdist.identity.authority import Authority
from p2pdist.identity.channel import TlsChannel, TlsStream, detached
from p2pdist.identity.keeper import JoinedKeeper
from p2pdist.identity.refusals import Refusals
from p2pdist.identity.revocations import MAX_LISTS, Courier, SignedLists
from p2pdist.store.memory import MemoryStore
from scheduler.config import SchedulerConfig
from scheduler.server import SchedulerServer
from tests.identities import credential, make_authority, pem_of
from tests.nodes import FakeOrigin, Node, eventually, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from trio.testing import MockClock

ANN, BOB, EVE = (f"agent/{number:032x}" for number in (1, 2, 3))
RNG = random.Random(1)


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return make_authority(tmp_path / "ours")


@pytest.fixture
def copied(ours: Authority, tmp_path: Path) -> Authority:
    return Authority.copy(ours.directory, tmp_path / "copied")


def signed(authority: Authority, *names: str) -> bytes:
    for name in names:
        authority.revoke(name)
    return authority.signed_revocations()


def keeper_of(authority: Authority, directory: Path, number: int = 1) -> JoinedKeeper:
    """Return a joined agent's keeper, whose certificate it got some other way."""
    pem, key = pem_of(authority, f"{number:032x}")
    directory.mkdir()
    (directory / "agent.pem").write_bytes(pem + b"\n" + key)
    (directory / "ca.pem").write_bytes(authority.certificate)
    return JoinedKeeper(directory, [], RNG)


# ---------------------------------------------------------------------------- lists


def test_lists_come_to_the_same_in_whatever_order_they_are_heard(ours: Authority, copied: Authority) -> None:
    lists = [signed(ours, ANN), signed(ours, BOB), signed(copied, EVE)]
    for order in permutations(lists):
        known = SignedLists(ours.certificate, ours.cluster)
        for data in order:
            known.take(data)
        assert known.revocations.names == {ANN, BOB, EVE}
        assert set(known.signed) == {lists[1], lists[2]}


def test_a_list_that_covers_others_takes_their_place_and_an_old_one_changes_nothing(ours: Authority) -> None:
    old, new = signed(ours, ANN), signed(ours, BOB)
    known = SignedLists(ours.certificate, ours.cluster)
    assert [known.take(data) for data in (old, new, old, new)] == [True, True, False, False]
    assert known.signed == (new,)


def test_lists_survive_being_written_down_and_a_damaged_one_is_left_out(ours: Authority, copied: Authority) -> None:
    known = SignedLists(ours.certificate, ours.cluster)
    for data in (signed(ours, ANN), signed(copied, BOB)):
        known.take(data)
    again = SignedLists(ours.certificate, ours.cluster)
    again.unpack(known.pack())
    assert again.signed == known.signed
    half = SignedLists(ours.certificate, ours.cluster)
    with capture_logs() as logs:
        half.unpack(known.pack().replace(b"1", b"4"))
        half.unpack(b"")
    assert half.revocations.names <= {BOB}
    assert logs


def test_what_the_ca_has_not_signed_counts_for_nothing(ours: Authority, tmp_path: Path) -> None:
    known = SignedLists(ours.certificate, ours.cluster)
    with pytest.raises(InvalidInput):
        known.take(signed(make_authority(tmp_path / "other"), ANN))
    assert not known.signed


def test_lists_that_do_not_cover_each_other_are_bounded_and_their_names_stay_in_force(
    ours: Authority, tmp_path: Path
) -> None:
    known = SignedLists(ours.certificate, ours.cluster)
    for number in range(MAX_LISTS + 2):
        one = Authority.copy(ours.directory, tmp_path / f"copy{number}")
        known.take(signed(one, f"agent/{number:032x}"))
    assert len(known.signed) == MAX_LISTS
    assert len(known.revocations.names) == MAX_LISTS + 2


# --------------------------------------------------------------------------- copies


def test_a_copy_has_the_ca_and_its_revocations_and_none_of_its_tokens(ours: Authority, tmp_path: Path) -> None:
    ours.revoke(ANN)
    token = ours.make_token(uses=1, lifetime_s=600, now=1000)
    copied = Authority.copy(ours.directory, tmp_path / "copied")
    assert (copied.certificate, copied.revocations().names) == (ours.certificate, {ANN})
    with pytest.raises(InvalidInput, match="not one of this scheduler's"):
        copied.spend(token.secret, 1001)
    ours.spend(token.secret, 1001)
    own = copied.make_token(uses=1, lifetime_s=600, now=1000)
    copied.revoke(BOB)
    ours.revoke(EVE)
    again = Authority.copy(ours.directory, tmp_path / "copied")
    assert again.revocations().names == {ANN, BOB, EVE}
    again.spend(own.secret, 1001)


def test_a_copy_never_takes_the_place_of_another_ca(ours: Authority, tmp_path: Path) -> None:
    other = make_authority(tmp_path / "other")
    with pytest.raises(ConfigError, match="has the CA of"):
        Authority.copy(ours.directory, other.directory)
    with pytest.raises(ConfigError, match="cluster init"):
        Authority.copy(tmp_path / "nowhere", tmp_path / "copied")
    assert Authority.open(other.directory).certificate == other.certificate


# ------------------------------------------------------------------------- couriers


class Sent(list[tuple[str, bytes]]):
    def __call__(self, address: str, message: Revoked) -> None:
        self.append((address, message.signed))


def test_a_courier_tells_each_scheduler_once_what_it_does_not_know(
    ours: Authority, copied: Authority, tmp_path: Path
) -> None:
    first, second = signed(ours, ANN), signed(copied, BOB)
    sent = Sent()
    courier = Courier(keeper_of(ours, tmp_path / "agent", 9), sent, RNG)
    for address in "abc":
        courier.connected(address)
    courier.heard("a", first)
    courier.heard("b", second)
    courier.carry()
    courier.carry()
    assert sorted(sent) == sorted([("a", second), ("b", first), ("c", first), ("c", second)])
    sent.clear()
    # Who has joined them needs none of the two, and all others hear of what they come to.
    joined = ours.merge(copied.revocations())
    courier.heard("a", joined)
    courier.lost("b")
    courier.carry()
    assert sent == [("c", joined)]
    sent.clear()
    courier.connected("b")
    courier.carry()
    assert sent == [("b", joined)]


def test_a_courier_carries_over_a_restart_what_the_agent_kept(ours: Authority, tmp_path: Path) -> None:
    keeper_of(ours, tmp_path / "agent", 9).heed(signed(ours, ANN))
    sent = Sent()
    courier = Courier(JoinedKeeper(tmp_path / "agent", [], RNG), sent, RNG)
    courier.connected("a")
    courier.carry()
    assert sent == [("a", ours.signed_revocations())]


# ------------------------------------------------------------------ with schedulers


@asynccontextmanager
async def serving(config: SchedulerConfig) -> AsyncIterator[tuple[SchedulerServer, tuple[str, int]]]:
    server = SchedulerServer(config)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve_agents, listeners)
        yield server, ("127.0.0.1", listeners[0].socket.getsockname()[1])
        nursery.cancel_scope.cancel()


def names_of(server: SchedulerServer) -> frozenset[str]:
    assert server.doorway.identity is not None
    return server.doorway.identity.revocations.names


def with_files(authority: Authority, directory: Path) -> SchedulerConfig:
    """Return the settings of a scheduler that has a certificate of the cluster's CA, and not the CA."""
    directory.mkdir()
    pem, key = pem_of(authority, "third", "scheduler")
    for name, data in (("ca.pem", authority.certificate), ("cert.pem", pem), ("key.pem", key)):
        (directory / name).write_bytes(data)
    return SchedulerConfig(
        ca_file=directory / "ca.pem", cert_file=directory / "cert.pem", key_file=directory / "key.pem"
    )


async def test_what_each_copy_revokes_reaches_all_schedulers_by_an_agent(
    ours: Authority, copied: Authority, tmp_path: Path, quick_clock: MockClock
) -> None:
    """Two copies of the CA that revoke at the same time, a third scheduler that has only a certificate, one agent."""
    keeper = keeper_of(ours, tmp_path / "agent")
    with closing(MemoryStore(max_bytes=1 << 20)) as store:
        async with (
            serving(SchedulerConfig(ca_dir=ours.directory)) as (first, at),
            serving(SchedulerConfig(ca_dir=copied.directory)) as (second, also_at),
            serving(with_files(ours, tmp_path / "files")) as (third, finally_at),
        ):
            node = Node(1, FakeOrigin(), store, ticks=False, scheduler=at, more_schedulers=[also_at, finally_at])
            assert node.tracker is not None
            node.tracker.identify(keeper, Refusals())
            node.neighbourhood.identity, node.neighbourhood.refusals = keeper.identity, Refusals()
            async with running(node):
                await eventually(lambda: node.uses(3))
                ours.revoke(BOB)
                copied.revoke(EVE)
                for server in (first, second, third):
                    await eventually(lambda server=server: names_of(server) == {BOB, EVE})  # type: ignore[misc]
                await eventually(lambda: ours.revocations().names == copied.revocations().names == {BOB, EVE})
                assert keeper.identity.revocations.names == {BOB, EVE}
    assert JoinedKeeper(tmp_path / "agent", [], RNG).identity.revocations.names == {BOB, EVE}


async def test_a_scheduler_that_lost_its_list_gets_it_back_from_its_agents(
    ours: Authority, tmp_path: Path, quick_clock: MockClock
) -> None:
    keeper = keeper_of(ours, tmp_path / "agent")
    keeper.heed(signed(ours, BOB))
    (ours.directory / "revoked").unlink()
    with closing(MemoryStore(max_bytes=1 << 20)) as store:
        async with serving(SchedulerConfig(ca_dir=ours.directory)) as (server, at):
            assert not names_of(server)
            node = Node(1, FakeOrigin(), store, ticks=False, scheduler=at)
            assert node.tracker is not None
            node.tracker.identify(keeper, Refusals())
            node.neighbourhood.identity, node.neighbourhood.refusals = keeper.identity, Refusals()
            async with running(node):
                await eventually(lambda: ours.revocations().names == {BOB})
            assert names_of(server) == {BOB}


async def test_an_agent_that_brings_a_forged_list_is_sent_away(ours: Authority, tmp_path: Path) -> None:
    forged = signed(make_authority(tmp_path / "other"), BOB)
    guest = f"{7:032x}"
    async with serving(SchedulerConfig(ca_dir=ours.directory)) as (server, at):
        channel = TlsChannel(
            detached(await trio.open_tcp_stream(*at)), credential(ours, guest).client, server_side=False
        )
        async with TlsStream(channel) as stream:
            with trio.fail_after(20):
                await channel.handshake()
                await stream.send_all(encode(Hello(VERSION, ours.cluster, guest, 5051, "", "", "")))  # type: ignore[arg-type]
                await stream.send_all(encode(Revoked(forged)))
                while await stream.receive_some(4096):
                    pass
        assert not names_of(server)
    with pytest.raises(RemoteProtocolError):
        server.doorway.heard(b"nothing of the kind")


# ------------------------------------------------------------ tokens of several copies


async def test_a_token_of_one_use_is_good_once_whichever_schedulers_are_asked_in_whatever_order(
    ours: Authority, copied: Authority, tmp_path: Path
) -> None:
    token = copied.make_token(uses=1, lifetime_s=600, now=time.time())
    async with (
        serving(SchedulerConfig(ca_dir=ours.directory)) as (_, at),
        serving(SchedulerConfig(ca_dir=copied.directory)) as (_, also_at),
    ):
        # The first scheduler does not know the token, and that does not end the attempt.
        keeper = await JoinedKeeper.join(tmp_path / "one", [at, also_at], RNG, str(token))
        assert keeper.identity.name.role == "agent"
        for order in ([at, also_at], [also_at, at]):
            with pytest.raises(ConfigError, match=r"spent.*not one of|not one of.*spent"):
                await JoinedKeeper.join(tmp_path / "two", order, RNG, str(token))
        for address in (at, also_at):
            with pytest.raises(IdentityRefused):
                await enrolment.join(*address, token)
    assert not (tmp_path / "two").exists()


async def test_a_copy_that_lost_its_tokens_takes_none_of_them(ours: Authority, tmp_path: Path) -> None:
    """As where a scheduler's directory does not outlive its pod: a spent token is unknown then, and no fresh one."""
    token = ours.make_token(uses=1, lifetime_s=600, now=time.time())
    ours.spend(token.secret, time.time())
    shutil.rmtree(ours.directory / "tokens")
    async with serving(SchedulerConfig(ca_dir=ours.directory)) as (_, at):
        with pytest.raises(ConfigError, match="not one of this scheduler's"):
            await JoinedKeeper.join(tmp_path / "one", [at], RNG, str(token))
