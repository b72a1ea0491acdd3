# SPDX-License-Identifier: Apache-2.0
"""The agent: builds every part from the settings, runs them in one nursery, and takes them down in order.

The only place that knows the concrete store, origin, mirror and links. On SIGTERM or Ctrl-C: stop
accepting, let running responses end within the grace, leave the swarm, return.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import time
from contextlib import AsyncExitStack
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import structlog
import trio
from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

from p2pdist import __version__, listening, logs
from p2pdist.config import Address
from p2pdist.core import events as ev
from p2pdist.core.chunkmap import MAX_CHUNK_BYTES
from p2pdist.core.peerbook import MAX_PEERS_PER_DEGREE
from p2pdist.core.pull import PullMachine
from p2pdist.core.racks import place_of
from p2pdist.core.rate import TokenBucket, slots_within
from p2pdist.core.routes import Registries
from p2pdist.core.state import PullSettings
from p2pdist.core.types import parse_peer_id
from p2pdist.core.wire import SPAN_BYTES, VERSION, Hello, PeerAddress, Stored
from p2pdist.descriptors import connections_within
from p2pdist.errors import ConfigError, InvalidInput, PeerUnavailable, StoreError
from p2pdist.exchange import Exchange
from p2pdist.gate import Gate
from p2pdist.identity.keeper import stamp
from p2pdist.identity.refusals import Refusals
from p2pdist.identity.standing import EXPOSED, OFF, Standing, document, standing
from p2pdist.images import Images
from p2pdist.joining import keeper_of
from p2pdist.metrics import AgentCollector
from p2pdist.neighbours import Neighbourhood
from p2pdist.net.admin import Admin
from p2pdist.net.credentials import CredentialFiles
from p2pdist.net.http_messages import Limits
from p2pdist.net.http_server import HttpServer, open_listeners
from p2pdist.net.mdns import discovery
from p2pdist.net.mirror import Mirror, MirrorMetrics
from p2pdist.net.origin import OriginClient, RegistrySettings
from p2pdist.net.origin_connection import READ_BYTES
from p2pdist.puller import Puller
from p2pdist.reload import Reloader, read_when_used
from p2pdist.schedulers import Schedulers
from p2pdist.service import ServiceManager
from p2pdist.store.disk import DiskStore
from p2pdist.store.eviction import Limits as StoreLimits
from p2pdist.store.resolved import ResolvedTags
from p2pdist.tags import Resolver
from p2pdist.upkeep import Upkeep

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from p2pdist.config import AgentConfig
    from p2pdist.core.types import Digest, PeerId
    from p2pdist.identity.credentials import Identity
    from p2pdist.identity.keeper import Keeper
    from p2pdist.reload import Commit, Prepare

log = structlog.get_logger(__name__)

ORIGIN_CONNECTIONS = 16
ADMIN_CONNECTIONS = 32
WILDCARDS = ("0.0.0.0", "::")
STORED_AT_ONCE = 1000
"""Digests per Stored message to the scheduler."""
STOP_S = 5.0
"""For leaving the swarm and closing connections to origins, after the responses' grace."""


