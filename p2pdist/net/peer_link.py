# SPDX-License-Identifier: Apache-2.0
"""One connection to one peer: wire frames over a socket, both directions at once.

Owns the connection, in the clear (ClearChannel) or encrypted (identity/channel.py), and its two tasks, a reader and a
writer. It decides nothing: messages and whole
chunks go to a LinkHandler, and what to send is told to it. Chunks are sent by sendfile from the
store's descriptor, one at a time, with messages let in between the frames.

Measured costs shape it (docs/performance.md): a wakeup costs more than the bytes it moves, so the
reader waits for a whole frame of a chunk (SO_RCVLOWAT), frames are longer where the link is fast, one
receive buffer serves all links (what arrives is used before the next wait), what is not encrypted is received where
it belongs, messages are sent by whoever says them where nothing is in their way, and no timer is set per
frame: the kernel ends a connection whose peer is dead or takes nothing (TCP_USER_TIMEOUT, keep-alive).
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import termios
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import trio

from p2pdist.core.identity import another_name
from p2pdist.core.runs import Rate
from p2pdist.core.uplink import Sent
from p2pdist.core.verify import checksum_of
from p2pdist.core.wire import SPAN_BYTES, VERSION, ChunkSpan, Decoder, Hello, Message, Refuse, encode, span_header
from p2pdist.errors import (
    FloodError,
    IdentityRefused,
    P2PDistError,
    PeerUnavailable,
    RemoteProtocolError,
    TransferTimeout,
)
from p2pdist.identity.channel import MAX_RECORD_BYTES, TlsChannel

if TYPE_CHECKING:
    from collections.abc import Callable

    from p2pdist.core.rate import TokenBucket
    from p2pdist.core.types import Checksum, PeerId

HELLO_S = 5.0
"""For the connection and its first message."""
DEAD_S = 6
"""Bytes that are unacknowledged for so long end the connection, as long as a lease lasts: with 20 s, what only those
beyond a partition had counted as held, and nobody fetched it (W6-partition: the others were 13.7 s late)."""
IDLE_S = 10
"""A connection that carried nothing for so long is asked by keep-alives whether it still is one, every 3 s."""
UNSENT_BYTES = 64 * 1024
"""TCP_NOTSENT_LOWAT: how much may wait in the kernel. With default buffers a grant took 130 ms to be answered."""
RECEIVE_BYTES = 256 * 1024
"""Received at once at most, and SO_RCVLOWAT in the middle of a frame: less than 64 KiB only at its end."""
FRAME_S = 0.002
"""A frame is what the link carries in this time, from SPAN_BYTES to MAX_FRAME_BYTES: a message waits for one."""
MAX_FRAME_BYTES = 512 * 1024
LIMITED_FRAME_S, LEAST_FRAME_BYTES = 0.1, 16 * 1024
"""With a limit it is what that lets pass in this time, from LEAST_FRAME_BYTES to SPAN_BYTES: it leaves at once, and
what comes behind it waits."""
WINDOW_S, WINDOW_LOOK_S = 3.0, 0.005
"""How long to wait until what was sent is acknowledged, and how often to look: 24 KiB in that time are 40 Mbit/s."""
WAKE_BYTES = 16 * 1024
"""Of less than this nothing is waited for: the reader wakes for each byte."""
MAX_QUEUED_BYTES = 8 * 1024 * 1024
"""Messages that wait for a peer that reads nothing, before it loses the connection: some of the largest."""
MAX_INCOMING = 64
"""Chunks that a peer was asked for and has not finished: ten times what is taken at once."""
FLOOD_BYTES = 24 * 1024 * 1024
"""Of messages, each counted as MESSAGE_BYTES at least, at once: a node's share in thousands of blobs, or some of the
largest messages, ..."""
FLOOD_BYTES_PER_S = 2 * 1024 * 1024
"""... and so many a second from then on: 4,096 small ones. Six per chunk is what the honest send."""
_GREETING_BYTES = 4 * MAX_RECORD_BYTES
_TCP_NOTSENT_LOWAT = 25
_ON = 1
_U32, _U64 = struct.Struct("=I"), struct.Struct("=Q")
_INFO_BYTES = 152
_INFO = ((_U32, 16), (_U32, 24), (_U32, 68), (_U64, 120), (_U32, 148))
"""In linux/tcp.h, struct tcp_info: snd_mss, unacked, rtt, bytes_acked, min_rtt."""

_receive_buffer = memoryview(bytearray(RECEIVE_BYTES + 2 * MAX_RECORD_BYTES))


class LinkHandler(Protocol):
    """Who is told what arrives. All calls are synchronous; RemoteProtocolError ends the link."""

    def message_arrived(self, peer: PeerId, message: Message) -> None: ...

    def chunk_arrived(self, peer: PeerId, number: int, data: memoryview, checksum: Checksum) -> None: ...

    def chunk_sent(self, peer: PeerId, number: int) -> None: ...

    @property
    def window_bytes(self) -> int:
        """What may be unacknowledged when the next frame of a chunk is sent; 0: no matter how much."""


@dataclass(slots=True)
class _Incoming:
    buffer: memoryview | None
    """None: it was called off; what of it is under way is read and dropped."""
    size: int
    filled: int = 0


@dataclass(slots=True)
class _Outgoing:
    number: int
    descriptor: int
    at: int
    stop: int
    size: int
    release: Callable[[], None]
    began: float | None = None
    cancelled: bool = False


def tune(sock: socket.socket) -> None:
    """Set what peer connections need: no Nagle, little unsent in the kernel, an end when the peer is dead."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, _ON)
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, _ON)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_S * 1000)


