# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

from bench.faults.liars import Blame
from bench.faults.verdict import Trial, judge
from bench.results import AgentRecord, Result, Setting
from tests.bench.test_results import GIB, SETTING, node, result

CALM = result([node(0, 11), node(0, 12)])
"""Two nodes and a bound of 10 s: 4.5 s may be added."""


def trial(seen: Result, *, calm: Result | None = CALM, **more: object) -> Trial:
    happened = ((1.0, "partition"),)
    return replace(Trial(scenario="W6", seed=1, result=seen, calm=calm, happened=happened), **more)  # type: ignore[arg-type]


def missed(*trials: Trial) -> list[str]:
    return [target.what for target in judge(trials) if not target.met]


def test_a_run_that_is_a_little_slower_than_the_undisturbed_one_is_as_wanted() -> None:
    assert missed(trial(result([node(0, 15), node(0, 16.4)]))) == []
    assert missed(trial(result([node(0, 15), node(0, 16.6)]))) == ["added time"]


def test_who_was_cut_off_is_given_the_time_and_who_was_killed_does_not_count() -> None:
    late = result([node(0, 12), node(0, 26)])
    assert missed(trial(late)) == ["added time"]
    assert missed(trial(late, outages_s={1: 10.0})) == []
    assert missed(trial(late, outages_s={0: 10.0})) == ["added time"]
    assert missed(trial(late, killed={1})) == []


def test_failed_pulls_egress_and_a_fault_that_came_too_late_are_missed_targets() -> None:
    failed = result([node(0, 11), node(0, 12, error="cut off")], origin_bytes=2 * GIB)
    assert missed(trial(failed, happened=())) == [
        "failed pulls",
        "runs in which the fault came too late",
        "egress, of the image",
    ]


def test_of_several_runs_the_median_of_the_times_counts_and_void_ones_do_not() -> None:
    slow, quick = result([node(0, 40)]), result([node(0, 12)])
    assert missed(trial(slow), trial(quick), trial(quick)) == []
    assert missed(trial(slow), trial(slow), trial(quick)) == ["added time, median of 3"]
    assert missed(trial(result([node(0, 40)], idle_cpu_ratio=0.1))) == []


def test_beside_liars_the_bound_counts_what_all_can_send_together() -> None:
    setting = replace(SETTING, swarm_s=20.0, bound_s=20.0)
    assert missed(lies(result([node(0, 24)], setting=setting))) == []
    assert missed(lies(result([node(0, 26)], setting=setting))) == ["slowest honest node, of the fluid bound"]


def test_waste_is_what_was_fetched_beyond_what_was_lacked() -> None:
    setting = Setting(image_bytes=GIB, link_mbit=1000.0, goodput_bytes_per_s=GIB / 10)
    agent = AgentRecord(cpu_s=1, peak_rss_mib=1, from_peers_bytes=round(1.04 * GIB))
    assert missed(lies(result([node(0, 11)], [agent], setting=setting))) == ["waste"]


def test_corrupting_peers_have_to_be_named_in_time() -> None:
    right = result([node(0, 11)])
    assert missed(lies(right, 5.0)) == []
    assert missed(lies(right, 0.1, 5.1)) == ["named and banned after the first wrong chunk, slowest"]
    assert missed(lies(right, 0.1, None)) == ["agents that got wrong chunks (2) and never named who sent them"]
    assert missed(replace(lies(right), blames=())) == [], "banned before it had sent any"
    assert missed(replace(lies(right), unnamed=["liar2"])) == ["corrupting peers that no agent banned"]


def lies(seen: Result, *named_s: float | None) -> Trial:
    blames = tuple(Blame("liar1 (forge)", "node1", each_s) for each_s in named_s or (0.1,))
    return replace(trial(seen, calm=None), blames=blames)
