# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from bench.results import AgentRecord, Cpu, NodeRecord, Result, Setting, Traffic, percentile, summarize

CONTRACT = {
    *("system", "nodes", "image_bytes", "link_mbit", "goodput_bytes_per_s", "bound_s"),
    *("first_s", "p50_s", "p99_s", "last_s", "ratio_to_bound", "origin_egress_ratio"),
    *("cpu_s_per_gib", "rss_mib_max", "control_bytes_per_node", "ttfb_p50_s", "ttfb_p99_s"),
    *("failed_pulls", "duplicate_bytes_ratio", "idle_cpu_ratio"),
}
GIB = 1 << 30


LINK_S = 10.0
"""What an image of 1 GiB takes through a link of SETTING."""

SETTING = Setting(image_bytes=GIB, link_mbit=1000.0, goodput_bytes_per_s=GIB / LINK_S)


def node(started_s: float, finished_s: float, *, error: str | None = None, late: bool = False) -> NodeRecord:
    return NodeRecord(
        started_s=started_s,
        finished_s=finished_s,
        right=error is None,
        ttfb_s=(finished_s / 100,),
        error=error,
        late=late,
    )


def result(
    pulls: Sequence[NodeRecord],
    agents: Sequence[AgentRecord] = (),
    *,
    system: str = "p2pdist",
    setting: Setting = SETTING,
    origin_bytes: int = GIB,
    racks: Mapping[str, int] | None = None,
    idle_cpu_ratio: float = 0.5,
    run: dict[str, Any] | None = None,
) -> Result:
    traffic = Traffic(origin_bytes=origin_bytes, rack_bytes=racks or {})
    return summarize(system, pulls, agents, setting, traffic, Cpu(idle_cpu_ratio), {"seed": 1} if run is None else run)


def test_the_last_node_is_held_against_the_bound() -> None:
    seen = result([node(0, 11), node(0, 13), node(0, 12)])
    assert (seen.first_s, seen.p50_s, seen.last_s) == (11, 12, 13)
    assert seen.bound_s == pytest.approx(10)
    assert seen.ratio_to_bound == pytest.approx(1.3)


def test_own_times_count_from_each_nodes_start() -> None:
    seen = result([node(0, 11), node(5, 15)])
    assert (seen.own_last_s, seen.last_s) == (11, 15)
    assert seen.own_ratio_to_bound == pytest.approx(1.1)


def test_a_node_behind_a_slow_origin_is_held_against_what_that_still_has_to_give() -> None:
    slow = Setting(
        image_bytes=GIB, link_mbit=1000.0, goodput_bytes_per_s=GIB / 50, link_goodput_bytes_per_s=GIB / LINK_S
    )
    seen = result([node(0, 50), node(10, 54), node(45, 56)], setting=slow)
    assert seen.bound_s == pytest.approx(50)
    assert seen.own_ratio_to_bound == pytest.approx(1.1), "44 s of 40 s, 11 s of 10 s"


def test_late_nodes_are_held_against_their_own_link() -> None:
    seen = result([node(0, 15), node(20, 31, late=True), node(31, 43, late=True)])
    assert seen.late_ratio_p50 == pytest.approx(1.1)
    assert seen.late_ratio_max == pytest.approx(1.2)


def test_without_late_nodes_and_racks_nothing_is_said_of_them() -> None:
    seen = result([node(0, 11)])
    assert (seen.late_ratio_p50, seen.late_ratio_max, seen.rack_ingress_ratio_max) == (None, None, None)


def test_the_rack_that_received_most_is_told() -> None:
    seen = result([node(0, 11)], racks={"rack1": GIB, "rack2": GIB * 5 // 4})
    assert seen.rack_ingress_ratio_max == pytest.approx(1.25)


def test_bytes_fetched_beyond_what_was_lacking_are_told() -> None:
    agent = AgentRecord(cpu_s=1, peak_rss_mib=60, from_peers_bytes=GIB, from_origin_bytes=GIB // 2)
    assert result([node(0, 11)], (agent,)).refetched_bytes == GIB // 2


def test_what_was_spent_and_sent_before_a_run_is_not_counted() -> None:
    before = AgentRecord(cpu_s=2, peak_rss_mib=50, control_bytes=7)
    assert AgentRecord(cpu_s=3, peak_rss_mib=60, control_bytes=9).since(before) == AgentRecord(
        cpu_s=1, peak_rss_mib=60, control_bytes=2
    )
    earlier = Traffic(origin_bytes=5, origin_wire_bytes=6, rack_bytes={"rack1": 7})
    later = Traffic(origin_bytes=15, origin_wire_bytes=26, rack_bytes={"rack1": 37})
    assert later.since(earlier) == Traffic(origin_bytes=10, origin_wire_bytes=20, rack_bytes={"rack1": 30})


def test_what_agents_spent_is_divided_by_what_was_delivered() -> None:
    agent = AgentRecord(cpu_s=3, peak_rss_mib=60, control_bytes=1000, duplicate_bytes=GIB // 4)
    seen = result([node(0, 11), node(0, 12)], (agent, AgentRecord(cpu_s=5, peak_rss_mib=70)))
    assert seen.cpu_s_per_gib == pytest.approx(4)
    assert seen.rss_mib_max == 70
    assert seen.control_bytes_per_node == 500
    assert seen.duplicate_bytes_ratio == pytest.approx(0.125)


def test_a_failed_pull_is_counted_and_named_and_its_time_is_not() -> None:
    seen = result([node(0, 11), node(0, 99, error="node2: cut off")])
    assert seen.failed_pulls == 1
    assert seen.last_s == 11
    assert seen.errors == ("node2: cut off",)


def test_where_all_pulls_failed_no_figure_is_made_up() -> None:
    seen = result([node(0, 99, error="refused")])
    assert (seen.last_s, seen.ratio_to_bound, seen.own_ratio_to_bound, seen.cpu_s_per_gib) == (None, None, None, 0)


@pytest.mark.parametrize(("idle", "void"), [(0.24, True), (0.25, False), (0.9, False)])
def test_a_run_without_idle_cpu_is_void(idle: float, void: bool) -> None:
    assert (result([node(0, 11)], idle_cpu_ratio=idle).void is not None) == void


def test_the_json_has_the_keys_of_the_command_line_contract() -> None:
    written = json.loads(json.dumps(result([node(0, 11)]).as_json()))
    assert set(written) >= CONTRACT
    assert written["origin_egress_ratio"] == 1.0
    assert written["run"] == {"seed": 1}


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1), (25, 1), (26, 2), (50, 2), (75, 3), (99, 4), (100, 4)], ids=str
)
def test_a_percentile_is_the_nearest_rank(percent: float, expected: float) -> None:
    assert percentile([1, 2, 3, 4], percent) == expected


def test_nothing_has_no_percentile() -> None:
    assert percentile([], 50) is None
