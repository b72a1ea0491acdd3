# SPDX-License-Identifier: Apache-2.0
"""The agent's connection to schedulers that come, go, stay silent and talk nonsense, over loopback."""

from __future__ import annotations

import itertools
import os
import random
import socket
import struct
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import structlog
import trio

from p2pdist.core.types import Digest, PeerId
from p2pdist.core.wire import VERSION, Decoder, Hello, Lease, Leave, Message, encode, span_header
from p2pdist.errors import RemoteProtocolError
from p2pdist.net.tracker_client import CONNECT_S, LAST_PAUSE_S, MAX_QUEUED_BYTES, TrackerClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from trio.testing import MockClock

OWN = Hello(VERSION, "lab", PeerId("a" * 32), 5051, "", "", "")
THEIRS = Hello(VERSION, "lab", PeerId("0" * 32), 0, "", "", "")
BLOB = Digest("sha256:" + "1" * 64)
LEASE = Lease(BLOB, 3, 15_000)


class Steady(random.Random):
    """Jitter that changes nothing."""

    def random(self) -> float:
        return 0.5


@dataclass
class Recorder:
    """A TrackerHandler that notes what it is told."""

    told: list[object] = field(default_factory=list)
    on_connected: Callable[[], None] = lambda: None
    refuse: bool = False
    _changed: trio.Event = field(default_factory=trio.Event)

    def scheduler_connected(self, address: str) -> None:
        self._note(("connected", address))
        self.on_connected()

    def scheduler_lost(self, address: str, why: str) -> None:
        self._note(("lost", address, why))

    def scheduler_said(self, message: Message) -> None:
        if self.refuse:
            raise RemoteProtocolError("nonsense")
        self._note(message)

    def _note(self, item: object) -> None:
        self.told.append(item)
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(300):
            while not condition():
                await self._changed.wait()

    @property
    def kinds(self) -> list[str]:
        return [item[0] for item in self.told if isinstance(item, tuple)]


@dataclass
class FakeScheduler:
    """Serves each connection by `behaviour`; without one it greets and reads."""

    behaviour: Callable[[FakeScheduler, trio.SocketStream], Awaitable[None]]
    host: str = "127.0.0.1"
    port: int = 0
    connected_at: list[float] = field(default_factory=list)
    received: list[Message] = field(default_factory=list)
    _changed: trio.Event = field(default_factory=trio.Event)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connected_at.append(trio.current_time())
        with trio.CancelScope() as scope:
            try:
                await self.behaviour(self, stream)
            except trio.BrokenResourceError:
                scope.cancel()
        await trio.aclose_forcefully(stream)

    async def read(self, stream: trio.SocketStream) -> None:
        decoder = Decoder()
        while data := await stream.receive_some(65536):
            self.received += [item for item in decoder.feed(memoryview(data)) if isinstance(item, Message)]
            self._changed.set()
            self._changed = trio.Event()

    async def got(self, count: int) -> list[Message]:
        with trio.fail_after(300):
            while len(self.received) < count:
                await self._changed.wait()
        return self.received


@asynccontextmanager
async def serving(*schedulers: FakeScheduler) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for scheduler in schedulers:
            listeners = await trio.open_tcp_listeners(scheduler.port, host=scheduler.host)
            scheduler.port = listeners[0].socket.getsockname()[1]
            await nursery.start(trio.serve_listeners, scheduler.serve, listeners)
        yield
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def connecting(*addresses: tuple[str, int]) -> AsyncIterator[tuple[TrackerClient, Recorder]]:
    told = Recorder()
    client = TrackerClient(addresses, lambda: OWN, told, Steady())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        yield client, told
        nursery.cancel_scope.cancel()


async def friendly(scheduler: FakeScheduler, stream: trio.SocketStream) -> None:
    await stream.send_all(encode(THEIRS))
    await scheduler.read(stream)


async def hang_up(_scheduler: FakeScheduler, stream: trio.SocketStream) -> None:
    await stream.receive_some(65536)


async def stay_silent(scheduler: FakeScheduler, stream: trio.SocketStream) -> None:
    await scheduler.read(stream)


def says(data: bytes, more: bytes = b"") -> Callable[[FakeScheduler, trio.SocketStream], Awaitable[None]]:
    """Send `data` at once, `more` when the agent has said more than its hello."""

    async def behave(scheduler: FakeScheduler, stream: trio.SocketStream) -> None:
        await stream.send_all(data)
        if more:
            said = 0
            while said <= len(encode(OWN)):
                said += len(await stream.receive_some(65536)) or len(encode(OWN)) + 1
            await stream.send_all(more)
        await scheduler.read(stream)

    return behave


def reset(stream: trio.SocketStream) -> None:
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


