# SPDX-License-Identifier: Apache-2.0
"""What a rollout looked like while it ran: bytes that each node had, and bytes that had left the origin, over time.

Five readings a second: of counters in this process, and of one interface's. A dozen nodes cost a thousandth of a core.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.lab.pullers import Pull

EVERY_S = 0.2


@dataclass(slots=True)
class Series:
    """Readings side by side; times in seconds from the start of the rollout."""

    times_s: list[float] = field(default_factory=list)
    done_bytes: list[list[int]] = field(default_factory=list)
    """At each time, of each node."""
    origin_bytes: list[int] = field(default_factory=list)

    def node(self, number: int) -> list[int]:
        """Return what one node had at each time."""
        return [done[number] for done in self.done_bytes]


async def sample(series: Series, pulls: Sequence[Pull], origin_bytes: Callable[[], int], started_s: float) -> None:
    """Add a reading to `series` five times a second until cancelled, and a last one then."""
    before = origin_bytes()

    def read() -> None:
        series.times_s.append(trio.current_time() - started_s)
        series.done_bytes.append([pull.done_bytes for pull in pulls])
        series.origin_bytes.append(origin_bytes() - before)

    try:
        while True:
            read()
            await trio.sleep(EVERY_S)
    finally:
        read()
