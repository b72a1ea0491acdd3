# SPDX-License-Identifier: Apache-2.0
"""Hosts with shaped links on one switch, inside this machine.

`namespace_lab` gives each host a network namespace and a veth pair to a switch namespace with a bridge. Links are
shaped both ways with tbf: what a host sends on its own end, what it receives on the switch's end. `loopback_lab`
has the same face where namespaces are not allowed: hosts are loopback addresses and nothing is shaped. Either
leaves nothing behind, however its block ends.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
from contextlib import contextmanager
from dataclasses import dataclass
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

_INTERFACE = "eth0"
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
class Host:
    """One host: `address` is known to all others, `local_address` can be reached from the host alone."""

    name: str
    address: str
    local_address: str
    namespace: str | None

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
        return netns.transmitted_bytes(self.namespace, _INTERFACE) if self.namespace else None


@dataclass(frozen=True, slots=True)
class Lab:
    hosts: Mapping[str, Host]
    shaped: bool

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]


@contextmanager
def open_lab(links: Mapping[str, Link], *, shaped: bool) -> Iterator[Lab]:
    """Give a lab with one host for each link; `shaped` as `netns.why_not` allows it."""
    with namespace_lab(links) if shaped else loopback_lab(list(links)) as lab:
        yield lab


@contextmanager
def namespace_lab(links: Mapping[str, Link]) -> Iterator[Lab]:
    """Give hosts in namespaces of their own; also removes what labs that died left.

    Raises:
        LabError: the kernel refuses.
    """
    netns.sweep()
    name = ownership.new_name()
    switch = f"{name}-switch"
    hosts = {
        host: Host(host, str(_NETWORK[number]), "127.0.0.1", f"{name}-{host}")
        for number, host in enumerate(links, start=1)
    }
    namespaces = [switch, *(host.namespace for host in hosts.values() if host.namespace)]
    try:
        netns.configure("ip", [f"netns add {namespace}" for namespace in namespaces])
        _build_switch(switch, hosts)
        for port, (host, link) in enumerate(links.items()):
            _connect(hosts[host], link, switch, port)
        yield Lab(hosts, shaped=True)
    finally:
        netns.delete(namespaces)


@contextmanager
def loopback_lab(names: Sequence[str]) -> Iterator[Lab]:
    """Give hosts that are addresses of the loopback interface, unshaped."""
    first = secrets.randbelow(_LOOPBACK.num_addresses // _LOOPBACK_HOSTS) * _LOOPBACK_HOSTS
    addresses = {name: str(_LOOPBACK[first + number]) for number, name in enumerate(names, start=1)}
    yield Lab({name: Host(name, address, address, None) for name, address in addresses.items()}, shaped=False)


def _build_switch(switch: str, hosts: Mapping[str, Host]) -> None:
    # Without snooping the bridge passes multicast, and so mDNS, to every port from the first second.
    ports = [
        f"link add port{port} type veth peer name {_INTERFACE} netns {host.namespace}"
        for port, host in enumerate(hosts.values())
    ]
    plugs = [f"link set port{port} master bridge up" for port in range(len(hosts))]
    bridge = ["link add bridge type bridge mcast_snooping 0", "link set bridge up"]
    netns.configure("ip", [*bridge, *ports, *plugs], switch)


def _connect(host: Host, link: Link, switch: str, port: int) -> None:
    netns.configure(
        "ip",
        [
            "link set lo up",
            f"addr add {host.address}/{_NETWORK.prefixlen} dev {_INTERFACE}",
            f"link set {_INTERFACE} up",
            f"route add 224.0.0.0/4 dev {_INTERFACE}",
        ],
        host.namespace,
    )
    if link.up_mbit is not None:
        netns.configure("tc", [_shaper(_INTERFACE, link.up_mbit)], host.namespace)
    if link.down_mbit is not None:
        netns.configure("tc", [_shaper(f"port{port}", link.down_mbit)], switch)


def _shaper(interface: str, mbit: float) -> str:
    queue_bytes = max(_QUEUE_MIN_BYTES, int(mbit * 1e6 / 8 * _QUEUE_S))
    return f"qdisc add dev {interface} root tbf rate {mbit}mbit burst {BURST_BYTES} limit {BURST_BYTES + queue_bytes}"
