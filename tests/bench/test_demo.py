# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console
from rich.table import Table

from bench.demo import closing_table, verdict
from tests.bench.conftest import ROOT
from tests.bench.test_results import GIB, node, result


def rendered(table: Table) -> str:
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if name in line)


def test_the_closing_table_shows_both_rollouts_and_the_bound() -> None:
    direct = result([node(0, 15), node(0, 20)], origin_bytes=2 * GIB)
    text = rendered(closing_table(direct, result([node(0, 10), node(0, 11)]), shaped=True))
    assert "1024.0 MiB to 2 nodes" in text
    assert "20.0 s" in row(text, "last node had it after")
    assert "11.0 s" in row(text, "last node had it after")
    assert "2048 MiB, 2.00 × image" in row(text, "out of the registry")
    assert "1024 MiB, 1.00 × image" in row(text, "out of the registry")
    assert "10.0 s" in row(text, "bound: image")
    assert "1.10 ×" in row(text, "last node ÷ bound")


def test_the_table_fits_a_terminal_of_eighty_columns() -> None:
    table = closing_table(result([node(0, 15)], origin_bytes=8 * GIB), result([node(0, 10)]), shaped=True)
    assert Console(width=200).measure(table).maximum <= 80


def test_the_verdict_compares_the_last_nodes() -> None:
    said = verdict(result([node(0, 20)], origin_bytes=2 * GIB), result([node(0, 11)]), shaped=True)
    assert "[bold]11.0 s[/] in the place of 20.0 s" in said
    assert "[bold]1.00[/] times in the place of 2.00" in said


def test_the_verdict_on_failed_pulls_says_nothing_else() -> None:
    said = verdict(result([node(0, 20)]), result([node(0, 11), node(0, 12, error="cut off")]), shaped=True)
    assert said == "[red]1 of 3 pulls failed.[/]"


def test_without_shaped_links_no_times_are_compared() -> None:
    direct, swarm = result([node(0, 1)], origin_bytes=2 * GIB), result([node(0, 5)], idle_cpu_ratio=0.0)
    assert "bound" not in rendered(closing_table(direct, swarm, shaped=False))
    said = verdict(direct, swarm, shaped=False)
    assert said.startswith("All 1 nodes had the image, and the registry sent the image [bold]1.00[/] times")
    assert "5.0" not in said


def test_the_verdict_says_when_the_machine_set_the_pace() -> None:
    said = verdict(result([node(0, 20)]), result([node(0, 11)], idle_cpu_ratio=0.02), shaped=True)
    assert "CPU was 98% busy" in said


@pytest.mark.real
def test_the_demo_runs_to_its_closing_table() -> None:
    command = [sys.executable, "-c", "from bench.cli import demo; demo()", "--nodes", "3", "--image-mib", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert row(done.stdout, "right pulls").count("3 of 3") == 2
    assert "3.00 × image" in row(done.stdout, "out of the registry")
    assert "Every digest was checked." in done.stdout
