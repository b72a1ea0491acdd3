# SPDX-License-Identifier: Apache-2.0
"""The kernel's side of a lab: named network namespaces, links between them, sockets inside them.

Works as root and, by re-executing the program in a user namespace, for everybody else where the kernel allows
that. All interfaces live inside the lab's own namespaces, so nothing of the machine's network is ever touched,
and deleting the namespaces deletes everything.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bench.lab import debian, ownership
from bench.lab.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_RUN = Path("/run/netns")
_INSIDE = "LAB_IN_USER_NAMESPACE"
_CLONE_NEWNET = 0x40000000
_COMMAND_TIMEOUT_S = 30.0
_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
"""Where ip and tc are; Debian leaves these out of an ordinary user's PATH."""

# A tmpfs over /run gives `ip netns` its writable directory; the mount is private to the new mount namespace.
_PRELUDE = 'set -e; mount -t tmpfs tmpfs /run; mkdir /run/netns; ip link set lo up; exec "$@"'
_UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-c", _PRELUDE, "sh")
_PROBE = "ip netns add probe && tc -n probe qdisc add dev lo root tbf rate 1mbit burst 256kb latency 50ms"

_libc = ctypes.CDLL(None, use_errno=True)


def why_not(*, announce: Callable[[str], None] | None = None) -> str | None:
    """Return why this process may not make shaped namespaces, or None where it may.

    Where it may only in a user namespace of its own, this call does not return: the program is
    executed again in one, from its beginning; call this before anything is printed or started.

    Args:
        announce: told that iproute2 is now being installed, where root lacks it; None not to install it.
    """
    _extend_path()
    if announce and _missing() and os.geteuid() == 0:
        announce("installing iproute2, for shaped links …")
        debian.install("iproute2")
    if missing := _missing():
        return f"{' and '.join(missing)} not found; install with: apt-get install iproute2 util-linux"
    here = _probe_here()
    if here is None or _INSIDE in os.environ:
        return here
    rootless = _attempt([*_UNSHARE, "sh", "-c", _PROBE])
    if rootless is not None:
        return f"neither root nor allowed to make user namespaces ({rootless}); run as root for shaped links"
    os.environ[_INSIDE] = "1"
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvp(_UNSHARE[0], [*_UNSHARE, sys.executable, *sys.orig_argv[1:]])


def _missing() -> list[str]:
    return [tool for tool in ("ip", "tc", "nsenter", "unshare") if shutil.which(tool) is None]


def in_user_namespace() -> bool:
    """Return whether this is the program executed again by `why_not`."""
    return _INSIDE in os.environ


def _extend_path() -> None:
    path = os.environ.get("PATH", os.defpath)
    if _SYSTEM_PATH not in path:
        os.environ["PATH"] = f"{path}:{_SYSTEM_PATH}"


def _probe_here() -> str | None:
    if os.geteuid() != 0:
        return "not root"
    name = ownership.new_name()
    why = _attempt(["sh", "-c", _PROBE.replace("probe", name)])
    _attempt(["ip", "netns", "del", name])
    return why


def _attempt(command: list[str]) -> str | None:
    """Run a command; return None if it worked, else the last line of what it said."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def configure(tool: str, lines: list[str], namespace: str | None = None) -> None:
    """Run `ip` or `tc` commands as one batch, in a namespace if one is named.

    Raises:
        LabError: one of them failed; those before it have taken effect.
    """
    where = ["-n", namespace] if namespace else []
    command = [tool, *where, "-batch", "-"]
    batch = "\n".join(lines) + "\n"
    done = subprocess.run(command, input=batch, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S)
    if done.returncode != 0:
        raise LabError(f"{tool} refused to build the lab's network: {done.stderr.strip()}")


def enter_command(namespace: str) -> tuple[str, ...]:
    """Return the command prefix that runs a program in a namespace under the same process id."""
    return ("nsenter", f"--net={_RUN / namespace}", "--")


@contextlib.contextmanager
def entered(namespace: str) -> Iterator[None]:
    """Put the calling thread into a namespace for the block; a socket made there stays there.

    The block must not wait, and must not start threads or processes: they would stay behind.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        target = os.open(_RUN / namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(target)
        finally:
            os.close(target)
        try:
            yield
        finally:
            _setns(home)
    finally:
        os.close(home)


def _setns(descriptor: int) -> None:
    # os.setns came with Python 3.12; the kernel call concerns the calling thread only.
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot enter network namespace: {os.strerror(code)}")


def tcp_socket(namespace: str) -> socket.socket:
    """Return a new IPv4 TCP socket that belongs to a namespace."""
    with entered(namespace):
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM)


def transmitted_bytes(namespace: str, interface: str) -> int:
    """Return how many bytes an interface of a namespace has sent, headers included."""
    with entered(namespace):
        counters = Path("/proc/thread-self/net/dev").read_text()
    for line in counters.splitlines():
        name, _, fields = line.strip().partition(":")
        if name == interface:
            return int(fields.split()[8])
    raise LabError(f"no interface {interface} in {namespace}")


def delete(namespaces: list[str]) -> None:
    """Delete namespaces, and with them their interfaces, whichever of them there are."""
    present = [name for name in namespaces if (_RUN / name).exists()]
    if present:
        batch = "".join(f"netns del {name}\n" for name in present)
        subprocess.run(["ip", "-force", "-batch", "-"], input=batch, text=True, capture_output=True)


def sweep() -> list[str]:
    """Remove what labs that died left: the processes in their namespaces, then these; return their names."""
    if not _RUN.is_dir():
        return []
    dead = [entry.name for entry in _RUN.iterdir() if ownership.is_left_over(entry.name)]
    for name in dead:
        command = ["ip", "netns", "pids", name]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S)
        for pid in listed.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    delete(dead)
    return dead
