# SPDX-License-Identifier: Apache-2.0
"""What is fuzzed: one function per parser of what strangers send.

Each takes any bytes and returns, or raises: then the input is a finding. Beside "no crash" each checks what the parser
promises of its results. The corpus is replayed by the normal tests; `make fuzz` looks for more (docs/testing.md).
"""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import trio
import trio.testing
from trio.testing import MockClock

from p2pdist.core import challenge, oci, ranges, referrers, routes, wire
from p2pdist.core.types import Repository, parse_digest
from p2pdist.errors import InvalidInput, RemoteProtocolError
from p2pdist.net.http_connection import Connection
from p2pdist.net.http_messages import Exchange, Limits, Request, Response
from tests.fuzz.bytesplit import Splitter

if TYPE_CHECKING:
    from collections.abc import Callable

_SIZES = (0, 1, 2, 1000, 1 << 20, (1 << 63) - 1)
_ETAG = f'"sha256:{"0" * 64}"'
_REGISTRIES = routes.Registries(frozenset({"docker.io", "ghcr.io", "reg.lab:5000", "plain"}), "docker.io", True)
_DESCRIPTOR_BYTES = 71
"""No descriptor is shorter than its digest: results do not outgrow what was sent."""


def fuzz_ranges(data: bytes) -> None:
    """Range, If-Range and If-None-Match, against blobs of several sizes."""
    text = data.decode("latin-1")
    ranges.none_match_holds(text, _ETAG)
    ranges.if_range_holds(text, _ETAG)
    for size in _SIZES:
        try:
            spans = ranges.requested_spans(text, size)
        except InvalidInput:
            continue
        for span in spans or ():
            assert 0 <= span.start < span.stop <= size
            assert ranges.content_range(span, size).isascii()
        assert len(spans or ()) <= ranges.RANGES_MAX


def fuzz_manifest(data: bytes) -> None:
    """A manifest or index, under the media type that its first byte chooses, and names of all kinds."""
    choices = ("", *oci.MANIFEST_TYPES, oci.DOCKER_SCHEMA1[0])
    media_type, body = choices[data[0] % len(choices)] if data else "", data[1:]
    try:
        parsed = oci.parse_manifest(body, media_type)
    except InvalidInput:
        return
    named = (*parsed.blobs, *parsed.children, *((parsed.subject,) if parsed.subject else ()))
    assert len(named) <= len(body) // _DESCRIPTOR_BYTES
    for descriptor in named:
        assert parse_digest(descriptor.digest) == descriptor.digest
        assert 0 <= descriptor.size_bytes < 1 << 63
    assert len(parsed.children) == len(parsed.platforms)
    if parsed.kind == "index":
        with suppress(InvalidInput):
            assert oci.pick_platform(parsed, oci.parse_platform("linux/arm/v7")) in parsed.children


def fuzz_names(data: bytes) -> None:
    """Image references as people write them: what is accepted reads the same again."""
    try:
        image = oci.parse_image_reference(data.decode("latin-1"))
    except InvalidInput:
        return
    assert oci.parse_image_reference(str(image)) == image


def fuzz_challenge(data: bytes) -> None:
    """WWW-Authenticate values, one a line, and a token service's answer."""
    values = data.decode("latin-1").split("\n")
    for found in challenge.parse_challenges(values):
        assert found.scheme == found.scheme.lower()
        assert sum(map(len, found.parameters.values())) <= len(data)
        for scope in challenge.pull_scopes("library/alpine", found)[1:]:
            assert not scope.startswith("repository:")
    try:
        token = challenge.parse_token_answer(data)
    except InvalidInput:
        return
    assert token.value.isascii()
    assert 0 < token.lifetime_s <= 3600


def fuzz_routes(data: bytes) -> None:
    """A request's target: nothing is dialled or looked up but what the grammar allows."""
    route = routes.parse_target(data.decode("latin-1"), _REGISTRIES)
    repository = getattr(route, "repository", None)
    if isinstance(repository, Repository):
        assert _REGISTRIES.allows(repository.registry)
        assert oci.parse_registry(repository.registry) == repository.registry
        assert oci.parse_name(repository.name) == repository.name
    match route:
        case routes.ManifestRoute():
            assert oci.parse_reference(route.reference) == route.reference
        case routes.BlobRoute() | routes.SplitRoute():
            assert parse_digest(route.digest) == route.digest
        case routes.ListRoute():
            link = routes.next_page(f"<{data.decode('latin-1')[:200]}>; rel=next", route)
            assert link is None or "\n" not in link
        case routes.Refusal():
            assert route.status in (400, 404)