async def run(config: AgentConfig, load: Callable[[], AgentConfig] | None = None) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP puts in force what `load` then returns.

    Raises:
        ConfigError: an address cannot be listened on, or the data directory cannot be used.
        StoreError: another agent uses the data directory.
    """
    await Agent(config, load, await keeper_of(config)).run()


class Agent:
    """One agent and its parts."""

    def __init__(
        self, config: AgentConfig, load: Callable[[], AgentConfig] | None = None, keeper: Keeper | None = None
    ) -> None:
        self.settings = Reloader(config, load)
        self.started = time.monotonic()
        _make_directory(config.data_dir)
        limits = _store_limits(config)
        self.store = DiskStore(
            config.data_dir,
            max_bytes=limits.max_bytes,
            low_bytes=limits.low_bytes,
            min_free_bytes=limits.min_free_bytes,
            on_evicted=self._evicted,
        )
        self.upkeep = Upkeep(self.store, every_s=config.scrub_every_s, limit=_scrub_limit(config))
        self.keeper = keeper
        """None: this agent has no identity."""
        self.refusals = Refusals()
        self.peer_id = keeper.identity.name.peer_id if keeper is not None else _identity(config.data_dir)
        rng = random.Random()
        self.machine = PullMachine(self.peer_id, rng, _swarm_settings(config))
        self.neighbourhood = Neighbourhood(
            self._hello,
            degree=config.degree,
            max_peers=min(config.max_connections, MAX_PEERS_PER_DEGREE * config.degree),
            upload_limit=_bucket(config.upload_limit, SPAN_BYTES),
        )
        self.neighbourhood.refusals = self.refusals
        if keeper is not None:
            self.neighbourhood.identity = keeper.identity
        self.exchange = self.neighbourhood.exchange = Exchange(self.machine, self.neighbourhood.learn)
        self.tracker: Schedulers | None = None
        if config.scheduler:
            addresses = [(address.host, address.port) for address in config.scheduler]
            self.tracker = Schedulers(addresses, self._hello, self.exchange, rng)
            self.tracker.on_connected = self._what_is_stored
            self.exchange.tracker = self.tracker
            if keeper is not None:
                self.tracker.identify(keeper, self.refusals)
        self.metrics = CollectorRegistry()
        self.mirror_metrics = MirrorMetrics(self.metrics)
        self.mdns_state = "off"
        self.mirror_at, self.peers_at, self.admin_at = config.mirror_listen, config.peer_listen, config.admin_listen
        """Where it listens; while it runs, with the port that the system gave for a 0."""
        self._rng = rng
        self._token: trio.lowlevel.TrioToken | None = None
        self._service = ServiceManager(os.environ)

    @property
    def config(self) -> AgentConfig:
        """The settings in force; SIGHUP swaps them."""
        return self.settings.config

    @property
    def identity(self) -> Identity | None:
        """The certificate in force, and who is revoked; None: this agent has no identity."""
        return self.keeper.identity if self.keeper is not None else None

    @property
    def cluster(self) -> str:
        """Whom this agent belongs to: what its certificate says, else the setting."""
        return self.identity.name.cluster if self.identity is not None else self.config.cluster

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen, serve, and stop in order; the data directory is free again afterwards."""
        self._token = trio.lowlevel.current_trio_token()
        try:
            async with AsyncExitStack() as stack:
                await self._run(stack, task_status)
        finally:
            self.store.close()
        log.info("agent stopped")

    async def _run(self, stack: AsyncExitStack, task_status: trio.TaskStatus[None]) -> None:
        config = self.config
        mirrors, self.mirror_at = await _listen(stack, config.mirror_listen)
        peers, self.peers_at = await _listen(stack, config.peer_listen)
        admins, self.admin_at = await _listen(stack, config.admin_listen)
        origin = self._origin()
        stack.push_async_callback(_close_in_time, origin)
        async with trio.open_nursery() as nursery:
            images = self._images(origin, nursery)
            stack.callback(self.puller.close)
            self.metrics.register(AgentCollector(self, origin))
            ProcessCollector(registry=self.metrics)
            PlatformCollector(registry=self.metrics)
            mirror, admin = self._servers(images, origin)
            nursery.start_soon(self.exchange.tick)
            nursery.start_soon(self.upkeep.run)
            nursery.start_soon(self.neighbourhood.run)
            if self.keeper is not None:
                nursery.start_soon(self.keeper.run)
            nursery.start_soon(listening.serve, self.neighbourhood.accept, peers)
            if self.tracker is not None:
                nursery.start_soon(self.tracker.run)
            if config.mdns:
                nursery.start_soon(self._discover)
            nursery.start_soon(admin.serve, admins)
            log.info(
                "agent listens",
                mirror=str(self.mirror_at),
                peers=str(self.peers_at),
                admin=str(self.admin_at),
                peer_id=self.peer_id,
            )
            self._say_what_is_shared()
            async with trio.open_nursery() as serving:
                await serving.start(self._heed_signals, mirror)
                nursery.start_soon(self._service.watch, self._state_line)
                task_status.started()
                self._service.ready()
                await mirror.serve(mirrors)
                serving.cancel_scope.cancel()
            await self._leave()
            nursery.cancel_scope.cancel()

    def _servers(self, images: Images, origin: OriginClient) -> tuple[HttpServer, HttpServer]:
        config = self.config
        mirror = Mirror(
            images,
            config.registries,
            config.default_registry,
            any_registry=config.allow_any_registry,
            metrics=self.mirror_metrics,
        )
        self.settings.live.update(self._live(origin, mirror, images))
        admin = Admin(self.metrics, self.ready, self.status, names=[config.admin_listen.host])
        return (
            HttpServer(mirror, Limits(connections=connections_within(config.max_connections))),
            HttpServer(admin, Limits(connections=ADMIN_CONNECTIONS)),
        )

    def _live(self, origin: OriginClient, mirror: Mirror, images: Images) -> dict[str, Prepare[AgentConfig]]:
        """Return how each setting comes into force that SIGHUP may change; the others wait for a restart."""

        def registries(new: AgentConfig) -> Commit:
            replaced = origin.replacing(_registry_settings(new), allow_any=new.allow_any_registry)

            def commit() -> None:
                replaced()
                mirror.registries = Registries(frozenset(new.registries), new.default_registry, new.allow_any_registry)

            return commit

        def swarm(new: AgentConfig) -> Commit:
            def commit() -> None:
                self.machine.tune(_swarm_settings(new))
                self.neighbourhood.limit_uploads(_bucket(new.upload_limit, SPAN_BYTES))

            return commit

        return {
            "registries": registries,
            "allow_any_registry": registries,
            "default_registry": registries,
            "access": self._policy,
            "tags": self._policy,
            "docker_config": self._policy,
            "tag_ttl_s": lambda new: partial(setattr, self.resolver, "ttl_s", new.tag_ttl_s),
            "public_ttl_s": lambda new: partial(setattr, self.gate, "public_ttl_s", new.public_ttl_s),
            "prefetch": lambda new: partial(setattr, images, "prefetch", new.prefetch),
            "store_max": self._store_room,
            "store_low": self._store_room,
            "store_min_free": self._store_room,
            "scrub_every_s": lambda new: partial(setattr, self.upkeep, "every_s", new.scrub_every_s),
            "scrub_limit": lambda new: partial(
                setattr, self.upkeep, "limit", _bucket(new.scrub_limit, MAX_CHUNK_BYTES)
            ),
            "upload_slots": swarm,
            "downloads": swarm,
            "upload_limit": swarm,
            "download_limit": swarm,
            "origin_limit": lambda new: partial(setattr, origin, "limit", _bucket(new.origin_limit, READ_BYTES)),
            "log_level": _logging,
            "log_format": _logging,
            "shutdown_grace_s": read_when_used,
        }

    def _policy(self, new: AgentConfig) -> Commit:
        return partial(self.gate.set_policy, new.policy)

    def _store_room(self, new: AgentConfig) -> Commit:
        return partial(self.store.limit, _store_limits(new))

    def _images(self, origin: OriginClient, nursery: trio.Nursery) -> Images:
        """Build what answers the mirror, and join it to the exchange."""
        config = self.config
        file = ResolvedTags(config.data_dir)
        self.resolver = Resolver(origin, nursery, config.policy, ttl_s=config.tag_ttl_s, file=file)
        self.gate = Gate(
            config.policy,
            origin,
            self.resolver,
            lambda digest: self.puller.home_of(digest),
            public_ttl_s=config.public_ttl_s,
        )
        self.puller = self.exchange.content = Puller(self.store, origin, self.exchange, nursery, sharing=self.gate)
        self.images = Images(self.store, origin, self.puller, self.gate, nursery, prefetch=config.prefetch)
        self.resolver.tracker = self.tracker
        self.exchange.on_ask = self.resolver.asked
        self.exchange.on_resolved = self.resolver.resolved
        self.exchange.on_scheduler = self.resolver.scheduler_changed
        if self.tracker is not None:
            self.tracker.on_dropped = self.resolver.ask_again
        return self.images

    def _origin(self) -> OriginClient:
        config = self.config
        return OriginClient(
            _registry_settings(config),
            allow_any=config.allow_any_registry,
            credentials=CredentialFiles(lambda: self.config.docker_config),
            connections=ORIGIN_CONNECTIONS,
            rng=self._rng,
            limit=_bucket(config.origin_limit, READ_BYTES),
            rule_of=lambda repository: self.config.policy.access_to(repository),
        )

    def _say_what_is_shared(self) -> None:
        if self.identity is not None:
            ends = stamp(self.identity.credential.not_after)
            log.info("cluster identity", name=str(self.identity.name), ends=ends)
        else:
            log.info("no cluster identity: peers are not authenticated, and share what anybody may read")
        for rule in self.config.access:
            if rule.share:
                where = f"{rule.registry}/{rule.repository}"
                whom = "every agent of the cluster" if self.keeper is not None else "whoever reaches the peer port"
                log.warning(f"private content is given to {whom} (share = true)", images=where)
        if self.config.docker_config is not None and not any(
            rule.mode == "node-credentials" and rule.credentials is None for rule in self.config.access
        ):
            log.warning(
                "docker_config is not used: no [[access]] rule has mode = 'node-credentials'; see docs/access.md"
            )

    # --------------------------------------------------------------- running

    async def _heed_signals(
        self, mirror: HttpServer, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            task_status.started()
            async for number in signals:
                if number == signal.SIGHUP:
                    self._service.reloading()
                    self.settings.reload()
                    if self.keeper is not None:
                        self.keeper.reload()
                    self._service.ready()
                    continue
                grace_s = self.config.shutdown_grace_s
                log.info("agent stops", signal=signal.Signals(number).name, grace_s=grace_s)
                self._service.stopping(grace_s + 2 * STOP_S)
                mirror.stop(grace_s)
                return

    def _state_line(self) -> str:
        """Return what `systemctl status` shows."""
        parts = self.ready()[1]
        return f"{parts['peers']} peers, {len(self.puller.arrivals)} blobs on their way, scheduler {parts['scheduler']}"

    async def _leave(self) -> None:
        """Let the peers and the scheduler see a clean end; they do without us at once."""
        for link in list(self.exchange.links.values()):
            link.close("the agent stops")
        await trio.lowlevel.checkpoint()

    async def _discover(self) -> None:
        """Announce and find peers by mDNS; where that does not work, say so and go on."""
        advertised = self._advertised()
        own = PeerAddress(self.peer_id, advertised.host, advertised.port, self.config.site, self.config.rack)
        try:
            async with discovery(own, self.cluster, lambda address: self.neighbourhood.learn(address, "mdns")):
                self.mdns_state = "on"
                await trio.sleep_forever()
        except PeerUnavailable as error:
            self.mdns_state = str(error)
            log.warning("peers are not looked for by mDNS", why=str(error))

    def _advertised(self) -> Address:
        """Return where peers should dial; an empty host leaves it to whoever sees our connection's source."""
        text, listened = self.config.advertise, self.config.peer_listen.host
        if text is None:
            return Address("" if listened in WILDCARDS else listened, self.peers_at.port)
        try:
            return Address.parse(text)
        except ValueError:
            return Address(text.strip("[]"), self.peers_at.port)

    def _hello(self) -> Hello:
        advertised = self._advertised()
        return Hello(
            VERSION,
            self.cluster,
            self.peer_id,
            advertised.port,
            self.config.site,
            self.config.rack,
            advertised.host,
            __version__,
        )

    def _what_is_stored(self) -> list[Stored]:
        digests = list(self.store.digests(public_only=True))
        return [Stored(digests[at : at + STORED_AT_ONCE]) for at in range(0, len(digests), STORED_AT_ONCE)]

    def _evicted(self, digest: Digest) -> None:
        """Stop announcing an evicted blob; the store calls this from whatever thread made room."""
        if self._token is not None:
            self._token.run_sync_soon(self._forget_evicted, digest)

    def _forget_evicted(self, digest: Digest) -> None:
        if digest not in self.puller.arrivals and not self.store.contains(digest):
            self.exchange.feed(ev.BlobEvicted(blob=digest))

    # ---------------------------------------------------------------- status

    def ready(self) -> tuple[bool, dict[str, object]]:
        """Return whether runtimes can be served, and the state of each part."""
        return True, {
            "mirror": "ok",
            "store": self.upkeep.failing or "ok",
            "scheduler": "not configured" if self.tracker is None else self.tracker.summary(),
            "mdns": self.mdns_state,
            "identity": str(self.identity_standing()),
            "peers": len(self.exchange.links),
        }

    def identity_standing(self) -> Standing:
        """Return how it stands with this agent's certificate."""
        if self.keeper is not None:
            return standing(self.keeper.identity, self.keeper.trouble, time.time())
        return EXPOSED if any(rule.share for rule in self.config.access) else OFF

    def status(self) -> dict[str, object]:
        """Return what `p2pdist status --json` prints."""
        counters, tracker, stored = self.machine.counters, self.tracker, self.store.statistics()
        now = self.machine.state.now
        return {
            "version": __version__,
            "peer_id": self.peer_id,
            "uptime_s": round(time.monotonic() - self.started, 1),
            "cluster": self.cluster,
            "identity": document(self.identity, self.identity_standing(), self.refusals),
            "site": self.config.site,
            "rack": self.config.rack,
            "mirror": str(self.mirror_at),
            "mdns": self.mdns_state,
            "data_dir": str(self.config.data_dir),
            "data_dir_writable": os.access(self.config.data_dir, os.W_OK | os.X_OK, effective_ids=True),
            "registries": {
                name: {"url": entry.url, "ca_file": str(entry.ca_file) if entry.ca_file else None}
                for name, entry in self.config.registries.items()
            },
            "peers": [self._peer_status(peer_id) for peer_id in self.exchange.links],
            "banned": [
                {
                    "peer_id": peer_id,
                    "host": record.host,
                    "reason": record.reason,
                    "for_s": round(record.until - now, 1),
                }
                for peer_id, record in self.machine.book.reputation.banned(now).items()
            ],
            "scheduler": {
                "configured": [str(address) for address in self.config.scheduler],
                "connected": bool(tracker and tracker.connected),
                "address": ", ".join(tracker.connected) or None if tracker is not None else None,
                "each": [asdict(standing) for standing in tracker.status()] if tracker is not None else [],
            },
            "store": {**stored, "max_bytes": _store_limits(self.config).max_bytes},
            "pulls": [
                {
                    "digest": arrival.digest,
                    "image": str(arrival.repository),
                    "size_bytes": arrival.chunks.size_bytes if arrival.chunks is not None else None,
                    "have_bytes": arrival.from_earlier + arrival.from_peers + arrival.from_origin,
                    "from_peers": arrival.from_peers,
                    "from_origin": arrival.from_origin,
                }
                for arrival in list(self.puller.arrivals.values())
            ],
            "bytes": {
                "to_runtime": self.mirror_metrics.sent_bytes,
                "from_peers": counters.from_peers,
                "from_origin": counters.from_origin,
                "to_peers": counters.to_peers,
                "duplicate": counters.duplicate,
            },
            "images_pulled": self.images.pulled,
            "access": {"rules": len(self.config.access), "checks": self.gate.checks, "refused": self.gate.refused},
            "control_bytes": self.control_bytes(),
            "tasks": trio.lowlevel.current_statistics().tasks_living,
        }

    def control_bytes(self) -> int:
        """Return the bytes of messages sent to peers and the scheduler so far."""
        links = sum(link.control_bytes for link in self.exchange.links.values())
        return self.exchange.control_bytes + links + (self.tracker.control_bytes if self.tracker is not None else 0)

    def _peer_status(self, peer_id: PeerId) -> dict[str, object]:
        link, peer = self.exchange.links[peer_id], self.machine.book.peers[peer_id]
        return {
            "peer_id": peer_id,
            "address": link.address,
            "site": link.hello.site,
            "rack": link.hello.rack,
            "version": link.hello.software,
            "source": link.source,
            "up_bytes": peer.up_bytes,
            "down_bytes": peer.down_bytes,
        }


async def _listen(stack: AsyncExitStack, address: Address) -> tuple[list[trio.SocketListener], Address]:
    """Return the listeners, which the stack closes, and the address with the port that it came to."""
    listeners = await open_listeners(address.host, address.port)
    for listener in listeners:
        stack.push_async_callback(trio.aclose_forcefully, listener)
    return listeners, Address(address.host, listeners[0].socket.getsockname()[1])


async def _close_in_time(origin: OriginClient) -> None:
    with trio.move_on_after(STOP_S, shield=True):
        await origin.aclose()


def _make_directory(data_dir: Path) -> None:
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"data_dir: {data_dir} cannot be used: {error.strerror}; choose another directory") from error


