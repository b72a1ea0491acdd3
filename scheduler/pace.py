# SPDX-License-Identifier: Apache-2.0
"""How many leases one registry is worth at a time: measured, never configured. Pure.

Invariants: `leases` is within [LEASES_MIN, LEASES_MAX]; it changes only when one of its own calls says so.
"""

from __future__ import annotations

from collections import deque
from math import ceil
from statistics import fmean
from typing import NamedTuple

LEASES_MIN = 5
"""Chunks in flight from a registry whose link is the limit: 1, 2 and 8 measured worse (SWARM); with 4 the link idled
now and then. More come late and out of order, and bring nothing."""
LEASES_MAX = 64
MEMBER_LEASES = 8
"""Leases that one member holds at a time: half of the connections that an agent opens to registries."""
CROWD = 50
CROWD_LEASES = 3
"""In a swarm of so many members, leases beyond what the registry's pace says: among many chunks on its way a node's
fetch is slow, and with 5 the registry's link carried 92% (simulated, 200 nodes; with 8 97%)."""
SAMPLES = 8
"""Leases that a measurement looks at, at least; else as many as are out."""
TIMELY = 0.75
"""The part of these, the fastest, that count: a measurement neither waits for stragglers nor believes them."""
PATIENCE = 3
"""A trial not decided after so many times the leases that it looks at (the others failed) is given up."""
COUNTED_BYTES = 256 * 1024
"""Smaller chunks tell of latency, not of rates."""
GROWTH = 2.0
"""Of the leases in a trial of more: large enough to stand out from the noise, and to get to 40 in three trials."""
SHRINKAGE = 1.5
"""Of the leases in a trial of fewer: it costs throughput while it lasts."""
SLIGHT = 0.25
"""A gain of throughput below this part of what the leases beyond would bring, were each as fast, is noise."""
HEADROOM = 1.2
"""Leases beyond those measured to be of use: one too few costs its part of the throughput, one too many little."""
NEARLY_ALL = 0.9
"""A trial that calls for this part of its leases is followed by one of more."""
REST_S = 3.0
"""Between a trial and the next; twice as long after each that changed nothing, up to MAX_REST_S."""
MAX_REST_S = 24.0


class Begun(NamedTuple):
    """A lease granted: when (monotonic seconds), and as which of the registry's."""

    at: float
    nth: int


class Pace:
    """The number of leases for one registry, adapted to what it delivers.

    n leases that take t seconds a byte each deliver n / t bytes a second (Little's law; the next lease is granted the
    moment one is done). Where the registry limits each connection, t does not depend on n and more leases bring more;
    where a link is full, t grows with n and they bring nothing. The two are told apart only by another n. So a trial
    takes up twice the leases for as long as it takes to measure t anew: whatever the throughput grew by, the leases
    grow by and a little more: that is where the link fills. While a trial brings nearly all that it could, another
    follows at once. Later trials take turns with ones of fewer leases, which lower a
    number that was chance or is not needed any more. In a trial t is taken from the first leases granted, not from the
    first done: these would be the fast ones.
    """

    def __init__(self) -> None:
        self.leases = LEASES_MIN
        self._granted = 0
        self._first = 0
        """The first lease granted since `leases` changed."""
        self._rest_until = float("-inf")
        self._rest_s = REST_S
        self._up = True
        self._before: tuple[int, float] | None = None
        """During a trial: the leases before it and their seconds a byte."""
        self._samples: deque[float] = deque(maxlen=LEASES_MAX)

    def among(self, members: int) -> int:
        """Return how many leases may be out when a swarm of so many gets the next."""
        return self.leases + (CROWD_LEASES if members >= CROWD else 0)

    def began(self, now: float) -> Begun:
        """Return what `done` wants to know of a lease granted now."""
        self._granted += 1
        return Begun(now, self._granted - 1)

    def done(self, begun: Begun, length_bytes: int, now: float, *, out: int, members: int) -> None:
        """Take in a chunk done.

        Args:
            out: the registry's leases that were out, this one included.
            members: how many there are to lease to.
        """
        nth, size = begun.nth - self._first, max(SAMPLES, self.leases)
        if nth < 0:
            return
        if self._before is not None and nth >= size:
            if nth >= PATIENCE * size:
                self._settle(self._before[0], now)
            return
        if out < self.leases or length_bytes < COUNTED_BYTES:
            return
        self._samples.append((now - begun.at) / length_bytes)
        timely = ceil(TIMELY * size)
        if len(self._samples) < (size if self._before is None else timely):
            return
        measured = self.leases, fmean(sorted(list(self._samples)[-size:])[:timely])
        if self._before is not None:
            self._judge(self._before, measured, members, now)
        elif now >= self._rest_until:
            self._try(measured, members, now)

    def refused(self, now: float) -> None:
        """Note that the registry asked for a pause: fewer leases, and no trial soon."""
        self._settle(max(LEASES_MIN, self.leases // 2), now)
        self._rest_until = now + MAX_REST_S

    def _try(self, measured: tuple[int, float], members: int, now: float) -> None:
        most = min(LEASES_MAX, members * MEMBER_LEASES)
        leases = min(most, int(self.leases * GROWTH)) if self._up else int(self.leases / SHRINKAGE)
        leases = max(leases, LEASES_MIN)
        if (leases > self.leases) != self._up or leases == self.leases:
            self._settle(self.leases, now)
            return
        self._before = measured
        self._set(leases)

    def _judge(self, before: tuple[int, float], measured: tuple[int, float], members: int, now: float) -> None:
        best = worthwhile(*sorted((before, measured)))
        if self._up and best >= NEARLY_ALL * self.leases:
            self._before = None
            self._try(measured, members, now)
            return
        self._rest_s = min(2 * self._rest_s, MAX_REST_S) if best == before[0] else REST_S
        self._settle(best, now)

    def _settle(self, leases: int, now: float) -> None:
        self._before = None
        self._rest_until = now + self._rest_s
        self._up = leases == LEASES_MIN or not self._up
        self._set(leases)

    def _set(self, leases: int) -> None:
        self.leases = leases
        self._first = self._granted
        self._samples.clear()


def worthwhile(few: tuple[int, float], many: tuple[int, float]) -> int:
    """Return how many leases to have, in between two numbers of leases, from the time a byte that each measured."""
    (low, low_s), (high, high_s) = few, many
    gain = high * low_s / (low * max(high_s, 1e-12))
    if gain < 1 + SLIGHT * (high / low - 1):
        return low
    return min(high, round(low * gain * HEADROOM))