def fuzz_referrers(data: bytes) -> None:
    """An origin's index of referrers: filtered it has nothing that was not in it, and is an index still."""
    filtered = referrers.only_of_type(data, "application/x")
    if filtered is not None:
        kept = json.loads(filtered)["manifests"]
        assert all(entry["artifactType"] == "application/x" for entry in kept)
        assert len(kept) <= len(json.loads(data)["manifests"])


def fuzz_wire(data: bytes) -> None:
    """What a peer sends, in parts of any length: the parts make no difference, and every message is sent as it came."""
    split = Splitter(data)
    whole, parted = _decoded([split.rest]), _decoded(split.parts())
    assert whole == parted
    for item in whole[0]:
        if isinstance(item, wire.Message):
            frame = wire.encode(item)
            assert wire.Decoder().feed(memoryview(frame)) == [item]


def _decoded(parts: list[bytes]) -> tuple[list[Any], bool]:
    """Return the messages, and the chunk bytes by grant, that came before an error, and whether there was one."""
    decoder, items = wire.Decoder(), []
    failed = False
    for part in parts:
        try:
            fed = decoder.feed(memoryview(part))
        except RemoteProtocolError:
            failed = True
            break
        for item in fed:
            if isinstance(item, wire.Message):
                items.append(item)
            elif items and isinstance(items[-1], list) and items[-1][0] == item.number:
                items[-1][1] += bytes(item.data)
            else:
                items.append([item.number, bytes(item.data)])
    return ([] if failed else items), failed


class _Client(socket.socket):
    """Our end of a pair that is not TCP, so that thousands a second leave nothing behind in the kernel."""

    def setsockopt(self, *_arguments: Any) -> None:  # noqa: ANN401
        pass


class _Recorder:
    """An application that checks and notes what it is asked."""

    def __init__(self) -> None:
        self.methods: list[str] = []
        self.refusals: list[tuple[int, bytes]] = []

    async def handle(self, request: Request) -> Response:
        self.methods.append(request.method)
        assert request.target.isascii()
        for name, value in request.headers:
            assert name == name.lower()
            assert not set(name + value) & set("\r\n\0")
            if request.method in ("GET", "HEAD"):
                assert name != "transfer-encoding"
                assert name != "content-length" or value == "0"
        return Response(200, (("Content-Type", "text/plain"),), b"body", "test")

    def refuse(self, status: int, message: str) -> Response:
        self.refusals.append((status, message.encode(errors="replace")))
        return Response(status, (), self.refusals[-1][1], "test")

    def finished(self, exchange: Exchange) -> None:
        assert exchange.sent_bytes >= 0


class _Places:
    stopping = False

    def fresh(self, wait_s: float) -> trio.CancelScope:
        return trio.move_on_after(wait_s)

    asking = idle = fresh


def fuzz_http(data: bytes) -> None:
    """A whole connection: each sound request is answered once, in order, and the first other one ends it."""
    split = Splitter(data)
    application = _Recorder()
    answers = trio.run(_converse, split, application, clock=MockClock(autojump_threshold=0))
    for method in application.methods:
        head, blank, answers = answers.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert blank
        if method != "HEAD":
            assert answers.startswith(b"body")
            answers = answers[len(b"body") :]
    if not application.refusals:
        assert not answers
        return
    ((status, message),) = application.refusals
    head, _, body = answers.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"Connection: close" in head
    parsed = status == 431 or message.startswith((b"HEAD", b"both"))
    assert body == message or (parsed and not body)


async def _converse(split: Splitter, application: _Recorder) -> bytes:
    """Send the parts, hang up, and return all that was answered."""
    ours, theirs = socket.socketpair()
    client = _Client(fileno=ours.detach())
    theirs.setblocking(False)
    connection = Connection(client, application, Limits(header_bytes=2048), _Places())
    answered = bytearray()
    with theirs:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_run, connection)
            for part in split.parts():
                try:
                    theirs.send(part)
                except OSError:
                    break
                await trio.testing.wait_all_tasks_blocked()
                _drain(theirs, answered)
            with suppress(OSError):
                theirs.shutdown(socket.SHUT_WR)
        _drain(theirs, answered)
    return bytes(answered)


async def _run(connection: Connection) -> None:
    try:
        with suppress(OSError):
            await connection.run()
    finally:
        connection.close()


def _drain(theirs: socket.socket, answered: bytearray) -> None:
    with suppress(OSError):
        while data := theirs.recv(65536):
            answered += data


TARGETS: dict[str, Callable[[bytes], None]] = {
    "ranges": fuzz_ranges,
    "manifest": fuzz_manifest,
    "names": fuzz_names,
    "challenge": fuzz_challenge,
    "routes": fuzz_routes,
    "referrers": fuzz_referrers,
    "wire": fuzz_wire,
    "http": fuzz_http,
}
