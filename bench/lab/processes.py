# SPDX-License-Identifier: Apache-2.0
"""Processes on the lab's hosts: each with a log file of its own, all ended when the group ends.

Invariants: a process never outlives its group, not even when this program is killed with SIGKILL (the kernel then
kills it: PR_SET_PDEATHSIG); a terminal's Ctrl-C reaches this program alone, which then ends the others in order.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from bench.lab import meters
from bench.lab.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import Self

    from bench.lab.hosts import Host

_GRACE_S = 8.0
"""An agent lets running responses end, but in a lab nobody waits for them any more."""

_TAIL_LINES = 12


class Process:
    """A program on a host; `spawn` runs it once more."""

    def __init__(self, name: str, spawn: Callable[[], subprocess.Popen[bytes]], log: Path) -> None:
        self.name = name
        self.log = log
        self._spawn = spawn
        self._popen = spawn()
        self._killed_cpu_s = 0.0
        """What those have used that were killed."""

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    @property
    def exit_code(self) -> int | None:
        """The exit code, minus the number of the signal that ended it, or None while it runs."""
        return self._popen.poll()

    def check(self) -> None:
        """Raise LabError with the end of the log if the process has ended."""
        code = self._popen.poll()
        if code is not None:
            raise LabError(f"{self.name} ended with exit code {code}", log=self.tail())

    def tail(self) -> str:
        """Return the last lines of the log."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
        except OSError as error:
            return f"(no log: {error})"

    def cpu_s(self) -> float:
        return self._killed_cpu_s + meters.process_cpu_s(self.pid)

    def peak_rss_mib(self) -> float:
        return meters.process_peak_rss_mib(self.pid)

    def terminate(self) -> None:
        self._popen.terminate()

    def kill(self) -> None:
        self._killed_cpu_s += meters.process_cpu_s(self.pid)
        self._popen.kill()
        self._popen.wait()

    def start_again(self) -> None:
        """Run the same command, with the same log, in the place of the one that has ended; main thread only."""
        assert not self.running, f"{self.name} still runs"
        self._popen = self._spawn()

    def send_signal(self, number: int) -> None:
        """Send a signal, to nobody where the process has ended."""
        self._popen.send_signal(number)

    def freeze(self) -> None:
        """Let it do nothing until `thaw`; its connections stay open."""
        self.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.send_signal(signal.SIGCONT)

    def wait(self, timeout_s: float) -> bool:
        """Return whether the process ended within the time."""
        try:
            self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True


class ProcessGroup(AbstractContextManager["ProcessGroup"]):
    """Starts processes and ends them in reverse order; start only from the main thread.

    Args:
        logs: the directory for their logs.
        grace_s: how long all of them together may take to end after SIGTERM; SIGKILL follows.
    """

    def __init__(self, logs: Path, *, grace_s: float = _GRACE_S) -> None:
        self._logs = logs
        self._grace_s = grace_s
        self._processes: list[Process] = []

    def __enter__(self) -> Self:
        return self

    def start(self, host: Host, name: str, command: Sequence[str]) -> Process:
        """Start a command on a host, its output in `<name>.log`.

        Raises:
            LabError: there is no such program.
        """
        log = self._logs / f"{name}.log"
        # The death signal is tied to the thread that starts the process, hence the main thread.
        leash = ("setpriv", "--pdeathsig", "KILL", "--") if shutil.which("setpriv") else ()

        def spawn() -> subprocess.Popen[bytes]:
            try:
                with log.open("ab") as output:
                    return subprocess.Popen(
                        [*host.command_prefix, *leash, *command],
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        env=_environment(),
                    )
            except OSError as error:
                raise LabError(f"cannot start {name}: {error}") from error

        process = Process(name, spawn, log)
        self._processes.append(process)
        return process

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + self._grace_s
        for process in reversed(self._processes):
            process.terminate()
        for process in reversed(self._processes):
            if not process.wait(max(0.0, deadline - time.monotonic())):
                process.kill()
        self._processes.clear()


def _environment() -> dict[str, str]:
    """Return the environment without the user's settings of p2pdist: only flags count in a lab."""
    return {name: value for name, value in os.environ.items() if not name.startswith("P2PDIST_")}
