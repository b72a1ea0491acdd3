# SPDX-License-Identifier: Apache-2.0
"""The promises of p2pdist.core.oci."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core import oci
from p2pdist.core.types import Repository
from p2pdist.errors import InvalidInput

A, B, C = (f"sha256:{letter * 64}" for letter in "abc")
IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


def descriptor(digest: str = A, size: object = 3, media_type: object = LAYER, **more: object) -> dict[str, object]:
    return {"digest": digest, "size": size, "mediaType": media_type, **more}


def image(**changes: object) -> dict[str, object]:
    document = {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "config": descriptor(A, 10, IMAGE_CONFIG),
        "layers": [descriptor(B, 20), descriptor(C, 30)],
    }
    return {key: value for key, value in {**document, **changes}.items() if value is not ...}


def index(*platforms: tuple[str, str, str], **changes: object) -> dict[str, object]:
    children = [
        descriptor(f"sha256:{number:064x}", 7, oci.OCI_MANIFEST, platform={"os": o, "architecture": a, "variant": v})
        for number, (o, a, v) in enumerate(platforms)
    ]
    return {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": children, **changes}


def parse(document: object, media_type: str = "") -> oci.ParsedManifest:
    return oci.parse_manifest(json.dumps(document).encode(), media_type)


@pytest.mark.parametrize(
    ("text", "registry", "name", "reference"),
    [
        ("alpine", "docker.io", "library/alpine", "latest"),
        ("alpine:3.20", "docker.io", "library/alpine", "3.20"),
        ("me/app", "docker.io", "me/app", "latest"),
        ("docker.io/alpine", "docker.io", "library/alpine", "latest"),
        ("index.docker.io/alpine", "docker.io", "library/alpine", "latest"),
        ("quay.io/a/b/c:v1", "quay.io", "a/b/c", "v1"),
        ("localhost/app", "localhost", "app", "latest"),
        ("reg.lab:5000/app:v1", "reg.lab:5000", "app", "v1"),
        ("REG.lab:5000/app", "reg.lab:5000", "app", "latest"),
        ("[::1]:5000/app", "[::1]:5000", "app", "latest"),
        (f"reg.lab/app@{A}", "reg.lab", "app", A),
        (f"reg.lab/app:v1@{A}", "reg.lab", "app", A),
    ],
)
def test_image_references_read_as_docker_reads_them(text: str, registry: str, name: str, reference: str) -> None:
    assert oci.parse_image_reference(text) == oci.ImageReference(Repository(registry, name), reference)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Alpine",
        "a//b",
        "../etc",
        "a/../b",
        "a:b/c",
        "reg.lab:99999/app",
        "reg.lab:0/app",
        "reg.lab/",
        "reg.lab/app:",
        "reg.lab/app@",
        f"reg.lab/app@{A}0",
        f"reg.lab/app:{'x' * 129}",
        "reg.lab/app:.hidden",
        "http://reg.lab/app",
        "user@reg.lab/app",
        "reg.lab/a\n",
        "a" * 300,
        "app:v1:v2",
    ],
)
def test_what_names_no_image_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        oci.parse_image_reference(text)


def test_an_image_reference_prints_as_it_is_written() -> None:
    assert str(oci.parse_image_reference("alpine")) == "docker.io/library/alpine:latest"
    assert str(oci.parse_image_reference(f"quay.io/a@{A}")) == f"quay.io/a@{A}"


@pytest.mark.parametrize("text", ["sha256:abc", A.upper(), "a/b", "..", "", "-x"])
def test_a_manifest_reference_is_a_tag_or_a_whole_digest(text: str) -> None:
    assert oci.parse_reference(A) == A
    assert oci.parse_reference("v1.0_x") == "v1.0_x"
    with pytest.raises(InvalidInput):
        oci.parse_reference(text)


def test_an_image_manifest_gives_config_and_layers_in_order() -> None:
    parsed = parse(image())
    assert parsed.kind == "image"
    assert parsed.config is not None
    assert (parsed.config.digest, parsed.config.size_bytes, parsed.config.media_type) == (A, 10, IMAGE_CONFIG)
    assert [layer.digest for layer in parsed.layers] == [B, C]
    assert [blob.digest for blob in parsed.blobs] == [A, B, C]


def test_a_docker_manifest_is_an_image() -> None:
    config = descriptor(A, 10, "application/vnd.docker.container.image.v1+json")
    parsed = parse(image(mediaType=oci.DOCKER_MANIFEST, config=config), oci.DOCKER_MANIFEST)
    assert (parsed.kind, parsed.media_type) == ("image", oci.DOCKER_MANIFEST)


def test_blobs_name_each_digest_once_and_leave_out_foreign_layers() -> None:
    layers = [descriptor(B), descriptor(B), descriptor(C, urls=["https://elsewhere.example/layer"])]
    assert [blob.digest for blob in parse(image(layers=layers)).blobs] == [A, B]


def test_a_signature_is_an_artifact_with_its_subject() -> None:
    parsed = parse(
        image(
            config=descriptor(A, 2, "application/vnd.oci.empty.v1+json"),
            artifactType="application/vnd.dev.sigstore.bundle.v0.3+json",
            subject=descriptor(C, 5, oci.OCI_MANIFEST),
        )
    )
    assert parsed.kind == "artifact"
    assert parsed.subject is not None
    assert parsed.subject.digest == C
    assert parsed.artifact_type == "application/vnd.dev.sigstore.bundle.v0.3+json"


@pytest.mark.parametrize("media_type", oci.INDEX_TYPES)
def test_an_index_gives_children_and_their_platforms(media_type: str) -> None:
    document = index(("linux", "amd64", ""), ("linux", "arm64", "v8"), mediaType=media_type)
    parsed = parse(document, media_type)
    assert parsed.kind == "index"
    assert [str(platform) for platform in parsed.platforms] == ["linux/amd64", "linux/arm64/v8"]
    assert parsed.blobs == ()


def test_an_oci_manifest_without_its_own_media_type_takes_the_content_type() -> None:
    assert parse(image(mediaType=...), oci.OCI_MANIFEST).media_type == oci.OCI_MANIFEST


REFUSED: dict[str, tuple[Any, str]] = {
    "no media type anywhere": (image(mediaType=...), ""),
    "content type and mediaType differ": (image(), oci.OCI_INDEX),
    "unknown media type": (image(mediaType="application/json"), ""),
    "layers in an index": (index(layers=[]), ""),
    "config in an index": (index(config={}), ""),
    "manifests in an image": (image(manifests=[]), ""),
    "Manifests, which Go reads as manifests": (image(Manifests=[]), ""),
    "schemaVersion missing": (image(schemaVersion=...), ""),
    "schemaVersion 2.0": (image(schemaVersion=2.0), ""),
    "schemaVersion text": (image(schemaVersion="2"), ""),
    "no config": (image(config=...), ""),
    "no layers": (image(layers=...), ""),
    "layers not a list": (image(layers={}), ""),
    "layer not an object": (image(layers=["x"]), ""),
    "traversal in a digest": (image(layers=[descriptor("sha256:../../etc/passwd")]), ""),
    "upper-case digest": (image(layers=[descriptor(A.upper())]), ""),
    "no digest": (image(layers=[{"size": 1, "mediaType": LAYER}]), ""),
    "digest a number": (image(layers=[descriptor(digest=5)]), ""),  # type: ignore[arg-type]
    "negative size": (image(layers=[descriptor(size=-1)]), ""),
    "size true": (image(layers=[descriptor(size=True)]), ""),
    "size a float": (image(layers=[descriptor(size=1.0)]), ""),
    "size a text": (image(layers=[descriptor(size="1")]), ""),
    "size beyond 256 GiB": (image(layers=[descriptor(size=256 * 1024**3 + 1)]), ""),
    "media type with a line break": (image(layers=[descriptor(media_type="a/b\r\nX: y")]), ""),
    "media type a list": (image(layers=[descriptor(media_type=[])]), ""),
    "urls a text": (image(layers=[descriptor(urls="https://x")]), ""),
    "subject not a descriptor": (image(subject="x"), ""),
    "too many layers": (image(layers=[descriptor()] * 5000), ""),
    "not an object": ([], ""),
}


@pytest.mark.parametrize(("document", "media_type"), REFUSED.values(), ids=REFUSED.keys())
def test_a_malformed_manifest_is_refused(document: object, media_type: str) -> None:
    with pytest.raises(InvalidInput):
        parse(document, media_type)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        "{}".encode("utf-16"),
        b"[" * 200_000,
        b'{"schemaVersion": NaN}',
        b'{"schemaVersion": 2, "schemaVersion": 2}',
        b'{"schemaVersion": ' + b"9" * 10_000 + b"}",
        b" " * (oci.MANIFEST_BYTES_MAX + 1),
    ],
    ids=["empty", "cut", "binary", "utf-16", "deep", "NaN", "repeated key", "huge number", "too long"],
)
def test_what_is_not_plain_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidInput):
        oci.parse_manifest(body, oci.OCI_MANIFEST)


@pytest.mark.parametrize("media_type", ["", *oci.DOCKER_SCHEMA1])
def test_schema_1_is_refused_in_words_that_help(media_type: str) -> None:
    with pytest.raises(InvalidInput, match=r"schema 1.*push it again"):
        oci.parse_manifest(b'{"schemaVersion": 1, "fsLayers": []}', media_type)


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_are_refused(body: bytes) -> None:
    with contextlib.suppress(InvalidInput):
        oci.parse_manifest(body, oci.OCI_MANIFEST)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "x", A, LAYER]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["digest", "size", "mediaType", "urls", "platform", "os"]), inner, max_size=4)
    ),
    max_leaves=10,
)
KEYS = st.sampled_from(["config", "layers", "manifests", "subject", "artifactType", "mediaType"])


@given(st.dictionaries(KEYS, JSON, max_size=5), st.sampled_from(oci.MANIFEST_TYPES))
def test_any_document_parses_or_is_refused(fields: dict[str, object], media_type: str) -> None:
    try:
        parsed = parse({"schemaVersion": 2, **fields}, media_type)
    except InvalidInput:
        return
    assert (parsed.kind == "index") == (media_type in oci.INDEX_TYPES)
    assert all(blob.size_bytes >= 0 for blob in parsed.blobs)


@pytest.mark.parametrize(
    ("offered", "wanted", "position"),
    [
        (["linux/amd64", "linux/arm64/v8"], "linux/arm64", 1),
        (["linux/arm64", "linux/amd64"], "linux/arm64/v8", 0),
        (["linux/arm/v5", "linux/arm/v7", "linux/arm/v6"], "linux/arm/v7", 1),
        (["linux/arm/v5", "linux/arm/v7", "linux/arm/v6"], "linux/arm/v6", 2),
        (["windows/amd64", "linux/amd64"], "linux/amd64", 1),
        (["unknown/unknown", "linux/amd64", "linux/amd64"], "linux/amd64", 1),
        (["linux/amd64/v3", "linux/amd64"], "linux/amd64", 1),
        (["linux/amd64/v3", "linux/amd64"], "linux/amd64/v4", 0),
    ],
)
def test_the_best_child_for_a_platform_is_picked(offered: list[str], wanted: str, position: int) -> None:
    triples = [(*text.split("/"), "")[:3] for text in offered]
    picked = oci.pick_platform(parse(index(*triples)), oci.parse_platform(wanted))  # type: ignore[arg-type]
    assert picked.digest == f"sha256:{position:064x}"


def test_a_missing_platform_is_refused_with_what_there_is() -> None:
    parsed = parse(index(("linux", "arm64", "v8"), ("", "\x1b[31m", "")))
    with pytest.raises(InvalidInput, match=r"no variant for linux/s390x; it has: linux/arm64/v8$"):
        oci.pick_platform(parsed, oci.Platform("linux", "s390x"))


@pytest.mark.parametrize("text", ["linux", "linux/amd64/v1/x", "linux/", "/amd64", "Linux/amd64", ""])
def test_a_malformed_platform_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        oci.parse_platform(text)


@pytest.mark.parametrize(
    ("machine", "platform"),
    [("x86_64", "linux/amd64"), ("aarch64", "linux/arm64"), ("armv7l", "linux/arm/v7"), ("s390x", "linux/s390x")],
)
def test_a_machine_has_its_platform(machine: str, platform: str) -> None:
    assert str(oci.platform_of_machine(machine)) == platform


def test_an_error_body_is_what_the_spec_says() -> None:
    assert json.loads(oci.error_body(oci.ErrorCode.MANIFEST_UNKNOWN, "no such")) == {
        "errors": [{"code": "MANIFEST_UNKNOWN", "message": "no such"}]
    }
    assert json.loads(oci.error_body(oci.ErrorCode.DENIED, "no", {"x": 1}))["errors"][0]["detail"] == {"x": 1}


def test_a_manifest_from_a_peer_is_what_it_says_or_has_the_form_of_what_the_peer_says() -> None:
    strange = "application/vnd.example.thing.v7+json"
    assert oci.media_type_of(json.dumps({"mediaType": strange}).encode(), oci.OCI_INDEX) == strange
    untyped = b'{"schemaVersion": 2, "manifests": []}'
    assert oci.media_type_of(untyped, oci.OCI_INDEX) == oci.OCI_INDEX
    for body, claimed in ((untyped, oci.OCI_MANIFEST), (untyped, strange), (untyped, ""), (b"[]", oci.OCI_INDEX)):
        with pytest.raises(InvalidInput):
            oci.media_type_of(body, claimed)
