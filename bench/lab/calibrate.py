# SPDX-License-Identifier: Apache-2.0
"""Measures what one bulk TCP flow gets between two hosts: the yardstick that a shaped link is judged by.

The nominal rate is not it: headers alone take 4% of a 100 Mbit/s link.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import trio

from bench.lab.errors import LabError
from bench.lab.pacing import pace

if TYPE_CHECKING:
    from bench.lab.hosts import Host

_SETTLE_S = 0.7
"""Left out at the start: the shapers' free burst and the flow's own start-up."""

_MEASURE_S = 2.0
_DEADLINE_S = 30.0
_BUFFER_BYTES = 256 << 10


async def goodput_bytes_per_s(sender: Host, receiver: Host, *, paced_bytes_per_s: float | None = None) -> float:
    """Return the payload rate of one TCP flow from `sender` to `receiver`; takes about three seconds.

    Args:
        paced_bytes_per_s: what the sender limits each connection to.

    Raises:
        LabError: nothing comes.
    """
    listener = sender.socket()
    if paced_bytes_per_s is not None:
        pace(listener, paced_bytes_per_s)
    listener.bind((sender.address, 0))
    listener.listen(1)
    listener.setblocking(False)
    client = receiver.socket()
    client.setblocking(False)
    with listener, client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_send, trio.socket.from_stdlib_socket(listener))
            await trio.socket.from_stdlib_socket(client).connect(listener.getsockname())
            with trio.move_on_after(_DEADLINE_S) as patience:
                rate = await _measure(client)
            nursery.cancel_scope.cancel()
    if patience.cancelled_caught:
        raise LabError(f"{receiver.name} received nothing from {sender.name}: the lab's network does not work")
    return rate


async def _send(listener: trio.socket.SocketType) -> None:
    connection, _ = await listener.accept()
    with connection:
        while True:
            await connection.send(bytes(_BUFFER_BYTES))


async def _measure(client: socket.socket) -> float:
    """Return the rate between two receipts: what comes in large pieces is not worth counting by the clock."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _BUFFER_BYTES // 2)
    await _receive_until(client, trio.current_time() + _SETTLE_S)
    started_s = trio.current_time()
    received_bytes = await _receive_until(client, started_s + _MEASURE_S)
    return received_bytes / (trio.current_time() - started_s)


async def _receive_until(client: socket.socket, end_s: float) -> int:
    """Return the bytes received up to the first receipt after `end_s`."""
    buffer = bytearray(4 * _BUFFER_BYTES)
    received_bytes = 0
    while trio.current_time() < end_s:
        await trio.lowlevel.wait_readable(client)
        received_bytes += client.recv_into(buffer)
    return received_bytes
