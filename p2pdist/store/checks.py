# SPDX-License-Identifier: Apache-2.0
"""What is known of stored blobs' bytes on the medium: which chunks were lately found to be what was stored.

A blob is right when it is committed; afterwards disks fail. So a chunk is compared with its checksum before it is
served, unless that was done within HOLDS_S, and all blobs are read once in a while (scrub.py). Owns the memory of that,
and no blob: who finds a wrong chunk tells the store.

Threads: any; where two note chunks at the same time, one of them may be checked again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

HOLDS_S = 3600.0
"""For so long a chunk mostly stays in memory, where no disk can change it."""


@dataclass(slots=True)
class Tally:
    """What all checks of a store came to."""

    checked_bytes: int = 0
    damaged_blobs: int = 0


@dataclass(slots=True)
class Record:
    """One blob's: the chunks that were found to be right since `since_s`, and when all were; wall-clock seconds."""

    right: int = 0
    since_s: float = 0.0
    whole_s: float = 0.0

    def lately(self, now_s: float) -> int:
        """Return the chunks that need no check; a clock that was set back vouches for none."""
        return self.right if 0.0 <= now_s - self.since_s < HOLDS_S else 0

    def note(self, chunks: int, now_s: float) -> None:
        """Add chunks that are right now."""
        before = self.lately(now_s)
        if not before:
            self.since_s = now_s
        self.right = before | chunks


@dataclass(frozen=True, slots=True)
class Checks:
    """The checks of one blob, for one who has it open.

    Args:
        damaged: makes the store drop the blob, with the reason.
        whole: makes the store remember that all of it is right.
    """

    record: Record
    tally: Tally
    now: Callable[[], float]
    damaged: Callable[[str], None]
    whole: Callable[[], None]

    @property
    def right(self) -> int:
        """Return the chunks that need no check."""
        return self.record.lately(self.now())

    def passed(self, index: int, size_bytes: int) -> None:
        """Note that a chunk was read and is right."""
        self.tally.checked_bytes += size_bytes
        self.record.note(1 << index, self.now())
