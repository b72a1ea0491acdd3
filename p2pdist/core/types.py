# SPDX-License-Identifier: Apache-2.0
"""The words of the project as types. See the glossary in docs/ARCHITECTURE.md."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NewType

from p2pdist.errors import InvalidInput

Digest = NewType("Digest", str)
"""`sha256:` and 64 lower-case hex digits, or `sha512:` and 128; made only by `parse_digest` (CVE-2024-3727: never trust
another's)."""

PeerId = NewType("PeerId", str)
"""32 lower-case hex digits, drawn once per data directory."""

Checksum = NewType("Checksum", bytes)
"""xxh3-128 of a chunk, 16 bytes: catches corruption, is no proof against malice."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_PEER_ID = re.compile(r"[0-9a-f]{32}")


def parse_digest(text: str) -> Digest:
    """Return `text` as a digest.

    Raises:
        InvalidInput: it is not exactly `sha256:<64 lower-case hex>` or `sha512:<128 lower-case hex>`.
    """
    if not _DIGEST.fullmatch(text):
        raise InvalidInput(f"not a sha256 or sha512 digest: {text[:100]!r}")
    return Digest(text)


def parse_peer_id(text: str) -> PeerId:
    """Return `text` as a peer id, or raise InvalidInput."""
    if not _PEER_ID.fullmatch(text):
        raise InvalidInput(f"not a peer id: {text[:100]!r}")
    return PeerId(text)


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at a registry, both as the runtime names them (`docker.io`, `library/alpine`)."""

    registry: str
    name: str

    def __str__(self) -> str:
        return f"{self.registry}/{self.name}"

    @classmethod
    def of(cls, text: str) -> Repository:
        """Return what `str` of a repository stands for."""
        registry, _, name = text.partition("/")
        return cls(registry, name)


@dataclass(frozen=True, slots=True)
class Home:
    """Where content was pulled from (None: not known), and whether peers might have it then."""

    repository: Repository | None
    shared: bool


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A content descriptor of an OCI manifest or index (image-spec, descriptor.md)."""

    digest: Digest
    size_bytes: int
    media_type: str
    urls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ManifestInfo:
    """What a HEAD of a manifest tells."""

    digest: Digest
    media_type: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest or index byte for byte, with the media type it was served under."""

    digest: Digest
    media_type: str
    body: bytes

    @property
    def info(self) -> ManifestInfo:
        return ManifestInfo(self.digest, self.media_type, len(self.body))


@dataclass(frozen=True, slots=True)
class Split:
    """Where the bytes of a blob came from, on this node."""

    from_peers: int = 0
    from_origin: int = 0
    from_cache: int = 0

    def __add__(self, other: Split) -> Split:
        return Split(
            self.from_peers + other.from_peers,
            self.from_origin + other.from_origin,
            self.from_cache + other.from_cache,
        )
