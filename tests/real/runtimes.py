# SPDX-License-Identifier: Apache-2.0
"""Container runtimes as their users set them up: the agent as a mirror, with the origin behind it to fall back to.

The origin can be reached from the runtime's host, so a mirror that fails does not fail the pull: it shows in the
registry's log, where the runtime's own name then stands.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from bench.lab.agents import REGISTRY_NAME
from tests.real.cluster import REPOSITORY, run_to_end, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from bench.lab.agents import Agent
    from bench.lab.images import Image
    from tests.real.cluster import Cluster

NAME = f"{REGISTRY_NAME}/{REPOSITORY}"
OWN_MOUNTS = ("unshare", "--mount", "--propagation", "private", "--")
"""What a runtime mounts goes with it, however it ends."""

_REGISTRIES = """\
[[registry]]
prefix = "{name}"
location = "{origin}"
insecure = true
[[registry.mirror]]
location = "{mirror}/{name}"
insecure = true
"""
_HOSTS = """\
server = "{origin}"
[host."{mirror}"]
  capabilities = ["pull", "resolve"]
"""
_CONTAINERD = """\
version = 2
root = "{root}"
state = "{state}"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
  address = "{socket}"
[ttrpc]
  address = "{socket}.ttrpc"
"""
_ANY_IMAGE = '{"default": [{"type": "insecureAcceptAnything"}]}'


class Runtime:
    """A runtime on an agent's host. `directory` is its own."""

    name = ""
    """What it calls itself in a User-Agent."""

    def __init__(self, cluster: Cluster, agent: Agent, directory: Path) -> None:
        self.host = agent.host
        self.mirror = agent.source.base_url
        self.origin = cluster.registry.base_url
        self.directory = directory

    async def pull(self, reference: str) -> None:
        """Pull `:TAG` or `@DIGEST` for linux/amd64; fail where the runtime does."""
        raise NotImplementedError

    async def expect(self, image: Image) -> None:
        """Fail unless the runtime now has the image for linux/amd64, bit by bit."""
        raise NotImplementedError

    def registries_conf(self) -> Path:
        file = self.directory / "registries.conf"
        origin, mirror = (url.removeprefix("http://") for url in (self.origin, self.mirror))
        file.write_text(_REGISTRIES.format(name=REGISTRY_NAME, origin=origin, mirror=mirror))
        return file


class Skopeo(Runtime):
    name = "skopeo"

    async def pull(self, reference: str) -> None:
        options = ["--insecure-policy", "--registries-conf", str(self.registries_conf())]
        options += ["--override-os", "linux", "--override-arch", "amd64"]
        target = f"oci:{self.directory / 'layout'}:v1"
        command = ["skopeo", *options, "copy", "--preserve-digests", f"docker://{NAME}{reference}", target]
        await run_to_end(command, host=self.host)

    async def expect(self, image: Image) -> None:
        for part in (image.manifest, image.config, *image.layers):
            content = (self.directory / "layout" / "blobs" / part.digest.replace(":", "/")).read_bytes()
            assert f"sha256:{hashlib.sha256(content).hexdigest()}" == part.digest


class Podman(Runtime):
    name = "containers/"

    async def pull(self, reference: str) -> None:
        policy = self.directory / "policy.json"
        policy.write_text(_ANY_IMAGE)
        await self._podman("pull", "--arch", "amd64", "--signature-policy", str(policy), f"{NAME}{reference}")

    async def expect(self, image: Image) -> None:
        (found,) = json.loads(await self._podman("image", "inspect", image.config.digest.removeprefix("sha256:")))
        digests = {entry.partition("@")[2] for entry in found["RepoDigests"]}
        assert digests <= {image.root.digest, image.manifest.digest}
        assert digests
        config = json.loads(image.blob_path(image.config).read_bytes())
        assert found["RootFS"]["Layers"] == config["rootfs"]["diff_ids"]
        unpacked = [path for path in self.directory.glob("root/vfs/dir/*/usr/**/*") if path.is_file()]
        expect_files(image, unpacked)

    async def _podman(self, *arguments: str) -> str:
        # Podman refuses a long --runroot; in a mount namespace of its own its directory is /mnt.
        place = (*OWN_MOUNTS, "sh", "-ec", 'mount --bind "$0" /mnt; exec "$@"', str(self.directory))
        places = ["--root", "/mnt/root", "--runroot", "/mnt/run", "--tmpdir", "/mnt/tmp"]
        options = ["--storage-driver", "vfs", "--events-backend", "none"]
        env = os.environ | {"CONTAINERS_REGISTRIES_CONF": str(self.registries_conf())}
        return await run_to_end([*place, "podman", *places, *options, *arguments], host=self.host, env=env)


