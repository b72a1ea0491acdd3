# SPDX-License-Identifier: Apache-2.0
"""Hosts with shaped links on one switch, inside this machine.

`namespace_lab` gives each host a network namespace and a veth pair to a switch namespace with a bridge. Links are
shaped both ways with tbf: what a host sends on its own end, what it receives on the switch's end. Hosts of a rack
are on a bridge of their own, which reaches the first over one more veth pair: the rack's uplink, shaped both ways
and shared. `loopback_lab` has the same face where namespaces are not allowed: hosts are loopback addresses and
nothing is shaped. Either leaves nothing behind, however its block ends.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.lab import netns, ownership

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

BURST_BYTES = 256 << 10
"""The bucket of each shaper. A smaller one splits the kernel's 64 KiB segments: with 64 KiB a 2-core machine had 1%
idle CPU at 1.4 Gbit/s, with 256 KiB 75% at 1.8. It is also what an idle link carries at once, for free."""

_QUEUE_S = 0.05
_QUEUE_MIN_BYTES = 256 << 10
"""What may wait behind the bucket: 50 ms at the link's rate, about what a switch port holds, but no less than four
segments, or a slow link would drop what one sender writes at once."""

INTERFACE = "eth0"
CORE = "core"
"""The bridge that hosts without a rack, and the racks' uplinks, are plugged into."""

_NETWORK = ipaddress.IPv4Network("10.66.0.0/16")
_LOOPBACK = ipaddress.IPv4Network("127.64.0.0/10")
"""Each loopback lab takes 256 addresses of these at random, so that two may run at once."""

_LOOPBACK_HOSTS = 256


@dataclass(frozen=True, slots=True)
class Link:
    """What a host may send (up) and receive (down), in Mbit/s on the wire; None for unshaped."""

    up_mbit: float | None = None
    down_mbit: float | None = None


@dataclass(frozen=True, slots=True)
class Rack:
    """Hosts behind one shared uplink; `down_mbit` of it is what the rack receives."""

    hosts: tuple[str, ...]
    uplink: Link


@dataclass(frozen=True, slots=True)
class Host:
    """One host: `address` is known to all others, `local_address` can be reached from the host alone."""

    name: str
    address: str
    local_address: str
    namespace: str | None
    rack: str | None = None
    port: str | None = None
    """The switch's end of its link, where there is one."""

    @property
    def command_prefix(self) -> tuple[str, ...]:
        """What runs a program on this host when put before its command."""
        return netns.enter_command(self.namespace) if self.namespace else ()

    def socket(self) -> socket.socket:
        """Return a new IPv4 TCP socket of this host."""
        if self.namespace:
            return netns.tcp_socket(self.namespace)
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM)

    def transmitted_bytes(self) -> int | None:
        """Return the bytes that left this host, headers included, or None where nothing counts them."""
        return netns.transmitted_bytes(self.namespace, INTERFACE) if self.namespace else None


@dataclass(frozen=True, slots=True)
class Lab:
    hosts: Mapping[str, Host]
    shaped: bool
    links: Mapping[str, Link] = field(default_factory=dict)
    racks: Mapping[str, Rack] = field(default_factory=dict)
    switch: str | None = None
    """The namespace of the bridges, where there is one."""

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def rack_received_bytes(self) -> dict[str, int]:
        """Return for each rack the bytes that came down its uplink, headers included."""
        if self.switch is None:
            return {}
        return {rack: netns.transmitted_bytes(self.switch, f"to-{rack}") for rack in self.racks}


@contextmanager
def open_lab(links: Mapping[str, Link], *, shaped: bool, racks: Mapping[str, Rack] | None = None) -> Iterator[Lab]:
    """Give a lab with one host for each link; `shaped` as `netns.why_not` allows it. Without it racks have no uplink.

    Args:
        racks: by name, of at most ten letters; hosts that are in none are on the core switch.
    """
    with namespace_lab(links, racks) if shaped else loopback_lab(list(links)) as lab:
        yield lab


