# SPDX-License-Identifier: Apache-2.0
"""The agent's client to the upstream registries: `ports.Origin` over HTTP/1.1.

Owns: what is asked of a registry and what its answers are worth. `origin_upstream` gets the answers,
`origin_auth` says what to show for them, `origin_transport` connects. Refuses to store, to verify blobs
(a range cannot be) and to follow the `urls` of foreign layers.

Invariants: every wait has a deadline; a body that is longer or shorter than it must be is an error and
its connection is closed; where a blob was redirected to is kept for seconds, in memory, and is in no error
text; after a cancelled call none of its connections is open.
"""

from __future__ import annotations

import functools
import re
import ssl
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from p2pdist.core import oci
from p2pdist.core.access import PUBLIC, AccessRule
from p2pdist.core.addresses import is_ip_literal
from p2pdist.core.retry import RETRYABLE_STATUSES
from p2pdist.core.types import Digest, Manifest, ManifestInfo, Repository, parse_digest
from p2pdist.core.verify import digest_like
from p2pdist.errors import ConfigError, IntegrityError, InvalidInput, NotFoundAtOrigin, OriginError
from p2pdist.net.origin_transport import Answer, Transport
from p2pdist.net.origin_upstream import SMALL_BYTES_MAX, Deadlines, Upstream, parse_base_url
from p2pdist.net.origin_window import CONTENT_RANGE, Window, length_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from random import Random

    import httpx

    from p2pdist.core.access import Caller
    from p2pdist.core.rate import TokenBucket
    from p2pdist.net.credentials import CredentialSource
    from p2pdist.net.origin_connection import Headers

_LOCATIONS_MAX = 1024
_UNLISTED_MAX = 256
_RESERVED_CONNECTIONS = 8
"""Connections beyond those for ranges of blobs, so that a manifest never waits behind them."""
_HEAD_REFUSED = (400, 405, 501)

_ACCEPT_MANIFESTS = (b"Accept", ", ".join((*oci.MANIFEST_TYPES, "*/*")).encode())
"""As containerd has it: a manifest of any other kind too is the runtime's to judge."""
_MEDIA_TYPE = re.compile(r"[!-:<-~]{1,255}")
_RELAYED = re.compile(r"(?:tags/list|referrers/(?:sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}))(?:\?[!-~]{0,1000})?")
_RELAYED_HEADERS = ("Content-Type", "Docker-Content-Digest", "OCI-Filters-Applied")
_LINK = re.compile(r"<(?P<url>[!-;=?-~]*)>(?P<rest>[ -~]*)")


@dataclass(frozen=True, slots=True)
class RegistrySettings:
    """Where a registry is: its base URL, and a file of CAs that are trusted beside the system's.

    `hosts` may be dialled for it wherever they are; others, only where they are public.
    """

    url: str
    ca_file: Path | None = None
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Origin(RegistrySettings):
    """The same with what the CA file said: what an upstream is made from."""

    pem: bytes | None = None


@dataclass(frozen=True, slots=True)
class Relayed:
    """See `ports.RelayedResponse`."""

    status_code: int
    headers: list[tuple[str, str]]
    body: bytes


def default_url(registry: str) -> str:
    """Return the base URL of a public registry by its name."""
    return "https://registry-1.docker.io" if registry == "docker.io" else f"https://{registry}"


