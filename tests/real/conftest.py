# SPDX-License-Identifier: Apache-2.0
"""What the tests with real processes share: the images, and what has to be installed. All of them are marked `real`."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from bench.lab.images import LAYER_TAR_GZIP, LAYER_TAR_ZSTD, make_machine_image, make_random_image
from tests.real.cluster import open_cluster
from tests.real.containerd import Cri, Cri2, Ctr
from tests.real.runtimes import Buildah, Podman, Runtime, Skopeo
from tests.real.wheel import install

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from bench.lab.images import Image
    from tests.real.cluster import Cluster
    from tests.real.wheel import Installed

MIB = 1 << 20
KINDS = (Skopeo, Podman, Buildah, Ctr, Cri, Cri2)
LAYER_TYPES = (LAYER_TAR_GZIP, LAYER_TAR_ZSTD)
FILES = (Path("/usr/bin"), Path("/usr/lib/x86_64-linux-gnu"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.real)
            item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session")
def lab_parts(require: Callable[[str, str], str]) -> str:
    """Return docker-registry, where a lab can be built; else the test fails in CI and is skipped elsewhere."""
    for command in ("ip", "tc"):
        require(command, "iproute2")
    program = require("docker-registry", "docker-registry")
    if os.geteuid() != 0:
        missing = "this test makes network namespaces: run it as root"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return program


@pytest.fixture(scope="session")
def cluster_of(lab_parts: str) -> Callable[..., AbstractAsyncContextManager[Cluster]]:
    """Return `open_cluster`."""
    return partial(open_cluster, lab_parts)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__.lower())
def kind(request: pytest.FixtureRequest, require: Callable[[str, str], str]) -> type[Runtime]:
    """A runtime that is installed."""
    chosen: type[Runtime] = request.param
    chosen.require(require)
    return chosen


@pytest.fixture
def kinds(require: Callable[[str, str], str]) -> list[type[Runtime]]:
    """All runtimes; containerd 2, which is no Debian package, only where it is installed."""
    found = [kind for kind in KINDS if kind is not Cri2 or Cri2.program()]
    for kind in found:
        kind.require(require)
    return found


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel of this tree in an environment of its own."""
    return install(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory, require: Callable[[str, str], str]) -> Image:
    """An image that runtimes can unpack: the machine's own files in gzip, zstd and gzip, for amd64 and arm64."""
    require("zstd", "zstd")
    make = partial(make_machine_image, image_bytes=6 * MIB, layers=3, roots=FILES, layer_types=LAYER_TYPES)
    return trio.run(make, tmp_path_factory.mktemp("image") / "layout")


@pytest.fixture(scope="session")
def large_image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """16 MiB in three layers that do not compress: 64 chunks."""
    layout = tmp_path_factory.mktemp("large") / "layout"
    return trio.run(partial(make_random_image, layout, image_bytes=16 * MIB, layers=3, seed=1))


@pytest.fixture(scope="session")
def twenty_images(tmp_path_factory: pytest.TempPathFactory, require: Callable[[str, str], str]) -> list[Image]:
    """Images of 2 MiB in gzip, zstd and gzip, for amd64 and arm64, that share nothing; tagged `pull0` to `pull19`."""
    require("zstd", "zstd")
    place = tmp_path_factory.mktemp("twenty")
    make = partial(make_random_image, image_bytes=2 * MIB, layers=3, multi_arch=True, layer_types=LAYER_TYPES)
    return [trio.run(partial(make, place / f"{seed}", seed=seed, tag=f"pull{seed}")) for seed in range(20)]


@pytest.fixture(scope="session")
def small_image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """1 MiB in two layers."""
    layout = tmp_path_factory.mktemp("small") / "layout"
    return trio.run(partial(make_random_image, layout, image_bytes=MIB, layers=2, seed=2, tag="small"))
