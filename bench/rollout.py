# SPDX-License-Identifier: Apache-2.0
"""`p2pdist bench rollout`: systems side by side, each pulling one image on all nodes of a lab."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import strftime
from typing import TYPE_CHECKING

from bench.contract import add_line, begin_file
from bench.crowd import REPOSITORY, Shape, open_stage, run_rollout, together
from bench.display import MIB, Display
from bench.faults.injector import Injector
from bench.faults.plan import Fault, Kind
from bench.lab import machine
from bench.lab.errors import LabError
from bench.lab.images import make_random_image
from bench.report import Chapter, Report, page, report_place
from bench.systems import P2PDIST, why_not
from bench.tables import summary, table
from p2pdist import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from bench.crowd import Outcome, Stage
    from bench.lab.images import Image
    from bench.workloads import Workload

_CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `bench rollout` is asked for.

    Args:
        runs: of each system, with seeds `seed`, `seed` + 1, …
        kill_scheduler_at: the part of all bytes at which the scheduler is killed, in systems that have one; of several,
            the one that leads the most swarms.
        report: where the report goes: a directory, or a file that ends in .html.
        loopback_reason: why the links cannot be shaped, None where they can.
    """

    workloads: Sequence[Workload]
    systems: Sequence[str]
    runs: int
    seed: int
    kill_scheduler_at: float | None
    schedulers: int
    json_file: Path | None
    report: Path | None
    keep_logs: Path | None
    loopback_reason: str | None


async def rollouts(plan: Plan, console: Console) -> bool:
    """Do all runs, print what they came to; return whether every pull was right.

    Raises:
        LabError: the lab or a system does not come up.
    """
    for system in plan.systems:
        if reason := why_not(system):
            raise LabError(reason)
    report_file = report_place(plan.report, "rollout.html") if plan.report else None
    if plan.json_file:
        begin_file(plan.json_file)
    chapters: list[Chapter] = []
    try:
        for workload in plan.workloads:
            chapters.append(await _chapter(plan, workload, console))
            console.print(table(chapters[-1].results), "")
    finally:
        # Whoever stops a long benchmark keeps what it has measured.
        if report_file and chapters:
            report_file.write_text(page(Report(machine.describe(), strftime("%Y-%m-%d %H:%M"), tuple(chapters))))
    for chapter in chapters:
        if rows := summary(chapter.results):
            console.print(rows)
    if report_file:
        console.print(f"report: {report_file}", highlight=False, soft_wrap=True)
    return not any(result.failed_pulls for chapter in chapters for result in chapter.results)


async def _chapter(plan: Plan, workload: Workload, console: Console) -> Chapter:
    shape = replace(shape_of(workload), schedulers=plan.schedulers)
    async with open_stage(shape, shaped=plan.loopback_reason is None) as stage:
        try:
            said = description(workload, stage, plan.loopback_reason)
            console.print(f"{workload.title}\n{said}", highlight=False)
            return Chapter(workload, said, tuple(await _run_all(plan, workload, stage, console)))
        finally:
            if plan.keep_logs:
                place = plan.keep_logs / workload.name if len(plan.workloads) > 1 else plan.keep_logs
                shutil.copytree(stage.space.logs, place, dirs_exist_ok=True)


def shape_of(workload: Workload) -> Shape:
    """Return the lab that a workload needs."""
    return Shape(
        nodes=workload.nodes,
        link_mbit=workload.link_mbit,
        origin_mbit=workload.origin_mbit or workload.link_mbit,
        image_bytes=workload.image_mib << 20,
        origin_per_connection_mbit=workload.origin_per_connection_mbit,
        racks=workload.racks,
        rack_uplink_mbit=workload.rack_uplink_mbit,
    )


async def _run_all(plan: Plan, workload: Workload, stage: Stage, console: Console) -> list[Outcome]:
    before, image = await _push_images(plan, workload, stage)
    outcomes = []
    for seed in range(plan.seed, plan.seed + plan.runs):
        for system in plan.systems:
            watchers = [Display(console, f"{workload.name}, {system}, seed {seed}").watch]
            if plan.kill_scheduler_at is not None and system == P2PDIST:
                watchers.append(Injector(stage, [Fault(kind=Kind.SCHEDULER, at=plan.kill_scheduler_at)]).run)
            outcome = await run_rollout(
                stage,
                system,
                image,
                label=f"{seed}-{system}",
                watch=together(*watchers),
                arrivals=workload.arrivals,
                seed=seed,
                before=before,
                notes=notes(workload, stage, seed)
                | {"kill_scheduler_at": plan.kill_scheduler_at, "schedulers": plan.schedulers},
            )
            _report(plan, outcome, console)
            outcomes.append(outcome)
    return outcomes


