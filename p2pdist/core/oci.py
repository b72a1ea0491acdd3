# SPDX-License-Identifier: Apache-2.0
"""OCI and Docker names, references and manifests, parsed strictly.

Owns: the grammar of registry names, repository names, tags and image references; what a manifest or
index names (config, layers, children, subject); the error body that runtimes read. Refuses to guess:
whatever no conforming registry could have sent is InvalidInput, one line.

Invariants: every digest in a result went through `parse_digest` (CVE-2024-3727); a document is an image
manifest or an index by its media type and never has the fields of the other (CVE-2021-41190); sizes are
integers in [0, 2**63); nothing here looks at more than 4 MiB or returns more than 4096 descriptors.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from p2pdist.core.chunkmap import MAX_BLOB_BYTES
from p2pdist.core.types import Descriptor, Digest, Repository, parse_digest
from p2pdist.errors import InvalidInput

MANIFEST_BYTES_MAX = 4 * 1024 * 1024
"""What every runtime accepts: containers/image stops at 4 MiB, containerd a little above."""

INDEX_DEPTH_MAX = 3
"""How deep a walker follows indexes within indexes; no published image nests more than two."""

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_SCHEMA1 = (
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
)
IMAGE_TYPES = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEX_TYPES = (OCI_INDEX, DOCKER_LIST)
MANIFEST_TYPES = (OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST)
"""All that we understand, indexes first; what an Accept header names."""

_IMAGE_CONFIGS = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
_DESCRIPTORS_MAX = 4096
_URLS_MAX = 16
_NAME_CHARACTERS_MAX = 255

_COMPONENT = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-f:.]{{2,45}}\])(?::(?P<port>[1-9][0-9]{{0,4}}))?")
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}")
_PLATFORM_PART = re.compile(r"[a-z0-9_.-]{1,32}")
_MACHINES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm/v7",
    "armv6l": "arm/v6",
    "i686": "386",
    "loongarch64": "loong64",
}


class ErrorCode(StrEnum):
    """The error codes of distribution-spec that a read-only endpoint answers with.

    UNAVAILABLE and UNKNOWN are distribution's own, for 503 and 500.
    """

    BLOB_UNKNOWN = "BLOB_UNKNOWN"
    DENIED = "DENIED"
    DIGEST_INVALID = "DIGEST_INVALID"
    MANIFEST_INVALID = "MANIFEST_INVALID"
    MANIFEST_UNKNOWN = "MANIFEST_UNKNOWN"
    NAME_INVALID = "NAME_INVALID"
    NAME_UNKNOWN = "NAME_UNKNOWN"
    TOOMANYREQUESTS = "TOOMANYREQUESTS"
    UNAUTHORIZED = "UNAUTHORIZED"
    UNAVAILABLE = "UNAVAILABLE"
    UNKNOWN = "UNKNOWN"
    UNSUPPORTED = "UNSUPPORTED"


def error_body(code: ErrorCode, message: str, detail: object = None) -> bytes:
    """Return the JSON body of a registry's error response; `detail` is left out where it is None."""
    entry: dict[str, object] = {"code": code.value, "message": message}
    if detail is not None:
        entry["detail"] = detail
    return json.dumps({"errors": [entry]}, separators=(",", ":")).encode()


def parse_registry(text: str) -> str:
    """Return a registry's name, `HOST[:PORT]`, in lower case; `index.docker.io` becomes `docker.io`.

    Raises:
        InvalidInput: no host or port could be written so.
    """
    name = text.lower()
    match = _REGISTRY.fullmatch(name) if len(name) <= _NAME_CHARACTERS_MAX else None
    if match is None or int(match["port"] or 0) > 65535:
        raise InvalidInput(f"not a registry name (HOST or HOST:PORT): {text[:100]!r}")
    return "docker.io" if name == "index.docker.io" else name


def parse_name(text: str) -> str:
    """Return `text` as a repository name such as `library/alpine`, or raise InvalidInput."""
    if len(text) > _NAME_CHARACTERS_MAX or not _NAME.fullmatch(text):
        raise InvalidInput(f"not a repository name: {text[:100]!r}")
    return text


def parse_tag(text: str) -> str:
    """Return `text` as a tag, or raise InvalidInput."""
    if not _TAG.fullmatch(text):
        raise InvalidInput(f"not a tag: {text[:100]!r}")
    return text


def parse_reference(text: str) -> str:
    """Return what may follow `/manifests/`, a tag or a digest, or raise InvalidInput."""
    return parse_digest(text) if ":" in text else parse_tag(text)


@dataclass(frozen=True, slots=True)
class ImageReference:
    """An image as a person names it: a repository, and a tag or digest in it."""

    repository: Repository
    reference: str

    def __str__(self) -> str:
        return f"{self.repository}{'@' if ':' in self.reference else ':'}{self.reference}"


