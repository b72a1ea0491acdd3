# SPDX-License-Identifier: Apache-2.0
"""`p2pdist bench faults` on small labs: what breaks is mended again and costs no pull. No time is judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from tests.bench.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def faults(directory: Path, *options: str) -> list[dict[str, Any]]:
    """Return what `bench faults` wrote; whether times were as wanted does not count."""
    file = directory / "runs.json"
    command = [sys.executable, "-c", "from bench.cli import bench; bench()", "faults", *options, "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert file.exists(), done.stdout + done.stderr
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert written, done.stdout + done.stderr
    assert all(run["failed_pulls"] == 0 for run in written), done.stdout
    return written


def test_a_lease_holder_is_killed_while_it_holds_leases_and_its_runtime_pulls_again(
    lab_parts: str, require: Callable[[str, str], str], tmp_path: Path
) -> None:
    require("iptables", "iptables")
    small = ["--nodes", "3", "--image-mib", "8", "--report", str(tmp_path)]
    calm, disturbed = faults(tmp_path, "--scenario", "W6-lease-holder", *small)
    assert calm["run"]["scenario"] == "undisturbed"
    assert any("leases" in what for _, what in disturbed["happened"])
    assert len(disturbed["killed_nodes"]) == 1
    assert {target["what"] for target in disturbed["expectations"]} >= {"failed pulls", "egress, of the image"}
    assert "W6-lease-holder" in (tmp_path / "faults.html").read_text()


def test_a_soak_looks_at_every_agent_after_each_rollout(
    lab_parts: str, require: Callable[[str, str], str], tmp_path: Path
) -> None:
    (written,) = faults(tmp_path, "--soak", "4", "--nodes", "2")
    assert [len(each["looks"]) for each in written["rounds"]] == [2] * 4
    assert all(look["tasks"] > 10 for each in written["rounds"] for look in each["looks"])
