# SPDX-License-Identifier: Apache-2.0
"""`p2pdist bench faults --chaos`: rollouts in which a seed decides what breaks when, and who lies.

A runtime whose pull fails pulls again, as kubelet does, for as long as the rollout's deadline lets it: by then
everything has been mended for long. What counts is that no runtime is given anything wrong, and none left without.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

from bench.arrivals import Arrivals
from bench.contract import Target, add_line, at_most, begin_file, target_table
from bench.crowd import REPOSITORY, Shape, open_stage, run_rollout, together
from bench.faults.injector import Injector
from bench.faults.liars import Company
from bench.faults.plan import chaos
from bench.lab import outages
from bench.lab.errors import LabError
from bench.lab.images import make_random_image
from bench.lab.lying_peer import Behaviour
from bench.systems import P2PDIST

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from bench.crowd import Outcome, Stage
    from bench.faults.plan import Fault
    from bench.lab.images import Image
    from bench.lab.processes import ProcessGroup
    from bench.systems import Running

_LIARS_MAX = 2
_LAYERS = 3
_JITTER_S = 1.0
_WRONG = "asked for sha256:"
"""How a runtime's error begins that was given wrong bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is asked for: `runs` with seeds `seed`, `seed` + 1, …"""

    runs: int
    seed: int
    nodes: int = 12
    link_mbit: float = 50.0
    image_mib: int = 16
    json_file: Path | None = None
    keep_logs: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What happens in the run of a seed; the same each time."""

    seed: int
    faults: tuple[Fault, ...]
    liars: dict[str, Behaviour] = field(default_factory=dict)

    @staticmethod
    def of(seed: int, nodes: int) -> Schedule:
        rng = Random(f"chaos/{seed}")
        faults = chaos(nodes, rng)
        liars = {name: rng.choice(list(Behaviour)) for name in _guests()[: rng.randint(0, _LIARS_MAX)]}
        return Schedule(seed=seed, faults=faults, liars=liars)

    def lines(self) -> list[str]:
        """Return it for a person, who can have it again by the seed."""
        liars = [f"{name} lies: {behaviour}" for name, behaviour in self.liars.items()]
        return [f"seed {self.seed}:", *(f"  {line}" for line in [*map(str, self.faults), *liars])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chaotic:
    """What came of a run.

    Args:
        wrong: nodes to whose runtime something wrong was given as right.
        hung: nodes whose pull had not ended right by the deadline.
        attempts: pulls that failed and were made again.
    """

    schedule: Schedule
    last_s: float | None
    egress_ratio: float
    wrong: tuple[str, ...]
    hung: tuple[str, ...]
    attempts: tuple[str, ...]

    @property
    def right(self) -> bool:
        return not self.wrong and not self.hung


def _guests() -> list[str]:
    return [f"liar{number}" for number in range(1, _LIARS_MAX + 1)]


async def run_chaos(plan: Plan, console: Console) -> bool:
    """Do all runs, print each and, of those that failed, the schedule; return whether all were right.

    Raises:
        LabError: the lab does not come up, or iptables is missing.
    """
    if reason := outages.why_not_lose():
        raise LabError(reason)
    if plan.json_file:
        begin_file(plan.json_file)
    shape = Shape(
        nodes=plan.nodes,
        link_mbit=plan.link_mbit,
        origin_mbit=plan.link_mbit,
        image_bytes=plan.image_mib << 20,
        guests=tuple(_guests()),
    )
    seen: list[Chaotic] = []
    async with open_stage(shape, shaped=True) as stage:
        image = await make_random_image(
            stage.space.path / "image", image_bytes=shape.image_bytes, layers=_LAYERS, seed=plan.seed
        )
        stage.registry.push(image, REPOSITORY)
        for seed in range(plan.seed, plan.seed + plan.runs):
            seen.append(await _run(plan, stage, image, Schedule.of(seed, plan.nodes)))
            _tell(plan, seen[-1], console)
    console.print(target_table(judge(seen)), *_tally(seen))
    return all(run.right for run in seen)


async def _run(plan: Plan, stage: Stage, image: Image, schedule: Schedule) -> Chaotic:
    injector = Injector(stage, schedule.faults)
    company = Company(stage, image, schedule.liars)

    async def prepare(group: ProcessGroup, running: Running) -> Running:
        await company.start(group)
        return injector.persistent(running, all_nodes=True)

    label = f"chaos-{schedule.seed}"
    outcome = await run_rollout(
        stage,
        P2PDIST,
        image,
        label=label,
        watch=together(company.run, injector.run),
        arrivals=Arrivals(jitter_s=_JITTER_S),
        seed=schedule.seed,
        prepare=prepare,
    )
    logs = stage.space.directory(f"logs/{label}")
    run = _chaotic(schedule, outcome, injector)
    if plan.keep_logs and not run.right:
        shutil.copytree(logs, plan.keep_logs / label, dirs_exist_ok=True)
    shutil.rmtree(logs)
    if plan.json_file:
        more: dict[str, Any] = asdict(run) | {"happened": injector.happened}
        add_line(plan.json_file, outcome.result.as_json() | more)
    return run


def _chaotic(schedule: Schedule, outcome: Outcome, injector: Injector) -> Chaotic:
    errors = outcome.result.errors
    attempts = [f"{node}: {error}" for node, error in injector.attempts]
    return Chaotic(
        schedule=schedule,
        last_s=outcome.result.last_s,
        egress_ratio=outcome.result.origin_egress_ratio,
        wrong=tuple(line for line in [*errors, *attempts] if _WRONG in line),
        hung=tuple(line for line in errors if _WRONG not in line),
        attempts=tuple(attempts),
    )


def _tell(plan: Plan, run: Chaotic, console: Console) -> None:
    last = "-" if run.last_s is None else f"{run.last_s:.1f} s"
    said = "right" if run.right else f"FAILED: {len(run.wrong)} wrong, {len(run.hung)} hung"
    kinds = ", ".join(str(fault.kind) for fault in run.schedule.faults)
    console.print(
        f"seed {run.schedule.seed}: {said}; {last}, egress {run.egress_ratio:.2f}, {len(run.attempts)} pulls made "
        f"again; {kinds}{f'; {len(run.schedule.liars)} lie' if run.schedule.liars else ''}",
        highlight=False,
        soft_wrap=True,
    )
    if run.right:
        return
    sizes = f"--nodes {plan.nodes} --link-mbit {plan.link_mbit:g} --image-mib {plan.image_mib}"
    again = f"again: p2pdist bench faults --chaos --runs 1 --seed {run.schedule.seed} {sizes}"
    for line in [*run.schedule.lines(), *run.wrong, *run.hung, *run.attempts, again]:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def judge(runs: Sequence[Chaotic]) -> list[Target]:
    """Return what was wanted of all runs together."""
    return [
        at_most("wrong digests", sum(len(run.wrong) for run in runs), 0, ""),
        at_most("hung pulls", sum(len(run.hung) for run in runs), 0, ""),
    ]


def _tally(runs: Sequence[Chaotic]) -> list[str]:
    kinds = Counter(str(fault.kind) for run in runs for fault in run.schedule.faults)
    kinds.update(f"liar: {behaviour}" for run in runs for behaviour in run.schedule.liars.values())
    return [f"{len(runs)} runs: {', '.join(f'{count} × {kind}' for kind, count in kinds.most_common())}"]