def parse_image_reference(text: str) -> ImageReference:
    """Return the image that `[REGISTRY/]REPO[:TAG][@DIGEST]` means, read as Docker reads it.

    No registry means docker.io, where a name of one part is in `library/`; no tag means `latest`;
    with both a tag and a digest, the digest counts (the tag is checked and dropped).

    Raises:
        InvalidInput: it follows no such form.
    """
    rest, at, digest = text.partition("@")
    head, slash, tail = rest.partition("/")
    if slash and (any(mark in head for mark in ".:[") or head == "localhost"):
        registry, name_and_tag = parse_registry(head), tail
    else:
        registry, name_and_tag = "docker.io", rest
    name, colon, tag = name_and_tag.partition(":")
    if registry == "docker.io" and "/" not in name:
        name = f"library/{name}"
    reference = parse_tag(tag) if colon else "latest"
    return ImageReference(Repository(registry, parse_name(name)), parse_digest(digest) if at else reference)


@dataclass(frozen=True, slots=True)
class Platform:
    """Where an image runs, in Go's words (`linux`, `arm64`, `v8`)."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


def parse_platform(text: str) -> Platform:
    """Return `OS/ARCHITECTURE[/VARIANT]` as a platform, or raise InvalidInput."""
    parts = text.split("/")
    if not 2 <= len(parts) <= 3 or not all(_PLATFORM_PART.fullmatch(part) for part in parts):
        raise InvalidInput(f"not a platform (OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT): {text[:100]!r}")
    return Platform(*parts)


def platform_of_machine(machine: str) -> Platform:
    """Return the Linux platform of a `uname -m` value; an unknown one is taken to be Go's own word."""
    return parse_platform(f"linux/{_MACHINES.get(machine, machine)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedManifest:
    """What a manifest or index names.

    `kind` is "image" (runnable: it has an image config), "artifact" (anything else in manifest form:
    signatures, SBOMs) or "index". An index has `children` and, in step with them, `platforms`; the
    others have `config` and `layers`.
    """

    kind: Literal["image", "artifact", "index"]
    media_type: str
    config: Descriptor | None = None
    layers: tuple[Descriptor, ...] = ()
    children: tuple[Descriptor, ...] = ()
    platforms: tuple[Platform | None, ...] = ()
    subject: Descriptor | None = None
    artifact_type: str = ""

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """The config and layers, each digest once, without layers that live elsewhere (`urls`)."""
        named = (self.config, *self.layers) if self.config else self.layers
        return tuple({blob.digest: blob for blob in named if not blob.urls}.values())


def parse_manifest(body: bytes, media_type: str = "") -> ParsedManifest:
    """Return what a manifest or index names.

    Args:
        body: at most 4 MiB of JSON.
        media_type: the Content-Type it was served under, parameters stripped; empty where there was
            none, then the document's own `mediaType` decides.

    Raises:
        InvalidInput: it is malformed, says two different things, or is of a kind that we do not know.
    """
    document = _load(body)
    said = _text(document, "mediaType")
    if media_type and said and media_type != said:
        raise InvalidInput(f"manifest served as {media_type[:100]!r} calls itself {said[:100]!r}")
    kind = media_type or said
    if kind in DOCKER_SCHEMA1 or document.get("schemaVersion") == 1:
        raise InvalidInput(
            "this is a Docker schema 1 image, a format retired in 2017; push it again with a current tool"
        )
    if document.get("schemaVersion") != 2 or isinstance(document["schemaVersion"], float):
        raise InvalidInput("manifest without schemaVersion 2")
    fields = {key.lower() for key in document}
    if kind in IMAGE_TYPES:
        return _parse_image(document, kind, fields)
    if kind in INDEX_TYPES:
        return _parse_index(document, kind, fields)
    raise InvalidInput(f"not a known kind of manifest: {kind[:100]!r}" if kind else "manifest without a media type")


def media_type_of(body: bytes, claimed: str) -> str:
    """Return the media type of a manifest that came from a peer.

    It is what the document itself says, known to us or not: its digest covers that. Of one that does not say,
    the peer's word counts where the document has the form of that kind.

    Raises:
        InvalidInput: neither.
    """
    said = _text(_load(body), "mediaType")
    return said if _MEDIA_TYPE.fullmatch(said) else parse_manifest(body, claimed).media_type


def pick_platform(index: ParsedManifest, wanted: Platform) -> Descriptor:
    """Return the child of `index` that runs on `wanted`; the first of the best, as runtimes do.

    A wanted variant takes an older one where its own is missing (arm/v7 runs v6), never a newer one.

    Raises:
        InvalidInput: no child fits; the message lists what there is.
    """
    fitting = [
        (_variant_number(platform), -position, child)
        for position, (child, platform) in enumerate(zip(index.children, index.platforms, strict=True))
        if platform is not None and _runs_on(platform, wanted)
    ]
    if not fitting:
        offered = ", ".join(sorted({str(platform) for platform in index.platforms if platform})) or "none"
        raise InvalidInput(f"the image has no variant for {wanted}; it has: {offered}"[:500])
    return max(fitting, key=lambda entry: entry[:2])[2]


def _runs_on(offered: Platform, wanted: Platform) -> bool:
    if (offered.os, offered.architecture) != (wanted.os, wanted.architecture):
        return False
    return _variant_number(offered) <= _variant_number(wanted)


def _variant_number(platform: Platform) -> int:
    """The variant as a number; where none is said, what Go assumes: arm is v7, arm64 v8, all others v1."""
    digits = platform.variant.removeprefix("v")
    if digits.isascii() and digits.isdigit():
        return int(digits[:4])
    return {"arm": 7, "arm64": 8}.get(platform.architecture, 1)


def _load(body: bytes) -> dict[str, Any]:
    if len(body) > MANIFEST_BYTES_MAX:
        raise InvalidInput(f"manifest of {len(body)} bytes; at most {MANIFEST_BYTES_MAX} are allowed")
    try:
        document = json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"manifest is not valid JSON: {str(error)[:100]}") from error
    if not isinstance(document, dict):
        raise InvalidInput("manifest is not a JSON object")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse repeated keys: two parsers could then see two different images under one digest."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is repeated in an object")
    return result


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _parse_image(document: dict[str, Any], media_type: str, fields: set[str]) -> ParsedManifest:
    if fields & {"manifests", "fslayers", "history"}:
        raise InvalidInput("image manifest that also has the fields of an index or of schema 1")
    config = _descriptor(document.get("config"), "config")
    return ParsedManifest(
        kind="image" if config.media_type in _IMAGE_CONFIGS else "artifact",
        media_type=media_type,
        config=config,
        layers=tuple(_descriptor(entry, "layer") for entry in _entries(document, "layers")),
        subject=_subject(document),
        artifact_type=_text(document, "artifactType"),
    )


