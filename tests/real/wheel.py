# SPDX-License-Identifier: Apache-2.0
"""The wheel as its users get it: built from nothing but the sources, installed into an empty environment.

Nothing here sleeps to let something happen: `until` looks again and again until it is so, or a generous deadline
passes.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).parent.parent.parent
HIDDEN = ("/root", "/home")
"""Where a hardened unit cannot look for its interpreter."""
DEADLINE_S = 90.0
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


@dataclass(frozen=True, slots=True)
class Installed:
    """A wheel and the environment that it, and nothing else, was installed into."""

    wheel: Path
    environment: Path

    @property
    def program(self) -> Path:
        return self.environment / "bin/p2pdist"

    def run(self, *arguments: str) -> str:
        """Return what `p2pdist ARGUMENTS…` prints, started where no source is."""
        done = subprocess.run(
            [self.program, *arguments], capture_output=True, text=True, cwd="/", env=bare(), timeout=DEADLINE_S
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def bare() -> dict[str, str]:
    """Return an environment that brings no settings and no other Python's modules."""
    return {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/")}


def install(directory: Path) -> Installed:
    """Build and install; where no package index can be reached the test is skipped, in CI it fails."""
    wheels = directory / "wheels"
    _pip("wheel", "--no-deps", "--wheel-dir", str(wheels), str(_clean_tree(directory / "tree")))
    (wheel,) = wheels.glob("*.whl")
    environment = directory / "environment"
    subprocess.run([_interpreter(), "-m", "venv", "--without-pip", environment], check=True)
    _pip("--python", str(environment / "bin/python"), "install", str(wheel))
    return Installed(wheel, environment)


def _clean_tree(tree: Path) -> Path:
    """Return a copy of what a wheel is built from, without what lies about."""
    for name in ("p2pdist", "scheduler", "bench", "deploy"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tree / name)
    return tree


def _interpreter() -> str:
    """Return a Python of this version, the system's if it is one."""
    system = "/usr/bin/python3"
    version = "import sys; print(sys.version_info[:2])"
    if sys.base_prefix.startswith(HIDDEN) and os.path.exists(system):
        said = subprocess.run([system, "-c", version], capture_output=True, text=True).stdout.strip()
        if said == str(sys.version_info[:2]):
            return system
    return sys.executable


def _pip(*arguments: str) -> None:
    done = subprocess.run([*PIP, *arguments], capture_output=True, text=True, timeout=280)
    if done.returncode != 0 and "No matching distribution" in done.stderr and os.environ.get("CI") != "true":
        pytest.skip("the package index cannot be reached, and pip's cache lacks something")
    assert done.returncode == 0, done.stderr


@contextmanager
def serving(program: Sequence[str | Path], admin_url: str) -> Iterator[subprocess.Popen[str]]:
    """Start a daemon and wait until it is ready; in the end it is killed, if it has not ended."""
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True, cwd="/", env=bare()) as process:
        try:
            until(lambda: process.poll() is not None or ask(f"{admin_url}/readyz"), "readyz")
            yield process
        finally:
            process.kill()


def stop(process: subprocess.Popen[str]) -> tuple[int, list[dict[str, Any]]]:
    """Send SIGTERM; return the exit code and the log."""
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=DEADLINE_S)
    return process.returncode, [json.loads(line) for line in stderr.splitlines()]


def ask(url: str) -> str:
    """Return what a GET brings, empty where nobody answers with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def until(condition: Any, what: str) -> None:  # noqa: ANN401
    """Return once the condition holds; fail where it does not in time."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:.0f} s: {what}"
        time.sleep(0.05)
