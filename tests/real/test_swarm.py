# SPDX-License-Identifier: Apache-2.0
"""Twelve agents pull one image at once: all right, and the origin gives it about once. No time is judged here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from bench.crowd import REPOSITORY, Rollout, Shape, open_stage, run_rollout, watch_nothing
from bench.lab.images import make_random_image
from bench.systems import P2PDIST, P2PDIST_MDNS
from tests.real.cluster import until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from bench.results import Result

    RollOut = Callable[..., Awaitable[Result]]

NODES = 12
IMAGE_BYTES = 24 << 20
LINK_MBIT = 100.0


@pytest.fixture
def roll_out(lab_parts: str, tmp_path: Path) -> RollOut:
    """Return a function that rolls an image of three layers out with a system, and fails where a pull does."""

    async def run(system: str, watch: Callable[[Rollout], Awaitable[None]] = watch_nothing) -> Result:
        shape = Shape(nodes=NODES, link_mbit=LINK_MBIT, origin_mbit=LINK_MBIT, image_bytes=IMAGE_BYTES)
        image = await make_random_image(tmp_path / "layout", image_bytes=IMAGE_BYTES, layers=3, seed=3)
        async with open_stage(shape, shaped=True) as stage:
            await trio.to_thread.run_sync(stage.registry.push, image, REPOSITORY)
            outcome = await run_rollout(stage, system, image, label=system, watch=watch)
        assert not outcome.result.errors, outcome.logs
        return outcome.result

    return run


async def test_with_a_scheduler_twelve_pulls_are_right_and_the_origin_gives_the_image_once(
    roll_out: RollOut,
) -> None:
    result = await roll_out(P2PDIST)
    assert result.failed_pulls == 0
    assert result.origin_egress_ratio <= 1.10


async def test_by_mdns_alone_twelve_pulls_are_right_and_the_origin_gives_the_image_about_once(
    roll_out: RollOut,
) -> None:
    result = await roll_out(P2PDIST_MDNS)
    assert result.failed_pulls == 0
    assert result.origin_egress_ratio <= 1.5


async def test_with_the_scheduler_killed_at_a_third_twelve_pulls_are_right(
    roll_out: RollOut,
) -> None:
    killed_at: list[float] = []

    async def kill(rollout: Rollout) -> None:
        await until(lambda: rollout.done_ratio > 0.3, "a third of the rollout")
        (scheduler,) = rollout.running.schedulers.values()
        scheduler.kill()
        killed_at.append(rollout.done_ratio)

    result = await roll_out(P2PDIST, kill)
    assert result.failed_pulls == 0
    assert killed_at
    assert killed_at[0] < 0.9, "the scheduler was killed too late to show anything"