class OriginClient:
    """All configured registries; see `ports.Origin` for the calls.

    Args:
        registries: by the name that runtimes use.
        allow_any: also serve other names, each as `https://NAME`, provided it is a public DNS name: it has
            a dot, is no address, and all addresses that it resolves to are global unicast. That is checked
            on the very addresses that are then dialled, for the name, its token service and every redirect.
        credentials: asked where a registry does not serve anonymously and the repository's rule is `node-credentials`.
        connections: the most connections that fetch ranges at once, all registries together.
        limit: what all fetches together may receive of blobs; manifests are not limited.
        rng: for the jitter of retries.
        rule_of: says whose rights count for a repository; without it the node's where it has credentials.

    Raises:
        ConfigError: a URL or CA file that cannot be used.
    """

    def __init__(
        self,
        registries: Mapping[str, RegistrySettings],
        *,
        allow_any: bool,
        credentials: CredentialSource | None,
        connections: int,
        rng: Random,
        deadlines: Deadlines | None = None,
        limit: TokenBucket | None = None,
        rule_of: Callable[[Repository], AccessRule] | None = None,
    ) -> None:
        self.limit = limit
        """May be replaced at any time; what is being fetched keeps to the old one."""
        own = PUBLIC if credentials is None else AccessRule(mode="node-credentials")
        self._rule_of = rule_of or (lambda _repository: own)
        self._allow_any = allow_any
        self._credentials = credentials
        self._connections = connections
        self._rng = rng
        self._deadlines = deadlines or Deadlines()
        self._slots = trio.CapacityLimiter(connections)
        self._transports: dict[tuple[bytes | None, bool], Transport] = {}
        """By the CAs that are trusted and whether only public addresses are dialled; open until the end."""
        self._configured: dict[str, Upstream] = {}
        self._made_from: dict[str, _Origin] = {}
        self._unlisted: dict[str, Upstream] = {}
        self._locations: dict[tuple[Repository, Digest], tuple[float, httpx.URL]] = {}
        self.replacing(registries, allow_any=allow_any)()

    def replacing(self, registries: Mapping[str, RegistrySettings], *, allow_any: bool) -> Callable[[], None]:
        """Return what puts these registries in the place of the present ones.

        One that stays as it is keeps its connections, tokens and counts; a CA file is read again. A range that is
        being fetched from one that goes is fetched to its end.

        Raises:
            ConfigError: as at the start; the present ones stay.
        """
        wanted = {name: _origin(name, settings) for name, settings in registries.items()}
        upstreams = {
            name: self._configured[name] if self._made_from.get(name) == origin else self._build(name, origin)
            for name, origin in wanted.items()
        }

        def replace() -> None:
            self._configured, self._made_from, self._allow_any = upstreams, wanted, allow_any
            kept = self._unlisted if allow_any else {}
            self._unlisted = {name: upstream for name, upstream in kept.items() if name not in upstreams}
            self._locations.clear()

        return replace

    async def head_manifest(
        self,
        repository: Repository,
        reference: str,
        *,
        known: ManifestInfo | None = None,
        caller: Caller | None = None,
        deadline_s: float | None = None,
    ) -> ManifestInfo:
        """See `ports.Origin`; asks by GET where HEAD is refused or its answer lacks something."""
        upstream, url = self._locate(repository, f"manifests/{oci.parse_reference(reference)}")
        headers = [_ACCEPT_MANIFESTS]
        if known is not None:
            headers.append((b"If-None-Match", f'"{known.digest}"'.encode()))

        async def once() -> ManifestInfo | None:
            answer = await upstream.ask(repository, "HEAD", url, headers, caller=caller)
            async with aclosing(answer):
                await answer.read(0)
                if answer.status in _HEAD_REFUSED:
                    return None
                if answer.status == 304 and known is not None:
                    return known
                await upstream.expect(answer, repository, 200)
                return _manifest_info(answer, reference)

        what = f"{repository} {reference}"
        info = await upstream.retrying(what, once, deadline_s or self._deadlines.manifest_s)
        if info is None:
            info = (await self.get_manifest(repository, reference, caller=caller, deadline_s=deadline_s)).info
        return info

    async def get_manifest(
        self,
        repository: Repository,
        reference: str,
        *,
        caller: Caller | None = None,
        deadline_s: float | None = None,
    ) -> Manifest:
        """See `ports.Origin`."""
        upstream, url = self._locate(repository, f"manifests/{oci.parse_reference(reference)}")
        what = f"{repository} {reference}"

        async def once() -> Manifest:
            answer = await upstream.ask(repository, "GET", url, [_ACCEPT_MANIFESTS], caller=caller)
            async with aclosing(answer):
                await upstream.expect(answer, repository, 200)
                return _manifest(answer, await _small_body(answer, upstream), reference, what)

        return await upstream.retrying(what, once, deadline_s or self._deadlines.manifest_s)

    async def blob_size(
        self,
        repository: Repository,
        digest: Digest,
        *,
        caller: Caller | None = None,
        deadline_s: float | None = None,
    ) -> int:
        """See `ports.Origin`; asks for one byte where HEAD does not tell, and counts where that does not either."""
        upstream, url = self._locate(repository, f"blobs/{parse_digest(digest)}")

        async def once() -> int:
            answer = await upstream.ask(repository, "HEAD", url, [], caller=caller)
            async with aclosing(answer):
                await answer.read(0)
                length = length_of(answer)
                if answer.status == 200 and length is not None:
                    return length
                # A signed redirect is often good for GET alone: its refusal of a HEAD says nothing.
                if upstream.is_at(answer.url) and answer.status not in _HEAD_REFUSED:
                    await upstream.expect(answer, repository, 200)
            return await self._size_by_range(upstream, repository, digest, url, caller)

        return await upstream.retrying(f"{repository}@{digest}", once, deadline_s or self._deadlines.manifest_s)

    async def _size_by_range(
        self, upstream: Upstream, repository: Repository, digest: Digest, url: httpx.URL, caller: Caller | None
    ) -> int:
        answer = await upstream.ask(repository, "GET", url, [(b"Range", b"bytes=0-0")], caller=caller)
        async with aclosing(answer):
            said = CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
            if answer.status in (206, 416) and said and said[3] != "*":
                self._remember(upstream, repository, digest, answer)
                await answer.read(SMALL_BYTES_MAX)
                return int(said[3])
            await upstream.expect(answer, repository, 200)
            length = length_of(answer)
            if length is not None:
                return length
            # Nobody says how long it is: read it through. The deadline bounds that; the runtime then asks the origin.
            length = 0
            async for part in answer:
                length += len(part)
                upstream.counters.bytes += len(part)
            return length

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
        """See `ports.Origin`; a try that broke off is continued where it stopped."""
        if not 0 <= start <= start + len(into) <= blob_bytes:
            raise ValueError(f"bytes {start} to {start + len(into)} of a blob of {blob_bytes}")
        upstream, url = self._locate(repository, f"blobs/{parse_digest(digest)}")
        window = Window(into, start, blob_bytes, progress)

        async def once() -> None:
            async with self._slots:
                if not window.full:
                    await self._fetch_once(upstream, repository, digest, url, window)

        await upstream.retrying(f"{repository}@{digest}", once, self._deadlines.fetch_s)

    async def _fetch_once(
        self, upstream: Upstream, repository: Repository, digest: Digest, url: httpx.URL, window: Window
    ) -> None:
        headers = [(b"Range", b"bytes=%d-%d" % (window.position, window.stop - 1))]
        answer = await self._ask_location(upstream, repository, digest, headers)
        if answer is None:
            answer = await upstream.ask(repository, "GET", url, headers)
        async with aclosing(answer):
            if answer.status == 206:
                window.check_range(answer)
            else:
                await upstream.expect(answer, repository, 200)
                window.check_whole(answer)
            self._remember(upstream, repository, digest, answer)
            before = window.done
            try:
                await window.receive(answer, self.limit)
            finally:
                upstream.counters.bytes += window.done - before

    async def _ask_location(
        self, upstream: Upstream, repository: Repository, digest: Digest, headers: Headers
    ) -> Answer | None:
        """Ask where the registry sent us a moment ago; None where it did not or that place no longer serves us."""
        key = (repository, digest)
        location = self._locations.get(key)
        if location is None:
            return None
        expires_at, url = location
        if trio.current_time() < expires_at:
            try:
                answer = await upstream.exchange("GET", url, headers)
            except OriginError:
                self._locations.pop(key, None)
                raise
            if answer.status in (200, 206):
                return answer
            await answer.aclose()
        self._locations.pop(key, None)
        return None

    def _remember(self, upstream: Upstream, repository: Repository, digest: Digest, answer: Answer) -> None:
        if upstream.is_at(answer.url) or (repository, digest) in self._locations:
            return
        while len(self._locations) >= _LOCATIONS_MAX:
            del self._locations[next(iter(self._locations))]
        self._locations[repository, digest] = (trio.current_time() + self._deadlines.location_s, answer.url)

    async def relay(self, repository: Repository, target: str, accept: str, *, caller: Caller | None = None) -> Relayed:
        """See `ports.Origin`. A link to a next page becomes a path and query; one to another host is left out.

        Raises:
            InvalidInput: `target` is neither `tags/list` nor `referrers/<digest>`.
            OriginError: no answer, or even the last try's said to try again.
        """
        if not _RELAYED.fullmatch(target):
            raise InvalidInput(f"not to be relayed: {target[:100]!r}")
        upstream, url = self._locate(repository, target)
        clean = "".join(character for character in accept[:1000] if " " <= character <= "~") or "*/*"

        async def once() -> Relayed:
            headers = [(b"Accept", clean.encode())]
            answer = await upstream.ask(repository, "GET", url, headers, content=False, caller=caller)
            async with aclosing(answer):
                if answer.status in RETRYABLE_STATUSES or answer.status in (401, 403):
                    await upstream.expect(answer, repository, 200)
                return Relayed(answer.status, _relayed_headers(answer, upstream), await _small_body(answer, upstream))

        what = f"{repository} {target.partition('?')[0]}"
        return await upstream.retrying(what, once, self._deadlines.manifest_s)

    def is_public(self, repository: Repository) -> bool:
        """Return whether content of it has been read without credentials, and nothing since has been refused."""
        upstream = self._configured.get(repository.registry) or self._unlisted.get(repository.registry)
        return upstream is not None and upstream.auth.is_public(repository)

    def lend(self, repository: Repository, caller: Caller) -> None:
        """See `ports.Origin`."""
        self._locate(repository, "")[0].auth.lend(repository, caller)

    def statistics(self) -> dict[str, dict[str, int]]:
        """Return by registry: requests, bytes (of bodies received), retries, errors (calls that failed)."""
        known = (*self._configured.values(), *self._unlisted.values())
        return {upstream.name: upstream.counters.as_dict() for upstream in known}

    async def aclose(self) -> None:
        """Close all connections, at once; calls that are running fail."""
        for transport in self._transports.values():
            await transport.aclose()

    def _locate(self, repository: Repository, rest: str) -> tuple[Upstream, httpx.URL]:
        """Return whom to ask, and at which URL. Raises InvalidInput, NotFoundAtOrigin."""
        oci.parse_name(repository.name)
        name = repository.registry
        upstream = self._configured.get(name) or self._unlisted.get(name) or self._admit(name)
        return upstream, upstream.url(repository, rest)

    def _admit(self, name: str) -> Upstream:
        name = oci.parse_registry(name)
        if known := self._configured.get(name) or self._unlisted.get(name):
            return known
        if not self._allow_any:
            message = f"registry {name} is not configured on this agent; add --registry {name}=URL"
            raise NotFoundAtOrigin(message, status_code=404)
        host = re.sub(r":\d+\Z", "", name)
        if "." not in host or is_ip_literal(host):
            message = f"registry {name} is no public name; if it is meant, add --registry {name}=URL"
            raise NotFoundAtOrigin(message, status_code=404)
        while len(self._unlisted) >= _UNLISTED_MAX:
            del self._unlisted[next(iter(self._unlisted))]
        self._unlisted[name] = self._build(name, _Origin(default_url(name)), guarded=True)
        return self._unlisted[name]

    def _build(self, name: str, origin: _Origin, *, guarded: bool = False) -> Upstream:
        base = parse_base_url(name, origin.url)
        return Upstream(
            name,
            base,
            self._transport(name, origin, guarded=guarded),
            self._transport(name, origin, guarded=True),
            origin.hosts,
            self._credentials,
            self._rule_of,
            self._deadlines,
            self._rng,
        )

    def _transport(self, name: str, origin: _Origin, *, guarded: bool) -> Transport:
        key = (origin.pem, guarded)
        if key not in self._transports:
            self._transports[key] = Transport(
                _tls_context(name, origin),
                connections=self._connections + _RESERVED_CONNECTIONS,
                guarded=guarded,
                connect_s=self._deadlines.connect_s,
                stall_s=self._deadlines.stall_s,
                wait_s=self._deadlines.header_s,
            )
        return self._transports[key]


