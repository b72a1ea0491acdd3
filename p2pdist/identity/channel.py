# SPDX-License-Identifier: Apache-2.0
"""TLS on a non-blocking socket, for the hot path: whole records through memory, one system call for many.

Measured (docs/performance.md): encryption itself costs 0.2 CPU-s/GiB a side; the rest is copies, calls and wake-ups.
Hence: the kernel is asked for as much as there is, only whole records are handed to OpenSSL (so that it is known how
much of the next is here: SO_RCVLOWAT needs that), and what is sent is encrypted SLICE_BYTES at a time.

Invariants: after `receive_into` nothing that could be read is left inside; what is encrypted is sent in that order. A
connection that ends without TLS's farewell is an end all the same: frames say their length, so nothing is cut unseen.
"""

from __future__ import annotations

import os
import socket
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import trio

from p2pdist.errors import IdentityRefused, PeerUnavailable, RemoteProtocolError, TransferTimeout
from p2pdist.identity.credentials import not_tls, refusal

if TYPE_CHECKING:
    from p2pdist.core.identity import Role
    from p2pdist.core.types import PeerId
    from p2pdist.identity.credentials import Holder, Identity

MAX_RECORD_BYTES = 5 + 16384 + 256
"""RFC 8446, 5.2."""
CIPHER_BYTES = 256 * 1024 + MAX_RECORD_BYTES
SLICE_BYTES = 128 * 1024
STREAM_BYTES = 4 * MAX_RECORD_BYTES
WORN_BYTES = 64 << 30
"""Sent with one key: far below what AES-GCM is good for (2**24.5 records, RFC 8446, 5.5); Python renews none."""
MAX_UNASKED_BYTES = 64 * 1024
"""Answers to what the other side asks of TLS itself (new keys), which wait for it to read them."""

_RECORD_TYPES = range(20, 25)
_FAREWELL = bytes.fromhex("15030300020228")
"""An alert in the clear (handshake failure): a peer without TLS that knows it can say what is wrong."""

_cipher_buffer = memoryview(bytearray(CIPHER_BYTES))
_plain_buffer = memoryview(bytearray(SLICE_BYTES))


class TlsChannel:
    """One end of a TLS connection on a connected, non-blocking socket, which it owns."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> None:
        self.sock = sock
        self.holder: Holder | None = None
        """Who is at the other end; set by whoever has confirmed it."""
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._tail = b""
        """The beginning of a record whose rest has not come."""
        self._unsent = memoryview(b"")
        self._sent_bytes = 0

    @property
    def backlog(self) -> int:
        """Bytes of a record that is not whole yet: they were read from the socket, and give nothing so far."""
        return len(self._tail)

    @property
    def worn(self) -> bool:
        """Whether the connection should be made anew, in a quiet moment, for its key has served for long."""
        return self._sent_bytes > WORN_BYTES

    async def handshake(self) -> None:
        """Finish the handshake; the caller sets the deadline.

        Raises:
            IdentityRefused: the certificates do not do.
            OSError: the connection broke.
        """
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._send_outgoing()
            except ssl.SSLError as error:
                # An alert tells the other side why, if it still listens.
                self._try_send()
                raise refusal(error) from error
            try:
                await self._fill_for_handshake()
            except IdentityRefused:
                with suppress(OSError):
                    self.sock.send(_FAREWELL)
                raise
        await self._send_outgoing()

    async def _fill_for_handshake(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self.sock)
            try:
                if not self._take_in(2 * MAX_RECORD_BYTES):
                    raise ConnectionResetError("it hung up in the middle of the handshake")
            except BlockingIOError:
                continue
            return

    # ---------------------------------------------------------------- receiving

    async def wait_readable(self) -> None:
        """Wait until `receive_into` may give something; needed only until it has said BlockingIOError once."""
        if not self._incoming.pending:
            await trio.lowlevel.wait_readable(self.sock)

    def receive_into(self, buffer: memoryview) -> int:
        """Put what has come into `buffer`, of at least 3 * MAX_RECORD_BYTES.

        Returns:
            The bytes put there; 0: the other side has ended the connection.

        Raises:
            BlockingIOError: nothing to read yet.
            IdentityRefused: the other side says that it does not accept our certificate.
            OSError, RemoteProtocolError: the connection is broken.
        """
        if self._incoming.pending:
            # What came together with the end of the handshake.
            return self._decrypt(buffer)
        if not self._take_in(min(len(buffer), CIPHER_BYTES) - MAX_RECORD_BYTES):
            return 0
        return self._decrypt(buffer)

    def _take_in(self, limit: int) -> int:
        """Read from the socket and hand over the records that are whole; return the bytes read."""
        held = len(self._tail)
        _cipher_buffer[:held] = self._tail
        count = self.sock.recv_into(_cipher_buffer[held:limit])
        whole = _whole_records(_cipher_buffer, held + count)
        self._tail = bytes(_cipher_buffer[whole : held + count])
        self._incoming.write(_cipher_buffer[:whole])
        return count

    def _decrypt(self, buffer: memoryview) -> int:
        at = 0
        try:
            while self._incoming.pending:
                # With a buffer it returns a count; the stubs know only the form without.
                count = cast("int", self.tls.read(len(buffer) - at, buffer[at:]))
                if not count:
                    break
                at += count
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            return at
        except ssl.SSLError as error:
            raise refusal(error) from error
        if self._outgoing.pending > MAX_UNASKED_BYTES:
            raise RemoteProtocolError("it asks for new keys and does not read the answers")
        if not at:
            raise BlockingIOError
        return at

    # ------------------------------------------------------------------ sending

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send, after what is `unsent`; raises OSError."""
        view = memoryview(data)
        await self._send_outgoing()
        for start in range(0, len(view), SLICE_BYTES):
            self.tls.write(view[start : start + SLICE_BYTES])
            await self._send_outgoing()

    async def send_file(self, header: bytes, descriptor: int, start: int, stop: int) -> None:
        """Send the header and [start, stop) of a file, read and encrypted in turns. Raises OSError."""
        held = len(header)
        _plain_buffer[:held] = header
        while start < stop:
            count = os.preadv(descriptor, [_plain_buffer[held : held + stop - start]], start)
            if not count:
                raise OSError("the store's file ends too early")
            self.tls.write(_plain_buffer[: held + count])
            start, held = start + count, 0
            await self._send_outgoing()

    async def _send_outgoing(self) -> None:
        while not self._try_send():
            await trio.lowlevel.wait_writable(self.sock)

    def _try_send(self) -> bool:
        """Send what the socket takes of what is encrypted; return whether all of it has gone."""
        try:
            while self._unsent or self._outgoing.pending:
                self._unsent = self._unsent or memoryview(self._outgoing.read())
                sent = self.sock.send(self._unsent)
                self._sent_bytes += sent
                self._unsent = self._unsent[sent:]
        except BlockingIOError:
            return False
        return True

    def send_some(self, data: bytes | bytearray) -> int:
        """Send without waiting; return how much of `data` is on its way, which may be 0. Raises OSError."""
        if not self._try_send():
            return 0
        with memoryview(data) as view, view[:SLICE_BYTES] as first:
            count = len(first)
            if count:
                self.tls.write(first)
        self._try_send()
        return count

    @property
    def unsent(self) -> bool:
        """Whether something is encrypted and waits for the socket: `send_all(b"")` sees to it."""
        return bool(self._unsent)


