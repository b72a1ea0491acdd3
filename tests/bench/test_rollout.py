# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from bench.crowd import Outcome
from tests.bench.conftest import ROOT
from tests.bench.test_results import CONTRACT, node, result

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_what_went_wrong_is_told_with_the_log_that_explains_it() -> None:
    failed = result([node(0, 11), node(0, 12, error="node2: cut off")])
    told = list(Outcome(failed, {"agent-node2": "disk full"}).problems())
    assert told == ["node2: cut off", "--- last lines of agent-node2 ---\ndisk full"]


def rollout(directory: Path, *options: str) -> list[dict[str, Any]]:
    """Return what `bench rollout` wrote for each run."""
    file = directory / "runs.json"
    command = [sys.executable, "-c", "from bench.cli import bench; bench()", "rollout", *options, "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.real
def test_a_rollout_writes_its_json_and_keeps_its_logs(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    (written,) = rollout(
        tmp_path, "--system", "direct", "--nodes", "2", "--image-mib", "1", "--keep-logs", str(tmp_path / "logs")
    )
    assert set(written) >= CONTRACT
    assert written["failed_pulls"] == 0
    assert written["origin_egress_ratio"] == pytest.approx(2, abs=0.01)
    assert written["origin_wire_bytes"] is None or written["origin_wire_bytes"] > written["origin_bytes"]
    assert (logs / "registry.log").read_text()


@pytest.mark.real
def test_systems_are_measured_side_by_side_and_no_shared_layer_is_fetched_again(
    require: Callable[[str, str], str], require_libtorrent: None, tmp_path: Path
) -> None:
    require("nginx", "nginx-light")
    systems = ["p2pdist", "p2pdist-mdns", "bittorrent-plain", "proxy", "direct"]
    asked = [option for system in systems for option in ("--system", system)]
    sizes = ["--nodes", "2", "--image-mib", "10", "--link-mbit", "200", "--report", str(tmp_path)]
    runs = rollout(tmp_path, "--workload", "W4-upgrade", *sizes, *asked)
    assert [run["system"] for run in runs] == systems
    assert all(run["failed_pulls"] == 0 for run in runs)
    assert all(run["image_bytes"] == pytest.approx(2 << 20, rel=0.01) for run in runs), "two layers of ten are new"
    assert {run["system"]: round(run["origin_egress_ratio"]) for run in runs} | {"bittorrent-plain": 1} == {
        **dict.fromkeys(systems, 1),
        "direct": 2,
    }
    assert all(run["refetched_bytes"] == 0 for run in runs if run["system"].startswith("p2pdist"))
    assert all(f"<b>{system}</b>" in (tmp_path / "rollout.html").read_text() for system in systems)
