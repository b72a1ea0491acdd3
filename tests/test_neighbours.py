# SPDX-License-Identifier: Apache-2.0
"""Who is connected to whom: two nodes that dial each other, ones that come back, and ones that are not wanted."""

from __future__ import annotations

import itertools
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import trio

from p2pdist.core.events import SchedulerConnected
from p2pdist.core.peerbook import MESH_PER_DEGREE
from p2pdist.core.rate import TokenBucket
from p2pdist.core.reputation import BAN_S, Offence
from p2pdist.core.types import PeerId
from p2pdist.core.wire import (
    MESSAGE_BYTES,
    SPAN_BYTES,
    VERSION,
    Decoder,
    Grant,
    Hello,
    PeerAddress,
    Room,
    encode,
    span_header,
)
from p2pdist.neighbours import FIRST_PAUSE_S, LAST_PAUSE_S, MAX_GREETING, MAX_PER_ADDRESS, SCHEDULER_TRIES, YOUNG_S
from p2pdist.net.peer_link import FLOOD_BYTES
from p2pdist.store.memory import MemoryStore
from tests.nodes import FakeOrigin, Node, eventually, no_descriptor_left, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from trio.testing import MockClock


@pytest.fixture
def make() -> AsyncIterator[Callable[..., Node]]:
    """Yield a function that makes nodes with an origin that has nothing."""
    stores: list[MemoryStore] = []

    def make(number: int, **settings: int) -> Node:
        stores.append(MemoryStore(max_bytes=1 << 20))
        return Node(number, FakeOrigin(), stores[-1], ticks=False, **settings)

    yield make
    for store in stores:
        store.close()


def hello_of(number: int, port: int = 1) -> Hello:
    return Hello(VERSION, "lab", PeerId(f"{number:032x}"), port, "", "", "")


async def dial(node: Node, hello: Hello) -> trio.SocketStream:
    """Connect to a node as a peer would; return the connection once the node has said hello."""
    stream = await trio.open_tcp_stream("127.0.0.1", node.port)
    await stream.send_all(encode(hello))
    items: list[object] = []
    decoder = Decoder()
    while not items and (data := await stream.receive_some(4096)):
        items = list(decoder.feed(memoryview(data)))
    return stream


async def is_closed(stream: trio.SocketStream) -> bool:
    """Read until the node has closed; whatever it says before does not matter."""
    with trio.fail_after(300):
        try:
            while await stream.receive_some(65536):
                pass
        except trio.BrokenResourceError:
            pass
    return True


# ------------------------------------------------------------ one connection


@pytest.mark.parametrize("first", [1, 2], ids=["the smaller id first", "the greater id first"])
async def test_nodes_that_dial_each_other_at_once_keep_one_connection(
    make: Callable[..., Node], first: int, quick_clock: MockClock
) -> None:
    nodes = [make(1), make(2)]
    async with running(*nodes):
        order = nodes if first == 1 else nodes[::-1]
        order[0].meet(order[1])
        order[1].meet(order[0])
        await eventually(lambda: nodes[0].peers == {2} and nodes[1].peers == {1})
        await trio.sleep(30)
        ours, theirs = nodes[0].exchange.links[nodes[1].peer_id], nodes[1].exchange.links[nodes[0].peer_id]
        assert ours.dialled != theirs.dialled
        assert list(nodes[0].machine.book.peers) == [nodes[1].peer_id]
        assert list(nodes[1].machine.book.peers) == [nodes[0].peer_id]


@pytest.mark.parametrize("came_first", ["theirs", "ours"])
async def test_of_two_young_connections_both_sides_keep_the_one_that_the_smaller_id_dialled(
    make: Callable[..., Node], came_first: str, quick_clock: MockClock
) -> None:
    """Node 2 talks to a peer 1, by hand: one connection each way, in either order."""
    node = make(2)
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    port = listener.socket.getsockname()[1]
    async with running(node), listener:
        if came_first == "theirs":
            theirs = await dial(node, hello_of(1))
        node.neighbourhood.learn(PeerAddress(PeerId(f"{1:032x}"), "127.0.0.1", port), "mdns")
        if came_first == "ours":
            ours = await listener.accept()
            await ours.send_all(encode(hello_of(1)))
            await eventually(lambda: node.peers == {1})
            theirs = await dial(node, hello_of(1))
            assert await is_closed(ours)
            await ours.aclose()
        await eventually(lambda: node.peers == {1})
        await trio.sleep(10)
        assert [link.dialled for link in node.exchange.links.values()] == [False]
        await theirs.aclose()


