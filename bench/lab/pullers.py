# SPDX-License-Identifier: Apache-2.0
"""Clients that pull an image as containerd does, check every digest and keep nothing.

The order is containerd's: HEAD of the tag, the manifest (through an index, the child for linux/amd64) by digest, then
the config and up to three layers at once, each on a kept-alive connection. They never retry and never fall
back to the origin: what a real runtime would paper over counts as a failed pull here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import trio

from bench.lab.http import Head, HttpConnection, HttpFailure

if TYPE_CHECKING:
    from collections.abc import Collection

    from bench.lab.hosts import Host

_LAYERS_AT_ONCE = 3
"""containerd's max_concurrent_downloads."""

_READ_BYTES = 256 << 10
_INDEX_TYPES = {
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
}
_ACCEPT_ANY = (
    "application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json, "
    "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, */*"
)
_AGENT = "containerd/1.6.20~ds1"


@dataclass(frozen=True, slots=True)
class Source:
    """Where to pull from.

    Args:
        base_url: of the registry or mirror, `http://HOST:PORT`.
        ns: the registry that the mirror stands for, sent as `?ns=`; None when asking that registry itself.
    """

    base_url: str
    ns: str | None = None

    def target(self, repository: str, kind: str, reference: str) -> str:
        query = f"?ns={self.ns.replace(':', '%3A')}" if self.ns else ""
        return f"/v2/{repository}/{kind}/{reference}{query}"


@dataclass(slots=True)
class Pull:
    """How one pull goes, readable while it runs. Times are trio's clock, in seconds."""

    node: str
    started_s: float | None = None
    finished_s: float | None = None
    total_bytes: int = 0
    """Of manifest, config and layers; 0 until the manifest is here."""
    done_bytes: int = 0
    error: str | None = None
    ttfb_s: list[float] = field(default_factory=list)
    """For each blob, from sending the request to the first byte of the body."""

    @property
    def ended(self) -> bool:
        return self.finished_s is not None

    @property
    def right(self) -> bool:
        """Whether all bytes arrived and matched their digests."""
        return self.ended and self.error is None


class _PullError(Exception):
    """What arrived is not what was asked for."""


async def pull(
    record: Pull,
    host: Host,
    source: Source,
    repository: str,
    reference: str,
    *,
    deadline_s: float,
    held: Collection[str] = (),
) -> None:
    """Pull an image from `host` and note all about it in `record`; raises nothing but Cancelled.

    Args:
        deadline_s: after this many seconds the pull counts as failed.
        held: digests of layers that the runtime has from before and does not ask for.
    """
    record.started_s = trio.current_time()
    try:
        with trio.move_on_after(deadline_s) as deadline:
            await _Client(record, host, source, repository, held).pull(reference)
        if deadline.cancelled_caught:
            record.error = f"not finished after {deadline_s:.0f} s"
    except (HttpFailure, _PullError) as error:
        record.error = str(error)
    record.finished_s = trio.current_time()


class _Client:
    def __init__(self, record: Pull, host: Host, source: Source, repository: str, held: Collection[str]) -> None:
        self._held = held
        self._record = record
        self._host = host
        self._source = source
        self._repository = repository

    async def pull(self, reference: str) -> None:
        async with self._connect() as connection:
            manifest = await self._resolve(connection, reference)
        waiting = [layer for layer in reversed(manifest["layers"]) if layer["digest"] not in self._held]
        self._record.total_bytes += manifest["config"]["size"] + sum(layer["size"] for layer in waiting)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._work, [manifest["config"]], nursery.cancel_scope)
            for _ in range(_LAYERS_AT_ONCE):
                nursery.start_soon(self._work, waiting, nursery.cancel_scope)
        if self._record.error:
            raise _PullError(self._record.error)

    def _connect(self) -> HttpConnection:
        return HttpConnection(self._host, self._source.base_url)

    async def _resolve(self, connection: HttpConnection, reference: str) -> dict[str, Any]:
        target = self._source.target(self._repository, "manifests", reference)
        head = await self._request(connection, "HEAD", target, _ACCEPT_ANY)
        digest, media_type = head.headers.get("docker-content-digest", ""), head.headers.get("content-type", "")
        manifest = await self._manifest(connection, digest, media_type)
        if media_type in _INDEX_TYPES:
            child = _child_for_amd64(manifest)
            manifest = await self._manifest(connection, child["digest"], child["mediaType"])
        return manifest

    async def _manifest(self, connection: HttpConnection, digest: str, media_type: str) -> dict[str, Any]:
        target = self._source.target(self._repository, "manifests", digest)
        await self._request(connection, "GET", target, f"{media_type}, */*")
        body = await connection.read_all()
        _compare(digest, f"sha256:{hashlib.sha256(body).hexdigest()}")
        self._record.total_bytes += len(body)
        self._record.done_bytes += len(body)
        content: dict[str, Any] = json.loads(body)
        return content

    async def _work(self, waiting: list[dict[str, Any]], others: trio.CancelScope) -> None:
        """Fetch blobs until none waits; the first failure ends the others."""
        try:
            async with self._connect() as connection:
                while waiting:
                    await self._blob(connection, waiting.pop())
        except (HttpFailure, _PullError) as error:
            self._record.error = self._record.error or str(error)
            others.cancel()

    async def _blob(self, connection: HttpConnection, descriptor: dict[str, Any]) -> None:
        digest: str = descriptor["digest"]
        target = self._source.target(self._repository, "blobs", digest)
        asked_s = trio.current_time()
        head = await self._request(connection, "GET", target, f"{descriptor['mediaType']}, */*")
        if head.content_bytes != descriptor["size"]:
            raise _PullError(f"{digest}: {head.content_bytes} bytes announced, the manifest says {descriptor['size']}")
        sha256 = hashlib.sha256()
        buffer = memoryview(bytearray(_READ_BYTES))
        first = True
        while count := await connection.read_into(buffer):
            if first:
                self._record.ttfb_s.append(trio.current_time() - asked_s)
                first = False
            sha256.update(buffer[:count])
            self._record.done_bytes += count
        _compare(digest, f"sha256:{sha256.hexdigest()}")

    @staticmethod
    async def _request(connection: HttpConnection, method: str, target: str, accept: str) -> Head:
        fields = {"User-Agent": _AGENT, "Accept": accept, "Accept-Encoding": "gzip"}
        head = await connection.request(method, target, fields)
        if head.status_code != 200:
            said = await connection.read_all()
            raise _PullError(f"{method} {target}: status {head.status_code} {said[:200].decode(errors='replace')}")
        return head


def _child_for_amd64(index: dict[str, Any]) -> dict[str, Any]:
    for child in index["manifests"]:
        platform = child.get("platform", {})
        if (platform.get("os"), platform.get("architecture")) == ("linux", "amd64"):
            return dict(child)
    raise _PullError("the index names no image for linux/amd64")


def _compare(digest: str, actual: str) -> None:
    if digest != actual:
        raise _PullError(f"asked for {digest}, got {actual}")
