# SPDX-License-Identifier: Apache-2.0
"""Images as a runtime asks for them: tags, manifests, and the blobs that manifests name.

The ImageSource behind the mirror. Whatever is asked for goes through the gate first (`gate.py`). Serving a
manifest starts the pull of all that it names, and one log line per image says at its end where the bytes came from.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
import trio

from p2pdist.core.access import NOBODY
from p2pdist.core.oci import parse_manifest
from p2pdist.core.types import parse_digest
from p2pdist.errors import InvalidInput

if TYPE_CHECKING:
    from p2pdist.arrival import Arrival
    from p2pdist.core.access import Caller
    from p2pdist.core.oci import ParsedManifest
    from p2pdist.core.types import Descriptor, Digest, Manifest, ManifestInfo, Repository, Split
    from p2pdist.gate import Gate
    from p2pdist.ports import BlobReader, ChunkStore, Origin, RelayedResponse
    from p2pdist.puller import Puller

log = structlog.get_logger(__name__)

MAX_NAMED = 50_000
"""Descriptors remembered, so that a blob's size is known before any source is asked."""
MAX_IMAGES = 256


@dataclass(slots=True)
class _Image:
    """An image that is being pulled, for its log line."""

    name: str
    digest: Digest
    started: float
    named: frozenset[Digest]
    waiting: set[Digest]
    total_bytes: int
    cached_bytes: int
    from_peers: int = 0
    from_origin: int = 0
    first_byte_s: float | None = None


