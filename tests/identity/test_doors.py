# SPDX-License-Identifier: Apache-2.0
"""Who is kept out of the peer port and the scheduler's agent port, over real sockets, and what the log says of it."""

from __future__ import annotations

import json
import ssl
from contextlib import asynccontextmanager, closing, suppress
from typing import TYPE_CHECKING

import pytest
import trio
from structlog.testing import capture_logs

from p2pdist.core.identity import Name
from p2pdist.core.types import PeerId
from p2pdist.core.wire import VERSION, Decoder, Hello, PeerAddress, Revoked, encode
from p2pdist.errors import P2PDistError
from p2pdist.identity import certificates
from p2pdist.identity.channel import WORN_BYTES, TlsChannel, TlsStream, detached
from p2pdist.identity.credentials import ENROL, SPEAK, no_certificate, stranger
from p2pdist.identity.refusals import QUIET_S, Refusals
from p2pdist.store.memory import MemoryStore
from scheduler.config import SchedulerConfig
from scheduler.server import SchedulerServer
from tests.identities import CLUSTER, FixedKeeper, credential, identity, make_authority
from tests.nodes import FakeOrigin, Node, eventually, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from trio.testing import MockClock

    from p2pdist.identity.authority import Authority

GUEST = f"{7:032x}"


def without_certificate(authority: Authority) -> ssl.SSLContext:
    context = stranger(authority.certificate)
    context.set_alpn_protocols([SPEAK])
    return context


STRANGERS: dict[str, tuple[str, Callable[[Authority, Authority], ssl.SSLContext | None]]] = {
    "in the clear": ("plain", lambda _ours, _other: None),
    "without a certificate": ("no-certificate", lambda ours, _other: without_certificate(ours)),
    "with another CA's": ("authority", lambda ours, other: credential(other, GUEST, trusts=ours).client),
    "expired": ("expired", lambda ours, _other: credential(ours, GUEST, starts=-7200, lasts=3600).client),
    "not valid yet": ("early", lambda ours, _other: credential(ours, GUEST, starts=7200).client),
    "another cluster's of the same CA": (
        "other-cluster",
        lambda ours, _other: credential(ours, GUEST, cluster="b").client,
    ),
    "a scheduler's": ("role", lambda ours, _other: credential(ours, "s", "scheduler").client),
    "revoked": ("revoked", lambda ours, _other: credential(ours, f"{9:032x}").client),
    "another's name": ("other-name", lambda ours, _other: credential(ours, f"{8:032x}").client),
}


@asynccontextmanager
async def peer_port(ours: Authority) -> AsyncIterator[tuple[int, Callable[[], int]]]:
    """Give an agent's peer port, and how many it has let in."""
    with closing(MemoryStore(max_bytes=1 << 20)) as store:
        node = Node(1, FakeOrigin(), store, ticks=False)
        node.neighbourhood.identity = identity(ours, node.peer_id)
        node.neighbourhood.identity.revocations = ours.revocations()
        node.neighbourhood.refusals = Refusals()
        async with running(node):
            yield node.port, lambda: len(node.exchange.links)


@asynccontextmanager
async def agent_port(ours: Authority) -> AsyncIterator[tuple[int, Callable[[], int]]]:
    """Give a scheduler's agent port, and how many it has let in."""
    server = SchedulerServer(SchedulerConfig(ca_dir=ours.directory))
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve_agents, listeners)
        yield listeners[0].socket.getsockname()[1], lambda: len(server.state.members)
        nursery.cancel_scope.cancel()


PORTS = {"peers": peer_port, "agents": agent_port}


async def knock(port: int, context: ssl.SSLContext | None) -> bool:
    """Say hello as GUEST; return whether a hello came back."""
    plain = await trio.open_tcp_stream("127.0.0.1", port)
    stream: trio.SocketStream | TlsStream = plain
    decoder = Decoder()
    try:
        with trio.fail_after(20):
            if context is not None:
                channel = TlsChannel(detached(plain), context, server_side=False)
                stream = TlsStream(channel)
                await channel.handshake()
            await stream.send_all(encode(Hello(VERSION, CLUSTER, PeerId(GUEST), 5051, "", "", "")))
            while data := await stream.receive_some(4096):
                if any(isinstance(item, Hello) for item in decoder.feed(memoryview(data))):
                    return True
    except (P2PDistError, OSError, trio.BrokenResourceError):
        return False
    finally:
        await stream.aclose()
    return False


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    authority = make_authority(tmp_path / "ours")
    authority.revoke(f"agent/{9:032x}")
    return authority


