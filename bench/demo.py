# SPDX-License-Identifier: Apache-2.0
"""`p2pdist demo`: the main job on one machine: an image to all nodes, by p2pdist and straight from the registry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from bench.crowd import REPOSITORY, open_stage, run_rollout
from bench.display import MIB, Display
from bench.lab.images import make_machine_image
from bench.systems import DIRECT, P2PDIST

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from bench.crowd import Shape, Stage
    from bench.lab.images import Image
    from bench.results import Result

_LAYERS = 5


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo is asked for; `loopback_reason` is why the links cannot be shaped, None where they can."""

    shape: Shape
    loopback_reason: str | None
    rootless: bool


async def show(demo: Demo, console: Console) -> bool:
    """Run the demo to its closing table; return whether every pull was right.

    Raises:
        LabError: a part of it does not come up.
    """
    console.print(_opening(demo), "Setting up …", sep="\n", highlight=False)
    async with open_stage(demo.shape, shaped=demo.loopback_reason is None) as stage:
        image = await _prepare(stage, console)
        console.print(f"\nStarting a scheduler and {demo.shape.nodes} agents …", highlight=False)
        outcomes = []
        for system, title in ((P2PDIST, "through p2pdist"), (DIRECT, "straight from the registry")):
            display = Display(console, title, ask_agents=True)
            outcomes.append(await run_rollout(stage, system, image, label=system, watch=display.watch))
            console.print()
    for outcome in outcomes:
        for line in outcome.problems():
            console.print(line, markup=False, highlight=False)
    swarm, direct = (outcome.result for outcome in outcomes)
    shaped = demo.loopback_reason is None
    console.print(closing_table(direct, swarm, shaped=shaped))
    console.print(verdict(direct, swarm, shaped=shaped), highlight=False)
    return not (swarm.failed_pulls or direct.failed_pulls)


async def _prepare(stage: Stage, console: Console) -> Image:
    """Make the image, put it into the registry, and say what there is."""
    image = await make_machine_image(stage.space.path / "image", image_bytes=stage.shape.image_bytes, layers=_LAYERS)
    stage.registry.push(image, REPOSITORY)
    console.print(
        f"Image: {image.pull_bytes / MIB:.1f} MiB of this machine's own files in {len(image.layers)} layers\n"
        f"Registry: {stage.registry.kind}; files on {'tmpfs' if stage.space.on_tmpfs else 'disk'}",
        highlight=False,
    )
    if stage.lab.shaped:
        console.print(
            f"One TCP flow over a link gets {stage.goodput_bytes_per_s * 8 / 1e6:.1f} Mbit/s: "
            f"no node can have the image in less than {image.pull_bytes / stage.goodput_bytes_per_s:.1f} s",
            highlight=False,
        )
    return image


def _opening(demo: Demo) -> str:
    shape = demo.shape
    if demo.loopback_reason:
        return (
            f"[yellow]No shaped links: {demo.loopback_reason}.[/]\n"
            f"{shape.nodes} nodes on this machine's loopback instead: right, but the times say little."
        )
    how = "a user namespace" if demo.rootless else "network namespaces"
    return (
        f"{shape.nodes} nodes and a registry in {how}, each behind a link of "
        f"{shape.link_mbit:g} Mbit/s both ways (registry: {shape.origin_mbit:g})"
    )


def _seconds(value_s: float | None) -> str:
    return "-" if value_s is None else f"{value_s:.1f} s"


def _egress(result: Result) -> str:
    return f"{result.origin_bytes / MIB:.0f} MiB, {result.origin_egress_ratio:.2f} × image"


def _ratio(result: Result) -> str:
    return "-" if result.ratio_to_bound is None else f"{result.ratio_to_bound:.2f} ×"


_ROWS: Sequence[tuple[str, Callable[[Result], str]]] = (
    ("right pulls", lambda result: f"{result.nodes - result.failed_pulls} of {result.nodes}"),
    ("last node had it after", lambda result: _seconds(result.last_s)),
    ("first node had it after", lambda result: _seconds(result.first_s)),
    ("first byte of a blob, p50", lambda result: _seconds(result.ttfb_p50_s)),
    ("out of the registry", _egress),
)
_BOUND_ROWS: Sequence[tuple[str, Callable[[Result], str]]] = (
    ("bound: image over one link", lambda result: _seconds(result.bound_s)),
    ("last node ÷ bound", _ratio),
)


def closing_table(direct: Result, swarm: Result, *, shaped: bool) -> Table:
    """Return the two rollouts next to each other and, where links are shaped, the physical bound."""
    table = Table(title=f"{swarm.image_bytes / MIB:.1f} MiB to {swarm.nodes} nodes")
    table.add_column("")
    table.add_column("from the registry", justify="right")
    table.add_column("p2pdist", justify="right", style="bold")
    for name, cell in (*_ROWS, *(_BOUND_ROWS if shaped else ())):
        table.add_row(name, cell(direct), cell(swarm))
    return table


def verdict(direct: Result, swarm: Result, *, shaped: bool) -> str:
    """Return the closing table in a few sentences."""
    failed = swarm.failed_pulls + direct.failed_pulls
    if failed or swarm.last_s is None or direct.last_s is None:
        return f"[red]{failed} of {swarm.nodes + direct.nodes} pulls failed.[/]"
    egress = (
        f"the registry sent the image [bold]{swarm.origin_egress_ratio:.2f}[/] times "
        f"in the place of {direct.origin_egress_ratio:.2f}. Every digest was checked."
    )
    if not shaped:
        return f"All {swarm.nodes} nodes had the image, and {egress}"
    said = (
        f"All {swarm.nodes} nodes had the image after [bold]{swarm.last_s:.1f} s[/] in the place of "
        f"{direct.last_s:.1f} s, and {egress}"
    )
    if swarm.void:
        said += (
            f"\n(This machine's CPU was {1 - swarm.idle_cpu_ratio:.0%} busy and set the pace; "
            "try with nothing else running, or fewer nodes.)"
        )
    return said
