# SPDX-License-Identifier: Apache-2.0
"""The scheduler's settings, and how a mistake in them ends the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from p2pdist.config import load
from p2pdist.errors import ConfigError
from scheduler.config import SchedulerConfig

ROOT = Path(__file__).parents[2]


def test_the_defaults_are_those_of_the_contract() -> None:
    config = load(SchedulerConfig, file=None, environ={}, flags={})
    assert (str(config.listen), str(config.api_listen)) == ("0.0.0.0:5060", "127.0.0.1:5061")
    assert config.cluster == "default"


def test_flags_beat_the_environment_and_that_the_file(tmp_path: Path) -> None:
    file = tmp_path / "scheduler.toml"
    file.write_text('listen = "127.0.0.1:1"\napi_listen = "127.0.0.1:2"\ndegree = 8\n')
    environ = {"P2PDIST_API_LISTEN": "127.0.0.1:3", "P2PDIST_LISTEN": "127.0.0.1:4"}
    config = load(SchedulerConfig, file=file, environ=environ, flags={"listen": "[::1]:5"})
    assert (str(config.listen), str(config.api_listen), config.degree) == ("[::1]:5", "127.0.0.1:3", 8)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        pytest.param("degre = 5", "degree", id="a key that is none"),
        pytest.param("degree = 1", "too small", id="too small"),
        pytest.param("tag_ttl_s = 9999", "too large", id="too large"),
        pytest.param('listen = "5060"', "HOST:PORT", id="no address"),
        pytest.param('cluster = "a b"', "cluster", id="a cluster's name that is none"),
        pytest.param('log_level = "loud"', "debug, info", id="no level"),
    ],
)
def test_a_mistake_is_named_with_its_place(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "scheduler.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=str(file)) as caught:
        load(SchedulerConfig, file=file, environ={}, flags={})
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.real
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param(["--listen", "nowhere"], "--listen", id="no address"),
        pytest.param(["--config", "/nowhere.toml"], "/nowhere.toml", id="no file"),
        pytest.param(["--listen", "203.0.113.1:5060"], "listen: 203.0.113.1:5060", id="not an address of this host"),
    ],
)
def test_the_command_ends_with_one_line_and_code_2(arguments: list[str], named: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "p2pdist", "scheduler", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("p2pdist: ")
    assert named in line
