# SPDX-License-Identifier: Apache-2.0
"""Finding agents by mDNS: what an announcement is worth, and two discoveries on one host's loopback."""

from __future__ import annotations

import ipaddress
import socket
import threading
from contextlib import AsyncExitStack

import pytest
import trio
from zeroconf import EventLoopBlocked, ServiceInfo, Zeroconf

from p2pdist.core.types import PeerId
from p2pdist.core.wire import PeerAddress
from p2pdist.errors import PeerUnavailable
from p2pdist.net.mdns import SERVICE, discovery, nearest, read_service
from tests.nodes import eventually

OWN, OTHER = PeerId("a" * 32), PeerId("b" * 32)
TEXTS = {"id": OTHER, "cluster": "lab", "site": "here", "rack": "r1"}


def announced(
    texts: dict[str, str | bytes | None] | None = None, *, addresses: tuple[str, ...] = ("10.0.0.2",), port: int = 5051
) -> ServiceInfo:
    return ServiceInfo(
        SERVICE,
        f"{OTHER}.{SERVICE}",
        port=port,
        parsed_addresses=list(addresses),
        properties=TEXTS if texts is None else texts,
        server=f"p2pdist-{OTHER}.local.",
    )


def test_an_announcement_says_where_an_agent_listens() -> None:
    assert read_service(announced(), "lab", OWN) == PeerAddress(OTHER, "10.0.0.2", 5051, "here", "r1")


@pytest.mark.parametrize(
    "info",
    [
        pytest.param(announced(TEXTS | {"id": OWN}), id="our own"),
        pytest.param(announced(TEXTS | {"cluster": "other"}), id="another cluster's"),
        pytest.param(announced({"id": OTHER}), id="no cluster"),
        pytest.param(announced({"cluster": "lab"}), id="no id"),
        pytest.param(announced(TEXTS | {"id": "B" * 32}), id="an id in capitals"),
        pytest.param(announced(TEXTS | {"id": "b" * 31}), id="a short id"),
        pytest.param(announced(TEXTS | {"id": None}), id="an id without a value"),
        pytest.param(announced(TEXTS | {"id": b"\xff" * 32}), id="an id of bytes"),
        pytest.param(announced(addresses=()), id="no address"),
        pytest.param(announced(port=0), id="no port"),
        pytest.param(announced({}), id="nothing"),
    ],
)
def test_other_announcements_are_passed_over(info: ServiceInfo) -> None:
    assert read_service(info, "lab", OWN) is None


def test_labels_without_values_and_long_ones_do_no_harm() -> None:
    found = read_service(announced({"id": OTHER, "cluster": "lab", "site": None, "rack": "r" * 200}), "lab", OWN)
    assert found is not None
    assert (found.site, found.rack) == ("", "r" * 64)


OWN_NETWORKS = [ipaddress.ip_interface(text) for text in ("127.0.0.1/8", "172.17.0.1/16", "10.1.0.5/24", "fd00::5/64")]


@pytest.mark.parametrize(
    ("addresses", "chosen"),
    [
        pytest.param(("172.17.0.1", "10.1.0.7"), "10.1.0.7", id="not what every host with containers has"),
        pytest.param(("192.168.9.1", "10.1.0.7"), "10.1.0.7", id="our network first"),
        pytest.param(("172.17.0.1", "192.168.9.1"), "192.168.9.1", id="another network before our own address"),
        pytest.param(("10.1.0.5",), "10.1.0.5", id="a second agent on this host"),
        pytest.param(("192.168.9.1", "192.168.8.1"), "192.168.9.1", id="the first of equals"),
        pytest.param(("192.168.9.1", "fd00::7"), "fd00::7", id="IPv6 in our network"),
    ],
)
def test_of_several_addresses_the_nearest_is_dialled(addresses: tuple[str, ...], chosen: str) -> None:
    assert nearest(addresses, OWN_NETWORKS) == chosen
    found = read_service(announced(addresses=addresses), "lab", OWN, OWN_NETWORKS)
    assert found is not None
    assert found.host == chosen


# ------------------------------------------------------------------ on this host


def agent(number: int) -> PeerAddress:
    return PeerAddress(PeerId(f"{number:032x}"), "127.0.0.1", 6000 + number, "here")


@pytest.fixture
def multicast() -> None:
    """Skip where loopback has no multicast: there only the clear error can be tested."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            membership = socket.inet_aton("224.0.0.251") + socket.inet_aton("127.0.0.1")
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        except OSError as error:
            pytest.skip(f"loopback has no multicast: {error}")


async def test_agents_of_a_cluster_find_each_other_and_no_others(multicast: None) -> None:
    found: dict[int, set[PeerAddress]] = {number: set() for number in (1, 2, 3)}
    async with AsyncExitStack() as stack:
        for number, cluster in ((1, "lab"), (2, "lab"), (3, "other")):
            await stack.enter_async_context(discovery(agent(number), cluster, found[number].add))
        await eventually(lambda: found[1] == {agent(2)} and found[2] == {agent(1)})
        assert found[3] == set()


async def test_a_cancelled_discovery_leaves_no_thread(multicast: None) -> None:
    with trio.move_on_after(0.1) as scope:
        async with discovery(agent(1), "lab", lambda _address: None):
            assert zeroconf_threads()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    await trio.to_thread.run_sync(wait_for_threads)
    assert not zeroconf_threads()


async def test_closing_that_hangs_is_not_waited_for(multicast: None, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = threading.Event()
    close = Zeroconf.close

    def hang(zc: Zeroconf) -> None:
        let_go.wait(60)
        close(zc)

    monkeypatch.setattr("p2pdist.net.mdns.CLOSE_S", 0.2)
    monkeypatch.setattr(Zeroconf, "close", hang)
    with trio.fail_after(30):
        async with discovery(agent(1), "lab", lambda _address: None):
            pass
    let_go.set()
    await trio.to_thread.run_sync(wait_for_threads)


def zeroconf_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "zeroconf" in thread.name or "_run_loop" in thread.name]


def wait_for_threads() -> None:
    for thread in threading.enumerate():
        if thread.name in zeroconf_threads():
            thread.join(20)


@pytest.mark.parametrize("error", [OSError(19, "No such device"), EventLoopBlocked()], ids=["no multicast", "blocked"])
async def test_a_host_without_multicast_is_told_so(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_settings: object) -> None:
        raise error

    monkeypatch.setattr("p2pdist.net.mdns.Zeroconf", fail)
    with pytest.raises(PeerUnavailable, match=r"mDNS is off: .+"):
        async with discovery(agent(1), "lab", lambda _address: None):
            pass


async def test_a_name_is_announced_by_the_addresses_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name cannot be announced as an address; this machine has none to announce in its place."""
    monkeypatch.setattr("p2pdist.net.mdns._own_interfaces", lambda: [ipaddress.ip_interface("127.0.0.1/8")])
    with pytest.raises(PeerUnavailable, match="no address but loopback"):
        async with discovery(PeerAddress(OWN, "node7.lan", 5051), "lab", lambda _address: None):
            pass
