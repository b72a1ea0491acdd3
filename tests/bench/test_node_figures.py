# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io

import pytest
from rich.console import Console

from bench.contract import KEYS
from bench.node_figures import GIB, NGINX, P2PDIST, Figure, table, targets


def figure(
    part: str = "warm", system: str = P2PDIST, *, seconds: float = 0.5, cpu_s: float = 0.25, rss_mib: float = 60
) -> Figure:
    return Figure(part=part, system=system, seconds=seconds, payload_bytes=GIB, cpu_s=cpu_s, rss_mib_max=rss_mib)


def test_rates_are_of_the_payload() -> None:
    small = Figure(
        part="small", system=NGINX, seconds=2, payload_bytes=GIB // 2, cpu_s=1, rss_mib_max=7, requests=4, ttfb_s=[3, 1]
    )
    assert small.bytes_per_s == GIB / 4
    assert small.cpu_s_per_gib == 2
    assert (small.requests_per_s, small.cpu_s_per_request) == (2, 0.25)
    assert (small.ttfb(50), small.ttfb(99)) == (1, 3)


def test_what_was_not_measured_is_left_open() -> None:
    idle = Figure(part="idle", system=P2PDIST, seconds=0, payload_bytes=0, cpu_s=0, rss_mib_max=50)
    assert (idle.bytes_per_s, idle.cpu_s_per_gib) == (0, 0)
    assert (idle.requests_per_s, idle.cpu_s_per_request, idle.ttfb(50)) == (None, None, None)
    assert set(idle.as_json()) >= set(KEYS)
    out = io.StringIO()
    Console(file=out, width=150).print(table([idle]))
    cells = out.getvalue().splitlines()[2].split()
    assert cells == ["idle", P2PDIST, "0.00", "0.00", "0.00", "-", "-", "-", "-", "50", "-"]


@pytest.mark.parametrize(
    ("figures", "met"),
    [
        pytest.param([figure(), figure(system=NGINX)], [True, True, True], id="as fast at the same cost"),
        pytest.param([figure(seconds=0.51), figure(system=NGINX)], [False, True, True], id="slower"),
        pytest.param([figure(cpu_s=0.3), figure(system=NGINX)], [True, True, True], id="20% more CPU"),
        pytest.param([figure(cpu_s=0.31), figure(system=NGINX)], [True, False, True], id="24% more CPU"),
        pytest.param([figure(rss_mib=151)], [False], id="too much memory, no nginx"),
        pytest.param([figure("idle", rss_mib=81)], [False, True], id="too much memory at rest"),
        pytest.param([figure("swarm", cpu_s=2.5)], [True, True], id="a swarm at its target"),
        pytest.param([figure("swarm", cpu_s=2.6)], [False, True], id="a swarm above it"),
        pytest.param([figure(system=NGINX, rss_mib=999)], [], id="nginx alone has no target"),
    ],
)
def test_figures_are_held_against_their_targets(figures: list[Figure], met: list[bool]) -> None:
    assert [target.met for target in targets(figures)] == met


def test_of_several_runs_the_median_counts_and_the_largest_memory() -> None:
    runs = [figure(seconds=seconds, rss_mib=rss) for seconds, rss in ((0.1, 10), (0.5, 200), (9, 10))]
    assert [target.met for target in targets([*runs, figure(system=NGINX)])] == [True, True, False]
