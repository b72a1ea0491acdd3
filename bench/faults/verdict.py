# SPDX-License-Identifier: Apache-2.0
"""What a rollout with faults or lying peers has to come to, and whether it did. Pure.

Times of void runs are not judged; failed pulls, egress and waste are.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.contract import Target, at_most

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from bench.faults.liars import Blame
    from bench.results import Result

LIARS_RATIO = 1.25
WASTE_PERCENT = 3.0
NAMED_S = 5.0
ADDED_BOUNDS, ADDED_S = 0.15, 3.0
EGRESS_RATIO = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One rollout of a scenario.

    Args:
        calm: the undisturbed rollout that it is compared with; None where there is none.
        happened: seconds from the start, and what.
        outages_s: by node's place, for how long it could get nothing.
        killed: places of the nodes whose own agent was killed; what they took does not count.
        blames: one for each corrupting peer and agent that it sent a whole wrong chunk.
        unnamed: corrupting peers that no agent has banned.
    """

    scenario: str
    seed: int
    result: Result
    calm: Result | None = None
    happened: Sequence[tuple[float, str]] = ()
    outages_s: Mapping[int, float] = field(default_factory=dict)
    killed: Collection[int] = ()
    blames: Sequence[Blame] = ()
    unnamed: Sequence[str] = ()

    @property
    def void(self) -> bool:
        return bool(self.result.void or (self.calm and self.calm.void))

    @property
    def added_s(self) -> float | None:
        """What the slowest node took longer than the slowest of the undisturbed run, but for its own outage."""
        if self.calm is None or self.calm.last_s is None:
            return None
        calm_s = self.calm.last_s
        ends = enumerate(self.result.pulls_s)
        counted = [end - calm_s - self.outages_s.get(node, 0) for node, (_, end) in ends if node not in self.killed]
        return max(counted, default=None)


def judge(trials: Sequence[Trial]) -> list[Target]:
    """Return what was wanted of these trials of one scenario; of times the median counts, of all else the worst."""
    disturbed = [trial for trial in trials if trial.calm]
    targets = [at_most("failed pulls", sum(trial.result.failed_pulls for trial in trials), 0, "")]
    targets += _judge_faults(disturbed) if disturbed else _judge_lies(trials)
    return targets


def _judge_faults(trials: Sequence[Trial]) -> list[Target]:
    nothing = [trial for trial in trials if not trial.happened]
    targets = [Target("runs in which the fault came too late", str(len(nothing)), "0", not nothing)]
    timed = [trial for trial in trials if not trial.void and trial.added_s is not None]
    if timed:
        bound_s = timed[0].result.bound_s
        added_s = statistics.median(trial.added_s or 0.0 for trial in timed)
        targets.append(at_most(f"added time{_of(timed)}", added_s, ADDED_BOUNDS * bound_s + ADDED_S, "s", 1))
    egress = max(trial.result.origin_egress_ratio for trial in trials)
    return [*targets, at_most("egress, of the image", egress, EGRESS_RATIO, "x", 3)]


def _judge_lies(trials: Sequence[Trial]) -> list[Target]:
    targets = []
    timed = [trial.result.own_ratio_to_bound for trial in trials if not trial.void]
    ratios = [ratio for ratio in timed if ratio is not None]
    if ratios:
        slowest = statistics.median(ratios)
        targets.append(at_most(f"slowest honest node, of the fluid bound{_of(ratios)}", slowest, LIARS_RATIO, "x", 3))
    targets.append(at_most("waste", max(waste_percent(trial.result) for trial in trials), WASTE_PERCENT, "%", 2))
    blames = [blame for trial in trials for blame in trial.blames]
    unnamed = sum(len(trial.unnamed) for trial in trials)
    targets.append(at_most("corrupting peers that no agent banned", unnamed, 0, ""))
    never = [blame for blame in blames if blame.named_s is None]
    what = f"agents that got wrong chunks ({len(blames)}) and never named who sent them"
    targets.append(at_most(what, len(never), 0, ""))
    if named := [blame.named_s for blame in blames if blame.named_s is not None]:
        targets.append(at_most("named and banned after the first wrong chunk, slowest", max(named), NAMED_S, "s", 2))
    return targets


def waste_percent(result: Result) -> float:
    """Return what agents fetched beyond what they lacked, in percent of that."""
    return 100 * result.refetched_bytes / (result.image_bytes * result.nodes)


def _of(counted: Sequence[object]) -> str:
    return f", median of {len(counted)}" if len(counted) > 1 else ""
