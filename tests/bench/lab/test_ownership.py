# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os

import pytest

from bench.lab import ownership


def test_what_a_living_process_made_is_not_left_over() -> None:
    assert not ownership.is_left_over(ownership.new_name())
    assert not ownership.is_left_over(ownership.new_name() + "-node1")


def test_no_two_labs_of_one_process_share_a_name() -> None:
    assert ownership.new_name() != ownership.new_name()


def test_what_an_earlier_process_of_the_same_pid_made_is_left_over() -> None:
    prefix, start, suffix = ownership.new_name().rsplit("-", 2)
    assert ownership.is_left_over(f"{prefix}-{int(start) - 1}-{suffix}-switch")


@pytest.mark.parametrize(
    "name",
    ["", "p2pdist-lab", "somebody-else", f"p2pdist-lab-1-{os.getpid()}-1-abcdef", "x-p2pdist-lab-1-1-1-abcdef"],
    ids=["empty", "no numbers", "foreign", "another pid namespace", "not at the start"],
)
def test_what_no_lab_of_this_pid_namespace_made_is_left_alone(name: str) -> None:
    assert not ownership.is_left_over(name)