async def test_a_young_connection_that_the_greater_id_dialled_gives_way_and_takes_nothing_with_it(
    make: Callable[..., Node], quick_clock: MockClock
) -> None:
    """Node 1 has a connection to peer 2 that it dialled itself: one that 2 dials meanwhile is refused."""
    node = make(1)
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    async with running(node), listener:
        port = listener.socket.getsockname()[1]
        node.neighbourhood.learn(PeerAddress(PeerId(f"{2:032x}"), "127.0.0.1", port), "mdns")
        ours = await listener.accept()
        await ours.send_all(encode(hello_of(2)))
        await eventually(lambda: node.peers == {2})
        theirs = await dial(node, hello_of(2))
        assert await is_closed(theirs)
        await theirs.aclose()
        assert [link.dialled for link in node.exchange.links.values()] == [True]
        await ours.aclose()


@pytest.mark.parametrize("number", [1, 3], ids=["smaller", "greater"])
async def test_a_peer_that_comes_back_takes_the_place_of_its_old_connection(
    make: Callable[..., Node], number: int, quick_clock: MockClock
) -> None:
    """Its host crashed: the old connection looks alive still."""
    node = make(2)
    async with running(node):
        old = await dial(node, hello_of(number))
        await eventually(lambda: node.peers == {number})
        await trio.sleep(YOUNG_S + 1)
        first = next(iter(node.exchange.links.values()))
        new = await dial(node, hello_of(number))
        assert await is_closed(old)
        await eventually(lambda: node.peers == {number})
        assert next(iter(node.exchange.links.values())) is not first
        await old.aclose()
        await new.aclose()
        await eventually(lambda: not node.peers and not node.machine.book.peers)


async def test_a_peer_that_comes_back_is_let_in_though_we_had_dialled_it(
    make: Callable[..., Node], quick_clock: MockClock
) -> None:
    node = make(1)
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    async with running(node), listener:
        port = listener.socket.getsockname()[1]
        node.neighbourhood.learn(PeerAddress(PeerId(f"{2:032x}"), "127.0.0.1", port), "mdns")
        old = await listener.accept()
        await old.send_all(encode(hello_of(2)))
        await eventually(lambda: node.peers == {2})
        await trio.sleep(YOUNG_S + 1)
        new = await dial(node, hello_of(2))
        assert await is_closed(old)
        assert [link.dialled for link in node.exchange.links.values()] == [False]
        await old.aclose()
        await new.aclose()


# ------------------------------------------------------------------- refusals


async def test_a_node_does_not_dial_itself(make: Callable[..., Node], quick_clock: MockClock) -> None:
    node = make(1)
    async with running(node):
        node.meet(node)
        assert not node.neighbourhood.known
        stream = await dial(node, node.hello())
        assert await is_closed(stream)
        await stream.aclose()
        assert not node.peers


async def test_another_agent_than_the_expected_one_is_refused_and_forgotten(
    make: Callable[..., Node], quick_clock: MockClock
) -> None:
    """Where an address was given to another host, whoever lives there now is not who was meant."""
    node, other = make(1), make(2)
    async with running(node, other):
        stranger = PeerId("f" * 32)
        node.neighbourhood.learn(PeerAddress(stranger, "127.0.0.1", other.port), "mdns")
        await eventually(lambda: stranger not in node.neighbourhood.known)
        assert not node.peers


async def test_a_banned_peer_is_neither_let_in_nor_dialled(make: Callable[..., Node], quick_clock: MockClock) -> None:
    node, other = make(1), make(2)
    async with running(node, other):
        node.machine.book.reputation.offended(other.peer_id, Offence.CORRUPT, trio.current_time())
        other.meet(node)
        node.meet(other)
        await trio.sleep(BAN_S - 5)
        assert not node.peers
        await trio.sleep(100)
        assert node.peers == {2}


async def test_a_peer_that_breaks_the_protocol_is_banned_and_comes_back_later(
    make: Callable[..., Node], quick_clock: MockClock
) -> None:
    node, other = make(1), make(2)
    async with running(node, other):
        other.meet(node)
        await eventually(lambda: bool(node.peers))
        other.exchange.links[node.peer_id].send(hello_of(2))
        await eventually(lambda: node.machine.book.is_banned(other.peer_id, trio.current_time()))
        assert node.machine.book.reputation.bans == {Offence.PROTOCOL: 1}
        await eventually(lambda: node.peers == {2})
        assert not node.machine.book.is_banned(other.peer_id, trio.current_time())


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="HTTP"),
        pytest.param(b"", id="nothing"),
        pytest.param(encode(Hello(VERSION + 1, "lab", PeerId("b" * 32), 1, "", "", "")), id="another version"),
        pytest.param(encode(Hello(VERSION, "other", PeerId("b" * 32), 1, "", "", "")), id="another cluster"),
        pytest.param(encode(hello_of(2)) + span_header(1, 4) + b"byte", id="unasked bytes"),
        pytest.param(encode(hello_of(2)) + encode(hello_of(2)), id="two hellos"),
    ],
)
@pytest.mark.parametrize("ending", ["waits", "closes", "resets"])
async def test_whatever_a_stranger_says_ends_its_connection_and_nothing_else(
    make: Callable[..., Node], said: bytes, ending: str, quick_clock: MockClock
) -> None:
    node, other = make(1), make(3)
    async with running(node, other):
        with no_descriptor_left():
            stream = await trio.open_tcp_stream("127.0.0.1", node.port)
            await stream.receive_some(4096)
            if said:
                await stream.send_all(said)
            if ending == "resets":
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if ending == "waits":
                assert await is_closed(stream)
            await stream.aclose()
            await trio.sleep(10)
        assert not node.peers
        node.meet(other)
        await eventually(lambda: node.peers == {3})


