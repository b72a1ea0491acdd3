# SPDX-License-Identifier: Apache-2.0
"""Names for what a lab leaves in the system, from which anyone can tell whether their maker still lives.

A name holds the maker's pid namespace, process id and start time, so that neither a reused process id nor a
directory shared between containers makes a lab take another's things. Refuses to judge names it did not make.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

_NAME = re.compile(r"p2pdist-lab-(?P<space>\d+)-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]{6}")


def new_name() -> str:
    """Return a name that is this process's and no other lab's, of this process or another."""
    pid = os.getpid()
    return f"p2pdist-lab-{_pid_namespace()}-{pid}-{_start_ticks(pid)}-{secrets.token_hex(3)}"


def is_left_over(name: str) -> bool:
    """Return whether `name`, or the name at its start, is a lab's whose process is gone."""
    match = _NAME.match(name)
    if match is None or match["space"] != _pid_namespace():
        return False
    return _start_ticks(int(match["pid"])) != int(match["start"])


def _pid_namespace() -> str:
    """Return the number in `pid:[4026531836]` (namespaces(7))."""
    return os.readlink("/proc/self/ns/pid")[5:-1]


def _start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks after boot (proc(5), stat, field 22), or None."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])
