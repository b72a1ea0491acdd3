# SPDX-License-Identifier: Apache-2.0
"""What has to be in a store by what its killed users reported, and whether it is."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from bench.store.worker import CHUNK_BYTES, ROOM_BYTES
from p2pdist.core.types import Digest
from p2pdist.core.verify import checksum_of
from p2pdist.store.disk import DiskStore

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path


class Expected:
    """The blobs that are to be there, the least recently used first; what was being done when it was killed is open."""

    def __init__(self) -> None:
        self.order: list[Digest] = []
        self.pending: tuple[str, Digest] | None = None

    def hear(self, reports: Iterable[Sequence[str]]) -> None:
        """Take in what the work reported up to its end; what an earlier one left open stays open if it did nothing."""
        for what, verb, text in reports:
            digest = Digest(text)
            if what == "begin":
                self.pending = verb, digest
            elif what == "evicted" or (what == "done" and verb == "remove"):
                self._forget(digest)
            elif what == "done" and verb in ("put", "add"):
                self.order.append(digest)
            if what == "done":
                self.pending = None

    def _forget(self, digest: Digest) -> None:
        if digest in self.order:
            self.order.remove(digest)

    def faults(self, here: set[Digest]) -> list[str]:
        """Compare with what is here. An arrival that was cut may have evicted the oldest without having told."""
        verb, digest = self.pending or ("", Digest(""))
        if verb == "remove" and digest not in here:
            self._forget(digest)
        if verb in ("put", "add") and digest in here:
            self.order.append(digest)
        while verb in ("put", "add", "leave") and self.order and self.order[0] not in here:
            del self.order[0]
        lost = [f"{digest} was committed and is lost" for digest in self.order if digest not in here]
        return lost + [f"{digest} is here and should not be" for digest in here - set(self.order)]


def check(directory: Path, expected: Expected) -> list[str]:
    """Return what is wrong with the store in a directory after a restart, in a line each."""
    store = DiskStore(directory, max_bytes=ROOM_BYTES, low_bytes=ROOM_BYTES, min_free_bytes=0)
    try:
        faults = expected.faults(set(store.digests()))
        for digest in list(store.digests()):
            faults += _wrong(store, digest)
        expected.order = list(store.digests())[::-1]  # reading them was a use
        expected.pending = None
        statistics = store.statistics()
    finally:
        store.close()
    files = [path for path in directory.rglob("*") if path.is_file()]
    known = 1 + 2 * statistics["blobs"] + 2 * statistics["partial_blobs"]
    if len(files) != known:
        faults.append(f"{len(files)} files for {known} that are known: {sorted(map(str, files))}")
    if statistics["bytes"] + statistics["partial_bytes"] > ROOM_BYTES:
        faults.append(f"it holds more than its room: {statistics}")
    return faults


def _wrong(store: DiskStore, digest: Digest) -> list[str]:
    blob = store.open(digest)
    if blob is None:
        return [f"{digest} is announced and cannot be opened"]
    try:
        body = blob.read(0, blob.size_bytes)
    finally:
        blob.close()
    if f"sha256:{hashlib.sha256(body).hexdigest()}" != digest:
        return [f"{digest} has other bytes"]
    chunks = (body[at : at + CHUNK_BYTES] for at in range(0, len(body), CHUNK_BYTES))
    # A small blob that was added whole is one chunk.
    whole = (checksum_of(body),) if body else ()
    return [] if blob.checksums in (tuple(map(checksum_of, chunks)), whole) else [f"{digest} has other checksums"]
