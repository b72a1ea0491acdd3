# SPDX-License-Identifier: Apache-2.0
"""What a killed lab leaves is found and removed; what a signal ends leaves nothing."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench.lab import netns
from tests.bench.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("require_namespaces")]

_ROLLOUT = ["-c", "from bench.cli import bench; bench()", "rollout", "--system", "direct", "--nodes", "2"]


@pytest.fixture
def rollout() -> Iterator[subprocess.Popen[str]]:
    """A rollout of some ten seconds, whose registry has started and whose pulls begin."""
    command = [sys.executable, *_ROLLOUT, "--image-mib", "64"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "custom\n"
        assert "2 nodes in network namespaces" in process.stdout.readline()
        yield process
        process.kill()


def namespaces(pid: int) -> list[str]:
    run = Path("/run/netns")
    return [entry.name for entry in run.iterdir() if f"-{pid}-" in entry.name] if run.is_dir() else []


def files(pid: int) -> list[str]:
    places = (Path("/dev/shm"), Path(tempfile.gettempdir()))
    return [entry.name for place in places for entry in place.iterdir() if f"-{pid}-" in entry.name]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ended(pidfd: int) -> bool:
    """Wait until the process behind `pidfd` has ended; False if it will not."""
    readable, _, _ = select.select([pidfd], [], [], 20)
    os.close(pidfd)
    return bool(readable)


def test_a_signal_ends_all_that_was_started(rollout: subprocess.Popen[str]) -> None:
    started = [os.pidfd_open(pid) for pid in children(rollout.pid)]
    assert started
    assert namespaces(rollout.pid)
    rollout.send_signal(signal.SIGTERM)
    _, said = rollout.communicate(timeout=30)
    assert rollout.returncode == 128 + signal.SIGTERM, said
    assert all(ended(pidfd) for pidfd in started)
    assert not namespaces(rollout.pid)
    assert not files(rollout.pid)


def test_a_killed_lab_takes_its_processes_along_and_the_next_sweeps_the_rest(rollout: subprocess.Popen[str]) -> None:
    started = [os.pidfd_open(pid) for pid in children(rollout.pid)]
    rollout.kill()
    rollout.communicate(timeout=30)
    assert all(ended(pidfd) for pidfd in started)
    left = namespaces(rollout.pid)
    assert left
    assert set(left) <= set(netns.sweep())
    assert not namespaces(rollout.pid)
