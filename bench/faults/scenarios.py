# SPDX-License-Identifier: Apache-2.0
"""`p2pdist bench faults --scenario`: named rollouts in which things break, each held against what is promised of it.

Scenarios of the same sizes share a lab, and for each seed one undisturbed rollout that they are compared with.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from random import Random
from time import strftime
from typing import TYPE_CHECKING

from bench.contract import add_line, begin_file, target_table
from bench.crowd import REPOSITORY, open_stage, run_rollout, together
from bench.display import Display
from bench.faults.injector import Injector
from bench.faults.liars import Company, behaviours
from bench.faults.verdict import Trial, judge
from bench.lab import machine, outages
from bench.lab.errors import LabError
from bench.lab.images import make_random_image
from bench.report import Chapter, Report, page, report_place
from bench.rollout import description, notes, shape_of
from bench.systems import P2PDIST
from bench.tables import table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from rich.console import Console

    from bench.crowd import Outcome, Stage
    from bench.faults.plan import Scenario
    from bench.lab.images import Image
    from bench.lab.processes import ProcessGroup
    from bench.systems import Running
    from bench.workloads import Workload

CALM = "undisturbed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is asked for; `runs` of each scenario, with seeds `seed`, `seed` + 1, …"""

    scenarios: Sequence[Scenario]
    runs: int
    seed: int
    json_file: Path | None
    report: Path | None
    keep_logs: Path | None


@dataclass(slots=True)
class _Lab:
    """A lab in use, and the undisturbed rollout of each seed."""

    plan: Plan
    console: Console
    stage: Stage
    image: Image
    calm: dict[int, Outcome]


async def run_scenarios(plan: Plan, console: Console) -> bool:
    """Do all runs, print what they came to; return whether all was as wanted.

    Raises:
        LabError: the lab does not come up, or something that a scenario needs is missing.
    """
    if reason := outages.why_not_lose():
        raise LabError(reason)
    report_file = report_place(plan.report, "faults.html") if plan.report else None
    if plan.json_file:
        begin_file(plan.json_file)
    chapters: list[Chapter] = []
    try:
        for _, alike in groupby(plan.scenarios, key=_lab_of):
            await _in_one_lab(plan, list(alike), console, chapters)
    finally:
        if report_file and chapters:
            told = Report(machine.describe(), strftime("%Y-%m-%d %H:%M"), chapters, "p2pdist bench faults")
            report_file.write_text(page(told))
    if report_file:
        console.print(f"report: {report_file}", highlight=False, soft_wrap=True)
    return all(target.met for chapter in chapters for target in chapter.targets)


def _lab_of(scenario: Scenario) -> tuple[Workload, bool]:
    return replace(scenario.workload, name="", about=""), scenario.liars is None


async def _in_one_lab(plan: Plan, scenarios: Sequence[Scenario], console: Console, chapters: list[Chapter]) -> None:
    workload, liars = scenarios[0].workload, scenarios[0].liars
    shape = shape_of(workload)
    if liars:
        slow, stalling, corrupting = liars.counts(workload.nodes)
        guests = tuple(behaviours(stalling, corrupting, 0))
        shape = replace(shape, nodes=workload.nodes - len(guests), guests=guests)
        shape = replace(shape, uplinks_mbit=dict.fromkeys(shape.node_names()[:slow], workload.link_mbit / 10))
    async with open_stage(shape, shaped=True) as stage:
        make = partial(make_random_image, image_bytes=shape.image_bytes, layers=workload.layers)
        image = await make(stage.space.path / "image", seed=plan.seed)
        stage.registry.push(image, REPOSITORY)
        lab = _Lab(plan, console, stage, image, {})
        try:
            for scenario in scenarios:
                chapters.append(await _chapter(lab, scenario))
                console.print(table(chapters[-1].results), target_table(chapters[-1].targets), "")
        finally:
            if plan.keep_logs:
                shutil.copytree(stage.space.logs, plan.keep_logs, dirs_exist_ok=True)


async def _chapter(lab: _Lab, scenario: Scenario) -> Chapter:
    said = "\n".join([description(scenario.workload, lab.stage, None), *_plot(lab, scenario)])
    lab.console.print(f"{scenario.workload.title}\n{said}", highlight=False)
    outcomes: list[Outcome] = []
    trials: list[Trial] = []
    for seed in range(lab.plan.seed, lab.plan.seed + lab.plan.runs):
        if scenario.faults:
            outcomes.append(await _undisturbed(lab, scenario.workload, seed))
        trial, outcome = await _trial(lab, scenario, seed)
        outcomes.append(outcome)
        trials.append(trial)
        for time_s, what in trial.happened:
            lab.console.print(f"  {time_s:6.1f} s: {what}", highlight=False)
        for line in _remarks(trial, outcome):
            lab.console.print(line, markup=False, highlight=False)
    return Chapter(scenario.workload, said, outcomes, judge(trials))


