# SPDX-License-Identifier: Apache-2.0
"""The node benchmark with real servers, as small as it gets."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from bench.contract import KEYS
from bench.node_figures import GIB
from tests.bench.conftest import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.real
def test_every_server_gives_the_same_bytes_and_the_swarm_its_image_to_each_node(
    require: Callable[[str, str], str], tmp_path: Path
) -> None:
    require("nginx", "nginx-light")
    file = tmp_path / "figures.json"
    parts = [option for part in ("blob", "ranges", "peers", "swarm") for option in ("--part", part)]
    program = [sys.executable, "-c", "from bench.cli import bench; bench()", "node"]
    done = subprocess.run(
        [*program, *parts, "--image-mib", "8", "--runs", "1", "--json", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(set(figure) >= set(KEYS) for figure in figures)
    servers = ("p2pdist", "nginx", "registry")
    expected = [("idle", "p2pdist"), ("cold", "registry"), ("cold", "p2pdist")]
    expected += [(part, server) for part in ("warm", "ranges") for server in servers]
    assert [(figure["part"], figure["system"]) for figure in figures] == [
        *expected,
        ("peers", "p2pdist"),
        ("swarm", "p2pdist"),
    ]
    payload = {figure["part"]: round(figure["payload_bytes"] / GIB * 128) for figure in figures}
    assert payload == {"idle": 0, "cold": 1, "warm": 5, "ranges": 1, "peers": 8, "swarm": 3}
    assert all(figure["rss_mib_max"] > 0 for figure in figures)
    assert figures[-1]["origin_egress_ratio"] == pytest.approx(1, abs=0.1)
    assert "memory at rest" in done.stdout
