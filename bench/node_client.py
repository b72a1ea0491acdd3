# SPDX-License-Identifier: Apache-2.0
"""The client process of `p2pdist bench node`: many requests over a few kept-alive connections, as cheaply as can be.

Run as a program: reads a `Load` as JSON from its standard input, prints `Seen` as JSON. One epoll serves all
connections; bodies are received into one buffer, so the bytes really arrive, and hashed only where that is asked for:
the same client measures every server. Refuses any answer but 200 and 206 with a Content-Length.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import socket
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import trio

from bench.lab.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Sequence

_BUFFER_BYTES = 256 << 10
"""Stays in a core's cache. With 1 MiB the client took 1.5 GB/s of whoever kept more than that on its way."""
_LOW_WATER_BYTES = 128 << 10
"""Wake up for no less: wake-ups, not bytes, are what receiving costs."""
_ACCEPT = "application/vnd.oci.image.manifest.v1+json, */*"
"""docker-registry hides OCI manifests from who does not name them."""
_TIMEOUT_S = 120.0
_LATE_S = 30.0
"""The process is given so much longer before it is ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to ask.

    Args:
        requests: targets with their Range ("" for none); connections take the next one whenever they are free.
        check: compare each body with the SHA-256 in its target, which must then be asked for whole.
        cpu: the core to run on; None for any.
    """

    host: str
    port: int
    requests: Sequence[tuple[str, str]]
    connections: int = 1
    check: bool = False
    cpu: int | None = None


@dataclass(slots=True)
class Seen:
    """What came of it: times in seconds, bytes of bodies."""

    seconds: float = 0.0
    payload_bytes: int = 0
    ttfb_s: list[float] = field(default_factory=list)


class ClientError(LabError):
    """A server answered something else than was asked for."""


async def run_client(load: Load) -> Seen:
    """Run a load in a process of its own. Raises ClientError."""
    command = [sys.executable, "-m", "bench.node_client"]
    with trio.fail_after(_TIMEOUT_S + _LATE_S):
        done = await trio.run_process(
            command, stdin=json.dumps(asdict(load)).encode(), capture_stdout=True, capture_stderr=True, check=False
        )
    if done.returncode:
        raise ClientError(done.stderr.decode(errors="replace").strip().rpartition("\n")[2])
    return Seen(**json.loads(done.stdout))


class _Connection:
    """One connection and the request that is under way on it."""

    __slots__ = ("asked_at", "first", "head", "sha256", "sock", "target", "unread_bytes")

    def __init__(self, address: tuple[str, int]) -> None:
        self.sock = socket.create_connection(address, timeout=_TIMEOUT_S)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.target = ""
        self.head = b""
        self.unread_bytes = 0
        self.asked_at = 0.0
        self.first = False
        self.sha256 = hashlib.sha256()

    def ask(self, host: str, target: str, byte_range: str) -> None:
        """Send a request. The socket takes so few bytes at once."""
        self.target, self.head, self.unread_bytes, self.first = target, b"", 0, True
        self.sha256 = hashlib.sha256()
        wanted = f"Range: {byte_range}\r\n" if byte_range else ""
        self._low_water(1)
        self.asked_at = time.perf_counter()
        self.sock.sendall(f"GET {target} HTTP/1.1\r\nHost: {host}\r\n{wanted}Accept: {_ACCEPT}\r\n\r\n".encode())

    def receive(self, buffer: memoryview, check: bool) -> int:
        """Receive what is there; return how much of the body that was."""
        count = self.sock.recv_into(buffer)
        if not count:
            raise ClientError(f"{self.target}: cut off {self.unread_bytes} bytes before its end")
        body = buffer[:count]
        if not self.unread_bytes:
            body = self._read_head(bytes(body))
        self.unread_bytes -= len(body)
        if check:
            self.sha256.update(body)
        self._low_water(min(_LOW_WATER_BYTES, self.unread_bytes))
        return len(body)

    def _read_head(self, data: bytes) -> memoryview:
        """Take in a part of the head; return what of the body came behind it."""
        self.head += data
        head, end, body = self.head.partition(b"\r\n\r\n")
        if not end:
            return memoryview(b"")
        lines = head.decode("latin-1").lower().split("\r\n")
        lengths = [line.partition(":")[2] for line in lines if line.startswith("content-length:")]
        if lines[0].split()[1] not in ("200", "206") or not lengths:
            raise ClientError(f"{self.target}: {lines[0]}")
        self.unread_bytes = int(lengths[0])
        return memoryview(body)

    def check(self) -> None:
        actual = self.sha256.hexdigest()
        if actual not in self.target:
            raise ClientError(f"{self.target}: the body's sha256 is {actual}")

    def _low_water(self, wanted_bytes: int) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, max(1, wanted_bytes))


def ask_all(load: Load) -> Seen:
    """Ask everything and return when the last body is here. Blocking. Raises ClientError or OSError."""
    waiting = list(reversed(load.requests))
    with ExitStack() as closing:
        epoll = closing.enter_context(select.epoll())
        by_fd: dict[int, _Connection] = {}
        for _ in range(min(load.connections, len(waiting))):
            connection = _Connection((load.host, load.port))
            closing.enter_context(connection.sock)
            by_fd[connection.sock.fileno()] = connection
        return _ask(load, waiting, epoll, by_fd)


def _ask(load: Load, waiting: list[tuple[str, str]], epoll: select.epoll, by_fd: dict[int, _Connection]) -> Seen:
    seen, buffer, began = Seen(), memoryview(bytearray(_BUFFER_BYTES)), time.perf_counter()
    for fd, connection in by_fd.items():
        epoll.register(fd, select.EPOLLIN)
        connection.ask(load.host, *waiting.pop())
    busy = len(by_fd)
    while busy:
        ready = epoll.poll(_TIMEOUT_S)
        if not ready:
            raise ClientError(f"no byte within {_TIMEOUT_S:.0f} s")
        for fd, _ in ready:
            connection = by_fd[fd]
            received = connection.receive(buffer, load.check)
            seen.payload_bytes += received
            if received and connection.first:
                connection.first = False
                seen.ttfb_s.append(time.perf_counter() - connection.asked_at)
            if not received or connection.unread_bytes:
                continue
            if load.check:
                connection.check()
            if waiting:
                connection.ask(load.host, *waiting.pop())
            else:
                epoll.unregister(fd)
                busy -= 1
    seen.seconds = time.perf_counter() - began
    return seen


def main() -> None:
    """Run the load that the standard input holds."""
    load = Load(**json.loads(sys.stdin.read()))
    if load.cpu is not None:
        os.sched_setaffinity(0, [load.cpu])
    try:
        seen = ask_all(load)
    except (ClientError, OSError) as error:
        raise SystemExit(str(error)) from error
    print(json.dumps(asdict(seen)))


if __name__ == "__main__":
    main()
