# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import trio

from bench.lab.hosts import Lab, loopback_lab
from bench.lab.images import Image, make_random_image
from bench.lab.processes import ProcessGroup
from bench.lab.pullers import Pull, Source, pull
from bench.lab.registry import Registry, start_registry
from bench.lab.workspace import Workspace
from tests.real.cluster import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@dataclass
class Served:
    lab: Lab
    registry: Registry
    image: Image

    async def pull(self, reference: str = "v1", *, ns: str | None = None, deadline_s: float = 60) -> Pull:
        record = Pull("node")
        source = Source(self.registry.base_url, ns)
        await pull(record, self.lab["node"], source, "team/demo", reference, deadline_s=deadline_s)
        return record

    def log(self) -> str:
        return self.registry.process.log.read_text()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    space = Workspace(tmp_path, on_tmpfs=False)
    image = await make_random_image(tmp_path / "image", image_bytes=4 << 20, layers=5, seed=1, multi_arch=True)
    with loopback_lab(["registry", "node"]) as lab, ProcessGroup(space.logs) as group:
        registry = await start_registry(group, lab["registry"], space, program=None)
        registry.push(image, "team/demo")
        yield Served(lab, registry, image)


async def test_every_part_of_an_image_is_pulled_once_and_checked(served: Served) -> None:
    record = await served.pull()
    assert record.right
    assert record.done_bytes == record.total_bytes == served.image.pull_bytes + served.image.root.size_bytes
    assert len(record.ttfb_s) == len(served.image.layers) + 1
    digests = [part.digest for part in (served.image.manifest, served.image.config, *served.image.layers)]
    # The registry writes a line after the answer: the last ones may still be missing.
    await until(lambda: all(digest in served.log() for digest in digests), "a line for each part")
    assert [served.log().count(digest) for digest in digests] == [1] * len(digests)
    assert served.image.others[0].digest not in served.log(), "another platform's manifest was pulled"


async def test_a_mirror_is_told_the_registry_that_it_stands_for(served: Served) -> None:
    record = await served.pull(ns="registry.lab:5000")
    assert record.right
    assert all("?ns=registry.lab%3A5000" in line for line in served.log().splitlines())


async def test_a_blob_that_does_not_match_its_digest_fails_the_pull(served: Served) -> None:
    layer = served.image.layers[2]
    path = served.image.blob_path(layer)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    record = await served.pull()
    assert not record.right
    assert record.ended
    assert record.error is not None
    assert f"asked for {layer.digest}" in record.error


async def test_a_blob_of_another_size_fails_the_pull(served: Served) -> None:
    path = served.image.blob_path(served.image.layers[0])
    path.write_bytes(path.read_bytes()[:-1])
    record = await served.pull()
    assert record.error is not None
    assert "the manifest says" in record.error


@pytest.mark.parametrize("reference", ["v2", "sha256:" + "0" * 64])
async def test_what_the_registry_refuses_fails_the_pull(served: Served, reference: str) -> None:
    record = await served.pull(reference)
    assert record.error is not None
    assert "status 404" in record.error


async def test_a_registry_that_is_gone_fails_the_pull(served: Served) -> None:
    served.registry.process.kill()
    record = await served.pull()
    assert record.error is not None
    assert "refused" in record.error


async def _serve_once(listener: trio.SocketListener, answer: bytes, then_silent: bool) -> None:
    stream = await listener.accept()
    async with stream:
        await stream.receive_some()
        await stream.send_all(answer)
        if then_silent:
            await trio.sleep_forever()


@pytest.mark.parametrize(
    ("answer", "then_silent", "why"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", True, "without Content-Length"),
        (b"", False, "closed before it answered"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", False, "illegal status line"),
        (b"", True, "not finished after 0 s"),
    ],
    ids=["chunked", "closed", "not HTTP", "silent"],
)
async def test_a_mirror_that_answers_wrongly_or_not_fails_the_pull(answer: bytes, then_silent: bool, why: str) -> None:
    record = Pull("node")
    with loopback_lab(["node"]) as lab:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve_once, listener, answer, then_silent)
            source = Source(f"http://127.0.0.1:{listener.socket.getsockname()[1]}")
            await pull(record, lab["node"], source, "team/demo", "v1", deadline_s=0.3 if then_silent else 60)
            nursery.cancel_scope.cancel()
        await listener.aclose()
    assert record.error is not None
    assert why in record.error.lower() or why in record.error


async def test_a_body_that_is_cut_off_fails_the_pull() -> None:
    record = Pull("node")
    answer = b"HTTP/1.1 404 Not Found\r\nContent-Length: 100\r\n\r\nshort"
    with loopback_lab(["node"]) as lab:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def serve() -> None:
            await _serve_once(listener, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", False)
            await _serve_once(listener, answer, False)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            source = Source(f"http://127.0.0.1:{listener.socket.getsockname()[1]}")
            await pull(record, lab["node"], source, "team/demo", "v1", deadline_s=60)
            nursery.cancel_scope.cancel()
        await listener.aclose()
    assert record.error is not None
