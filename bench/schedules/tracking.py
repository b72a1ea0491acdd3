# SPDX-License-Identifier: Apache-2.0
"""A simulated agent's way to its schedulers: the production roster, and around it what schedulers.py and
net/tracker_client.py do, without sockets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.schedules.network import Connection
from p2pdist.core import events as ev
from p2pdist.core import wire
from p2pdist.core.schedulers import GiveUp, Rejoin, Roster, Say
from p2pdist.errors import RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bench.schedules.agent import Agent
    from bench.schedules.tracker import Scheduler
    from p2pdist.core.schedulers import Order

PAUSE_S = (0.25, 5.0)
HELLO_S = 5.0
TICK_S = 0.1


class Tracking:
    """One life's connections to schedulers, by their names."""

    def __init__(self, agent: Agent) -> None:
        self.lines: dict[str, Connection] = {}
        self._agent = agent
        self._roster = Roster((scheduler.name for scheduler in agent.world.schedulers), agent.rng.random())
        self._counts = False

    def begin(self) -> None:
        """Stay connected to each from now on."""
        for scheduler in self._agent.world.schedulers:
            self._agent.spawn(self._stay_connected(scheduler))
        self._agent.spawn(self._ticks())

    def tell(self, message: wire.Message) -> None:
        """Send a message to whom it concerns."""
        for name in self._roster.route(message):
            self._say(name, message)

    def owns(self, connection: Connection) -> bool:
        """Return whether this is a connection to a scheduler."""
        return self.lines.get(connection.other(self._agent).name) is connection

    def greeted(self, connection: Connection) -> None:
        """Take in that a scheduler has let us in."""
        name = connection.other(self._agent).name
        self._carry_out(self._roster.connected(name, self._now))

    def lost(self, connection: Connection) -> None:
        """Take in the end of a connection."""
        name = connection.other(self._agent).name
        del self.lines[name]
        self._carry_out(self._roster.lost(name, self._now))

    def arrived(self, connection: Connection, message: wire.Message) -> None:
        """Take in what a scheduler says; one that breaks the protocol is cut off."""
        agent, scheduler = self._agent, connection.other(self._agent)
        known = self._roster.seats[scheduler.name].present
        orders = self._roster.heard(scheduler.name, message, self._now)
        if self._roster.seats[scheduler.name].present and not known:
            connection.post(agent, wire.Stored(sorted(agent.whole)))
        self._carry_out(orders)
        try:
            self._pass_on(message)
        except RemoteProtocolError as error:
            agent.world.watch.broke_protocol(agent, scheduler, error)
            connection.close(agent)
            self.lost(connection)

    @property
    def _now(self) -> float:
        return self._agent.network.now

    def _pass_on(self, message: wire.Message) -> None:
        match message:
            case wire.Present():
                pass
            case wire.Neighbours():
                for address in message.peers:
                    self._agent.meet(address.peer_id)
            case _:
                self._agent.feed(ev.SchedulerSaid(message=message))

    def _say(self, name: str, message: wire.Message) -> None:
        if (line := self.lines.get(name)) is not None:
            liar = self._agent.liar
            line.post(self._agent, message if liar is None else liar.tells(message))

    def _carry_out(self, orders: Sequence[Order]) -> None:
        before, self._counts = self._counts, bool(self._roster.counted)
        if before and not self._counts:
            self._agent.feed(ev.SchedulerLost())
        for order in orders:
            match order:
                case Say():
                    self._say(order.address, order.message)
                case Rejoin():
                    self._agent.feed(ev.SwarmMoved(blob=order.blob))
                case GiveUp() if (line := self.lines.get(order.address)) is not None:
                    line.close(self._agent)
                    self.lost(line)
        if self._counts and not before:
            self._agent.feed(ev.SchedulerConnected())

    def _ticks(self) -> Iterator[float]:
        while True:
            yield TICK_S
            if self._roster.due_at() <= self._now:
                self._carry_out(self._roster.tick(self._now))

    def _stay_connected(self, scheduler: Scheduler) -> Iterator[float]:
        agent, pause_s = self._agent, PAUSE_S[0]
        while True:
            yield agent.rng.uniform(0.002, 0.02)
            began = self._now
            if scheduler.alive and not scheduler.frozen and not agent.network.cut(agent.name, scheduler.name):
                self.lines[scheduler.name] = connection = Connection(agent.network, agent, scheduler)
                scheduler.admit(connection, agent)
                while self.lines.get(scheduler.name) is connection:
                    yield PAUSE_S[0]
            elif scheduler.frozen or agent.network.cut(agent.name, scheduler.name):
                yield HELLO_S
            pause_s = PAUSE_S[0] if self._now - began > PAUSE_S[1] else min(2 * pause_s, PAUSE_S[1])
            yield pause_s * agent.rng.uniform(0.5, 1.5)