def _manifest_info(answer: Answer, reference: str) -> ManifestInfo | None:
    """Return what a HEAD's headers say, or None where they do not say enough, or not what was asked for."""
    text = answer.headers.get("docker-content-digest", "") or (reference if ":" in reference else "")
    length, media_type = length_of(answer), _media_type(answer)
    try:
        digest = parse_digest(text)
    except InvalidInput:
        return None
    if ":" in reference and digest != reference:
        return None
    if not length or length > oci.MANIFEST_BYTES_MAX or not media_type:
        return None
    return ManifestInfo(digest, media_type, length)


def _manifest(answer: Answer, body: bytes, reference: str, what: str) -> Manifest:
    expected = _said_digest(answer, reference)
    digest = digest_like(expected or "sha256", body)
    if expected not in ("", digest):
        message = f"{what}: {answer.server} sent a manifest that is {digest}, not {expected}"
        raise IntegrityError(message, expected=expected, actual=digest)
    media_type = _media_type(answer) or _own_media_type(body)
    if not media_type:
        raise OriginError(f"{answer.server} does not say of what kind the manifest is")
    return Manifest(digest, media_type, body)


def _said_digest(answer: Answer, reference: str) -> str:
    """Return what was asked for, else what the answer says it is; nothing where that is no digest that we know."""
    said = reference if ":" in reference else answer.headers.get("docker-content-digest", "")
    try:
        return parse_digest(said)
    except InvalidInput:
        return ""


