# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with a lab's network while programs run on it: partitions, slow links, lost packets.

Each is a block, at whose end all is as before. Packets that are cut off or lost are lost without a word: whoever waits
for them has to find out. Only for labs in namespaces.
"""

from __future__ import annotations

import shutil
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bench.lab import netns
from bench.lab.errors import LabError
from bench.lab.hosts import CORE, INTERFACE, shaper

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.lab.hosts import Host, Lab, Link

_ISLAND = "island"
"""The bridge of those who are cut off."""
_COMMAND_TIMEOUT_S = 10.0
MISSING = "packet loss needs iptables; install with: apt-get install iptables"


@contextmanager
def partitioned(lab: Lab, hosts: Sequence[Host]) -> Iterator[None]:
    """Cut these hosts off from all others; among each other they stay connected. One partition at a time."""
    assert lab.switch, "a lab in namespaces"
    netns.configure("ip", [f"link add {_ISLAND} type bridge mcast_snooping 0", f"link set {_ISLAND} up"], lab.switch)
    try:
        netns.configure("ip", [f"link set {host.port} master {_ISLAND}" for host in hosts], lab.switch)
        yield
    finally:
        back = [f"link set {host.port} master {host.rack or CORE}" for host in hosts]
        netns.configure("ip", [*back, f"link del {_ISLAND}"], lab.switch)


@contextmanager
def slowed(lab: Lab, host: Host, link: Link) -> Iterator[None]:
    """Give a host that has a shaped link another one."""
    _reshape(lab, host, link)
    try:
        yield
    finally:
        _reshape(lab, host, lab.links[host.name])


def _reshape(lab: Lab, host: Host, link: Link) -> None:
    assert link.up_mbit, "a shaped link"
    assert link.down_mbit, "both ways"
    netns.configure("tc", [f"qdisc change dev {INTERFACE} root {shaper(link.up_mbit)}"], host.namespace)
    netns.configure("tc", [f"qdisc change dev {host.port} root {shaper(link.down_mbit)}"], lab.switch)


@contextmanager
def losing(host: Host, ratio: float) -> Iterator[None]:
    """Lose this part of the packets that come to a host, acknowledgements of what it sends included.

    What the kernel passes on as one is lost as one: up to 64 KiB. (Not netem, which many kernels lack.)

    Raises:
        LabError: there is no iptables, or the kernel cannot.
    """
    rule = ("INPUT", "-i", INTERFACE, "-m", "statistic", "--mode", "random", "--probability", f"{ratio}", "-j", "DROP")
    _iptables(host, "-A", *rule)
    try:
        yield
    finally:
        _iptables(host, "-D", *rule)


def why_not_lose() -> str | None:
    """Return what to install before packets can be lost here, or None."""
    return None if shutil.which("iptables") else MISSING


def _iptables(host: Host, *arguments: str) -> None:
    if reason := why_not_lose():
        raise LabError(reason)
    command = [*host.command_prefix, "iptables", "--wait", "5", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S)
    if done.returncode:
        raise LabError(f"iptables refused to lose packets: {done.stderr.strip()}")
