# SPDX-License-Identifier: Apache-2.0
"""Nodes for tests: an agent's parts in this process, on real loopback connections, with a store in memory.

    async with cluster(3, origin) as nodes:
        body = await nodes[0].read_blob(digest)

What a whole agent adds to a node (listening HTTP servers, signals, the disk) has tests of its own.
"""

from __future__ import annotations

import json
import os
import random
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from p2pdist.config import Address
from p2pdist.core.access import Policy
from p2pdist.core.chunkmap import MIN_CHUNK_BYTES
from p2pdist.core.pull import PullMachine
from p2pdist.core.types import Digest, Manifest, PeerId, Repository
from p2pdist.core.wire import VERSION, Hello, PeerAddress, Stored
from p2pdist.errors import NotFoundAtOrigin, OriginError
from p2pdist.exchange import Exchange
from p2pdist.gate import PUBLIC_TTL_S, Gate
from p2pdist.images import Images
from p2pdist.neighbours import Neighbourhood
from p2pdist.net.origin import OriginClient, RegistrySettings
from p2pdist.puller import Puller
from p2pdist.schedulers import Schedulers
from p2pdist.store.memory import MemoryStore
from p2pdist.tags import Resolver
from scheduler.config import SchedulerConfig
from scheduler.server import SchedulerServer
from tests.fake_registry import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, digest_of
from tests.fakes import FakeRelayed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from p2pdist.core.access import Caller
    from p2pdist.core.types import Home, ManifestInfo
    from p2pdist.ports import BlobReader, ChunkStore, Origin
    from p2pdist.tags import TagsFile
    from tests.fake_registry import FakeRegistry

REPOSITORY = Repository("reg.test", "lab/image")
PATIENCE_S = 300
"""Virtual or real, for what should be a moment."""


def origin_at(registry: FakeRegistry) -> OriginClient:
    """Return a client that takes REPOSITORY from this registry."""
    return OriginClient(
        {REPOSITORY.registry: RegistrySettings(registry.url)},
        allow_any=False,
        credentials=None,
        connections=16,
        rng=random.Random(1),
    )


class FakeOrigin:
    """An Origin in memory, which fails and hangs as it is told; several nodes may share it.

    Attributes:
        error: raised by every call.
        gate: where set, each call waits for it first.
        chunk_s: virtual seconds that each range takes.
        held: chunks that do not come before their event, by their start in whatever blob.
        breaks: where a request breaks off, once, by the chunk's start.
        blobs: what is served under each digest, right or wrong.
        asked: every call, `(method, what)`.
        known: what each head_manifest came with.
        public: whether its content has been read by everybody's rights.
        without: repositories that have none of the blobs.
        egress_bytes: bytes of blobs given out so far.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.gate: trio.Event | None = None
        self.chunk_s = 0.01
        self.held: dict[int, trio.Event] = {}
        self.breaks: set[int] = set()
        self.blobs: dict[Digest, bytes] = {}
        self.manifests: dict[str, Manifest] = {}
        self.asked: list[tuple[str, str]] = []
        self.known: list[ManifestInfo | None] = []
        self.public = True
        self.without: set[Repository] = set()
        self.egress_bytes = 0

    def add_blob(self, data: bytes) -> Digest:
        self.blobs[digest_of(data)] = data
        return digest_of(data)

    def add_image(self, tag: str, layers: list[bytes]) -> Digest:
        """Add an image of these layers with an empty config; return its manifest's digest."""
        entries = [
            {"mediaType": OCI_LAYER, "digest": self.add_blob(layer), "size": len(layer)} for layer in (b"{}", *layers)
        ]
        config = {**entries[0], "mediaType": OCI_CONFIG}
        document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": entries[1:]}
        manifest = Manifest(digest_of(json.dumps(document).encode()), OCI_MANIFEST, json.dumps(document).encode())
        self.manifests[tag] = self.manifests[manifest.digest] = manifest
        return manifest.digest

    def count(self, method: str) -> int:
        return sum(1 for asked, _ in self.asked if asked == method)

    async def head_manifest(
        self,
        repository: Repository,
        reference: str,
        *,
        known: ManifestInfo | None = None,
        caller: Caller | None = None,
        deadline_s: float | None = None,
    ) -> ManifestInfo:
        self.known.append(known)
        return (await self._manifest("head_manifest", reference)).info

    async def get_manifest(self, repository: Repository, reference: str) -> Manifest:
        return await self._manifest("get_manifest", reference)

    async def _manifest(self, method: str, reference: str) -> Manifest:
        await self._enter(method, reference)
        if reference not in self.manifests:
            raise NotFoundAtOrigin(f"{reference} is not here", status_code=404)
        return self.manifests[reference]

    async def blob_size(
        self,
        repository: Repository,
        digest: Digest,
        *,
        caller: Caller | None = None,
        deadline_s: float | None = None,
    ) -> int:
        await self._enter("blob_size", digest)
        return len(self._blob(digest))

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
        await self._enter("fetch", f"{digest}@{start}")
        if repository in self.without:
            raise NotFoundAtOrigin(f"{digest} is not in {repository}", status_code=404)
        data = self._blob(digest)[start : start + len(into)]
        for at in range(0, len(data), MIN_CHUNK_BYTES):
            await trio.sleep(self.chunk_s)
            if start + at in self.breaks:
                self.breaks.discard(start + at)
                raise OriginError("it broke off")
            if start + at in self.held:
                await self.held[start + at].wait()
            part = data[at : at + MIN_CHUNK_BYTES]
            self.egress_bytes += len(part)
            into[at : at + len(part)] = part
            progress(at + len(part))

    def _blob(self, digest: Digest) -> bytes:
        if digest not in self.blobs:
            raise NotFoundAtOrigin(f"{digest} is not here", status_code=404)
        return self.blobs[digest]

    async def relay(
        self, repository: Repository, target: str, accept: str, *, caller: Caller | None = None
    ) -> FakeRelayed:
        await self._enter("relay", target)
        return FakeRelayed(404)

    def lend(self, repository: Repository, caller: Caller) -> None:
        pass

    def is_public(self, repository: Repository) -> bool:
        return self.public

    async def _enter(self, method: str, what: str) -> None:
        self.asked.append((method, what))
        await trio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error