async def connect(host: str, port: int) -> socket.socket:
    """Return a tuned, non-blocking connection to a peer; the caller owns it.

    Raises:
        PeerUnavailable: refused, unreachable, or no answer within HELLO_S.
    """
    try:
        with trio.fail_after(HELLO_S):
            stream = await trio.open_tcp_stream(host, port)
    except (OSError, ValueError, trio.TooSlowError) as error:
        # ValueError: a text that cannot be a host name; others announce what they like.
        raise PeerUnavailable(f"peer {host}:{port} does not answer: {str(error) or 'time-out'}") from error
    return detach(stream)


def detach(stream: trio.SocketStream) -> socket.socket:
    """Return the plain socket of a trio stream, tuned; the stream is of no more use.

    Raises:
        PeerUnavailable: the connection is broken already.
    """
    sock = socket.socket(fileno=stream.socket.detach())
    try:
        tune(sock)
    except OSError as error:
        sock.close()
        raise PeerUnavailable(f"the peer broke off: {error}") from error
    return sock


class ClearChannel:
    """A connection without encryption: the kernel moves chunks from the store's file to the socket."""

    backlog = 0
    holder = None
    worn = False
    unsent = False

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    async def wait_readable(self) -> None:
        await trio.lowlevel.wait_readable(self.sock)

    def receive_into(self, buffer: memoryview) -> int:
        """Return how many bytes came, 0 at the end. Raises BlockingIOError, OSError."""
        return self.sock.recv_into(buffer)

    def send_some(self, data: bytes | bytearray) -> int:
        """Send without waiting; return how much of `data` has gone, which may be nothing. Raises OSError."""
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0

    async def send_all(self, data: bytes, flags: int = 0) -> None:
        """Send; raises OSError."""
        view = memoryview(data)
        while view:
            try:
                view = view[self.sock.send(view, flags) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.sock)

    async def send_file(self, header: bytes, descriptor: int, start: int, stop: int) -> None:
        """Send the header and [start, stop) of a file. Raises OSError."""
        await self.send_all(header, socket.MSG_MORE)
        while start < stop:
            try:
                sent = os.sendfile(self.sock.fileno(), descriptor, start, stop - start)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.sock)
                continue
            if not sent:
                raise OSError("the store's file ends too early")
            start += sent


Channel = ClearChannel | TlsChannel


def address_of(sock: socket.socket) -> tuple[str, int]:
    """Return whom a socket is connected to; raises PeerUnavailable where it is broken."""
    try:
        host, port = sock.getpeername()[:2]
    except OSError as error:
        raise PeerUnavailable(f"the peer broke off: {error}") from error
    return host, port


