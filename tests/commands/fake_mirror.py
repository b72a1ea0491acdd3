# SPDX-License-Identifier: Apache-2.0
"""A mirror in memory, as an httpx transport: serves what it was given, and fails as it is told."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import trio

from p2pdist.core.oci import OCI_INDEX, OCI_MANIFEST
from p2pdist.core.types import Descriptor, parse_digest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"


def describe_bytes(body: bytes, media_type: str = LAYER_TYPE) -> Descriptor:
    return Descriptor(parse_digest(f"sha256:{hashlib.sha256(body).hexdigest()}"), len(body), media_type)


@dataclass
class Fault:
    """What happens to one request, instead of the right answer."""

    cut_after: int | None = None
    status: int | None = None
    body: bytes | None = None
    ignore_range: bool = False
    content_range: str | None = None
    hang: bool = False


class _Body(httpx.AsyncByteStream):
    """Its own iterator: a generator would be left open by a reader that stops early."""

    def __init__(self, data: bytes, fault: Fault) -> None:
        self._data, self._fault = data[: fault.cut_after], fault
        self._sent = 0

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        await trio.lowlevel.checkpoint()
        data = self._data[self._sent : self._sent + 1000]
        self._sent += len(data)
        if data:
            return data
        if self._fault.hang:
            await trio.sleep_forever()
        if self._fault.cut_after is not None:
            raise httpx.ReadError("connection reset")
        raise StopAsyncIteration


@dataclass
class FakeMirror(httpx.AsyncBaseTransport):
    """Manifests by tag and digest, blobs by digest; `faults` are used up in order, by path suffix."""

    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    splits: dict[str, Any] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    source: str = ""
    requests: list[httpx.Request] = field(default_factory=list)

    def add_blob(self, body: bytes, media_type: str = LAYER_TYPE) -> Descriptor:
        blob = describe_bytes(body, media_type)
        self.blobs[blob.digest] = body
        return blob

    def add_manifest(self, document: dict[str, Any], media_type: str, tag: str = "") -> Descriptor:
        body = json.dumps({"schemaVersion": 2, "mediaType": media_type, **document}).encode()
        manifest = describe_bytes(body, media_type)
        for name in filter(None, (tag, manifest.digest)):
            self.manifests[name] = (media_type, body)
        return manifest

    def add_image(self, layers: list[bytes], tag: str = "") -> Descriptor:
        config = self.add_blob(b'{"n": %d}' % len(self.manifests), CONFIG_TYPE)
        named = [self.add_blob(layer) for layer in layers]
        document = {"config": as_json(config), "layers": [as_json(layer) for layer in named]}
        return self.add_manifest(document, OCI_MANIFEST, tag)

    def add_index(self, children: dict[str, Descriptor], tag: str = "") -> Descriptor:
        """Add an index whose children are named by `os/architecture`."""
        entries = []
        for platform, child in children.items():
            os, architecture = platform.split("/")
            entries.append({**as_json(child), "platform": {"os": os, "architecture": architecture}})
        return self.add_manifest({"manifests": entries}, OCI_INDEX, tag)

    def asked(self, suffix: str) -> list[httpx.Request]:
        return [request for request in self.requests if request.url.path.endswith(suffix)]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        kind, _, name = request.url.path.rpartition("/")
        waiting = self.faults.get(name, [])
        fault = waiting.pop(0) if waiting else Fault()
        if fault.status == 0:
            raise httpx.ConnectError("connection refused")
        if fault.status is not None:
            return httpx.Response(fault.status, stream=_Body(fault.body or b"", Fault()))
        if kind.endswith("/pulls"):
            return httpx.Response(200, json=self.splits[name]) if name in self.splits else httpx.Response(404)
        if kind.endswith("/manifests") and name in self.manifests:
            media_type, body = self.manifests[name]
            headers = {"Content-Type": media_type, "Docker-Content-Digest": describe_bytes(body).digest}
            body = body if fault.body is None else fault.body
            return httpx.Response(200, headers=headers, stream=_Body(body, fault))
        if kind.endswith("/blobs") and name in self.blobs:
            return self._blob(request, self.blobs[name] if fault.body is None else fault.body, fault)
        refusal = {"errors": [{"code": "MANIFEST_UNKNOWN", "message": "no such manifest"}]}
        return httpx.Response(404, stream=_Body(json.dumps(refusal).encode(), Fault()))

    def _blob(self, request: httpx.Request, body: bytes, fault: Fault) -> httpx.Response:
        headers = {"P2pdist-Source": self.source} if self.source else {}
        asked = request.headers.get("Range", "")
        if not asked or fault.ignore_range:
            return httpx.Response(200, headers=headers, stream=_Body(body, fault))
        start = int(asked.removeprefix("bytes=").removesuffix("-"))
        content_range = fault.content_range or f"bytes {start}-{len(body) - 1}/{len(body)}"
        return httpx.Response(
            206, headers={**headers, "Content-Range": content_range}, stream=_Body(body[start:], fault)
        )


def as_json(descriptor: Descriptor) -> dict[str, Any]:
    return {"mediaType": descriptor.media_type, "digest": descriptor.digest, "size": descriptor.size_bytes}
