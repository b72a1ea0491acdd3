# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from rich.console import Console

from bench.crowd import Rollout
from bench.display import Display
from bench.lab.hosts import Host
from bench.lab.images import Image
from bench.lab.pullers import Pull
from bench.systems import Running
from p2pdist.core.types import Descriptor, parse_digest

if TYPE_CHECKING:
    from collections.abc import Collection

    from trio.testing import MockClock

MIB = 1 << 20


def part(size_bytes: int) -> Descriptor:
    return Descriptor(parse_digest("sha256:" + "0" * 64), size_bytes, "")


class Nobody:
    """A system that does nothing."""

    async def pull(self, record: Pull, host: Host, image: Image, *, deadline_s: float, held: Collection[str]) -> None:
        raise AssertionError("nothing is pulled")

    async def offer(self, image: Image) -> None:
        raise AssertionError("nothing is offered")

    async def sent_bytes(self) -> int:
        return 0


@pytest.fixture
async def rollout() -> Rollout:
    """Two nodes: one done after 5 s, one at half; made on virtual time."""
    image = Image(Path("/"), "v1", part(0), part(0), part(0), (part(8 * MIB),))
    pulls = [
        Pull("node1", started_s=0, finished_s=trio.current_time() + 5, done_bytes=8 * MIB),
        Pull("node2", started_s=0, done_bytes=4 * MIB),
    ]
    return Rollout(Running("direct", Nobody(), Nobody()), image, pulls)


async def shown(rollout: Rollout, *, terminal: bool, duration_s: float) -> str:
    console = Console(file=io.StringIO(), record=True, width=120, force_terminal=terminal)
    with trio.move_on_after(duration_s):
        await Display(console, "direct").watch(rollout)
    return console.export_text()


async def test_without_a_terminal_a_line_tells_now_and_then(rollout: Rollout, autojump_clock: MockClock) -> None:
    lines = (await shown(rollout, terminal=False, duration_s=12)).splitlines()
    assert lines == [
        f"direct:  {seconds:4.1f} s,  75% of all bytes, slowest node  50%, 1 of 2 nodes done" for seconds in (5, 10, 12)
    ]


async def test_on_a_terminal_each_node_has_a_bar(rollout: Rollout, autojump_clock: MockClock) -> None:
    text = await shown(rollout, terminal=True, duration_s=1)
    last = text[text.rindex("node1") :]
    assert "8.0 MiB  registry  ✓ all digests right, 5.0 s" in last
    assert "4.0 MiB  registry" in last


async def test_a_failed_pull_is_shown_with_its_reason(rollout: Rollout, autojump_clock: MockClock) -> None:
    rollout.pulls[1].error = "the body was cut off"
    assert "the body was cut off" in await shown(rollout, terminal=True, duration_s=1)
