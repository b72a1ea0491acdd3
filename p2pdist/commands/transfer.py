# SPDX-License-Identifier: Apache-2.0
"""One image on its way from a mirror into an OCI layout, or past a check and away.

Invariants: every manifest and blob is checked against its digest; the image is named in `index.json` only
when all of it is there; a transfer that fails or is interrupted leaves the blobs that were finished, which
the next one reads again and keeps.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from p2pdist.commands.layout import BlobSink, OciLayout
from p2pdist.commands.progress import Display, describe, human_bytes
from p2pdist.core.oci import INDEX_DEPTH_MAX, ImageReference, ParsedManifest, Platform, parse_manifest, pick_platform
from p2pdist.core.types import Split
from p2pdist.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator

    from p2pdist.commands.mirror_client import MirrorClient
    from p2pdist.core.types import Descriptor, Manifest

PARALLEL_BLOBS = 3
"""As many as runtimes fetch at once by default."""
_WATCH_EVERY_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """What a pull brought."""

    manifest: Manifest
    blobs: int
    size_bytes: int
    reused_bytes: int
    split: Split
    elapsed_s: float


async def pull_image(
    client: MirrorClient,
    image: ImageReference,
    platform: Platform | None,
    layout: OciLayout | None,
    display: Display,
) -> Pulled:
    """Pull an image and check all of it.

    Args:
        platform: which child of an index; None means every one.
        layout: where to keep it, or None to check only.

    Raises:
        P2PDistError: the mirror refuses or fails, or a manifest or blob is not what its digest says.
    """
    begun = trio.current_time()
    manifests = await _manifests(client, image, platform)
    blobs = tuple({blob.digest: blob for _, parsed in manifests for blob in parsed.blobs}.values())
    display.expect(blobs)
    transfer = _Transfer(client, image, layout, display)
    await transfer.run(blobs)
    root = manifests[0][0]
    if layout is not None:
        for manifest, _ in manifests:
            layout.add(manifest)
        layout.name(root, str(image), "" if ":" in image.reference else image.reference)
    return Pulled(
        manifest=root,
        blobs=len(blobs),
        size_bytes=sum(blob.size_bytes for blob in blobs),
        reused_bytes=transfer.reused_bytes,
        split=transfer.split,
        elapsed_s=trio.current_time() - begun,
    )


def summary(image: ImageReference, pulled: Pulled) -> str:
    """Return the closing line."""
    moved_bytes = pulled.size_bytes - pulled.reused_bytes
    rate = human_bytes(moved_bytes / max(pulled.elapsed_s, 1e-6))
    parts = [f"{pulled.blobs} blobs, {human_bytes(pulled.size_bytes)} in {pulled.elapsed_s:.1f} s ({rate}/s)"]
    if pulled.reused_bytes:
        parts.append(f"{human_bytes(pulled.reused_bytes)} were here already")
    if sources := describe(pulled.split):
        parts.append(sources)
    return f"pulled {image} {pulled.manifest.digest}: {'; '.join(parts)}"


async def _manifests(
    client: MirrorClient, image: ImageReference, platform: Platform | None
) -> list[tuple[Manifest, ParsedManifest]]:
    """Return the manifest that stands for the image, then all below it.

    With a platform, indexes lead to the one manifest that runs there, which then stands for the image.
    """
    found: list[tuple[Manifest, ParsedManifest]] = []
    level = [image.reference]
    for _ in range(INDEX_DEPTH_MAX + 1):
        below: dict[str, None] = {}
        for reference in level:
            manifest = await client.manifest(image.repository, reference)
            parsed = parse_manifest(manifest.body, manifest.media_type)
            if parsed.kind == "index" and platform is not None:
                below[pick_platform(parsed, platform).digest] = None
                continue
            found.append((manifest, parsed))
            below.update((child.digest, None) for child in parsed.children)
        if not below:
            return found
        level = list(below)
    raise InvalidInput(f"{image} nests indexes more than {INDEX_DEPTH_MAX} deep")


class _Transfer:
    """The blobs of one image on their way."""

    def __init__(self, client: MirrorClient, image: ImageReference, layout: OciLayout | None, display: Display) -> None:
        self.reused_bytes = 0
        self.split = Split()
        self._client = client
        self._image = image
        self._layout = layout
        self._display = display
        self._arriving: dict[str, Descriptor] = {}

    async def run(self, blobs: tuple[Descriptor, ...]) -> None:
        """Bring all blobs, `PARALLEL_BLOBS` at a time; the first error ends the others."""
        waiting = iter(blobs)
        async with trio.open_nursery() as watching:
            if self._display.live:
                watching.start_soon(self._watch)
            async with trio.open_nursery() as nursery:
                for _ in range(PARALLEL_BLOBS):
                    nursery.start_soon(self._work, waiting)
            watching.cancel_scope.cancel()

    async def _work(self, waiting: Iterator[Descriptor]) -> None:
        for blob in waiting:
            await self._bring(blob)

    async def _bring(self, blob: Descriptor) -> None:
        if self._layout is not None and await trio.to_thread.run_sync(self._layout.has, blob):
            self.reused_bytes += blob.size_bytes
            self._display.done(blob, "here already")
            return
        sources: list[str] = []
        self._arriving[blob.digest] = blob
        try:
            with _sink(self._layout, blob) as sink:
                await self._client.blob(
                    self._image.repository, blob, _Watched(sink, self._display, blob), sources.append
                )
        finally:
            del self._arriving[blob.digest]
        await self._account(blob, sources)

    async def _account(self, blob: Descriptor, sources: list[str]) -> None:
        if set(sources) == {"cache"}:
            split: Split | None = Split(from_cache=blob.size_bytes)
        else:
            split = await self._client.split(blob.digest)
        if split is not None:
            self.split += split
        self._display.done(blob, describe(split) if split is not None else "")

    async def _watch(self) -> None:
        """Keep the live display's sources fresh, until the agent does not tell or all is here."""
        while True:
            await trio.sleep(_WATCH_EVERY_S)
            for blob in list(self._arriving.values()):
                split = await self._client.split(blob.digest)
                if split is None:
                    return
                if blob.digest in self._arriving:
                    self._display.source(blob, split)


class _Watched:
    """A sink that tells the display how far it is."""

    def __init__(self, sink: BlobSink, display: Display, blob: Descriptor) -> None:
        self._sink = sink
        self._display = display
        self._blob = blob

    @property
    def written_bytes(self) -> int:
        return self._sink.written_bytes

    def write(self, data: bytes) -> None:
        self._sink.write(data)
        self._display.moved(self._blob, self._sink.written_bytes)


@contextmanager
def _sink(layout: OciLayout | None, blob: Descriptor) -> Iterator[BlobSink]:
    if layout is not None:
        with layout.writing(blob) as sink:
            yield sink
        return
    sink = BlobSink(blob, None)
    yield sink
    sink.check()
