# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from bench.contract import KEYS
from bench.scheduler_load import table, targets
from bench.scheduler_meter import Findings
from bench.scheduler_model import Image
from tests.bench.conftest import ROOT
from tests.bench.test_scheduler_meter import QUIET
from tests.bench.test_scheduler_model import plan

if TYPE_CHECKING:
    from pathlib import Path


def result(**changes: object) -> dict[str, Any]:
    found = Findings(connect_s=1, started_s=9.5, join_s=[0.01], resolve_s=[0.02], lease_s=[0.03])
    return {**found.figures(plan(), Image(plan()), QUIET), **changes}


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"started_s": 10.1}, ["all agents have started"]),
        ({"cpu_start_ratio": 1.01}, ["CPU in the start"]),
        ({"answer_p99_ms": 251.0}, ["answers, p99"]),
        ({"failed_agents": 1}, ["agents that failed"]),
    ],
)
def test_the_worst_run_is_held_against_the_targets(changes: dict[str, object], missed: list[str]) -> None:
    judged = targets([result(), result(**changes), result()])
    assert [target.what for target in judged if not target.met] == missed


def test_the_table_names_void_runs_and_leaves_open_what_was_not_seen() -> None:
    out = io.StringIO()
    Console(file=out, width=130).print(table([result(void="crowded", answer_p50_ms=None)]))
    row = out.getvalue().splitlines()[2]
    assert row.split()[:4] == ["10", "(void)", "9.5", "0"]
    assert "-" in row.split()


@pytest.mark.real
def test_a_few_agents_pull_through_a_real_scheduler(tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    sizes = ["--agents", "60", "--image-mib", "8", "--layers", "2", "--spread-s", "1", "--origin-mbit", "1000"]
    program = [sys.executable, "-c", "from bench.cli import bench; bench()", "scheduler"]
    done = subprocess.run(
        [*program, *sizes, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = (json.loads(line) for line in file.read_text().splitlines())
    assert set(written) >= set(KEYS)
    assert written["failed_agents"] == 0
    assert written["leases"] >= written["chunks"], "each chunk is leased"
    assert written["answer_p99_ms"] > 0
    assert "agents have the image" in done.stdout
