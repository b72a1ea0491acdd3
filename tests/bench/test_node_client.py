# SPDX-License-Identifier: Apache-2.0
"""The client of the node benchmark, against a small server in a thread."""

from __future__ import annotations

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from bench.node_client import ClientError, Load, ask_all

if TYPE_CHECKING:
    from collections.abc import Iterator

BODY = bytes(range(256)) * 4096
HEX = hashlib.sha256(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, str]]

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers.get("Range", "")))
        if self.path == "/gone":
            self.send_error(404)
            return
        first, last = self.headers["Range"][6:].split("-") if "Range" in self.headers else ("0", str(len(BODY) - 1))
        body = BODY[int(first) : int(last) + 1]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:-1] if self.path == "/cut" else body)
        self.close_connection = self.path == "/cut"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base's name
        pass


@pytest.fixture
def port() -> Iterator[int]:
    Handler.seen = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def load(port: int, *requests: tuple[str, str], connections: int = 1, check: bool = False) -> Load:
    return Load(host="127.0.0.1", port=port, requests=requests, connections=connections, check=check)


def test_each_request_is_asked_once_and_all_bytes_are_counted(port: int) -> None:
    spans = [(f"/{HEX}", f"bytes={start}-{start + 65535}") for start in range(0, len(BODY), 65536)]
    seen = ask_all(load(port, *spans, connections=3))
    assert sorted(Handler.seen) == sorted(spans)
    assert seen.payload_bytes == len(BODY)
    assert len(seen.ttfb_s) == len(spans)
    assert 0 < max(seen.ttfb_s) <= seen.seconds


def test_a_body_that_is_what_was_asked_for_passes_the_check(port: int) -> None:
    assert ask_all(load(port, (f"/{HEX}", ""), (f"/{HEX}", ""), check=True)).payload_bytes == 2 * len(BODY)


@pytest.mark.parametrize(
    ("target", "complaint"),
    [("/" + "0" * 64, "sha256"), ("/gone", "404"), ("/cut", "cut off 1 bytes")],
    ids=["another body", "not there", "cut off"],
)
def test_an_answer_that_is_wrong_ends_the_measurement(port: int, target: str, complaint: str) -> None:
    with pytest.raises(ClientError, match=complaint):
        ask_all(load(port, (target, ""), check=True))
