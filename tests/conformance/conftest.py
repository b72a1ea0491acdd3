# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from tests.conformance.scene import COLD, DISK, PEER, Scene

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture(params=[COLD, DISK, PEER])
async def scene(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Scene]:
    """Yield each of the places where a runtime may find an agent."""
    async with trio.open_nursery() as nursery:
        scene = Scene(request.param, tmp_path, nursery)
        await nursery.start(scene.start_origin)
        yield scene
        scene.close()


@pytest.fixture
async def cold(tmp_path: Path) -> AsyncIterator[Scene]:
    """Yield the place of what no cache and no peer can change."""
    async with trio.open_nursery() as nursery:
        scene = Scene(COLD, tmp_path, nursery)
        await nursery.start(scene.start_origin)
        yield scene
        scene.close()


@pytest.fixture
def origin_stays(scene: Scene) -> Scene:
    """The same three places with the origin there: for tags, tag lists and referrers, which are its word."""
    scene.keep_origin = True
    return scene
