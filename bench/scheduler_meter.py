# SPDX-License-Identifier: Apache-2.0
"""What a run of `p2pdist bench scheduler` found: latencies, rates, and what the scheduler and the load itself used.

Reads the scheduler's figures from /proc (proc(5)); its memory is the process's, without the kernel's socket buffers.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.contract import record
from bench.lab.meters import process_cpu_s, process_peak_rss_mib
from bench.results import percentile

if TYPE_CHECKING:
    from bench.scheduler_model import Image, Plan

SAMPLE_S = 1.0
STARVED_CPU_RATIO = 0.95
STARVED_LAG_S = 0.1
"""A generator busier or later than this in the start measures itself."""
CROWDED_RATIO = 0.1
"""A scheduler that waited for a core so much of the start shared the machine with others."""
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


@dataclass(frozen=True, slots=True)
class Sample:
    """The CPU times of both processes at one time, in seconds, and the scheduler's memory."""

    time_s: float
    cpu_s: float
    waited_s: float
    """For a core, runnable."""
    own_cpu_s: float
    rss_mib: float


class SchedulerMeter:
    """Samples a scheduler process and this one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.samples: list[Sample] = []
        self.begun: Sample | None = None
        self.rss_mib_idle = 0.0

    def due(self, now: float) -> bool:
        return now - self.samples[-1].time_s >= SAMPLE_S

    def sample(self) -> Sample:
        waited_s = int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[1]) / 1e9
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        sample = Sample(time.monotonic(), process_cpu_s(self.pid), waited_s, time.process_time(), pages * _PAGE_MIB)
        self.samples.append(sample)
        return sample

    def idle(self) -> None:
        """Note the memory with all agents connected."""
        self.rss_mib_idle = self.sample().rss_mib

    def begin(self) -> None:
        """Note that the start begins."""
        self.begun = self.sample()

    def progress(self, **counts: int) -> None:
        """Tell the process that started this one how far it is."""
        print(json.dumps({"progress": counts}), flush=True)

    def usage(self, spread_s: float) -> Usage:
        """Return what was used from the beginning of the start to its end, and by the end of the run."""
        assert self.begun is not None
        first = self.begun
        after = [sample for sample in self.samples if sample.time_s >= first.time_s]
        last = next((sample for sample in after if sample.time_s >= first.time_s + spread_s), after[-1])
        elapsed_s = max(last.time_s - first.time_s, SAMPLE_S)
        seconds = [
            (right.cpu_s - left.cpu_s) / (right.time_s - left.time_s)
            for left, right in pairwise(after)
            if right.time_s - left.time_s >= SAMPLE_S / 2
        ]
        return Usage(
            cpu_start_ratio=(last.cpu_s - first.cpu_s) / elapsed_s,
            cpu_peak_ratio=max(seconds, default=0.0),
            cpu_s=after[-1].cpu_s - first.cpu_s,
            cpu_wait_ratio=(last.waited_s - first.waited_s) / elapsed_s,
            load_cpu_ratio=(last.own_cpu_s - first.own_cpu_s) / elapsed_s,
            rss_mib_empty=self.samples[0].rss_mib,
            rss_mib_idle=self.rss_mib_idle,
            rss_mib_max=process_peak_rss_mib(self.pid),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """CPU as parts of one core: in the start, in its worst second; `wait`: runnable, but without a core."""

    cpu_start_ratio: float
    cpu_peak_ratio: float
    cpu_s: float
    cpu_wait_ratio: float
    load_cpu_ratio: float
    rss_mib_empty: float
    rss_mib_idle: float
    rss_mib_max: float


@dataclass(slots=True)
class Findings:
    """What the agents saw. Latencies are lists of seconds; times count from the beginning of the start."""

    connect_s: float = 0.0
    started_s: float = 0.0
    """When the last agent had its first neighbours or lease for the image's contents."""
    finished_s: float = 0.0
    failed_agents: int = 0
    joins: int = 0
    leases: int = 0
    leasing_s: float = 0.0
    messages_sent: int = 0
    messages_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    join_s: list[float] = field(default_factory=list)
    """From a Join to its Neighbours."""
    resolve_s: list[float] = field(default_factory=list)
    """From a Resolve, or the answer of the agent that asks the origin, to Resolved."""
    lease_s: list[float] = field(default_factory=list)
    """From a Done to the next Lease, of whichever agent."""
    lag_s: list[float] = field(default_factory=list)
    """How late the generator's own timers were."""

    def figures(self, plan: Plan, image: Image, usage: Usage) -> dict[str, Any]:
        """Return the figures of a run under the keys of its JSON."""
        lag_s = percentile(sorted(self.lag_s), 99) or 0.0
        figures = {
            "system": "scheduler",
            "nodes": plan.agents,
            "last_s": self.finished_s,
            "failed_pulls": self.failed_agents,
            "control_bytes_per_node": (self.bytes_sent + self.bytes_received) / plan.agents,
            **asdict(plan),
            "chunks": sum(blob.chunks.count for blob in image.blobs.values()),
            "connects_per_s": plan.agents / self.connect_s,
            "joins_per_s": self.joins / self.started_s if self.started_s else 0.0,
            "resolves_per_s": len(self.resolve_s) / self.started_s if self.started_s else 0.0,
            "leases_per_s": self.leases / self.leasing_s if self.leasing_s else 0.0,
            "leases": self.leases,
            **_latency("join", self.join_s),
            **_latency("resolve", self.resolve_s),
            **_latency("lease", self.lease_s),
            **_latency("answer", [*self.join_s, *self.resolve_s, *self.lease_s]),
            "started_s": self.started_s,
            "finished_s": self.finished_s,
            "failed_agents": self.failed_agents,
            "messages_per_agent_sent": self.messages_sent / plan.agents,
            "messages_per_agent_received": self.messages_received / plan.agents,
            "bytes_per_agent_sent": self.bytes_sent / plan.agents,
            "bytes_per_agent_received": self.bytes_received / plan.agents,
            **asdict(usage),
            "memory_kib_per_agent_idle": (usage.rss_mib_idle - usage.rss_mib_empty) * 1024 / plan.agents,
            "memory_kib_per_agent": (usage.rss_mib_max - usage.rss_mib_empty) * 1024 / plan.agents,
            "load_lag_p99_ms": lag_s * 1000,
            "void": void_reason(usage, lag_s),
        }
        return record(figures)


def _latency(name: str, times_s: list[float]) -> dict[str, float | None]:
    ordered = sorted(times_s)
    figures = {"p50": percentile(ordered, 50), "p99": percentile(ordered, 99), "max": percentile(ordered, 100)}
    return {f"{name}_{which}_ms": None if value is None else value * 1000 for which, value in figures.items()}


def void_reason(usage: Usage, lag_s: float) -> str | None:
    """Return why a run says little about the scheduler, or None."""
    if usage.load_cpu_ratio > STARVED_CPU_RATIO or lag_s > STARVED_LAG_S:
        late = f"{usage.load_cpu_ratio:.0%} of a core, timers {lag_s * 1000:.0f} ms late"
        return f"the simulated agents starved ({late}): latencies are theirs; fewer agents, or a faster machine"
    if usage.cpu_wait_ratio > CROWDED_RATIO:
        return f"the scheduler waited for a core {usage.cpu_wait_ratio:.0%} of the time: others use the machine"
    return None
