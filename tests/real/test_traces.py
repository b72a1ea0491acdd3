# SPDX-License-Identifier: Apache-2.0
"""What Docker and CRI-O send, recorded on the wire, sent again; the answers are checked as these clients check them.

`traces/*.json` keep each request's headers as they came, in order; `{index}`, `{layer0}` and the like stand for what
depends on the image, `{part}` for where a cut layer is resumed. A request without `Connection: close` is followed by
the next one on the same connection.
"""

from __future__ import annotations

import hashlib
import json
import re
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.http_client import Answer, Client
from tests.real.cluster import ALONE, DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from bench.lab.images import Image
    from p2pdist.core.types import Descriptor
    from tests.real.cluster import Cluster

TRACES = {path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "traces").glob("*.json"))}
SETTINGS = 'default_registry = "registry.lab"\n'
"""Docker names no registry."""

CONTENT_RANGE = re.compile(r"bytes ([0-9]+)-([0-9]+)/([0-9]+)")


@pytest.mark.parametrize("client", TRACES)
async def test_recorded_requests_are_answered_as_their_client_demands_cold_and_warm(
    client: str, image: Image, cluster_of: Callable[..., AbstractAsyncContextManager[Cluster]]
) -> None:
    recorded = TRACES[client]
    async with cluster_of(image, nodes=1, found_by=ALONE) as cluster:
        (agent,) = await cluster.start("node1", settings=SETTINGS)
        for _ in ("cold", "warm"):
            if recorded.get("tls_first"):
                await expect_quick_refusal_of_tls(cluster)
            await Replay(cluster, image, agent.source.base_url.removeprefix("http://")).run(recorded["requests"])
            await cluster.settled()
        assert (await cluster.moved("node1"))["from_origin"] <= image.pull_bytes


class Replay:
    """One pull."""

    def __init__(self, cluster: Cluster, image: Image, mirror: str) -> None:
        self._host = cluster.lab["node1"]
        self._image = image
        self._mirror = mirror
        self._contents = {"index": image.root, "manifest": image.manifest, "config": image.config}
        self._contents |= {f"layer{number}": layer for number, layer in enumerate(image.layers)}
        self._client: Client | None = None

    async def run(self, requests: list[dict[str, Any]]) -> None:
        for request in requests:
            with trio.fail_after(DEADLINE_S):
                answer = await self._ask(request)
            self._check(request, answer)
        await self._hang_up()

    async def _ask(self, request: dict[str, Any]) -> Answer:
        if self._client is None:
            self._client = await connect(self._host.socket(), self._mirror)
        lines = [f"{request['method']} {request['target']} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in request["headers"]]
        wanted = self._about(request)
        text = "\r\n".join([*lines, "", ""]).replace("{mirror}", self._mirror)
        if wanted is not None:
            text = text.replace("{part}", str(wanted.size_bytes // 4))
        for name, descriptor in self._contents.items():
            text = text.replace(f"{{{name}}}", descriptor.digest)
        await self._client.send(text.encode("ascii"))
        answer = await self._client.answer(request["method"])
        if ["Connection", "close"] in request["headers"]:
            await self._hang_up()
        return answer

    async def _hang_up(self) -> None:
        if self._client is not None:
            await self._client.stream.aclose()
            self._client = None

    def _about(self, request: dict[str, Any]) -> Descriptor | None:
        """Return the content that is asked for, None where the target names none."""
        named = re.search(r"\{(\w+)\}", request["target"])
        if named:
            return self._contents[named[1]]
        return self._contents["index"] if "/manifests/" in request["target"] else None

    def _check(self, request: dict[str, Any], answer: Answer) -> None:
        wanted = self._about(request)
        part = any(name == "Range" for name, _ in request["headers"])
        assert answer.status == (206 if part else 200), answer.body[:300]
        if wanted is None:
            assert answer.headers["docker-distribution-api-version"] == "registry/2.0"
            return
        assert answer.headers["docker-content-digest"] == wanted.digest
        assert "content-encoding" not in answer.headers
        if "/manifests/" in request["target"]:
            assert answer.headers["content-type"] == wanted.media_type
        if part:
            content = self._image.blob_path(wanted).read_bytes()
            expect_rest(answer, content, wanted.size_bytes // 4)
            return
        assert int(answer.headers["content-length"]) == wanted.size_bytes
        if request["method"] == "GET":
            assert f"sha256:{hashlib.sha256(answer.body).hexdigest()}" == wanted.digest


def expect_rest(answer: Answer, content: bytes, start: int) -> None:
    """Both clients resume only with an answer that reaches to the end of the blob and says so."""
    said = CONTENT_RANGE.fullmatch(answer.headers["content-range"])
    assert said, answer.headers
    assert [int(number) for number in said.groups()] == [start, len(content) - 1, len(content)]
    assert answer.body == content[start:]


async def connect(plain: Any, address: str) -> Client:  # noqa: ANN401
    host, _, port = address.rpartition(":")
    connection = trio.socket.from_stdlib_socket(plain)
    await connection.connect((host, int(port)))
    return Client(trio.SocketStream(connection))


async def expect_quick_refusal_of_tls(cluster: Cluster) -> None:
    """containers/image tries https first, also where it may speak http: an answer that is no TLS ends that at once."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    agent = cluster.agents["node1"]
    client = await connect(agent.host.socket(), agent.source.base_url.removeprefix("http://"))
    async with client.stream:
        await client.send(outgoing.read())
        with trio.fail_after(DEADLINE_S):
            assert (await client.ends()).startswith(b"HTTP/1.1 400 ")
