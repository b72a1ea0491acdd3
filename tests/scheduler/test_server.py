# SPDX-License-Identifier: Apache-2.0
"""The scheduler's sockets: agents that join, leave, return, stall and talk nonsense, over loopback."""

from __future__ import annotations

import random
import signal
import socket
import struct
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import httpx
import pytest
import structlog
import trio

from p2pdist.config import Address
from p2pdist.core.chunkmap import MIN_CHUNK_BYTES, ChunkMap, to_bytes
from p2pdist.core.types import Digest, PeerId
from p2pdist.core.wire import (
    VERSION,
    Ask,
    Checksums,
    Decoder,
    Done,
    Hello,
    Join,
    Lease,
    Message,
    Neighbours,
    Resolve,
    Resolved,
    encode,
    span_header,
)
from p2pdist.errors import ConfigError
from scheduler.config import SchedulerConfig
from scheduler.server import HELLO_S, MAX_QUEUED_BYTES, SCHEDULER_ID, SchedulerServer
from tests.nodes import eventually, no_descriptor_left

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

ANY_PORT = Address("127.0.0.1", 0)
BLOB = Digest("sha256:" + "1" * 64)
SIZE = 3 * MIN_CHUNK_BYTES
SUM = b"s" * 16
Kind = TypeVar("Kind", bound=Message)


def hello_of(number: int, *, version: int = VERSION, cluster: str = "lab", port: int = 5051, host: str = "") -> Hello:
    return Hello(version, cluster, PeerId(f"{number:032x}"), port, "", "", host)


def join(have: bytes = b"\0", checksums: bytes = b"") -> Join:
    return Join(BLOB, SIZE, "reg.test", have, checksums)


@dataclass
class FakeAgent:
    """An agent's end of the line, without an agent."""

    stream: trio.SocketStream
    said: list[Message] = field(default_factory=list)
    closed: trio.Event = field(default_factory=trio.Event)

    async def read(self) -> None:
        decoder = Decoder()
        try:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                while data := await self.stream.receive_some(1 << 20):
                    self.said += [item for item in decoder.feed(memoryview(data)) if isinstance(item, Message)]
        finally:
            self.stream.socket.close()
            self.closed.set()

    async def say(self, *messages: Message) -> None:
        await self.stream.send_all(b"".join(encode(message) for message in messages))

    def heard(self, kind: type[Kind]) -> list[Kind]:
        return [message for message in self.said if isinstance(message, kind)]

    async def expect(self, kind: type[Kind], count: int = 1) -> list[Kind]:
        await eventually(lambda: len(self.heard(kind)) >= count)
        return self.heard(kind)


@dataclass
class Line:
    """A running scheduler, and a way to it."""

    server: SchedulerServer
    port: int
    nursery: trio.Nursery

    async def dial(self, first: bytes = b"") -> FakeAgent:
        """Return a connection on which only `first` has been said."""
        agent = FakeAgent(await trio.open_tcp_stream("127.0.0.1", self.port))
        if first:
            await agent.stream.send_all(first)
        self.nursery.start_soon(agent.read)
        return agent

    async def agent(self, number: int, **hello: str | int) -> FakeAgent:
        """Return an agent that has been let in, and counts as one that has brought chunks before."""
        agent = await self.dial(encode(hello_of(number, **hello)))  # type: ignore[arg-type]
        await agent.expect(Hello)
        self.server.state.members[PeerId(f"{number:032x}")].tried = True
        return agent


@asynccontextmanager
async def scheduler(**settings: int) -> AsyncIterator[Line]:
    server = SchedulerServer(SchedulerConfig(cluster="lab", **settings))
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve_agents, listeners)
        yield Line(server, listeners[0].socket.getsockname()[1], nursery)
        nursery.cancel_scope.cancel()


def reset(stream: trio.SocketStream) -> None:
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


# ------------------------------------------------------------------- agents


async def test_both_say_who_they_are(quick_clock: MockClock) -> None:
    async with scheduler() as line:
        agent = await line.agent(1)
        assert agent.said == [Hello(VERSION, "lab", SCHEDULER_ID, 0, "", "", "")]


async def test_agents_of_a_swarm_get_leases_neighbours_and_checksums(quick_clock: MockClock) -> None:
    async with scheduler() as line:
        first = await line.agent(1, port=7001)
        await first.say(join())
        leases = await first.expect(Lease, 3)
        assert sorted(lease.index for lease in leases) == [0, 1, 2]
        assert not first.heard(Neighbours)
        second = await line.agent(2, host="node2.lan")
        await second.say(join())
        (named,) = await second.expect(Neighbours)
        assert [(peer.host, peer.port) for peer in named.peers] == [("127.0.0.1", 7001)]
        await first.say(Done(BLOB, SIZE, 1, SUM))
        (told,) = await second.expect(Checksums)
        assert (told.blob, told.size_bytes, told.checksums) == (BLOB, SIZE, SUM)
        third = await line.agent(3)
        await third.say(join())
        (named,) = await third.expect(Neighbours)
        assert {peer.host for peer in named.peers} == {"127.0.0.1", "node2.lan"}
        assert await third.expect(Checksums)


