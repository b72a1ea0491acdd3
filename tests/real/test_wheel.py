# SPDX-License-Identifier: Apache-2.0
"""`pip install` of the wheel brings all that is needed to run."""

from __future__ import annotations

import signal
import socket
import subprocess
import zipfile
from typing import TYPE_CHECKING

import pytest

from tests.real.wheel import PIP, ROOT, ask, serving, stop, until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.real.wheel import Installed


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def test_the_wheel_holds_the_packages_and_what_is_copied_to_etc(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        names = set(archive.namelist())
    for package in ("p2pdist", "scheduler", "bench"):
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        assert sources <= names
        assert f"{package}/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "typings/", "docs/"))]
    shared = installed.environment / "share/p2pdist"
    for name in ("systemd/p2pdist-agent.service", "systemd/p2pdist-scheduler.service", "agent.toml", "scheduler.toml"):
        assert (shared / name).read_bytes() == (ROOT / "deploy" / name).read_bytes()


def test_nothing_is_missing_in_the_environment(installed: Installed) -> None:
    python = str(installed.environment / "bin/python")
    subprocess.run([*PIP, "--python", python, "check"], check=True, capture_output=True)
    output = installed.run("--help")
    assert "cannot be loaded" not in output
    verbs = [line.split()[0] for line in output.partition("Commands:")[2].splitlines() if line.strip()]
    assert set(verbs) >= {"agent", "bench", "demo", "pull", "scheduler", "setup", "status"}
    for verb in verbs:
        assert "Usage: p2pdist" in installed.run(verb, "--help")


def test_the_agent_serves_reloads_and_stops(installed: Installed, tmp_path: Path) -> None:
    mirror, peers, admin = free_ports(3)
    file = tmp_path / "agent.toml"
    file.write_text("")
    arguments = ["agent", "--config", str(file), "--no-mdns", "--data-dir", str(tmp_path / "data")]
    for flag, port in (("--mirror-listen", mirror), ("--peer-listen", peers), ("--admin-listen", admin)):
        arguments += [flag, f"127.0.0.1:{port}"]
    url = f"http://127.0.0.1:{admin}"
    with serving([installed.program, *arguments], url) as agent:
        assert ask(f"http://127.0.0.1:{mirror}/v2/") == "{}"
        file.write_text('upload_slots = 3\nsite = "north"\n')
        agent.send_signal(signal.SIGHUP)
        until(lambda: "p2pdist_config_reloads_total 1.0" in ask(f"{url}/metrics"), "the reload")
        file.write_text("upload_slot = 3\n")
        agent.send_signal(signal.SIGHUP)
        until(lambda: "p2pdist_config_reload_failed 1.0" in ask(f"{url}/metrics"), "the reload that fails")
        code, log = stop(agent)
    assert code == 0
    events = {line["event"]: line for line in log}
    assert events["settings reloaded"]["changed"] == ["upload_slots"]
    assert events["these settings change with a restart only"]["keys"] == ["site"]
    why = events["settings not reloaded, the old ones stay in force"]["why"]
    assert "unknown key 'upload_slot'; did you mean 'upload_slots'?" in why
    assert log[-1]["event"] == "agent stopped"


def test_the_scheduler_serves_and_stops(installed: Installed, tmp_path: Path) -> None:
    agents, api = free_ports(2)
    arguments = ["--data-dir", str(tmp_path), "--listen", f"127.0.0.1:{agents}", "--api-listen", f"127.0.0.1:{api}"]
    with serving([installed.program, "scheduler", *arguments], f"http://127.0.0.1:{api}") as scheduler:
        assert "p2pdist_scheduler_agents 0.0" in ask(f"http://127.0.0.1:{api}/metrics")
        assert stop(scheduler)[0] == 0


@pytest.mark.parametrize("verb", ["agent", "scheduler"])
def test_a_watchdogs_end_says_where_the_program_was(installed: Installed, tmp_path: Path, verb: str) -> None:
    ports = [f"127.0.0.1:{port}" for port in free_ports(3)]
    flags = {
        "agent": ["--no-mdns", *("--mirror-listen", ports[1]), *("--peer-listen", ports[2]), "--admin-listen"],
        "scheduler": ["--listen", ports[1], "--api-listen"],
    }[verb]
    command = [installed.program, verb, "--data-dir", str(tmp_path), *flags, ports[0]]
    with serving(command, f"http://{ports[0]}") as process:
        process.send_signal(signal.SIGABRT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGABRT
    assert "most recent call first" in stderr
