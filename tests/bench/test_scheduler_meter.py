# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from dataclasses import replace

import pytest

from bench.contract import KEYS
from bench.scheduler_meter import Findings, Sample, SchedulerMeter, Usage, void_reason
from bench.scheduler_model import Image
from tests.bench.test_scheduler_model import plan

QUIET = Usage(
    cpu_start_ratio=0.5,
    cpu_peak_ratio=0.7,
    cpu_s=5,
    cpu_wait_ratio=0.01,
    load_cpu_ratio=0.2,
    rss_mib_empty=40,
    rss_mib_idle=50,
    rss_mib_max=60,
)


def sample(time_s: float, cpu_s: float, *, waited_s: float = 0.0, own_cpu_s: float = 0.0) -> Sample:
    return Sample(time_s, cpu_s, waited_s, own_cpu_s, 50.0)


def test_what_was_used_counts_from_the_start_to_the_end_of_the_spread() -> None:
    meter = SchedulerMeter(os.getpid())
    meter.begun = sample(100, 10)
    spent = [
        sample(90, 0),
        meter.begun,
        sample(101, 10.5),
        sample(102, 11.4, waited_s=0.2, own_cpu_s=1),
        sample(103, 12),
    ]
    meter.samples = spent
    meter.rss_mib_idle = 55.0
    used = meter.usage(spread_s=2)
    assert used.cpu_start_ratio == pytest.approx(0.7)
    assert used.cpu_peak_ratio == pytest.approx(0.9)
    assert used.cpu_s == pytest.approx(2)
    assert used.cpu_wait_ratio == pytest.approx(0.1)
    assert used.load_cpu_ratio == pytest.approx(0.5)
    assert used.rss_mib_idle == 55
    assert used.rss_mib_max > 0


def test_a_sample_is_due_each_second() -> None:
    meter = SchedulerMeter(os.getpid())
    taken = meter.sample()
    assert not meter.due(taken.time_s + 0.9)
    assert meter.due(taken.time_s + 1.0)
    assert taken.rss_mib > 1


def test_figures_are_rates_percentiles_and_shares_of_each_agent() -> None:
    found = Findings(connect_s=2, started_s=5, finished_s=9, joins=50, leases=40, leasing_s=8)
    found.join_s, found.lease_s, found.bytes_sent, found.bytes_received = [0.001, 0.003], [0.2], 100, 900
    figures = found.figures(plan(), Image(plan()), QUIET)
    assert set(figures) >= set(KEYS)
    assert (figures["joins_per_s"], figures["leases_per_s"], figures["connects_per_s"]) == (10, 5, 5)
    assert (figures["join_p50_ms"], figures["join_p99_ms"]) == (1, 3)
    assert figures["answer_p99_ms"] == 200
    assert figures["resolve_p99_ms"] is None
    assert (figures["nodes"], figures["control_bytes_per_node"], figures["last_s"]) == (10, 100, 9)
    assert figures["memory_kib_per_agent"] == 2048
    assert figures["void"] is None


@pytest.mark.parametrize(
    ("usage", "lag_s", "reason"),
    [
        (QUIET, 0.0, None),
        (replace(QUIET, load_cpu_ratio=0.96), 0.0, "starved"),
        (QUIET, 0.11, "starved"),
        (replace(QUIET, cpu_wait_ratio=0.11), 0.0, "waited for a core"),
    ],
    ids=["quiet", "busy agents", "late agents", "a crowded machine"],
)
def test_a_run_that_measured_something_else_is_void(usage: Usage, lag_s: float, reason: str | None) -> None:
    said = void_reason(usage, lag_s)
    assert said is None if reason is None else reason in (said or "")