@pytest.mark.parametrize("ending", ["closes", "resets"])
async def test_the_leases_of_an_agent_that_goes_are_others(ending: str, quick_clock: MockClock) -> None:
    async with scheduler() as line:
        first, second = await line.agent(1), await line.agent(2)
        await first.say(join())
        await first.expect(Lease, 3)
        await second.say(join())
        await second.expect(Neighbours)
        assert not second.heard(Lease)
        if ending == "closes":
            await first.stream.aclose()
        else:
            reset(first.stream)
        leases = await second.expect(Lease, 3)
        assert sorted(lease.index for lease in leases) == [0, 1, 2]
        assert list(line.server.state.members) == [PeerId(f"{2:032x}")]


async def test_an_agent_that_returns_takes_its_old_place(quick_clock: MockClock) -> None:
    async with scheduler() as line:
        old = await line.agent(1)
        await old.say(join())
        await old.expect(Lease, 3)
        new = await line.agent(1, port=7777)
        await old.closed.wait()
        await new.say(join())
        assert len(await new.expect(Lease, 3)) == 3
        assert trio.current_time() < 5, "the leases were not given back, they lapsed"
        await trio.sleep(3)
        (member,) = line.server.state.members.values()
        assert member.address.port == 7777
        assert not new.closed.is_set()


async def test_a_tag_is_asked_for_by_two_agents_for_all(quick_clock: MockClock) -> None:
    async with scheduler() as line:
        agents = [await line.agent(number) for number in (1, 2, 3)]
        for agent in agents:
            await agent.say(Resolve(5, "reg.test", "lab/image", "v1"))
            await trio.testing.wait_all_tasks_blocked(0.001)
        answer = Resolved(5, BLOB, "application/x", 10)
        for agent in agents[:2]:
            assert await agent.expect(Ask) == [Ask(5)]
            await agent.say(answer)
        assert await agents[2].expect(Resolved) == [answer]
        assert not agents[2].heard(Ask)


# ---------------------------------------------------------------- bad agents


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="HTTP"),
        pytest.param(encode(hello_of(9, version=VERSION + 1)), id="another version"),
        pytest.param(encode(hello_of(9, cluster="other")), id="another cluster"),
        pytest.param(encode(hello_of(9, port=0)), id="no port"),
        pytest.param(encode(hello_of(9, port=70_000)), id="an impossible port"),
        pytest.param(encode(join()), id="no hello"),
        pytest.param(encode(hello_of(9)) + encode(hello_of(9)), id="two hellos"),
        pytest.param(encode(hello_of(9)) + span_header(1, 4) + b"byte", id="chunk bytes"),
        pytest.param(encode(hello_of(9)) + encode(Lease(BLOB, 0, 1)), id="a message of the scheduler's own"),
        pytest.param(encode(hello_of(9)) + encode(Join(BLOB, SIZE, "", b"\xff", b"")), id="a bitmap too full"),
        pytest.param(encode(hello_of(9)) + encode(Join(BLOB, 1 << 52, "", b"", b"")), id="an impossible size"),
        pytest.param(encode(hello_of(9)) + encode(Done(BLOB, SIZE, 7, SUM)), id="a chunk that is not there"),
        pytest.param(struct.pack(">IB", 1 << 31, 0), id="a frame too large"),
        pytest.param(struct.pack(">IB", 4, 0) + b"\xc1\xc1\xc1", id="no msgpack"),
    ],
)
async def test_an_agent_that_breaks_the_protocol_is_let_go_and_harms_nobody(
    first: bytes, quick_clock: MockClock
) -> None:
    async with scheduler() as line:
        good = await line.agent(1)
        await good.say(join())
        await good.expect(Lease, 3)
        bad = await line.dial(first)
        with trio.fail_after(300):
            await bad.closed.wait()
        assert list(line.server.state.members) == [PeerId(f"{1:032x}")]
        other = await line.agent(2)
        await other.say(join())
        (named,) = await other.expect(Neighbours)
        assert [peer.peer_id for peer in named.peers] == [PeerId(f"{1:032x}")]
        assert not good.closed.is_set()


async def test_an_agent_that_says_nothing_is_let_go_in_time(quick_clock: MockClock) -> None:
    async with scheduler() as line:
        silent = await line.dial()
        await silent.closed.wait()
        assert trio.current_time() <= HELLO_S + 0.1


