# SPDX-License-Identifier: Apache-2.0
"""The systemd units and the sample settings; tests/real/test_systemd.py runs them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from p2pdist.config import AgentConfig, load
from scheduler.config import SchedulerConfig

if TYPE_CHECKING:
    from collections.abc import Callable

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
EXPOSURE_MAX = 1.5
"""What `systemd-analyze security` may say at most, of 10; a daemon on the network has 0.8 for that alone."""


@pytest.fixture
def analyze(require: Callable[[str, str], str]) -> str:
    return require("systemd-analyze", "systemd")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_finds_nothing_wrong_with_a_unit(analyze: str, tmp_path: Path, unit: Path) -> None:
    program = Path(sys.executable).with_name("p2pdist")
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/opt/p2pdist/bin/p2pdist", str(program)))
    done = subprocess.run([analyze, "verify", "--man=no", str(copy)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_is_closed_to_what_it_does_not_need(analyze: str, unit: Path) -> None:
    done = subprocess.run(
        [analyze, "security", "--offline=yes", "--no-pager", str(unit)], capture_output=True, text=True, check=True
    )
    said = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert said is not None
    assert float(said[1]) <= EXPOSURE_MAX


@pytest.mark.parametrize(
    ("name", "settings"), [("agent", AgentConfig), ("scheduler", SchedulerConfig)], ids=["agent", "scheduler"]
)
def test_the_sample_settings_are_the_defaults_and_each_line_in_them_is_usable(
    tmp_path: Path, name: str, settings: type
) -> None:
    sample = DEPLOY / f"{name}.toml"
    assert load(settings, file=sample, environ={}, flags={}) == settings()
    everything = tmp_path / "all.toml"
    everything.write_text(re.sub(r"^#(?=\S)", "", sample.read_text(), flags=re.MULTILINE))
    assert load(settings, file=everything, environ={}, flags={}) != settings()


def test_each_unit_reads_its_settings_from_etc() -> None:
    for unit in UNITS:
        kind = unit.stem.removeprefix("p2pdist-")
        assert f"p2pdist {kind} --config /etc/p2pdist/{kind}.toml\n" in unit.read_text()
