# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.cli import bench
from bench.simulator.links import Link, Transfer
from bench.simulator.plan import MBIT, Plan
from bench.simulator.run import simulate_once
from bench.simulator.sizes import frame_bytes
from p2pdist.core import wire
from p2pdist.core.packing import pack_indices
from p2pdist.core.types import Checksum, Digest

SMALL = Plan(nodes=30, image_mib=16)
"""64 chunks."""


def test_a_small_swarm_has_everything_soon_and_reads_the_origin_once() -> None:
    outcome = simulate_once(SMALL)

    assert outcome.failed == 0
    assert outcome.origin_egress_ratio == pytest.approx(1.0)
    assert outcome.duplicate_bytes_ratio <= 0.01
    assert 1.0 <= outcome.ratio_p50 <= outcome.ratio_last <= 1.7
    assert outcome.transfers == 30 * 64


def test_a_seed_gives_the_same_figures_each_time_and_another_seed_others() -> None:
    plan = replace(SMALL, nodes=12)
    first, again, other = (
        asdict(replace(simulate_once(each), wall_s=0.0)) for each in (plan, plan, replace(plan, seed=2))
    )

    assert first == again
    assert first["last_s"] != other["last_s"]


def test_all_that_stay_are_done_though_others_leave_and_new_ones_come() -> None:
    outcome = simulate_once(replace(SMALL, layers=2, leave_per_minute=2.0, replaced=True, jitter_s=0.3))

    assert outcome.left > 0
    assert outcome.failed == 0
    assert outcome.origin_egress_ratio < 1.5


def test_agents_without_a_scheduler_coordinate_themselves() -> None:
    outcome = simulate_once(replace(SMALL, nodes=12, layers=2, scheduler=False))

    assert outcome.failed == 0
    assert outcome.scheduler_in_per_node == outcome.scheduler_out_per_node == 0
    assert outcome.origin_egress_ratio <= 1.05
    assert outcome.late_ratio is None


def test_who_joins_late_is_held_against_its_own_link() -> None:
    outcome = simulate_once(replace(SMALL, nodes=6, poisson_s=1.0))

    assert outcome.failed == 0
    assert outcome.late_ratio is not None
    assert 1.0 <= outcome.late_ratio <= 1.5


def test_nodes_that_send_slowly_hold_nobody_up() -> None:
    # Once 2.7 to 3.7: each chunk that only they had left them six times before the next one did.
    plan = replace(SMALL, nodes=14, link_mbit=20, image_mib=32, layers=2, slow_ratio=3 / 14, slow_uplinks=True)
    outcome = simulate_once(plan)
    assert outcome.failed == 0
    assert outcome.origin_egress_ratio <= 1.05
    assert outcome.ratio_last <= 1.6


def test_a_slow_node_is_held_against_its_own_link() -> None:
    outcome = simulate_once(replace(SMALL, nodes=12, slow_ratio=0.25, slow_factor=0.5))

    assert outcome.failed == 0
    assert outcome.last_s > 2 * SMALL.image_bytes / (SMALL.link_mbit * MBIT)
    assert outcome.ratio_last < 2


def test_chunks_enter_racks_through_their_uplinks() -> None:
    narrow = simulate_once(replace(SMALL, nodes=12, racks=2, rack_mbit=25.0))

    assert narrow.failed == 0
    assert narrow.last_s > SMALL.image_bytes / (25 * MBIT)


def test_a_link_gives_its_rate_fairly_to_all_that_want_it() -> None:
    link = Link(100.0)
    first, second = link.enter(100, now=0.0), link.enter(100, now=0.5)

    assert link.when(first, now=0.5) == pytest.approx(1.5)
    assert link.when(second, now=0.5) == pytest.approx(2.0)
    assert link.when(second, now=2.0) == 2.0


def test_a_transfer_takes_as_long_as_its_narrowest_link_and_leaves_the_rest_of_the_wide_one_to_others() -> None:
    wide = Link(100.0)
    slow, fast = Transfer((wide, Link(10.0)), 100, now=0.0), Transfer((wide, Link(100.0)), 190, now=0.0)

    assert slow.when(0, now=0.0) == pytest.approx(10.0)
    assert fast.when(0, now=0.0) == pytest.approx(2.9)


def test_who_is_called_off_gives_its_share_to_the_others() -> None:
    link = Link(100.0)
    gone, stays = Transfer((link,), 100, now=0.0), Transfer((link,), 100, now=0.0)

    assert gone.call_off(now=1.0) == pytest.approx(50.0)
    assert stays.when(0, now=1.0) == pytest.approx(1.5)


@pytest.mark.parametrize("count", [1, 3])
def test_the_size_of_a_message_is_nearly_that_of_its_frame(count: int) -> None:
    have = wire.Have(Digest(f"sha256:{0:064x}"), pack_indices([*range(count)]), Checksum(b"x" * 16) * count)

    assert abs(frame_bytes(have) - len(wire.encode(have))) <= 8


def test_the_command_prints_a_row_for_each_seed_and_writes_json(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    result = CliRunner().invoke(
        bench, ["simulate", "--nodes", "8", "--image-mib", "4", "--seeds", "2", "--json", str(file)]
    )

    assert result.exit_code == 0, result.output
    assert "median" in result.output
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["seed"] for line in lines] == [1, 2]
    assert lines[0]["plan"]["nodes"] == 8
    assert lines[0]["ratio_last"] > 1
