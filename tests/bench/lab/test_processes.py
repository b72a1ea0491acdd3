# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from bench.lab.errors import LabError
from bench.lab.hosts import Host, loopback_lab
from bench.lab.processes import ProcessGroup

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PATIENT_S = 60.0


@pytest.fixture
def host() -> Iterator[Host]:
    with loopback_lab(["node"]) as lab:
        yield lab["node"]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_group_ends_what_it_started(host: Host, tmp_path: Path) -> None:
    with ProcessGroup(tmp_path) as group:
        process = group.start(host, "sleeper", ["sleep", "1000"])
        assert process.running
        process.check()
    assert not process.running


def test_a_process_that_ignores_sigterm_is_killed(host: Host, tmp_path: Path) -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('set', flush=True); time.sleep(1000)"
    )
    with ProcessGroup(tmp_path, grace_s=0.1) as group:
        process = group.start(host, "stubborn", python(stubborn))
        while "set" not in process.tail():
            process.check()
    assert not process.running


def test_a_process_that_ended_early_is_named_with_the_end_of_its_log(host: Host, tmp_path: Path) -> None:
    with ProcessGroup(tmp_path) as group:
        process = group.start(host, "agent-node1", python("raise SystemExit('port 5051 is in use')"))
        assert process.wait(_PATIENT_S)
        with pytest.raises(LabError, match="agent-node1 ended with exit code 1") as caught:
            process.check()
    assert "port 5051 is in use" in caught.value.log


def test_a_program_that_is_missing_is_named(host: Host, tmp_path: Path) -> None:
    with ProcessGroup(tmp_path) as group:
        process = group.start(host, "ghost", ["/nonexistent/program"])
        assert process.wait(_PATIENT_S)
        with pytest.raises(LabError, match="ghost ended") as caught:
            process.check()
    assert "/nonexistent/program" in caught.value.log


def test_settings_of_the_user_do_not_reach_the_lab(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PDIST_MIRROR_LISTEN", "[::]:1")
    with ProcessGroup(tmp_path) as group:
        process = group.start(host, "env", python("import os; print(sorted(k for k in os.environ if 'P2PDIST' in k))"))
        assert process.wait(_PATIENT_S)
    assert process.tail() == "[]"


def test_a_running_process_is_metered(host: Host, tmp_path: Path) -> None:
    code = "sum(range(5_000_000)); print('done', flush=True); import signal; signal.pause()"
    with ProcessGroup(tmp_path) as group:
        process = group.start(host, "busy", python(code))
        while "done" not in process.tail():
            process.check()
        assert process.cpu_s() > 0
        assert process.peak_rss_mib() > 1
    assert process.cpu_s() == 0
    assert process.peak_rss_mib() == 0


def test_a_process_that_was_killed_runs_again_with_its_command_and_log(host: Host, tmp_path: Path) -> None:
    with ProcessGroup(tmp_path) as group:
        process = group.start(host, "agent", python("print('here', flush=True); import signal; signal.pause()"))
        while process.tail() != "here":
            process.check()
        first = process.pid
        process.kill()
        process.start_again()
        assert process.pid != first
        while process.tail() != "here\nhere":
            process.check()
    assert not process.running


def test_a_frozen_process_is_ended_with_its_group(host: Host, tmp_path: Path) -> None:
    with ProcessGroup(tmp_path, grace_s=0.1) as group:
        process = group.start(host, "sleeper", ["sleep", "1000"])
        process.freeze()
        process.thaw()
        process.freeze()
    assert not process.running
