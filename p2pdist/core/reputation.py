# SPDX-License-Identifier: Apache-2.0
"""What peers did wrong, and for how long nobody talks to them: scores that decay, bans that double, a way back. Pure.

Offences add to a score that halves every HALF_LIFE_S; at BAN_AT the peer is banned, for BAN_S the first time and twice
as long each time after, up to MAX_BAN_S. Each GOOD_S after a ban's end without another offence takes one doubling
back, until nothing is remembered. Without a cluster identity a peer may come back under another name: an address under
which MAX_NAMES names are banned at a time is banned itself.

Invariants: the tables are bounded; a ban ends by itself; nothing that one peer does counts against another, but for
those that share its address.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from p2pdist.core.types import PeerId

BAN_S = 30.0
"""The first time: long enough to go on without the peer, short enough to forgive a repaired one."""
MAX_BAN_S = 3600.0
HALF_LIFE_S = 600.0
GOOD_S = 600.0
BAN_AT = 1.0
MAX_RECORDS = 4096
"""Peers remembered; beyond them the one whose ban ended first, or ends first, is forgotten."""
FORGIVEN = 0.1
"""A score that is not worth a place in the memory."""
MAX_NAMES = 3


class Offence(StrEnum):
    """What a peer did; the text is the `reason` in metrics and on the wire."""

    CORRUPT = "corrupt"
    """A chunk's bytes are not what a better word than its own, or its own, says."""
    FALSE_CHECKSUM = "false-checksum"
    """It vouched for a checksum that the origin, or the scheduler, refutes."""
    SUSPECT = "suspect"
    """The same of a peer that has sent many right chunks: it may have believed another."""
    ABSENT = "absent"
    """It refused chunks that it had announced, again and again."""
    STALLED = "stalled"
    """It let chunks go late, one after the other."""
    SLOW_READER = "slow-reader"
    """It took a chunk and hardly reads it."""
    FLOOD = "flood"
    """It sends more messages than any honest peer."""
    PROTOCOL = "protocol"
    """It breaks the protocol."""


WEIGHTS = {Offence.SUSPECT: 0.25, Offence.ABSENT: 0.6}
"""What may happen to the honest once in a while: five of one kind, or two of the other, in some minutes are a ban. Any
other offence is one by itself."""


@dataclass(slots=True)
class Record:
    """One peer's past."""

    host: str = ""
    score: float = 0.0
    scored_at: float = 0.0
    bans: int = 0
    until: float = 0.0
    """End of the last ban."""
    reason: Offence = Offence.PROTOCOL
    """Of the last ban."""

    def score_at(self, now: float) -> float:
        return float(self.score * 0.5 ** ((now - self.scored_at) / HALF_LIFE_S))

    def bans_at(self, now: float) -> int:
        """Return the bans that still count: one less for each GOOD_S since the last one's end."""
        return max(0, self.bans - int(max(0.0, now - self.until) / GOOD_S))


class Reputation:
    """All peers that ever did wrong and are not forgiven."""

    def __init__(self) -> None:
        self.records: dict[PeerId, Record] = {}
        self.bans: Counter[Offence] = Counter()
        """Bans since the start."""

    def offended(self, peer: PeerId, offence: Offence, now: float, host: str = "") -> float:
        """Count an offence; return for how many seconds the peer is banned for it, 0.0 where it is not yet.

        Args:
            host: the address that it connected from; empty: not known, or shared by all.
        """
        record = self.records.get(peer)
        if record is None:
            self._make_room(now)
            record = self.records[peer] = Record()
        record.host = host or record.host
        record.score, record.scored_at = record.score_at(now) + WEIGHTS.get(offence, BAN_AT), now
        if record.score < BAN_AT or record.until > now:
            return 0.0
        ban_s = min(BAN_S * 2.0 ** record.bans_at(now), MAX_BAN_S)
        record.bans = record.bans_at(now) + 1
        record.until, record.reason, record.score = now + ban_s, offence, 0.0
        self.bans[offence] += 1
        return ban_s

    def is_banned(self, peer: PeerId, now: float, host: str = "") -> bool:
        """Whether to have nothing to do with a peer yet, for its own sake or its address's."""
        record = self.records.get(peer)
        if record is not None and record.until > now:
            return True
        return bool(host) and sum(other.host == host for other in self.banned(now).values()) >= MAX_NAMES

    def banned(self, now: float) -> dict[PeerId, Record]:
        """Return those that are banned now."""
        return {peer: record for peer, record in self.records.items() if record.until > now}

    def pardon(self, peer: PeerId) -> None:
        """Forget what a peer did: it was in the right."""
        self.records.pop(peer, None)

    def _make_room(self, now: float) -> None:
        """Forget who is forgiven; where all are remembered, the one whose ban is over first."""
        if len(self.records) < MAX_RECORDS:
            return
        self.records = {
            peer: record
            for peer, record in self.records.items()
            if record.until > now or record.bans_at(now) or record.score_at(now) > FORGIVEN
        }
        if len(self.records) >= MAX_RECORDS:
            del self.records[min(self.records, key=lambda peer: self.records[peer].until)]