async def test_an_agent_that_reads_nothing_is_let_go_before_it_costs_much_memory(quick_clock: MockClock) -> None:
    """Each of its joins is answered by the checksums of all chunks so far, 160 KiB."""
    with structlog.testing.capture_logs() as logs:
        async with scheduler() as line:
            count = 10_000
            cut = ChunkMap.of(count * 4 * 1024 * 1024)
            everything = Join(BLOB, cut.size_bytes, "reg.test", to_bytes(cut.full, count), random.randbytes(16 * count))
            good = await line.agent(1)
            await good.say(everything)
            slow = FakeAgent(await trio.open_tcp_stream("127.0.0.1", line.port))
            await slow.say(hello_of(2))
            nothing = encode(Join(BLOB, cut.size_bytes, "reg.test", to_bytes(0, count), b""))
            with suppress(trio.BrokenResourceError):
                for _ in range(400):
                    await slow.stream.send_all(nothing)
            await eventually(lambda: len(line.server.state.members) == 1)
            assert 400 * 16 * count > 4 * MAX_QUEUED_BYTES
            assert not good.closed.is_set()
            await slow.stream.aclose()
    assert "reads nothing" in next(entry["why"] for entry in logs if entry["event"] == "agent left")


async def test_an_agent_that_resets_while_much_is_sent_to_it_harms_nobody(quick_clock: MockClock) -> None:
    """Reader and writer both meet it; what they raise must not end the scheduler."""
    async with scheduler() as line:
        count = 10_000
        cut = ChunkMap.of(count * 4 * 1024 * 1024)
        everything = Join(BLOB, cut.size_bytes, "reg.test", to_bytes(cut.full, count), random.randbytes(16 * count))
        good = await line.agent(1)
        await good.say(everything)
        nothing = Join(BLOB, cut.size_bytes, "reg.test", to_bytes(0, count), b"")
        for number in range(2, 6):
            bad = FakeAgent(await trio.open_tcp_stream("127.0.0.1", line.port))
            await bad.say(hello_of(number), *[nothing] * 45)
            await eventually(lambda: any(connection.pending for connection in line.server._connections.values()))
            reset(bad.stream)
            await eventually(lambda: len(line.server.state.members) == 1)
        assert not good.closed.is_set()


async def test_no_more_agents_than_allowed_and_those_here_may_return(quick_clock: MockClock) -> None:
    async with scheduler(max_agents=2) as line:
        await line.agent(1)
        await line.agent(2)
        third = await line.dial(encode(hello_of(3)))
        await third.closed.wait()
        again = await line.agent(2)
        await trio.sleep(1)
        assert not again.closed.is_set()
        assert len(line.server.state.members) == 2


async def test_strangers_that_say_nothing_are_bounded(quick_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scheduler.server.MAX_GREETING", 3)
    async with scheduler() as line:
        silent = [await line.dial() for _ in range(3)]
        await eventually(lambda: line.server._greeting == 3)
        one_more = await line.dial()
        await one_more.closed.wait()
        assert not any(agent.closed.is_set() for agent in silent)
        for agent in silent:
            await agent.closed.wait()
        await line.agent(1)


async def test_no_descriptor_outlives_its_agent(quick_clock: MockClock) -> None:
    with no_descriptor_left():
        async with scheduler() as line:
            for number in range(1, 10):
                agent = await line.agent(number)
                await agent.say(join())
                if number % 3 == 0:
                    reset(agent.stream)
                elif number % 3 == 1:
                    await agent.stream.aclose()
            await line.dial(b"nonsense")
            await eventually(lambda: len(line.server.state.members) == 3)


# ------------------------------------------------------------------ the whole


async def test_the_scheduler_serves_agents_and_its_api_until_it_is_told_to_stop(nursery: trio.Nursery) -> None:
    with no_descriptor_left():
        server = SchedulerServer(SchedulerConfig(listen=ANY_PORT, api_listen=ANY_PORT, cluster="lab"))
        stopped = trio.Event()

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            await server.run(task_status=task_status)
            stopped.set()

        await nursery.start(run)
        line = Line(server, server.agents_at.port, nursery)
        agent = await line.agent(1)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.api_at.port}") as client:
            status = (await client.get("/status")).json()
            assert status["agents"] == 1
            assert (await client.get("/livez")).text == "ok\n"
        signal.raise_signal(signal.SIGTERM)
        with trio.fail_after(10):
            await stopped.wait()
            await agent.closed.wait()
        await agent.stream.aclose()


async def test_a_signal_puts_the_file_in_force(nursery: trio.Nursery) -> None:
    config = SchedulerConfig(listen=ANY_PORT, api_listen=ANY_PORT)
    asked = replace(config, max_agents=7, degree=4, tag_ttl_s=1.0, cluster="other")
    server = SchedulerServer(config, lambda: asked)
    await nursery.start(server.run)
    signal.raise_signal(signal.SIGHUP)
    await eventually(lambda: server.settings.reloads == 1)
    assert server.config == replace(asked, cluster="default")
    assert (server.state._naming.degree, server.state._tags.ttl_s) == (4, 1.0)


@pytest.mark.parametrize("which", ["listen", "api_listen"])
async def test_a_port_in_use_is_named_and_nothing_stays_open(which: str) -> None:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    taken = Address("127.0.0.1", listener.socket.getsockname()[1])
    settings = {"listen": ANY_PORT, "api_listen": ANY_PORT, which: taken}
    async with listener:
        with no_descriptor_left(), pytest.raises(ConfigError, match=f"^{which}: {taken} is in use"):
            await SchedulerServer(SchedulerConfig(**settings)).run()