class Images:
    """The node's view of all images."""

    def __init__(
        self,
        store: ChunkStore,
        origin: Origin,
        puller: Puller,
        gate: Gate,
        nursery: trio.Nursery,
        *,
        prefetch: bool,
    ) -> None:
        self.pulled = 0
        self._store = store
        self._origin = origin
        self._puller = puller
        self._gate = gate
        self._nursery = nursery
        self.prefetch = prefetch
        """Whether the layers of an image are started on when its manifest is asked for."""
        self._named: OrderedDict[Digest, Descriptor] = OrderedDict()
        self._images: OrderedDict[Digest, _Image] = OrderedDict()
        puller.finished = self._blob_finished

    # ------------------------------------------------------------ ImageSource

    async def resolve(self, repository: Repository, reference: str, caller: Caller = NOBODY) -> ManifestInfo:
        """Return what a tag or digest stands for, as a HEAD asks."""
        who = self._gate.who(repository, caller)
        if ":" not in reference:
            return await self._gate.tag(repository, reference, who)
        digest = parse_digest(reference)
        await self._gate.manifest(repository, digest, who)
        return (await self._manifest(repository, digest)).info

    async def manifest(self, repository: Repository, reference: str, caller: Caller = NOBODY) -> Manifest:
        """Return a manifest, and start the pull of all that it names."""
        who = self._gate.who(repository, caller)
        if ":" in reference:
            digest = parse_digest(reference)
            await self._gate.manifest(repository, digest, who)
        else:
            digest = (await self._gate.tag(repository, reference, who)).digest
        manifest = await self._manifest(repository, digest)
        self._note(repository, manifest)
        return manifest

    async def _manifest(self, repository: Repository, digest: Digest) -> Manifest:
        if self._gate.is_anothers(repository, digest):
            return await self._origin.get_manifest(repository, digest)
        return await self._puller.manifest(repository, digest)

    async def blob_size(self, repository: Repository, digest: Digest, caller: Caller = NOBODY) -> int:
        """Return a blob's size, from what is here or a manifest said, else from the origin."""
        await self._gate.blob(repository, digest, self._gate.who(repository, caller))
        return await self._blob_size(repository, digest)

    async def _blob_size(self, repository: Repository, digest: Digest) -> int:
        named = self._named.get(digest)
        stored = None if self._gate.is_anothers(repository, digest) else self._puller.stored_size(digest)
        known = (stored, self._gate.blob_size(repository, digest))
        for size in (*known, named.size_bytes if named is not None else None):
            if size is not None:
                return size
        return await self._origin.blob_size(repository, digest)

    async def open_blob(self, repository: Repository, digest: Digest, caller: Caller = NOBODY) -> BlobReader:
        """Return a reader of a blob, which starts its pull if it is neither here nor on its way."""
        await self._gate.blob(repository, digest, self._gate.who(repository, caller))
        anew = self._gate.is_anothers(repository, digest)
        stored = None if anew else self._puller.open_stored(repository, digest)
        if stored is not None:
            self._first_byte(digest)
            return stored
        named = self._named.get(digest)
        size = await self._blob_size(repository, digest)
        return await self._puller.open_blob(
            repository,
            digest,
            size,
            named=named is not None,
            first_byte=lambda: self._first_byte(digest),
            anew=anew or self._gate.is_anothers(repository, digest),
        )

    async def relay(self, repository: Repository, target: str, accept: str, caller: Caller = NOBODY) -> RelayedResponse:
        """Pass a listing on to the origin."""
        return await self._origin.relay(repository, target, accept, caller=self._gate.who(repository, caller))

    def split(self, digest: Digest) -> Split | None:
        """Return where a blob's bytes came from so far."""
        return self._puller.split(digest)

    # ----------------------------------------------------------------- images

    def _note(self, repository: Repository, manifest: Manifest) -> None:
        """Remember what a manifest names, and start on it."""
        try:
            parsed = parse_manifest(manifest.body, manifest.media_type)
        except InvalidInput as error:
            log.info("manifest not understood; its blobs are pulled as they are asked for", why=str(error))
            return
        blobs = [descriptor for descriptor in parsed.blobs if not descriptor.urls]
        children = [descriptor.digest for descriptor in (*parsed.children, *blobs)]
        self._gate.named(repository, manifest.digest, children)
        for descriptor in blobs:
            self._named[descriptor.digest] = descriptor
            self._named.move_to_end(descriptor.digest)
        while len(self._named) > MAX_NAMED:
            self._named.popitem(last=False)
        if blobs:
            self._begin_image(repository, manifest, parsed, blobs)
            if self.prefetch:
                self._nursery.start_soon(self._puller.prefetch, repository, blobs)

    def _begin_image(
        self, repository: Repository, manifest: Manifest, parsed: ParsedManifest, blobs: list[Descriptor]
    ) -> None:
        if manifest.digest in self._images:
            return
        sizes = {descriptor.digest: descriptor.size_bytes for descriptor in blobs}
        waiting = {digest for digest in sizes if not self._store.contains(digest)}
        total = sum(sizes.values())
        image = _Image(
            name=f"{repository}@{manifest.digest}",
            digest=manifest.digest,
            started=trio.current_time(),
            named=frozenset(sizes),
            waiting=waiting,
            total_bytes=total,
            cached_bytes=total - sum(sizes[digest] for digest in waiting),
        )
        if not waiting:
            self._end_image(image)
            return
        self._images[manifest.digest] = image
        while len(self._images) > MAX_IMAGES:
            self._images.popitem(last=False)

    def _first_byte(self, digest: Digest) -> None:
        """Note the time at which a byte of this blob can go to a runtime."""
        for image in self._images.values():
            if image.first_byte_s is None and digest in image.named:
                image.first_byte_s = trio.current_time() - image.started

    def _blob_finished(self, arrival: Arrival) -> None:
        for image in list(self._images.values()):
            if arrival.digest not in image.waiting:
                continue
            image.waiting.discard(arrival.digest)
            image.cached_bytes += arrival.from_earlier
            image.from_peers += arrival.from_peers
            image.from_origin += arrival.from_origin
            if arrival.failure is not None:
                del self._images[image.digest]
                log.warning("image not pulled", image=image.name, why=str(arrival.failure))
            elif not image.waiting:
                del self._images[image.digest]
                self._end_image(image)

    def _end_image(self, image: _Image) -> None:
        self.pulled += 1
        log.info(
            "image pulled",
            image=image.name,
            bytes=image.total_bytes,
            from_cache=image.cached_bytes,
            from_peers=image.from_peers,
            from_origin=image.from_origin,
            seconds=round(trio.current_time() - image.started, 3),
            first_byte_s=None if image.first_byte_s is None else round(image.first_byte_s, 3),
        )
