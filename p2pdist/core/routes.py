# SPDX-License-Identifier: Apache-2.0
"""What a request target of the mirror means.

Owns: the `/v2/` grammar and both namings: `?ns=HOST` (the containerd family) and `/v2/HOST/<repo>/…` (podman,
CRI-O). Refuses everything that is not exactly that grammar, and every registry that is not allowed: the name
decides whom the agent connects to.

Invariants: the raw target is matched, never a decoded one, so no `%2f`, `..` or NUL gets anywhere; only the value
of `ns` is percent-decoded; a returned repository's name, tag and digest went through core.oci and core.types;
no target raises.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from p2pdist.core.oci import ErrorCode, parse_name, parse_registry, parse_tag
from p2pdist.core.types import Digest, Repository, parse_digest
from p2pdist.errors import InvalidInput

_CONTENT = re.compile(r"/v2/(.+)/(manifests|blobs)/([^/]+)")
_LISTS = re.compile(r"/v2/(.+)/(tags/list|referrers/([^/]+))")
_SPLIT = re.compile(r"/v2/_p2pdist/pulls/([^/]+)")
"""Ours alone: no repository name begins with an underscore."""
_PORT_ALIAS = re.compile(r"(.+)__([0-9]{1,5})")
_QUERY_VALUE = re.compile(r"[A-Za-z0-9._~:/+%-]{0,512}")
_RELAYED_KEYS = {"tags": ("n", "last"), "referrers": ("artifactType",)}
_PUBLIC_NAME = re.compile(r"(?:[a-z0-9-]+\.)+(?:[a-z]{2,63}|xn--[a-z0-9-]{1,59})(?::[0-9]+)?")
_PRIVATE_ENDINGS = ("local", "localhost", "localdomain", "internal", "intranet", "lan", "home", "corp", "arpa", "test")
"""Last labels that are never public: mDNS, clusters and clouds (metadata.google.internal), RFC 6761, RFC 8375."""


@dataclass(frozen=True, slots=True)
class Registries:
    """Which registries may be asked for.

    Args:
        names: as configured, `HOST` or `HOST:PORT`, lower case.
        default: the registry of a request that names none.
        any_public: also every name that could be public DNS; never an address, never a local name.
    """

    names: frozenset[str]
    default: str
    any_public: bool = False

    def allows(self, name: str) -> bool:
        return name in self.names or (self.any_public and _is_public(name))

    def named_by(self, component: str) -> str | None:
        """Return the registry that the first part of a path names (`host__5000` is `host:5000`), or None."""
        alias = _PORT_ALIAS.fullmatch(component)
        name = f"{alias[1]}:{alias[2]}" if alias else component
        if name in self.names or "." in component or component == "localhost":
            return name
        return component if component in self.names else None


@dataclass(frozen=True, slots=True)
class Ping:
    """`/v2/`: is this a registry?"""


@dataclass(frozen=True, slots=True)
class ManifestRoute:
    """A manifest by tag or digest."""

    repository: Repository
    reference: str

    def __str__(self) -> str:
        return f"{self.repository}{'@' if ':' in self.reference else ':'}{self.reference}"


@dataclass(frozen=True, slots=True)
class BlobRoute:
    repository: Repository
    digest: Digest

    def __str__(self) -> str:
        return f"{self.repository}@{self.digest}"


@dataclass(frozen=True, slots=True)
class ListRoute:
    """Tags or referrers, which only the origin knows.

    Args:
        target: what follows `/v2/<name>/`, with the parts of the query that mean something there.
        path: the path as it was asked for, which links to further pages must keep.
        ns: the raw `ns` of the query, or None.
        subject: whose referrers are asked for, or None for tags.
        artifact_type: the one type of referrers that is asked for; empty for all.
    """

    repository: Repository
    target: str
    path: str
    ns: str | None
    subject: Digest | None = None
    artifact_type: str = ""

    def __str__(self) -> str:
        return f"{self.repository}/{self.target}"


@dataclass(frozen=True, slots=True)
class SplitRoute:
    """Where a blob's bytes came from: what `p2pdist pull` shows."""

    digest: Digest


@dataclass(frozen=True, slots=True)
class Refusal:
    """A target that is answered with an error, without anything being asked of anyone."""

    status: int
    code: ErrorCode
    message: str


Route = Ping | ManifestRoute | BlobRoute | ListRoute | SplitRoute | Refusal


