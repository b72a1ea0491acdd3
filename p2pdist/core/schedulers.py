# SPDX-License-Identifier: Apache-2.0
"""Which schedulers count for this agent, and on which of them each swarm and each tag is. Pure.

Theory of operation. An agent is connected to all schedulers that it was given. Each swarm is on one of them, its home:
the one with the greatest hash of (blob, scheduler), so that all who count the same schedulers agree without a word, and
when one dies only its swarms move (rendezvous hashing, Thaler and Ravishankar 1998). A scheduler is known by the id
that it draws at its start, not by its address, which agents may write in different ways.

A scheduler that dies counts no more at once; its swarms are joined again on the others, with what the agent has and
what it is fetching. One that has just started, or was lost to this agent, counts only after RIPE_S: by then all agents
are back, and as it says itself how old it is, all begin to count it in the same moment. Then its swarms come back to
it; for HANDOVER_S they are joined on both, and each is told of the leases of the other. Schedulers that no agent's
majority counts lease nothing (scheduler/leading.py gets our View), so that agents which disagree do not cost egress.

Invariants: a swarm's home counts, unless none does; whatever moves is joined at its new home before it is left at the
old one; memory is bounded by the wanted blobs, MAX_QUESTIONS and MAX_SCHEDULERS.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

from p2pdist.core.wire import (
    Ask,
    Done,
    Failed,
    Join,
    Lease,
    Leave,
    Message,
    Missing,
    Present,
    Refuted,
    Renew,
    Resolve,
    Resolved,
    Stored,
    View,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from p2pdist.core.types import Digest, PeerId

RIPE_S = 10.0
"""After its start, or after this agent got back to it, a scheduler counts so late: an agent tries again every 7.5 s at
the least."""
PEERAGE_S = 3.0
"""Schedulers that ripen within so long of the first do so with it: all may have been started together."""
HANDOVER_S = 2.0
"""For which a swarm that moves stays joined at a home that still lives."""
PROBE_S = 1.5
"""A scheduler on which something depends and that has said nothing for so long is asked whether it is there."""
PROBES = 3
"""Probes without an answer before it is given up: a frozen program's connection looks well to the system."""
IN_USE = "connected"
MAX_QUESTIONS = 4096
"""About tags, that wait for a scheduler's answer."""


def weight(key: str, scheduler: PeerId) -> int:
    """Return the 64-bit weight of a scheduler for a blob or tag; the greatest is its home."""
    return xxh3_64_intdigest(f"{key}/{scheduler}".encode())


def home_of(key: str, schedulers: Collection[PeerId]) -> PeerId:
    """Return the scheduler for a blob or tag; there is at least one."""
    return max(schedulers, key=lambda scheduler: (weight(key, scheduler), scheduler))


@dataclass(frozen=True, slots=True)
class Say:
    """Send a message to the scheduler at this address."""

    address: str
    message: Message


@dataclass(frozen=True, slots=True)
class Rejoin:
    """Join this blob's swarm again: its home has changed."""

    blob: Digest


