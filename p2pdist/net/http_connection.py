# SPDX-License-Identifier: Apache-2.0
"""One HTTP/1.1 connection on a raw socket: h11 reads, `sendfile` writes.

Owns: parsing requests, refusing malformed ones, writing responses, and closing each response whatever happens.
Refuses request bodies and TLS.

Invariants:
- a body that cannot be finished ends in a reset, never in a clean close: the client must see that it is incomplete;
- each wait has a deadline, except the application's for its own content, which ends when the client hangs up;
- requests are answered in order, one at a time; what was sent ahead is kept, at most two headers' worth.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Protocol

import h11
import structlog
import trio

from p2pdist.errors import P2PDistError
from p2pdist.net.http_messages import CLIENT_LEFT, Exchange, FileBody, Request, Response

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from p2pdist.net.http_messages import Application, Limits

log = structlog.get_logger(__name__)

_SENDFILE_BYTES = 4 << 20
"""Per system call: a reader that keeps up holds the loop for about a millisecond."""

_SEND_BUFFER_BYTES = 512 * 1024
"""Measured on loopback: 64 KiB 1.3 GB/s, 256 KiB 3.4, 512 KiB 3.6, 1 MiB and above 2 (out of a core's cache)."""

_LOAD_BYTES = 256 * 1024

_RECEIVE_BYTES = 16 * 1024
_LINGER_BYTES = 1 << 20
_LINGER_S = 1.0
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Places(Protocol):
    """What a connection needs of its server."""

    @property
    def stopping(self) -> bool:
        """Whether each answer is to be the connection's last."""

    def fresh(self, wait_s: float) -> AbstractContextManager[None]:
        """Bound the wait for the first request."""

    def idle(self, wait_s: float) -> AbstractContextManager[None]:
        """Bound the wait for another request."""


class _ClientGone(Exception):
    """The client hung up, or takes nothing more."""


class _Placeholder:
    """Stands for the bytes of a file in h11's books (see `Connection.send_with_data_passthrough`)."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length


class Connection:
    """One client. `close` resets the connection unless all that was promised was sent."""

    def __init__(
        self, client: trio.socket.SocketType, application: Application, limits: Limits, places: Places
    ) -> None:
        self._socket = client
        self._application = application
        self._limits = limits
        self._places = places
        self._input = bytearray()
        self._gone = False
        self._wants_body = True
        self._owes = False
        self._waiting: trio.CancelScope | None = None
        self._first_byte_at: float | None = None
        self._sent_bytes = 0

    def close(self) -> None:
        if self._owes:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._socket.close()

    async def run(self) -> None:
        """Answer requests until either side has had enough."""
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        waiting = self._places.fresh(self._limits.header_s)
        while await self._requested(waiting):
            parser = h11.Connection(h11.SERVER, max_incomplete_event_size=self._limits.header_bytes)
            request = await self._read_request(parser)
            if request is None or not await self._exchange(parser, request):
                return
            if parser.our_state is not h11.DONE:
                await self._linger()
                return
            waiting = self._places.idle(self._limits.idle_s)

    async def _requested(self, waiting: AbstractContextManager[None]) -> bool:
        """Wait for the first byte of a request; False where none comes."""
        with waiting:
            return bool(self._input) or await self._receive()
        return False

    async def _receive(self) -> bool:
        """Read what there is; False at the end."""
        data = await self._socket.recv(_RECEIVE_BYTES)
        self._input += data
        self._gone = not data
        return not self._gone

    # Requests

    async def _read_request(self, parser: h11.Connection) -> Request | Response | None:
        """Return the next request, the answer to one that is refused unread, or None where the client left."""
        with trio.move_on_after(self._limits.header_s):
            while True:
                parser.receive_data(bytes(self._input))
                self._input.clear()
                try:
                    event = parser.next_event()
                except h11.RemoteProtocolError as error:
                    return self._application.refuse(error.error_status_hint, f"not an HTTP request: {error}")
                if isinstance(event, h11.Request):
                    self._wants_body = event.method != b"HEAD"
                    return self._checked(event, parser)
                if not await self._receive():
                    return None
        return self._application.refuse(408, f"no complete request within {self._limits.header_s:g} s")

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

    async def _exchange(self, parser: h11.Connection, request: Request | Response) -> bool:
        """Answer a request, or send its refusal; return whether the client has all of it."""
        self._first_byte_at, self._sent_bytes = None, 0
        started_at = trio.current_time()
        complete, response = False, None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            try:
                response = request if isinstance(request, Response) else await self._handle(request)
                if response is not None:
                    complete = await self._send(parser, response, refused=response is request)
            finally:
                if response is not None:
                    response.close()
                self._report(response, complete, started_at)
                nursery.cancel_scope.cancel()
        return complete

    def _report(self, response: Response | None, complete: bool, started_at: float) -> None:
        first_byte_at = trio.current_time() if self._first_byte_at is None else self._first_byte_at
        kind, status = (response.kind, response.status) if response is not None else ("other", CLIENT_LEFT)
        self._application.finished(Exchange(kind, status, first_byte_at - started_at, self._sent_bytes, complete))

    async def _watch(self) -> None:
        """Notice that the client hangs up; what it sends ahead is kept for the next request."""
        while len(self._input) < _RECEIVE_BYTES:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                data = os.read(self._socket.fileno(), _RECEIVE_BYTES)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            self._input += data
            if not data:
                self._gone = True
                if self._waiting is not None:
                    self._waiting.cancel()
                return

    @contextmanager
    def _while_client_is_there(self) -> Iterator[None]:
        """Cancel a wait for the application when the client hangs up; then raises _ClientGone."""
        with trio.CancelScope() as self._waiting:
            if self._gone:
                self._waiting.cancel()
            yield
        if self._waiting.cancelled_caught:
            raise _ClientGone

    async def _handle(self, request: Request) -> Response | None:
        try:
            with self._while_client_is_there():
                return await self._application.handle(request)
        except _ClientGone:
            return None
        except Exception:
            log.exception("http.handler_failed", method=request.method, target=request.target[:200])
            return self._application.refuse(500, "the agent failed at this request; its log says why")

    async def _send(self, parser: h11.Connection, response: Response, *, refused: bool) -> bool:
        """Send a response; return whether all of it went out."""
        self._owes = True
        try:
            head = parser.send(self._head(response, closing=refused or parser.their_state is not h11.DONE))
            body = response.body if self._wants_body else b""
            if isinstance(body, FileBody):
                await self._send_all(head)
                await self._send_file(body)
                sent = _Placeholder(body.stop - body.start)
                parser.send_with_data_passthrough(h11.Data(data=sent))  # type: ignore[arg-type]
            else:
                await self._send_all(head + parser.send(h11.Data(data=body)))
                self._note_sent(len(body))
            parser.send(h11.EndOfMessage())
        except (ConnectionError, TimeoutError, _ClientGone) as error:
            log.debug("http.client_left", kind=response.kind, sent_bytes=self._sent_bytes, error=str(error))
            return False
        except P2PDistError as error:
            log.warning("http.body_cut", kind=response.kind, sent_bytes=self._sent_bytes, error=str(error))
            return False
        except Exception:
            log.exception("http.body_failed", kind=response.kind, sent_bytes=self._sent_bytes)
            return False
        self._owes = False
        return True

    def _head(self, response: Response, *, closing: bool) -> h11.Response:
        headers = [*response.headers, ("Date", formatdate(usegmt=True))]
        if response.status not in (204, 304):
            headers.append(("Content-Length", str(response.content_length_bytes)))
        if closing or self._places.stopping:
            headers.append(("Connection", "close"))
        return h11.Response(
            status_code=response.status, headers=headers, reason=HTTPStatus(response.status).phrase.encode()
        )

    # Bytes

    async def _send_all(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            with trio.move_on_after(self._limits.write_stall_s) as stall:
                left = left[await self._socket.send(left) :]
            if stall.cancelled_caught:
                raise _ClientGone("it takes no bytes")

    def _note_sent(self, sent_bytes: int) -> None:
        self._sent_bytes += sent_bytes
        if self._first_byte_at is None:
            self._first_byte_at = trio.current_time()

    async def _send_file(self, body: FileBody) -> None:
        at = body.start
        while at < body.stop:
            with self._while_client_is_there():
                ready = await body.source.available(at, body.stop)
            await self._send_span(body.source.fileno(), at, ready)
            at = ready

    async def _send_span(self, file: int, start: int, stop: int) -> None:
        """Send [start, stop) of a file, all of which is there.

        What is not in the page cache is read by a thread first: `sendfile` would make everyone wait for the disk.
        """
        with trio.CancelScope() as stall:
            while start < stop:
                end = min(stop, start + _SENDFILE_BYTES)
                if _waits_for_disk(file, end - 1):
                    await trio.to_thread.run_sync(_load, file, start, end)
                start += self._sendfile_nowait(file, start, end)
                stall.deadline = trio.current_time() + self._limits.write_stall_s
                if start < end:
                    await trio.lowlevel.wait_writable(self._socket)
                else:
                    await trio.lowlevel.checkpoint()
        if stall.cancelled_caught:
            raise _ClientGone("it takes no bytes")

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
        with trio.move_on_after(_LINGER_S):
            for _ in range(_LINGER_BYTES // _RECEIVE_BYTES):
                if not await self._socket.recv(_RECEIVE_BYTES):
                    return


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