class _NodeGate(Gate):
    """A node's gate, which its `public` may close for peers."""

    def __init__(self, node: Node) -> None:
        self._node = node
        super().__init__(node.policy, node.origin, node.resolver, node.home_of, public_ttl_s=node.public_ttl_s)

    def is_anybodys(self, repository: Repository) -> bool:
        return self._node.public and super().is_anybodys(repository)


@dataclass
class Node:
    """One agent's parts.

    Args:
        public: whether what it pulls may be shared.
        ticks: False for a node that pulls nothing, where time that passes would be counted in ticks.
    """

    number: int
    origin: Origin
    store: ChunkStore = field(default_factory=lambda: MemoryStore(max_bytes=1 << 30))
    scheduler: tuple[str, int] | None = None
    more_schedulers: Sequence[tuple[str, int]] = ()
    degree: int = 20
    max_peers: int = 80
    site: str = ""
    public: bool = True
    policy: Policy = field(default_factory=Policy)
    tags_file: TagsFile | None = None
    public_ttl_s: float = PUBLIC_TTL_S
    prefetch: bool = True
    ticks: bool = True
    peer_id: PeerId = field(init=False)
    port: int = 0
    images: Images = field(init=False)
    puller: Puller = field(init=False)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    """Cancel it to kill the node."""

    def __post_init__(self) -> None:
        self.peer_id = PeerId(f"{self.number:032x}")
        rng = random.Random(self.number)
        self.machine = PullMachine(self.peer_id, rng)
        self.neighbourhood = Neighbourhood(self.hello, degree=self.degree, max_peers=self.max_peers)
        self.exchange = self.neighbourhood.exchange = Exchange(self.machine, self.neighbourhood.learn)
        addresses = [self.scheduler, *self.more_schedulers] if self.scheduler else []
        self.tracker = Schedulers(addresses, self.hello, self.exchange, rng) if addresses else None
        self.exchange.tracker = self.tracker

    @property
    def home_of(self) -> Callable[[Digest], Home | None]:
        return lambda digest: self.puller.home_of(digest)

    def hello(self) -> Hello:
        return Hello(VERSION, "lab", self.peer_id, self.port, self.site, "", "127.0.0.1")

    @property
    def address(self) -> PeerAddress:
        return PeerAddress(self.peer_id, "127.0.0.1", self.port, self.site)

    @property
    def peers(self) -> set[int]:
        """The numbers of the connected nodes."""
        return {int(peer, 16) for peer in self.exchange.links}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `scope` is cancelled; the store is left as it is."""
        listeners = await trio.open_tcp_listeners(self.port, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        with self.scope:
            try:
                await self._serve(listeners, task_status)
            finally:
                self.puller.close()

    async def _serve(self, listeners: list[trio.SocketListener], task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            self.resolver = Resolver(self.origin, nursery, self.policy, file=self.tags_file)
            self.gate = _NodeGate(self)
            self.puller = Puller(self.store, self.origin, self.exchange, nursery, sharing=self.gate)
            self.images = Images(self.store, self.origin, self.puller, self.gate, nursery, prefetch=self.prefetch)
            self.exchange.content = self.puller
            self.resolver.tracker = self.tracker
            self.exchange.on_ask = self.resolver.asked
            self.exchange.on_resolved = self.resolver.resolved
            self.exchange.on_scheduler = self.resolver.scheduler_changed
            if self.ticks:
                nursery.start_soon(self.exchange.tick)
            nursery.start_soon(self.neighbourhood.run)
            await nursery.start(trio.serve_listeners, self.neighbourhood.accept, listeners)
            if self.tracker is not None:
                self.tracker.on_connected = lambda: [Stored(list(self.store.digests(public_only=True)))]
                self.tracker.on_dropped = self.resolver.ask_again
                nursery.start_soon(self.tracker.run)
            task_status.started()

    def uses(self, count: int) -> bool:
        """Return whether so many schedulers count for this node."""
        return self.tracker is not None and len(self.tracker.connected) == count

    def meet(self, *others: Node) -> None:
        """Learn of other nodes, as by mDNS."""
        for other in others:
            self.neighbourhood.learn(other.address, "mdns")

    # ------------------------------------------------------------ as a runtime

    async def open(self, digest: Digest) -> BlobReader:
        return await self.images.open_blob(REPOSITORY, digest)

    async def read_blob(self, digest: Digest, start: int = 0, stop: int | None = None) -> bytes:
        """Return a blob, or a range of it, as a runtime reads it: in order, as it comes."""
        reader = await self.open(digest)
        try:
            return await read(reader, start, stop)
        finally:
            reader.close()

    async def manifest(self, reference: str) -> Manifest:
        return await self.images.manifest(REPOSITORY, reference)

    async def resolve(self, reference: str) -> ManifestInfo:
        return await self.images.resolve(REPOSITORY, reference)


async def read(reader: BlobReader, start: int = 0, stop: int | None = None) -> bytes:
    stop = reader.size_bytes if stop is None else stop
    body = b""
    while start < stop:
        end = await reader.available(start, stop)
        body += os.pread(reader.fileno(), end - start, start)
        start = end
    return body


@asynccontextmanager
async def running(*nodes: Node) -> AsyncIterator[None]:
    """Run nodes that know nothing of each other."""
    async with trio.open_nursery() as nursery:
        for node in nodes:
            await nursery.start(node.run)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def cluster(
    count: int,
    origin: Origin,
    *,
    scheduler: tuple[str, int] | None = None,
    more_schedulers: Sequence[tuple[str, int]] = (),
) -> AsyncIterator[list[Node]]:
    """Run `count` nodes on one origin that are all connected to each other, or, with schedulers, to all these."""
    nodes = [Node(number + 1, origin, scheduler=scheduler, more_schedulers=more_schedulers) for number in range(count)]
    with ExitStack() as stack:
        for node in nodes:
            stack.callback(node.store.close)
        async with running(*nodes):
            if scheduler is None:
                await connect_all(nodes)
            else:
                await eventually(lambda: all(node.uses(1 + len(more_schedulers)) for node in nodes))
            yield nodes


async def connect_all(nodes: list[Node]) -> None:
    """Make a full mesh, and let it settle, so that all know whom they share with."""
    for node in nodes:
        node.meet(*nodes)
    await eventually(lambda: all(len(node.peers) == len(nodes) - 1 for node in nodes))
    await trio.sleep(1)


@asynccontextmanager
async def running_scheduler(
    port: int = 0, own_id: PeerId | None = None, cluster: str = "lab"
) -> AsyncIterator[tuple[SchedulerServer, tuple[str, int], trio.CancelScope]]:
    """Run a scheduler's agent port; yield it, where it listens, and what ends it.

    Args:
        own_id: in the place of the one that it draws.
    """
    server = SchedulerServer(SchedulerConfig(listen=Address("127.0.0.1", 0), cluster=cluster))
    server.state.leading.own_id = own_id or server.state.leading.own_id
    server.state.leading.live = frozenset((server.state.leading.own_id,))
    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve_agents, listeners)
        try:
            yield server, ("127.0.0.1", listeners[0].socket.getsockname()[1]), nursery.cancel_scope
        finally:
            nursery.cancel_scope.cancel()


class _Watcher(trio.abc.Instrument):
    """Looks after every step of any task whether a condition holds."""

    def __init__(self, condition: Callable[[], bool]) -> None:
        self.met = trio.Event()
        self._condition = condition

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if not self.met.is_set() and self._condition():
            self.met.set()


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds; it is looked at whenever anything in this process has happened."""
    watcher = _Watcher(condition)
    trio.lowlevel.add_instrument(watcher)
    try:
        with trio.fail_after(PATIENCE_S):
            await watcher.met.wait()
    finally:
        trio.lowlevel.remove_instrument(watcher)


def descriptors() -> set[str]:
    """Return what this process has open, told apart by number and target."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{number}: {os.readlink(f'/proc/self/fd/{number}')}")
        except OSError:
            continue
    return found


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Fail if the body leaves anything open."""
    before = descriptors()
    yield
    left = descriptors() - before
    assert not left, left
