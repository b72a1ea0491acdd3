# SPDX-License-Identifier: Apache-2.0
"""One simulated scheduler: the production state, and around it what scheduler/server.py does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.schedules.agent import Agent, Hello
from bench.schedules.network import Actor, Connection
from p2pdist.core import wire
from p2pdist.core.types import PeerId
from p2pdist.errors import RemoteProtocolError
from scheduler.swarm import PUSH_S, SchedulerState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.schedules.world import World

PORT = 5051


class Scheduler(Actor):
    """A scheduler process; each life knows nothing of the one before."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world, f"scheduler {number}")
        self.world = world
        self.start()

    def start(self) -> None:
        self.alive = True
        rng = self.network.rng(f"{self.name}/{self.life}")
        own_id = PeerId(f"{self.network.rng(f'{self.name}/{self.life}/id').getrandbits(128):032x}")
        self.state = SchedulerState(rng, started=self.network.now, own_id=own_id)
        self.connections: dict[PeerId, Connection] = {}
        self.spawn(self._ticks())

    def die(self) -> None:
        for connection in list(self.connections.values()):
            connection.close(self)
        self.end()

    def _ticks(self) -> Iterator[float]:
        while True:
            yield PUSH_S
            self._deliver(self.state.tick(self.network.now))
            self.world.watch.looked_at_scheduler(self)

    def admit(self, connection: Connection, agent: Agent) -> None:
        """Take in an agent, in the place of an earlier connection of its."""
        if (old := self.connections.get(agent.peer_id)) is not None:
            old.close(self)
            self._take_out(old)
        self.connections[agent.peer_id] = connection
        self.state.connected(wire.PeerAddress(agent.peer_id, "host", PORT, "", agent.rack.removeprefix("/")))
        connection.post(self, Hello(self))

    def _take_out(self, connection: Connection) -> None:
        agent = connection.other(self)
        assert isinstance(agent, Agent)
        if self.connections.get(agent.peer_id) is connection:
            del self.connections[agent.peer_id]
            self._deliver(self.state.gone(agent.peer_id, self.network.now))

    def lost(self, connection: Connection) -> None:
        self._take_out(connection)

    def arrived(self, connection: Connection, item: object) -> None:
        agent = connection.other(self)
        assert isinstance(agent, Agent)
        assert isinstance(item, wire.Message)
        if self.connections.get(agent.peer_id) is not connection:
            return
        try:
            out = self.state.said(agent.peer_id, item, self.network.now)
        except RemoteProtocolError as error:
            self.world.watch.broke_protocol(self, agent, error)
            connection.close(self)
            self._take_out(connection)
            return
        self._deliver(out)

    def _deliver(self, out: list[tuple[PeerId, wire.Message]]) -> None:
        for peer, message in out:
            if isinstance(message, wire.Lease):
                self.world.watch.leased(self, peer, message)
            connection = self.connections.get(peer)
            if connection is not None:
                connection.post(self, message)
