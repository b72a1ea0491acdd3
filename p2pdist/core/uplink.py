# SPDX-License-Identifier: Apache-2.0
"""What this agent may send a second where its way out is slow, so that no queue stands before it. Pure.

Whatever a slow uplink cannot carry waits before it, in a kernel or a modem, and with it waits all that this node says:
its words to peers and the scheduler, and the acknowledgements of what it receives. Measured, 2 Mbit/s out and 20 in:
with six chunks on their way an answer took 1.9 s, and the node received 2.5 Mbit/s; with as much held back that the
uplink was nine tenths full, 0.1 s and 18.

The queue is what is on its way over what is acknowledged a second (Little's law). That it stands before our way out,
and not before one receiver's way in, shows in connections that carry but words: their answers are late, too.

Invariants: no limit before three quarters of the connections have been late; none stays for more than FORGET_S unused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

LOOK_S = 1.0
LATE_S = 0.5
"""Answers later than this, beyond their least, tell of a queue; in saturated swarms of equal links they are less than
0.2 s late at 20 Mbit/s."""
TIMELY = 0.25
"""The part of the connections, the most punctual, of which even the last must be late."""
LEAST_LINKS = 3
"""Connections that must have carried something: of fewer it is not clear whose queue it is."""
QUEUE_S = 0.25
"""A queue that counts, once there is a limit."""
FRAMES_BYTES = 48 * 1024
"""What is on its way without any queue: a frame or three."""
SHRINKAGE = 0.8
"""What the uplink carries cannot have become less than this part of what it was, in one look."""
FULL, EMPTYING = 0.9, 0.1
"""What is sent, of what the uplink carries: at most, and at least while there is a queue to be got rid of."""
GROWTH, USED = 0.01, 0.95
"""Without a queue a limit that is used to this part grows by that, by twice that at the next look, and so on: the
uplink may have become faster. In five looks by a sixth, in twenty by eight times."""
FORGET_S = 60.0
"""A limit that was not looked at for so long is none."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What the kernel says of a connection.

    Args:
        acked_bytes: since it was made.
        underway_bytes: sent, and not acknowledged yet.
        late_s: what an answer takes lately, beyond the least that it has taken.
    """

    acked_bytes: int
    underway_bytes: int
    late_s: float


class Uplink:
    """The limit of one agent."""

    def __init__(self) -> None:
        self.bytes_per_s = 0
        """0: no limit."""
        self._carries = 0.0
        """What the uplink carries, in bytes per second, as far as is known."""
        self._calm = 0
        """Looks in a row without a queue."""
        self._acked: dict[Hashable, int] = {}
        self._looked_at = float("-inf")

    def look(self, links: Mapping[Hashable, Sent], now: float) -> None:
        """Take in what the connections are like now; every LOOK_S or so while chunks are sent."""
        passed_s = now - self._looked_at
        moved = {key: sent.acked_bytes - self._acked.get(key, sent.acked_bytes) for key, sent in links.items()}
        self._acked = {key: sent.acked_bytes for key, sent in links.items()}
        self._looked_at = now
        if passed_s > FORGET_S:
            self.bytes_per_s, self._carries = 0, 0.0
        if passed_s > 2 * LOOK_S:
            return
        rate = sum(moved.values()) / passed_s
        underway_bytes = sum(sent.underway_bytes for sent in links.values())
        queue_s = underway_bytes / max(rate, self._carries, 1.0) if underway_bytes > FRAMES_BYTES else 0.0
        if self.bytes_per_s:
            self._adapt(rate, queue_s)
        elif queue_s > LATE_S and _all_late([links[key].late_s for key, count in moved.items() if count]):
            self._carries, self._calm = rate, 0
            self._limit(queue_s)

    def _adapt(self, rate: float, queue_s: float) -> None:
        if queue_s > QUEUE_S:
            # A queue that never was empty: what got through is what the uplink carries.
            self._carries, self._calm = max(rate, SHRINKAGE * self._carries), 0
        elif rate >= USED * self.bytes_per_s:
            self._calm += 1
            self._carries *= 1 + GROWTH * self._calm
        self._limit(queue_s)

    def _limit(self, queue_s: float) -> None:
        """Send so much less than the uplink carries that the queue is gone at the next look."""
        self.bytes_per_s = max(1, int(self._carries * max(EMPTYING, FULL - queue_s / LOOK_S)))


def _all_late(late_s: list[float]) -> bool:
    return len(late_s) >= LEAST_LINKS and sorted(late_s)[int(TIMELY * len(late_s))] > LATE_S
