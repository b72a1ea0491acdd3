# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from rich.console import Console

from bench.results import Result
from bench.tables import Spread, by_system, columns, spread, summary, table
from tests.bench.test_demo import rendered
from tests.bench.test_results import GIB, node, result


def test_the_table_has_a_row_for_each_run_and_names_void_ones() -> None:
    lines = rendered(table([result([node(0, 11)]), result([node(0, 40)], idle_cpu_ratio=0.1)])).splitlines()
    assert sum("p2pdist" in line for line in lines) == 2
    assert sum("p2pdist (void)" in line for line in lines) == 1


def test_the_table_fits_a_terminal_of_a_hundred_columns() -> None:
    wide = result([node(0, 111)] * 12, system="p2pdist-mdns", idle_cpu_ratio=0.1)
    assert Console(width=200).measure(table([wide])).maximum <= 100


def test_columns_that_only_some_workloads_have_show_where_they_say_something() -> None:
    assert not {"late ×", "into rack ×", "again MiB"} & names(result([node(0, 11)]))
    assert "late ×" in names(result([node(0, 11, late=True)]))
    assert "into rack ×" in names(result([node(0, 11)], racks={"rack1": GIB}))
    assert "again MiB" in names(result([node(0, 11)], run={"shared": 0.8}))


def names(seen: Result) -> set[str]:
    return {name for name, _ in columns([seen])}


def test_the_summary_leaves_void_runs_out() -> None:
    runs = [result([node(0, 11)]), result([node(0, 12)]), result([node(0, 40)], idle_cpu_ratio=0.1)]
    said = summary(runs)
    assert said is not None
    text = rendered(said)
    assert "2/3" in text
    assert "1.150, 1.200" in text


def test_there_is_no_summary_of_single_runs() -> None:
    assert summary([result([node(0, 11)]), result([node(0, 30)], system="direct")]) is None


def test_a_spread_of_void_runs_alone_says_nothing() -> None:
    assert spread([result([node(0, 11)], idle_cpu_ratio=0.0)], lambda seen: seen.last_s) == Spread(())
    assert Spread(()).median is None
    assert Spread(()).worst is None


def test_systems_keep_the_order_in_which_they_ran() -> None:
    runs = [result([node(0, 11)], system=name) for name in ("proxy", "direct", "proxy")]
    assert {name: len(of) for name, of in by_system(runs).items()} == {"proxy": 2, "direct": 1}
    assert list(by_system(runs)) == ["proxy", "direct"]
