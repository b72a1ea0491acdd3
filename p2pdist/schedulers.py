# SPDX-License-Identifier: Apache-2.0
"""The agent's schedulers as one: keeps a connection to each, and carries out what core/schedulers.py orders.

To the exchange and the resolver there is a scheduler while one counts. Everything here but `run` is synchronous.
Invariant: a message goes only to the schedulers that it concerns, and never waits for one that has gone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import structlog
import trio

from p2pdist.config import Address
from p2pdist.core import events as ev
from p2pdist.core.schedulers import IN_USE, RIPE_S, AskAgain, GiveUp, Rejoin, Roster, Say
from p2pdist.core.wire import Present, Revoked
from p2pdist.identity.revocations import Courier
from p2pdist.net.tracker_client import TrackerClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from random import Random

    from p2pdist.core.schedulers import Order, Standing
    from p2pdist.core.wire import Hello, Message
    from p2pdist.exchange import Exchange
    from p2pdist.identity.keeper import Keeper
    from p2pdist.identity.refusals import Refusals

log = structlog.get_logger(__name__)

SILENT = "answers nothing"


class Schedulers:
    """All schedulers of one agent.

    Attributes:
        on_connected: returns what is told to each scheduler that is there, or there again.
        on_dropped: told of the questions about tags whose scheduler has gone while others are there.
    """

    def __init__(
        self, addresses: Sequence[tuple[str, int]], hello: Callable[[], Hello], exchange: Exchange, rng: Random
    ) -> None:
        self.on_connected: Callable[[], Iterable[Message]] = tuple
        self.on_dropped: Callable[[int], None] = lambda _number: None
        self._exchange = exchange
        self._rng = rng
        self._courier: Courier | None = None
        named = {str(Address(host, port)): (host, port) for host, port in addresses}
        self.roster = Roster(named, rng.random())
        self._clients: dict[str, TrackerClient] = {}
        for name, address in named.items():
            line = _Line(self, name)
            self._clients[name] = TrackerClient([address], hello, line, rng)
            self._clients[name].resting = line.resting
        self._counts = False
        self._stirred = trio.Event()

    def identify(self, keeper: Keeper, refusals: Refusals) -> None:
        """Show this identity to each, and let in none that is not a scheduler of its cluster."""
        self._courier = Courier(keeper, lambda address, message: self._clients[address].send(message), self._rng)
        for client in self._clients.values():
            client.identity, client.refusals = keeper.identity, refusals

    @property
    def control_bytes(self) -> int:
        """Return the bytes of messages sent so far."""
        return sum(client.control_bytes for client in self._clients.values())

    @property
    def connected(self) -> list[str]:
        """Return the addresses of the schedulers that count."""
        return [seat.address for seat in self.roster.counted]

    def send(self, message: Message) -> None:
        """Send to whom it concerns; without a scheduler it is dropped, for a new one begins with all that matters."""
        for address in self.roster.route(message):
            self._clients[address].send(message)
        self._stirred.set()

    async def run(self) -> None:
        """Stay connected until cancelled."""
        async with trio.open_nursery() as nursery:
            for client in self._clients.values():
                nursery.start_soon(client.run)
            if self._courier is not None:
                nursery.start_soon(self._courier.run)
            while True:
                self._stirred = trio.Event()
                with trio.move_on_at(self.roster.due_at()):
                    await self._stirred.wait()
                await trio.lowlevel.checkpoint()
                self._carry_out(self.roster.tick(trio.current_time()))

    def status(self) -> list[Standing]:
        """Return how it is with each."""
        return [replace(each, why=self._clients[each.address].trouble) for each in self.roster.status()]

    def summary(self) -> str:
        """Return in a few words how it is with all."""
        standings = self.status()
        others = [f"{each.address} {each.state}" for each in standings if each.state != IN_USE]
        if len(others) == len(standings):
            return "lost; working without"
        return (
            "; ".join([f"connected to {len(self.connected)} of {len(standings)}", *others]) if others else "connected"
        )

    # ------------------------------------------------------------ from the lines

    def line_up(self, address: str) -> None:
        """Take in a new connection."""
        if self._courier is not None:
            self._courier.connected(address)
        self._carry_out(self.roster.connected(address, trio.current_time()))

    def line_down(self, address: str, why: str) -> None:
        """Take in the end of a connection."""
        if self._courier is not None:
            self._courier.lost(address)
        others = [other for other in self.connected if other != address]
        if others and self.roster.twin(address) is None:
            log.warning("scheduler lost; its swarms move to the others", address=address, why=why, others=others)
        self._carry_out(self.roster.lost(address, trio.current_time()), address, why)

    def line_said(self, address: str, message: Message) -> None:
        """Take in what a scheduler says. Raises RemoteProtocolError: it breaks the protocol."""
        seat = self.roster.seats[address]
        unknown = not seat.present
        orders = self.roster.heard(address, message, trio.current_time())
        if isinstance(message, Revoked):
            if self._courier is not None:
                self._courier.heard(address, message.signed)
        elif not isinstance(message, Present):
            self._exchange.scheduler_said(message)
        elif unknown and seat.present:
            self._welcome(address)
        self._carry_out(orders, address)

    def _welcome(self, address: str) -> None:
        """Tell a scheduler what is in the store."""
        for message in self.on_connected():
            self._clients[address].send(message)
        if len(self._clients) > 1 and address not in self.connected:
            at_most_s = round(RIPE_S)
            log.info("scheduler connected; it takes its share of the swarms soon", address=address, within_s=at_most_s)
        elif len(self._clients) > 1:
            log.info("scheduler connected", address=address, all=self.connected)

    def _carry_out(self, orders: Sequence[Order], address: str = "", why: str = "") -> None:
        """Do what is ordered; the exchange hears when there is a scheduler, and when there is none any more."""
        self._stirred.set()
        before, self._counts = self._counts, bool(self.roster.counted)
        if before and not self._counts:
            self._exchange.scheduler_lost(address, why)
        for order in orders:
            match order:
                case Say():
                    self._clients[order.address].send(order.message)
                case Rejoin():
                    self._exchange.feed(ev.SwarmMoved(blob=order.blob))
                case AskAgain():
                    self.on_dropped(order.number)
                case GiveUp():
                    self._clients[order.address].give_up(SILENT)
        if moved := sum(isinstance(order, Rejoin) for order in orders):
            log.info("swarms moved to other schedulers", swarms=moved, schedulers=self.connected)
        if self._counts and not before:
            self._exchange.scheduler_connected(address)


@dataclass(slots=True)
class _Line:
    """What one connection tells: the handler of its client."""

    schedulers: Schedulers
    address: str

    def scheduler_connected(self, _address: str) -> None:
        self.schedulers.line_up(self.address)

    def scheduler_lost(self, _address: str, why: str) -> None:
        self.schedulers.line_down(self.address, why)

    def scheduler_said(self, message: Message) -> None:
        self.schedulers.line_said(self.address, message)

    def resting(self) -> bool:
        """Whether the same scheduler is connected at another address: a second connection would end the first."""
        return self.schedulers.roster.twin(self.address) is not None
