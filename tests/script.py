# SPDX-License-Identifier: Apache-2.0
"""One pull machine under test: events in, exact commands out. Its own peer is number 1; the blob is B, four chunks."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from p2pdist.core import events as ev
from p2pdist.core import wire
from p2pdist.core.chunkmap import chunk_set, to_bytes
from p2pdist.core.packing import pack_indices
from p2pdist.core.pull import PullMachine
from p2pdist.core.reputation import BAN_S, Offence
from p2pdist.core.state import PullSettings
from p2pdist.core.wire import Grant
from tests.strategies import CHUNK, checksum, digest, peer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from p2pdist.core.types import Checksum, Digest

B = digest(1)
CHUNKS = 4
ME = peer(1)


def share(
    have: Iterable[int] = (),
    *,
    blob: Digest = B,
    size: int = CHUNKS * CHUNK,
    wants: bool = True,
    reply: bool = True,
    media_type: str = "",
    wrong: Iterable[int] = (),
) -> wire.Share:
    """A Share of the chunks `have`, with right checksums but for `wrong`."""
    listed, count = sorted(have), -(-size // CHUNK)
    words = b"".join(checksum(index + 1000 if index in wrong else index) for index in listed)
    return wire.Share(
        blob, size, to_bytes(chunk_set(listed), count) if size >= 0 else b"", words, wants, media_type, reply
    )


def have(*indices: int, blob: Digest = B) -> wire.Have:
    return wire.Have(blob, pack_indices(indices), b"".join(checksum(index) for index in indices))


def join(*indices: int, size: int = CHUNKS * CHUNK, blob: Digest = B) -> ev.Tell:
    shared = share(indices, size=size)
    return tell(wire.Join(blob, size, "r", shared.have, shared.checksums))


def checksums(*indices: int, wrong: Iterable[int] = (), size: int = CHUNKS * CHUNK) -> wire.Checksums:
    words = b"".join(checksum(index + 1000 if index in wrong else index) for index in indices)
    return wire.Checksums(B, size, pack_indices(indices), words)


def done(index: int, *, size: int = CHUNKS * CHUNK, word: Checksum | None = None) -> ev.Tell:
    return tell(wire.Done(B, size, index, word or checksum(index)))


def send(number: int, message: wire.Message) -> ev.Send:
    return ev.Send(peer=peer(number), message=message)


def tell(message: wire.Message) -> ev.Tell:
    return ev.Tell(message=message)


def take(number: int, grant: int, index: int, blob: Digest = B) -> ev.TakeChunk:
    return ev.TakeChunk(peer=peer(number), number=grant, blob=blob, index=index)


def fetch(index: int, blob: Digest = B, count: int = 1) -> ev.FetchOrigin:
    return ev.FetchOrigin(blob=blob, index=index, count=count)


def write(index: int, word: Checksum | None = None) -> ev.WriteChunk:
    return ev.WriteChunk(blob=B, index=index, checksum=word or checksum(index))


def fetches(out: list[ev.Command]) -> list[int]:
    """Return the chunks that these commands fetch."""
    runs = [command for command in out if isinstance(command, ev.FetchOrigin)]
    return [index for run in runs for index in range(run.index, run.index + run.count)]


def told(out: list[ev.Command], kind: type[wire.Message]) -> list[wire.Message]:
    """Return the messages of a kind that the scheduler is told."""
    return [command.message for command in out if isinstance(command, ev.Tell) and isinstance(command.message, kind)]


CHECK = ev.CheckBlob(blob=B)
VERIFIED = ev.BlobVerified(blob=B)


class Script:
    """A machine and its clock."""

    def __init__(
        self,
        *,
        scheduled: bool = False,
        upload_slots: int = 4,
        downloads: int = 6,
        peer_chunks: int = 100,
        seed: int = 0,
        rack: str = "",
        download_bytes_per_s: int = 0,
    ) -> None:
        settings = PullSettings(
            upload_slots=upload_slots,
            downloads=downloads,
            peer_chunks=peer_chunks,
            stranger_chunks=peer_chunks,
            rack=rack,
            download_bytes_per_s=download_bytes_per_s,
        )
        self.machine = PullMachine(ME, Random(seed), settings)
        self.now = 0.0
        if scheduled:
            self.on(ev.SchedulerConnected())

    def on(self, event: ev.Event, at: float | None = None) -> list[ev.Command]:
        self.now = self.now if at is None else at
        return self.machine.handle(event, self.now)

    def start(
        self,
        chunks: int = CHUNKS,
        *,
        blob: Digest = B,
        size: int | None = -1,
        have: Iterable[int] = (),
        shared: bool = True,
    ) -> list[ev.Command]:
        return self.on(
            ev.PullStarted(
                blob=blob,
                size_bytes=chunks * CHUNK if size == -1 else size,
                registry="r",
                have={index: checksum(index) for index in have},
                shared=shared,
            )
        )

    def connect(self, *numbers: int, rack: str = "") -> list[ev.Command]:
        return [command for number in numbers for command in self.on(ev.PeerConnected(peer=peer(number), rack=rack))]

    def says(self, number: int, *messages: wire.Message) -> list[ev.Command]:
        return [command for message in messages for command in self.on(ev.PeerSaid(peer=peer(number), message=message))]

    def ordered(self, *messages: wire.Message) -> list[ev.Command]:
        """The scheduler says."""
        return [command for message in messages for command in self.on(ev.SchedulerSaid(message=message))]

    def tick(self, at: float) -> list[ev.Command]:
        return self.on(ev.Ticked(), at)

    def arrives(
        self,
        source: int | None,
        index: int,
        *,
        grant: int = 0,
        word: Checksum | None = None,
        blob: Digest = B,
        taken_s: float | None = None,
    ) -> list[ev.Command]:
        """A chunk arrives; where it is written, that has happened too."""
        who = None if source is None else peer(source)
        word = checksum(index) if word is None else word
        out = self.on(ev.ChunkArrived(source=who, number=grant, blob=blob, index=index, checksum=word, taken_s=taken_s))
        if any(isinstance(command, ev.WriteChunk) for command in out):
            out = out + self.on(ev.ChunkWritten(blob=blob, index=index))
        return out

    def fails(
        self, index: int, *, count: int = 1, final: bool = False, pause_s: float = 0.0, error: Exception | None = None
    ) -> list[ev.Command]:
        error = error or OSError("refused")
        return self.on(ev.FetchFailed(blob=B, index=index, count=count, error=error, final=final, pause_s=pause_s))

    def seeding(self, chunks: int = CHUNKS) -> Script:
        """Let it have all of B."""
        words = tuple(checksum(index) for index in range(chunks))
        self.on(ev.BlobStored(blob=B, size_bytes=chunks * CHUNK, media_type="", checksums=words))
        return self


def drop(number: int, reason: str, offence: Offence = Offence.CORRUPT) -> ev.DropPeer:
    return ev.DropPeer(peer=peer(number), offence=offence, reason=reason, ban_s=BAN_S)


def banned(number: int, offence: Offence = Offence.CORRUPT) -> ev.Tell:
    """What the scheduler hears of a ban."""
    return tell(wire.Banned(peer(number), offence, int(BAN_S * 1000)))


def scheduled(*peers: int) -> Script:
    """An agent with a scheduler and peers that pull B too."""
    script = Script(scheduled=True)
    script.connect(*peers)
    script.start()
    for number in peers:
        script.says(number, share())
    return script


def takes(script: Script, number: int, grant: int, index: int, **words: bytes) -> list[ev.Command]:
    """Let the agent take a chunk that the peer offers, and let it arrive."""
    script.says(number, have(index), Grant(grant))
    return script.arrives(number, index, grant=grant, **words)  # type: ignore[arg-type]


def complete(script: Script, chunks: int = CHUNKS) -> list[ev.Command]:
    """Let the rest arrive from the origin; return what is said after the last chunk."""
    out: list[ev.Command] = []
    for index in range(chunks):
        if not script.machine.blobs[B].have >> index & 1:
            out = script.arrives(None, index)
    return out


def drops(out: list[ev.Command]) -> list[tuple[int, Offence]]:
    return [(int(command.peer, 16), command.offence) for command in out if isinstance(command, ev.DropPeer)]


def says_wrong(script: Script, number: int, *indices: int) -> list[ev.Command]:
    """Let a peer announce chunks with wrong checksums."""
    words = b"".join(checksum(index + 1000) for index in indices)
    return script.says(number, wire.Have(B, pack_indices(indices), words))
