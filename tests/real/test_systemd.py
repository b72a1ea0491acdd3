# SPDX-License-Identifier: Apache-2.0
"""The units under a systemd of their own, which sees the wheel as /opt/p2pdist and knows no other unit.

It runs as the first process of new namespaces, network included, in control groups of its own: nothing of this
machine's systemd is touched, and all of it ends with the test. Where these are not to be had (most containers) the
tests are skipped; in CI they fail.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.real.wheel import HIDDEN, ROOT, Installed, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SYSTEMD = "/lib/systemd/systemd"
OWN_UNITS = Path("/lib/systemd/system")
JOURNAL = ("systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket")
STUBS = ("sysinit", "basic", "shutdown", "sockets", "network-online", "multi-user")
TARGET = """\
[Unit]
Wants=systemd-journald.socket systemd-journald.service p2pdist-agent.service p2pdist-scheduler.service
After=systemd-journald.service
"""
BOOT = """\
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir -p /run/lock /run/etc/upper /run/etc/work
while read -r group where; do mount --bind "$group" "$where"; done <<END
$BOUND
END
ip link set lo up
ip link add veth0 type veth peer name veth1
ip addr add 192.0.2.1/24 dev veth0
ip link set veth0 up
ip link set veth1 up
mount -t tmpfs tmpfs /var/lib
mount -t tmpfs tmpfs /var/log
mount -t tmpfs tmpfs /opt
mkdir /opt/p2pdist
mount --bind "$ENVIRONMENT" /opt/p2pdist
mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work /etc
mkdir -p /etc/p2pdist
cp /opt/p2pdist/share/p2pdist/*.toml /etc/p2pdist/
exec env -i PATH="$PATH" container=test SYSTEMD_UNIT_PATH="$UNITS" \\
    /lib/systemd/systemd --system --unit=test.target --log-target=null --show-status=0
"""
JOIN = """\
for group in $JOINED; do echo $$ >"$group/cgroup.procs" || true; done
exec unshare "$@" sh -c "$BOOT"
"""
NAMESPACES = ("--mount", "--pid", "--fork", "--kill-child", "--cgroup", "--uts", "--ipc", "--net")


@dataclass(frozen=True, slots=True)
class Machine:
    """What a systemd in namespaces runs. `pid` is its own, from outside."""

    pid: int

    def run(self, *command: str) -> str:
        done = self.attempt(*command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def attempt(self, *command: str) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", "--target", str(self.pid), "--all", "--"]
        return subprocess.run([*enter, *command], capture_output=True, text=True, timeout=60)

    def shows(self, unit: str, key: str) -> str:
        return self.run("systemctl", "show", "--value", "--property", key, unit).strip()

    def await_(self, unit: str, **properties: str) -> None:
        """Wait until a unit's properties are so."""
        until(
            lambda: all(self.shows(unit, key) == value for key, value in properties.items()),
            f"{unit}: {properties}\n{self.attempt('journalctl', '--no-pager', '-u', unit, '-n', '20').stdout}",
        )

    def settings(self, text: str) -> None:
        """Write the agent's settings."""
        self.run("sh", "-c", 'printf "%s\\n" "$1" >/etc/p2pdist/agent.toml', "sh", text)


@pytest.fixture(scope="module")
def machine(
    require: Callable[[str, str], str], installed: Installed, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    require("systemd-analyze", "systemd")
    require("ip", "iproute2")
    if os.geteuid() != 0:
        pytest.skip("a systemd of its own needs root")
    base = subprocess.run(
        [installed.environment / "bin/python", "-c", "import sys; print(sys.base_prefix)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if base.startswith(HIDDEN):
        pytest.skip(f"the units cannot see the Python in {base.strip()}: ProtectHome")
    with booted(installed, tmp_path_factory.mktemp("systemd")) as machine:
        yield machine


@contextmanager
def booted(installed: Installed, directory: Path) -> Iterator[Machine]:
    units, environment = directory / "units", directory / "environment"
    write_units(units)
    shutil.copytree(installed.environment, environment, symlinks=True)
    program = environment / "bin/p2pdist"
    program.write_text("#!/opt/p2pdist/bin/python\n" + program.read_text().partition("\n")[2])
    with own_groups() as groups, (directory / "boot.log").open("w") as log:
        given = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "ENVIRONMENT": str(environment),
            "UNITS": str(units),
            "BOOT": BOOT,
            "JOINED": " ".join(map(str, groups)),
            "BOUND": "\n".join(f"{group} {where}" for group, where in groups.items()),
        }
        unshare = subprocess.Popen(
            ["sh", "-c", JOIN, "sh", *NAMESPACES], env=given, stdout=log, stderr=log, start_new_session=True
        )
        try:
            yield await_systemd(unshare, directory / "boot.log")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(unshare.pid, signal.SIGKILL)
            unshare.wait()


@contextmanager
def own_groups() -> Iterator[dict[Path, str]]:
    """Make a control group below this process's in each hierarchy that lets us, and remove them all in the end.

    With each comes where its hierarchy is mounted: there systemd is to see the group as all there is.
    """
    groups = {group / f"p2pdist-test-{os.getpid()}": where for group, where in present_groups()}
    for group in groups:
        with suppress(OSError):
            group.mkdir()
    groups = {group: where for group, where in groups.items() if group.is_dir()}
    try:
        yield groups
    finally:
        until(lambda: all(removed(group) for group in groups), "its control groups are empty")


def present_groups() -> Iterator[tuple[Path, str]]:
    """Return this process's group in each hierarchy, and where that is mounted."""
    own = [line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split()
        for controllers, path in own:
            ours = set(controllers.split(",")) <= set(options.split(",")) if controllers else kind == "cgroup2"
            if kind.startswith("cgroup") and ours:
                yield Path(where + path), where


def removed(group: Path) -> bool:
    """Return whether the group and all below it are gone; a process that is just ending keeps one for a moment."""
    with suppress(OSError):
        for directory, _, _ in os.walk(group, topdown=False):
            os.rmdir(directory)
    return not group.exists()


def write_units(units: Path) -> None:
    units.mkdir()
    for source in (*(ROOT / "deploy/systemd").iterdir(), *(OWN_UNITS / name for name in JOURNAL)):
        shutil.copy2(source, units / source.name)
    for name in STUBS:
        (units / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
    (units / "test.target").write_text(TARGET)
    watchdog = units / "p2pdist-agent.service.d/quick.conf"
    watchdog.parent.mkdir()
    watchdog.write_text("[Service]\nWatchdogSec=4\n")


def await_systemd(unshare: subprocess.Popen[bytes], log: Path) -> Machine:
    """Return the machine once its systemd answers; else fail in CI, where it has to, and skip."""

    def first() -> Machine | None:
        children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text().split()
        machine = Machine(int(children[0])) if children else None
        return machine if machine and machine.attempt("systemctl", "list-units").returncode == 0 else None

    found: list[Machine] = []
    until(lambda: unshare.poll() is not None or found or found.extend(filter(None, [first()])), "systemd")
    if not found:
        why = f"no systemd of its own here: {log.read_text().strip()[-300:]}"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(why)
    return found[0]


def test_both_units_come_up_and_say_how_they_are(machine: Machine) -> None:
    for unit in ("p2pdist-scheduler", "p2pdist-agent"):
        machine.await_(unit, ActiveState="active", SubState="running", NRestarts="0")
    machine.await_("p2pdist-agent", StatusText="0 peers, 0 blobs on their way, scheduler not configured")
    machine.await_("p2pdist-scheduler", StatusText="0 agents, 0 swarms")


def test_the_agent_runs_as_a_user_of_its_own_who_alone_sees_the_blobs(machine: Machine) -> None:
    machine.await_("p2pdist-agent", ActiveState="active")
    owner = machine.run("stat", "-c", "%u %a", "/var/lib/p2pdist/agent/").split()
    assert owner[1] == "700"
    assert int(owner[0]) > 0
    assert machine.run("stat", "-c", "%u", f"/proc/{machine.shows('p2pdist-agent', 'MainPID')}").split() == owner[:1]
    assert machine.run("stat", "-c", "%u %a", "/var/lib/p2pdist/").split() == ["0", "755"]


def test_the_hardening_leaves_mdns_alone(machine: Machine) -> None:
    machine.await_("p2pdist-agent", ActiveState="active")
    status = "/opt/p2pdist/bin/p2pdist status --json"
    until(lambda: '"mdns": "on"' in machine.attempt("sh", "-c", status).stdout, "mDNS")


def test_a_reload_is_seen_and_settled(machine: Machine) -> None:
    machine.settings("upload_slots = 3")
    machine.run("systemctl", "reload", "p2pdist-agent")
    machine.await_("p2pdist-agent", ActiveState="active")
    until(lambda: "settings reloaded" in machine.run("journalctl", "--no-pager", "-u", "p2pdist-agent"), "the reload")


def test_the_journal_knows_how_bad_a_line_is(machine: Machine) -> None:
    machine.settings("upload_slot = 3")
    machine.run("systemctl", "reload", "p2pdist-agent")
    errors = ("journalctl", "--no-pager", "-u", "p2pdist-agent", "--priority", "err", "--output", "cat")
    until(lambda: "did you mean 'upload_slots'?" in machine.run(*errors), "the error")
    assert "agent listens" not in machine.run(*errors)
    machine.settings("")
    machine.run("systemctl", "reload", "p2pdist-agent")


def test_a_loop_that_is_stuck_is_ended_and_started_again(machine: Machine) -> None:
    machine.await_("p2pdist-agent", ActiveState="active")
    stuck = machine.shows("p2pdist-agent", "MainPID")
    machine.run("kill", "-STOP", stuck)
    machine.await_("p2pdist-agent", NRestarts="1", ActiveState="active")
    assert machine.shows("p2pdist-agent", "MainPID") != stuck


def test_what_the_watchdog_ends_says_in_the_journal_where_it_was(machine: Machine) -> None:
    machine.await_("p2pdist-agent", ActiveState="active")
    stuck = machine.shows("p2pdist-agent", "MainPID")
    machine.run("kill", "-ABRT", stuck)
    journal = ("journalctl", "--no-pager", "-u", "p2pdist-agent", f"_PID={stuck}", "--output", "cat")
    until(lambda: "most recent call first" in machine.run(*journal), "the stack")
    until(lambda: machine.shows("p2pdist-agent", "MainPID") not in ("0", stuck), "another agent")
    machine.await_("p2pdist-agent", ActiveState="active")


def test_a_stop_is_clean_and_a_wrong_setting_is_not_tried_again(machine: Machine) -> None:
    machine.run("systemctl", "stop", "p2pdist-agent")
    machine.await_("p2pdist-agent", ActiveState="inactive", Result="success", ExecMainStatus="0")
    machine.settings("cluster = 3")
    assert machine.attempt("systemctl", "start", "p2pdist-agent").returncode != 0
    machine.await_("p2pdist-agent", ActiveState="failed", ExecMainStatus="2")
    assert "cluster: 3 is not text" in machine.run("journalctl", "--no-pager", "-u", "p2pdist-agent")


def test_under_the_units_a_cluster_gets_its_identity_as_the_page_says(machine: Machine) -> None:
    """docs/identity.md: the CA made by root where the scheduler has run before, the token by systemd's hand."""
    program, drop_in = "/opt/p2pdist/bin/p2pdist", machine.shows("p2pdist-agent", "FragmentPath") + ".d/join.conf"
    machine.await_("p2pdist-scheduler", ActiveState="active")
    page = (ROOT / "docs/identity.md").read_text()
    lines = [line.strip() for line in page.splitlines() if line.startswith("    EnvironmentFile=")]
    assert len(lines) == 1
    machine.run(program, "cluster", "init", "prod")
    machine.run("sh", "-c", "echo 'ca_dir = \"/var/lib/p2pdist-scheduler/cluster\"' >/etc/p2pdist/scheduler.toml")
    machine.run("systemctl", "restart", "p2pdist-scheduler")
    machine.run("sh", "-c", f"umask 077; echo P2PDIST_JOIN=$({program} cluster token) >/etc/p2pdist/join.env")
    machine.run("sh", "-c", 'printf "[Service]\n%s\n" "$@" >"$0"', drop_in, *lines)
    machine.settings('scheduler = ["127.0.0.1:5060"]\nmdns = false')
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "reset-failed", "p2pdist-agent")
    journal = ("journalctl", "--no-pager", "-n", "20", "--output", "cat")
    assert machine.attempt("systemctl", "restart", "p2pdist-agent").returncode == 0, machine.run(*journal)
    status = f"{program} status --json"
    until(lambda: '"state": "ok"' in machine.attempt("sh", "-c", status).stdout, "a certificate")
    until(lambda: '"connected": true' in machine.attempt("sh", "-c", status).stdout, "the scheduler")
