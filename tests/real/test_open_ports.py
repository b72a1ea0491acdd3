# SPDX-License-Identifier: Apache-2.0
"""Every port on which an agent or a scheduler with an identity listens, found by asking the kernel, and what a machine
gets there that is not of the cluster: knocked at with `openssl s_client`, so by another TLS than ours.
"""

from __future__ import annotations

import json
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

from p2pdist.identity.authority import Authority
from p2pdist.identity.credentials import ENROL, SPEAK
from tests.identities import make_authority, pem_of
from tests.real.cluster import DEADLINE_S, until

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from bench.lab.hosts import Host
    from bench.lab.images import Image
    from tests.real.cluster import Cluster

GUEST = f"{7:032x}"
_LISTENS = "0A"
LOOPBACK_ONLY = {"node1": {5050, 5052}, "scheduler": {5061}}
OPEN = {"node1": {5051}, "scheduler": {5060}}


def listening(pid: int) -> set[tuple[str, int]]:
    """Return where anything listens by TCP in the network namespace of a process."""
    found = set()
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        local, state = line.split()[1], line.split()[3]
        if state == _LISTENS:
            host, port = local.split(":")
            found.add((socket.inet_ntoa(struct.pack("=I", int(host, 16))), int(port, 16)))
    assert len(Path(f"/proc/{pid}/net/tcp6").read_text().splitlines()) == 1
    return found


def strangers(ours: Authority, place: Path) -> dict[str, list[str]]:
    """Return, by the reason with which each is refused, the options of openssl that make one."""
    other = make_authority(place / "other", ours.cluster)
    shown = {
        "authority": pem_of(other, GUEST, cluster=ours.cluster),
        "expired": pem_of(ours, GUEST, cluster=ours.cluster, starts=-7200, lasts=3600),
        "early": pem_of(ours, GUEST, cluster=ours.cluster, starts=7200),
        "other-cluster": pem_of(ours, GUEST, cluster="elsewhere"),
        "role": pem_of(ours, "s", "scheduler", cluster=ours.cluster),
        "revoked": pem_of(ours, f"{9:032x}", cluster=ours.cluster),
    }
    found = {"no-certificate": ["-tls1_3"], "plain": ["-tls1_2"]}
    for reason, (certificate, key) in shown.items():
        file = place / f"{reason}.pem"
        file.write_bytes(certificate + key)
        found[reason] = ["-tls1_3", "-cert", str(file), "-key", str(file)]
    return found


async def knock(host: Host, address: str, port: int, options: list[str], alpn: str, said: bytes) -> bytes:
    """Say something over TLS from a host, and return what came back until the other side hung up."""
    command = ["openssl", "s_client", "-connect", f"{address}:{port}", "-quiet", "-ign_eof", "-alpn", alpn, *options]
    with trio.fail_after(DEADLINE_S):
        done = await trio.run_process(
            [*host.command_prefix, *command], stdin=said, capture_stdout=True, capture_stderr=True, check=False
        )
    return done.stdout


def refusals(log: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.splitlines() if '"connection refused"' in line]
    return [line for line in lines if line["event"] == "connection refused"]


async def test_a_stranger_gets_nothing_at_any_port_and_the_log_says_why(
    cluster_of: Callable[..., AbstractAsyncContextManager[Cluster]],
    require: Callable[[str, str], str],
    tmp_path: Path,
    small_image: Image,
) -> None:
    require("openssl", "openssl")
    async with cluster_of(small_image, nodes=2, identity=True) as cluster:
        ours = Authority.open(cluster.data / "ca")
        ours.revoke(f"agent/{9:032x}")
        await cluster.start("node1")
        await cluster.pull("node1", small_image)
        assert cluster.scheduler is not None
        stranger = cluster.lab["node2"]
        logs = {"node1": lambda: cluster.log("node1"), "scheduler": cluster.scheduler.log.read_text}
        await until(lambda: all("names are revoked" in log() for log in logs.values()), "both know who is revoked")

        pids = {"node1": cluster.agents["node1"].process.pid, "scheduler": cluster.scheduler.pid}
        for name, pid in pids.items():
            at = listening(pid)
            assert {port for address, port in at if address == "127.0.0.1"} == LOOPBACK_ONLY[name]
            assert {port for address, port in at if address != "127.0.0.1"} == OPEN[name]
            for port in LOOPBACK_ONLY[name]:
                with stranger.socket() as sock, pytest.raises(ConnectionRefusedError):
                    sock.settimeout(DEADLINE_S)
                    sock.connect((cluster.lab[name].address, port))

        expected = strangers(ours, tmp_path)
        for name, (port,) in OPEN.items():
            for options in expected.values():
                assert not await knock(stranger, cluster.lab[name].address, port, options, SPEAK, b"anything\n")
            seen = await until(
                lambda log=logs[name]: len(found := refusals(log())) >= len(expected) and found,
                f"{name} says why it refused each",
            )
            assert {line["reason"] for line in seen} == set(expected)
            assert {line["source"] for line in seen} == {stranger.address}
            assert all(line["why"] and line["mend"] for line in seen)

        # At the door for those that want a certificate, whoever comes so far is told why there is none.
        question = json.dumps({"ask": "certificate", "token": "t" * 22, "request": "none"}).encode() + b"\n"
        at_the_handshake = {"plain", "authority", "expired", "early", "role"}
        for reason, options in expected.items():
            answer = await knock(stranger, cluster.lab["scheduler"].address, 5060, options, ENROL, question)
            assert (b'"refused"' in answer) == (reason not in at_the_handshake), reason
            assert b"CERTIFICATE" not in answer
        assert any(line["reason"] == "not-enrolled" for line in refusals(cluster.scheduler.log.read_text()))

        status = (await cluster.status("node1"))["identity"]
        assert status["refused"] == dict.fromkeys(expected, 1)
        assert (await cluster.ready_parts("node1"))["identity"].startswith("ok: agent/")
