# SPDX-License-Identifier: Apache-2.0
"""`p2pdist status`: the agent's answer for people and for programs, and a clear line without one."""

from __future__ import annotations

import io
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from p2pdist.cli import main
from p2pdist.commands.status import show

if TYPE_CHECKING:
    from collections.abc import Iterator

PEER = {
    "peer_id": "b" * 32,
    "address": "[fd00::2]:5051",
    "site": "lab",
    "rack": "r1",
    "up_bytes": 2048,
    "down_bytes": 4096,
    "source": "mdns",
}
EACH = [
    {"address": "s:1", "state": "connected", "swarms": 2, "why": ""},
    {"address": "t:1", "state": "lost", "swarms": 0, "why": "no route"},
]
DOCUMENT: dict[str, Any] = {
    "version": "0.1.0",
    "peer_id": "a" * 32,
    "uptime_s": 90_061,
    "cluster": "prod",
    "site": "lab",
    "rack": "",
    "identity": {"state": "ok", "what": "agent/a of cluster prod", "ends": None, "revoked": 0, "refused": {}},
    "mirror": "127.0.0.1:5050",
    "peers": [PEER],
    "banned": [{"peer_id": "d" * 32, "host": "10.0.0.66", "reason": "corrupt", "for_s": 90.0}],
    "scheduler": {"configured": ["s:5060"], "connected": True, "address": "s:5060"},
    "store": {"blobs": 3, "bytes": 1 << 30, "max_bytes": 2 << 30},
    "pulls": [
        {"digest": "sha256:" + "c" * 64, "size_bytes": 4096, "have_bytes": 1024, "from_peers": 1024, "from_origin": 0}
    ],
    "bytes": {"to_runtime": 1, "from_peers": 2, "from_origin": 3, "to_peers": 4, "duplicate": 5},
    "control_bytes": 6,
}


@contextmanager
def serving(status: int, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/status" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the parent's name
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def shown(document: dict[str, Any]) -> str:
    stream = io.StringIO()
    show(document, Console(file=stream, width=120))
    return stream.getvalue()


def test_json_is_the_agents_answer_unchanged() -> None:
    with serving(200, json.dumps(DOCUMENT).encode()) as address:
        result = CliRunner().invoke(main, ["status", "--json"], env={"P2PDIST_ADMIN_LISTEN": address})
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == DOCUMENT


@pytest.mark.parametrize("suffix", ["", "/", "/status"])
def test_the_admin_port_may_be_named(suffix: str) -> None:
    with serving(200, json.dumps(DOCUMENT).encode()) as address:
        result = CliRunner().invoke(main, ["status", "--admin", f"http://{address}{suffix}"])
    assert result.exit_code == 0, result.output
    assert "connected to s:5060" in result.stdout


def test_the_table_tells_what_the_agent_told() -> None:
    text = shown(DOCUMENT)
    for part in (
        "1 d 1 h",
        "prod/lab",
        "[fd00::2]:5051",
        "lab/r1",
        "mdns",
        "4.0 KiB",
        "1.0 GiB of 2.0 GiB",
        "c" * 12,
        "ok: agent/a",
    ):
        assert part in text


def test_the_table_names_who_is_banned_why_and_for_how_long() -> None:
    text = shown(DOCUMENT)
    for part in ("banned peers: 1", "d" * 12, "10.0.0.66", "corrupt", "1 min 30 s"):
        assert part in text
    assert "banned" not in shown({**DOCUMENT, "banned": []})


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ({"configured": [], "connected": False, "address": None}, "none: the agents coordinate themselves"),
        ({"configured": ["s:1"], "connected": False, "address": None}, "not reachable (s:1)"),
        ({"configured": ["s:1"], "connected": True, "address": "s:1"}, "connected to s:1"),
        (
            {"configured": ["s:1", "t:1"], "connected": True, "address": "s:1", "each": EACH},
            "s:1 connected, 2 running pulls",
        ),
        ({"configured": ["s:1", "t:1"], "connected": True, "address": "s:1", "each": EACH}, "t:1 lost (no route)"),
    ],
)
def test_the_scheduler_is_there_gone_or_not_wanted(scheduler: dict[str, Any], words: str) -> None:
    assert words in shown({**DOCUMENT, "scheduler": scheduler})


def test_an_agent_of_another_version_may_tell_less() -> None:
    assert "agent" in shown({})


def test_thousands_of_peers_do_not_flood_the_screen() -> None:
    text = shown({**DOCUMENT, "peers": [PEER] * 2000})
    assert "peers: 2000" in text
    assert "1950 more: --json shows all" in text
    assert len(text.splitlines()) < 100


def test_names_from_other_nodes_cannot_style_the_screen() -> None:
    assert "[red]x" in shown({**DOCUMENT, "peers": [{**PEER, "site": "[red]x"}]})


def test_no_agent_is_one_line_and_code_1() -> None:
    with serving(200, b"") as address:
        pass
    result = CliRunner().invoke(main, ["status"], env={"P2PDIST_ADMIN_LISTEN": address})
    assert result.exit_code == 1
    assert (
        result.stderr
        == f"p2pdist: no agent answers at http://{address}; start one with `p2pdist agent`, or give --admin URL\n"
    )


@pytest.mark.parametrize(("status", "body"), [(404, b"{}"), (200, b"<html>"), (200, b"[]"), (200, b"\xff")])
def test_another_server_on_the_port_is_told_from_an_agent(status: int, body: bytes) -> None:
    with serving(status, body) as address:
        result = CliRunner().invoke(main, ["status"], env={"P2PDIST_ADMIN_LISTEN": address})
    assert result.exit_code == 1
    assert "is not the admin port of an agent" in result.stderr


def test_a_wrong_variable_is_a_setting_to_mend() -> None:
    result = CliRunner().invoke(main, ["status"], env={"P2PDIST_ADMIN_LISTEN": "5052"})
    assert result.exit_code == 2
    assert result.stderr.startswith("p2pdist: P2PDIST_ADMIN_LISTEN: '5052' is not HOST:PORT")
