# SPDX-License-Identifier: Apache-2.0
"""An origin whose repositories have different readers, and what one tries who has no right to them."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

import pytest
import trio

from p2pdist.core.access import NOBODY, AccessRule, Caller, Policy
from p2pdist.core.chunkmap import MIN_CHUNK_BYTES
from p2pdist.core.types import Digest, Manifest, Repository
from p2pdist.errors import DeniedByOrigin, NotFoundAtOrigin, OriginError, P2PDistError
from p2pdist.store.memory import MemoryStore
from tests.fake_registry import digest_of
from tests.nodes import FakeOrigin, Node, eventually, read

if TYPE_CHECKING:
    from collections.abc import Callable

    from p2pdist.core.types import ManifestInfo
    from tests.fakes import FakeRelayed

TEAM, OPEN = Repository("reg.test", "team/app"), Repository("reg.test", "open")
LAYER = random.Random(12).randbytes(3 * MIN_CHUNK_BYTES)
ALICE, MALLORY, BOB = (Caller.of(f"Bearer {name}-canary") for name in ("alice", "mallory", "bob"))
PUBLIC_TTL_S = 20.0
ANYBODY, NODE = "anybody", "node"


class RightsOrigin(FakeOrigin):
    """A FakeOrigin in which repositories hold different things and have different readers.

    Attributes:
        readers: who may read a repository: ANYBODY, NODE (with this agent's credentials), authorization headers.
        content: the tags and digests that a repository has.
        requests: what reached it, `(method, repository, what)`, refused or not.
        lent: whose header fetches for a repository.
        mute: whether it says who may have what, but gives nothing.
        empty: repositories whose registry says that it has all there is, and has nothing.
        held_up: questions about this repository wait for the event.
    """

    def __init__(self) -> None:
        super().__init__()
        self.readers: dict[Repository, set[str]] = {}
        self.content: dict[Repository, set[str]] = {}
        self.requests: list[tuple[str, Repository, str]] = []
        self.lent: dict[Repository, Caller] = {}
        self.mute = False
        self.empty: set[Repository] = set()
        self.held_up: dict[Repository, trio.Event] = {}

    def add(self, repository: Repository, tag: str, layer: bytes, *readers: str) -> Digest:
        """Put an image into a repository, and say who may read that."""
        digest = self.add_image(f"{repository}:{tag}", [layer])
        self.manifests[digest] = self.manifests[f"{repository}:{tag}"]
        self.content.setdefault(repository, set()).update((tag, digest, digest_of(layer), digest_of(b"{}")))
        self.readers.setdefault(repository, set()).update(readers)
        return digest

    async def head_manifest(
        self,
        repository: Repository,
        reference: str,
        *,
        known: ManifestInfo | None = None,
        caller: Caller | None = None,
        deadline_s: float | None = None,
    ) -> ManifestInfo:
        self._judge("head", repository, reference, caller)
        if repository in self.held_up:
            await self.held_up[repository].wait()
        return (await self._manifest("head_manifest", self._name(repository, reference))).info

    async def get_manifest(self, repository: Repository, reference: str) -> Manifest:
        self._judge("get", repository, reference, self.lent.get(repository))
        return await self._manifest("get_manifest", self._name(repository, reference))

    async def blob_size(
        self,
        repository: Repository,
        digest: Digest,
        *,
        caller: Caller | None = None,
        deadline_s: float | None = None,
    ) -> int:
        self._judge("size", repository, digest, caller)
        return await super().blob_size(repository, digest)

    async def fetch(
        self,
        repository: Repository,
        digest: Digest,
        start: int,
        into: memoryview,
        *,
        blob_bytes: int,
        progress: Callable[[int], None],
    ) -> None:
        self._judge("fetch", repository, digest, self.lent.get(repository))
        await super().fetch(repository, digest, start, into, blob_bytes=blob_bytes, progress=progress)

    async def relay(
        self, repository: Repository, target: str, accept: str, *, caller: Caller | None = None
    ) -> FakeRelayed:
        self._judge("relay", repository, "v1", caller)
        return await super().relay(repository, target, accept, caller=caller)

    def lend(self, repository: Repository, caller: Caller) -> None:
        self.lent[repository] = caller

    def is_public(self, repository: Repository) -> bool:
        return ANYBODY in self.readers[repository]

    def _judge(self, method: str, repository: Repository, what: str, caller: Caller | None) -> None:
        self.requests.append((method, repository, what))
        if self.mute and method in ("get", "fetch"):
            raise OriginError("mute")
        if repository in self.empty:
            if method in ("get", "fetch"):
                raise NotFoundAtOrigin("404", status_code=404)
            return
        readers = self.readers.get(repository, set())
        shown = {ANYBODY, NODE if caller is None else caller.authorization}
        if self.error is None and not readers & shown:
            raise DeniedByOrigin(
                f"{repository} {what}: 401", status_code=401, challenges=('Bearer realm="https://auth.test"',)
            )
        if self.error is None and what not in self.content[repository]:
            raise NotFoundAtOrigin("404", status_code=404)

    @staticmethod
    def _name(repository: Repository, reference: str) -> str:
        return reference if ":" in reference else f"{repository}:{reference}"


def rules(*texts: str) -> Policy:
    return Policy(tuple(AccessRule.parse(text) for text in texts))


PASSTHROUGH = rules("reg.test/team/*=passthrough")
OF_NODE = rules("reg.test/team/*=node-credentials")


def node_of(origin: RightsOrigin, store: MemoryStore, policy: Policy, number: int = 1) -> Node:
    return Node(number, origin, store, policy=policy, public_ttl_s=PUBLIC_TTL_S)


async def pull(node: Node, repository: Repository, reference: str, caller: Caller = NOBODY) -> bytes:
    """Return the layer of an image, pulled as a runtime does, and wait until all is stored."""
    manifest = await node.images.manifest(repository, reference, caller)
    digest = Digest(json.loads(manifest.body)["layers"][0]["digest"])
    body = await blob(node, repository, digest, caller)
    await eventually(lambda: not node.puller.arrivals)
    return body


async def blob(node: Node, repository: Repository, digest: Digest, caller: Caller = NOBODY) -> bytes:
    reader = await node.images.open_blob(repository, digest, caller)
    try:
        return await read(reader)
    finally:
        reader.close()


async def expect_nothing(
    node: Node, repository: Repository, manifest: Digest, layer: Digest, caller: Caller = NOBODY, *, secret: bool = True
) -> None:
    """Try everything that the mirror offers to one who knows every name and digest."""
    images = node.images
    for ask in (
        lambda: images.resolve(repository, "v1", caller),
        lambda: images.resolve(repository, manifest, caller),
        lambda: images.manifest(repository, "v1", caller),
        lambda: images.manifest(repository, manifest, caller),
        lambda: images.blob_size(repository, layer, caller),
        lambda: images.open_blob(repository, layer, caller),
        lambda: images.open_blob(repository, manifest, caller),
        lambda: images.relay(repository, "tags/list", "*/*", caller),
    ):
        with pytest.raises((DeniedByOrigin, NotFoundAtOrigin)):
            await ask()
    assert (images.split(layer) is None) is secret


async def expect_refusals(node: Node, repository: Repository, manifest: Digest, layer: Digest) -> None:
    """Ask for content in a repository whose registry gives none of it."""
    for ask in (
        lambda: node.images.manifest(repository, manifest),
        lambda: blob(node, repository, layer),
        lambda: blob(node, repository, manifest),
    ):
        with pytest.raises(P2PDistError):
            await ask()
