# SPDX-License-Identifier: Apache-2.0
"""What request targets mean: both namings, and everything that is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.oci import ErrorCode, parse_name, parse_registry, parse_tag
from p2pdist.core.routes import (
    BlobRoute,
    ListRoute,
    ManifestRoute,
    Ping,
    Refusal,
    Registries,
    next_page,
    parse_target,
    query_value,
)
from p2pdist.core.types import Digest, Repository, parse_digest

DIGEST = Digest("sha256:" + "0f" * 32)
KNOWN = Registries(frozenset({"docker.io", "reg.lab:5000", "localhost", "plain:5000"}), "docker.io")
ANY = Registries(frozenset({"docker.io"}), "docker.io", any_public=True)
DEMO = Repository("docker.io", "library/demo")


@pytest.mark.parametrize("target", ["/v2", "/v2/", "/v2/?ns=docker.io"])
def test_the_root_says_that_this_is_a_registry(target: str) -> None:
    assert parse_target(target, KNOWN) == Ping()


@pytest.mark.parametrize(
    ("path", "registry", "name"),
    [
        ("library/demo/{}?ns=docker.io", "docker.io", "library/demo"),
        ("library/demo/{}?ns=index.docker.io", "docker.io", "library/demo"),
        ("library/demo/{}?ns=DOCKER.io", "docker.io", "library/demo"),
        ("a/{}?ns=reg.lab%3A5000", "reg.lab:5000", "a"),
        ("a/{}?x=1&ns=reg.lab:5000", "reg.lab:5000", "a"),
        ("docker.io/library/demo/{}", "docker.io", "library/demo"),
        ("index.docker.io/library/demo/{}", "docker.io", "library/demo"),
        ("docker.io/library/demo/{}?ns=docker.io", "docker.io", "library/demo"),
        ("docker.io/library/demo/{}?ns=reg.lab:5000", "reg.lab:5000", "docker.io/library/demo"),
        ("reg.lab__5000/a/b/{}", "reg.lab:5000", "a/b"),
        ("reg.lab__5000/a/b/{}?ns=reg.lab%3A5000", "reg.lab:5000", "a/b"),
        ("reg.lab:5000/a/{}", "reg.lab:5000", "a"),
        ("plain__5000/a/{}", "plain:5000", "a"),
        ("localhost/a/{}", "localhost", "a"),
        ("library/demo/{}", "docker.io", "library/demo"),
        ("other__5000/a/{}", "docker.io", "other__5000/a"),
        ("a/manifests/b/blobs/c/{}", "docker.io", "a/manifests/b/blobs/c"),
        ("docker.io/{}?ns=docker.io", "docker.io", "docker.io"),
    ],
)
@pytest.mark.parametrize("leaf", ["manifests/v1", f"manifests/{DIGEST}", f"blobs/{DIGEST}", "tags/list"])
def test_both_namings_lead_to_the_repository(path: str, registry: str, name: str, leaf: str) -> None:
    route = parse_target("/v2/" + path.format(leaf), KNOWN)
    assert isinstance(route, ManifestRoute | BlobRoute | ListRoute), route
    assert route.repository == Repository(registry, name)


def test_a_manifest_is_asked_for_by_tag_or_digest() -> None:
    assert parse_target("/v2/library/demo/manifests/v1", KNOWN) == ManifestRoute(DEMO, "v1")
    assert parse_target(f"/v2/library/demo/manifests/{DIGEST}", KNOWN) == ManifestRoute(DEMO, DIGEST)
    assert parse_target(f"/v2/library/demo/blobs/{DIGEST}", KNOWN) == BlobRoute(DEMO, DIGEST)


@pytest.mark.parametrize(
    ("leaf", "relayed"),
    [
        ("tags/list", "tags/list"),
        ("tags/list?n=10&last=a%2Fb&ns=docker.io&x=y", "tags/list?n=10&last=a%2Fb"),
        ("tags/list?n=<script>", "tags/list"),
        (f"referrers/{DIGEST}?n=1&artifactType=application/x", f"referrers/{DIGEST}?artifactType=application/x"),
    ],
)
def test_lists_keep_only_the_query_that_means_something(leaf: str, relayed: str) -> None:
    route = parse_target(f"/v2/library/demo/{leaf}", KNOWN)
    assert isinstance(route, ListRoute)
    assert route.target == relayed


@pytest.mark.parametrize(
    ("target", "status", "code"),
    [
        ("/", 404, ErrorCode.UNSUPPORTED),
        ("/v1/_ping", 404, ErrorCode.UNSUPPORTED),
        ("/v2/_catalog", 404, ErrorCode.UNSUPPORTED),
        ("*", 404, ErrorCode.UNSUPPORTED),
        ("http://127.0.0.1/v2/library/demo/manifests/v1", 404, ErrorCode.UNSUPPORTED),
        ("/v2//library/demo/manifests/v1", 400, ErrorCode.NAME_INVALID),
        ("//v2/library/demo/manifests/v1", 404, ErrorCode.UNSUPPORTED),
        ("/v2/library//demo/manifests/v1", 400, ErrorCode.NAME_INVALID),
        ("/v2/../demo/manifests/v1", 404, ErrorCode.NAME_UNKNOWN),
        ("/v2/library/../demo/manifests/v1", 400, ErrorCode.NAME_INVALID),
        ("/v2/library/demo/manifests/..", 400, ErrorCode.MANIFEST_INVALID),
        ("/v2/library/demo/manifests/a%2fb", 400, ErrorCode.MANIFEST_INVALID),
        ("/v2/library%2fdemo/manifests/v1", 400, ErrorCode.NAME_INVALID),
        ("/v2/library/demo/manifests/v\0", 400, ErrorCode.MANIFEST_INVALID),
        ("/v2/library/demo/manifests/" + "v" * 129, 400, ErrorCode.MANIFEST_INVALID),
        ("/v2/Library/demo/manifests/v1", 400, ErrorCode.NAME_INVALID),
        ("/v2/" + "a/" * 200 + "manifests/v1", 400, ErrorCode.NAME_INVALID),
        ("/v2/library/demo/manifests/sha256:baddigeststring", 400, ErrorCode.DIGEST_INVALID),
        ("/v2/library/demo/manifests/sha512:" + "0" * 64, 400, ErrorCode.DIGEST_INVALID),
        ("/v2/library/demo/blobs/sha256:" + "A" * 64, 400, ErrorCode.DIGEST_INVALID),
        ("/v2/library/demo/blobs/v1", 400, ErrorCode.DIGEST_INVALID),
        ("/v2/library/demo/referrers/nonsense", 400, ErrorCode.DIGEST_INVALID),
        ("/v2/docker.io/manifests/v1", 400, ErrorCode.NAME_INVALID),
        ("/v2/unknown.example/a/manifests/v1", 404, ErrorCode.NAME_UNKNOWN),
        ("/v2/a/manifests/v1?ns=unknown.example", 404, ErrorCode.NAME_UNKNOWN),
        ("/v2/a/manifests/v1?ns=127.0.0.1:5050", 404, ErrorCode.NAME_UNKNOWN),
        ("/v2/a/manifests/v1?ns=169.254.169.254", 404, ErrorCode.NAME_UNKNOWN),
        ("/v2/a/manifests/v1?ns=docker.io%40evil.example", 404, ErrorCode.NAME_UNKNOWN),
        ("/v2/a/manifests/v1?ns=docker.io/../x", 404, ErrorCode.NAME_UNKNOWN),
        ("/v2/a/manifests/v1?ns=%00", 404, ErrorCode.NAME_UNKNOWN),
    ],
)
def test_anything_else_is_refused(target: str, status: int, code: ErrorCode) -> None:
    refusal = parse_target(target, KNOWN)
    assert isinstance(refusal, Refusal), refusal
    assert (refusal.status, refusal.code) == (status, code)


@pytest.mark.parametrize("ns", ["quay.io", "registry.example.com:8443", "xn--80ak6aa92e.xn--p1ai"])
def test_with_any_registry_allowed_public_names_are(ns: str) -> None:
    assert parse_target(f"/v2/a/manifests/v1?ns={ns}", ANY) == ManifestRoute(Repository(ns, "a"), "v1")
    prefixed = ns.replace(":", "__")
    assert parse_target(f"/v2/{prefixed}/a/manifests/v1", ANY) == ManifestRoute(Repository(ns, "a"), "v1")


@pytest.mark.parametrize(
    "ns",
    ["127.0.0.1", "10.0.0.1:5000", "[::1]:5000", "localhost", "localhost:5000", "registry", "node7.local", "0x7f.1",
     "metadata.google.internal", "a.svc.cluster.local", "127.0.0.0x1", "reg.lan", "1.2.3"],
)  # fmt: skip
def test_with_any_registry_allowed_addresses_and_local_names_are_not(ns: str) -> None:
    refusal = parse_target(f"/v2/a/manifests/v1?ns={ns}", ANY)
    assert isinstance(refusal, Refusal)
    assert refusal.code == ErrorCode.NAME_UNKNOWN


@pytest.mark.parametrize(
    ("asked", "link", "expected"),
    [
        (
            "/v2/docker.io/library/demo/tags/list?n=2",
            '</v2/library/demo/tags/list?last=b&n=2>; rel="next"',
            '</v2/docker.io/library/demo/tags/list?n=2&last=b>; rel="next"',
        ),
        (
            "/v2/library/demo/tags/list?n=2&ns=reg.lab%3A5000",
            '<https://reg.lab:5000/v2/library/demo/tags/list?last=b&n=2>; rel="next"',
            '</v2/library/demo/tags/list?n=2&last=b&ns=reg.lab%3A5000>; rel="next"',
        ),
        ("/v2/library/demo/tags/list", '</v2/x?last=b>; rel="prev"', None),
        ("/v2/library/demo/tags/list", "</v2/x>; rel=next", None),
        ("/v2/library/demo/tags/list", "nonsense", None),
    ],
)
def test_the_link_to_the_next_page_leads_through_the_mirror(asked: str, link: str, expected: str | None) -> None:
    route = parse_target(asked, KNOWN)
    assert isinstance(route, ListRoute)
    assert next_page(link, route) == expected


def test_the_first_value_of_a_key_counts() -> None:
    assert query_value("ns=a&ns=b", "ns") == "a"
    assert query_value("nsx=a&ns", "ns") is None


_PARTS = st.sampled_from(
    ["/v2/", "library/demo", "/manifests/", "/blobs/", "v1", DIGEST, "?ns=", "docker.io", "..", "%2f", "//", "__5000",
     "/tags/list", "/referrers/", "&", "a", ":", "@", "[", "]"]
)  # fmt: skip


@given(st.one_of(st.text(), st.lists(_PARTS, max_size=10).map("".join)), st.sampled_from([KNOWN, ANY]))
def test_no_target_raises_and_what_is_accepted_is_valid(target: str, registries: Registries) -> None:
    route = parse_target(target, registries)
    if isinstance(route, Ping | Refusal):
        return
    assert registries.allows(route.repository.registry)
    assert parse_registry(route.repository.registry) == route.repository.registry
    assert parse_name(route.repository.name) == route.repository.name
    if isinstance(route, BlobRoute):
        assert parse_digest(route.digest) == route.digest
    if isinstance(route, ManifestRoute) and ":" not in route.reference:
        assert parse_tag(route.reference) == route.reference
    assert str(route).startswith(str(route.repository))
