# SPDX-License-Identifier: Apache-2.0
"""The agent dies or hangs in the middle of a pull: every runtime still gets its image, from the origin itself.

Most runtimes wait for an agent that hangs as long as it does (docs/runtimes.md). It is systemd's watchdog that ends
it; a test plays that part.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio

from bench.lab.registry import PORT as REGISTRY_PORT
from tests.real.cluster import ALONE, DEADLINE_S, until
from tests.real.gate import Gate
from tests.real.runtimes import Runtime, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from bench.lab.images import Image
    from tests.real.cluster import Cluster

    ClusterOf = Callable[..., AbstractAsyncContextManager[Cluster]]

WATCHDOG_S = 1.0


@asynccontextmanager
async def held_cluster(
    cluster_of: ClusterOf, *images: Image, wrapper: Sequence[str] = ()
) -> AsyncIterator[tuple[Cluster, Gate]]:
    """Give a cluster whose agent, on node1, gets from the origin what the gate lets pass; runtimes go around that."""
    async with cluster_of(*images, nodes=1, found_by=ALONE) as cluster:
        gate = Gate(cluster.lab["registry"], REGISTRY_PORT)
        async with gate.running():
            await cluster.start("node1", origin_url=gate.base_url, wrapper=wrapper)
            yield cluster, gate


async def test_a_pull_survives_an_agent_that_is_killed_in_the_middle_of_a_layer(
    kind: type[Runtime], image: Image, cluster_of: ClusterOf
) -> None:
    async with held_cluster(cluster_of, image) as (cluster, gate):
        agent = cluster.agents["node1"]
        async with running(kind, cluster, agent) as runtime, trio.open_nursery() as nursery:
            gate.hold_after(image.pull_bytes // 2)
            nursery.start_soon(runtime.pull, ":v1")
            await until(gate.held.is_set, "the agent has half of the image")
            await until(lambda: served(cluster), "the runtime has the manifests from the agent")
            agent.process.kill()
        await runtime.expect(image)
        expect_fallback(cluster, kind)


@pytest.mark.parametrize("in_a_layer", [False, True], ids=["before the pull", "in a layer"])
async def test_pulls_survive_an_agent_that_hangs_until_its_watchdog_bites(
    kinds: list[type[Runtime]], in_a_layer: bool, image: Image, cluster_of: ClusterOf, tmp_path: Path
) -> None:
    async with AsyncExitStack() as stack:
        watchdog = await stack.enter_async_context(Watchdog(tmp_path / "notify").listening())
        cluster, gate = await stack.enter_async_context(held_cluster(cluster_of, image, wrapper=watchdog.wrapper))
        agent = cluster.agents["node1"]
        runtimes = [await stack.enter_async_context(running(kind, cluster, agent)) for kind in kinds]
        gate.hold_after(image.pull_bytes // 2 if in_a_layer else 0)
        async with trio.open_nursery() as nursery:
            for runtime in runtimes:
                nursery.start_soon(runtime.pull, ":v1")
            if in_a_layer:
                await until(gate.held.is_set, "the agent has half of the image")
                await until(lambda: served(cluster), "a runtime has manifests from the agent")
            os.kill(agent.process.pid, signal.SIGSTOP)
            await watchdog.silence()
            agent.process.kill()
        for runtime in runtimes:
            await runtime.expect(image)
            expect_fallback(cluster, type(runtime))


async def test_twenty_of_twenty_pulls_succeed_while_the_agent_is_killed_at_random_moments(
    kinds: list[type[Runtime]], twenty_images: list[Image], cluster_of: ClusterOf
) -> None:
    """A moment is a number of bytes that the agent has from the origin; it is started again at once, as by systemd."""
    rng = random.Random(4)
    async with held_cluster(cluster_of, *twenty_images) as (cluster, gate), AsyncExitStack() as stack:
        runtimes = [await stack.enter_async_context(running(kind, cluster, cluster.agents["node1"])) for kind in kinds]
        for runtime, image in zip(itertools.cycle(runtimes), twenty_images, strict=False):
            gate.hold_after(rng.randrange(image.pull_bytes))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(runtime.pull, f":{image.tag}")
                await until(gate.held.is_set, "the moment to kill the agent")
                cluster.agents["node1"].process.kill()
                gate.open()
                await cluster.start("node1", origin_url=gate.base_url)
            await runtime.expect(image)


class Watchdog:
    """systemd's, with `WatchdogSec=1`, of an agent that `wrapper` starts."""

    def __init__(self, address: Path) -> None:
        self.wrapper = ("env", f"NOTIFY_SOCKET={address}", f"WATCHDOG_USEC={int(WATCHDOG_S * 1e6)}")
        self._address = str(address)
        self._fed = trio.Event()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Watchdog]:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._listen)
            yield self
            nursery.cancel_scope.cancel()

    async def silence(self) -> None:
        """Wait until it is fed, and then until it is not for `WATCHDOG_S`."""
        with trio.fail_after(DEADLINE_S):
            await self._fed.wait()
            while self._fed.is_set():
                self._fed = trio.Event()
                with trio.move_on_after(WATCHDOG_S):
                    await self._fed.wait()

    async def _listen(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
            await notices.bind(self._address)
            task_status.started()
            while True:
                if b"WATCHDOG=1" in await notices.recv(4096):
                    self._fed.set()


def expect_fallback(cluster: Cluster, kind: type[Runtime]) -> None:
    agents = {entry["http.request.useragent"] for entry in cluster.requests()}
    assert any(kind.agent in agent for agent in agents), f"{kind.agent} never asked the origin: {agents}"


async def served(cluster: Cluster) -> bool:
    return (await cluster.moved("node1"))["to_runtime"] > 0
