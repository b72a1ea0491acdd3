# SPDX-License-Identifier: Apache-2.0
"""`p2pdist doctor`: what a person and a script see, and that its names are those of the documentation."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from p2pdist.cli import main
from p2pdist.doctor.report import CHECKS

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def nowhere(tmp_path: Path) -> list[str]:
    """Arguments for a node without an agent, without runtimes, and with a registry that is not there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "agent.toml"
    config.write_text(
        f'data_dir = "{tmp_path}"\nstore_min_free = 0\n[registries."reg.test"]\nurl = "http://127.0.0.1:{port}"\n'
    )
    return ["doctor", "--config", str(config), "--admin", f"http://127.0.0.1:{port}", "--root", str(tmp_path)]


def test_faults_are_lines_with_what_to_do_and_exit_code_1(nowhere: list[str]) -> None:
    result = CliRunner().invoke(main, nowhere)
    assert result.exit_code == 1, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("fail  agent")
    assert "-> start it: `systemctl start p2pdist-agent`" in lines[1]
    assert re.fullmatch(r"2 failed, 1 to look at, \d+ not looked at, \d+ well", lines[-1])


def test_json_has_every_check_with_its_name_and_result(nowhere: list[str]) -> None:
    result = CliRunner().invoke(main, [*nowhere, "--json", "--no-canary"])
    assert result.exit_code == 1
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert checks["agent"]["result"] == "fail"
    assert checks["origin-connect"] == {
        "name": "origin-connect",
        "result": "fail",
        "what": "reg.test: connection refused",
        "todo": checks["origin-connect"]["todo"],
        "about": "reg.test",
    }
    assert checks["runtime"]["result"] == "warn"
    assert checks["data-dir"]["result"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--canary", "UPPER/x"], "not a repository name"),
        (["--canary", "x", "--no-canary"], "exclude each other"),
        (["--config", "/nonexistent.toml"], "cannot read the configuration"),
        (["--own-pulls", "--root", "/tmp"], "exclude each other"),
        (["--home", "ann"], "is not an absolute path"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(main, ["doctor", *arguments])
    assert result.exit_code == 2
    assert complaint in result.stderr


def test_the_documentation_lists_every_check() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| (.*?) \|", (ROOT / "docs/doctor.md").read_text(), re.MULTILINE)
    assert dict(rows) == dict(CHECKS)
    assert [name for name, _ in rows] == list(CHECKS)