def _parse_index(document: dict[str, Any], media_type: str, fields: set[str]) -> ParsedManifest:
    if fields & {"config", "layers", "fslayers", "history"}:
        raise InvalidInput("index that also has the fields of an image manifest")
    entries = _entries(document, "manifests")
    return ParsedManifest(
        kind="index",
        media_type=media_type,
        children=tuple(_descriptor(entry, "child manifest") for entry in entries),
        platforms=tuple(_platform(entry) for entry in entries),
        subject=_subject(document),
        artifact_type=_text(document, "artifactType"),
    )


def _entries(document: dict[str, Any], key: str) -> list[Any]:
    entries = document.get(key)
    if not isinstance(entries, list) or len(entries) > _DESCRIPTORS_MAX:
        raise InvalidInput(f"manifest whose {key!r} is not a list of at most {_DESCRIPTORS_MAX} descriptors")
    return entries


def _subject(document: dict[str, Any]) -> Descriptor | None:
    entry = document.get("subject")
    return None if entry is None else _descriptor(entry, "subject")


def _descriptor(entry: object, what: str) -> Descriptor:
    if not isinstance(entry, dict):
        raise InvalidInput(f"manifest whose {what} is not a descriptor")
    digest, size, urls = entry.get("digest"), entry.get("size"), entry.get("urls") or []
    if not isinstance(digest, str):
        raise InvalidInput(f"{what} without a digest")
    parsed: Digest = parse_digest(digest)
    if type(size) is not int or not 0 <= size <= MAX_BLOB_BYTES:
        raise InvalidInput(f"{what} {parsed} without a usable size")
    if not isinstance(urls, list) or len(urls) > _URLS_MAX or not all(isinstance(url, str) for url in urls):
        raise InvalidInput(f"{what} {parsed} with unusable urls")
    media_type = _text(entry, "mediaType")
    if not _MEDIA_TYPE.fullmatch(media_type):
        raise InvalidInput(f"{what} {parsed} without a usable mediaType")
    return Descriptor(parsed, size, media_type, tuple(urls))


def _platform(entry: dict[str, Any]) -> Platform | None:
    """Return the platform, or None where there is none or none that anything could run on."""
    platform = entry.get("platform")
    if not isinstance(platform, dict):
        return None
    parts = [_text(platform, key) for key in ("os", "architecture", "variant")]
    try:
        return parse_platform("/".join(part for part in parts if part))
    except InvalidInput:
        return None


def _text(document: dict[str, Any], key: str) -> str:
    value = document.get(key)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > _NAME_CHARACTERS_MAX:
        raise InvalidInput(f"manifest whose {key!r} is not a short text")
    return value
