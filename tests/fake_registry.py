# SPDX-License-Identifier: Apache-2.0
"""A small scriptable registry over real loopback sockets, for tests.

It serves manifests and blobs as a registry does, records every request, asks for authorisation where
told to, plays the token service (`/token`) and misbehaves by script:

    async with FakeRegistry().running() as registry:
        digest = registry.add_blob(b"...")
        registry.script("/blobs/", Fault(status=503), Fault(cut_after=10))   # the next two matching requests
        ...
        assert registry.asked("/blobs/") == [...]
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import h11
import trio

from p2pdist.core.types import Digest, parse_digest

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


def digest_of(data: bytes) -> Digest:
    return parse_digest(f"sha256:{hashlib.sha256(data).hexdigest()}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """How one response departs from the right one; what is not given stays right.

    `status`, `body` and `headers` replace or add (a header with an empty value is left out); `redirect`
    answers 307 to that URL; `cut_after` drops the connection after so many body bytes, `stall_after`
    goes silent there (-1: before the headers); `chunked` leaves out the length; `ignore_range` answers 200
    with the whole blob.
    """

    status: int | None = None
    body: bytes | None = None
    headers: tuple[tuple[str, str], ...] = ()
    redirect: str | None = None
    cut_after: int | None = None
    stall_after: int | None = None
    chunked: bool = False
    ignore_range: bool = False


@dataclass(frozen=True, slots=True)
class Recorded:
    """A request as it came, and what it was answered; header names in lower case, repeated ones joined by comma."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    status: int


