# SPDX-License-Identifier: Apache-2.0
"""A lying peer as a program: joins the cluster by the scheduler, as agents do, and lies to whoever takes chunks of it.

It joins the swarms of the blobs that it is told of when SIGUSR1 comes, fetches nothing, and answers a lease as it is:
who corrupts gives it back, who stalls keeps it. Prints a line of JSON for each chunk that it has sent.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

import trio

from bench.lab.lying_peer import Behaviour, Conversation
from p2pdist.config import Address
from p2pdist.core.chunkmap import ChunkMap, to_bytes
from p2pdist.core.packing import unpack_checksums, unpack_indices
from p2pdist.core.types import PeerId, parse_digest
from p2pdist.core.wire import VERSION, Checksums, Decoder, Failed, Hello, Join, Lease, Neighbours, encode
from p2pdist.errors import RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bench.lab.hosts import Host
    from bench.lab.processes import Process, ProcessGroup
    from p2pdist.core.types import Checksum, Digest
    from p2pdist.core.wire import Message, PeerAddress

PORT = 5051
READY, SENT = "ready", "wrong chunk sent"
"""What it prints: that it may be told to join, and each chunk."""
_AGAIN_S = 0.5
_CHUNKS_MAX = 1 << 16
_NEVER = -1
_RECEIVE_BYTES = 64 << 10
_BROKEN = (OSError, trio.BrokenResourceError, trio.ClosedResourceError, RemoteProtocolError)


def start(
    group: ProcessGroup,
    host: Host,
    behaviour: Behaviour,
    *,
    scheduler: str,
    registry: str,
    blobs: Mapping[Digest, int],
) -> Process:
    """Start a lying peer on a host; it joins when SIGUSR1 comes.

    Args:
        scheduler: HOST:PORT.
        registry: what agents call the origin of the blobs.
        blobs: sizes in bytes.
    """
    command = [sys.executable, "-m", "bench.lab.liar", behaviour, "--id", peer_id_of(host.name)]
    command += ["--listen", f"{host.address}:{PORT}", "--scheduler", scheduler, "--registry", registry]
    return group.start(host, host.name, [*command, *(f"{blob}={size_bytes}" for blob, size_bytes in blobs.items())])


def peer_id_of(name: str) -> PeerId:
    """Return the id of the liar on this host."""
    return PeerId(random.Random(name).randbytes(16).hex())


@dataclass(slots=True)
class Liar:
    """The program's state: its connections to agents, and what the scheduler says is right."""

    behaviour: Behaviour
    peer_id: PeerId
    listen: Address
    registry: str
    blobs: Mapping[Digest, int]
    truths: dict[Digest, dict[int, Checksum]] = field(default_factory=dict)
    _conversations: list[Conversation] = field(default_factory=list)
    _joined: bool = False
    _scheduler: trio.SocketStream | None = None
    _telling: trio.Lock = field(default_factory=trio.Lock)

    async def run(self, scheduler: Address) -> None:
        """Lie until cancelled; where the scheduler hangs up, it is looked for again."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(trio.serve_tcp, self._serve, self.listen.port, host=self.listen.host))
            nursery.start_soon(self._heed)
            while True:
                with suppress(*_BROKEN):
                    async with await trio.open_tcp_stream(scheduler.host, scheduler.port) as stream:
                        await self._follow(stream, nursery)
                self._scheduler = None
                await trio.sleep(_AGAIN_S)

    def _hello(self) -> bytes:
        return encode(Hello(VERSION, "default", self.peer_id, self.listen.port, "", "", self.listen.host))

    async def _follow(self, stream: trio.SocketStream, nursery: trio.Nursery) -> None:
        await stream.send_all(self._hello())
        self._scheduler = stream
        await self._join()
        decoder = Decoder()
        while data := await stream.receive_some(_RECEIVE_BYTES):
            for message in decoder.feed(memoryview(data)):
                match message:
                    case Neighbours():
                        for address in message.peers:
                            nursery.start_soon(self._dial, address)
                    case Checksums() if message.blob in self.blobs:
                        self._learn(message, nursery)
                    case Lease() if self.behaviour in (Behaviour.FORGE, Behaviour.CORRUPT):
                        for index in range(message.index, message.index + message.count):
                            await self._tell_scheduler(Failed(message.blob, index, _NEVER))

    async def _heed(self) -> None:
        with trio.open_signal_receiver(signal.SIGUSR1) as signals:
            report(READY)
            async for _ in signals:
                self._joined = True
                with suppress(*_BROKEN):
                    await self._join()

    async def _join(self) -> None:
        for blob, size_bytes in self.blobs.items() if self._joined else ():
            nothing = to_bytes(0, ChunkMap.of(size_bytes).count)
            await self._tell_scheduler(Join(blob, size_bytes, self.registry, nothing, b""))

    async def _tell_scheduler(self, message: Message) -> None:
        async with self._telling:
            if self._scheduler is not None:
                await self._scheduler.send_all(encode(message))

    def _learn(self, message: Checksums, nursery: trio.Nursery) -> None:
        indices = unpack_indices(message.indices, _CHUNKS_MAX)
        news = dict(zip(indices, unpack_checksums(message.checksums, len(indices)), strict=True))
        self.truths.setdefault(message.blob, {}).update(news)
        for conversation in self._conversations:
            # Beside the others: who sends a byte a second has no room for words.
            nursery.start_soon(_tell, conversation, message.blob, news)

    async def _dial(self, address: PeerAddress) -> None:
        if any(conversation.peer == address.peer_id for conversation in self._conversations):
            return
        with suppress(*_BROKEN):
            await self._serve(await trio.open_tcp_stream(address.host, address.port))

    async def _serve(self, stream: trio.SocketStream) -> None:
        """Talk with an agent until one of the two hangs up."""
        said = Conversation(
            stream=stream, behaviour=self.behaviour, wants=True, truths=self.truths, on_chunk=_report_chunk
        )
        self._conversations.append(said)
        try:
            async with stream:
                await stream.send_all(self._hello())
                await said.run()
        except _BROKEN:
            pass
        finally:
            self._conversations.remove(said)
        report("disconnected", peer=said.peer)


async def _tell(conversation: Conversation, blob: Digest, news: Mapping[int, Checksum]) -> None:
    with suppress(*_BROKEN):
        await conversation.tell(blob, news)


def _report_chunk(peer: PeerId | None, blob: Digest, index: int) -> None:
    report(SENT, peer=peer, blob=blob, index=index)


def report(event: str, **what: object) -> None:
    """Print what happened, with the time as agents' logs have it."""
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    print(json.dumps({"time": now, "event": event, **what}), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run until killed."""
    parser = argparse.ArgumentParser(description="a lying peer for labs")
    parser.add_argument("behaviour", type=Behaviour)
    parser.add_argument("--id", required=True)
    parser.add_argument("--listen", type=Address.parse, required=True)
    parser.add_argument("--scheduler", type=Address.parse, required=True)
    parser.add_argument("--registry", required=True)
    parser.add_argument("blobs", nargs="+", metavar="DIGEST=SIZE")
    options = parser.parse_args(arguments)
    sizes = {parse_digest(blob): int(size) for blob, _, size in (pair.rpartition("=") for pair in options.blobs)}
    liar = Liar(options.behaviour, PeerId(options.id), options.listen, options.registry, sizes)
    trio.run(liar.run, options.scheduler)


if __name__ == "__main__":
    main()
