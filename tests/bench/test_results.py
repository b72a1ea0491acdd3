# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from typing import Any

import pytest

from bench.results import AgentRecord, NodeRecord, Result, percentile, summarize

CONTRACT = {
    *("system", "nodes", "image_bytes", "link_mbit", "goodput_bytes_per_s", "bound_s"),
    *("first_s", "p50_s", "p99_s", "last_s", "ratio_to_bound", "origin_egress_ratio"),
    *("cpu_s_per_gib", "rss_mib_max", "control_bytes_per_node", "ttfb_p50_s", "ttfb_p99_s"),
    *("failed_pulls", "duplicate_bytes_ratio", "idle_cpu_ratio"),
}
GIB = 1 << 30


def node(started_s: float, finished_s: float, *, error: str | None = None) -> NodeRecord:
    return NodeRecord(
        started_s=started_s, finished_s=finished_s, right=error is None, ttfb_s=(finished_s / 100,), error=error
    )


def result(pulls: list[NodeRecord], agents: tuple[AgentRecord, ...] = (), **changes: Any) -> Result:  # noqa: ANN401
    given: dict[str, Any] = {
        "image_bytes": GIB,
        "link_mbit": 1000.0,
        "goodput_bytes_per_s": GIB / 10,
        "origin_bytes": GIB,
        "origin_wire_bytes": None,
        "idle_cpu_ratio": 0.5,
        "run": {"seed": 1},
    }
    return summarize("p2pdist", pulls, agents, **(given | changes))


def test_the_last_node_is_held_against_the_bound() -> None:
    seen = result([node(0, 11), node(0, 13), node(0, 12)])
    assert (seen.first_s, seen.p50_s, seen.last_s) == (11, 12, 13)
    assert seen.bound_s == pytest.approx(10)
    assert seen.ratio_to_bound == pytest.approx(1.3)


def test_own_times_count_from_each_nodes_start() -> None:
    seen = result([node(0, 11), node(5, 15)])
    assert (seen.own_last_s, seen.last_s) == (11, 15)
    assert seen.own_ratio_to_bound == pytest.approx(1.1)


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