@dataclass(slots=True)
class _Response:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class FakeRegistry:
    """See the module. `auth` is "", "basic" or "bearer"; what it protects is all of `/v2/`.

    `anonymous` lets the token service give tokens to people without credentials. `realm` is where the
    challenge sends clients, this registry's own `/token` unless set. Tokens are `<token>-<number>`; they
    are good until `revoke`.
    """

    tls: ssl.SSLContext | None = None
    blobs: dict[Digest, bytes] = field(default_factory=dict)
    manifests: dict[tuple[str, str], tuple[str, bytes]] = field(default_factory=dict)
    lists: dict[str, tuple[dict[str, str], bytes]] = field(default_factory=dict)
    """Tags and referrers: by target, the headers and the body."""
    requests: list[Recorded] = field(default_factory=list)
    open_connections: int = 0
    connections: int = 0
    auth: str = ""
    anonymous: bool = True
    username: str = "me"
    password: str = "pw"
    refresh_token: str = "refresh"
    token: str = "token"
    expires_in: int | None = 300
    realm: str | None = None
    every: Fault = field(default_factory=Fault)
    host: str = "127.0.0.1"
    port: int = 0
    _scripts: list[tuple[str, deque[Fault]]] = field(default_factory=list)
    _tokens: int = 0
    _good: set[str] = field(default_factory=set)
    _stalled: trio.Event = field(default_factory=trio.Event)
    _counted: trio.Condition = field(default_factory=trio.Condition)

    @property
    def netloc(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.netloc}"

    def add_blob(self, data: bytes) -> Digest:
        digest = digest_of(data)
        self.blobs[digest] = data
        return digest

    def add_manifest(self, name: str, body: bytes, *, tag: str | None = None, media_type: str = OCI_MANIFEST) -> Digest:
        digest = digest_of(body)
        for reference in (digest, *([tag] if tag else [])):
            self.manifests[name, reference] = (media_type, body)
        return digest

    def add_image(self, name: str, tag: str, layers: list[bytes], config: bytes = b"{}") -> Digest:
        """Add an image of these layers; returns its manifest's digest."""

        def descriptor(data: bytes, media_type: str) -> dict[str, object]:
            return {"mediaType": media_type, "digest": self.add_blob(data), "size": len(data)}

        manifest = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": descriptor(config, OCI_CONFIG),
            "layers": [descriptor(layer, OCI_LAYER) for layer in layers],
        }
        return self.add_manifest(name, json.dumps(manifest).encode(), tag=tag)

    def script(self, matching: str, *faults: Fault) -> None:
        """Use up one fault for each coming request whose method and target (`GET /v2/…`) hold `matching`."""
        self._scripts.append((matching, deque(faults)))

    def asked(self, matching: str = "") -> list[Recorded]:
        """Return the requests whose method and target hold `matching`, in order."""
        return [request for request in self.requests if matching in f"{request.method} {request.target}"]

    def revoke(self) -> None:
        self._good.clear()

    async def wait_stalled(self) -> None:
        """Wait until some response has gone silent by script."""
        await self._stalled.wait()

    async def wait_connections(self, count: int) -> None:
        """Wait until exactly `count` connections are open."""
        async with self._counted:
            while self.open_connections != count:
                await self._counted.wait()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[FakeRegistry]:
        listeners = await trio.open_tcp_listeners(self.port, host=self.host)
        self.port = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, self._serve, listeners)
            yield self
            nursery.cancel_scope.cancel()

    async def _serve(self, plain: trio.SocketStream) -> None:
        stream = trio.SSLStream(plain, self.tls, server_side=True, https_compatible=True) if self.tls else plain
        self.connections += 1
        await self._count(+1)
        try:
            connection = h11.Connection(h11.SERVER)
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError):
                while await self._serve_one(stream, connection) and connection.our_state is not h11.MUST_CLOSE:
                    connection.start_next_cycle()
        finally:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)
                await self._count(-1)

    async def _count(self, change: int) -> None:
        async with self._counted:
            self.open_connections += change
            self._counted.notify_all()

    async def _serve_one(self, stream: trio.abc.Stream, connection: h11.Connection) -> bool:
        request, body = None, b""
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(bytes(await stream.receive_some()))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                return False
        assert request is not None
        return await self._answer(stream, connection, request, body)

    async def _answer(
        self, stream: trio.abc.Stream, connection: h11.Connection, request: h11.Request, body: bytes
    ) -> bool:
        method, target = request.method.decode(), request.target.decode()
        headers: dict[str, str] = {}
        for name, value in request.headers:
            key = name.decode()
            headers[key] = f"{headers[key]}, {value.decode()}" if key in headers else value.decode()
        fault = self._next_fault(f"{method} {target}")
        response = self._respond(method, target, headers, body, fault)
        self.requests.append(Recorded(method, target, headers, body, response.status))
        if fault.stall_after == -1:
            await self._stall(stream)
            return False
        return await self._send(stream, connection, method, response, fault)

    def _next_fault(self, line: str) -> Fault:
        for matching, faults in self._scripts:
            if faults and matching in line:
                return faults.popleft()
        return self.every

    def _respond(self, method: str, target: str, headers: dict[str, str], body: bytes, fault: Fault) -> _Response:
        if fault.redirect is not None:
            response = _Response(307, {"location": fault.redirect}, b"")
        else:
            response = self._right_response(method, target, headers, body, fault)
        if fault.status is not None:
            response = _Response(fault.status, {}, b"")
        if fault.body is not None:
            response.body = fault.body
        response.headers["content-length"] = str(len(response.body))
        response.headers |= {name.lower(): value for name, value in fault.headers}
        if fault.chunked:
            response.headers["content-length"] = ""
            response.headers["transfer-encoding"] = "chunked"
        response.headers = {name: value for name, value in response.headers.items() if value}
        return response

    def _right_response(
        self, method: str, target: str, headers: dict[str, str], body: bytes, fault: Fault
    ) -> _Response:
        path = urlsplit(target).path
        if path == "/token":
            return self._give_token(target, headers, body)
        refusal = self._check(headers, path)
        if refusal is not None:
            return refusal
        if path == "/v2/":
            return _Response(200, {}, b"{}")
        match = re.fullmatch(r"/v2/(.+)/(manifests|blobs)/([^/]+)", path)
        if match and match[2] == "blobs" and match[3] in self.blobs:
            return self._blob(self.blobs[Digest(match[3])], headers, fault)
        if match and (match[1], match[3]) in self.manifests:
            media_type, content = self.manifests[match[1], match[3]]
            return _Response(200, {"content-type": media_type, "docker-content-digest": digest_of(content)}, content)
        if target in self.lists:
            more, content = self.lists[target]
            return _Response(200, {"content-type": "application/json", **more}, content)
        code = "BLOB_UNKNOWN" if match and match[2] == "blobs" else "MANIFEST_UNKNOWN"
        return _Response(404, {}, json.dumps({"errors": [{"code": code, "message": "unknown"}]}).encode())

    def _blob(self, data: bytes, headers: dict[str, str], fault: Fault) -> _Response:
        common = {"content-type": "application/octet-stream", "accept-ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", ""))
        if wanted is None or fault.ignore_range:
            return _Response(200, common, data)
        first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        if first >= len(data):
            return _Response(416, {"content-range": f"bytes */{len(data)}"}, b"")
        return _Response(206, {**common, "content-range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1])

    def _check(self, headers: dict[str, str], path: str) -> _Response | None:
        given = headers.get("authorization", "")
        if self.auth == "basic" and given != self._basic():
            return _Response(401, {"www-authenticate": 'Basic realm="fake"'}, b"")
        if self.auth == "bearer" and given.removeprefix("Bearer ") not in self._good:
            name = re.sub(r"^/v2/|/(manifests|blobs|tags|referrers)/.*$", "", path)
            challenge = f'Bearer realm="{self.realm or self.url + "/token"}",service="fake"'
            scope = f'scope="repository:{name}:pull"'
            return _Response(401, {"www-authenticate": f"{challenge},{scope}"}, b"")
        return None

    def _basic(self) -> str:
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()

    def _give_token(self, target: str, headers: dict[str, str], body: bytes) -> _Response:
        form = parse_qs(body.decode())
        known = headers.get("authorization") == self._basic() or form.get("refresh_token") == [self.refresh_token]
        if not known and (not self.anonymous or "authorization" in headers or form):
            return _Response(401, {}, b"")
        self._tokens += 1
        token = f"{self.token}-{self._tokens}"
        self._good.add(token)
        answer: dict[str, object] = {"access_token" if form else "token": token}
        if self.expires_in is not None:
            answer["expires_in"] = self.expires_in
        return _Response(200, {"content-type": "application/json"}, json.dumps(answer).encode())

    async def _send(
        self, stream: trio.abc.Stream, connection: h11.Connection, method: str, response: _Response, fault: Fault
    ) -> bool:
        headers = [(name.encode(), value.encode()) for name, value in response.headers.items()]
        await stream.send_all(connection.send(h11.Response(status_code=response.status, headers=headers)) or b"")
        if method == "HEAD":
            connection.send(h11.EndOfMessage())
            return True
        stop = min((at for at in (fault.cut_after, fault.stall_after) if at is not None), default=None)
        await stream.send_all(connection.send(h11.Data(data=response.body[:stop])) or b"")
        if stop is not None:
            if fault.stall_after is not None:
                await self._stall(stream)
            return False
        try:
            await stream.send_all(connection.send(h11.EndOfMessage()) or b"")
        except h11.LocalProtocolError:  # a scripted length that is more than the body
            return False
        return True

    async def _stall(self, stream: trio.abc.Stream) -> None:
        """Say nothing until the client goes away."""
        self._stalled.set()
        while await stream.receive_some():
            pass