@pytest.mark.parametrize("kind", STRANGERS)
@pytest.mark.parametrize("port", PORTS)
async def test_a_stranger_is_kept_out_and_the_log_says_why(
    ours: Authority, tmp_path: Path, port: str, kind: str
) -> None:
    reason, shown = STRANGERS[kind]
    context = shown(ours, make_authority(tmp_path / "other", "lab"))
    with capture_logs() as logs:
        async with PORTS[port](ours) as (number, let_in):
            heard = await knock(number, context)
            await eventually(lambda: any(line["event"] == "connection refused" for line in logs))
            assert not let_in()
    (line,) = [line for line in logs if line["event"] == "connection refused"]
    assert (line["port"], line["source"], line["reason"]) == (port, "127.0.0.1", reason)
    assert line["log_level"] == "warning"
    assert line["why"]
    assert line["mend"]
    # Only who has shown a right certificate hears anything at all.
    assert not heard or kind == "another's name"


@pytest.mark.parametrize("kind", STRANGERS)
async def test_no_stranger_gets_a_certificate_and_the_log_says_why(ours: Authority, tmp_path: Path, kind: str) -> None:
    """The same at the door for those who want a certificate; without one, a token is asked for."""
    reason, shown = STRANGERS[kind]
    context = shown(ours, make_authority(tmp_path / "other", "lab"))
    at_the_handshake = reason in ("plain", "authority", "expired", "early", "role")
    with capture_logs() as logs:
        async with agent_port(ours) as (number, _):
            answer = await ask_for_certificate(number, context)
            await eventually(lambda: any(line["event"] == "connection refused" for line in logs))
    (line,) = [line for line in logs if line["event"] == "connection refused"]
    expected = ("agents", reason) if at_the_handshake else ("enrol", "not-enrolled")
    assert (line["port"], line["reason"], line["source"]) == (*expected, "127.0.0.1")
    assert b"CERTIFICATE" not in answer
    assert at_the_handshake or b"refused" in answer


async def ask_for_certificate(port: int, context: ssl.SSLContext | None) -> bytes:
    """Ask for a certificate of GUEST without a token; return what was answered."""
    name = Name(CLUSTER, "agent", PeerId(GUEST))
    request = certificates.make_request(certificates.make_key(), name).decode()
    question = json.dumps({"ask": "certificate", "token": "", "request": request}).encode() + b"\n"
    plain = await trio.open_tcp_stream("127.0.0.1", port)
    stream: trio.SocketStream | TlsStream = plain
    answer = b""
    try:
        with trio.fail_after(20):
            if context is not None:
                context.set_alpn_protocols([ENROL])
                channel = TlsChannel(detached(plain), context, server_side=False)
                stream = TlsStream(channel)
                await channel.handshake()
            await stream.send_all(question)
            while data := await stream.receive_some(4096):
                answer += data
    except (P2PDistError, OSError, trio.BrokenResourceError):
        pass
    finally:
        await stream.aclose()
    return answer


@pytest.mark.parametrize("port", PORTS)
async def test_who_has_the_clusters_certificate_is_let_in(ours: Authority, port: str) -> None:
    async with PORTS[port](ours) as (number, _):
        assert await knock(number, credential(ours, GUEST).client)


async def test_an_agent_takes_no_other_agent_for_a_scheduler_and_no_scheduler_of_another_cluster(
    ours: Authority, tmp_path: Path, quick_clock: MockClock
) -> None:
    """Node 1 is told that a scheduler is where node 2's peer port is, and where another cluster's scheduler is."""
    other = make_authority(tmp_path / "other", "lab")
    with closing(MemoryStore(max_bytes=1 << 20)) as store, capture_logs() as logs:
        async with peer_port(ours) as (peers, _), agent_port(other) as (agents, _):
            node = Node(
                1,
                FakeOrigin(),
                store,
                ticks=False,
                scheduler=("127.0.0.1", peers),
                more_schedulers=[("127.0.0.1", agents)],
            )
            assert node.tracker is not None
            refusals = Refusals()
            node.tracker.identify(FixedKeeper(identity(ours, node.peer_id)), refusals)
            node.neighbourhood.identity, node.neighbourhood.refusals = identity(ours, node.peer_id), refusals
            async with running(node):
                await eventually(lambda: {"role", "authority"} <= set(refusals.counts))
                assert not node.tracker.connected
    assert {line["reason"] for line in logs if line.get("port") == "scheduler"} == {"role", "authority"}


