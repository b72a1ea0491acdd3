# SPDX-License-Identifier: Apache-2.0
"""`p2pdist bench rollout`: systems side by side, each pulling one image on all nodes of a lab at once."""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bench.crowd import REPOSITORY, open_stage, run_rollout
from bench.display import MIB, Display
from bench.lab.images import make_random_image
from bench.systems import P2PDIST
from p2pdist import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from bench.crowd import Outcome, Shape, Stage
    from bench.results import Result

_CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `bench rollout` is asked for.

    Args:
        runs: of each system, with seeds `seed`, `seed` + 1, …
        kill_scheduler_at: the part of all bytes at which the scheduler is killed, in systems that have one.
        loopback_reason: why the links cannot be shaped, None where they can.
    """

    shape: Shape
    layers: int
    systems: Sequence[str]
    runs: int
    seed: int
    jitter_s: float
    kill_scheduler_at: float | None
    json_file: Path | None
    keep_logs: Path | None
    loopback_reason: str | None


async def rollouts(plan: Plan, console: Console) -> bool:
    """Do all runs, print what they came to; return whether every pull was right.

    Raises:
        LabError: the lab or a system does not come up.
    """
    if plan.json_file:
        plan.json_file.write_text("")
    async with open_stage(plan.shape, shaped=plan.loopback_reason is None) as stage:
        try:
            results = await _run_all(plan, stage, console)
        finally:
            if plan.keep_logs:
                shutil.copytree(stage.space.logs, plan.keep_logs, dirs_exist_ok=True)
    console.print(table(results))
    return not any(result.failed_pulls for result in results)


async def _run_all(plan: Plan, stage: Stage, console: Console) -> list[Result]:
    image = await make_random_image(
        stage.space.path / "image", image_bytes=plan.shape.image_bytes, layers=plan.layers, seed=plan.seed
    )
    stage.registry.push(image, REPOSITORY)
    console.print(description(plan, stage))
    results = []
    for seed in range(plan.seed, plan.seed + plan.runs):
        for system in plan.systems:
            outcome = await run_rollout(
                stage,
                system,
                image,
                label=f"{seed}-{system}",
                watch=Display(console, f"{system}, seed {seed}").watch,
                jitter_s=plan.jitter_s,
                seed=seed,
                kill_scheduler_at=plan.kill_scheduler_at if system == P2PDIST else None,
                notes=_notes(plan, stage, seed),
            )
            _report(plan, outcome, console)
            results.append(outcome.result)
    return results


def _notes(plan: Plan, stage: Stage, seed: int) -> dict[str, object]:
    return {
        "version": __version__,
        "seed": seed,
        "layers": plan.layers,
        "origin_mbit": plan.shape.origin_mbit,
        "jitter_s": plan.jitter_s,
        "kill_scheduler_at": plan.kill_scheduler_at,
        "registry": stage.registry.kind,
        "shaped": stage.lab.shaped,
        "tmpfs": stage.space.on_tmpfs,
        "congestion_control": _CONGESTION.read_text().strip(),
    }


def _report(plan: Plan, outcome: Outcome, console: Console) -> None:
    if plan.json_file:
        with plan.json_file.open("a") as file:
            file.write(json.dumps(outcome.result.as_json()) + "\n")
    if outcome.result.void:
        console.print(f"{outcome.result.system}: void: {outcome.result.void}", markup=False, highlight=False)
    for line in outcome.problems():
        console.print(line, markup=False, highlight=False)


def description(plan: Plan, stage: Stage) -> str:
    """Return what is measured, on what, in a few lines."""
    shape = plan.shape
    links = f"{shape.link_mbit:g} Mbit/s both ways, registry {shape.origin_mbit:g}"
    lab = f"network namespaces, links {links}" if stage.lab.shaped else f"loopback, unshaped: {plan.loopback_reason}"
    return (
        f"{shape.nodes} nodes in {lab}; image {shape.image_bytes / MIB:g} MiB in {plan.layers} layers\n"
        f"{stage.registry.kind}; files on {'tmpfs' if stage.space.on_tmpfs else 'disk'}; "
        f"one flow gets {stage.goodput_bytes_per_s * 8 / 1e6:.1f} Mbit/s, "
        f"so the image takes at least {shape.image_bytes / stage.goodput_bytes_per_s:.1f} s"
    )


_COLUMNS: Sequence[tuple[str, Callable[[Result], str]]] = (
    ("system", lambda result: result.system + (" (void)" if result.void else "")),
    ("right", lambda result: f"{result.nodes - result.failed_pulls}/{result.nodes}"),
    ("last s", lambda result: _number(result.last_s)),
    ("÷ bound", lambda result: _number(result.own_ratio_to_bound, 3)),
    ("egress ×", lambda result: _number(result.origin_egress_ratio, 3)),
    ("dup %", lambda result: _number(result.duplicate_bytes_ratio * 100, 1)),
    ("TTFB p99", lambda result: _number(result.ttfb_p99_s, 2)),
    ("CPU-s/GiB", lambda result: _number(result.cpu_s_per_gib)),
    ("RSS MiB", lambda result: _number(result.rss_mib_max, 0)),
    ("idle %", lambda result: _number(result.idle_cpu_ratio * 100, 0)),
)


def table(results: Sequence[Result]) -> Table:
    """Return the closing table: a row for each run; below it the median and worst of systems that ran repeatedly."""
    closing = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), caption=_medians(results))
    for name, _ in _COLUMNS:
        closing.add_column(name, justify="left" if name == "system" else "right", no_wrap=True)
    for result in results:
        closing.add_row(*(cell(result) for _, cell in _COLUMNS))
    return closing


def _medians(results: Sequence[Result]) -> str | None:
    lines = []
    for system in dict.fromkeys(result.system for result in results):
        ratios = [result.own_ratio_to_bound for result in results if result.system == system and not result.void]
        known = [ratio for ratio in ratios if ratio is not None]
        if len(known) > 1:
            lines.append(f"{system} ÷ bound: median {statistics.median(known):.3f}, worst {max(known):.3f}")
    return "\n".join(lines) or None


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