# ------------------------------------------------------------------- how many


async def test_dialled_and_inbound_peers_together_stay_within_the_bound(
    make: Callable[..., Node], quick_clock: MockClock
) -> None:
    node = make(1, degree=4, max_peers=6)
    others = [make(number) for number in range(2, 14)]
    async with running(node, *others):
        node.exchange.feed(SchedulerConnected())
        node.meet(*others)
        await trio.sleep(10)
        assert len(node.peers) == 4
        for other in others:
            other.meet(node)
        await trio.sleep(30)
        assert len(node.peers) == 6


async def test_without_a_scheduler_more_are_dialled_but_room_is_left_for_those_who_come_later(
    make: Callable[..., Node], quick_clock: MockClock
) -> None:
    node = make(1, degree=1, max_peers=2 * MESH_PER_DEGREE)
    others = [make(number) for number in range(2, 14)]
    async with running(node, *others):
        node.meet(*others)
        await trio.sleep(10)
        assert len(node.peers) == MESH_PER_DEGREE


async def test_peers_that_the_scheduler_names_are_dialled_beyond_the_degree_and_within_the_bound(
    make: Callable[..., Node], quick_clock: MockClock
) -> None:
    node = make(1, degree=2, max_peers=5)
    others = [make(number) for number in range(2, 12)]
    async with running(node, *others):
        for other in others:
            node.neighbourhood.learn(other.address, "scheduler")
        await trio.sleep(10)
        assert len(node.peers) == 5
        assert all(len(other.peers) <= 1 for other in others)


async def test_a_known_peer_may_come_back_when_all_places_are_taken(
    make: Callable[..., Node], quick_clock: MockClock
) -> None:
    node = make(1, max_peers=1)
    async with running(node):
        old = await dial(node, hello_of(2))
        await eventually(lambda: node.peers == {2})
        await trio.sleep(YOUNG_S + 1)
        refused = await dial(node, hello_of(3))
        assert await is_closed(refused)
        new = await dial(node, hello_of(2))
        assert await is_closed(old)
        assert node.peers == {2}
        for stream in (old, refused, new):
            await stream.aclose()


async def test_strangers_that_say_nothing_are_closed_before_they_are_many(
    make: Callable[..., Node], quick_clock: MockClock
) -> None:
    node = make(1)
    async with running(node):
        silent = [await trio.open_tcp_stream("127.0.0.1", node.port) for _ in range(MAX_GREETING)]
        for stream in silent:
            assert await stream.receive_some(4096)
        one_more = await trio.open_tcp_stream("127.0.0.1", node.port)
        assert await is_closed(one_more)
        await trio.sleep(10)
        again = await dial(node, hello_of(2))
        await eventually(lambda: node.peers == {2})
        for stream in (*silent, one_more, again):
            await stream.aclose()


async def test_one_address_does_not_take_all_places(make: Callable[..., Node], quick_clock: MockClock) -> None:
    node = make(1)
    node.neighbourhood.telling = lambda host: host
    async with running(node):
        silent = [await trio.open_tcp_stream("127.0.0.1", node.port) for _ in range(MAX_PER_ADDRESS)]
        for stream in silent:
            assert await stream.receive_some(4096)
        one_more = await trio.open_tcp_stream("127.0.0.1", node.port)
        assert await is_closed(one_more)
        for stream in silent:
            await stream.aclose()
        await trio.sleep(10)
        greeted = [await dial(node, hello_of(number)) for number in range(2, 2 + MAX_PER_ADDRESS)]
        await eventually(lambda: len(node.peers) == MAX_PER_ADDRESS)
        refused = await dial(node, hello_of(99))
        assert await is_closed(refused)
        assert not node.neighbourhood._greeting
        for stream in (*greeted, one_more, refused):
            await stream.aclose()