def _whole_records(data: memoryview, stop: int) -> int:
    """Return where the last record that is whole ends. Raises IdentityRefused where it is no TLS."""
    at = 0
    while at + 5 <= stop:
        length = (data[at + 3] << 8) + data[at + 4]
        if data[at] not in _RECORD_TYPES or data[at + 1] != 3 or length > MAX_RECORD_BYTES:
            raise not_tls()
        if at + 5 + length > stop:
            break
        at += 5 + length
    return at


async def secure(
    sock: socket.socket,
    identity: Identity,
    *,
    server_side: bool,
    role: Role,
    deadline_s: float,
    expected: PeerId | None = None,
) -> TlsChannel:
    """Return the connection with TLS on it, its other end confirmed; where that fails the socket is the caller's.

    Raises:
        IdentityRefused: the other side is not let in, or does not let us in.
        PeerUnavailable: it hung up.
        TransferTimeout: it did not finish within the deadline.
    """
    credential = identity.credential
    channel = TlsChannel(sock, credential.server if server_side else credential.client, server_side=server_side)
    try:
        with trio.fail_after(deadline_s):
            await channel.handshake()
    except trio.TooSlowError as error:
        raise TransferTimeout(f"the TLS handshake took longer than {deadline_s:.0f} s") from error
    except OSError as error:
        raise PeerUnavailable(f"the other side broke off: {error}") from error
    channel.holder = identity.confirm(channel.tls, role, expected=expected)
    return channel


def detached(stream: trio.SocketStream) -> socket.socket:
    """Return the plain, non-blocking socket of a trio stream, which is of no more use."""
    sock = socket.socket(fileno=stream.socket.detach())
    sock.setblocking(False)
    return sock


class TlsStream(trio.abc.Stream):
    """A channel with the methods of a trio stream; for control connections. OSError where a stream is broken."""

    def __init__(self, channel: TlsChannel) -> None:
        self.channel = channel
        self.socket = channel.sock
        self._buffer = memoryview(bytearray(STREAM_BYTES))

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self.socket.setsockopt(level, option, value)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return what has come, b"" at the end; at most STREAM_BYTES, whatever `max_bytes` is."""
        while True:
            await self.channel.wait_readable()
            try:
                return bytes(self._buffer[: self.channel.receive_into(self._buffer)])
            except BlockingIOError:
                continue

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.channel.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.wait_writable(self.socket)

    async def aclose(self) -> None:
        if self.socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self.socket)
            self.socket.close()
        await trio.lowlevel.checkpoint()


async def secured(
    stream: trio.SocketStream, identity: Identity, *, server_side: bool, role: Role, deadline_s: float
) -> TlsStream:
    """Return a trio stream with TLS on it, its other end confirmed; else it is closed. Raises as `secure`."""
    sock = detached(stream)
    try:
        return TlsStream(await secure(sock, identity, server_side=server_side, role=role, deadline_s=deadline_s))
    except BaseException:
        sock.close()
        raise
