# SPDX-License-Identifier: Apache-2.0
"""Rate limits: a token bucket, and how many chunks a limit lets be on their way at once.

The bucket keeps one number, the time at which it will be full again (the generic cell rate algorithm of
ITU-T I.371), so that an unused one costs nothing and a used one no timer.
"""

from __future__ import annotations

from p2pdist.core.chunkmap import MAX_CHUNK_BYTES

MIN_BYTES_PER_S = 1_000_000
"""The least that may be configured: below it a chunk of 4 MiB takes longer than agents wait for one."""
CHUNK_S = 4.5
"""How long the largest chunk may take in one of several slots that share a limit."""
BURST_S = 0.1


class TokenBucket:
    """At most `bytes_per_s` * t + `burst_bytes` in any t seconds, for amounts of at most `burst_bytes`.

    Args:
        bytes_per_s: > 0.
        burst_bytes: how much may go at once after a pause; at least the largest amount that is taken.
    """

    def __init__(self, bytes_per_s: int, burst_bytes: int) -> None:
        self.bytes_per_s = bytes_per_s
        self._burst_s = burst_bytes / bytes_per_s
        self._full_at = float("-inf")

    @classmethod
    def smooth(cls, bytes_per_s: int, largest_bytes: int) -> TokenBucket:
        """Return a bucket with as small a burst as amounts of up to `largest_bytes` at a time allow."""
        return cls(bytes_per_s, max(largest_bytes, int(BURST_S * bytes_per_s)))

    def change(self, bytes_per_s: int, now: float) -> None:
        """Go on at another rate, with the same burst, and as many bytes to wait for."""
        scale = self.bytes_per_s / bytes_per_s
        self._full_at = now + scale * max(0.0, self._full_at - now)
        self._burst_s *= scale
        self.bytes_per_s = bytes_per_s

    def reserve(self, amount_bytes: int, now: float) -> float:
        """Take `amount_bytes` in turn; return when they may be used, `now` or later. There is no giving back."""
        self._full_at = max(self._full_at, now) + amount_bytes / self.bytes_per_s
        return max(now, self._full_at - self._burst_s)

    def available(self, now: float) -> int:
        """Return how many bytes may be taken now without waiting."""
        return max(0, int((self._burst_s - max(0.0, self._full_at - now)) * self.bytes_per_s))


def slots_within(bytes_per_s: int, most: int) -> int:
    """Return how many chunks, `most` at most, may share a limit without any of them coming too late."""
    return max(1, min(most, int(bytes_per_s * CHUNK_S / MAX_CHUNK_BYTES)))