def _plot(lab: _Lab, scenario: Scenario) -> Iterator[str]:
    shape = lab.stage.shape
    if shape.uplinks_mbit:
        (slow_mbit,) = set(shape.uplinks_mbit.values())
        yield f"{', '.join(shape.uplinks_mbit)} send at {slow_mbit:g} Mbit/s; the last {len(shape.guests)} nodes lie"
    for fault in scenario.faults:
        part = f" ({fault.part:.0%} of the nodes)" if fault.part else ""
        yield f"{fault}{part}"


def _remarks(trial: Trial, outcome: Outcome) -> Iterator[str]:
    if trial.void:
        yield f"{trial.scenario}, seed {trial.seed}: void: {trial.result.void or 'the undisturbed run is'}"
    for blame in trial.blames:
        when = "never" if blame.named_s is None else f"after {blame.named_s:.2f} s"
        yield f"  {blame.liar}, which sent {blame.node} wrong chunks, was named and banned {when}"
    yield from outcome.problems()


async def _undisturbed(lab: _Lab, workload: Workload, seed: int) -> Outcome:
    """Return the undisturbed rollout of a seed, made once."""
    if seed not in lab.calm:
        how = notes(workload, lab.stage, seed) | {"scenario": CALM}
        watch = Display(lab.console, f"{CALM}, seed {seed}").watch
        arrivals = workload.arrivals
        outcome = await run_rollout(
            lab.stage, P2PDIST, lab.image, label=f"{seed}-{CALM}", watch=watch, arrivals=arrivals, seed=seed, notes=how
        )
        lab.calm[seed] = replace(outcome, result=replace(outcome.result, system=CALM))
        if lab.plan.json_file:
            add_line(lab.plan.json_file, outcome.result.as_json())
    return lab.calm[seed]


async def _trial(lab: _Lab, scenario: Scenario, seed: int) -> tuple[Trial, Outcome]:
    """Do one rollout of a scenario, and judge it by itself for its record."""
    stage, rng = lab.stage, Random(seed)
    injector = Injector(stage, [fault.drawn(stage.shape.nodes, rng) for fault in scenario.faults])
    kinds = {}
    if scenario.liars:
        _, stalling, corrupting = scenario.liars.counts(scenario.workload.nodes)
        kinds = behaviours(stalling, corrupting, seed)
    company = Company(stage, lab.image, kinds)
    started: list[Running] = []

    async def prepare(group: ProcessGroup, running: Running) -> Running:
        started.append(running)
        await company.start(group)
        return injector.persistent(running)

    outcome = await run_rollout(
        stage,
        P2PDIST,
        lab.image,
        label=f"{seed}-{scenario.name}",
        watch=together(Display(lab.console, f"{scenario.name}, seed {seed}").watch, company.run, injector.run),
        arrivals=scenario.workload.arrivals,
        seed=seed,
        prepare=prepare,
        notes=notes(scenario.workload, stage, seed) | {"scenario": scenario.name},
    )
    places = {name: place for place, name in enumerate(stage.shape.node_names())}
    trial = Trial(
        scenario=scenario.name,
        seed=seed,
        result=outcome.result,
        calm=lab.calm[seed].result if scenario.faults else None,
        happened=tuple(injector.happened),
        outages_s={places[name]: outage_s for name, outage_s in injector.outages_s.items()},
        killed={places[name] for name in injector.killed},
        blames=company.blames(started[0].agents),
        unnamed=company.unnamed(started[0].agents),
    )
    _record(lab, trial)
    return trial, outcome


def _record(lab: _Lab, trial: Trial) -> None:
    if lab.plan.json_file:
        more = {
            "scenario": trial.scenario,
            "added_s": trial.added_s,
            "happened": trial.happened,
            "outages_s": trial.outages_s,
            "killed_nodes": sorted(trial.killed),
            "blames": [asdict(blame) for blame in trial.blames],
            "unnamed": list(trial.unnamed),
            "expectations": [asdict(target) for target in judge([trial])],
        }
        add_line(lab.plan.json_file, trial.result.as_json() | more)
