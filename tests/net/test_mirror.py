# SPDX-License-Identifier: Apache-2.0
"""The `/v2/` endpoint over real loopback sockets: what runtimes send and need, and every odd input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from prometheus_client import CollectorRegistry

from p2pdist.core.oci import OCI_INDEX, OCI_MANIFEST
from p2pdist.core.types import Digest, Repository, Split
from p2pdist.errors import (
    DeniedByOrigin,
    IntegrityError,
    InvalidInput,
    NotFoundAtOrigin,
    OriginError,
    PeerUnavailable,
    PullFailed,
    StoreError,
)
from p2pdist.net.http_messages import Limits
from p2pdist.net.mirror import Deadlines, Mirror, MirrorMetrics
from tests.fakes import FakeBlob, FakeImageSource, FakeRelayed
from tests.http_client import Client, Incomplete, request, start_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DEMO = Repository("docker.io", "library/demo")
LAB = Repository("reg.lab:5000", "team/demo")
MANIFEST = b'{"schemaVersion":2}'
DATA = bytes(range(256)) * 16
ABSENT = Digest("sha256:" + "0" * 64)


class Served:
    """A mirror over a fake source, and clients of it."""

    def __init__(self, nursery: trio.Nursery, deadlines: Deadlines | None = None) -> None:
        self._nursery = nursery
        self.source = FakeImageSource()
        self.registry = CollectorRegistry()
        self.mirror = Mirror(
            self.source,
            ["docker.io", "reg.lab:5000"],
            "docker.io",
            metrics=MirrorMetrics(self.registry),
            deadlines=deadlines,
        )
        self.manifest = self.source.add_manifest(DEMO, OCI_MANIFEST, MANIFEST, "v1")
        self.index = self.source.add_manifest(LAB, OCI_INDEX, b"{}", "v2")
        self.blob = self.source.add_blob(DEMO, DATA)
        self.empty = self.source.add_blob(DEMO, b"")
        self.manifest_url = f"/v2/library/demo/manifests/{self.manifest}?ns=docker.io"
        self.blob_url = f"/v2/library/demo/blobs/{self.blob}?ns=docker.io"
        self.clients: list[Client] = []
        self._port = 0

    async def client(self) -> Client:
        if not self._port:
            _, self._port = await start_server(self._nursery, self.mirror, Limits(write_stall_s=10))
        self.clients.append(await Client.connect(self._port))
        return self.clients[-1]

    def sample(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


@pytest.fixture
async def served(nursery: trio.Nursery, request: pytest.FixtureRequest) -> AsyncIterator[Served]:
    """Yield a mirror, with the `Deadlines` that a test parametrizes; in the end every reader must get closed."""
    served = Served(nursery, getattr(request, "param", None))
    yield served
    for client in served.clients:
        client.stream.socket.close()
    for reader in served.source.readers:
        await reader.closed.wait()


def with_deadlines(**deadlines: float) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("served", [Deadlines(**deadlines)], indirect=True, ids=["short deadlines"])


async def test_the_root_is_a_registry(served: Served) -> None:
    client = await served.client()
    for method in ("GET", "HEAD"):
        answer = await client.get("/v2/", method=method)
        assert answer.status == 200
        assert answer.headers["docker-distribution-api-version"] == "registry/2.0"


# Manifests


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "path",
    ["library/demo/manifests/{}?ns=docker.io", "docker.io/library/demo/manifests/{}", "library/demo/manifests/{}"],
)
@pytest.mark.parametrize("reference", ["v1", "digest"])
async def test_a_manifest_comes_with_all_that_runtimes_need(
    served: Served, method: str, path: str, reference: str
) -> None:
    client = await served.client()
    target = "/v2/" + path.format(served.manifest if reference == "digest" else reference)
    answer = await client.get(target, ("Range", "bytes=0-"), method=method)
    assert answer.status == 200
    assert answer.body == (MANIFEST if method == "GET" else b"")
    assert answer.headers["content-type"] == OCI_MANIFEST
    assert answer.headers["content-length"] == str(len(MANIFEST))
    assert answer.headers["docker-content-digest"] == served.manifest
    assert answer.headers["etag"] == f'"{served.manifest}"'
    assert answer.headers["oci-namespace"] == "docker.io"
    assert answer.headers["docker-distribution-api-version"] == "registry/2.0"
    assert served.source.asked[0][0] == ("manifest" if method == "GET" else "resolve")


@pytest.mark.parametrize("path", ["team/demo/manifests/v2?ns=reg.lab%3A5000", "reg.lab__5000/team/demo/manifests/v2"])
async def test_a_registry_with_a_port_is_reached_by_both_namings(served: Served, path: str) -> None:
    answer = await (await served.client()).get(f"/v2/{path}")
    assert (answer.status, answer.headers["docker-content-digest"]) == (200, served.index)
    assert answer.headers["oci-namespace"] == "reg.lab:5000"
    assert answer.headers["content-type"] == OCI_INDEX


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_manifest_that_the_client_has_is_not_sent_again(served: Served, method: str) -> None:
    client = await served.client()
    known = ("If-None-Match", f'"other", "{served.manifest}"')
    answer = await client.get(served.manifest_url, known, method=method)
    assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", f'"{served.manifest}"')
    assert (await client.get(served.manifest_url, ("If-None-Match", '"other"'))).body == MANIFEST


# Blobs


async def test_a_blob_comes_whole(served: Served) -> None:
    answer = await (await served.client()).get(served.blob_url)
    assert (answer.status, answer.body) == (200, DATA)
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["docker-content-digest"] == served.blob
    assert answer.headers["oci-namespace"] == "docker.io"


async def test_the_head_of_a_blob_opens_no_reader(served: Served) -> None:
    client = await served.client()
    answer = await client.head(served.blob_url, ("Range", "bytes=0-9"))
    assert (answer.status, answer.headers["content-length"]) == (200, str(len(DATA)))
    assert answer.headers["docker-content-digest"] == served.blob
    assert not served.source.readers


@pytest.mark.parametrize(
    ("value", "start", "stop"),
    [("bytes=0-0", 0, 1), ("bytes=100-199", 100, 200), ("bytes=4000-", 4000, 4096), ("bytes=-96", 4000, 4096),
     ("bytes=4095-9999", 4095, 4096), ("bytes=0-", 0, 4096)],
)  # fmt: skip
async def test_a_range_is_answered_with_just_that(served: Served, value: str, start: int, stop: int) -> None:
    answer = await (await served.client()).get(served.blob_url, ("Range", value))
    assert (answer.status, answer.body) == (206, DATA[start:stop])
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(DATA)}"
    assert answer.headers["content-length"] == str(stop - start)


@pytest.mark.parametrize(
    "headers",
    [
        (("Range", "nonsense"),),
        (("Range", "items=0-5"),),
        (("Range", "bytes=0-,5-6"),),
        (("Range", "bytes=0-1"), ("If-Range", '"sha256:other"')),
        (("Range", "bytes=0-1"), ("If-Range", "Sat, 29 Oct 1994 19:43:31 GMT")),
    ],
)
async def test_other_ranges_get_the_whole(served: Served, headers: tuple[tuple[str, str], ...]) -> None:
    answer = await (await served.client()).get(served.blob_url, *headers)
    assert (answer.status, answer.body) == (200, DATA)


async def test_containerd_is_not_let_fetch_parts_of_a_layer_at_once_but_may_resume(served: Served) -> None:
    client = await served.client()
    agent = ("User-Agent", "containerd/2.4.2")
    answer = await client.get(served.blob_url, ("Range", "bytes=0-"), agent)
    assert (answer.status, answer.body) == (200, DATA)
    assert "content-range" not in answer.headers
    answer = await client.get(served.blob_url, ("Range", "bytes=1-"), agent)
    assert (answer.status, answer.body) == (206, DATA[1:])


async def test_if_range_with_our_tag_keeps_the_range(served: Served) -> None:
    headers = (("Range", "bytes=0-1"), ("If-Range", f'"{served.blob}"'))
    assert (await (await served.client()).get(served.blob_url, *headers)).status == 206


async def test_a_range_past_the_end_is_416_with_the_size(served: Served) -> None:
    client = await served.client()
    answer = await client.get(served.blob_url, ("Range", f"bytes={len(DATA)}-"))
    assert (answer.status, answer.headers["content-range"]) == (416, f"bytes */{len(DATA)}")
    assert answer.code == "UNSUPPORTED"
    assert (await client.get("/v2/")).status == 200
    assert served.source.readers[0].closed.is_set()


@pytest.mark.parametrize("ranges", [129, 1024])
async def test_too_many_ranges_are_400_however_long_their_header(served: Served, ranges: int) -> None:
    client = await served.client()
    answer = await client.get(served.blob_url, ("Range", "bytes=" + ",".join(["1000000000-1000009999"] * ranges)))
    assert answer.status == 400
    assert "ranges" in answer.json["errors"][0]["message"]
    assert served.source.readers[0].closed.is_set()


@pytest.mark.parametrize("headers", [(), (("Range", "bytes=0-"),)])
async def test_an_empty_blob_is_200(served: Served, headers: tuple[tuple[str, str], ...]) -> None:
    client = await served.client()
    answer = await client.get(f"/v2/library/demo/blobs/{served.empty}", *headers)
    assert (answer.status, answer.headers["content-length"], answer.body) == (200, "0", b"")
    assert (await client.get("/v2/")).status == 200
    assert served.source.readers[0].closed.is_set()


async def test_a_blob_that_the_client_has_is_not_sent_again(served: Served) -> None:
    client = await served.client()
    answer = await client.get(served.blob_url, ("If-None-Match", f'"{served.blob}"'))
    assert (answer.status, answer.body) == (304, b"")
    assert served.source.readers[0].closed.is_set()


async def test_a_blob_is_streamed_while_it_arrives(served: Served) -> None:
    blob = FakeBlob(b"x" * 3000, arrived_bytes=0)
    digest = served.source.add_blob(DEMO, blob)
    client = await served.client()
    await client.send(request(f"/v2/library/demo/blobs/{digest}"))
    for arrived_bytes in (1000, 2000, 3000):
        await served.source.entered.wait()
        blob.arrive(arrived_bytes)
        if arrived_bytes == 1000:
            _, reading = await client.start()
        await client.read_exactly(reading, 1000)


async def test_the_readers_of_parallel_ranges_are_independent(served: Served) -> None:
    blob = FakeBlob(b"0123456789" * 1000, arrived_bytes=5000)
    digest = served.source.add_blob(DEMO, blob)
    early, late = await served.client(), await served.client()
    await late.send(request(f"/v2/library/demo/blobs/{digest}", ("Range", "bytes=9000-")))
    assert (await early.get(f"/v2/library/demo/blobs/{digest}", ("Range", "bytes=0-99"))).body == blob.data[:100]
    blob.arrive(10_000)
    assert (await late.answer()).body == blob.data[9000:]


# Failures


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("leaf", "code"), [(f"manifests/{ABSENT}", "MANIFEST_UNKNOWN"), (f"blobs/{ABSENT}", "BLOB_UNKNOWN")]
)
async def test_what_the_origin_does_not_have_is_404(served: Served, method: str, leaf: str, code: str) -> None:
    client = await served.client()
    answer = await client.get(f"/v2/library/demo/{leaf}", method=method)
    assert answer.status == 404
    assert answer.headers["docker-distribution-api-version"] == "registry/2.0"
    assert answer.body == b"" if method == "HEAD" else answer.code == code
    assert (await client.get("/v2/")).status == 200


FAILURES = [
    (InvalidInput("a retired format"), 400, "MANIFEST_INVALID", "UNSUPPORTED"),
    (NotFoundAtOrigin("gone", status_code=404), 404, "MANIFEST_UNKNOWN", "BLOB_UNKNOWN"),
    (DeniedByOrigin("private", status_code=401), 404, "DENIED", "DENIED"),
    (OriginError("slow down", status_code=429, retry_after_s=9.0), 503, "UNAVAILABLE", "UNAVAILABLE"),
    (OriginError("no connection"), 503, "UNAVAILABLE", "UNAVAILABLE"),
    (OriginError("broken", status_code=502), 503, "UNAVAILABLE", "UNAVAILABLE"),
    (PullFailed("sha256:x", [PeerUnavailable("peer a left")]), 503, "UNAVAILABLE", "UNAVAILABLE"),
    (PullFailed("sha256:x", [PeerUnavailable("a"), NotFoundAtOrigin("gone")]), 404, "MANIFEST_UNKNOWN", "BLOB_UNKNOWN"),
    (PullFailed("sha256:x", [DeniedByOrigin("private")]), 404, "DENIED", "DENIED"),
    (StoreError("disk full"), 503, "UNAVAILABLE", "UNAVAILABLE"),
    (IntegrityError("too large"), 502, "MANIFEST_INVALID", None),
    (IntegrityError("wrong bytes"), 503, None, "UNAVAILABLE"),
    (RuntimeError("a bug"), 500, "UNKNOWN", "UNKNOWN"),
]


@pytest.mark.parametrize(("error", "status", "of_manifest", "of_blob"), FAILURES, ids=lambda value: repr(value)[:60])
async def test_an_error_before_the_headers_is_worded_for_the_runtime(
    served: Served, error: Exception, status: int, of_manifest: str | None, of_blob: str | None
) -> None:
    served.source.error = error
    client = await served.client()
    for target, code in ((served.manifest_url, of_manifest), (served.blob_url, of_blob)):
        if code is not None:
            answer = await client.get(target)
            assert (answer.status, answer.code) == (status, code)
            assert answer.headers["content-type"] == "application/json"
            assert (await client.head(target)).status == status
    served.source.error = None
    assert (await client.get(served.blob_url)).body == DATA


async def test_the_reason_reaches_the_person_behind_the_runtime(served: Served) -> None:
    served.source.error = DeniedByOrigin("docker.io refuses library/demo", status_code=403)
    answer = await (await served.client()).get(served.manifest_url)
    assert answer.json["errors"][0]["message"] == "docker.io refuses library/demo"
    assert answer.json["errors"][0]["detail"]["origin_status"] == 403


async def test_a_pull_that_fails_before_its_first_chunk_is_503(served: Served) -> None:
    blob = FakeBlob(b"x" * 1000, arrived_bytes=0)
    digest = served.source.add_blob(DEMO, blob)
    client = await served.client()
    await client.send(request(f"/v2/library/demo/blobs/{digest}"))
    await served.source.entered.wait()
    blob.fail(PullFailed(digest, []))
    assert (await client.answer()).status == 503
    assert served.source.readers[0].closed.is_set()


async def test_a_pull_that_fails_later_cuts_the_body(served: Served) -> None:
    blob = FakeBlob(b"x" * 2000, arrived_bytes=1000)
    digest = served.source.add_blob(DEMO, blob)
    client = await served.client()
    await client.send(request(f"/v2/library/demo/blobs/{digest}"))
    answer, reading = await client.start()
    assert answer.status == 200
    await client.read_exactly(reading, 1000)
    blob.fail(PullFailed(digest, []))
    with pytest.raises(Incomplete):
        await client.rest(reading)
    await served.source.readers[0].closed.wait()
    assert (await (await served.client()).get("/v2/")).status == 200
    assert served.sample("p2pdist_mirror_cut_total") == 1


@with_deadlines(first_chunk_s=0.01)
async def test_headers_come_though_the_first_chunk_is_slow(served: Served) -> None:
    blob = FakeBlob(b"x" * 1000, arrived_bytes=0)
    digest = served.source.add_blob(DEMO, blob)
    client = await served.client()
    await client.send(request(f"/v2/library/demo/blobs/{digest}"))
    answer, reading = await client.start()
    assert answer.status == 200
    blob.arrive(1000)
    assert await client.rest(reading) == blob.data


@with_deadlines(manifest_s=0.02, blob_s=0.02)
@pytest.mark.parametrize("leaf", ["manifests/v1", f"blobs/{ABSENT}", "tags/list"])
async def test_a_source_that_does_not_answer_is_503_after_the_deadline(served: Served, leaf: str) -> None:
    served.source.gate = trio.Event()
    client = await served.client()
    answer = await client.get(f"/v2/library/demo/{leaf}")
    assert (answer.status, answer.code) == (503, "UNAVAILABLE")
    assert "library/demo" in answer.json["errors"][0]["message"]
    assert served.source.cancelled


@with_deadlines(blob_s=0.02, first_chunk_s=60)
async def test_a_first_chunk_beyond_the_whole_deadline_is_503_and_the_reader_closed(served: Served) -> None:
    digest = served.source.add_blob(DEMO, FakeBlob(b"x" * 1000, arrived_bytes=0))
    client = await served.client()
    assert (await client.get(f"/v2/library/demo/blobs/{digest}")).status == 503
    assert served.source.readers[0].closed.is_set()


async def test_a_client_that_hangs_up_cancels_only_its_own_call(served: Served) -> None:
    served.source.gate = trio.Event()
    leaving, staying = await served.client(), await served.client()
    await leaving.send(request(served.blob_url))
    await served.source.entered.wait()
    await staying.send(request(served.manifest_url))
    await trio.testing.wait_all_tasks_blocked()
    await leaving.stream.aclose()
    await trio.testing.wait_all_tasks_blocked()
    assert served.source.cancelled
    served.source.gate.set()
    assert (await staying.answer()).body == MANIFEST
    assert not served.source.readers


async def test_a_client_that_hangs_up_before_the_first_chunk_closes_its_reader(served: Served) -> None:
    digest = served.source.add_blob(DEMO, FakeBlob(b"x" * 1000, arrived_bytes=0))
    client = await served.client()
    await client.send(request(f"/v2/library/demo/blobs/{digest}"))
    await served.source.entered.wait()
    await trio.testing.wait_all_tasks_blocked()
    await client.stream.aclose()
    await served.source.readers[0].closed.wait()
    assert served.source.readers[0].cancelled


# Lists


async def test_tags_are_relayed_with_their_next_page(served: Served) -> None:
    headers = [
        ("Content-Type", "application/json; charset=utf-8"),
        ("Link", '</v2/library/demo/tags/list?last=b&n=2>; rel="next"'),
        ("Set-Cookie", "secret=1"),
        ("Www-Authenticate", "Bearer"),
    ]
    served.source.relayed["tags/list?n=2"] = FakeRelayed(200, headers, b'{"tags":[]}')
    answer = await (await served.client()).get("/v2/docker.io/library/demo/tags/list?n=2")
    assert (answer.status, answer.body) == (200, b'{"tags":[]}')
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert answer.headers["link"] == '</v2/docker.io/library/demo/tags/list?n=2&last=b>; rel="next"'
    assert not {"set-cookie", "www-authenticate"} & answer.headers.keys()


async def test_referrers_are_relayed_with_accept_and_filter(served: Served) -> None:
    target = f"referrers/{ABSENT}?artifactType=a/b"
    served.source.relayed[target] = FakeRelayed(
        200, [("content-type", OCI_INDEX), ("OCI-Filters-Applied", "artifactType")], b"{}"
    )
    client = await served.client()
    answer = await client.get(f"/v2/library/demo/{target}&ns=docker.io", ("Accept", OCI_INDEX), ("Accept", "*/*"))
    assert (answer.status, answer.headers["content-type"]) == (200, OCI_INDEX)
    assert answer.headers["oci-filters-applied"] == "artifactType"
    assert served.source.accepts == [f"{OCI_INDEX}, */*"]


@pytest.mark.parametrize(
    ("origin", "status", "code"),
    [(404, 404, "NAME_UNKNOWN"), (401, 404, "DENIED"), (403, 404, "DENIED"), (429, 503, "UNAVAILABLE"),
     (500, 503, "UNAVAILABLE"), (302, 503, "UNAVAILABLE")],
)  # fmt: skip
async def test_a_list_that_the_origin_refuses_is_worded_like_all_else(
    served: Served, origin: int, status: int, code: str
) -> None:
    served.source.relayed["tags/list"] = FakeRelayed(origin, [("Www-Authenticate", "Basic")], b"secret")
    answer = await (await served.client()).get("/v2/library/demo/tags/list")
    assert (answer.status, answer.code) == (status, code)
    assert "www-authenticate" not in answer.headers


# Hostile or odd input


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_pushes_are_405(served: Served, method: str) -> None:
    client = await served.client()
    answer = await client.get("/v2/library/demo/blobs/uploads/", method=method)
    assert (answer.status, answer.code, answer.headers["allow"]) == (405, "UNSUPPORTED", "GET, HEAD")
    assert not served.source.asked


async def test_a_push_with_a_body_is_405_too(served: Served) -> None:
    client = await served.client()
    await client.send(request("/v2/a/manifests/v1", ("Content-Length", "70000"), method="PUT") + b"x" * 70_000)
    assert (await client.answer()).status == 405


@pytest.mark.parametrize(
    ("target", "status", "code"),
    [
        ("/v2/library/demo/manifests/sha256:baddigeststring", 400, "DIGEST_INVALID"),
        ("/v2/library/demo/blobs/sha512:" + "0" * 64, 400, "DIGEST_INVALID"),
        ("/v2/library/demo/blobs/sha256:" + "0" * 63, 400, "DIGEST_INVALID"),
        ("/v2/library/demo/referrers/sha256:x", 400, "DIGEST_INVALID"),
        ("/v2/library/../etc/manifests/v1", 400, "NAME_INVALID"),
        ("/v2/library/demo/manifests/../../x", 404, "UNSUPPORTED"),
        ("/v2/library%2fdemo/manifests/v1", 400, "NAME_INVALID"),
        ("/v2/library//demo/manifests/v1", 400, "NAME_INVALID"),
        ("http://127.0.0.1/v2/library/demo/manifests/v1", 404, "UNSUPPORTED"),
        ("/v2/library/demo/manifests/v1?ns=unknown.example", 404, "NAME_UNKNOWN"),
        ("/v2/library/demo/manifests/v1?ns=169.254.169.254", 404, "NAME_UNKNOWN"),
        ("/v2/library/demo/manifests/v1?ns=127.0.0.1:5050", 404, "NAME_UNKNOWN"),
        ("/v2/unknown.example/demo/manifests/v1", 404, "NAME_UNKNOWN"),
        ("/v1/_ping", 404, "UNSUPPORTED"),
    ],
)
async def test_odd_targets_are_refused_and_nobody_is_asked(served: Served, target: str, status: int, code: str) -> None:
    client = await served.client()
    answer = await client.get(target)
    assert (answer.status, answer.code) == (status, code)
    assert (await client.get("/v2/")).status == 200
    assert not served.source.asked


async def test_a_request_of_another_mirror_is_not_passed_on(served: Served) -> None:
    answer = await (await served.client()).get(served.manifest_url, ("X-P2pdist-Hop", "1"))
    assert answer.status == 404
    assert not served.source.asked


async def test_what_is_no_http_is_refused_in_the_words_of_a_registry(served: Served) -> None:
    client = await served.client()
    await client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    answer = await client.answer()
    assert (answer.status, answer.code) == (400, "UNSUPPORTED")


# Metrics


async def test_requests_and_bytes_are_counted_by_kind_and_status(served: Served) -> None:
    client = await served.client()
    await client.get(served.blob_url)
    await client.get(served.blob_url, ("Range", "bytes=0-9"))
    await client.get(served.manifest_url)
    await client.get(f"/v2/library/demo/blobs/{ABSENT}")
    await client.get("/v2/")
    await trio.testing.wait_all_tasks_blocked()
    total = "p2pdist_mirror_requests_total"
    assert served.sample(total, kind="blob", status="200") == 1
    assert served.sample(total, kind="blob", status="206") == 1
    assert served.sample(total, kind="blob", status="404") == 1
    assert served.sample(total, kind="ping", status="200") == 1
    assert served.sample("p2pdist_mirror_first_byte_seconds_count", kind="manifest") == 1
    assert (served.sample("p2pdist_mirror_sent_bytes_total") or 0) >= len(DATA) + 10 + len(MANIFEST)
    assert served.sample("p2pdist_mirror_cut_total") == 0


async def test_a_blob_says_whether_it_was_here_and_where_its_bytes_came_from(served: Served) -> None:
    served.source.splits[served.blob] = Split(from_peers=5, from_origin=7)
    client = await served.client()
    assert (await client.get(served.blob_url)).headers["p2pdist-source"] == "swarm"
    answer = await client.get(f"/v2/_p2pdist/pulls/{served.blob}")
    assert (answer.status, answer.body) == (200, b'{"from_peers": 5, "from_origin": 7, "from_cache": 0}')
    assert (await client.get(f"/v2/_p2pdist/pulls/{ABSENT}")).status == 404
    assert (await client.get("/v2/_p2pdist/pulls/sha256:x")).status == 400


# Callers


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("what", ["manifests/v1", "manifest", "blob", "tags/list"])
async def test_the_source_hears_who_asks(served: Served, method: str, what: str) -> None:
    target = {"manifest": served.manifest_url, "blob": served.blob_url}.get(
        what, f"/v2/library/demo/{what}?ns=docker.io"
    )
    client = await served.client()
    await client.get(target, ("Authorization", "Bearer secret"), method=method)
    await client.get(target, method=method)
    await client.get(target, ("Authorization", "Bearer a"), ("Authorization", "Bearer b"), method=method)
    assert [caller.authorization for caller in served.source.callers] == ["Bearer secret", "", ""]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_the_origins_challenge_is_passed_on(served: Served, method: str) -> None:
    challenge = 'Bearer realm="https://auth.test/token",service="s"'
    served.source.error = DeniedByOrigin("not to this caller", status_code=401, challenges=(challenge,))
    answer = await (await served.client()).get(served.manifest_url, method=method)
    assert (answer.status, answer.headers["www-authenticate"]) == (401, challenge)
    if method == "GET":
        assert answer.code == "UNAUTHORIZED"


async def test_a_refusal_without_a_challenge_sends_the_runtime_to_the_registry(served: Served) -> None:
    served.source.error = DeniedByOrigin("refused", status_code=401)
    answer = await (await served.client()).get(served.manifest_url, ("Authorization", "Bearer canary"))
    assert (answer.status, answer.code) == (404, "DENIED")
    assert "www-authenticate" not in answer.headers
    assert b"canary" not in answer.body
