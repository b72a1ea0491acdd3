# SPDX-License-Identifier: Apache-2.0
"""The words between our HTTP server and what it serves: requests, responses, limits, the `Application`.

Owns: nothing that runs. Invariant: who holds a `Response` closes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

CLIENT_LEFT = 499
"""Counted where the client hung up before there was an answer; nginx's number, never sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a client may take. The defaults suit a node's own runtimes.

    Args:
        connections: open at once. For further ones those make room, in this order, that are idle, that owe a request
            for `patience_s`, that read too slowly; where none does, the new ones wait in the listen queue.
        header_bytes: request line and headers; beyond it 431. Clients of zstd:chunked layers send up to 1,024 ranges,
            which is 20 KiB, and ask for fewer only on 400.
        header_s: for the first byte of a connection, and again from a request's first byte to the end of its headers.
        idle_s: between two requests.
        write_stall_s: without the client taking a byte.
        patience_s: how long a client that owes a request keeps its place while others wait for one.
        slow_s: a reader that takes less than `slow_bytes` in so long loses its place to others that wait.
    """

    connections: int = 2048
    header_bytes: int = 32 * 1024
    header_s: float = 5.0
    idle_s: float = 30.0
    write_stall_s: float = 60.0
    patience_s: float = 2.5
    slow_s: float = 5.0
    slow_bytes: int = 64 * 1024


class ByteSource(Protocol):
    """What a body is sent from; `ports.BlobReader` is one."""

    async def available(self, start: int, stop: int) -> int:
        """Wait for the byte at `start`; return `end`, start < end <= stop: [start, end) can be sent."""

    def fileno(self) -> int: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class FileBody:
    """Bytes [start, stop) of a source, start < stop; whoever holds the response closes the source.

    Args:
        ready: where `available` has said that the bytes from `start` on end; 0 where nobody has asked.
    """

    source: ByteSource
    start: int
    stop: int
    ready: int = 0


@dataclass(frozen=True, slots=True)
class PartsBody:
    """Spans of one source, with other bytes before, between and after them: a multipart/byteranges body."""

    source: ByteSource
    parts: tuple[bytes | FileBody, ...]

    @property
    def length_bytes(self) -> int:
        return sum(len(part) if isinstance(part, bytes) else part.stop - part.start for part in self.parts)


@dataclass(frozen=True, slots=True)
class Request:
    """A request without a body. `target` is raw, as it came; header names are in lower case."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...] = ()

    def header(self, name: str) -> str | None:
        """Return a header's value, repeated ones joined by commas (RFC 9110 §5.3), or None."""
        values = [value for key, value in self.headers if key == name]
        return ", ".join(values) if values else None

    @property
    def resumes(self) -> bool:
        """Whether the client gets the rest of a body that ends early, here or at the origin.

        containerd's resolver does, and it alone names the registry as `ns`; a reset ends its pull. What podman, skopeo
        and CRI-O pull with does not: an early end ends its pull, after a reset it tries again (docs/runtimes.md).
        """
        return "ns=" in self.target.partition("?")[2]


@dataclass(frozen=True, slots=True)
class Response:
    """An answer.

    Args:
        kind: what was asked for, in one word, for the metrics.
        length_bytes: the Content-Length where it is not the body's: the answer to a HEAD.
    """

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | FileBody | PartsBody = b""
    kind: str = "other"
    length_bytes: int | None = None

    @property
    def content_length_bytes(self) -> int:
        if self.length_bytes is not None:
            return self.length_bytes
        if isinstance(self.body, PartsBody):
            return self.body.length_bytes
        return self.body.stop - self.body.start if isinstance(self.body, FileBody) else len(self.body)

    def close(self) -> None:
        """Close the body's source."""
        if not isinstance(self.body, bytes):
            self.body.source.close()


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its answer, as told when it is over.

    Args:
        status: what was sent; 499 where the client left before there was an answer.
        first_byte_s: from the end of the request's headers to the first byte of a body (or an answer without one).
        sent_bytes: of the body.
        complete: whether the client was sent all of it.
    """

    kind: str
    status: int
    first_byte_s: float
    sent_bytes: int
    complete: bool


class Application(Protocol):
    """What is served."""

    async def handle(self, request: Request) -> Response:
        """Answer a request; cancelled when the client hangs up. What it raises is logged and answered with 500."""

    def refuse(self, status: int, message: str) -> Response:
        """Word an answer of the server's own: bad requests, failures."""

    def finished(self, exchange: Exchange) -> None:
        """Count an exchange; must not raise."""
