# SPDX-License-Identifier: Apache-2.0
"""`p2pdist doctor` beside real agents on hosts of their own: what it hears by multicast, and its exit code."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING, Any

import trio

from bench.lab.agents import REGISTRY_NAME
from tests.real.cluster import DEADLINE_S, MDNS, REPOSITORY, run_to_end
from tests.setup.conftest import HOSTS

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from bench.lab.agents import Agent
    from bench.lab.images import Image
    from tests.real.cluster import Cluster

P2PDIST = (sys.executable, "-m", "p2pdist")


async def examined(agent: Agent, root: Path, image: Image) -> tuple[int, dict[str, Any]]:
    """Return the doctor's exit code and its checks by name, on an agent's host."""
    canary = f"{REGISTRY_NAME}/{REPOSITORY}:{image.tag}"
    settings = root / "doctor.toml"
    settings.write_text("store_min_free = 0\n")
    command = [*P2PDIST, "doctor", "--json", "--root", str(root), "--canary", canary, "--config", str(settings)]
    command = [*agent.host.command_prefix, *command]
    with trio.fail_after(DEADLINE_S):
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    assert done.stderr == b""
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)["checks"]}


async def test_a_cluster_that_is_well_has_exit_code_0_and_one_without_its_registry_1(
    image: Image, cluster_of: Callable[..., AbstractAsyncContextManager[Cluster]], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(HOSTS / "debian-containerd-1.6", root)
    async with cluster_of(image, nodes=2, found_by=MDNS) as cluster:
        agent, _ = await cluster.start("node1", "node2")
        mirror = agent.source.base_url
        await run_to_end([*P2PDIST, "setup", "--root", str(root), "--mirror", mirror])
        code, checks = await examined(agent, root, image)
        assert {name for name, check in checks.items() if check["result"] != "ok"} == set()
        assert code == 0
        assert checks["mdns"]["what"] == "1 other agents announce themselves"
        assert checks["peers"]["what"] == "connected to 1"

        cluster.registry.process.kill()
        code, checks = await examined(agent, root, image)
        assert code == 1
        assert checks["origin-connect"]["result"] == "fail"
        assert "connection refused" in checks["origin-connect"]["what"]
