# SPDX-License-Identifier: Apache-2.0
"""What keeps an agent or a scheduler from starting is one line and exit code 2."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


def run(*arguments: str, environ: dict[str, str] | None = None) -> tuple[int, list[str]]:
    """Return the exit code of `p2pdist ARGUMENTS…` and the lines that it wrote to stderr."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("P2PDIST_")} | (environ or {})
    command = [sys.executable, "-m", "p2pdist", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("flag", ["--mirror-listen", "--peer-listen", "--admin-listen"])
def test_an_agent_whose_port_is_taken_says_which(tmp_path: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        listeners = {"--mirror-listen": "127.0.0.1:0", "--peer-listen": "127.0.0.1:0", "--admin-listen": "127.0.0.1:0"}
        flags = [part for pair in (listeners | {flag: address}).items() for part in pair]
        code, lines = run("agent", "--no-mdns", "--data-dir", str(tmp_path / "data"), *flags)
    assert code == 2
    (line,) = lines
    assert address in line


@pytest.mark.parametrize("flag", ["--listen", "--api-listen"])
def test_a_scheduler_whose_port_is_taken_says_which(tmp_path: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        listeners = {"--listen": "127.0.0.1:0", "--api-listen": "127.0.0.1:0"} | {flag: address}
        flags = [part for pair in listeners.items() for part in pair]
        code, lines = run("scheduler", "--data-dir", str(tmp_path / "data"), *flags)
    assert code == 2
    (line,) = lines
    assert address in line


@pytest.mark.parametrize("verb", ["agent", "scheduler"])
def test_an_unknown_key_is_named_with_its_file(tmp_path: Path, verb: str) -> None:
    file = tmp_path / "p2pdist.toml"
    file.write_text('data_dri = "/nowhere"\n')
    code, lines = run(verb, "--config", str(file))
    assert code == 2
    (line,) = lines
    assert str(file) in line
    assert "'data_dri'" in line


def test_an_unknown_variable_is_named() -> None:
    code, lines = run("agent", environ={"P2PDIST_MIROR_LISTEN": "127.0.0.1:0"})
    assert code == 2
    (line,) = lines
    assert "P2PDIST_MIROR_LISTEN" in line
