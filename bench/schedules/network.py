# SPDX-License-Identifier: Apache-2.0
"""Virtual time, connections and processes: what faults happen to. Knows nothing of what is said.

A connection delivers in order, and loses what is on its way only with itself. Between ends that a partition parts
nothing is delivered; what was sent waits, as TCP would send it again, until the partition ends or the connection is
given up. A frozen end takes nothing until it goes on.

Randomness: each thing that draws has an rng of its own, by name, so that to leave out one thing changes no other.
"""

from __future__ import annotations

import heapq
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEAD_S = 6.0
"""What is not acknowledged for so long ends a connection (net/peer_link.py)."""
_TRIP_S = (0.001, 0.02)


class Network:
    """The calendar, and who is parted from whom."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.seed = seed
        self.events = 0
        self.parted: list[tuple[float, frozenset[str], frozenset[str] | None]] = []
        """Until when each group is cut off, and from whom: None for everybody else."""
        self._calendar: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._waiting: set[Connection] = set()
        """Connections with something that a partition holds up."""

    def rng(self, name: str) -> Random:
        """Return a new rng of this name."""
        return Random(f"{self.seed}/{name}")

    def at(self, due: float, action: Callable[..., None], *arguments: Any) -> None:  # noqa: ANN401  # the action's own
        self.events += 1
        heapq.heappush(self._calendar, (max(due, self.now), self.events, action, arguments))

    def after(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:  # noqa: ANN401
        self.at(self.now + delay_s, action, *arguments)

    def run(self, until: float) -> None:
        """Let everything happen that is due by then."""
        while self._calendar and self._calendar[0][0] <= until:
            self.now, _, action, arguments = heapq.heappop(self._calendar)
            action(*arguments)
        self.now = until

    def part(self, names: frozenset[str], until: float, others: frozenset[str] | None = None) -> None:
        """Cut a group off from others, or from everybody else."""
        self.parted.append((until, names, others))
        if until != float("inf"):
            self.at(until, self._heal)

    def _heal(self) -> None:
        self.parted = [parting for parting in self.parted if parting[0] > self.now]
        for connection in sorted(self._waiting, key=lambda each: each.number):
            connection.flush()

    def cut(self, one: str, other: str) -> bool:
        """Whether a partition is between them now."""
        for _, names, others in self.parted:
            if (one in names) != (other in names) and (others is None or one in others or other in others):
                return True
        return False


class Actor:
    """A process: it takes what arrives while it runs, and what waited for it once it goes on."""

    def __init__(self, network: Network, name: str) -> None:
        self.network = network
        self.name = name
        self.life = 0
        """Grows with each start: what was begun in an earlier life does not go on."""
        self.alive = True
        self.frozen = False
        self.thawed_at = float("-inf")
        self._inbox: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    def act(self, action: Callable[..., None], *arguments: Any) -> None:  # noqa: ANN401
        """Do something now, or when it goes on."""
        if self.frozen:
            self._inbox.append((action, arguments))
        elif self.alive:
            action(*arguments)

    def spawn(self, steps: Iterator[float]) -> None:
        """Run a task of this process; each value that it yields is a time to sleep."""
        self._step(steps, self.life)

    def _step(self, steps: Iterator[float], life: int) -> None:
        if life != self.life or not self.alive:
            return
        pause_s = next(steps, None)
        if pause_s is not None:
            self.network.after(pause_s, self.act, self._step, steps, life)

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        """Go on, with all that has arrived meanwhile, in the order it came."""
        self.frozen, self.thawed_at = False, self.network.now
        waiting, self._inbox = self._inbox, []
        for action, arguments in waiting:
            self.act(action, *arguments)

    def end(self) -> None:
        """Die; nothing of this life goes on."""
        self.alive, self.frozen = False, False
        self.life += 1
        self._inbox.clear()

    def arrived(self, connection: Connection, item: object) -> None:
        """Take in what came over a connection."""
        raise NotImplementedError

    def lost(self, connection: Connection) -> None:
        """Take note that a connection has ended, from the other side or by time-out."""
        raise NotImplementedError


_END = object()


class Connection:
    """Both directions between two processes. `ends[0]` dialled."""

    def __init__(self, network: Network, dialler: Actor, accepter: Actor) -> None:
        self.network = network
        self.ends = (dialler, accepter)
        network.events += 1
        self.number = network.events
        self.open = [True, True]
        self.since = network.now
        self.silent = False
        """Whether the other host is gone without a word: nothing arrives any more."""
        self._due = [0.0, 0.0]
        self._held: tuple[list[object], list[object]] = ([], [])
        self._held_at = 0.0
        self._rng = network.rng(f"{dialler.name}>{accepter.name}/{dialler.life}/{accepter.life}/{self.since:.3f}")

    def other(self, end: Actor) -> Actor:
        return self.ends[self.ends[0] is end]

    def is_open(self, end: Actor) -> bool:
        """Whether this end has not closed it yet."""
        return self.open[self.ends[1] is end]

    def post(self, sender: Actor, item: object, late_s: float = 0.0) -> None:
        """Send something behind all that was sent before."""
        way = int(self.ends[1] is sender)
        if self.open[way]:
            trip_s = late_s + self._rng.uniform(*_TRIP_S)
            self._due[way] = max(self._due[way], self.network.now + trip_s)
            self.network.at(self._due[way], self._deliver, way, item)

    def close(self, end: Actor) -> None:
        """End it from this side; the other hears of it behind all that was sent before."""
        self.post(end, _END)
        self.open[self.ends[1] is end] = False

    def vanish(self, end: Actor) -> None:
        """End it from this side without a word: the other side finds out by itself."""
        self.open[self.ends[1] is end] = False
        self.silent = True
        self.network.after(DEAD_S, self._give_up)

    def held(self) -> int:
        """Return how much waits for a partition to end."""
        return len(self._held[0]) + len(self._held[1])

    def flush(self) -> None:
        """Deliver what a partition held up, if it has ended."""
        if self.network.cut(self.ends[0].name, self.ends[1].name):
            return
        self.network._waiting.discard(self)
        for way in (0, 1):
            held = self._held[way][:]
            self._held[way].clear()
            for item in held:
                self._deliver(way, item)

    def _deliver(self, way: int, item: object) -> None:
        target = self.ends[1 - way]
        if self.silent or not self.open[1 - way]:
            return
        if self._held[way] or self.network.cut(self.ends[0].name, self.ends[1].name):
            if not self.held():
                self.network._waiting.add(self)
                self._held_at = self.network.now
                self.network.after(DEAD_S, self._time_out, self._held_at)
            self._held[way].append(item)
            return
        target.act(self._hand_over, target, item)

    def _hand_over(self, target: Actor, item: object) -> None:
        if not self.is_open(target):
            return
        if item is _END:
            self.open[self.ends[1] is target] = False
            target.lost(self)
        else:
            target.arrived(self, item)

    def _time_out(self, since: float) -> None:
        if self.held() and self._held_at == since:
            self._give_up()

    def _give_up(self) -> None:
        self.silent = True
        self.network._waiting.discard(self)
        for end in self.ends:
            end.act(self._hand_over, end, _END)
