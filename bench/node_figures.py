# SPDX-License-Identifier: Apache-2.0
"""What `p2pdist bench node` found: one figure for each measurement, as a row, as JSON, and against its target. Pure.

CPU is that of the serving processes alone, per GiB of payload that reached clients; RSS is the peak of the largest.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench.contract import at_least, at_most, record
from bench.results import percentile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.contract import Target

GIB = 1 << 30
P2PDIST, NGINX, REGISTRY = "p2pdist", "nginx", "registry"
P2PDIST_IDENTITY = "p2pdist-identity"
"""As P2PDIST, with certificates and TLS between agents."""
PARTS = ("blob", "ranges", "small", "peers", "swarm")
"""What can be measured."""
IDENTITY_CPU = 2.0
"""What TLS may cost a swarm, times the clear."""
NGINX_CPU_SPARE = 1.2
SWARM_CPU_S_PER_GIB = 2.5
IDLE_RSS_MIB, PEAK_RSS_MIB = 80.0, 150.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measurement.

    Args:
        part: what was measured, such as "warm".
        system: what served.
        nodes: agents, or servers, that took part.
        payload_bytes: what all clients together received.
        ttfb_s: of each request, where measured.
        requests: answered in `seconds`, where they are what counts.
    """

    part: str
    system: str
    seconds: float
    payload_bytes: int
    cpu_s: float
    rss_mib_max: float
    nodes: int = 1
    image_bytes: int = 0
    ttfb_s: Sequence[float] = ()
    requests: int | None = None
    egress_ratio: float | None = None
    idle_cpu_ratio: float | None = None

    @property
    def bytes_per_s(self) -> float:
        return self.payload_bytes / self.seconds if self.seconds else 0.0

    @property
    def cpu_s_per_gib(self) -> float:
        return self.cpu_s / (self.payload_bytes / GIB) if self.payload_bytes else 0.0

    @property
    def requests_per_s(self) -> float | None:
        return None if self.requests is None or not self.seconds else self.requests / self.seconds

    @property
    def cpu_s_per_request(self) -> float | None:
        return None if not self.requests else self.cpu_s / self.requests

    def ttfb(self, percent: float) -> float | None:
        """Return a percentile of the times to the first byte, in seconds; None without any."""
        return percentile(sorted(self.ttfb_s), percent)

    def as_json(self) -> dict[str, Any]:
        """Return the figure under the keys of the command-line contract."""
        return record(
            {
                "system": self.system,
                "part": self.part,
                "nodes": self.nodes,
                "image_bytes": self.image_bytes,
                "goodput_bytes_per_s": self.bytes_per_s,
                "last_s": self.seconds,
                "origin_egress_ratio": self.egress_ratio,
                "cpu_s_per_gib": self.cpu_s_per_gib,
                "rss_mib_max": self.rss_mib_max,
                "ttfb_p50_s": self.ttfb(50),
                "ttfb_p99_s": self.ttfb(99),
                "failed_pulls": 0,
                "idle_cpu_ratio": self.idle_cpu_ratio,
                "requests_per_s": self.requests_per_s,
                "cpu_s_per_request": self.cpu_s_per_request,
                "payload_bytes": self.payload_bytes,
                "cpu_s": self.cpu_s,
            }
        )


_COLUMNS: Sequence[tuple[str, Callable[[Figure], str]]] = (
    ("part", lambda figure: figure.part),
    ("served by", lambda figure: figure.system),
    ("seconds", lambda figure: f"{figure.seconds:.2f}"),
    ("GB/s", lambda figure: f"{figure.bytes_per_s / 1e9:.2f}"),
    ("CPU-s/GiB", lambda figure: f"{figure.cpu_s_per_gib:.2f}"),
    ("requests/s", lambda figure: _number(figure.requests_per_s, 0)),
    ("CPU-ms each", lambda figure: _number(figure.cpu_s_per_request, 2, 1000)),
    ("TTFB p50 ms", lambda figure: _number(figure.ttfb(50), 1, 1000)),
    ("p99", lambda figure: _number(figure.ttfb(99), 1, 1000)),
    ("RSS MiB", lambda figure: f"{figure.rss_mib_max:.0f}"),
    ("idle %", lambda figure: _number(figure.idle_cpu_ratio, 0, 100)),
)


def targets(figures: Sequence[Figure]) -> Iterator[Target]:
    """Yield those targets that these figures say something about; of several runs the median counts."""
    agent, nginx = _of(figures, "warm", P2PDIST), _of(figures, "warm", NGINX)
    if agent and nginx:
        seen, other = (statistics.median(run.bytes_per_s / 1e9 for run in runs) for runs in (agent, nginx))
        yield at_least("warm blob, throughput (nginx's)", seen, other, "GB/s", 2)
        seen, other = (statistics.median(run.cpu_s_per_gib for run in runs) for runs in (agent, nginx))
        yield at_most("warm blob, CPU (nginx's + 20%)", seen, NGINX_CPU_SPARE * other, "CPU-s/GiB", 2)
    if swarm := _of(figures, "swarm", P2PDIST):
        seen = statistics.median(run.cpu_s_per_gib for run in swarm)
        yield at_most("cold swarm, CPU of all agents", seen, SWARM_CPU_S_PER_GIB, "CPU-s/GiB", 2)
    if swarm and (secured := _of(figures, "swarm", P2PDIST_IDENTITY)):
        seen, clear = (statistics.median(run.cpu_s_per_gib for run in runs) for runs in (secured, swarm))
        yield at_most("the same with identity (twice the clear)", seen, IDENTITY_CPU * clear, "CPU-s/GiB", 2)
    if idle := _of(figures, "idle", P2PDIST):
        yield at_most("memory at rest", max(figure.rss_mib_max for figure in idle), IDLE_RSS_MIB, "MiB")
    if ours := [figure for figure in figures if figure.system == P2PDIST]:
        yield at_most("memory, peak of all parts", max(figure.rss_mib_max for figure in ours), PEAK_RSS_MIB, "MiB")


def _of(figures: Sequence[Figure], part: str, system: str) -> list[Figure]:
    return [figure for figure in figures if (figure.part, figure.system) == (part, system)]


def table(figures: Sequence[Figure]) -> Table:
    """Return a row for each figure."""
    shown = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, (name, _) in enumerate(_COLUMNS):
        shown.add_column(name, justify="left" if number < 2 else "right", no_wrap=True)
    for figure in figures:
        shown.add_row(*(cell(figure) for _, cell in _COLUMNS))
    return shown


def _number(value: float | None, digits: int, factor: float = 1.0) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"