def parse_target(target: str, registries: Registries) -> Route:
    """Return what the raw target of a GET or HEAD asks for; never raises."""
    path, _, query = target.partition("?")
    if path in ("/v2", "/v2/"):
        return Ping()
    try:
        return _parse_path(path, query, registries)
    except _Refused as refused:
        return refused.refusal


class _Refused(Exception):
    """Unwinds the parser; never leaves this module."""

    def __init__(self, status: int, code: ErrorCode, message: str) -> None:
        self.refusal = Refusal(status, code, message)


def _parse_path(path: str, query: str, registries: Registries) -> Route:
    ns = query_value(query, "ns")
    if match := _SPLIT.fullmatch(path):
        return SplitRoute(_digest(match[1]))
    if match := _CONTENT.fullmatch(path):
        repository = _repository(match[1], ns, registries)
        if match[2] == "blobs":
            return BlobRoute(repository, _digest(match[3]))
        return ManifestRoute(repository, _reference(match[3]))
    if match := _LISTS.fullmatch(path):
        repository = _repository(match[1], ns, registries)
        target = match[2] + _relayed_query(match[2], query)
        if match[3] is None:
            return ListRoute(repository, target, path, ns)
        artifact_type = unquote(query_value(target.partition("?")[2], "artifactType") or "")
        return ListRoute(repository, target, path, ns, _digest(match[3]), artifact_type)
    raise _Refused(404, ErrorCode.UNSUPPORTED, f"nothing is served at {path[:100]!r}")


def _repository(text: str, ns: str | None, registries: Registries) -> Repository:
    """Return the repository; `ns` wins, and a path that repeats it (containerd with override_path) loses the copy."""
    head, _, tail = text.partition("/")
    prefixed = registries.named_by(head)
    if ns:
        registry = _registry(unquote(ns))
        name = tail if tail and prefixed is not None and _same(prefixed, registry) else text
    elif prefixed is not None:
        registry, name = _registry(prefixed), tail
    else:
        registry, name = registries.default, text
    if not registries.allows(registry):
        raise _Refused(404, ErrorCode.NAME_UNKNOWN, f"registry {registry!r} is not configured at this mirror")
    try:
        return Repository(registry, parse_name(name))
    except InvalidInput as error:
        raise _Refused(400, ErrorCode.NAME_INVALID, str(error)) from error


def _registry(text: str) -> str:
    try:
        return parse_registry(text)
    except InvalidInput as error:
        raise _Refused(404, ErrorCode.NAME_UNKNOWN, str(error)) from error


def _same(prefix: str, registry: str) -> bool:
    return prefix == registry or (prefix, registry) == ("index.docker.io", "docker.io")


def _digest(text: str) -> Digest:
    try:
        return parse_digest(text)
    except InvalidInput as error:
        raise _Refused(400, ErrorCode.DIGEST_INVALID, str(error)) from error


def _reference(text: str) -> str:
    if ":" in text:
        return _digest(text)
    try:
        return parse_tag(text)
    except InvalidInput as error:
        raise _Refused(400, ErrorCode.MANIFEST_INVALID, str(error)) from error


def query_value(query: str, key: str) -> str | None:
    """Return the raw value of the first `key=` in a query, or None."""
    for part in query.split("&"):
        name, equals, value = part.partition("=")
        if equals and name == key:
            return value
    return None


def _relayed_query(target: str, query: str) -> str:
    """Return `?…` with the keys that the list knows and values that need no trust, or nothing."""
    pairs = [(key, query_value(query, key)) for key in _RELAYED_KEYS[target.partition("/")[0]]]
    kept = "&".join(f"{key}={value}" for key, value in pairs if value is not None and _QUERY_VALUE.fullmatch(value))
    return f"?{kept}" if kept else ""


def next_page(link: str, route: ListRoute) -> str | None:
    """Return the origin's `Link: <…>; rel="next"` as one to ourselves, or None where it is no such link."""
    match = re.match(r"<([^<>]*)>", link)
    if match is None or "next" not in link[match.end() :]:
        return None
    query = _relayed_query(route.target.partition("?")[0], match[1].partition("?")[2])
    if not query:
        return None
    return f'<{route.path}{query}{f"&ns={route.ns}" if route.ns else ""}>; rel="next"'


def _is_public(name: str) -> bool:
    host = name.partition(":")[0]
    return bool(_PUBLIC_NAME.fullmatch(name)) and host.rpartition(".")[2] not in _PRIVATE_ENDINGS
