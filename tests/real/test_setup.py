# SPDX-License-Identifier: Apache-2.0
"""Real programs take what `p2pdist setup` writes: containerd reads its configuration, skopeo and ctr pull by it."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tomllib
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from p2pdist.agent import Agent
from p2pdist.config import Address, AgentConfig, RegistryConfig
from p2pdist.core.oci import parse_image_reference
from p2pdist.doctor import programs, runtimes
from p2pdist.doctor.report import Result
from p2pdist.setup.installer import Installer
from p2pdist.setup.plan import Places, Wanted
from p2pdist.setup.tree import Tree
from tests.fake_registry import FakeRegistry
from tests.real.cluster import until
from tests.real.containerd import Cri2
from tests.setup.conftest import HOSTS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

LAYER = random.Random(3).randbytes(2000)
DEADLINE_S = 90
CONTAINERD = """\
version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
  address = "{directory}/containerd.sock"
[ttrpc]
  address = "{directory}/containerd.sock.ttrpc"
"""


def set_up(root: Path, runtime: str, wanted: Wanted, home: str = "") -> None:
    installer = Installer(Tree(root), Places(home))
    installer.carry_out(installer.install([runtime], wanted))


def dumped(program: str, root: Path) -> dict[str, Any]:
    """Return the configuration that a containerd makes of a host's files."""
    command = [program, "--config", str(root / "etc/containerd/config.toml"), "config", "dump"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    return tomllib.loads(done.stdout)


def test_containerd_1_takes_its_config_toml(tmp_path: Path, require: Callable[[str, str], str]) -> None:
    program = require("containerd", "containerd")
    root = tmp_path / "root"
    shutil.copytree(HOSTS / "debian-containerd-1.6", root)
    before = dumped(program, root)["plugins"]["io.containerd.grpc.v1.cri"]
    set_up(root, "containerd", Wanted(mirror="http://127.0.0.1:5050", registries=("docker.io",), all_registries=True))
    after = dumped(program, root)["plugins"]["io.containerd.grpc.v1.cri"]
    assert after["registry"].pop("config_path") == "/etc/containerd/certs.d"
    before["registry"].pop("config_path")
    assert after == before


def test_containerd_2_takes_the_drop_in(tmp_path: Path, require: Callable[[str, str], str]) -> None:
    Cri2.require(require)
    root = tmp_path / "root"
    shutil.copytree(HOSTS / "containerd-2", root)
    config = root / "etc/containerd/config.toml"
    config.write_text(config.read_text().replace("/etc/containerd/conf.d", "conf.d"))
    set_up(root, "containerd", Wanted(mirror="http://127.0.0.1:5050", registries=("docker.io",), all_registries=True))
    images = dumped(str(Cri2.program()), root)["plugins"]["io.containerd.cri.v1.images"]
    assert images["registry"]["config_path"] == "/etc/containerd/certs.d"
    assert images["max_concurrent_downloads"] == 8


# ------------------------------------------------------------------------- pulling


@asynccontextmanager
async def agent_of(registry: FakeRegistry, data_dir: Path) -> AsyncIterator[Agent]:
    port = Address("127.0.0.1", 0)
    agent = Agent(
        AgentConfig(
            mirror_listen=port,
            peer_listen=port,
            admin_listen=port,
            mdns=False,
            data_dir=data_dir,
            registries={registry.netloc: RegistryConfig(registry.url)},
            store_min_free=0,
        )
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(agent.run)
        yield agent
        nursery.cancel_scope.cancel()


async def run(*command: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    with trio.fail_after(DEADLINE_S):
        return await trio.run_process(
            command, capture_stdout=True, capture_stderr=True, check=False, env=os.environ | (env or {})
        )


@asynccontextmanager
async def skopeo(tmp_path: Path, registry: FakeRegistry) -> AsyncIterator[Callable[[], Any]]:
    """Give what pulls, by the files of a user's home."""
    config = tmp_path / "home/.config/containers"
    config.mkdir(parents=True)
    (config / "registries.conf").write_text(f'[[registry]]\nlocation = "{registry.netloc}"\ninsecure = true\n')

    async def pull() -> subprocess.CompletedProcess[bytes]:
        shutil.rmtree(tmp_path / "image", ignore_errors=True)
        image = f"docker://{registry.netloc}/lab/image:v1"
        # XDG_CONFIG_HOME would lead elsewhere.
        env = {"HOME": str(tmp_path / "home"), "XDG_CONFIG_HOME": str(tmp_path / "home/.config")}
        return await run("skopeo", "--insecure-policy", "copy", image, f"dir:{tmp_path / 'image'}", env=env)

    yield pull


@asynccontextmanager
async def ctr(tmp_path: Path, registry: FakeRegistry) -> AsyncIterator[Callable[[], Any]]:
    """Give what pulls, by the directory of hosts.toml files of a user's home, with a containerd of its own."""
    (tmp_path / "config.toml").write_text(CONTAINERD.format(directory=tmp_path))
    socket = str(tmp_path / "containerd.sock")
    hosts = tmp_path / "home/.config/containerd/certs.d"

    async def call(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        return await run("ctr", "--address", socket, "--namespace", "test", *arguments)

    async def pull() -> subprocess.CompletedProcess[bytes]:
        image = f"{registry.netloc}/lab/image:v1"
        held = (await call("content", "ls", "-q")).stdout.decode().split()
        for command in (("images", "rm", "--sync", image), *(("content", "rm", digest) for digest in held)):
            await call(*command)
        return await call("content", "fetch", "--hosts-dir", str(hosts), image)

    async def answers() -> bool:
        return (await call("version")).returncode == 0

    command = ["containerd", "--config", str(tmp_path / "config.toml")]
    async with trio.open_nursery() as nursery:
        with open(tmp_path / "log", "wb") as log:  # noqa: ASYNC230 - a moment, in a test
            daemon = partial(trio.run_process, command, stdout=log, stderr=log, check=False)
            process = await nursery.start(daemon)
            await until(answers, "containerd answers")
            yield pull
            process.terminate()


@pytest.mark.parametrize(("runtime", "program", "puller"), [("podman", "skopeo", skopeo), ("containerd", "ctr", ctr)])
async def test_accelerate_falls_back_and_enforce_does_not(
    tmp_path: Path,
    require: Callable[[str, str], str],
    monkeypatch: pytest.MonkeyPatch,
    runtime: str,
    program: str,
    puller: Any,  # noqa: ANN401
) -> None:
    require(program, "containerd" if program == "ctr" else program)
    home = str(tmp_path / "home")
    async with FakeRegistry().running() as registry:
        registry.add_image("lab/image", "v1", [LAYER])
        async with puller(tmp_path, registry) as pull:
            async with agent_of(registry, tmp_path / "data") as agent:
                every, mirror = runtime == "containerd", f"http://{agent.mirror_at}"
                accelerate = Wanted(mirror=mirror, registries=(registry.netloc,), all_registries=every)
                enforce = replace(accelerate, enforce=True)
                if program == "skopeo":
                    await expect_doctors_own_pull(agent, registry, tmp_path, monkeypatch, accelerate)
                for wanted in (accelerate, enforce):
                    set_up(tmp_path.parents[-1], runtime, wanted, home)
                    sent = agent.mirror_metrics.sent_bytes
                    done = await pull()
                    assert done.returncode == 0, done.stderr
                    assert agent.mirror_metrics.sent_bytes - sent >= len(LAYER)
            assert (await pull()).returncode != 0, "the agent is gone, and nothing else is to be asked"
            set_up(tmp_path.parents[-1], runtime, accelerate, home)
            asked = len(registry.requests)
            done = await pull()
            assert done.returncode == 0, done.stderr
            assert len(registry.requests) > asked
            installer = Installer(Tree(tmp_path.parents[-1]), Places(home))
            installer.carry_out(installer.remove([runtime]))
            assert not (tmp_path / "home/.config/containerd").exists()
            assert not (tmp_path / "home/.local").exists()


async def expect_doctors_own_pull(
    agent: Agent, registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: Wanted
) -> None:
    """The doctor's canary by skopeo itself fails before setup, and is well after it."""
    image = parse_image_reference(f"{registry.netloc}/lab/image:v1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home/.config"))

    async def sent_bytes() -> int:
        return agent.mirror_metrics.sent_bytes

    command = programs.puller_of("podman")
    assert command is not None
    before = await runtimes.own_canary("podman", command, image, sent_bytes)
    assert before.what == f"skopeo pulled {image}, and the agent sent nothing"
    assert before.result is Result.FAIL
    set_up(tmp_path.parents[-1], "podman", wanted, str(tmp_path / "home"))
    after = await runtimes.own_canary("podman", command, image, sent_bytes)
    assert after.what == f"skopeo pulled {image} through the agent"
