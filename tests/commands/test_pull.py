# SPDX-License-Identifier: Apache-2.0
"""`p2pdist pull` from outside: over a real connection, with its exit codes and what it prints."""

from __future__ import annotations

import json
import random
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner

from p2pdist.cli import main
from tests.commands.fake_mirror import FakeMirror

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from click.testing import Result

LAYERS = [random.Random(seed).randbytes(200_000 + seed) for seed in range(4)]


class Handler(BaseHTTPRequestHandler):
    """Serves a FakeMirror's content over HTTP/1.1; cuts each blob named in `cuts` once, half-way."""

    protocol_version = "HTTP/1.1"
    content: ClassVar[FakeMirror]
    cuts: ClassVar[set[str]]

    def do_GET(self) -> None:
        name = urlsplit(self.path).path.rpartition("/")[2]
        if name in self.content.manifests:
            media_type, body = self.content.manifests[name]
            self._answer(200, body, {"Content-Type": media_type})
        elif name in self.content.blobs and "/blobs/" in self.path:
            self._blob(name, self.content.blobs[name])
        else:
            self._answer(404, b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"gone"}]}', {})

    def _blob(self, name: str, body: bytes) -> None:
        start = int(re.sub(r"\D", "", self.headers.get("Range", "0")))
        headers = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        cut = name in self.cuts and len(body) > 10
        if cut:
            self.cuts.discard(name)
        self._answer(206 if start else 200, body[start:], headers, sent=len(body) // 2 if cut else None)

    def _answer(self, status: int, body: bytes, headers: dict[str, str], sent: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:sent])
        self.close_connection = sent is not None

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the parent's name
        pass


@contextmanager
def serving(content: FakeMirror, cuts: set[str] | None = None) -> Iterator[str]:
    handler = type("Serving", (Handler,), {"content": content, "cuts": cuts or set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def invoke(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, ["pull", *arguments], env=env)


@pytest.fixture
def content() -> FakeMirror:
    content = FakeMirror()
    content.add_image(LAYERS, tag="v1")
    return content


def test_an_image_becomes_a_layout(content: FakeMirror, tmp_path: Path) -> None:
    with serving(content) as url:
        result = invoke("--mirror", url, "reg.lab/app:v1", "--output", f"oci:{tmp_path}/out")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("pulled reg.lab/app:v1 sha256:")
    assert result.stdout.count("\n") == 1
    assert json.loads((tmp_path / "out/index.json").read_bytes())["manifests"]
    assert len(list((tmp_path / "out/blobs/sha256").iterdir())) == len(LAYERS) + 2


def test_cut_connections_are_got_over(content: FakeMirror) -> None:
    cuts = set(content.blobs)
    with serving(content, cuts) as url:
        result = invoke("reg.lab/app:v1", env={"P2PDIST_MIRROR": url})
    assert result.exit_code == 0, result.output
    assert len(cuts) == 1  # the config, too short to be cut


def test_the_agents_variable_says_where_it_is(content: FakeMirror) -> None:
    with serving(content) as url:
        result = invoke("reg.lab/app:v1", env={"P2PDIST_MIRROR_LISTEN": url.removeprefix("http://")})
    assert result.exit_code == 0, result.output


def test_a_wrong_blob_is_one_line_and_code_1(content: FakeMirror, tmp_path: Path) -> None:
    victim = list(content.blobs)[3]
    content.blobs[victim] = b"\0" * len(content.blobs[victim])
    with serving(content) as url:
        result = invoke("--mirror", url, "reg.lab/app:v1", "--output", f"oci:{tmp_path}/out")
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("p2pdist: ")]
    assert f"blob {victim} is wrong" in line


def test_an_unknown_image_is_one_line_and_code_1(content: FakeMirror) -> None:
    with serving(content) as url:
        result = invoke("--mirror", url, "reg.lab/app:v9")
    assert result.exit_code == 1
    assert result.stderr == f"p2pdist: {url} answered 404 to reg.lab/app manifests/v9: MANIFEST_UNKNOWN gone\n"


def test_a_mirror_that_is_not_there_is_one_line_and_code_1() -> None:
    with serving(FakeMirror()) as url:
        pass
    result = invoke("--mirror", url, "reg.lab/app:v1")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"p2pdist: nothing answers at {url}")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["UPPER/case"], "not a repository name"),
        (["x:y:z"], "not a tag"),
        (["x", "--output", "dir"], "'dir' is not oci:DIR"),
        (["x", "--output", "oci:"], "'oci:' is not oci:DIR"),
        (["x", "--mirror", "localhost:5050"], "is not a URL"),
        (["x", "--platform", "linux"], "not a platform"),
        (["x", "--platform", "linux/arm64", "--all-platforms"], "exclude each other"),
        ([], "Missing argument"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_asked(arguments: list[str], complaint: str) -> None:
    result = invoke(*arguments, env={"P2PDIST_MIRROR_LISTEN": "127.0.0.1:1"})
    assert result.exit_code in (1, 2)
    assert complaint in result.stderr