@dataclass(frozen=True, slots=True)
class AskAgain:
    """The scheduler that was asked this question has gone."""

    number: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the connection: nothing comes on it."""

    address: str


Order = Say | Rejoin | AskAgain | GiveUp


@dataclass(slots=True)
class Seat:
    """One of the addresses that the agent was given, and who answers there."""

    address: str
    scheduler: PeerId | None = None
    """Who answers there, or did last."""
    connected: bool = False
    ripe_at: float = float("inf")
    """When it begins to count; not known before it has said who it is."""
    lost: bool = False
    """Whether a connection to it was lost before."""
    heard_at: float = 0.0
    probed_at: float = 0.0
    unanswered: int = 0

    @property
    def present(self) -> bool:
        return self.connected and self.ripe_at < float("inf")


@dataclass(frozen=True, slots=True)
class Standing:
    """How it is with one scheduler, for people.

    Args:
        state: IN_USE, returning (connected, and not used yet), lost, or the same as another address.
        swarms: how many of this agent's swarms are on it.
        why: why there is no connection.
    """

    address: str
    state: str
    swarms: int
    why: str = ""


@dataclass(slots=True)
class _Swarm:
    home: Seat
    leaving: dict[str, float] = field(default_factory=dict)
    """Earlier homes where it is still joined, and until when."""


class Roster:
    """The schedulers of one agent. Every call takes `now` (monotonic seconds); orders are to be carried out in turn.

    Args:
        jitter: 0 to 1, drawn by the agent: thousands that heard the same word must not all probe in the same moment.
    """

    def __init__(self, addresses: Iterable[str], jitter: float = 0.0) -> None:
        self._probe_s = PROBE_S * (1 + jitter / 3)
        self.seats = {address: Seat(address) for address in addresses}
        self.counted: tuple[Seat, ...] = ()
        self._swarms: dict[Digest, _Swarm] = {}
        self._questions: dict[int, Seat] = {}

    # --------------------------------------------------------- what happens

    def connected(self, address: str, now: float) -> list[Order]:
        """Take in a new connection; who is there has yet to be said."""
        seat = self.seats[address]
        seat.connected, seat.ripe_at, seat.heard_at, seat.unanswered = True, float("inf"), now, 0
        return [Say(address, self._view())]

    def lost(self, address: str, now: float) -> list[Order]:
        """Take in the end of a connection: what was on it moves."""
        seat = self.seats[address]
        seat.connected, seat.ripe_at, seat.lost = False, float("inf"), True
        for swarm in self._swarms.values():
            swarm.leaving.pop(address, None)
        orders = self._recount(now)
        for number in [number for number, asked in self._questions.items() if asked is seat]:
            del self._questions[number]
            orders.append(AskAgain(number))
        return orders

    def heard(self, address: str, message: Message, now: float) -> list[Order]:
        """Take in what a scheduler says, as far as it matters here: Present is for nobody else."""
        seat = self.seats[address]
        seat.heard_at, seat.unanswered = now, 0
        match message:
            case Present():
                return self._introduced(seat, message, now)
            case Lease():
                return self._tell_of_lease(seat, message)
            case Resolved():
                self._questions.pop(message.number, None)
            case Ask():
                self._note_question(message.number, seat)
        return []

    def _introduced(self, seat: Seat, message: Present, now: float) -> list[Order]:
        if not seat.connected or seat.present:
            return []
        # Who was lost and is the same as before may be lost to others still; who is new says when all will be there.
        age_s = 0.0 if seat.lost and seat.scheduler == message.scheduler else message.age_ms / 1000
        seat.scheduler = message.scheduler
        seat.ripe_at = now + RIPE_S - max(age_s, 0.0)
        return self._recount(now)

    def _tell_of_lease(self, seat: Seat, message: Lease) -> list[Order]:
        """Let a swarm's other home, while there are two, know what is being fetched."""
        swarm = self._swarms.get(message.blob)
        others = [] if swarm is None else [at for at in (swarm.home.address, *swarm.leaving) if at != seat.address]
        indices = range(message.index, message.index + min(message.count, 64))
        return [Say(address, Renew(message.blob, index)) for address in others for index in indices]

    def tick(self, now: float) -> list[Order]:
        """Do what is due; see `due_at`."""
        orders = self._recount(now)
        for blob, swarm in self._swarms.items():
            for address in [address for address, until in swarm.leaving.items() if until <= now]:
                del swarm.leaving[address]
                orders.append(Say(address, Leave(blob)))
        for seat in self._needed():
            if now >= max(seat.heard_at, seat.probed_at) + self._probe_s:
                orders.append(GiveUp(seat.address) if seat.unanswered >= PROBES else Say(seat.address, self._view()))
                seat.probed_at = now
                seat.unanswered += 1
        return orders

    def due_at(self) -> float:
        """Return when `tick` has something to do next, if nothing happens before."""
        seats = self.seats.values()
        ripe = [
            seat.ripe_at for seat in seats if seat.present and not (seat in self.counted or self.twin(seat.address))
        ]
        leaving = [until for swarm in self._swarms.values() for until in swarm.leaving.values()]
        probes = [max(seat.heard_at, seat.probed_at) + self._probe_s for seat in self._needed()]
        return min([*ripe, *leaving, *probes], default=float("inf"))

    def _needed(self) -> list[Seat]:
        """Return the connected schedulers on which something depends: who they are, a swarm, or a tag."""
        homes = {swarm.home.address for swarm in self._swarms.values()}
        homes |= {seat.address for seat in self._questions.values()}
        return [seat for seat in self.seats.values() if seat.connected and (not seat.present or seat.address in homes)]

    def _view(self) -> View:
        return View([seat.scheduler for seat in self.counted if seat.scheduler is not None])

    # ------------------------------------------------------ who counts, and moves

    def _recount(self, now: float) -> list[Order]:
        """Find out who counts; where that has changed, say so, and move what has another home now."""
        present = [seat for seat in self.seats.values() if seat.present]
        until = max(now, min((seat.ripe_at for seat in present), default=now) + PEERAGE_S)
        by_id = {seat.scheduler: seat for seat in present if seat.ripe_at <= until}
        counted = tuple(by_id.values())
        if counted == self.counted:
            return []
        self.counted = counted
        orders: list[Order] = [Say(seat.address, self._view()) for seat in present]
        if not counted:
            self._swarms.clear()
        for blob, swarm in self._swarms.items():
            orders += self._moved(blob, swarm, now)
        return orders

    def _moved(self, blob: Digest, swarm: _Swarm, now: float) -> list[Order]:
        home = self._home(blob)
        if home is swarm.home:
            return []
        if swarm.home.connected:
            swarm.leaving[swarm.home.address] = now + HANDOVER_S
        swarm.leaving.pop(home.address, None)
        swarm.home = home
        return [Rejoin(blob)]

    def _home(self, key: str) -> Seat:
        by_id = {seat.scheduler: seat for seat in self.counted if seat.scheduler is not None}
        return by_id[home_of(key, by_id)]

    # ------------------------------------------------------- what the agent says

    def route(self, message: Message) -> Sequence[str]:
        """Return the addresses that a message of this agent goes to; none where no scheduler counts."""
        match message:
            case Stored():
                for blob in message.blobs:
                    self._swarms.pop(blob, None)
            case Leave():
                self._swarms.pop(message.blob, None)
            case Join():
                return self._join(message.blob)
            case Missing():
                swarm = self._swarms.get(message.blob)
                return () if swarm is None else (swarm.home.address,)
            case Done() | Failed() | Renew() | Refuted():
                swarm = self._swarms.get(message.blob)
                return () if swarm is None else (swarm.home.address, *swarm.leaving)
            case Resolve():
                return self._ask(message)
            case Resolved():
                asked = self._questions.pop(message.number, None)
                return () if asked is None else (asked.address,)
        return [seat.address for seat in self.seats.values() if seat.connected]

    def _join(self, blob: Digest) -> Sequence[str]:
        if not self.counted:
            return ()
        swarm = self._swarms.get(blob)
        if swarm is None:
            swarm = self._swarms[blob] = _Swarm(self._home(blob))
        return (swarm.home.address,)

    def _ask(self, message: Resolve) -> Sequence[str]:
        if not self.counted:
            return ()
        home = self._home(f"{message.registry}/{message.repository}:{message.tag}")
        self._note_question(message.number, home)
        return (home.address,)

    def _note_question(self, number: int, asked: Seat) -> None:
        self._questions.setdefault(number, asked)
        if len(self._questions) > MAX_QUESTIONS:
            del self._questions[next(iter(self._questions))]

    # ------------------------------------------------------------------- status

    def twin(self, address: str) -> str | None:
        """Return the address where the scheduler of this one is connected already; None where there is none."""
        own = self.seats[address]
        for seat in self.seats.values():
            if seat is not own and seat.present and seat.scheduler == own.scheduler:
                return seat.address
        return None

    def status(self) -> list[Standing]:
        """Return how it is with each."""
        homes = [swarm.home.address for swarm in self._swarms.values()]
        seats = self.seats.values()
        return [Standing(seat.address, self._state(seat), homes.count(seat.address)) for seat in seats]

    def _state(self, seat: Seat) -> str:
        if seat in self.counted:
            return IN_USE
        if seat.connected:
            return "returning"
        twin = self.twin(seat.address)
        return f"the same as {twin}" if twin else "lost"