async def test_two_agents_of_a_cluster_are_linked_and_one_that_is_revoked_loses_its_links(
    ours: Authority, quick_clock: MockClock
) -> None:
    with closing(MemoryStore(max_bytes=1 << 20)) as store, closing(MemoryStore(max_bytes=1 << 20)) as other:
        nodes = [Node(1, FakeOrigin(), store, ticks=False), Node(2, FakeOrigin(), other, ticks=False)]
        for node in nodes:
            node.neighbourhood.identity = identity(ours, node.peer_id)
            node.neighbourhood.refusals = Refusals()
        async with running(*nodes):
            nodes[0].neighbourhood.learn(nodes[1].address, "mdns")
            await eventually(lambda: nodes[0].peers == {2} and nodes[1].peers == {1})
            assert nodes[0].neighbourhood.identity is not None
            nodes[0].neighbourhood.identity.revocations = ours.revoke(f"agent/{nodes[1].peer_id}")
            await eventually(lambda: not nodes[0].peers and not nodes[1].peers)


async def test_after_a_renewal_or_with_a_worn_key_idle_links_are_made_anew_and_busy_ones_left_alone(
    ours: Authority, quick_clock: MockClock
) -> None:
    with closing(MemoryStore(max_bytes=1 << 20)) as store, closing(MemoryStore(max_bytes=1 << 20)) as other:
        nodes = [Node(1, FakeOrigin(), store, ticks=False), Node(2, FakeOrigin(), other, ticks=False)]
        for node in nodes:
            node.neighbourhood.identity = identity(ours, node.peer_id)
            node.neighbourhood.refusals = Refusals()
        async with running(*nodes):
            nodes[0].neighbourhood.learn(nodes[1].address, "mdns")
            await eventually(lambda: nodes[0].peers == {2} and nodes[1].peers == {1})
            first = nodes[0].exchange.links[nodes[1].peer_id]
            first.expect(1, memoryview(bytearray(10)))
            assert nodes[0].neighbourhood.identity is not None
            fresh = nodes[0].neighbourhood.identity.credential = credential(ours, nodes[0].peer_id)
            await trio.sleep(60)
            assert nodes[0].exchange.links[nodes[1].peer_id] is first
            first._incoming.clear()
            await eventually(lambda: nodes[0].peers == {2} and nodes[0].exchange.links[nodes[1].peer_id] is not first)
            second = nodes[0].exchange.links[nodes[1].peer_id]
            assert second.credential is fresh
            assert isinstance(second.channel, TlsChannel)
            second.channel._sent_bytes = WORN_BYTES + 1
            await eventually(lambda: nodes[0].peers == {2} and nodes[0].exchange.links[nodes[1].peer_id] is not second)


async def test_another_agent_than_the_one_that_was_named_is_not_talked_to(
    ours: Authority, quick_clock: MockClock
) -> None:
    with closing(MemoryStore(max_bytes=1 << 20)) as store:
        node = Node(2, FakeOrigin(), store, ticks=False)
        node.neighbourhood.identity, node.neighbourhood.refusals = identity(ours, node.peer_id), Refusals()
        async with peer_port(ours) as (port, let_in), running(node):
            node.neighbourhood.learn(PeerAddress(PeerId(f"{5:032x}"), "127.0.0.1", port), "mdns")
            await eventually(lambda: node.neighbourhood.refusals.counts["other-name"] > 0)
            assert not node.peers
            assert not let_in()


async def test_a_scheduler_tells_its_agents_of_revocations_and_drops_who_is_revoked(
    ours: Authority, quick_clock: MockClock
) -> None:
    heard: list[bytes] = []
    async with agent_port(ours) as (port, let_in):
        channel = TlsChannel(
            detached(await trio.open_tcp_stream("127.0.0.1", port)), credential(ours, GUEST).client, server_side=False
        )
        async with TlsStream(channel) as stream:
            await channel.handshake()
            await stream.send_all(encode(Hello(VERSION, CLUSTER, PeerId(GUEST), 5051, "", "", "")))
            decoder = Decoder()
            with suppress(OSError):
                while data := await stream.receive_some(4096):
                    told = [item.signed for item in decoder.feed(memoryview(data)) if isinstance(item, Revoked)]
                    heard += told
                    if len(heard) == 1 and told:
                        ours.revoke(f"agent/{GUEST}")
        await eventually(lambda: not let_in())
    assert len(heard) == 2
    assert heard[1] == ours.signed_revocations()


async def test_a_stranger_that_knocks_all_the_time_does_not_fill_the_log(quick_clock: MockClock) -> None:
    refusals = Refusals()
    with capture_logs() as logs:
        for _ in range(50):
            refusals.note("peers", "192.0.2.1", no_certificate())
        refusals.note("peers", "192.0.2.2", no_certificate())
        await trio.sleep(QUIET_S + 1)
        refusals.note("peers", "192.0.2.1", no_certificate())
    assert len(logs) == 3
    assert refusals.counts["no-certificate"] == 52
