# SPDX-License-Identifier: Apache-2.0
"""A thousand connections to one agent, nine hundred of them slow or malformed: the other hundred pull undisturbed."""

from __future__ import annotations

import hashlib
import os
import random
import socket
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from p2pdist.agent import ORIGIN_CONNECTIONS
from tests.fake_registry import FakeRegistry, digest_of
from tests.http_client import Client, request
from tests.real.cluster import until
from tests.real.crowd import Crowd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MIB = 1 << 20
GOOD, BAD = 100, 900
RSS_MIB_MAX = 250
LARGE = random.Random(1).randbytes(32 * MIB)
LAYERS = [random.Random(number).randbytes(MIB // 2) for number in (2, 3)]
IMAGE = "/v2/reg.test/lab/image"
PATIENCE_S = 200.0


@dataclass
class RunningAgent:
    process: trio.Process
    port: int
    log: Path

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def peak_rss_mib(self) -> float:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


@asynccontextmanager
async def agent(tmp_path: Path, registry: FakeRegistry, *, connections: int) -> AsyncIterator[RunningAgent]:
    """Run an agent of its own process, alone, on loopback."""
    ports = [free_port() for _ in range(3)]
    listeners = zip(("mirror", "peer", "admin"), ports, strict=True)
    flags = [part for name, port in listeners for part in (f"--{name}-listen", f"127.0.0.1:{port}")]
    flags += ["--no-mdns", "--data-dir", str(tmp_path / "data"), "--registry", f"reg.test={registry.url}"]
    environ = {**os.environ, "P2PDIST_MAX_CONNECTIONS": str(connections)}
    log = tmp_path / "log"
    command = [sys.executable, "-m", "p2pdist", "agent", *flags]
    with log.open("wb") as output:
        process = await trio.lowlevel.open_process(command, stdout=output, stderr=output, env=environ)
    try:
        running = RunningAgent(process, ports[0], log)
        await until(lambda: b"agent listens" in log.read_bytes(), "the agent listens")
        yield running
        assert process.poll() is None, log.read_text()[-3000:]
    finally:
        process.terminate()
        await process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


async def pull(port: int, done: list[int]) -> None:
    """Pull the image as a runtime does, each thing on a connection of its own, every digest checked."""
    manifest = await _get(port, f"{IMAGE}/manifests/v1")
    assert b"layers" in manifest
    for layer in LAYERS:
        digest = digest_of(layer)
        body = await _get(port, f"{IMAGE}/blobs/{digest}")
        assert f"sha256:{hashlib.sha256(body).hexdigest()}" == digest
    done.append(len(manifest))


async def _get(port: int, target: str) -> bytes:
    client = await Client.connect(port)
    try:
        await client.send(request(target))
        answer, reading = await client.start()
        body = await client.rest(reading)
    finally:
        await trio.aclose_forcefully(client.stream)
    assert answer.status == 200, body[:300]
    return body


@pytest.mark.parametrize("connections", [2048, 300], ids=["room for all", "room for a third"])
async def test_a_hundred_pulls_are_right_amid_nine_hundred_bad_clients(tmp_path: Path, connections: int) -> None:
    async with FakeRegistry().running() as registry:
        registry.add_image("lab/image", "v1", LAYERS)
        large = f"{IMAGE}/blobs/{registry.add_blob(LARGE)}"
        async with agent(tmp_path, registry, connections=connections) as running:
            assert len(await _get(running.port, large)) == len(LARGE)
            before = running.descriptors()
            crowd = Crowd(running.port, large)
            with trio.fail_after(PATIENCE_S):
                await pull_amid(crowd, running.port)
            assert not crowd.strange
            assert running.peak_rss_mib() < RSS_MIB_MAX
            # The pulls may have left some connections to the registry, kept for the next.
            most = before + ORIGIN_CONNECTIONS
            await until(lambda: running.descriptors() <= most, "all that the clients held is free again")


async def pull_amid(crowd: Crowd, port: int) -> None:
    """Let all pull while the crowd is there."""
    done: list[int] = []
    async with trio.open_nursery() as crowding:
        crowding.start_soon(crowd.run, BAD)
        await until(lambda: crowd.arrived == BAD, "the crowd is there")
        async with trio.open_nursery() as pulls:
            for _ in range(GOOD):
                pulls.start_soon(pull, port, done)
        crowding.cancel_scope.cancel()
    assert len(done) == GOOD