@contextmanager
def namespace_lab(links: Mapping[str, Link], racks: Mapping[str, Rack] | None = None) -> Iterator[Lab]:
    """Give hosts in namespaces of their own; also removes what labs that died left.

    Raises:
        LabError: the kernel refuses.
    """
    netns.sweep()
    name = ownership.new_name()
    switch = f"{name}-switch"
    rack_of = {host: rack for rack, content in (racks or {}).items() for host in content.hosts}
    hosts = {
        host: Host(host, str(_NETWORK[number]), "127.0.0.1", f"{name}-{host}", rack_of.get(host), f"port{number}")
        for number, host in enumerate(links, start=1)
    }
    namespaces = [switch, *(host.namespace for host in hosts.values() if host.namespace)]
    try:
        netns.configure("ip", [f"netns add {namespace}" for namespace in namespaces])
        _build_switch(switch, hosts, racks or {})
        for host, link in links.items():
            _connect(hosts[host], link, switch)
        yield Lab(hosts, shaped=True, links=links, racks=racks or {}, switch=switch)
    finally:
        netns.delete(namespaces)


@contextmanager
def loopback_lab(names: Sequence[str]) -> Iterator[Lab]:
    """Give hosts that are addresses of the loopback interface, unshaped."""
    first = secrets.randbelow(_LOOPBACK.num_addresses // _LOOPBACK_HOSTS) * _LOOPBACK_HOSTS
    addresses = {name: str(_LOOPBACK[first + number]) for number, name in enumerate(names, start=1)}
    yield Lab({name: Host(name, address, address, None) for name, address in addresses.items()}, shaped=False)


def _build_switch(switch: str, hosts: Mapping[str, Host], racks: Mapping[str, Rack]) -> None:
    # Without snooping the bridges pass multicast, and so mDNS, to every port from the first second.
    bridges = [
        line
        for bridge in (CORE, *racks)
        for line in (f"link add {bridge} type bridge mcast_snooping 0", f"link set {bridge} up")
    ]
    uplinks = [
        line
        for rack in racks
        for line in (
            f"link add to-{rack} type veth peer name from-{rack}",
            f"link set to-{rack} master {CORE} up",
            f"link set from-{rack} master {rack} up",
        )
    ]
    ports = [f"link add {host.port} type veth peer name {INTERFACE} netns {host.namespace}" for host in hosts.values()]
    plugs = [f"link set {host.port} master {host.rack or CORE} up" for host in hosts.values()]
    netns.configure("ip", [*bridges, *uplinks, *ports, *plugs], switch)
    for rack, content in racks.items():
        _shape(switch, f"to-{rack}", content.uplink.down_mbit)
        _shape(switch, f"from-{rack}", content.uplink.up_mbit)


def _connect(host: Host, link: Link, switch: str) -> None:
    netns.configure(
        "ip",
        [
            "link set lo up",
            f"addr add {host.address}/{_NETWORK.prefixlen} dev {INTERFACE}",
            f"link set {INTERFACE} up",
            f"route add 224.0.0.0/4 dev {INTERFACE}",
        ],
        host.namespace,
    )
    assert host.namespace, "hosts of a namespace lab have one"
    assert host.port, "and a port"
    _shape(host.namespace, INTERFACE, link.up_mbit)
    _shape(switch, host.port, link.down_mbit)


def _shape(namespace: str, interface: str, mbit: float | None) -> None:
    if mbit is not None:
        netns.configure("tc", [f"qdisc add dev {interface} root {shaper(mbit)}"], namespace)


def shaper(mbit: float) -> str:
    """Return the qdisc that limits an interface, in tc's words."""
    queue_bytes = max(_QUEUE_MIN_BYTES, int(mbit * 1e6 / 8 * _QUEUE_S))
    return f"tbf rate {mbit}mbit burst {BURST_BYTES} limit {BURST_BYTES + queue_bytes}"
