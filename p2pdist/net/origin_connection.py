# SPDX-License-Identifier: Apache-2.0
"""One HTTP/1.1 connection of the origin client: h11 writes requests and reads heads; a body of known length goes from
the socket straight to where it belongs.

Owns: dialling, TLS, deadlines of single reads and writes, and where a body ends. Refuses to pool, to follow
redirects, or to read ahead: one request at a time. Invariants: a guarded dial connects only to addresses that it has
itself found public, so a name cannot be re-pointed inside between check and dial (DNS rebinding); no error text
holds a path, a query or a header; closing never blocks.

A wakeup costs more than the bytes it moves (docs/performance.md): in the middle of a body the reader sleeps until
WAKE_BYTES are there (SO_RCVLOWAT), and takes what there is when that lasts too long.
"""

from __future__ import annotations

import os
import socket
import ssl
from typing import TYPE_CHECKING

import h11
import trio

from p2pdist.core.addresses import is_ip_literal, is_public_address
from p2pdist.errors import NotFoundAtOrigin, OriginError

if TYPE_CHECKING:
    import httpx

    Headers = list[tuple[bytes, bytes]]

READ_BYTES = 1024 * 1024
"""What one read may return: the cost of a read is per call."""
WAKE_BYTES = 64 * 1024
_HEAD_BYTES = 16 * 1024
"""One read of a head: what of the body comes with it is copied once more."""
_HEAD_BYTES_MAX = 64 * 1024
_ADDRESSES_MAX = 4


class Unreachable(OriginError):
    """The connection could not be made or broke; another try may do better."""


