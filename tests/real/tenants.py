# SPDX-License-Identifier: Apache-2.0
"""What the tests of private images need: registries with rights, proxies that record, a peer that wants everything."""

from __future__ import annotations

import base64
import json
import socket
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import h11
import httpx
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

from p2pdist.core.types import PeerId
from p2pdist.core.wire import VERSION, ChunkSpan, Decoder, Grant, Hello, Share, Take, encode
from tests.fake_registry import OCI_CONFIG, OCI_LAYER, OCI_MANIFEST, digest_of
from tests.real.cluster import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from p2pdist.core.types import Digest

ALICE, MALLORY = ("alice", "canary-5f3a-of-alice"), ("mallory", "canary-77c0-of-mallory")


def basic(user: tuple[str, str]) -> str:
    return "Basic " + base64.b64encode(":".join(user).encode()).decode()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@asynccontextmanager
async def program(argv: Sequence[str], log: Path, port: int) -> AsyncIterator[trio.Process]:
    """Run a program beside the block, from when it listens on `port`; its output goes to `log`."""
    with log.open("ab") as out:
        process = await trio.lowlevel.open_process(list(argv), stdout=out, stderr=out)
    try:
        await until(lambda: _listens_or_ended(process, port), f"{argv[0]} listens, see {log}")
        assert process.poll() is None, f"it ended at once, see {log}"
        yield process
    finally:
        process.terminate()
        with trio.CancelScope(shield=True), trio.move_on_after(10) as late:
            await process.wait()
        if late.cancelled_caught:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


async def _listens_or_ended(process: trio.Process, port: int) -> bool:
    if process.poll() is not None:
        return True
    try:
        await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
    except OSError:
        return False
    return True


@dataclass(slots=True)
class Tape:
    """A TCP proxy that keeps all that passes it."""

    to_port: int
    port: int = 0
    data: bytearray = field(default_factory=bytearray)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Tape]:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, self._pass, listeners)
            yield self
            nursery.cancel_scope.cancel()

    async def _pass(self, client: trio.SocketStream) -> None:
        try:
            server = await trio.open_tcp_stream("127.0.0.1", self.to_port)
        except OSError:
            await client.aclose()
            return
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(self._copy, client, server, nursery.cancel_scope)
            nursery.start_soon(self._copy, server, client, nursery.cancel_scope)

    async def _copy(self, source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope) -> None:
        try:
            while data := await source.receive_some(65536):
                self.data += data
                await sink.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        scope.cancel()


class TokenService:
    """Gives tokens for docker-registry: pull and push to those in `rights`, to others tokens that open nothing."""

    def __init__(self, directory: Path, rights: dict[tuple[str, str], str]) -> None:
        self.port = 0
        self.given: list[str] = []
        self.bundle = directory / "token.pem"
        self._rights = rights
        self._key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tokens")])
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(self._key.public_key())
        builder = builder.serial_number(1).not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        self._certificate = builder.sign(self._key, hashes.SHA256())
        self.bundle.write_bytes(self._certificate.public_bytes(serialization.Encoding.PEM))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[TokenService]:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, self._serve, listeners)
            yield self
            nursery.cancel_scope.cancel()

    async def _serve(self, stream: trio.SocketStream) -> None:
        connection = h11.Connection(h11.SERVER)
        async with stream:
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    connection.receive_data(await stream.receive_some(65536))
                elif isinstance(event, h11.Request):
                    headers = {name.decode(): value.decode() for name, value in event.headers}
                    asked = parse_qs(urlsplit(event.target.decode()).query)
                    token = self.token(headers.get("authorization", ""), asked.get("scope", [""])[0])
                    body = json.dumps({"token": token, "expires_in": 300}).encode()
                    lengths = [("Content-Length", str(len(body))), ("Connection", "close")]
                    await stream.send_all(connection.send(h11.Response(status_code=200, headers=lengths)) or b"")
                    await stream.send_all(connection.send(h11.Data(data=body)) or b"")
                    return
                else:
                    return

    def token(self, authorization: str, scope: str) -> str:
        user = next((user for user in self._rights if basic(user) == authorization), None)
        kind, name, actions = [*scope.split(":"), "", "", ""][:3]
        rights = user is not None and name.startswith(self._rights[user])
        access = [{"type": kind, "name": name, "actions": actions.split(",")}] if rights else []
        now = int(time.time())
        claims = {"iss": "tokens", "sub": user[0] if user else "", "aud": "registry", "access": access}
        claims |= {"exp": now + 300, "nbf": now - 10, "iat": now, "jti": str(len(self.given))}
        der = self._certificate.public_bytes(serialization.Encoding.DER)
        header = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(der).decode()]}
        signed = ".".join(_b64(json.dumps(part).encode()) for part in (header, claims))
        signature = self._key.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256())
        self.given.append(f"{signed}.{_b64(signature)}")
        return self.given[-1]


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


async def push(url: str, repository: str, layer: bytes, authorization: str) -> Digest:
    """Put an image of one layer into a registry as `v1`; return its manifest's digest."""
    async with httpx.AsyncClient(headers={"Authorization": authorization}, trust_env=False) as client:
        for blob in (b"{}", layer):
            upload = await client.post(f"{url}/v2/{repository}/blobs/uploads/")
            upload.raise_for_status()
            to = httpx.URL(url).join(upload.headers["location"])
            done = await client.put(to.copy_merge_params({"digest": digest_of(blob)}), content=blob)
            done.raise_for_status()
        config = {"mediaType": OCI_CONFIG, "digest": digest_of(b"{}"), "size": 2}
        layers = [{"mediaType": OCI_LAYER, "digest": digest_of(layer), "size": len(layer)}]
        body = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers}).encode()
        target, kind = f"{url}/v2/{repository}/manifests/v1", {"Content-Type": OCI_MANIFEST}
        (await client.put(target, content=body, headers=kind)).raise_for_status()
    return digest_of(body)


async def demand(port: int, digests: Sequence[Digest], seconds: float) -> tuple[bytearray, bytearray]:
    """Be a peer that wants these blobs and takes every chunk that it is granted; return what came, and all bytes."""
    decoder, chunks, everything = Decoder(), bytearray(), bytearray()
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        await stream.send_all(encode(Hello(VERSION, "default", PeerId("e" * 32), 0, "", "", "")))
        for digest in digests:
            await stream.send_all(encode(Share(digest, -1, b"", b"", True, "", False)))
        for number, digest in enumerate(digests):
            await stream.send_all(encode(Take(number, digest, 0)))
        with trio.move_on_after(seconds):
            while data := await stream.receive_some(65536):
                everything += data
                for item in decoder.feed(memoryview(data)):
                    if isinstance(item, ChunkSpan):
                        chunks += item.data
                    elif isinstance(item, Grant):
                        for digest in digests:
                            await stream.send_all(encode(Take(item.number, digest, 0)))
    return chunks, everything
