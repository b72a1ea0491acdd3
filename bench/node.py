# SPDX-License-Identifier: Apache-2.0
"""`p2pdist bench node`: what an agent costs where no link limits it, next to nginx and a registry.

Each part is measured by a module of its own (`node_*.py`); this one runs them, shows the figures and holds them
against their targets.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from bench.contract import target_table
from bench.lab.machine import describe
from bench.node_figures import table, targets
from bench.node_peers import measure_peers
from bench.node_serve import measure_blob, measure_ranges, measure_small
from bench.node_swarm import measure_swarm

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from bench.node_figures import Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure.

    Args:
        parts: of PARTS.
        nodes: agents of the swarm.
        layers: of its image.
        namespaces: whether its hosts are network namespaces.
        identity: whether it is measured with certificates and TLS, too.
    """

    parts: tuple[str, ...]
    image_mib: int
    runs: int
    nodes: int
    layers: int
    namespaces: bool
    identity: bool = False
    json_file: Path | None = None


async def measure(plan: Plan, console: Console) -> None:
    """Measure and print.

    Raises:
        LabError: what is measured does not come up, or fails.
    """
    console.print(describe(), markup=False, highlight=False)
    figures: list[Figure] = []
    for part in plan.parts:
        console.print(f"{part} ...", highlight=False)
        figures += await _part(part, plan)
    console.print(table(figures))
    console.print(target_table(list(targets(figures))))
    if plan.json_file is not None:
        lines = "".join(json.dumps(figure.as_json()) + "\n" for figure in figures)
        await trio.Path(plan.json_file).write_text(lines)


async def _part(part: str, plan: Plan) -> list[Figure]:
    size_bytes = plan.image_mib << 20
    if part == "swarm":
        return await measure_swarm(
            size_bytes,
            nodes=plan.nodes,
            layers=plan.layers,
            runs=plan.runs,
            shaped=plan.namespaces,
            identity=plan.identity,
        )
    if part == "small":
        return await measure_small(runs=plan.runs)
    return await {"blob": measure_blob, "ranges": measure_ranges, "peers": measure_peers}[part](
        size_bytes, runs=plan.runs
    )