async def greet(channel: Channel, own: Hello, decoder: Decoder) -> tuple[Hello, list[Message | ChunkSpan]]:
    """Exchange Hello messages; return the peer's, and what came right behind it.

    Raises:
        IdentityRefused: it is not who its certificate says, or does not let us in.
        PeerUnavailable: it hung up.
        TransferTimeout: it said nothing within HELLO_S.
        RemoteProtocolError: it speaks another protocol, another version, or belongs to another cluster.
    """
    # A buffer of its own: a chunk span behind the Hello points into it.
    buffer = memoryview(bytearray(_GREETING_BYTES))
    try:
        with trio.fail_after(HELLO_S):
            await channel.send_all(encode(own))
            items: list[Message | ChunkSpan] = []
            while not items:
                await channel.wait_readable()
                try:
                    count = channel.receive_into(buffer)
                except BlockingIOError:
                    continue
                if not count:
                    raise PeerUnavailable("the peer hung up before its hello")
                items = decoder.feed(buffer[:count])
    except trio.TooSlowError as error:
        raise TransferTimeout(f"the peer sent no hello within {HELLO_S:.0f} s") from error
    except OSError as error:
        raise PeerUnavailable(f"the peer broke off: {error}") from error
    hello = items[0]
    if not isinstance(hello, Hello):
        raise RemoteProtocolError(f"a {type(hello).__name__} where a hello should be")
    if hello.version != VERSION:
        raise RemoteProtocolError(f"the peer speaks protocol version {hello.version}, this agent {VERSION}")
    if hello.cluster != own.cluster:
        raise RemoteProtocolError(f"the peer belongs to cluster {hello.cluster!r}, this agent to {own.cluster!r}")
    if channel.holder is not None and hello.peer_id != channel.holder.name.peer_id:
        raise another_name(hello.peer_id, channel.holder.name)
    return hello, items[1:]


