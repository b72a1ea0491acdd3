# SPDX-License-Identifier: Apache-2.0
"""What agents report of each other, and whom enough of them have banned. Pure.

An agent that a quorum of distinct reporters has banned is shut out: handed to nobody as a neighbour, given no lease and
no question. A report counts for as long as the reporter's own ban lasts, and REPORT_S at most: a shut-out ends by
itself, soon the first time, and later each further time, as bans double. Reporters at one address count once, and what
a shut-out agent reports does not count. Who was found to lie (disputes.py) is shut out without a quorum.

Invariants: fewer than QUORUM reporters never shut anybody out; of one reporter at most MAX_SUSPECTS reports are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from p2pdist.core.types import PeerId

QUORUM = 3
"""Distinct reporters, at least: two liars that agree shut nobody out."""
QUORUM_SHARE = 8
"""In a larger cluster one in so many agents has to report, ..."""
QUORUM_MAX = 8
"""... up to this: who lies to its twenty neighbours is known to no more."""
REPORT_S = 300.0
MAX_SUSPECTS = 32
"""Whoever bans more than this is likely the one to blame: the oldest of its reports no longer count."""


def quorum(agents: int) -> int:
    """Return how many distinct reporters shut one of so many agents out."""
    return max(QUORUM, min(-(-agents // QUORUM_SHARE), QUORUM_MAX))


class Reports:
    """All reports that count."""

    def __init__(self) -> None:
        self._by: dict[PeerId, dict[PeerId, float]] = {}
        """Suspects by reporter, and until when that counts."""
        self._against: dict[PeerId, dict[PeerId, str]] = {}
        """Reporters by suspect, and where each stands."""
        self.out: set[PeerId] = set()
        """Agents shut out."""
        self.news: list[tuple[PeerId, str]] = []
        """Those of them that whoever tells people has not told of yet, and why they are."""
        self._found: dict[PeerId, float] = {}
        """Who was found to lie, and until when that counts."""

    def found(self, liar: PeerId, now: float) -> bool:
        """Shut out who was found to lie; return whether that is new."""
        self._found[liar] = now + REPORT_S
        return self._shut_out(liar, "it said false checksums, as two others have read them")

    def _shut_out(self, suspect: PeerId, why: str) -> bool:
        if suspect in self.out:
            return False
        self.out.add(suspect)
        self.news.append((suspect, why))
        return True

    def note(
        self, reporter: PeerId, place: str, suspect: PeerId, now: float, agents: int, ban_s: float = REPORT_S
    ) -> bool:
        """Take in a report; return whether it shuts the suspect out.

        Args:
            place: the reporter's address; reporters of one place count once.
            agents: how many are connected.
            ban_s: for how long the reporter has nothing to do with the suspect.
        """
        if suspect == reporter:
            return False
        of_reporter = self._by.setdefault(reporter, {})
        of_reporter.pop(suspect, None)
        of_reporter[suspect] = now + min(ban_s, REPORT_S)
        self._against.setdefault(suspect, {})[reporter] = place
        while len(of_reporter) > MAX_SUSPECTS:
            self._withdraw(reporter, next(iter(of_reporter)))
        return self._judge(suspect, agents)

    def _judge(self, suspect: PeerId, agents: int) -> bool:
        """Return whether a suspect has to be shut out that was not."""
        places = {place for reporter, place in self._against.get(suspect, {}).items() if reporter not in self.out}
        return len(places) >= quorum(agents) and self._shut_out(suspect, "a quorum of others has banned it")

    def _withdraw(self, reporter: PeerId, suspect: PeerId) -> None:
        del self._by[reporter][suspect]
        if not self._by[reporter]:
            del self._by[reporter]
        against = self._against[suspect]
        del against[reporter]
        if not against:
            del self._against[suspect]
            if suspect not in self._found:
                self.out.discard(suspect)

    def expire(self, now: float) -> None:
        """Let old reports count no more; who is left without any is let in again."""
        for liar in [liar for liar, until in self._found.items() if until <= now]:
            del self._found[liar]
            if liar not in self._against:
                self.out.discard(liar)
        for reporter, suspects in list(self._by.items()):
            for suspect in [suspect for suspect, until in suspects.items() if until <= now]:
                self._withdraw(reporter, suspect)