def _store_limits(config: AgentConfig) -> StoreLimits:
    """Return the store's watermarks; without `store_max` 80% of the file system."""
    maximum = config.store_max or int(0.8 * shutil.disk_usage(config.data_dir).total)
    return StoreLimits(maximum, int(config.store_low * maximum), config.store_min_free)


def _swarm_settings(config: AgentConfig) -> PullSettings:
    upload = config.upload_limit
    return PullSettings(
        upload_slots=slots_within(upload, config.upload_slots) if upload else config.upload_slots,
        downloads=config.downloads,
        download_bytes_per_s=config.download_limit,
        rack=place_of(config.site, config.rack),
    )


def _bucket(bytes_per_s: int, largest_bytes: int) -> TokenBucket | None:
    """Return what holds a stream to a limit; 0 is none."""
    return TokenBucket.smooth(bytes_per_s, largest_bytes) if bytes_per_s else None


def _scrub_limit(config: AgentConfig) -> TokenBucket | None:
    return _bucket(config.scrub_limit, MAX_CHUNK_BYTES)


def _registry_settings(config: AgentConfig) -> dict[str, RegistrySettings]:
    return {name: RegistrySettings(entry.url, entry.ca_file) for name, entry in config.registries.items()}


def _logging(new: AgentConfig) -> Commit:
    return partial(logs.configure, new.log_level, new.log_format)


def _identity(data_dir: Path) -> PeerId:
    """Return the agent's id, drawn at the first start and kept beside its blobs."""
    path = data_dir / "peer_id"
    try:
        return parse_peer_id(path.read_text().strip())
    except (FileNotFoundError, InvalidInput, UnicodeDecodeError):
        peer_id = parse_peer_id(secrets.token_hex(16))
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    try:
        fresh = path.with_suffix(".new")
        fresh.write_text(peer_id + "\n")
        os.replace(fresh, path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}") from error
    return peer_id
