# SPDX-License-Identifier: Apache-2.0
"""What a scheduler makes of whom its agents count on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.schedulers import home_of
from scheduler.leading import Leading
from tests.strategies import digest, peer

ME, OTHER, THIRD = peer(1), peer(2), peer(3)
BLOBS = [digest(number) for number in range(60)]


def test_alone_it_leads_everything() -> None:
    leading = Leading(ME)
    assert all(map(leading.leads, BLOBS))
    assert not leading.viewed(peer(10), [ME])
    assert all(map(leading.leads, BLOBS))


def test_with_others_it_leads_what_the_agents_join_here() -> None:
    leading = Leading(ME)
    assert leading.viewed(peer(10), [ME, OTHER])
    assert [leading.leads(blob) for blob in BLOBS] == [home_of(blob, [ME, OTHER]) == ME for blob in BLOBS]


def test_what_most_agents_see_counts_and_who_has_not_found_out_has_no_say() -> None:
    leading = Leading(ME)
    for number in range(10, 13):
        leading.viewed(peer(number), [ME, OTHER])
    assert not leading.viewed(peer(13), [ME])
    assert not leading.viewed(peer(14), [])
    assert leading.live == {ME, OTHER}
    assert not leading.viewed(peer(10), [ME])
    assert leading.viewed(peer(11), [ME])
    assert leading.live == {ME}


def test_one_that_its_agents_do_not_count_yet_leads_nothing() -> None:
    leading = Leading(ME)
    leading.viewed(peer(10), [OTHER])
    assert not any(map(leading.leads, BLOBS))


def test_an_agent_that_goes_takes_its_word_along() -> None:
    leading = Leading(ME)
    leading.viewed(peer(10), [OTHER])
    assert leading.viewed(peer(10), ())
    assert all(map(leading.leads, BLOBS))


@given(st.lists(st.tuples(st.integers(10, 16), st.sets(st.sampled_from([ME, OTHER, THIRD]))), max_size=30))
def test_whatever_agents_say_a_scheduler_lives_that_half_of_those_who_say_something_count(
    views: list[tuple[int, set[str]]],
) -> None:
    leading, last = Leading(ME), {}
    for number, view in views:
        last[number] = view
        before = leading.live
        assert leading.viewed(peer(number), view) == (leading.live != before)  # type: ignore[arg-type]
        voting = [view for view in last.values() if view]
        counted = {
            one for one in (ME, OTHER, THIRD) if voting and 2 * sum(one in view for view in voting) >= len(voting)
        }
        assert leading.live == (counted or {ME})
