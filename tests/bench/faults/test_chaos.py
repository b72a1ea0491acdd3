# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from bench.faults.chaos import Chaotic, Schedule, judge

SCHEDULE = Schedule.of(7, 12)


def run(*, wrong: tuple[str, ...] = (), hung: tuple[str, ...] = ()) -> Chaotic:
    return Chaotic(
        schedule=SCHEDULE, last_s=9.0, egress_ratio=1.1, wrong=wrong, hung=hung, attempts=("node1: cut off",)
    )


def test_a_pull_made_again_is_right_and_one_that_hangs_or_is_wrong_is_not() -> None:
    assert all(target.met for target in judge([run()] * 3))
    assert [target.met for target in judge([run(), run(wrong=("node1",))])] == [False, True]
    assert [target.met for target in judge([run(), run(hung=("node1",))])] == [True, False]


def test_the_schedule_of_a_seed_is_told_whole_and_is_the_same_again() -> None:
    lines = SCHEDULE.lines()
    assert lines == Schedule.of(7, 12).lines()
    assert lines[0] == "seed 7:"
    assert len(lines) == 1 + len(SCHEDULE.faults) + len(SCHEDULE.liars)