async def test_messages_pass_both_ways_once_both_have_said_hello(quick_clock: MockClock) -> None:
    scheduler = FakeScheduler(says(encode(THEIRS) + encode(LEASE)))
    async with serving(scheduler), connecting(("127.0.0.1", scheduler.port)) as (client, told):
        await told.until(lambda: LEASE in told.told)
        assert client.connected_to == scheduler.address
        client.send(Leave(BLOB))
        assert await scheduler.got(2) == [OWN, Leave(BLOB)]
    assert told.told == [("connected", scheduler.address), LEASE]
    assert client.control_bytes == len(encode(Leave(BLOB)))


async def test_what_is_said_on_connecting_goes_out_first(quick_clock: MockClock) -> None:
    scheduler = FakeScheduler(friendly)
    async with serving(scheduler), connecting(("127.0.0.1", scheduler.port)) as (client, told):
        told.on_connected = lambda: client.send(Leave(BLOB))
        assert await scheduler.got(2) == [OWN, Leave(BLOB)]


async def test_without_a_connection_messages_are_dropped(quick_clock: MockClock) -> None:
    scheduler = FakeScheduler(friendly, port=unused_port())
    async with connecting(("127.0.0.1", scheduler.port)) as (client, told):
        client.send(Leave(BLOB))
        await trio.sleep(1)
        async with serving(scheduler):
            await told.until(lambda: "connected" in told.kinds)
            await trio.sleep(1)
    assert scheduler.received == [OWN]
    assert client.control_bytes == 0


async def test_what_was_queued_for_a_lost_scheduler_is_not_sent_to_the_next(quick_clock: MockClock) -> None:
    async def greet_and_reset(_scheduler: FakeScheduler, stream: trio.SocketStream) -> None:
        await stream.send_all(encode(THEIRS))
        await stream.receive_some(65536)
        reset(stream)

    lost, found = FakeScheduler(greet_and_reset), FakeScheduler(friendly)
    async with (
        serving(lost, found),
        connecting(("127.0.0.1", lost.port), ("127.0.0.1", found.port)) as (client, told),
    ):
        await told.until(lambda: "connected" in told.kinds)
        for _ in range(1000):
            client.send(Leave(BLOB))
        await told.until(lambda: told.kinds[:3] == ["connected", "lost", "connected"])
        await trio.sleep(1)
    assert found.received == [OWN]


async def test_pauses_between_tries_double_up_to_a_bound(quick_clock: MockClock) -> None:
    scheduler = FakeScheduler(hang_up)
    async with serving(scheduler), connecting(("127.0.0.1", scheduler.port)):
        await trio.sleep(25)
    at = scheduler.connected_at
    pauses = [round(later - earlier, 2) for earlier, later in itertools.pairwise(at)]
    assert pauses[:6] == [0.5, 1.0, 2.0, 4.0, LAST_PAUSE_S, LAST_PAUSE_S]


async def test_after_a_session_that_lasted_the_first_pause_is_short_again(quick_clock: MockClock) -> None:
    async def one_minute(scheduler: FakeScheduler, stream: trio.SocketStream) -> None:
        await stream.send_all(encode(THEIRS))
        with trio.move_on_after(60 if len(scheduler.connected_at) == 4 else 0):
            await trio.sleep_forever()

    scheduler = FakeScheduler(one_minute)
    async with serving(scheduler), connecting(("127.0.0.1", scheduler.port)) as (_client, told):
        await told.until(lambda: told.kinds.count("connected") == 6)
    at = scheduler.connected_at
    pauses = [round(later - earlier, 2) for earlier, later in itertools.pairwise(at)]
    assert pauses == [0.5, 1.0, 2.0, 60.25, 0.5]


async def test_the_addresses_are_tried_in_turn(quick_clock: MockClock) -> None:
    first, second = FakeScheduler(hang_up), FakeScheduler(hang_up)
    async with serving(first, second), connecting(("127.0.0.1", first.port), ("127.0.0.1", second.port)):
        await trio.sleep(10)
    order = sorted([(at, 1) for at in first.connected_at] + [(at, 2) for at in second.connected_at])
    assert [which for _, which in order][:4] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [
        pytest.param(hang_up, "hung up", id="hangs up"),
        pytest.param(stay_silent, "no hello", id="silent"),
        pytest.param(says(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "a frame of kind", id="HTTP"),
        pytest.param(
            says(encode(Hello(VERSION + 1, "lab", THEIRS.peer_id, 0, "", "", ""))), "another version", id="version"
        ),
        pytest.param(says(encode(Hello(VERSION, "x", THEIRS.peer_id, 0, "", "", ""))), "cluster", id="cluster"),
        pytest.param(says(encode(LEASE)), "another version or cluster", id="no hello"),
    ],
)
async def test_a_scheduler_that_does_not_greet_is_passed_over_and_named_once(
    quick_clock: MockClock, behaviour: Callable[[FakeScheduler, trio.SocketStream], Awaitable[None]], why: str
) -> None:
    bad, good = FakeScheduler(behaviour), FakeScheduler(friendly)
    with structlog.testing.capture_logs() as logs:
        async with serving(bad):
            async with connecting(("127.0.0.1", bad.port), ("127.0.0.1", good.port or 1)) as (client, told):
                await trio.sleep(4 * CONNECT_S)
                assert client.connected_to is None
            assert told.told == []
            async with serving(good), connecting(("127.0.0.1", bad.port), ("127.0.0.1", good.port)) as (_, told):
                await told.until(lambda: told.told == [("connected", good.address)])
    of_bad = [entry for entry in logs if entry.get("address") == bad.address]
    assert why in of_bad[0]["why"]
    assert len(of_bad) == 2  # one for each of the two clients


