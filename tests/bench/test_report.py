# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from xml.etree import ElementTree

from bench.crowd import Outcome
from bench.report import Chapter, Report, page
from bench.results import Result
from bench.samples import Series
from bench.workloads import Workload
from tests.bench.test_results import GIB, node, result


def outcome(seen: Result) -> Outcome:
    times = [number * 0.2 for number in range(60)]
    done = [[round(GIB * min(1.0, time_s / 10))] * seen.nodes for time_s in times]
    return Outcome(seen, {}, Series(times, done, [each[0] for each in done]))


def told(*outcomes: Outcome) -> str:
    chapter = Chapter(Workload(name="W1", about="a crowd & more"), "12 nodes\n<image>", outcomes)
    return page(Report("2 × processor", "today", [chapter]))


def test_the_documentis_one_document_that_needs_nothing_else() -> None:
    said = told(outcome(result([node(0, 11)])), outcome(result([node(0, 30)], system="direct")))
    document = ElementTree.fromstring(said.removeprefix("<!DOCTYPE html>"))
    assert not [element.tag for element in document.iter() if {"src", "href"} & set(element.keys())]
    assert "url(" not in said
    assert "W1: a crowd &amp; more" in said
    assert "12 nodes<br/>&lt;image&gt;" in said
    assert "2 × processor" in said


def test_each_system_has_a_bar_a_panel_and_a_curve_of_the_origin() -> None:
    said = told(outcome(result([node(0, 11)] * 3)), outcome(result([node(0, 30)], system="bittorrent")))
    assert said.count('class="bar p2pdist"') == said.count('class="bar bittorrent"') == 1
    assert said.count("<b>p2pdist</b>") == said.count("<b>bittorrent</b>") == 1
    assert said.count('class="line thin p2pdist"') == 3, "a curve for each node"
    assert said.count('class="line p2pdist"') == 1


def test_the_panel_is_of_the_middle_run() -> None:
    runs = [outcome(result([node(0, last_s)], run={"seed": seed})) for seed, last_s in ((1, 11), (2, 13), (3, 12))]
    said = told(*runs)
    assert "1.200, worst 1.300" in said
    assert "last node 12.0 s, 1.200 × bound from its own start · seed 3" in said


def test_void_runs_are_shown_and_do_not_count() -> None:
    said = told(outcome(result([node(0, 11)])), outcome(result([node(0, 40)], idle_cpu_ratio=0.1)))
    assert said.count('<tr class="void">') == 1
    assert "4.000, worst" not in said
    assert "void: the CPU starved" in told(outcome(result([node(0, 40)], idle_cpu_ratio=0.1)))


def test_a_run_whose_pulls_all_failed_is_told_with_the_reason() -> None:
    said = told(outcome(result([node(0, 40, error="node1: <refused>")])))
    assert "p2pdist: node1: &lt;refused&gt;" in said
