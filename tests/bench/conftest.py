# SPDX-License-Identifier: Apache-2.0
"""What the lab's tests share: programs run in a process of their own, as we are or as an ordinary user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench.lab import torrents

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parent.parent.parent
WITHOUT_ROOT = ("unshare", "--user", "--map-user=1000", "--map-group=1000", "--")
"""Runs a program as a user without any rights, who still may read our files."""

_PREAMBLE = """
from bench.lab import netns
if why := netns.why_not():
    raise SystemExit(f"why not: {why}")
"""


@pytest.fixture(params=["as we are", "without root"])
def run_in_lab(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Return a function that runs Python code which begins with `netns.why_not()`, and returns what it printed.

    Where namespaces are not allowed here the test fails in CI and is skipped elsewhere, with the reason.
    """
    prefix = WITHOUT_ROOT if request.param == "without root" and os.geteuid() == 0 else ()

    def run(code: str) -> str:
        command = [*prefix, sys.executable, "-c", _PREAMBLE + code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        if "why not: " in done.stderr and os.environ.get("CI") != "true":
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def require_namespaces(require: Callable[[str, str], str]) -> None:
    """Skip, or in CI fail, where this process cannot make namespaces without being executed again."""
    require("ip", "iproute2")
    if os.geteuid() == 0:
        return
    if os.environ.get("CI") == "true":
        pytest.fail("this test makes network namespaces: run it as root")
    pytest.skip("this test makes network namespaces: run it as root")


@pytest.fixture
def require_libtorrent() -> None:
    """Skip, or in CI fail, where libtorrent is not installed."""
    if torrents.why_not() is None:
        return
    if os.environ.get("CI") == "true":
        pytest.fail("libtorrent is missing: make venv")
    pytest.skip("libtorrent is missing: make venv")
