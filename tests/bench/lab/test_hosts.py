# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

import pytest

from bench.lab.hosts import loopback_lab

if TYPE_CHECKING:
    from collections.abc import Callable

_LAB = """
import json, os, socket, struct, subprocess
from bench.lab.hosts import Link, namespace_lab

def shapers(namespace):
    return subprocess.run(["tc", "-n", namespace, "qdisc"], capture_output=True, text=True).stdout.count("tbf")

def multicast(sender, receiver):
    with netns.entered(receiver.namespace):
        listening = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listening.settimeout(10)
    listening.bind(("", 5353))
    group = socket.inet_aton("224.0.0.251") + socket.inet_aton(receiver.address)
    listening.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
    with netns.entered(sender.namespace):
        sending = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sending.sendto(b"here", ("224.0.0.251", 5353))
    return listening.recv(100).decode()

home = os.readlink("/proc/thread-self/ns/net")
with namespace_lab({"a": Link(20, 30), "b": Link(20, 30), "c": Link()}) as lab:
    a, b, c = lab["a"], lab["b"], lab["c"]
    server = a.socket()
    server.bind((a.address, 0))
    server.listen()
    client = b.socket()
    client.settimeout(10)
    client.connect(server.getsockname())
    before = b.transmitted_bytes()
    client.sendall(bytes(10000))
    accepted, peer = server.accept()
    seen = accepted.recv(10000, socket.MSG_WAITALL)
    where = subprocess.run([*b.command_prefix, "ip", "-br", "addr"], capture_output=True, text=True).stdout
    print(json.dumps({
        "received": len(seen), "peer": peer[0], "b": b.address, "counted": b.transmitted_bytes() - before,
        "inside": b.address in where, "multicast": multicast(a, b), "shapers": [shapers(h.namespace) for h in (a, c)],
        "switch": shapers(a.namespace.rsplit("-", 1)[0] + "-switch"),
        "home": os.readlink("/proc/thread-self/ns/net") == home,
    }))
    names = [host.namespace for host in lab.hosts.values()]
assert not [name for name in os.listdir("/run/netns") if name in names]
"""


@pytest.mark.real
def test_hosts_of_a_namespace_lab_reach_each_other_over_shaped_links(run_in_lab: Callable[[str], str]) -> None:
    seen = json.loads(run_in_lab(_LAB))
    assert seen["received"] == 10000
    assert seen["peer"] == seen["b"]
    assert seen["counted"] >= 10000
    assert seen["inside"], "a command with the host's prefix runs on another host"
    assert seen["multicast"] == "here", "mDNS would not work"
    assert seen["shapers"] == [1, 0]
    assert seen["switch"] == 2
    assert seen["home"], "the caller was left in a host's namespace"


_RACKS = """
import json, socket
from bench.lab.hosts import Link, Rack, namespace_lab

racks = {"rack1": Rack(("a", "b"), Link(20, 20)), "rack2": Rack(("c",), Link())}
with namespace_lab(dict.fromkeys("abcd", Link()), racks) as lab:
    def moved(sender, receiver):
        before = lab.rack_received_bytes()
        with lab[receiver].socket() as server, lab[sender].socket() as client:
            server.bind((lab[receiver].address, 0))
            server.listen()
            client.settimeout(10)
            client.connect(server.getsockname())
            client.sendall(bytes(100_000))
            with server.accept()[0] as accepted:
                accepted.recv(100_000, socket.MSG_WAITALL)
        return {rack: count - before[rack] for rack, count in lab.rack_received_bytes().items()}
    print(json.dumps({"inside": moved("a", "b"), "across": moved("a", "c"), "from core": moved("d", "a"),
                      "racks": [lab[name].rack for name in "abcd"]}))
"""


@pytest.mark.real
def test_what_crosses_into_a_rack_is_counted_and_what_stays_inside_is_not(run_in_lab: Callable[[str], str]) -> None:
    seen = json.loads(run_in_lab(_RACKS))
    assert seen["racks"] == ["rack1", "rack1", "rack2", None]
    assert max(seen["inside"].values()) < 10_000
    assert 100_000 <= seen["across"]["rack2"] < 130_000
    assert seen["across"]["rack1"] < 30_000, "acknowledgements"
    assert 100_000 <= seen["from core"]["rack1"] < 130_000


@pytest.mark.real
def test_a_lab_that_cannot_be_finished_leaves_nothing(run_in_lab: Callable[[str], str]) -> None:
    code = """
import os
from bench.lab.errors import LabError
from bench.lab.hosts import Link, namespace_lab
try:
    with namespace_lab({"a": Link(1), "b/c": Link(1)}):
        print("built")
except LabError as error:
    print(error)
print(os.getpid(), [name for name in os.listdir("/run/netns") if f"-{os.getpid()}-" in name])
"""
    refused, left = run_in_lab(code).splitlines()
    assert refused.startswith("ip refused to build the lab's network")
    assert left.endswith("[]")


def test_hosts_of_a_loopback_lab_have_addresses_of_their_own() -> None:
    with loopback_lab(["registry", "node1"]) as lab, loopback_lab(["registry", "node1"]) as other:
        addresses = {host.address for each in (lab, other) for host in each.hosts.values()}
        assert len(addresses) == 4
        with lab["node1"].socket() as server, lab["registry"].socket() as client:
            server.bind((lab["node1"].address, 0))
            server.listen()
            client.settimeout(10)
            client.connect(server.getsockname())
        assert lab["node1"].command_prefix == ()
        assert lab["node1"].transmitted_bytes() is None
        assert not lab.shaped
        assert isinstance(client, socket.socket)
