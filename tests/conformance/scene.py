# SPDX-License-Identifier: Apache-2.0
"""Whole agents in this process, brought to where a runtime may find them: cold, warm from disk, warm from a peer.

    ask = await scene.ready(f"manifests/{digest}", f"blobs/{layer}")
    answer = await ask.get(f"/v2/{NAME}/blobs/{layer}")

What is named in `ready` an agent has pulled before, the origin has gone then, and whom `ask` reaches is that agent
after a restart, or its peer; cold, nobody has pulled anything and the origin is there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import trio

from p2pdist.agent import Agent
from p2pdist.config import Address, AgentConfig, RegistryConfig
from p2pdist.core.wire import PeerAddress
from tests.fake_registry import FakeRegistry
from tests.http_client import Client
from tests.nodes import eventually

if TYPE_CHECKING:
    from pathlib import Path

REGISTRY = "reg.test:5000"
NAME = "lab/image"
IMAGE = f"/v2/reg.test__5000/{NAME}"
COLD, DISK, PEER = "cold", "disk", "peer"
_ANY_PORT = Address("127.0.0.1", 0)


class Scene:
    """One origin, and one or two agents.

    Attributes:
        keep_origin: leave the origin running, for what only it can tell.
    """

    def __init__(self, state: str, directory: Path, nursery: trio.Nursery) -> None:
        self.state = state
        self.registry = FakeRegistry()
        self.keep_origin = False
        self._directory = directory
        self._nursery = nursery
        self._origin = trio.CancelScope()
        self._running: dict[str, tuple[trio.CancelScope, trio.Event]] = {}
        self._clients: list[Client] = []

    def close(self) -> None:
        """Close all clients and end all agents."""
        for client in self._clients:
            client.stream.socket.close()
        self._nursery.cancel_scope.cancel()

    async def _client(self, agent: Agent) -> Client:
        self._clients.append(await Client.connect(agent.mirror_at.port))
        return self._clients[-1]

    @property
    def origin_is_gone(self) -> bool:
        return self._origin.cancel_called

    async def start_origin(self, *, task_status: trio.TaskStatus[None]) -> None:
        with self._origin:
            async with self.registry.running():
                task_status.started()
                await trio.sleep_forever()

    async def ready(self, *paths: str, proved: bool = False, **settings: Any) -> Client:  # noqa: ANN401
        """Return a client of the agent that is asked; `paths` below the repository are warm unless the scene is cold.

        Args:
            proved: whether the origin has told also the peer, before it went, that anybody may have these: without that
                each manifest waits for its silence. What is on disk is always proved.
            settings: fields of the agents' configuration.
        """
        first = await self._start("first", settings)
        if self.state == COLD:
            return await self._client(first)
        await self._warm(first, paths)
        if self.state == DISK:
            await self._stop("first")
            asked = await self._start("first", settings)
        else:
            asked = await self._start("second", settings)
            asked.neighbourhood.learn(PeerAddress(first.peer_id, "127.0.0.1", first.peers_at.port), "mdns")
            await eventually(lambda: bool(asked.exchange.links and first.exchange.links))
        client = await self._client(asked)
        if proved or self.state == DISK:
            for path in paths:
                await client.head(f"{IMAGE}/{path}")
        if not self.keep_origin:
            self._origin.cancel()
            await eventually(lambda: self.registry.open_connections == 0)
        if self.state == PEER:
            # As every runtime does: a manifest comes before the blobs that it names, and gives their sizes.
            for path in paths:
                if path.startswith("manifests/"):
                    await client.get(f"{IMAGE}/{path}")
        return client

    async def _warm(self, agent: Agent, paths: tuple[str, ...]) -> None:
        client = await self._client(agent)
        for path in paths:
            answer = await client.get(f"{IMAGE}/{path}")
            assert answer.status == 200, (path, answer)
            if path.startswith("manifests/"):
                for digest in _named(answer.json):
                    await client.get(f"{IMAGE}/blobs/{digest}")
        await eventually(lambda: not agent.puller.arrivals)

    async def _start(self, name: str, settings: dict[str, Any]) -> Agent:
        config = AgentConfig(
            mirror_listen=_ANY_PORT,
            peer_listen=_ANY_PORT,
            admin_listen=_ANY_PORT,
            mdns=False,
            data_dir=self._directory / name,
            registries={REGISTRY: RegistryConfig(self.registry.url)},
            default_registry=REGISTRY,
            store_min_free=0,
        )
        return await self._nursery.start(self._run, name, replace(config, **settings))

    async def _run(self, name: str, config: AgentConfig, *, task_status: trio.TaskStatus[Agent]) -> None:
        agent = Agent(config)
        async with trio.open_nursery() as nursery:
            self._running[name] = (nursery.cancel_scope, trio.Event())
            await nursery.start(agent.run)
            task_status.started(agent)
        self._running[name][1].set()

    async def _stop(self, name: str) -> None:
        scope, ended = self._running[name]
        scope.cancel()
        await ended.wait()


def _named(manifest: dict[str, Any]) -> list[str]:
    """Return the config and layers that are kept at the registry."""
    named = [manifest["config"], *manifest["layers"]] if "config" in manifest else []
    return [descriptor["digest"] for descriptor in named if not descriptor.get("urls")]
