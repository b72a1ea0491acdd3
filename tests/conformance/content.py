# SPDX-License-Identifier: Apache-2.0
"""What a registry may hold: manifests of every kind, and the blobs that they name."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from p2pdist.core.types import Digest
from tests.conformance.scene import NAME
from tests.fake_registry import digest_of

if TYPE_CHECKING:
    from tests.fake_registry import FakeRegistry

OCI = "application/vnd.oci.image"
DOCKER = "application/vnd.docker"
GZIP, ZSTD = f"{OCI}.layer.v1.tar+gzip", f"{OCI}.layer.v1.tar+zstd"
CONFIG, EMPTY_JSON = f"{OCI}.config.v1+json", "application/vnd.oci.empty.v1+json"
MANIFEST, INDEX = f"{OCI}.manifest.v1+json", f"{OCI}.index.v1+json"
SCHEMA2, LIST = f"{DOCKER}.distribution.manifest.v2+json", f"{DOCKER}.distribution.manifest.list.v2+json"
SBOM = "application/spdx+json"
STRANGE = "application/vnd.example.thing.v7+json"

SMALL = b"a layer of one chunk"
LARGE = random.Random(4).randbytes(700_000)
"""Three chunks."""
CONFIG_BODY = b'{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}'
PLATFORM = {"os": "linux", "architecture": "amd64"}
CHUNKED = {
    "io.github.containers.zstd-chunked.manifest-checksum": digest_of(b"toc"),
    "io.github.containers.zstd-chunked.manifest-position": "100:50:200:1",
}
ESTARGZ = {
    "containerd.io/snapshot/stargz/toc.digest": digest_of(b"toc"),
    "io.containers.estargz.uncompressed-size": "700000",
}


def sha512_of(body: bytes) -> Digest:
    return Digest(f"sha512:{hashlib.sha512(body).hexdigest()}")


def described(body: bytes, media_type: str, **more: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"mediaType": media_type, "digest": digest_of(body), "size": len(body)} | more


def image(*layers: dict[str, Any], media_type: str = MANIFEST, config: str = CONFIG, **more: Any) -> bytes:  # noqa: ANN401
    """Return an image manifest. Keys that no reader expects, and their order, must come through as they are."""
    document = {
        "layers": list(layers),
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": described(CONFIG_BODY, config),
    }
    return json.dumps(document | more, indent=3).encode()


def index(*children: bytes, media_type: str = INDEX, child: str = MANIFEST, **more: Any) -> bytes:  # noqa: ANN401
    entries = [described(body, child, platform=PLATFORM) for body in children]
    return json.dumps({"schemaVersion": 2, "mediaType": media_type, "manifests": entries} | more).encode()


def without_media_type(body: bytes) -> bytes:
    document = json.loads(body)
    del document["mediaType"]
    return json.dumps(document).encode()


@dataclass(frozen=True)
class Held:
    """A manifest and the Content-Type that its registry gives it."""

    media_type: str
    body: bytes

    @property
    def digest(self) -> Digest:
        return digest_of(self.body)


PLAIN = image(described(SMALL, GZIP), described(LARGE, GZIP))
EMPTY_LAYER = image(described(b"", GZIP))
_SUBJECT = described(PLAIN, MANIFEST)
_DOCKER_IMAGE = image(
    described(SMALL, f"{DOCKER}.image.rootfs.diff.tar.gzip"),
    media_type=SCHEMA2,
    config=f"{DOCKER}.container.image.v1+json",
)
_FOREIGN = described(b"elsewhere", f"{OCI}.layer.nondistributable.v1.tar+gzip", urls=["https://store.example.com/x"])
_WIDE = {"annotations": {f"org.example.{number}": "A" * 10_000 for number in range(25)}}

MANIFESTS = {
    "OCI image": Held(MANIFEST, PLAIN),
    "Docker schema 2": Held(SCHEMA2, _DOCKER_IMAGE),
    "OCI index": Held(INDEX, index(PLAIN, image(described(SMALL, ZSTD)))),
    "Docker list": Held(LIST, index(_DOCKER_IMAGE, media_type=LIST, child=SCHEMA2)),
    "index of indexes": Held(INDEX, index(index(PLAIN), child=INDEX)),
    "empty index": Held(INDEX, index()),
    "zstd": Held(MANIFEST, image(described(LARGE, ZSTD))),
    "zstd:chunked": Held(MANIFEST, image(described(LARGE, ZSTD, annotations=CHUNKED))),
    "eStargz": Held(MANIFEST, image(described(LARGE, GZIP, annotations=ESTARGZ))),
    "artifact": Held(MANIFEST, image(described(SMALL, SBOM), config=EMPTY_JSON, artifactType=SBOM, subject=_SUBJECT)),
    "artifact index": Held(INDEX, index(PLAIN, artifactType=SBOM, subject=_SUBJECT)),
    "Helm chart": Held(MANIFEST, image(described(SMALL, GZIP), config="application/vnd.cncf.helm.config.v1+json")),
    "no layers": Held(MANIFEST, image()),
    "empty layer": Held(MANIFEST, EMPTY_LAYER),
    "foreign layer": Held(MANIFEST, image(described(SMALL, GZIP), _FOREIGN)),
    "sha512 layer": Held(MANIFEST, image({**described(LARGE, GZIP), "digest": sha512_of(LARGE)})),
    "unknown fields": Held(MANIFEST, image(described(SMALL, GZIP, x={"y": [1]}), newField={"a": "b"})),
    "nearly 256 KiB": Held(MANIFEST, image(described(SMALL, GZIP), **_WIDE)),
    "OCI 1.0, without mediaType": Held(MANIFEST, without_media_type(PLAIN)),
    "unknown type": Held(STRANGE, json.dumps({"mediaType": STRANGE, "blobs": [described(SMALL, GZIP)]}).encode()),
}
HUGE = Held(MANIFEST, image(described(SMALL, GZIP), annotations={"org.example": "A" * 4_000_000}))
BLOBS = {
    "one chunk": SMALL,
    "three chunks": LARGE,
    "empty": b"",
    "config": CONFIG_BODY,
}


def fill(registry: FakeRegistry, *tags: str) -> None:
    """Put everything there; the tags name the plain image."""
    for body in (*BLOBS.values(), b"{}"):
        registry.add_blob(body)
        registry.blobs[sha512_of(body)] = body
    for held in (*MANIFESTS.values(), HUGE):
        registry.add_manifest(NAME, held.body, media_type=held.media_type)
        registry.manifests[NAME, sha512_of(held.body)] = (held.media_type, held.body)
    for tag in tags:
        registry.add_manifest(NAME, PLAIN, tag=tag, media_type=MANIFEST)
