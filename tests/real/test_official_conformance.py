# SPDX-License-Identifier: Apache-2.0
"""The conformance suite of opencontainers/distribution-spec, run against an agent and against the registry behind it.

It is a Go program: without Go these tests are skipped, in CI too (Debian 12's Go is too old to build it). What comes
out is recorded in docs/conformance.md.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from bench.lab.agents import REGISTRY_NAME
from p2pdist.agent import Agent
from p2pdist.config import Address, AgentConfig, RegistryConfig
from tests.real.cluster import ALONE, DEADLINE_S, REPOSITORY, until
from tests.real.split_registry import SplitRegistry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractAsyncContextManager

    from bench.lab.hosts import Host
    from bench.lab.images import Image
    from tests.real.cluster import Cluster

VERSION = "v0.0.0-20260831232431-97274622c111"
"""Of the suite: its main branch of August 2026. It tests the 1.1 release of the specification and its main branch."""

SUITE = f"github.com/opencontainers/distribution-spec/conformance@{VERSION}"
BUILD_S = 280
_CACHE = Path(__file__).parents[2] / "build" / "oci-conformance" / VERSION
_REGISTRY = """\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {root}}}}}
http: {{addr: "127.0.0.1:{port}"}}
"""
_RESULT = re.compile(r"^ *OCI Conformance Test/(?P<name>.+): (?P<status>Pass|FAIL|Error|Skip|Disabled)$", re.MULTILINE)
_NO_DELETING = {
    "OCI_TLS": "disabled",
    "OCI_API_BLOBS_DELETE": "false",
    "OCI_API_MANIFESTS_DELETE": "false",
    "OCI_API_TAGS_DELETE": "false",
}
_READ_ONLY = _NO_DELETING | {
    "OCI_API_PUSH": "false",
    # In this mode the suite looks for a manifest's digest header in an answer that it has not kept.
    "OCI_API_MANIFESTS_DIGEST_HEADER": "false",
}


@pytest.fixture(scope="session")
def suite() -> Path:
    """Return the suite's program, built once and kept."""
    program = _CACHE / "conformance"
    if program.exists():
        return program
    go = shutil.which("go")
    if go is None:
        pytest.skip("Go 1.24 or newer is missing: install it from go.dev (Debian 12's golang-go is too old)")
    env = os.environ | {"GOBIN": str(_CACHE)}
    done = subprocess.run([go, "install", SUITE], env=env, capture_output=True, text=True, timeout=BUILD_S)
    if done.returncode != 0:
        pytest.skip(f"go install {SUITE} fails: {done.stderr.strip()[-500:]}")
    return program


