# SPDX-License-Identifier: Apache-2.0
"""A containerd of our own on an agent's host, with hosts.toml: pulled with by `ctr`, or as a kubelet does by its CRI.

`Ctr` and `Cri` run Debian's containerd 1.6, `Cri2` a containerd 2 with parallel layer fetch, which Debian has not.
"""

from __future__ import annotations

import os
import shutil
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bench.lab.agents import REGISTRY_NAME
from tests.real.cluster import run_to_end, until
from tests.real.cri import CriError, ImageService
from tests.real.runtimes import NAME, OWN_MOUNTS, Runtime, expect_files

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from typing import Self

    from bench.lab.images import Image
    from tests.real.cluster import Cluster

INSTALL_CONTAINERD2 = "go install -tags no_btrfs github.com/containerd/containerd/v2/cmd/containerd@latest"
_CONTAINERD2 = ("CONTAINERD2", "containerd2", "~/go/bin/containerd")
"""Where it is looked for: what this variable names, a program of this name, where `go install` puts it."""

_SNAPSHOTTER = "overlayfs"
_HOSTS = """\
server = "{origin}"
[host."{mirror}"]
  capabilities = ["pull", "resolve"]
"""
_PLACES = """\
root = "{directory}/root"
state = "{directory}/state"
[grpc]
  address = "{directory}/containerd.sock"
[ttrpc]
  address = "{directory}/containerd.sock.ttrpc"
"""
_CTR = 'version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]\n' + _PLACES
_CRI = (
    'version = 2\ndisabled_plugins = ["io.containerd.internal.v1.opt"]\n'
    + _PLACES
    + """\
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "overlayfs"
[plugins."io.containerd.grpc.v1.cri".registry]
  config_path = "{directory}/certs.d"
"""
)
_CRI2 = (
    'version = 3\ndisabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri"]\n'
    + _PLACES
    + """\
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  concurrent_layer_fetch_buffer = {fetch_bytes}
[plugins."io.containerd.cri.v1.images".registry]
  config_path = "{directory}/certs.d"
[plugins."io.containerd.transfer.v1.local"]
  config_path = "{directory}/certs.d"
  concurrent_layer_fetch_buffer = {fetch_bytes}
"""
)
_FETCH_BYTES = 128 << 10
"""Of each layer, several parts are fetched at once: a layer of the tests' images has a dozen."""


class Ctr(Runtime):
    """`ctr images pull`: the client fetches, the daemon keeps and unpacks."""

    agent = "containerd/"
    namespace = "test"
    config = _CTR

    @classmethod
    def require(cls, require: Callable[[str, str], str]) -> None:
        for command, package in (("containerd", "containerd"), ("ctr", "containerd"), ("unshare", "util-linux")):
            require(command, package)

    @classmethod
    def program(cls) -> str | None:
        return shutil.which("containerd")

    @asynccontextmanager
    async def running(self, cluster: Cluster) -> AsyncIterator[Self]:
        """Start the daemon; it ends with the cluster."""
        hosts = self.directory / "certs.d" / REGISTRY_NAME / "hosts.toml"
        hosts.parent.mkdir(parents=True)
        hosts.write_text(_HOSTS.format(origin=self.origin, mirror=self.mirror))
        file = self.directory / "config.toml"
        file.write_text(self.config.format(directory=self.directory, fetch_bytes=_FETCH_BYTES))
        command = [*OWN_MOUNTS, str(self.program()), "--config", str(file)]
        self._daemon = cluster.group.start(self.host, f"containerd-{self.directory.name}", command)

        async def answers() -> bool:
            self._daemon.check()
            return self._socket.exists() and await self._ready()

        await until(answers, "containerd answers")
        yield self

    def log(self) -> str:
        """Return what the daemon has written so far."""
        return self._daemon.log.read_text(errors="replace")

    async def pull(self, reference: str) -> None:
        options = ["--hosts-dir", str(self.directory / "certs.d"), "--snapshotter", _SNAPSHOTTER]
        await self._ctr("images", "pull", *options, "--platform", "linux/amd64", f"{NAME}{reference}")

    async def expect(self, image: Image) -> None:
        held = await self._ctr("content", "ls", "-q")
        assert {part.digest for part in (image.root, *image.parts)} <= set(held.split())
        checked = await self._ctr("images", "check", "--snapshotter", _SNAPSHOTTER, f"name~={image.tag}|sha256")
        assert " complete " in checked
        assert checked.split()[-1] == "true", f"not unpacked: {checked}"
        expect_files(image, list(self.directory.glob("root/*.overlayfs/snapshots/*/fs/*/**/*")))

    async def forget(self, image: Image) -> None:
        names = (await self._ctr("images", "ls", "-q")).split()
        await self._ctr("images", "rm", "--sync", *names)

    async def _ready(self) -> bool:
        return _SNAPSHOTTER in await self._ctr("plugins", "ls")

    @property
    def _socket(self) -> Path:
        return self.directory / "containerd.sock"

    async def _ctr(self, *arguments: str) -> str:
        options = ["--address", str(self._socket), "--namespace", self.namespace]
        return await run_to_end(["ctr", *options, *arguments], host=self.host)


class Cri(Ctr):
    """The CRI plugin's PullImage: what a kubelet calls."""

    namespace = "k8s.io"
    config = _CRI

    async def pull(self, reference: str) -> None:
        await ImageService(self._socket).pull(f"{NAME}{reference}")

    async def expect(self, image: Image) -> None:
        found = await ImageService(self._socket).status(image.config.digest)
        assert found == (image.config.digest, [f"{NAME}@{image.root.digest}"])
        await super().expect(image)

    async def _ready(self) -> bool:
        # The plugin says for a moment that it is not initialized.
        with suppress(CriError, OSError):
            await ImageService(self._socket).status("none")
            return True
        return False


class Cri2(Cri):
    """containerd 2: the plugin has its transfer service fetch, several parts of a layer at once."""

    config = _CRI2

    @classmethod
    def require(cls, require: Callable[[str, str], str]) -> None:
        require("ctr", "containerd")
        if cls.program() is None:
            pytest.skip(f"containerd 2 is missing: {INSTALL_CONTAINERD2}; CONTAINERD2 may name the program")

    @classmethod
    def program(cls) -> str | None:
        variable, name, built = _CONTAINERD2
        return shutil.which(os.environ.get(variable, name)) or shutil.which(Path(built).expanduser())
