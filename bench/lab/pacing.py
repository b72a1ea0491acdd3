# SPDX-License-Identifier: Apache-2.0
"""Makes a server limit each of its connections, as many registries and clouds do, whatever program it is.

The kernel's TCP paces a socket by itself (SO_MAX_PACING_RATE, socket(7)), and a connection inherits the limit of the
listening socket that accepted it. A copy of the server's own listening socket, taken with pidfd_getfd(2), is all
that is needed: no shaper, no proxy in between, and nothing that the server knows of. A new connection may send
its first tens of kilobytes at once.
"""

from __future__ import annotations

import ctypes
import os
import socket
from contextlib import suppress
from pathlib import Path

from bench.lab.errors import LabError

_SO_MAX_PACING_RATE = 47
_SYS_PIDFD_GETFD = 438
"""The same on all architectures (Linux 5.6)."""

_libc = ctypes.CDLL(None, use_errno=True)


def pace(sock: socket.socket, bytes_per_s: float) -> None:
    """Limit what a connection, or each that a listening socket accepts from now on, sends."""
    sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, max(1, int(bytes_per_s)))


def pace_connections(pid: int, bytes_per_s: float) -> None:
    """Limit each connection that a process of ours accepts from now on.

    Raises:
        LabError: the kernel refuses, or the process does not listen.
    """
    try:
        pidfd = os.pidfd_open(pid)
        try:
            paced = sum(_pace_copy(pidfd, number, bytes_per_s) for number in _socket_numbers(pid))
        finally:
            os.close(pidfd)
    except OSError as error:
        raise LabError(f"cannot limit the registry's connections: {error.strerror}; it takes Linux 5.6") from error
    if not paced:
        raise LabError("cannot limit the registry's connections: it does not listen")


def _socket_numbers(pid: int) -> list[int]:
    numbers = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(entry).startswith("socket:"):
                numbers.append(int(entry.name))
    return numbers


def _pace_copy(pidfd: int, number: int, bytes_per_s: float) -> bool:
    """Limit one socket of the process if it listens; return whether it does."""
    copy = _libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0)
    if copy < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    with socket.socket(fileno=copy) as sock:
        listens = sock.family != socket.AF_UNIX and bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        if listens:
            pace(sock, bytes_per_s)
    return listens
