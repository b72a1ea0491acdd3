# SPDX-License-Identifier: Apache-2.0
"""One HTTP/1.1 connection on a raw socket: h11 reads, `sendfile` writes.

Owns: parsing requests, refusing malformed ones, writing responses, and closing each response whatever happens.
Refuses request bodies and TLS.

Invariants:
- a body that cannot be finished is cut, also by the end of this process, in the way after which its client goes on
  elsewhere: an early end for one that resumes (`Request.resumes`), a reset, which others try again after, for the rest;
- each wait has a deadline, except the application's for its own content, which ends when the client hangs up;
- requests are answered in order, one at a time; what was sent ahead is kept, at most two headers' worth.

A small answer costs what surrounds it (docs/performance.md): one task listens for as long as the connection lasts,
what can be sent at once is, without a deadline or a trip through the event loop, and h11 only reads.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from contextlib import suppress
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Protocol

import h11
import structlog
import trio

from p2pdist.errors import P2PDistError
from p2pdist.net.http_messages import CLIENT_LEFT, Exchange, FileBody, PartsBody, Request, Response

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from p2pdist.net.http_messages import Application, Limits

log = structlog.get_logger(__name__)

_SENDFILE_BYTES = 4 << 20
"""Per system call: a reader that keeps up holds the loop for about a millisecond."""

_LONG_SEND_BUFFER_BYTES = 256 * 1024
"""For long bodies, sent in full segments only: on loopback 2 to 6 GB/s at 0.13 to 0.45 CPU-s/GiB, 3.1 and 0.27 in the
mean; with the kernel's own buffer 2.6 and 0.33, with 512 KiB 1.9 and 0.38, with 128 KiB 1.8 and 0.34. A body of 1 MiB
gains from neither."""

_LOAD_BYTES = 256 * 1024

_RECEIVE_BYTES = 16 * 1024
_LINGER_BYTES = 1 << 20
_LINGER_S = 1.0
_CLOSE, _RESET_ON_CLOSE = struct.pack("ii", 0, 0), struct.pack("ii", 1, 0)


class Places(Protocol):
    """What a connection needs of its server."""

    @property
    def stopping(self) -> bool:
        """Whether each answer is to be the connection's last."""

    def fresh(self, wait_s: float) -> AbstractContextManager[trio.CancelScope]:
        """Bound the wait for the first request."""

    def asking(self, wait_s: float) -> AbstractContextManager[trio.CancelScope]:
        """Bound the wait for the rest of a request."""

    def idle(self, wait_s: float) -> AbstractContextManager[trio.CancelScope]:
        """Bound the wait for another request."""


class _ClientGone(Exception):
    """The client hung up, or takes nothing more."""


