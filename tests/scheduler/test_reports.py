# SPDX-License-Identifier: Apache-2.0
"""Who is shut out, and who cannot shut anybody out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.reports import MAX_SUSPECTS, QUORUM, QUORUM_MAX, REPORT_S, Reports, quorum
from tests.strategies import peer

LIAR = peer(1)


def note(reports: Reports, number: int, suspect: int = 1, now: float = 0.0, *, place: str = "") -> bool:
    return reports.note(peer(number), place or f"10.0.0.{number}", peer(suspect), now, 9)


def test_a_quorum_of_distinct_reporters_shuts_an_agent_out_once() -> None:
    reports = Reports()
    assert [note(reports, number) for number in range(2, 7)] == [False, False, True, False, False]
    assert reports.out == {LIAR}


def test_a_single_reporter_shuts_nobody_out_however_often_and_of_whom_it_reports() -> None:
    reports = Reports()
    for suspect in range(1, 200):
        for _ in range(3):
            assert not note(reports, 300, suspect)
    assert not reports.out


def test_reporters_at_one_address_count_once() -> None:
    reports = Reports()
    assert not any(note(reports, number, place="10.0.0.9") for number in range(2, 30))


def test_nobody_reports_itself() -> None:
    reports = Reports()
    assert not note(reports, 1)
    assert not note(reports, 2)
    assert not note(reports, 3)


def test_what_a_shut_out_agent_reports_does_not_count() -> None:
    reports = Reports()
    for number in range(2, 2 + QUORUM):
        note(reports, number)
    assert not note(reports, 1, 50)
    assert not note(reports, 2, 50)
    assert not note(reports, 3, 50)
    assert note(reports, 4, 50)


def test_a_shut_out_ends_when_the_reports_are_old() -> None:
    reports = Reports()
    for number in range(2, 2 + QUORUM):
        note(reports, number, now=float(number))
    reports.expire(REPORT_S + 2)
    assert reports.out == {LIAR}
    reports.expire(REPORT_S + 2 + QUORUM)
    assert not reports.out
    assert not reports._by
    assert not reports._against


def test_of_one_reporter_only_so_many_reports_are_kept() -> None:
    reports = Reports()
    for suspect in range(10, 10 + 3 * MAX_SUSPECTS):
        note(reports, 2, suspect)
    assert len(reports._against) == MAX_SUSPECTS


@pytest.mark.parametrize(("agents", "reporters"), [(1, 3), (12, 3), (24, 3), (40, 5), (64, 8), (10_000, QUORUM_MAX)])
def test_a_larger_cluster_takes_more_reporters(agents: int, reporters: int) -> None:
    assert quorum(agents) == reporters


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.floats(0, 200)), max_size=60))
def test_fewer_than_a_quorum_of_liars_never_shut_anybody_out(noted: list[tuple[int, int, float]]) -> None:
    reports, now = Reports(), 0.0
    liars = range(1, QUORUM)
    for number, suspect, pause_s in noted:
        now += pause_s
        reports.expire(now)
        if number in liars:
            note(reports, number, suspect, now=now)
    assert not reports.out
