# SPDX-License-Identifier: Apache-2.0
"""Fakes of the ports, scripted by the test."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from typing import NoReturn

import trio

from p2pdist.core.access import NOBODY, Caller
from p2pdist.core.types import Digest, Manifest, ManifestInfo, Repository, Split
from p2pdist.errors import NotFoundAtOrigin


def digest_of(data: bytes) -> Digest:
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


class FakeBlob:
    """A blob of which the first `arrived_bytes` are there; `arrive` brings more, `fail` ends all waiting.

    Args:
        size_bytes: what is promised, where it is not the length of the data.
    """

    def __init__(self, data: bytes, arrived_bytes: int | None = None, size_bytes: int | None = None) -> None:
        self.data = data
        self.size_bytes = len(data) if size_bytes is None else size_bytes
        self.arrived_bytes = len(data) if arrived_bytes is None else arrived_bytes
        self.error: Exception | None = None
        self._changed = trio.Event()

    def arrive(self, arrived_bytes: int) -> None:
        self.arrived_bytes = arrived_bytes
        self._wake()

    def fail(self, error: Exception) -> None:
        """Let every wait for what has not arrived raise `error`."""
        self.error = error
        self._wake()

    async def wait(self, start: int, stop: int) -> int:
        while self.arrived_bytes <= start:
            if self.error is not None:
                raise self.error
            await self._changed.wait()
        return min(stop, self.arrived_bytes)

    def _wake(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()


class FakeReader:
    """A BlobReader over a file in memory, or over the given file, which it then owns."""

    def __init__(self, blob: FakeBlob, file: int | None = None) -> None:
        self.size_bytes = blob.size_bytes
        self.source = "swarm"
        self.blob = blob
        self.closed = trio.Event()
        self.waiting = trio.Event()
        """Set when a wait for bytes began that are not there."""
        self.cancelled = False
        self._file = os.memfd_create("fake-blob") if file is None else file
        os.pwrite(self._file, blob.data, 0)

    async def available(self, start: int, stop: int) -> int:
        assert not self.closed.is_set()
        assert 0 <= start < stop <= self.size_bytes
        if start >= self.blob.arrived_bytes:
            self.waiting.set()
        try:
            return await self.blob.wait(start, stop)
        except trio.Cancelled:
            self.cancelled = True
            raise

    def fileno(self) -> int:
        assert not self.closed.is_set()
        return self._file

    def close(self) -> None:
        if not self.closed.is_set():
            os.close(self._file)
            self.closed.set()


@dataclass
class FakeRelayed:
    status_code: int = 200
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""


class FakeImageSource:
    """An ImageSource that has what the test put in, and fails or hangs as it is told.

    Attributes:
        error: raised by every call.
        gate: where set, each call waits for it first.
        asked: every call, `(method, repository, argument)`; `callers`: whose they were.
        readers: every reader that was opened.
    """

    def __init__(self) -> None:
        self.manifests: dict[tuple[Repository, str], Manifest] = {}
        self.blobs: dict[tuple[Repository, Digest], FakeBlob] = {}
        self.splits: dict[Digest, Split] = {}
        self.relayed: dict[str, FakeRelayed] = {}
        self.accepts: list[str] = []
        self.error: Exception | None = None
        self.gate: trio.Event | None = None
        self.entered = trio.Event()
        self.cancelled = False
        self.asked: list[tuple[str, Repository, str]] = []
        self.callers: list[Caller] = []
        self.readers: list[FakeReader] = []

    def add_manifest(self, repository: Repository, media_type: str, body: bytes, *tags: str) -> Digest:
        manifest = Manifest(digest_of(body), media_type, body)
        for reference in (manifest.digest, *tags):
            self.manifests[repository, reference] = manifest
        return manifest.digest

    def add_blob(self, repository: Repository, blob: bytes | FakeBlob) -> Digest:
        blob = blob if isinstance(blob, FakeBlob) else FakeBlob(blob)
        self.blobs[repository, digest_of(blob.data)] = blob
        return digest_of(blob.data)

    async def resolve(self, repository: Repository, reference: str, caller: Caller = NOBODY) -> ManifestInfo:
        self.callers.append(caller)
        await self._enter("resolve", repository, reference)
        return self._manifest(repository, reference).info

    async def manifest(self, repository: Repository, reference: str, caller: Caller = NOBODY) -> Manifest:
        self.callers.append(caller)
        await self._enter("manifest", repository, reference)
        return self._manifest(repository, reference)

    async def blob_size(self, repository: Repository, digest: Digest, caller: Caller = NOBODY) -> int:
        self.callers.append(caller)
        await self._enter("blob_size", repository, digest)
        return self._blob(repository, digest).size_bytes

    async def open_blob(self, repository: Repository, digest: Digest, caller: Caller = NOBODY) -> FakeReader:
        self.callers.append(caller)
        await self._enter("open_blob", repository, digest)
        self.readers.append(FakeReader(self._blob(repository, digest)))
        return self.readers[-1]

    async def relay(self, repository: Repository, target: str, accept: str, caller: Caller = NOBODY) -> FakeRelayed:
        self.callers.append(caller)
        await self._enter("relay", repository, target)
        self.accepts.append(accept)
        return self.relayed.get(target) or FakeRelayed(404)

    def split(self, digest: Digest) -> Split | None:
        return self.splits.get(digest)

    async def _enter(self, method: str, repository: Repository, argument: str) -> None:
        self.asked.append((method, repository, argument))
        self.entered.set()
        try:
            if self.gate is not None:
                await self.gate.wait()
        except trio.Cancelled:
            self.cancelled = True
            raise
        if self.error is not None:
            raise self.error

    def _manifest(self, repository: Repository, reference: str) -> Manifest:
        return self.manifests.get((repository, reference)) or _missing(f"{repository}:{reference}")

    def _blob(self, repository: Repository, digest: Digest) -> FakeBlob:
        return self.blobs.get((repository, digest)) or _missing(f"{repository}@{digest}")


def _missing(what: str) -> NoReturn:
    raise NotFoundAtOrigin(f"{what} does not exist", status_code=404)
