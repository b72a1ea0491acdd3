# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from bench.crowd import Shape
from bench.rollout import shape_of
from bench.workloads import CUSTOM, NAMES, Workload, named


@pytest.mark.parametrize("name", NAMES)
def test_every_name_stands_for_workloads_that_are_called_so(name: str) -> None:
    found = named(name)
    assert found
    assert all(workload.name == name or workload.name.startswith(f"{name}-") for workload in found)
    assert all(workload.about for workload in found)


def test_a_name_without_its_part_stands_for_all_parts() -> None:
    assert [workload.name for workload in named("W2")] == ["W2-slow", "W2-fast", "W2-limited"]
    assert [workload.name for workload in named("W1")] == ["W1"]
    assert named("W9") == []


def test_nodes_have_the_layers_that_an_upgrade_shares() -> None:
    (upgrade,) = named("W4-upgrade")
    assert (upgrade.layers, upgrade.shared_layers) == (10, 8)
    assert Workload().shared_layers == 0
    assert Workload(layers=1, shared=0.9).shared_layers == 0, "nothing would be left to pull"


def test_the_registry_has_a_link_as_the_nodes_have_where_nothing_else_is_said() -> None:
    assert shape_of(CUSTOM).origin_mbit == CUSTOM.link_mbit
    assert shape_of(Workload(link_mbit=50, origin_mbit=10)).origin_mbit == 10


@pytest.mark.parametrize(("nodes", "racks", "sizes"), [(16, 4, [4, 4, 4, 4]), (5, 2, [2, 3]), (3, 0, [])])
def test_nodes_are_spread_over_racks_neighbours_together(nodes: int, racks: int, sizes: list[int]) -> None:
    shape = Shape(nodes=nodes, link_mbit=1, origin_mbit=1, image_bytes=1, racks=racks, rack_uplink_mbit=2)
    plan = shape.rack_plan()
    assert [len(rack.hosts) for rack in plan.values()] == sizes
    assert [host for rack in plan.values() for host in rack.hosts] == (shape.node_names() if racks else [])
    assert all(rack.uplink.down_mbit == rack.uplink.up_mbit == 2 for rack in plan.values())