class PeerLink:
    """A greeted connection. `run` serves it until it ends; the other methods may be called meanwhile.

    Args:
        limit: what all links together may send of chunks; messages are not limited.

    Raises:
        PeerUnavailable: the peer has gone already.
    """

    def __init__(
        self,
        channel: Channel,
        hello: Hello,
        handler: LinkHandler,
        *,
        decoder: Decoder,
        early: list[Message | ChunkSpan],
        dialled: bool,
        source: str,
        limit: TokenBucket | None = None,
        credential: object = None,
    ) -> None:
        self.hello = hello
        self.peer_id = hello.peer_id
        self.dialled = dialled
        self.source = source
        self.since = trio.current_time()
        self.control_bytes = 0
        self.received_bytes = 0
        """Of chunks."""
        self.why = ""
        """Why the link ended, where we ended it."""
        self.channel = channel
        self.credential = credential
        """Our own certificate when the connection was made."""
        self._sock = channel.sock
        self._handler = handler
        self._decoder = decoder
        self._early = early
        self._allowed_bytes = float(FLOOD_BYTES)
        """Of messages in all, as counted last: again when they are used up."""
        self._allowed_at = self.since
        self._queue = bytearray()
        self._jobs: deque[_Outgoing] = deque()
        self._incoming: dict[int, _Incoming] = {}
        self._wake = trio.Event()
        self._sending = False
        """Whether the writer is in the middle of a frame."""
        self._lowat = 1
        self.limit = limit
        """May be replaced at any time."""
        self._due: float | None = None
        """When the next frame, which the limit has been charged for, may go."""
        self._rate = Rate()
        self._drained = False
        """The socket had room for a frame when the last chunk had gone."""
        self._scope = trio.CancelScope()
        self._error: P2PDistError | None = None
        self.host, port = address_of(self._sock)
        self.address = f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"

    def send(self, message: Message) -> None:
        """Send a message, behind at most one chunk frame."""
        self.queue(message)
        self.flush()

    def queue(self, message: Message) -> None:
        """Have a message ready to be sent by `flush`."""
        frame = encode(message)
        self.control_bytes += len(frame)
        if len(self._queue) + len(frame) > MAX_QUEUED_BYTES:
            self.close("it reads nothing")
            return
        self._queue += frame

    def flush(self) -> None:
        """Send what is queued, at once where the writer is between frames and the socket has room."""
        if self._sending or self._scope.cancel_called:
            return
        try:
            del self._queue[: self.channel.send_some(self._queue)]
        except OSError as error:
            self._break(error)
            self._scope.cancel()
        if self._queue or self.channel.unsent:
            self._wake.set()

    def send_chunk(self, number: int, descriptor: int, start: int, length: int, release: Callable[[], None]) -> None:
        """Queue a chunk, `length` bytes from `start` of the descriptor; `release` is called when it has been sent."""
        self._jobs.append(_Outgoing(number, descriptor, start, start + length, length, release))
        self._wake.set()

    def cancel_chunk(self, number: int) -> None:
        """Send no more frames of this chunk."""
        for job in self._jobs:
            if job.number == number:
                job.cancelled = True

    def expect(self, number: int, buffer: memoryview) -> None:
        """Receive the chunk of this grant into `buffer`, which is as long as the chunk."""
        if len(self._incoming) >= MAX_INCOMING:
            self.close("it does not send what it granted")
            return
        self._incoming[number] = _Incoming(buffer, len(buffer))

    def abandon(self, number: int) -> None:
        """Keep no buffer for a chunk that was called off."""
        if (incoming := self._incoming.get(number)) is not None:
            incoming.buffer = None

    def sent(self) -> Sent | None:
        """Return what the kernel knows of the bytes sent here; None where the connection is broken."""
        try:
            info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
            segment, unacked, rtt_us, acked, least_us = (field.unpack_from(info, at)[0] for field, at in _INFO)
        except (OSError, struct.error):
            return None
        return Sent(acked, unacked * segment, max(0, rtt_us - least_us) / 1e6)

    @property
    def idle(self) -> bool:
        """Whether no chunk is on its way, in either direction."""
        return not self._jobs and not self._incoming

    def close(self, why: str) -> None:
        """End the link from this side."""
        self.why = self.why or why
        self._scope.cancel()

    async def run(self) -> None:
        """Read and write until either side ends it; then the socket is closed and every chunk released.

        Raises:
            RemoteProtocolError: the peer broke the protocol.
            PeerUnavailable: the connection broke.
        """
        try:
            with self._scope:
                for item in self._early:
                    self._take_in(item)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write, nursery.cancel_scope)
                    await self._read()
                    nursery.cancel_scope.cancel()
        finally:
            self._sock.close()
            for job in self._jobs:
                job.release()
            self._jobs.clear()
            self._incoming.clear()
        # Kept by the tasks and raised here: both may find the connection broken, and would make a group.
        if self._error is not None:
            raise self._error

    async def _read(self) -> None:
        try:
            await self._receive()
        except (RemoteProtocolError, IdentityRefused) as error:
            self._error = error
        except OSError as error:
            self._break(error)

    def _break(self, error: OSError) -> None:
        self._error = self._error or PeerUnavailable(f"peer {self.address}: {error}")

    async def _receive(self) -> None:
        sock, channel, decoder = self._sock, self.channel, self._decoder
        while True:
            await trio.lowlevel.wait_readable(sock)
            try:
                if self._scope.cancel_called or not self._receive_some():
                    return
            except BlockingIOError:
                continue
            if decoder.message_bytes > self._allowed_bytes:
                self._allow(decoder.message_bytes)
            self._set_lowat(decoder.span_left - channel.backlog)

    def _receive_some(self) -> int:
        """Take in what has come; return how many bytes, 0 at the end. Raises BlockingIOError, OSError."""
        decoder = self._decoder
        incoming = self._incoming.get(decoder.span_number) if decoder.span_left else None
        if incoming is None or incoming.buffer is None or isinstance(self.channel, TlsChannel):
            count = behind = self.channel.receive_into(_receive_buffer)
        else:
            room = incoming.buffer[incoming.filled : incoming.filled + decoder.span_left]
            count = self._sock.recvmsg_into((room, _receive_buffer))[0]
            behind = max(0, count - len(room))
            decoder.span_left -= count - behind
            self._filled(decoder.span_number, incoming, count - behind)
        for item in decoder.feed(_receive_buffer[:behind]):
            self._take_in(item)
        return count

    def _allow(self, said_bytes: int) -> None:
        """Count what the peer may say by now; raises FloodError where it has said more."""
        now = trio.current_time()
        earned = self._allowed_bytes + FLOOD_BYTES_PER_S * (now - self._allowed_at)
        self._allowed_bytes, self._allowed_at = min(earned, said_bytes + FLOOD_BYTES), now
        if said_bytes > self._allowed_bytes:
            raise FloodError(f"peer {self.address} sends more messages than anybody needs")

    def _set_lowat(self, span_left: int) -> None:
        """Sleep until a good part of the chunk frame is there; a message wakes at its first byte."""
        lowat = min(span_left, RECEIVE_BYTES) if span_left > WAKE_BYTES else 1
        if lowat != self._lowat:
            self._lowat = lowat
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, lowat)

    def _take_in(self, item: Message | ChunkSpan) -> None:
        if not isinstance(item, ChunkSpan):
            if isinstance(item, Refuse):
                self._incoming.pop(item.number, None)
            self._handler.message_arrived(self.peer_id, item)
            return
        incoming = self._incoming.get(item.number)
        if incoming is None:
            raise RemoteProtocolError(f"peer {self.address} sends chunk bytes that nobody took (grant {item.number})")
        stop = incoming.filled + len(item.data)
        if stop > incoming.size:
            raise RemoteProtocolError(f"peer {self.address} sends more than the chunk (grant {item.number})")
        if incoming.buffer is not None:
            incoming.buffer[incoming.filled : stop] = item.data
        self._filled(item.number, incoming, len(item.data))

    def _filled(self, number: int, incoming: _Incoming, received: int) -> None:
        """Count bytes that are in their place; pass the chunk on when it is whole."""
        self.received_bytes += received
        incoming.filled += received
        if incoming.filled < incoming.size:
            return
        del self._incoming[number]
        if incoming.buffer is not None:
            self._handler.chunk_arrived(self.peer_id, number, incoming.buffer, checksum_of(incoming.buffer))

    async def _write(self, reading: trio.CancelScope) -> None:
        """Send what is queued; a broken connection ends the reader too."""
        try:
            while True:
                if self._queue or self.channel.unsent:
                    data = bytes(self._queue)
                    self._queue.clear()
                    self._sending = True
                    await self.channel.send_all(data)
                    self._sending = False
                elif self._jobs:
                    if self.limit is None or await self._in_turn(self.limit, self._jobs[0]):
                        await self._send_frame(self._jobs[0])
                else:
                    self._wake = trio.Event()
                    await self._wake.wait()
        except OSError as error:
            self._break(error)
            reading.cancel()

    async def _in_turn(self, limit: TokenBucket, job: _Outgoing) -> bool:
        """Wait until the limit lets the next frame go, or a message is to go before it; return whether it may go."""
        if job.cancelled or job.at == job.stop:
            return True
        if self._due is None:
            await trio.lowlevel.wait_writable(self._sock)
            self._due = limit.reserve(min(self._frame_bytes(), job.stop - job.at), trio.current_time())
        else:
            self._wake = trio.Event()
            with trio.move_on_at(self._due):
                await self._wake.wait()
        if self._due > trio.current_time():
            return False
        self._due = None
        return True

    def _frame_bytes(self) -> int:
        """Return a power of two: chunks are, too, and end with a whole frame. A limit is charged for short ones."""
        if self._handler.window_bytes:
            return LEAST_FRAME_BYTES
        if self.limit is not None:
            within = min(int(LIMITED_FRAME_S * self.limit.bytes_per_s), SPAN_BYTES)
            return max(LEAST_FRAME_BYTES, 1 << within.bit_length() - 1 if within else 0)
        fast = min(int(self._rate.bytes_in(FRAME_S)), MAX_FRAME_BYTES)
        return max(SPAN_BYTES, 1 << fast.bit_length() - 1 if fast else 0)

    async def _acknowledged(self) -> None:
        """Wait until no more is unacknowledged than may be, or for WINDOW_S: then it is the receiver that is slow."""
        if not self._handler.window_bytes:
            return
        with trio.move_on_after(WINDOW_S):
            while (window := self._handler.window_bytes) and self._unacknowledged() > window:  # noqa: ASYNC110 - of that no event tells
                await trio.sleep(WINDOW_LOOK_S)

    def _unacknowledged(self) -> int:
        """Return the bytes in the kernel that the peer has not acknowledged. Raises OSError."""
        return int.from_bytes(fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)

    async def _send_frame(self, job: _Outgoing) -> None:
        """Send the next frame of a chunk; after the last one wait until the socket has all but drained."""
        if not job.cancelled and job.at < job.stop:
            job.began = trio.current_time() if job.began is None else job.began
            await self._acknowledged()
            stop = min(job.at + self._frame_bytes(), job.stop)
            if not self._drained:
                await trio.lowlevel.wait_writable(self._sock)
            self._drained = False
            self._sending = True
            await self.channel.send_file(span_header(job.number, stop - job.at), job.descriptor, job.at, stop)
            self._sending = False
            job.at = stop
            if job.at < job.stop:
                return
        await self._acknowledged()
        if job.at < job.stop:
            self.send(Refuse(job.number))
        await trio.lowlevel.wait_writable(self._sock)
        self._drained = True
        if job.at == job.stop and job.began is not None:
            self._rate.measured(job.size, trio.current_time() - job.began)
        self._jobs.popleft()
        job.release()
        if not self._scope.cancel_called:
            self._handler.chunk_sent(self.peer_id, job.number)
