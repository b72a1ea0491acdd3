# SPDX-License-Identifier: Apache-2.0
"""Images as a runtime asks for them: tags, manifests, and the blobs that manifests name.

The ImageSource behind the mirror. Tags are resolved at the origin, by one agent for the cluster where
there is a scheduler, and never taken from a peer. Serving a manifest starts the pull of all that it
names, and one log line per image says at its end where the bytes came from.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog
import trio

from p2pdist.core.oci import MANIFEST_TYPES, parse_manifest
from p2pdist.core.types import ManifestInfo, parse_digest
from p2pdist.core.wire import Resolve, Resolved
from p2pdist.errors import InvalidInput, P2PDistError, PullFailed

if TYPE_CHECKING:
    from p2pdist.arrival import Arrival
    from p2pdist.core.oci import ParsedManifest
    from p2pdist.core.types import Descriptor, Digest, Manifest, Repository, Split
    from p2pdist.exchange import Tracker
    from p2pdist.ports import BlobReader, ChunkStore, Origin, RelayedResponse
    from p2pdist.puller import Puller

log = structlog.get_logger(__name__)

TAG_TTL_S = 5.0
"""An answer about a tag serves the HEAD and GET of one pull; the scheduler shares it for as long."""
TAG_TRIES_S = 10.0
"""For the scheduler to come back with a tag; then this agent asks for itself."""
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


@dataclass(slots=True)
class _Question:
    """A tag that somebody was asked for."""

    repository: Repository
    tag: str
    answered: trio.Event = field(default_factory=trio.Event)
    answer: ManifestInfo | None = None
    error: P2PDistError | None = None


class Images:
    """The node's view of all images."""

    def __init__(
        self, store: ChunkStore, origin: Origin, puller: Puller, nursery: trio.Nursery, *, prefetch: bool
    ) -> None:
        self.tracker: Tracker | None = None
        self.scheduled = False
        self.pulled = 0
        self._store = store
        self._origin = origin
        self._puller = puller
        self._nursery = nursery
        self.prefetch = prefetch
        """Whether the layers of an image are started on when its manifest is asked for."""
        self._named: OrderedDict[Digest, Descriptor] = OrderedDict()
        self._tags: OrderedDict[tuple[Repository, str], tuple[float, ManifestInfo]] = OrderedDict()
        self._questions: dict[int, _Question] = {}
        self._asking: dict[tuple[Repository, str], _Question] = {}
        self._next_question = 1
        self._images: OrderedDict[Digest, _Image] = OrderedDict()
        puller.finished = self._blob_finished

    # ------------------------------------------------------------ ImageSource

    async def resolve(self, repository: Repository, reference: str) -> ManifestInfo:
        """Return what a tag or digest stands for, as a HEAD asks."""
        if ":" in reference:
            return (await self._puller.manifest(repository, parse_digest(reference))).info
        return await self._resolve_tag(repository, reference)

    async def manifest(self, repository: Repository, reference: str) -> Manifest:
        """Return a manifest, and start the pull of all that it names."""
        if ":" in reference:
            digest = parse_digest(reference)
        else:
            digest = (await self._resolve_tag(repository, reference)).digest
        manifest = await self._puller.manifest(repository, digest)
        self._note(repository, manifest)
        return manifest

    async def blob_size(self, repository: Repository, digest: Digest) -> int:
        """Return a blob's size, from what is here or a manifest said, else from the origin."""
        size = self._puller.stored_size(digest)
        if size is not None:
            return size
        named = self._named.get(digest)
        return named.size_bytes if named is not None else await self._origin.blob_size(repository, digest)

    async def open_blob(self, repository: Repository, digest: Digest) -> BlobReader:
        """Return a reader of a blob, which starts its pull if it is neither here nor on its way."""
        stored = self._puller.open_stored(digest)
        if stored is not None:
            self._first_byte(digest)
            return stored
        named = self._named.get(digest)
        size = await self.blob_size(repository, digest)
        return await self._puller.open_blob(
            repository, digest, size, named=named is not None, first_byte=lambda: self._first_byte(digest)
        )

    async def relay(self, repository: Repository, target: str, accept: str) -> RelayedResponse:
        """Pass a listing on to the origin."""
        return await self._origin.relay(repository, target, accept)

    def split(self, digest: Digest) -> Split | None:
        """Return where a blob's bytes came from so far."""
        return self._puller.split(digest)

    # ------------------------------------------------------------------- tags

    async def _resolve_tag(self, repository: Repository, tag: str) -> ManifestInfo:
        """Return what a tag stands for; all who ask meanwhile share one answer, or one error."""
        key = (repository, tag)
        known = self._tags.get(key)
        if known is not None and known[0] > trio.current_time():
            return known[1]
        asking = self._asking.get(key)
        if asking is None:
            asking = self._asking[key] = _Question(repository, tag)
            # In a task of its own: the runtime that asked first may hang up.
            self._nursery.start_soon(self._find_tag, key, asking)
        await asking.answered.wait()
        if asking.answer is None:
            raise asking.error or PullFailed(tag, [])
        return asking.answer

    async def _find_tag(self, key: tuple[Repository, str], asking: _Question) -> None:
        try:
            asking.answer = await self._ask_for_tag(*key)
        except P2PDistError as error:
            asking.error = error
        else:
            self._tags[key] = (trio.current_time() + TAG_TTL_S, asking.answer)
            while len(self._tags) > MAX_NAMED:
                self._tags.popitem(last=False)
        finally:
            del self._asking[key]
            asking.answered.set()

    async def _ask_for_tag(self, repository: Repository, tag: str) -> ManifestInfo:
        """Ask by way of the scheduler, so that one agent asks for all; by ourselves where that brings nothing."""
        if self.scheduled and self.tracker is not None and self._puller.may_share(repository):
            number = self._next_question
            self._next_question += 1
            question = self._questions[number] = _Question(repository, tag)
            self.tracker.send(Resolve(number, repository.registry, repository.name, tag))
            try:
                with trio.move_on_after(TAG_TRIES_S):
                    await question.answered.wait()
            finally:
                del self._questions[number]
            if question.error is not None:
                raise question.error
            if question.answer is not None:
                return question.answer
        return await self._origin.head_manifest(repository, tag)

    def asked(self, number: int) -> None:
        """Take in the scheduler's wish that this agent ask the origin."""
        question = self._questions.get(number)
        if question is not None:
            self._nursery.start_soon(self._answer, number, question)
        elif self.tracker is not None:
            self.tracker.send(Resolved(number, "", "", 0))

    async def _answer(self, number: int, question: _Question) -> None:
        answer = Resolved(number, "", "", 0)
        try:
            info = await self._origin.head_manifest(question.repository, question.tag)
        except P2PDistError as error:
            question.error = error
        else:
            question.answer = info
            answer = Resolved(number, info.digest, info.media_type, info.size_bytes)
        if self.tracker is not None:
            self.tracker.send(answer)
        question.answered.set()

    def resolved(self, message: Resolved) -> None:
        """Take in the scheduler's answer; an empty one sends us to the origin ourselves."""
        question = self._questions.get(message.number)
        if question is None:
            return
        # What is no answer of a registry is as good as none: it would go into the headers for the runtime.
        if message.size_bytes > 0 and message.media_type in MANIFEST_TYPES:
            with suppress(InvalidInput):
                question.answer = ManifestInfo(parse_digest(message.digest), message.media_type, message.size_bytes)
        question.answered.set()

    def scheduler_changed(self, connected: bool) -> None:
        """Let nobody wait for the answer of a scheduler that has gone."""
        self.scheduled = connected
        if not connected:
            for question in self._questions.values():
                question.answered.set()

    # ----------------------------------------------------------------- images

    def _note(self, repository: Repository, manifest: Manifest) -> None:
        """Remember what a manifest names, and start on it."""
        try:
            parsed = parse_manifest(manifest.body, manifest.media_type)
        except InvalidInput as error:
            log.info("manifest not understood; its blobs are pulled as they are asked for", why=str(error))
            return
        blobs = [descriptor for descriptor in parsed.blobs if not descriptor.urls]
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
