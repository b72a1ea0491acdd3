# SPDX-License-Identifier: Apache-2.0
"""Links that transfers share fairly, on virtual time. Pure.

A link serves all transfers on it at equal rates (processor sharing), kept as a virtual clock: how many bytes a
transfer that was always there would have been given. A transfer that enters at virtual time v has had its bytes
when the clock shows v + size, so entering costs O(1), and leaving costs nothing until somebody looks.

A transfer over several links ends when each of them has given it its bytes. Where one of them is the narrow one,
the others count the transfer as served early and give what it does not use to the others on them, as TCP flows do:
no link is idle while it is wanted, and none gives more than its rate. What is not modelled: the exact max-min shares
meanwhile, slow start, loss, and the time that a chunk spends in a switch.
"""

from __future__ import annotations

from bisect import insort
from collections import deque

_EPSILON_BYTES = 0.5


class Link:
    """One direction of a link of `rate` bytes per second. Calls come with a `now` that never falls."""

    __slots__ = ("_at", "_clock", "_rate", "_tags")

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._clock = 0.0
        self._at = 0.0
        self._tags: deque[float] = deque()
        """What the clock shows when each transfer has been served, ascending."""

    def _advance(self, now: float) -> None:
        tags, clock, at, rate = self._tags, self._clock, self._at, self._rate
        while tags:
            until = at + (tags[0] - clock) * len(tags) / rate
            if until > now:
                clock += (now - at) * rate / len(tags)
                break
            at, clock = until, tags.popleft()
        self._clock, self._at = clock, now

    def enter(self, size: float, now: float) -> float:
        """Take in a transfer of `size` bytes; return its tag."""
        self._advance(now)
        tags, tag = self._tags, self._clock + size
        if not tags or tags[-1] <= tag:
            tags.append(tag)
        else:
            insort(tags, tag)
        return tag

    def leave(self, tag: float, now: float) -> float:
        """Take out a transfer before its end, and return the bytes that it had not been given yet."""
        self._advance(now)
        if tag in self._tags:
            self._tags.remove(tag)
        return max(0.0, tag - self._clock)

    def when(self, tag: float, now: float) -> float:
        """Return when the clock shows `tag` if nobody else enters; `now` where it has shown it already."""
        if self._at != now:
            self._advance(now)
        clock, left = self._clock, len(self._tags)
        if tag <= clock + _EPSILON_BYTES:
            return now
        rate, at = self._rate, now
        for served in self._tags:
            if served >= tag:
                break
            at += (served - clock) * left / rate
            clock, left = served, left - 1
        return at + (tag - clock) * max(left, 1) / rate


class Transfer:
    """Some bytes on their way over links; dead once it has ended or was called off."""

    __slots__ = ("_passed", "dead", "links", "tags")

    def __init__(self, links: tuple[Link, ...], size: float, now: float) -> None:
        self.links = links
        self.tags = [link.enter(size, now) for link in links]
        self.dead = False
        self._passed = 0
        """So many links, from the first on, have given it all its bytes: they are not asked again."""

    def when(self, short: float, now: float) -> float:
        """Return when all but `short` bytes have passed every link, at the earliest."""
        links, tags, latest = self.links, self.tags, now
        for nth in range(self._passed, len(tags)):
            at = links[nth].when(tags[nth] - short, now)
            if at > latest:
                latest = at
            elif at == now and not short and nth == self._passed:
                self._passed += 1
        return latest

    def call_off(self, now: float) -> float:
        """End it now; return the bytes that the first link had not sent yet."""
        self.dead = True
        left = [link.leave(tag, now) for link, tag in zip(self.links, self.tags, strict=True)]
        return left[0]
