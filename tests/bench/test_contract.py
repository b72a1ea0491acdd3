# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io

from rich.console import Console

from bench.contract import KEYS, at_least, at_most, record, target_table
from tests.bench.test_results import CONTRACT


def test_every_record_has_every_key_of_the_contract_and_its_own() -> None:
    written = record({"system": "scheduler", "joins_per_s": 7})
    assert set(KEYS) == CONTRACT
    assert set(written) == CONTRACT | {"joins_per_s"}
    assert (written["system"], written["bound_s"]) == ("scheduler", None)


def test_a_target_is_met_up_to_its_very_bound() -> None:
    assert [at_most("", seen, 2.5, "s").met for seen in (2.4, 2.5, 2.51)] == [True, True, False]
    assert [at_least("", seen, 2.5, "s").met for seen in (2.49, 2.5, 2.6)] == [False, True, True]


def test_a_missed_target_is_plain_to_see() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100)
    console.print(target_table([at_most("memory", 151, 150, "MiB"), at_least("warm", 2.345, 2, "GB/s", 2)]))
    first, second = out.getvalue().splitlines()[2:4]
    assert first.split() == ["memory", "151", "MiB", "≤", "150", "MiB", "MISSED"]
    assert second.split() == ["warm", "2.35", "GB/s", "≥", "2.00", "GB/s", "met"]
