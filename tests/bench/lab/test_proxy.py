# SPDX-License-Identifier: Apache-2.0
"""The caching nginx that p2pdist is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench.lab import proxy
from bench.lab.hosts import loopback_lab
from bench.lab.images import make_random_image
from bench.lab.processes import ProcessGroup
from bench.lab.pullers import Pull, Source, pull
from bench.lab.registry import start_registry
from bench.lab.workspace import Workspace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.real
async def test_every_byte_is_fetched_once_however_many_pull(require: Callable[[str, str], str], tmp_path: Path) -> None:
    require("nginx", "nginx-light")
    program = require("docker-registry", "docker-registry")
    space = Workspace(tmp_path, on_tmpfs=False)
    image = await make_random_image(tmp_path / "image", image_bytes=5 << 20, layers=2, seed=1)
    with loopback_lab(["registry", "proxy", "node1", "node2"]) as lab, ProcessGroup(space.logs) as group:
        registry = await start_registry(group, lab["registry"], space, program=program)
        registry.push(image, "team/demo")
        process = await proxy.start_proxy(group, lab["proxy"], registry, tmp_path / "proxy")
        for name in ("node1", "node2"):
            record = Pull(name)
            await pull(record, lab[name], Source(proxy.base_url(lab["proxy"])), "team/demo", "v1", deadline_s=60)
            assert record.error is None, process.tail()
        while registry.sent_bytes() < image.pull_bytes:
            registry.process.check()
        assert registry.sent_bytes() == image.pull_bytes
