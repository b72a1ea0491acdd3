# SPDX-License-Identifier: Apache-2.0
"""Container runtimes as their users set them up: the agent as a mirror, with the origin behind it to fall back to.

The origin can be reached from the runtime's host, so a mirror that fails does not fail the pull: it shows in the
registry's log, where the runtime's own name then stands.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from bench.lab.agents import REGISTRY_NAME
from tests.layers import tar_of
from tests.real.cluster import REPOSITORY, run_to_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path
    from typing import Self

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
_ANY_IMAGE = '{"default": [{"type": "insecureAcceptAnything"}]}'


class Runtime:
    """A runtime on an agent's host. `directory` is its own."""

    agent = ""
    """What it calls itself in a User-Agent."""

    def __init__(self, cluster: Cluster, agent: Agent, directory: Path) -> None:
        self.host = agent.host
        self.mirror = agent.source.base_url
        self.origin = cluster.registry.base_url
        self.directory = directory

    @classmethod
    def require(cls, require: Callable[[str, str], str]) -> None:
        """Skip the test, or fail it in CI, where the runtime is not installed."""
        require(cls.__name__.lower(), cls.__name__.lower())

    @asynccontextmanager
    async def running(self, cluster: Cluster) -> AsyncIterator[Self]:
        """Be ready to pull in the block."""
        yield self

    async def pull(self, reference: str) -> None:
        """Pull `:TAG` or `@DIGEST` for linux/amd64 and unpack it; fail where the runtime does."""
        raise NotImplementedError

    async def expect(self, image: Image) -> None:
        """Fail unless the runtime now has the image for linux/amd64, bit by bit, and each of its files unpacked."""
        raise NotImplementedError

    async def forget(self, image: Image) -> None:
        """Remove the image and all its layers."""
        raise NotImplementedError

    def registries_conf(self) -> Path:
        file = self.directory / "registries.conf"
        origin, mirror = (url.removeprefix("http://") for url in (self.origin, self.mirror))
        file.write_text(_REGISTRIES.format(name=REGISTRY_NAME, origin=origin, mirror=mirror))
        return file


class Skopeo(Runtime):
    """Copies to a layout, as skopeo itself unpacks nothing. Without `--retry-times` it has no second attempt."""

    agent = "skopeo"

    async def pull(self, reference: str) -> None:
        options = ["--insecure-policy", "--registries-conf", str(self.registries_conf())]
        options += ["--override-os", "linux", "--override-arch", "amd64"]
        target = f"oci:{self._layout}:v1"
        copy = ["copy", "--retry-times", "3", "--preserve-digests", f"docker://{NAME}{reference}", target]
        await run_to_end(["skopeo", *options, *copy], host=self.host)

    async def expect(self, image: Image) -> None:
        for part in image.parts:
            content = (self._layout / "blobs" / part.digest.replace(":", "/")).read_bytes()
            assert f"sha256:{hashlib.sha256(content).hexdigest()}" == part.digest

    async def forget(self, image: Image) -> None:
        shutil.rmtree(self._layout)

    @property
    def _layout(self) -> Path:
        return self.directory / "layout"


class Podman(Runtime):
    agent = "containers/"
    _EVENTS: tuple[str, ...] = ("--events-backend", "none")

    async def pull(self, reference: str) -> None:
        policy = self.directory / "policy.json"
        policy.write_text(_ANY_IMAGE)
        await self._run("pull", "--arch", "amd64", "--signature-policy", str(policy), f"{NAME}{reference}")

    async def expect(self, image: Image) -> None:
        (found,) = json.loads(await self._run("image", "inspect", self._id(image)))
        digests = {entry.partition("@")[2] for entry in found["RepoDigests"]}
        assert digests <= {image.root.digest, image.manifest.digest}
        assert digests
        config = json.loads(image.blob_path(image.config).read_bytes())
        assert found["RootFS"]["Layers"] == config["rootfs"]["diff_ids"]
        self._expect_files(image)

    async def forget(self, image: Image) -> None:
        await self._run("rmi", "--force", self._id(image))

    @staticmethod
    def _id(image: Image) -> str:
        return image.config.digest.removeprefix("sha256:")

    def _expect_files(self, image: Image) -> None:
        expect_files(image, list(self.directory.glob("root/vfs/dir/*/*/**/*")))

    async def _run(self, *arguments: str) -> str:
        # A long --runroot is refused; in a mount namespace of its own the runtime's directory is /mnt.
        place = (*OWN_MOUNTS, "sh", "-ec", 'mount --bind "$0" /mnt; exec "$@"', str(self.directory))
        program = type(self).__name__.lower()
        options = ["--root", "/mnt/root", "--runroot", "/mnt/run", "--storage-driver", "vfs", *self._EVENTS]
        env = os.environ | {"CONTAINERS_REGISTRIES_CONF": str(self.registries_conf()), "TMPDIR": "/mnt"}
        return await run_to_end([*place, program, *options, *arguments], host=self.host, env=env)


class Buildah(Podman):
    agent = "Buildah/"
    _EVENTS = ()

    async def expect(self, image: Image) -> None:
        found = json.loads(await self._run("inspect", "--type", "image", self._id(image)))
        assert found["FromImageDigest"] in (image.root.digest, image.manifest.digest)
        self._expect_files(image)


@asynccontextmanager
async def running(kind: type[Runtime], cluster: Cluster, agent: Agent) -> AsyncIterator[Runtime]:
    """Give a runtime that is ready on an agent's host."""
    directory = cluster.space.directory(f"{kind.__name__.lower()}-{agent.host.name}")
    async with kind(cluster, agent, directory).running(cluster) as runtime:
        yield runtime


def expect_only_agents_at_the_origin(cluster: Cluster, kind: type[Runtime]) -> None:
    """The origin is configured as what the runtime falls back to: it must not have had to."""
    agents = {entry.get("http.request.useragent", "") for entry in cluster.requests()}
    assert agents == {"p2pdist"}, f"{kind.agent} went past the mirror"


def expect_files(image: Image, unpacked: list[Path]) -> None:
    """Fail unless every file of every layer is among the unpacked ones with the same content."""
    found = {hashlib.sha256(path.read_bytes()).hexdigest() for path in unpacked if path.is_file()}
    for layer in image.layers:
        with tarfile.open(fileobj=io.BytesIO(tar_of(image, layer))) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                assert hashlib.sha256(content.read()).hexdigest() in found, f"{member.name} was not unpacked"
