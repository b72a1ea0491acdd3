# SPDX-License-Identifier: Apache-2.0
"""The registry, and the client that reads chunks from it: tries, waits and gives up as net/origin.py does."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from bench.schedules.plan import ORIGIN_KINDS
from p2pdist.core.verify import checksum_of
from p2pdist.errors import DeniedByOrigin, OriginError

if TYPE_CHECKING:
    from collections.abc import Generator

    from bench.schedules.agent import Agent
    from bench.schedules.network import Network
    from bench.schedules.plan import Fault, Schedule
    from bench.schedules.world import Blob
    from p2pdist.core.types import Checksum

TRIES = 4
BACKOFF_S = 0.25
WAITS_S = {"error": 0.05, "busy": 0.05, "refused": 0.01, "silent": 5.0, "denied": 0.05}
"""What a try takes that gets no bytes: silence is a connection that is not made within connect_s."""
SLOW_S = (2.0, 10.0)
"""Of a chunk; net/origin.py gives up after 15 s without a byte."""
_READ_S = (0.02, 0.1)


class Origin:
    """What each node finds, by the schedule, and what has been read."""

    def __init__(self, network: Network, schedule: Schedule) -> None:
        self.network = network
        self.egress: Counter[tuple[Blob, int]] = Counter()
        self.reads: Counter[str] = Counter()
        """Chunks read, by node."""
        self.misled: set[tuple[str, Blob]] = set()
        """Nodes that got wrong bytes, and of which blobs."""
        self._faults = [fault for fault in schedule.faults if fault.kind in ORIGIN_KINDS]
        self._rngs = {number: network.rng(f"origin/{number}") for number in range(schedule.nodes)}

    def fault(self, agent: Agent) -> Fault | None:
        """Return what is wrong for a node now."""
        hits = (fault for fault in self._faults if fault.hits(agent.number, self.network.now))
        return next(hits, None)

    def well_since(self, agent: Agent) -> float:
        """Return since when nothing has been wrong for a node: minus infinity if never, infinity while something is."""
        if self.fault(agent) is not None:
            return float("inf")
        ended = (fault.until_s for fault in self._faults if not fault.nodes or agent.number in fault.nodes)
        return max((until for until in ended if until <= self.network.now), default=float("-inf"))

    def denied(self, agent: Agent, since: float) -> bool:
        """Whether it has denied a node something since then."""
        denials = (fault for fault in self._faults if fault.kind == "denied")
        return any(
            fault.at_s <= self.network.now and fault.until_s >= since
            for fault in denials
            if not fault.nodes or agent.number in fault.nodes
        )

    def read(self, agent: Agent, blob: Blob, index: int) -> Generator[float, None, tuple[Checksum, float]]:
        """Return a chunk's checksum, after as long as the client tries, and how long its bytes took.

        Raises:
            OriginError: it has given up.
        """
        rng = self._rngs[agent.number]
        for attempt in range(TRIES):
            fault = self.fault(agent)
            kind = fault.kind if fault is not None else ""
            if fault is None or kind in ("slow", "wrong"):
                took_s = rng.uniform(*(SLOW_S if kind == "slow" else _READ_S))
                yield took_s
                wrong = fault is not None and kind == "wrong" and rng.random() < fault.ratio
                return self._given(agent, blob, index, wrong=wrong), took_s
            yield WAITS_S[kind]
            if kind == "denied":
                raise DeniedByOrigin("denied", status_code=403)
            yield BACKOFF_S * 2**attempt * rng.uniform(0.5, 1)
        raise OriginError(kind, retry_after_s=fault.ratio if fault is not None and kind == "busy" else None)

    def _given(self, agent: Agent, blob: Blob, index: int, *, wrong: bool) -> Checksum:
        self.egress[blob, index] += 1
        self.reads[agent.name] += 1
        if not wrong:
            return blob.checksums[index]
        self.misled.add((agent.name, blob))
        return checksum_of(f"wrong {blob.digest}/{index}/{self.egress[blob, index]}".encode())
