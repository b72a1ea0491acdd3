# SPDX-License-Identifier: Apache-2.0
"""How many adjacent chunks of a blob one request to the origin asks for: as many as come in a moment.

A request costs about as much as receiving a megabyte, so that where links are fast one for each chunk costs more than
the bytes. Where they are slow a run of chunks in one hand keeps the others waiting for them. Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

RUN_S = 0.05
"""What one request brings in this time is asked for at once: a chunk of 256 KiB up to 80 Mbit/s, 4 MiB from 670 on."""
MAX_RUN_BYTES = 4 * 1024 * 1024
"""Bounds the buffers, as large chunks do; twice that brings nothing (docs/performance.md)."""
MEMORY = 0.8
"""What a chunk's measurement keeps of its weight when the next one comes: the last five or so count."""


class Rate:
    """What a connection carries, measured while chunks come or go; slow until the first few have."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._s = RUN_S

    def measured(self, size_bytes: int, taken_s: float) -> None:
        """Take in how long the bytes of a chunk took, without the wait for the first of them."""
        self._bytes = MEMORY * self._bytes + size_bytes
        self._s = MEMORY * self._s + taken_s

    def bytes_in(self, seconds: float) -> float:
        """Return how much comes or goes in so long."""
        return self._bytes * seconds / max(self._s, 1e-6)

    @property
    def run_bytes(self) -> int:
        """What a request to the origin should ask for; at least one chunk is, whatever this says."""
        return int(min(self.bytes_in(RUN_S), MAX_RUN_BYTES))


def run_from(index: int, free: int, run_bytes: int, chunk_bytes: int) -> range:
    """Return the chunks to ask for together: `index`, and those of `free` right behind it, as far as `run_bytes` go."""
    behind = ~(free >> index + 1)
    adjacent = (behind & -behind).bit_length()
    return range(index, index + min(adjacent, max(1, run_bytes // chunk_bytes)))


def runs_of(indices: Iterable[int]) -> list[range]:
    """Return the unbroken runs that ascending indices are made of."""
    runs: list[range] = []
    for index in indices:
        if runs and runs[-1].stop == index:
            runs[-1] = range(runs[-1].start, index + 1)
        else:
            runs.append(range(index, index + 1))
    return runs