async def run_suite(program: Path, env: Mapping[str, str], results: Path, host: Host | None = None) -> str:
    """Return what the suite prints. Its exit code says nothing: it fails on what a registry may leave out."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("OCI_")}
    with trio.fail_after(DEADLINE_S):
        done = await trio.run_process(
            [*(host.command_prefix if host else ()), str(program)],
            env=settings | env | {"OCI_RESULTS_DIR": str(results)},
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    text = done.stdout.decode()
    assert "OCI Conformance Result" in text, f"{text}\n{done.stderr.decode()}"
    return text


def ended(text: str, *statuses: str) -> Counter[str]:
    """Return the tests without tests below them that ended so, by how often."""
    found = _RESULT.findall(text)
    parents = {name.rpartition("/")[0] for name, _ in found}
    return Counter(name for name, status in found if status in statuses and name not in parents)


def failures(text: str) -> Counter[str]:
    return ended(text, "FAIL", "Error")


def passed(text: str) -> Counter[str]:
    return ended(text, "Pass")


def tell(of_registry: str, of_agent: str) -> None:
    """Print what docs/conformance.md records; `pytest -rP` shows it."""
    for name, text in (("docker-registry", of_registry), ("agent", of_agent)):
        print(f"{name}: {passed(text).total()} pass, {failures(text).total()} fail")


@pytest.mark.parametrize("version", ["1.1", "dev"])
async def test_the_pull_mode_fails_nowhere_against_the_agent(
    version: str,
    suite: Path,
    image: Image,
    cluster_of: Callable[..., AbstractAsyncContextManager[Cluster]],
    tmp_path: Path,
) -> None:
    content = {
        "OCI_VERSION": version,
        "OCI_RO_DATA_TAGS": image.tag,
        "OCI_RO_DATA_MANIFESTS": " ".join(manifest.digest for manifest in image.manifests()),
        "OCI_RO_DATA_BLOBS": " ".join(blob.digest for blob in image.blobs()),
        "OCI_RO_DATA_REFERRERS": image.root.digest,
    }
    async with cluster_of(image, nodes=1, found_by=ALONE) as cluster:
        (agent,) = await cluster.start("node1")

        async def against(base_url: str, repository: str) -> str:
            where = {"OCI_REGISTRY": base_url.partition("//")[2], "OCI_REPO1": repository, "OCI_REPO2": repository}
            return await run_suite(suite, _READ_ONLY | content | where, tmp_path / "results", agent.host)

        of_registry = await against(cluster.registry.base_url, REPOSITORY)
        of_agent = await against(agent.source.base_url, f"{REGISTRY_NAME}/{REPOSITORY}")
    tell(of_registry, of_agent)
    assert failures(of_agent) == Counter(), of_agent
    assert failures(of_registry), "docker-registry has no referrers: the suite's output is read wrongly"
    assert passed(of_agent) == passed(of_registry) + failures(of_registry)


@pytest.fixture
async def registry_port(require: Callable[[str, str], str], tmp_path: Path, nursery: trio.Nursery) -> int:
    """Run a docker-registry of this test's own on loopback."""
    program, port = require("docker-registry", "docker-registry"), free_port()
    config = tmp_path / "registry.yml"
    config.write_text(_REGISTRY.format(root=tmp_path / "registry", port=port))
    run = partial(
        trio.run_process, [program, "serve", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    process: trio.Process = await nursery.start(run)
    await until(lambda: accepts(port) or process.returncode is not None, "docker-registry accepts connections")
    assert process.returncode is None
    return port


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def accepts(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@pytest.mark.parametrize("version", ["1.1", "dev"])
async def test_what_the_suite_pushes_itself_is_pulled_through_the_agent(
    version: str, suite: Path, registry_port: int, tmp_path: Path, nursery: trio.Nursery
) -> None:
    config = AgentConfig(
        mirror_listen=Address("127.0.0.1", 0),
        peer_listen=Address("127.0.0.1", 0),
        admin_listen=Address("127.0.0.1", 0),
        mdns=False,
        data_dir=tmp_path / "data",
        registries={REGISTRY_NAME: RegistryConfig(f"http://127.0.0.1:{registry_port}")},
        default_registry=REGISTRY_NAME,
        store_min_free=0,
        # The suite gives a tag to another manifest within a second.
        tag_ttl_s=0,
    )
    agent = Agent(config)
    await nursery.start(agent.run)
    split = SplitRegistry(agent.mirror_at.port, registry_port)
    await nursery.start(split.run)

    async def against(port: int, repository: str) -> str:
        where = {
            "OCI_REGISTRY": f"127.0.0.1:{port}",
            "OCI_REPO1": f"{repository}/one",
            "OCI_REPO2": f"{repository}/two",
        }
        return await run_suite(suite, _NO_DELETING | {"OCI_VERSION": version} | where, tmp_path / "results")

    of_registry = await against(registry_port, "plain")
    of_agent = await against(split.port, "split")
    tell(of_registry, of_agent)
    worse = failures(of_agent) - failures(of_registry)
    assert worse == Counter(), of_agent
    assert {name for name in failures(of_agent) if "range requests/range" in name} == set(), of_agent
    assert split.pulls > passed(of_agent).total() / 2, "the agent was not asked"
    better = failures(of_registry) - failures(of_agent)
    assert {"empty/referrers", "sha512/pull/blob-get", "invalid-digest-format/manifest-get"} <= set(better)
    nursery.cancel_scope.cancel()
