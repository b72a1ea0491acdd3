# SPDX-License-Identifier: Apache-2.0
"""What the machine and a process used, read from /proc (proc(5))."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """The machine's CPU time since boot, in ticks over all cores."""

    idle: int
    total: int

    def idle_ratio_since(self, earlier: CpuTimes) -> float:
        """Return the idle share, 0 to 1, of the time between two readings; 1 where no time passed."""
        total = self.total - earlier.total
        return (self.idle - earlier.idle) / total if total > 0 else 1.0


def machine_cpu() -> CpuTimes:
    # user nice system idle iowait irq softirq steal; guest time is already in user.
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return CpuTimes(idle=fields[3] + fields[4], total=sum(fields))


def process_cpu_s(pid: int) -> float:
    """Return the CPU time of a process and its ended children, in seconds; 0 once it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(int(field) for field in fields[11:15]) / _TICKS_PER_S


def process_peak_rss_mib(pid: int) -> float:
    """Return the largest resident size that a process has had, in MiB; 0 once it is gone."""
    return _status_mib(pid, "VmHWM:")


def process_rss_mib(pid: int) -> float:
    """Return the resident size of a process, in MiB; 0 once it is gone."""
    return _status_mib(pid, "VmRSS:")


def process_descriptors(pid: int) -> int:
    """Return how many descriptors a process has open; 0 once it is gone."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def _status_mib(pid: int, name: str) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    for line in status.splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    return 0.0
