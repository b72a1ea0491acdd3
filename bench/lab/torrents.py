# SPDX-License-Identifier: Apache-2.0
"""BitTorrent in a lab: a seed on the registry's host, a leecher on each node, told what to do over their control ports.

A leecher connects to the seed and to all leechers that have started before it, so that all pairs are connected
once. What it has when libtorrent calls the torrent finished is checked against the image's digests afterwards.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio

from bench.lab import ready
from bench.lab.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from bench.lab.hosts import Host
    from bench.lab.images import Image
    from bench.lab.processes import Process, ProcessGroup
    from bench.lab.pullers import Pull

MISSING = "libtorrent not found; install with: {python} -m pip install 'libtorrent>=2.1'"
_PORT, _CONTROL_PORT = 6881, 6980
_READY_TIMEOUT_S = 30.0
_ORDER_TIMEOUT_S = 60.0
_REPORT_EVERY_S = 0.2
_HASH_PART_BYTES = 1 << 20


def why_not() -> str | None:
    """Return what to install before torrents can be made here, or None."""
    return None if importlib.util.find_spec("libtorrent") else MISSING.format(python=sys.executable)


class TorrentError(Exception):
    """A peer did not do what it was told."""


@dataclass(frozen=True, slots=True)
class TorrentPeer:
    """A libtorrent process on a host, and its directory."""

    host: Host
    process: Process
    directory: Path

    async def order(self, order: str, **what: object) -> dict[str, Any]:
        """Give an order and return the answer.

        Raises:
            TorrentError: no answer, none in time, or not one of ours.
        """
        try:
            with trio.fail_after(_ORDER_TIMEOUT_S):
                answer: dict[str, Any] = json.loads(await self._exchange(json.dumps({"order": order, **what})))
        except (OSError, ValueError, trio.TooSlowError) as error:
            raise TorrentError(f"{self.process.name} does not answer to {order}: {error or 'too slow'}") from error
        return answer

    async def counters(self) -> dict[str, int]:
        """Return what the peer has moved so far; {} where it does not answer."""
        try:
            return await self.order("counters")
        except TorrentError:
            return {}

    async def _exchange(self, line: str) -> bytes:
        connection = trio.socket.from_stdlib_socket(self.host.socket())
        with connection:
            await connection.connect((self.host.address, _CONTROL_PORT))
            await trio.SocketStream(connection).send_all(line.encode() + b"\n")
            answer = b""
            while part := await connection.recv(64 << 10):
                answer += part
        return answer

    @property
    def endpoint(self) -> tuple[str, int]:
        return self.host.address, _PORT


@dataclass(slots=True)
class Torrents:
    """One swarm: its seed and its leechers by the names of their hosts.

    Args:
        super_seeding: whether the seed gives each piece to one leecher first, and the next once that one has given
            it on. libtorrent then gives a new leecher nothing for its first ten seconds.
    """

    seed: TorrentPeer
    leechers: dict[str, TorrentPeer]
    super_seeding: bool
    _torrents: dict[str, Path] = field(default_factory=dict)
    """Of each image that is seeded, by tag."""
    _started: dict[str, list[TorrentPeer]] = field(default_factory=dict)

    async def offer(self, image: Image) -> None:
        """Seed an image; hashing it takes a while. Raises TorrentError."""
        torrent = self.seed.directory / f"{image.tag}.torrent"
        files = {image.blob_path(part).name: part.size_bytes for part in image.parts}
        directory = image.blob_path(image.manifest).parent
        what = {"directory": str(directory), "files": files, "torrent": str(torrent)}
        await self.seed.order("seed", **what, super_seeding=self.super_seeding)
        self._torrents[image.tag] = torrent
        self._started[image.tag] = []

    async def pull(self, record: Pull, host: Host, image: Image, *, deadline_s: float, held: Collection[str]) -> None:
        """Fetch an image on `host`, check it, and note all about it in `record`; raises nothing but Cancelled."""
        record.started_s = trio.current_time()
        peer = self.leechers[host.name]
        try:
            with trio.move_on_after(deadline_s) as deadline:
                await self._leech(record, peer, image, held)
            if deadline.cancelled_caught:
                record.error = f"not finished after {deadline_s:.0f} s"
            record.finished_s = trio.current_time()
            if record.error is None:
                await peer.order("flush")
                record.error = await trio.to_thread.run_sync(_fault, image, held, self._directory(peer, image))
        except TorrentError as error:
            record.error = str(error)
            record.finished_s = trio.current_time()

    async def _leech(self, record: Pull, peer: TorrentPeer, image: Image, held: Collection[str]) -> None:
        names = [image.blob_path(part).name for part in image.parts if part.digest in held]
        asked_s = trio.current_time()
        others = [self.seed, *self._started[image.tag]]
        self._started[image.tag].append(peer)
        await peer.order(
            "leech",
            torrent=str(self._torrents[image.tag]),
            directory=str(self._directory(peer, image)),
            held=names,
            peers=[other.endpoint for other in others],
        )
        record.total_bytes = image.pull_bytes_without(held)
        finished = False
        while not finished:
            seen = await peer.order("status", wait_s=_REPORT_EVERY_S)
            record.done_bytes, record.error, finished = seen["done_bytes"], seen["error"], seen["finished"]
            if record.done_bytes and not record.ttfb_s:
                record.ttfb_s.append(trio.current_time() - asked_s)

    @staticmethod
    def _directory(peer: TorrentPeer, image: Image) -> Path:
        return peer.directory / image.tag


async def start_torrents(
    group: ProcessGroup, seed_host: Host, nodes: Sequence[Host], data: Path, *, super_seeding: bool
) -> Torrents:
    """Start a seed and a leecher on each node, of nothing yet.

    Args:
        data: gets a directory for each of them.

    Raises:
        LabError: libtorrent is missing or a process does not come up.
    """
    if reason := why_not():
        raise LabError(reason)
    seed = _start(group, seed_host, "torrent-seed", data)
    leechers = {node.name: _start(group, node, f"torrent-{node.name}", data) for node in nodes}
    async with trio.open_nursery() as nursery:
        for peer in (seed, *leechers.values()):
            nursery.start_soon(ready.accepting, peer.host, _CONTROL_PORT, peer.process, _READY_TIMEOUT_S)
    return Torrents(seed, leechers, super_seeding)


def _start(group: ProcessGroup, host: Host, name: str, data: Path) -> TorrentPeer:
    directory = data / name
    directory.mkdir(parents=True)
    command = [sys.executable, "-m", "bench.lab.torrent_peer"]
    command += ["--listen", f"{host.address}:{_PORT}", "--control", f"{host.address}:{_CONTROL_PORT}"]
    return TorrentPeer(host, group.start(host, name, command), directory)


def _fault(image: Image, held: Collection[str], directory: Path) -> str | None:
    """Return what is wrong with the files of an image, None if each has its digest. Blocking."""
    for part in image.parts:
        if part.digest in held:
            continue
        name = image.blob_path(part).name
        found = list(directory.rglob(name))
        if not found or _sha256(found[0]) != name:
            return f"{part.digest}: {'wrong' if found else 'missing'} when the torrent was finished"
    return None


def _sha256(path: Path) -> str:
    sha256 = hashlib.sha256()
    with path.open("rb") as content:
        while data := content.read(_HASH_PART_BYTES):
            sha256.update(data)
    return sha256.hexdigest()
