# SPDX-License-Identifier: Apache-2.0
"""When the nodes of a rollout start: at once with some jitter, in batches, or one by one as a Poisson process. Pure.

A batch starts when the one before is done. Nodes that start when others have had a chance to get ahead are late: they
are measured against what their own link could do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random


@dataclass(frozen=True, slots=True)
class Start:
    """A node, by its place in the lab, and when it starts, seconds after its batch."""

    node: int
    offset_s: float
    late: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """How nodes arrive.

    Args:
        jitter_s: each starts at a random moment of this many seconds, in its batch.
        batch_ratio: the part of all nodes that a batch holds, over 0 to 1; 1 for all at once.
        poisson_gap_s: mean time between one start and the next, in the place of jitter; None for none.
    """

    jitter_s: float = 0.0
    batch_ratio: float = 1.0
    poisson_gap_s: float | None = None

    def batches(self, nodes: int, rng: Random) -> list[list[Start]]:
        """Return the starts of each batch, in the order of nodes."""
        offsets = self._offsets(nodes, rng)
        size = max(1, math.ceil(nodes * self.batch_ratio))
        late = [offset_s > 0 if self.poisson_gap_s else node >= size for node, offset_s in enumerate(offsets)]
        starts = [
            Start(node, offset_s, is_late) for node, (offset_s, is_late) in enumerate(zip(offsets, late, strict=True))
        ]
        return [starts[first : first + size] for first in range(0, nodes, size)]

    def _offsets(self, nodes: int, rng: Random) -> list[float]:
        if self.poisson_gap_s is None:
            return [rng.uniform(0, self.jitter_s) for _ in range(nodes)]
        at_s, offsets = 0.0, [0.0]
        while len(offsets) < nodes:
            at_s += rng.expovariate(1 / self.poisson_gap_s)
            offsets.append(at_s)
        return offsets

    def bound_s(self, batches: Sequence[Sequence[Start]], first_s: float, link_s: float) -> float:
        """Return the least time from the first start to the last finish, jitter left out.

        Args:
            first_s: what one node takes for which the origin has to give everything.
            link_s: what one node's link takes for it, once others have it.
        """
        if self.poisson_gap_s is None:
            return first_s + (len(batches) - 1) * link_s
        return max(first_s, max(start.offset_s for start in batches[0]) + link_s)