async def _push_images(plan: Plan, workload: Workload, stage: Stage) -> tuple[Image | None, Image]:
    """Put the image into the registry; also one before it, where nodes have a part of it from that."""
    make = partial(make_random_image, image_bytes=stage.shape.image_bytes, layers=workload.layers)
    place, before, shared = stage.space.path / "image", None, None
    if workload.shared is not None:
        before = await make(stage.space.path / "before", seed=plan.seed, tag="v0")
        shared = (workload.shared_layers, plan.seed)
        stage.registry.push(before, REPOSITORY)
    image = await make(place, seed=plan.seed + bool(shared), shared=shared)
    stage.registry.push(image, REPOSITORY)
    return before, image


def notes(workload: Workload, stage: Stage, seed: int) -> dict[str, object]:
    """Return how a run was made, for its record."""
    return {
        "version": __version__,
        "workload": workload.name,
        "seed": seed,
        "layers": workload.layers,
        "origin_mbit": stage.shape.origin_mbit,
        "origin_per_connection_mbit": workload.origin_per_connection_mbit,
        "jitter_s": workload.jitter_s,
        "batches": workload.batches,
        "poisson_s": workload.poisson_s,
        "shared": workload.shared,
        "racks": workload.racks,
        "rack_uplink_mbit": workload.rack_uplink_mbit,
        "link_goodput_bytes_per_s": stage.link_goodput_bytes_per_s,
        "registry": stage.registry.kind,
        "shaped": stage.lab.shaped,
        "tmpfs": stage.space.on_tmpfs,
        "congestion_control": _CONGESTION.read_text().strip(),
    }


def _report(plan: Plan, outcome: Outcome, console: Console) -> None:
    if plan.json_file:
        add_line(plan.json_file, outcome.result.as_json())
    if outcome.result.void:
        console.print(f"{outcome.result.system}: void: {outcome.result.void}", markup=False, highlight=False)
    for line in outcome.problems():
        console.print(line, markup=False, highlight=False)


def description(workload: Workload, stage: Stage, loopback_reason: str | None) -> str:
    """Return what is measured, on what, in a few lines."""
    lacking_mib = workload.image_mib * (1 - workload.shared_layers / workload.layers)
    where = _links(workload, stage) if stage.lab.shaped else f"on loopback, unshaped: {loopback_reason}"
    return (
        f"{workload.nodes} nodes {where}\n"
        f"image {workload.image_mib:g} MiB in {workload.layers} layers{_upgrade(workload)}; "
        f"starts {_starts(workload)}\n"
        f"{stage.registry.kind}; files on {'tmpfs' if stage.space.on_tmpfs else 'disk'}; "
        f"the registry gives {stage.goodput_bytes_per_s * 8 / 1e6:.1f} Mbit/s of payload, "
        f"so the image takes at least {lacking_mib * MIB / stage.goodput_bytes_per_s:.1f} s"
    )


def _links(workload: Workload, stage: Stage) -> str:
    said = f"in network namespaces, links {workload.link_mbit:g} Mbit/s both ways, registry {stage.shape.origin_mbit:g}"
    if workload.origin_per_connection_mbit:
        said += f", each connection to it {workload.origin_per_connection_mbit:g}"
    if workload.racks:
        uplink = workload.rack_uplink_mbit
        said += f"; {workload.racks} racks, uplinks {f'{uplink:g} Mbit/s' if uplink else 'unshaped'}"
    return said


def _upgrade(workload: Workload) -> str:
    if workload.shared is None:
        return ""
    return f", of which nodes have {workload.shared_layers} from a pull before"


def _starts(workload: Workload) -> str:
    if workload.poisson_s is not None:
        return f"one by one, {workload.poisson_s:g} s apart in the mean"
    spread = f"within {workload.jitter_s:g} s" if workload.jitter_s else "at once"
    return spread if workload.batches == 1 else f"in batches of {workload.batches:.0%} {spread}"