class _Plain:
    """A connected socket without TLS, which it owns."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._sock = socket.socket(fileno=stream.socket.detach())
        self._sock.setblocking(False)
        self._lowat = 1

    async def receive_into(self, buffer: memoryview, least_bytes: int, stall_s: float) -> int:
        """Wait for so many bytes, or any when that lasts too long; return how many came, 0 at the end.

        Raises:
            TimeoutError: nothing came in `stall_s`.
            OSError: the connection broke.
        """
        if least_bytes != self._lowat:
            self._lowat = least_bytes
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least_bytes)
        deadline = trio.current_time() + stall_s
        while True:
            with trio.move_on_at(deadline) as scope:
                await trio.lowlevel.wait_readable(self._sock)
            try:
                return self._sock.recv_into(buffer)
            except BlockingIOError:
                if scope.cancelled_caught:
                    raise TimeoutError from None

    async def send(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[self._sock.send(left) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock)

    @property
    def spoiled(self) -> bool:
        """Whether an idle connection has ended, or said what nobody asked for."""
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()


class _Secured:
    """A connection with TLS; closed without farewell, so that closing cannot hang."""

    def __init__(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        self._stream = stream

    async def receive_into(self, buffer: memoryview, _least_bytes: int, stall_s: float) -> int:
        """As of a plain one, but any bytes do."""
        with trio.move_on_after(stall_s):
            data = await self._stream.receive_some(len(buffer))
            buffer[: len(data)] = data
            return len(data)
        raise TimeoutError

    async def send(self, data: bytes) -> None:
        await self._stream.send_all(data)

    @property
    def spoiled(self) -> bool:
        return self._stream.transport_stream.socket.is_readable()

    def close(self) -> None:
        self._stream.transport_stream.socket.close()


class Connection:
    """An open connection to a server: `ask`, then `read_into` until it returns 0, again and again while `reusable`.

    Args:
        stall_s: how long one read or write may take.
    """

    def __init__(self, stream: _Plain | _Secured, server: str, stall_s: float) -> None:
        self._stream = stream
        self._server = server
        self._stall_s = stall_s
        self._buffer = memoryview(bytearray(_HEAD_BYTES))
        self._parser = h11.Connection(h11.CLIENT)
        self._ahead = memoryview(b"")
        """Of the body, come with its head or out of the parser."""
        self._left: int | None = 0
        """Bytes of the body to come, with those ahead; None where only the parser can tell."""
        self._keeps = True

    async def ask(self, method: str, target: bytes, headers: Headers, content: bytes) -> h11.Response:
        """Return the head of the answer.

        Raises:
            Unreachable: the connection failed.
            OriginError: the request cannot be sent on any.
        """
        self._parser = parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_BYTES_MAX)
        self._left, self._keeps, self._ahead = None, False, memoryview(b"")
        try:
            request = parser.send(h11.Request(method=method, target=target, headers=headers)) or b""
            request += (parser.send(h11.Data(data=content)) or b"") if content else b""
            request += parser.send(h11.EndOfMessage()) or b""
        except h11.LocalProtocolError:
            raise OriginError(f"the request to {self._server} cannot be sent") from None
        await self._send(request)
        head = await self._next_event()
        while isinstance(head, h11.InformationalResponse):
            head = await self._next_event()
        if not isinstance(head, h11.Response):
            raise self._broken()
        self._frame(method, head)
        return head

    def _frame(self, method: str, head: h11.Response) -> None:
        """Note where the body will end."""
        said = {name: value.lower() for name, value in head.headers}
        self._keeps = head.http_version == b"1.1" and b"close" not in said.get(b"connection", b"")
        if method == "HEAD" or head.status_code in (204, 304):
            self._left = 0
        elif b"transfer-encoding" not in said and b"content-length" in said:
            self._left = int(said[b"content-length"])
        if self._left is not None:
            come = self._parser.trailing_data[0]
            self._keeps = self._keeps and len(come) <= self._left
            self._ahead = memoryview(come)[: self._left]

    @property
    def reusable(self) -> bool:
        """Whether the answer has been read to its end and another request may follow."""
        return self._keeps and self._left == 0 and not self._stream.spoiled

    async def read_into(self, buffer: memoryview) -> int:
        """Put the next bytes of the body into `buffer`; return how many, 0 at the body's end.

        Raises:
            Unreachable: it broke off.
        """
        if self._left is None:
            await self._parse_on()
        count = min(len(buffer), len(self._ahead))
        if count:
            buffer[:count] = self._ahead[:count]
            self._ahead = self._ahead[count:]
        elif self._left:
            room = buffer[: min(self._left, READ_BYTES)]
            count = await self._receive_into(room, min(len(room), WAKE_BYTES))
            if not count:
                raise self._broken()
        if self._left is not None:
            self._left -= count
        return count

    async def _parse_on(self) -> None:
        """Have the parser find the next bytes of the body, or its end."""
        while not self._ahead:
            event = await self._next_event()
            if isinstance(event, h11.Data):
                self._ahead = memoryview(bytes(event.data))
            else:
                self._left = 0
                self._keeps = self._keeps and self._parser.their_state is h11.DONE
                return

    async def _next_event(self) -> h11.Event:
        while True:
            try:
                event = self._parser.next_event()
            except h11.RemoteProtocolError:
                raise self._broken() from None
            if event is h11.PAUSED:
                raise self._broken()
            if event is not h11.NEED_DATA:
                assert isinstance(event, h11.Event)
                return event
            count = await self._receive_into(self._buffer, 1)
            self._parser.receive_data(bytes(self._buffer[:count]))

    async def _receive_into(self, buffer: memoryview, least_bytes: int) -> int:
        try:
            return await self._stream.receive_into(buffer, least_bytes, self._stall_s)
        except TimeoutError:
            raise self._silent() from None
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            raise self._broken() from None

    async def _send(self, data: bytes) -> None:
        try:
            with trio.fail_after(self._stall_s):
                await self._stream.send(data)
        except trio.TooSlowError:
            raise self._silent() from None
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            raise self._broken() from None

    def _silent(self) -> Unreachable:
        return Unreachable(f"{self._server} stopped answering")

    def _broken(self) -> Unreachable:
        return Unreachable(f"{self._server} broke off or spoke no HTTP")

    def close(self) -> None:
        """Close at once; a read or write that is running fails."""
        self._stream.close()


async def open_connection(
    url: httpx.URL, context: ssl.SSLContext, *, guarded: bool, connect_s: float, stall_s: float
) -> Connection:
    """Return a new connection to a URL's server.

    Args:
        guarded: connect only to public addresses and by names.
        connect_s: how long the dial, and then the TLS handshake, may take.

    Raises:
        Unreachable: it could not be made.
        OriginError: it must not be made, or cannot be on another try either.
    """
    server, host = url.netloc.decode("ascii"), url.raw_host.decode("ascii")
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        with trio.fail_after(connect_s):
            stream = await _dial_public(host, port) if guarded else await trio.open_tcp_stream(host, port)
        if url.scheme != "https":
            return Connection(_Plain(stream), server, stall_s)
        with trio.fail_after(connect_s):
            return Connection(_Secured(await _shake_hands(stream, context, host)), server, stall_s)
    except trio.TooSlowError:
        raise Unreachable(f"no connection to {server} in time") from None
    except OSError as error:
        raise Unreachable(f"cannot connect to {server}: {_reason(error)}") from None


async def _dial_public(host: str, port: int) -> trio.SocketStream:
    """Connect to one of the first few of the host's addresses, provided that all of them are public."""
    if is_ip_literal(host):
        raise NotFoundAtOrigin(f"{host} is an address; only public names are allowed here", status_code=404)
    found = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(is_public_address(address) for address in addresses):
        raise NotFoundAtOrigin(f"{host} is not on the public internet; add it with --registry", status_code=404)
    failure = OSError("no address answered")
    for address in addresses[:_ADDRESSES_MAX]:
        try:
            return await trio.open_tcp_stream(address, port)
        except OSError as error:
            failure = error
    raise failure


async def _shake_hands(
    plain: trio.SocketStream, context: ssl.SSLContext, host: str
) -> trio.SSLStream[trio.SocketStream]:
    """Return the connection with TLS on it, or close it, also when cancelled."""
    stream = trio.SSLStream(plain, context, server_hostname=host, https_compatible=True)
    try:
        await stream.do_handshake()
    except BaseException as error:
        await trio.aclose_forcefully(stream)
        if isinstance(error, trio.BrokenResourceError):
            raise _handshake_error(error.__cause__, host) from None
        raise
    return stream


def _handshake_error(cause: BaseException | None, host: str) -> Exception:
    """A certificate that is not believed will not be on the next try either."""
    if isinstance(cause, ssl.SSLCertVerificationError):
        return OriginError(f"the certificate of {host} is not trusted: {cause.verify_message}; give its CA as ca_file")
    return OSError("no TLS there" if isinstance(cause, ssl.SSLError) else "broke off during TLS")


def _reason(error: OSError) -> str:
    """Return why a dial failed, without the address; trio gathers the failures of several in the cause."""
    if isinstance(error.__cause__, ExceptionGroup) and isinstance(error.__cause__.exceptions[0], OSError):
        error = error.__cause__.exceptions[0]
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or (str(error.args[0]) if error.args else "no address answered")