@pytest.mark.parametrize(
    ("garbage", "why"),
    [
        pytest.param(struct.pack(">IB", 10, 7) + b"x" * 9, "a frame of kind 7", id="unknown kind"),
        pytest.param(span_header(1, 4) + b"byte", "chunk bytes", id="chunk bytes"),
        pytest.param(struct.pack(">IB", 3, 0) + b"\xc1\xc1", "malformed", id="no msgpack"),
    ],
)
async def test_garbage_ends_the_session_and_nothing_else(garbage: bytes, why: str) -> None:
    scheduler = FakeScheduler(says(encode(THEIRS), encode(LEASE) + garbage))
    async with serving(scheduler), connecting(("127.0.0.1", scheduler.port)) as (client, told):
        told.on_connected = lambda: client.send(Leave(BLOB))
        await told.until(lambda: told.kinds[:3] == ["connected", "lost", "connected"])
    lost = next(item for item in told.told if isinstance(item, tuple) and item[0] == "lost")
    assert lost[1] == scheduler.address
    assert why in lost[2]


async def test_a_message_that_the_agent_refuses_ends_the_session(quick_clock: MockClock) -> None:
    scheduler = FakeScheduler(says(encode(THEIRS) + encode(LEASE)))
    async with serving(scheduler), connecting(("127.0.0.1", scheduler.port)) as (_client, told):
        told.refuse = True
        await told.until(lambda: told.kinds[:3] == ["connected", "lost", "connected"])


async def test_a_reset_while_much_is_being_sent_ends_the_session_and_nothing_else(quick_clock: MockClock) -> None:
    """Reader and writer both meet it; what they raise must not end the agent."""
    go = trio.Event()

    async def greet_and_reset(_scheduler: FakeScheduler, stream: trio.SocketStream) -> None:
        await stream.send_all(encode(THEIRS))
        await go.wait()
        reset(stream)

    scheduler = FakeScheduler(greet_and_reset)
    async with serving(scheduler), connecting(("127.0.0.1", scheduler.port)) as (client, told):
        await told.until(lambda: told.kinds == ["connected"])
        while len(client._pending) < MAX_QUEUED_BYTES // 2:
            client.send(Leave(BLOB))
        await trio.testing.wait_all_tasks_blocked(0.01)
        go.set()
        await told.until(lambda: told.kinds[:3] == ["connected", "lost", "connected"])


async def test_a_scheduler_that_reads_nothing_is_given_up_before_it_costs_much_memory(quick_clock: MockClock) -> None:
    async def read_nothing(_scheduler: FakeScheduler, stream: trio.SocketStream) -> None:
        await stream.send_all(encode(THEIRS))
        await trio.sleep(1000)

    scheduler = FakeScheduler(read_nothing)
    async with serving(scheduler), connecting(("127.0.0.1", scheduler.port)) as (client, told):
        await told.until(lambda: told.kinds == ["connected"])
        frame = len(encode(Leave(BLOB)))
        for _ in range(3 * MAX_QUEUED_BYTES // frame):
            client.send(Leave(BLOB))
        await told.until(lambda: "lost" in told.kinds)
        assert client.control_bytes < MAX_QUEUED_BYTES + 2 * frame
    assert "reads nothing" in str(told.told)


async def test_a_name_that_cannot_be_a_host_is_passed_over(quick_clock: MockClock) -> None:
    scheduler = FakeScheduler(friendly)
    async with serving(scheduler), connecting(("a" * 70, 1), ("127.0.0.1", scheduler.port)) as (_client, told):
        await told.until(lambda: told.told == [("connected", scheduler.address)])


async def test_no_descriptor_outlives_its_session(quick_clock: MockClock) -> None:
    before = len(os.listdir("/proc/self/fd"))
    scheduler = FakeScheduler(says(encode(THEIRS), span_header(1, 4) + b"byte"))
    async with serving(scheduler), connecting(("127.0.0.1", scheduler.port)) as (client, told):
        told.on_connected = lambda: client.send(Leave(BLOB))
        await told.until(lambda: told.kinds.count("lost") == 5)
    assert len(os.listdir("/proc/self/fd")) == before
