# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from bench.crowd import Outcome
from tests.bench.conftest import ROOT
from tests.bench.test_results import CONTRACT, node, result

if TYPE_CHECKING:
    from pathlib import Path


def test_what_went_wrong_is_told_with_the_log_that_explains_it() -> None:
    failed = result([node(0, 11), node(0, 12, error="node2: cut off")])
    told = list(Outcome(failed, {"agent-node2": "disk full"}).problems())
    assert told == ["node2: cut off", "--- last lines of agent-node2 ---\ndisk full"]


@pytest.mark.real
def test_a_rollout_writes_its_json_and_keeps_its_logs(tmp_path: Path) -> None:
    file, logs = tmp_path / "runs.json", tmp_path / "logs"
    code = "from bench.cli import bench; bench()"
    command = [sys.executable, "-c", code, "rollout", "--system", "direct", "--nodes", "2", "--image-mib", "1"]
    command += ["--json", str(file), "--keep-logs", str(logs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = file.read_text().splitlines()
    written = json.loads(line)
    assert set(written) >= CONTRACT
    assert written["failed_pulls"] == 0
    assert written["origin_egress_ratio"] == pytest.approx(2, abs=0.01)
    assert written["origin_wire_bytes"] is None or written["origin_wire_bytes"] > written["origin_bytes"]
    assert (logs / "registry.log").read_text()