def _own_media_type(body: bytes) -> str:
    try:
        return oci.parse_manifest(body).media_type
    except InvalidInput:
        return ""


async def _small_body(answer: Answer, upstream: Upstream) -> bytes:
    """Return a body of at most 4 MiB that is as stored, not as compressed for the way."""
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise OriginError(f"{answer.server} compresses although it was asked not to")
    body = await answer.read(oci.MANIFEST_BYTES_MAX)
    if len(body) > oci.MANIFEST_BYTES_MAX:
        raise OriginError(
            f"{answer.server} sends more than the {oci.MANIFEST_BYTES_MAX} bytes that a manifest may have"
        )
    upstream.counters.bytes += len(body)
    return body


def _media_type(answer: Answer) -> str:
    text = answer.headers.get("content-type", "").partition(";")[0].strip()
    return text if _MEDIA_TYPE.fullmatch(text) else ""


def _relayed_headers(answer: Answer, upstream: Upstream) -> list[tuple[str, str]]:
    relayed = [(name, answer.headers[name]) for name in _RELAYED_HEADERS if name in answer.headers]
    link = _LINK.fullmatch(answer.headers.get("link", ""))
    if link:
        target = answer.url.join(link["url"])
        if upstream.is_at(target):
            relayed.append(("Link", f"<{target.raw_path.decode('ascii')}>{link['rest']}"))
    return relayed


def _origin(registry: str, settings: RegistrySettings) -> _Origin:
    ca_file = settings.ca_file
    try:
        pem = ca_file.read_bytes() if ca_file is not None else None
    except OSError as error:
        raise ConfigError(f"registry {registry}: cannot use the CA file {ca_file}: {error.strerror}") from error
    return _Origin(settings.url, ca_file, settings.hosts, pem)


def _tls_context(registry: str, origin: _Origin) -> ssl.SSLContext:
    if origin.pem is None:
        return _system_tls_context()
    context = ssl.create_default_context()
    try:
        # Comments may be in any script; certificates are not.
        context.load_verify_locations(cadata=origin.pem.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"registry {registry}: cannot use the CA file {origin.ca_file}: {error}") from error
    return context


@functools.cache
def _system_tls_context() -> ssl.SSLContext:
    """Reading the system's trust store takes 20 ms and more."""
    return ssl.create_default_context()