class Containerd(Runtime):
    """A containerd of our own; `ctr images pull` unpacks with its overlayfs snapshotter."""

    name = "containerd/"

    async def pull(self, reference: str) -> None:
        hosts = self.directory / "certs.d" / REGISTRY_NAME
        hosts.mkdir(parents=True, exist_ok=True)
        (hosts / "hosts.toml").write_text(_HOSTS.format(origin=self.origin, mirror=self.mirror))
        options = ["--hosts-dir", str(hosts.parent), "--snapshotter", "overlayfs", "--platform", "linux/amd64"]
        await self._ctr("images", "pull", *options, f"{NAME}{reference}")

    async def expect(self, image: Image) -> None:
        held = await self._ctr("content", "ls", "-q")
        assert {image.root.digest, image.manifest.digest, image.config.digest} <= set(held.split())
        assert {layer.digest for layer in image.layers} <= set(held.split())
        checked = await self._ctr("images", "check", "--snapshotter", "overlayfs")
        assert " complete " in checked
        assert checked.split()[-1] == "true", f"not unpacked: {checked}"
        expect_files(image, list(self.directory.glob("root/*.overlayfs/snapshots/*/fs/usr/**/*")))

    async def run(self, cluster: Cluster) -> None:
        """Start the daemon; it ends with the cluster."""
        file = self.directory / "config.toml"
        places = {"root": self.directory / "root", "state": self.directory / "state", "socket": self._socket}
        file.write_text(_CONTAINERD.format(**places))
        command = [*OWN_MOUNTS, "containerd", "--config", str(file)]
        daemon = cluster.group.start(self.host, f"containerd-{self.host.name}", command)

        async def answers() -> bool:
            daemon.check()
            return self._socket.exists() and "overlayfs" in await self._ctr("plugins", "ls")

        await until(answers, "containerd answers")

    @property
    def _socket(self) -> Path:
        return self.directory / "containerd.sock"

    async def _ctr(self, *arguments: str) -> str:
        return await run_to_end(
            ["ctr", "--address", str(self._socket), "--namespace", "test", *arguments], host=self.host
        )


@asynccontextmanager
async def running(kind: type[Runtime], cluster: Cluster, agent: Agent) -> AsyncIterator[Runtime]:
    """Give a runtime that is ready on an agent's host."""
    runtime = kind(cluster, agent, cluster.space.directory(f"runtime-{agent.host.name}"))
    if isinstance(runtime, Containerd):
        await runtime.run(cluster)
    yield runtime


def require_runtime(kind: type[Runtime], require: Callable[[str, str], str]) -> None:
    if kind is Containerd:
        require("containerd", "containerd")
        require("unshare", "util-linux")
    else:
        require(kind.__name__.lower(), kind.__name__.lower())


def expect_files(image: Image, unpacked: list[Path]) -> None:
    """Fail unless every file of every layer is among the unpacked ones with the same content."""
    found = {hashlib.sha256(path.read_bytes()).hexdigest() for path in unpacked if path.is_file()}
    for layer in image.layers:
        with tarfile.open(image.blob_path(layer)) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                assert hashlib.sha256(content.read()).hexdigest() in found, f"{member.name} was not unpacked"
