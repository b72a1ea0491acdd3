# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import pytest

from bench.faults.soak import STORE_MAX_BYTES, Look, Plan, Round, judge

LOOK = Look(
    rss_mib=60.0, descriptors=40, tasks=30, stored_bytes=STORE_MAX_BYTES // 2, disk_bytes=1 << 20, evicted_blobs=9
)
PLAN = Plan(rollouts=200, seed=1, nodes=2)


def rounds(*, last: Look = LOOK, errors: tuple[str, ...] = ()) -> list[Round]:
    """200 rollouts on two agents, of which the second is `last` after the last fifty."""
    early = [Round(seconds=1.0, errors=(), looks=(LOOK, LOOK))] * 150
    return [*early, *[Round(seconds=1.0, errors=errors, looks=(LOOK, last))] * 50]


def missed(seen: list[Round]) -> list[str]:
    return [target.what for target in judge(PLAN, seen) if not target.met]


def test_agents_that_stay_as_they_are_are_as_wanted() -> None:
    assert missed(rounds()) == []


def test_the_first_fifty_after_the_warm_up_are_compared_with_the_last() -> None:
    assert PLAN.windows() == (slice(20, 70), slice(150, 200))
    assert replace(PLAN, rollouts=12).windows() == (slice(3, 7), slice(8, 12))


@pytest.mark.parametrize(
    ("last", "what"),
    [
        (replace(LOOK, rss_mib=67.0), ["memory of all agents, growth", "memory of the agent that grew most"]),
        (replace(LOOK, descriptors=43), ["descriptors of an agent, most at the end"]),
        (replace(LOOK, tasks=33), ["tasks of an agent, most at the end"]),
        (replace(LOOK, stored_bytes=STORE_MAX_BYTES + 1), ["blobs on an agent's disk"]),
        (replace(LOOK, evicted_blobs=0), ["blobs that the agent evicted which evicted least"]),
    ],
)
def test_each_kind_of_growth_is_a_missed_target(last: Look, what: list[str]) -> None:
    assert missed(rounds(last=last)) == what


def test_failed_pulls_are_counted() -> None:
    assert missed(rounds(errors=("node1: cut off",))) == ["failed pulls"]
