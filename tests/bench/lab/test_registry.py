# SPDX-License-Identifier: Apache-2.0
"""Debian's docker-registry as the lab's origin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench.lab.errors import LabError
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
async def test_an_image_is_pushed_pulled_and_its_bytes_counted(
    require: Callable[[str, str], str], tmp_path: Path
) -> None:
    program = require("docker-registry", "docker-registry")
    space = Workspace(tmp_path, on_tmpfs=False)
    image = await make_random_image(tmp_path / "image", image_bytes=2 << 20, layers=2, seed=1, multi_arch=True)
    with loopback_lab(["registry", "node"]) as lab, ProcessGroup(space.logs) as group:
        registry = await start_registry(group, lab["registry"], space, program=program)
        assert registry.kind.startswith("docker-registry ")
        registry.push(image, "team/demo")
        assert registry.sent_bytes() == 0
        record = Pull("node")
        await pull(record, lab["node"], Source(registry.base_url), "team/demo", "v1", deadline_s=60)
        assert record.error is None
        wanted = image.pull_bytes + image.root.size_bytes
        while registry.sent_bytes() < wanted:
            registry.process.check()
        assert registry.sent_bytes() == wanted


@pytest.mark.real
async def test_a_registry_that_does_not_start_is_named_with_its_log(tmp_path: Path) -> None:
    space = Workspace(tmp_path, on_tmpfs=False)
    with loopback_lab(["registry"]) as lab, ProcessGroup(space.logs) as group:
        with pytest.raises(LabError, match="registry ended with exit code") as caught:
            await start_registry(group, lab["registry"], space, program="/bin/false")
        assert isinstance(caught.value.log, str)
