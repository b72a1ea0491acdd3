# SPDX-License-Identifier: Apache-2.0
"""What a lab's network does while it is disturbed, seen from sockets on its hosts."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from bench.lab import netns
from bench.lab.hosts import Host, Link, namespace_lab
from bench.lab.outages import losing

if TYPE_CHECKING:
    from collections.abc import Callable

_LAB = """
import json, socket, subprocess
from contextlib import ExitStack
from bench.lab import outages
from bench.lab.hosts import Link, namespace_lab

def datagrams(sender, receiver, count=3):
    with netns.entered(receiver.namespace):
        listening = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with netns.entered(sender.namespace):
        sending = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listening.bind((receiver.address, 0))
    listening.settimeout(0.5)
    seen = 0
    with listening, sending:
        for _ in range(count):
            try:
                sending.sendto(b"x", listening.getsockname())
                listening.recv(1)
                seen += 1
            except TimeoutError:
                return 0
    return seen

def rates(host, lab):
    asked = (["tc", "-n", host.namespace, "qdisc"], ["tc", "-n", lab.switch, "qdisc", "show", "dev", host.port])
    said = [subprocess.run(command, capture_output=True, text=True).stdout for command in asked]
    return [line.split("rate ")[1].split()[0] for line in said]

with namespace_lab({"a": Link(20, 30), "b": Link(20, 30), "c": Link(20, 30)}) as lab:
    a, b, c = lab["a"], lab["b"], lab["c"]
    said = {"before": datagrams(a, b)}
    with outages.partitioned(lab, [b, c]):
        said["cut off"], said["on the island"] = datagrams(a, b), datagrams(b, c)
    said["after"] = datagrams(a, b)
    with outages.slowed(lab, a, Link(2, 3)):
        said["slow"] = rates(a, lab)
    said["quick"] = rates(a, lab)
    print(json.dumps(said))
"""


@pytest.mark.real
def test_hosts_are_cut_off_slowed_and_mended(run_in_lab: Callable[[str], str]) -> None:
    said = json.loads(run_in_lab(_LAB))
    assert said == {
        "before": 3,
        "cut off": 0,
        "on the island": 3,
        "after": 3,
        "slow": ["2Mbit", "3Mbit"],
        "quick": ["20Mbit", "30Mbit"],
    }


@pytest.mark.real
def test_a_host_loses_the_part_that_it_should_and_none_afterwards(
    require: Callable[[str, str], str], require_namespaces: None
) -> None:
    require("iptables", "iptables")
    with namespace_lab({"a": Link(), "b": Link()}) as lab:
        with losing(lab["b"], 0.5):
            assert 20 < received(lab["a"], lab["b"]) < 180
        assert received(lab["a"], lab["b"]) == 200


def received(sender: Host, receiver: Host) -> int:
    """Return how many of 200 datagrams arrive."""
    with netns.entered(str(receiver.namespace)):
        listening = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with netns.entered(str(sender.namespace)):
        sending = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with listening, sending:
        listening.bind((receiver.address, 0))
        for number in range(200):
            sending.sendto(bytes((number,)), listening.getsockname())
        listening.setblocking(False)
        count = 0
        with suppress(BlockingIOError):
            while listening.recv(1):
                count += 1
    return count