async def test_a_flood_is_an_offence_of_its_own(make: Callable[..., Node], quick_clock: MockClock) -> None:
    node = make(1)
    async with running(node):
        stream = await dial(node, hello_of(2))
        with suppress(trio.BrokenResourceError):
            for _ in range(2 * FLOOD_BYTES // (1000 * MESSAGE_BYTES)):
                await stream.send_all(encode(Room()) * 1000)
        await eventually(lambda: bool(node.machine.book.reputation.bans))
        assert node.machine.book.reputation.bans == {Offence.FLOOD: 1}
        await stream.aclose()


# --------------------------------------------------------------------- pauses


async def test_the_pauses_before_a_peer_is_tried_again_grow_up_to_a_bound(
    make: Callable[..., Node], quick_clock: MockClock
) -> None:
    tried_at: list[float] = []

    async def hang_up(stream: trio.SocketStream) -> None:
        tried_at.append(trio.current_time())
        await stream.aclose()

    node = make(1)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with running(node), trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, hang_up, listeners)
        port = listeners[0].socket.getsockname()[1]
        node.neighbourhood.learn(PeerAddress(PeerId("f" * 32), "127.0.0.1", port), "mdns")
        await trio.sleep(400)
        nursery.cancel_scope.cancel()
    pauses = [later - earlier for earlier, later in itertools.pairwise(tried_at)]
    assert pauses == sorted(pauses)
    assert pauses[0] >= 2 * FIRST_PAUSE_S
    assert LAST_PAUSE_S <= pauses[-1] < LAST_PAUSE_S + 5


async def test_a_peer_named_by_the_scheduler_alone_is_forgotten_until_it_is_named_again(
    make: Callable[..., Node], quick_clock: MockClock
) -> None:
    node, other = make(1), make(2)
    async with running(node):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            other.port = listener.getsockname()[1]
        node.neighbourhood.learn(other.address, "scheduler")
        await trio.sleep(LAST_PAUSE_S * SCHEDULER_TRIES)
        assert not node.neighbourhood.known
        async with running(other):
            node.neighbourhood.learn(other.address, "scheduler")
            await eventually(lambda: node.peers == {2})


async def test_news_of_a_peer_end_its_pause(make: Callable[..., Node], quick_clock: MockClock) -> None:
    node, other = make(1), make(2)
    async with running(node):
        node.neighbourhood.learn(PeerAddress(other.peer_id, "127.0.0.1", 1), "mdns")
        await trio.sleep(200)
        began = trio.current_time()
        async with running(other):
            node.meet(other)
            await eventually(lambda: node.peers == {2})
    assert trio.current_time() - began < FIRST_PAUSE_S


async def test_a_host_that_cannot_be_does_no_harm(make: Callable[..., Node], quick_clock: MockClock) -> None:
    node, other = make(1), make(2)
    async with running(node, other):
        node.neighbourhood.learn(PeerAddress(PeerId("f" * 32), "a" * 70, 1), "scheduler")
        node.neighbourhood.learn(PeerAddress(PeerId("e" * 32), "a\0b", 1), "scheduler")
        await trio.sleep(5)
        node.meet(other)
        await eventually(lambda: node.peers == {2})


async def test_a_lost_peer_is_dialled_again(make: Callable[..., Node], quick_clock: MockClock) -> None:
    node, other = make(1), make(2)
    async with running(node):
        async with running(other):
            node.meet(other)
            await eventually(lambda: node.peers == {2})
        await eventually(lambda: not node.peers)
        again = make(2)
        again.port = other.port
        async with running(again):
            await eventually(lambda: node.peers == {2})


async def test_the_end_of_the_agent_closes_every_connection(make: Callable[..., Node], quick_clock: MockClock) -> None:
    nodes = [make(number) for number in range(1, 6)]
    await trio.to_thread.run_sync(lambda: None)
    with no_descriptor_left():
        async with running(*nodes):
            for node in nodes:
                node.meet(*nodes)
            await eventually(lambda: all(len(node.peers) == 4 for node in nodes))
            stream = await dial(nodes[0], hello_of(9))
            await stream.send_all(encode(Grant(1)))
            await stream.aclose()


# --------------------------------------------------------------- slow uplink


async def test_a_slow_uplink_holds_all_links_the_later_ones_too_unless_the_settings_are_tighter(
    make: Callable[..., Node], quick_clock: MockClock
) -> None:
    one, two = make(1), make(2)
    hood, links = one.neighbourhood, one.exchange.links
    async with running(one, two):
        hood._found(200_000)
        one.meet(two)
        await eventually(lambda: one.peers == {2})
        (link,) = links.values()
        assert link.limit is not None
        assert link.limit.bytes_per_s == 200_000
        hood._found(100_000)
        assert link.limit.bytes_per_s == 100_000
        hood.limit_uploads(TokenBucket(50_000, SPAN_BYTES))
        assert link.limit.bytes_per_s == 50_000
        hood.limit_uploads(None)
        assert link.limit.bytes_per_s == 100_000
        hood._found(0)
        assert link.limit is None