class Connection:
    """One client. `close` cuts the response that runs, if any."""

    def __init__(self, client: socket.socket, application: Application, limits: Limits, places: Places) -> None:
        self._socket = client
        self._application = application
        self._limits = limits
        self._places = places
        self._input = bytearray()
        self._arrived = trio.Event()
        """Set when there is input, or will be no more."""
        self._taken = trio.Event()
        """Set when there is room for input again."""
        self._gone = False
        self._wants_body = True
        self._resets = True
        """Whether a response that is cut ends in a reset."""
        self._waiting: trio.CancelScope | None = None
        """The wait for the application, which ends when the client hangs up."""
        self._first_byte_at: float | None = None
        self._sent_bytes = 0
        self._blocked_at: float | None = None
        """Since when bytes wait for the client to take some; None while none do."""
        self._lap_at, self._lap_bytes = 0.0, 0
        """When the client's pace was last looked at, and how much it had taken by then."""
        self._slow = False

    def close(self) -> None:
        self._socket.close()

    async def run(self) -> None:
        """Answer requests until either side has had enough."""
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen)
            lingers = await self._converse()
            nursery.cancel_scope.cancel()
        if lingers:
            await self._linger()

    async def _converse(self) -> bool:
        """Answer requests; return whether the client, who has its last answer, may still be sending."""
        waiting = self._places.fresh(self._limits.header_s)
        while await self._requested(waiting):
            parser = h11.Connection(h11.SERVER, max_incomplete_event_size=self._limits.header_bytes)
            request = await self._read_request(parser)
            if request is None:
                return False
            closing = isinstance(request, Response) or parser.their_state is not h11.DONE
            if not await self._exchange(request, closing=closing):
                return False
            if closing or self._places.stopping:
                return True
            waiting = self._places.idle(self._limits.idle_s)
        return False

    # Input

    async def _listen(self) -> None:
        """Take in what the client sends, also ahead of time, and notice that it hangs up."""
        while not self._gone:
            if len(self._input) >= _RECEIVE_BYTES:
                self._taken = trio.Event()
                await self._taken.wait()
            await trio.lowlevel.wait_readable(self._socket)
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            self._input += data
            self._arrived.set()
            if not data:
                self._gone = True
                if self._waiting is not None:
                    self._waiting.cancel()

    async def _receive(self) -> bool:
        """Wait for input; False where none will come any more."""
        if not self._input and not self._gone:
            self._arrived = trio.Event()
            await self._arrived.wait()
        return bool(self._input)

    async def _requested(self, waiting: AbstractContextManager[trio.CancelScope]) -> bool:
        """Wait for the first byte of a request; False where none comes."""
        if self._input:
            # Sent ahead; others have their turn first.
            await trio.lowlevel.checkpoint()
            return True
        with waiting:
            return await self._receive()
        return False

    # Requests

    async def _read_request(self, parser: h11.Connection) -> Request | Response | None:
        """Return the next request, the answer to one that is refused unread, or None where the client left."""
        self._wants_body = True
        request = self._parse(parser)
        if request is not None:
            return request
        with self._places.asking(self._limits.header_s) as scope:
            while await self._receive():
                request = self._parse(parser)
                if request is not None:
                    return request
            return None
        if trio.current_time() < scope.deadline:
            return None
        return self._application.refuse(408, f"no complete request within {self._limits.header_s:g} s")

    def _parse(self, parser: h11.Connection) -> Request | Response | None:
        """Give the parser all input; return the request that this completes, or the answer where it is refused."""
        parser.receive_data(bytes(self._input))
        self._input.clear()
        self._taken.set()
        try:
            event = parser.next_event()
        except h11.RemoteProtocolError as error:
            return self._application.refuse(error.error_status_hint, f"not an HTTP request: {error}")
        if not isinstance(event, h11.Request):
            return None
        self._wants_body = event.method != b"HEAD"
        return self._checked(event, parser)

    def _checked(self, event: h11.Request, parser: h11.Connection) -> Request | Response:
        """Refuse what h11 lets pass: a header that arrived too large in one go, ambiguous lengths, bodies."""
        headers = [(name.decode("ascii"), value.decode("latin-1")) for name, value in event.headers]
        method, target = event.method.decode("ascii"), event.target.decode("ascii")
        lengths = {value for name, value in headers if name == "content-length"}
        chunked = any(name == "transfer-encoding" for name, _ in headers)
        if _header_bytes(event) > self._limits.header_bytes:
            return self._application.refuse(431, f"request header of more than {self._limits.header_bytes} bytes")
        if lengths and chunked:
            return self._application.refuse(400, "both Content-Length and Transfer-Encoding")
        if chunked or lengths - {"0"}:
            if method in ("GET", "HEAD"):
                return self._application.refuse(400, f"{method} with a body")
        else:
            parser.next_event()
            self._input += parser.trailing_data[0]
        return Request(method, target, tuple(headers))

    # Exchanges

    async def _exchange(self, request: Request | Response, *, closing: bool) -> bool:
        """Answer a request, or send its refusal; return whether the client has all of it."""
        self._first_byte_at, self._sent_bytes = None, 0
        started_at = trio.current_time()
        complete, response = False, None
        self._resets = isinstance(request, Response) or not request.resumes
        try:
            response = request if isinstance(request, Response) else await self._handle(request)
            if response is not None:
                complete = await self._send(response, closing=closing)
        finally:
            if response is not None:
                response.close()
            self._report(response, complete, started_at)
        return complete

    def _report(self, response: Response | None, complete: bool, started_at: float) -> None:
        first_byte_at = trio.current_time() if self._first_byte_at is None else self._first_byte_at
        kind, status = (response.kind, response.status) if response is not None else ("other", CLIENT_LEFT)
        self._application.finished(Exchange(kind, status, first_byte_at - started_at, self._sent_bytes, complete))

    async def _handle(self, request: Request) -> Response | None:
        """Return the application's answer, None where the client hung up before there was one."""
        try:
            with trio.CancelScope() as self._waiting:
                if self._gone:
                    self._waiting.cancel()
                return await self._application.handle(request)
        except Exception:
            log.exception("http.handler_failed", method=request.method, target=request.target[:200])
            return self._application.refuse(500, "the agent failed at this request; its log says why")
        return None

    async def _send(self, response: Response, *, closing: bool) -> bool:
        """Send a response; return whether all of it went out."""
        try:
            if self._resets:
                # Before the first byte: the kernel does it too where this process is killed.
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            head = self._head(response, closing=closing)
            body = response.body if self._wants_body else b""
            if isinstance(body, bytes):
                await self._send_all(head + body)
                self._note_sent(len(body))
            else:
                await self._send_all(head, socket.MSG_MORE)
                await self._send_parts(body.parts if isinstance(body, PartsBody) else (body,))
        except (ConnectionError, TimeoutError, _ClientGone) as error:
            log.debug("http.client_left", kind=response.kind, sent_bytes=self._sent_bytes, error=str(error))
            return False
        except P2PDistError as error:
            log.warning("http.body_cut", kind=response.kind, sent_bytes=self._sent_bytes, error=str(error))
            return False
        except Exception:
            log.exception("http.body_failed", kind=response.kind, sent_bytes=self._sent_bytes)
            return False
        if self._resets:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CLOSE)
        return True

    def _head(self, response: Response, *, closing: bool) -> bytes:
        """Return the head of a response. Raises ValueError where a header would break out of its line."""
        lines = [f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in response.headers]
        lines.append(_date_line(int(time.time())))
        if response.status not in (204, 304):
            lines.append(f"Content-Length: {response.content_length_bytes}")
        if closing or self._places.stopping:
            lines.append("Connection: close")
        head = "\r\n".join(lines)
        if head.count("\n") != len(lines) - 1 or head.count("\r") != len(lines) - 1 or "\0" in head:
            raise ValueError(f"a header of more than a line: {response.headers}")
        return f"{head}\r\n\r\n".encode("ascii")

    # Bytes

    async def _send_all(self, data: bytes, flags: int = 0) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[self._socket.send(left, flags) :]
            except BlockingIOError:
                await self._writable()

    async def _writable(self) -> None:
        """Wait until the client takes bytes. Raises _ClientGone where it takes none for too long."""
        now = trio.current_time()
        if now - self._lap_at >= self._limits.slow_s:
            self._slow = self._sent_bytes - self._lap_bytes < self._limits.slow_bytes
            self._lap_at, self._lap_bytes = now, self._sent_bytes
        self._blocked_at = now
        with trio.move_on_after(self._limits.write_stall_s):
            await trio.lowlevel.wait_writable(self._socket)
            self._blocked_at = None
            return
        raise _ClientGone("it takes no bytes")

    def lags(self, now: float) -> bool:
        """Whether the client has long taken so little of what is there for it that its place is better given away."""
        return self._blocked_at is not None and (self._slow or now - self._blocked_at >= self._limits.slow_s)

    def _note_sent(self, sent_bytes: int) -> None:
        self._sent_bytes += sent_bytes
        if self._first_byte_at is None:
            self._first_byte_at = trio.current_time()

    async def _send_parts(self, parts: tuple[bytes | FileBody, ...]) -> None:
        for part in parts:
            if isinstance(part, bytes):
                await self._send_all(part)
                self._note_sent(len(part))
            else:
                await self._send_file(part)

    async def _send_file(self, body: FileBody) -> None:
        at, ready = body.start, body.ready
        while at < body.stop:
            if ready <= at:
                ready = await self._available(body, at)
            await self._send_span(body.source.fileno(), at, ready)
            at = ready

    async def _available(self, body: FileBody, at: int) -> int:
        """Wait for the byte at `at`; return where those that are there end. Raises _ClientGone."""
        with trio.CancelScope() as self._waiting:
            if self._gone:
                self._waiting.cancel()
            return await body.source.available(at, body.stop)
        raise _ClientGone("it hung up")

    async def _send_span(self, file: int, start: int, stop: int) -> None:
        """Send [start, stop) of a file, all of which is there.

        What is not in the page cache is read by a thread first: `sendfile` would make everyone wait for the disk.
        """
        # What it waited for until now is not the client's delay.
        self._lap_at, self._lap_bytes, self._slow = trio.current_time(), self._sent_bytes, False
        long = stop - start > _SENDFILE_BYTES
        if long:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LONG_SEND_BUFFER_BYTES)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        while start < stop:
            end = min(stop, start + _SENDFILE_BYTES)
            if _waits_for_disk(file, end - 1):
                await trio.to_thread.run_sync(_load, file, start, end)
            start += self._sendfile_nowait(file, start, end)
            if start < stop:
                await self._writable()
        if long:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)

    def _sendfile_nowait(self, file: int, start: int, stop: int) -> int:
        """Send what the socket takes of [start, stop); return how many bytes that was."""
        try:
            sent = os.sendfile(self._socket.fileno(), file, start, stop - start)
        except BlockingIOError:
            return 0
        if not sent:
            raise EOFError(f"the file ends at {start}, before {stop}")
        self._note_sent(sent)
        return sent

    async def _linger(self) -> None:
        """End our side and wait a little for the client's: closing over unread input would reset what it reads."""
        self._socket.shutdown(socket.SHUT_WR)
        left_bytes = _LINGER_BYTES
        with trio.move_on_after(_LINGER_S):
            while left_bytes > 0:
                await trio.lowlevel.wait_readable(self._socket)
                with suppress(BlockingIOError):
                    data = self._socket.recv(_RECEIVE_BYTES)
                    if not data:
                        return
                    left_bytes -= len(data)


@lru_cache(maxsize=1)
def _date_line(now_s: int) -> str:
    return f"Date: {formatdate(now_s, usegmt=True)}"


def _waits_for_disk(file: int, position: int) -> bool:
    """Return whether the byte at `position` is not in the page cache; False where the file system cannot tell."""
    try:
        os.preadv(file, [bytearray(1)], position, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _load(file: int, start: int, stop: int) -> None:
    """Bring [start, stop) of a file into the page cache. Blocking; `sendfile` reports what fails here."""
    buffer = bytearray(_LOAD_BYTES)
    with suppress(OSError):
        for position in range(start, stop, _LOAD_BYTES):
            os.preadv(file, [buffer], position)


def _header_bytes(event: h11.Request) -> int:
    """Return the size of a request's header as it would be written plainly."""
    first = len(event.method) + len(event.target) + len(" ") * 2 + len("HTTP/1.1\r\n")
    return first + sum(len(name) + len(value) + len(": \r\n") for name, value in event.headers)
