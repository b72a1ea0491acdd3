# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from random import Random

import pytest

from bench.faults.plan import ALL_FAULTS, NAMES, OF_NODES, Fault, Kind, Liars, chaos, named


def test_every_name_stands_for_something_and_w6_all_for_all_with_faults() -> None:
    assert all(named(name) for name in NAMES)
    assert {scenario.name for scenario in named(ALL_FAULTS)} == {name for name in NAMES if name.startswith("W6")} - {
        ALL_FAULTS
    }


@pytest.mark.parametrize(("nodes", "counts"), [(20, (4, 1, 1)), (5, (1, 1, 1)), (40, (8, 2, 2))])
def test_of_few_nodes_at_least_one_is_of_each_kind(nodes: int, counts: tuple[int, int, int]) -> None:
    assert Liars(slow=0.2, stalling=0.05, corrupting=0.05).counts(nodes) == counts


def test_a_fault_strikes_its_part_of_the_nodes_and_at_least_one() -> None:
    assert len(Fault(kind=Kind.FREEZE, at=0.3, part=0.25).drawn(12, Random(1)).nodes) == 3
    assert len(Fault(kind=Kind.FREEZE, at=0.3, part=0.01).drawn(12, Random(1)).nodes) == 1
    assert Fault(kind=Kind.SCHEDULER, at=0.3, part=0.5).drawn(12, Random(1)).nodes == ()


def test_the_same_seed_gives_the_same_schedule_and_others_give_others() -> None:
    assert chaos(12, Random("chaos/7")) == chaos(12, Random("chaos/7"))
    assert len({chaos(12, Random(f"chaos/{seed}")) for seed in range(50)}) == 50


def test_schedules_end_strike_nodes_that_there_are_and_cut_off_one_half_at_a_time() -> None:
    seen: set[Kind] = set()
    for seed in range(200):
        faults = chaos(12, Random(seed))
        kinds = [fault.kind for fault in faults]
        seen.update(kinds)
        assert kinds.count(Kind.PARTITION) <= 1
        assert all(fault.lasts_s <= 4 and fault.at is not None and 0 <= fault.at < 1 for fault in faults)
        assert all(bool(fault.nodes) == (fault.kind in OF_NODES) for fault in faults)
        assert all(0 <= node < 12 for fault in faults for node in fault.nodes)
    assert seen == set(Kind)


def test_a_fault_says_what_when_and_to_whom() -> None:
    frozen = Fault(kind=Kind.FREEZE, at=0.3, lasts_s=10.0, nodes=(0, 4))
    assert str(frozen) == "agents frozen of node1, node5 at 30%, until 10.0 s later"
    assert str(Fault(kind=Kind.SCHEDULER, at=0.3, until=0.6)) == "scheduler killed at 30%, until 60%"
    assert str(Fault(kind=Kind.ORIGIN, at=None)) == "origin killed once all chunks are out"
