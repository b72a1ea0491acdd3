# SPDX-License-Identifier: Apache-2.0
"""What a scheduler makes of whom its agents count on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.packing import pack_indices
from p2pdist.core.schedulers import home_of
from p2pdist.core.wire import Lease, Leave, Message, Missing, Present, Renew, View
from scheduler.leading import TAKEOVER_S, Leading
from scheduler.pace import MEMBER_LEASES
from scheduler.swarm import ADOPTED, LEASE_S
from tests.scheduler.scripts import Script, address, done, joining, named
from tests.strategies import digest, peer

if TYPE_CHECKING:
    from p2pdist.core.types import Digest, PeerId

ME, OTHER, THIRD = peer(1), peer(2), peer(3)
BLOBS = [digest(number) for number in range(60)]


def test_alone_it_leads_everything() -> None:
    leading = Leading(ME)
    assert all(map(leading.leads, BLOBS))
    assert not leading.viewed(peer(10), [ME], 0.0)
    assert all(map(leading.leads, BLOBS))


def test_with_others_it_leads_what_the_agents_join_here() -> None:
    leading = Leading(ME)
    assert leading.viewed(peer(10), [ME, OTHER], 0.0)
    assert [leading.leads(blob) for blob in BLOBS] == [home_of(blob, [ME, OTHER]) == ME for blob in BLOBS]


def test_what_most_agents_see_counts_and_who_has_not_found_out_has_no_say() -> None:
    leading = Leading(ME)
    for number in range(10, 13):
        leading.viewed(peer(number), [ME, OTHER], 0.0)
    assert not leading.viewed(peer(13), [ME], 0.0)
    assert not leading.viewed(peer(14), [], 0.0)
    assert leading.live == {ME, OTHER}
    assert not leading.viewed(peer(10), [ME], 0.0)
    assert leading.viewed(peer(11), [ME], 0.0)
    assert leading.live == {ME}


def test_one_that_its_agents_do_not_count_yet_leads_nothing() -> None:
    leading = Leading(ME)
    leading.viewed(peer(10), [OTHER], 0.0)
    assert not any(map(leading.leads, BLOBS))


def test_an_agent_that_goes_takes_its_word_along() -> None:
    leading = Leading(ME)
    leading.viewed(peer(10), [OTHER], 0.0)
    assert leading.viewed(peer(10), (), 0.0)
    assert all(map(leading.leads, BLOBS))


@given(st.lists(st.tuples(st.integers(10, 16), st.sets(st.sampled_from([ME, OTHER, THIRD]))), max_size=30))
def test_whatever_agents_say_a_scheduler_lives_that_half_of_those_who_say_something_count(
    views: list[tuple[int, set[str]]],
) -> None:
    leading, last = Leading(ME), {}
    for number, view in views:
        last[number] = view
        before = leading.live
        assert leading.viewed(peer(number), view, 0.0) == (leading.live != before)  # type: ignore[arg-type]
        voting = [view for view in last.values() if view]
        counted = {
            one for one in (ME, OTHER, THIRD) if voting and 2 * sum(one in view for view in voting) >= len(voting)
        }
        assert leading.live == (counted or {ME})


# ---------------------------------------------------------- what follows from it


def blob_of(scheduler: PeerId) -> Digest:
    return next(blob for blob in BLOBS if home_of(blob, [ME, OTHER]) == scheduler)


MINE, THEIRS = blob_of(ME), blob_of(OTHER)


def among_two(*agents: int) -> Script:
    """A scheduler whose agents have counted on it and on another one for long."""
    script = Script(own_id=ME)
    for number in agents:
        script.state.connected(address(number))
        script.state.members[peer(number)].tried = True
        script.says(number, View([ME, OTHER]))
    script.tick(10.0)
    return script


def indices(out: list[tuple[int, Message]]) -> set[int]:
    return {
        index
        for _, message in out
        if isinstance(message, Lease)
        for index in range(message.index, message.index + message.count)
    }


def test_an_agent_is_told_who_is_there_and_since_when() -> None:
    script = among_two()
    script.state.connected(address(1))
    script.now = 12.0
    assert script.says(1, View([])) == [(1, Present(ME, 22_000))]


def test_only_the_leader_leases_and_the_other_names_agents_that_may_be_in_the_swarm() -> None:
    script = among_two(1, 2, 3)
    assert indices(script.says(1, joining(blob=MINE))) != set()
    out = script.says(1, joining(blob=THEIRS))
    assert indices(out) == set()
    assert set(named(out)[1]) == {2, 3}
    assert indices(script.tick(20.0)) == set()


def test_a_swarm_that_begins_is_leased_of_at_once_unless_another_scheduler_may_have_had_it() -> None:
    script = among_two(1, 2)
    assert indices(script.says(1, joining(blob=MINE))) != set()
    for number in (1, 2):
        script.says(number, View([ME]))
    new = digest(1000)
    script.says(1, joining(blob=new))
    assert not script.state.swarms[new].leases
    script.tick(script.now + TAKEOVER_S)
    script.says(1, *(done(index, blob=MINE) for index in range(8)))
    assert script.state.swarms[new].leases


def test_what_a_member_misses_for_long_is_leased_by_whoever_it_reaches() -> None:
    script = among_two(1, 2, 3)
    script.says(1, joining(blob=THEIRS))
    assert indices(script.says(1, Missing(THEIRS, pack_indices([4, 7, 1 << 31])))) == {4, 7}


def test_a_swarm_whose_scheduler_dies_goes_on_with_what_its_members_have_and_fetch() -> None:
    script = among_two(1, 2, 3)
    script.says(1, View([ME]))
    script.says(1, joining([0, 1], chunks=8, blob=THEIRS), Renew(THEIRS, 2), Renew(THEIRS, 3))
    script.says(2, View([ME]))
    out = script.says(2, joining([0, 4], chunks=8, blob=THEIRS), Renew(THEIRS, 3))
    assert indices(out) == set()
    assert indices(script.tick(10.0 + TAKEOVER_S - 0.1)) == set()
    assert indices(script.tick(10.0 + TAKEOVER_S)) == {5, 6, 7}
    swarm = script.state.swarms[THEIRS]
    assert {index: holder for index, (holder, _) in swarm.leases.items() if index < 5} == {2: peer(1), 3: peer(1)}
    script.says(1, done(2, chunks=8, blob=THEIRS), done(3, chunks=8, blob=THEIRS))
    assert swarm.done_bits == 0b11111


def test_a_fetch_that_was_taken_over_and_never_ends_is_leased_again() -> None:
    script = among_two(1, 2)
    for number in (1, 2):
        script.says(number, View([ME]), joining(range(7), chunks=8, blob=THEIRS))
    script.says(1, Renew(THEIRS, 7))
    assert indices(script.tick(10.0 + TAKEOVER_S)) == set()
    assert indices(script.tick(10.0 + LEASE_S)) == {7}


def test_a_swarm_that_goes_back_is_leased_of_until_the_other_begins() -> None:
    script = among_two(1, 2)
    for number in (1, 2):
        script.says(number, View([ME]))
    script.says(1, joining(blob=THEIRS))
    assert indices(script.tick(10.0 + TAKEOVER_S)) != set()
    for number in (1, 2):
        script.says(number, View([ME, OTHER]))
    assert indices(script.says(1, *(done(index, blob=THEIRS) for index in range(4)))) != set()
    script.tick(script.now + TAKEOVER_S)
    assert indices(script.says(1, *(done(index, blob=THEIRS) for index in range(4, 20)))) == set()
    script.says(1, Leave(THEIRS))
    assert THEIRS not in script.state.swarms


def test_a_word_on_running_fetches_is_bounded_and_counts_only_while_a_swarm_comes() -> None:
    script = among_two(1, 2)
    script.says(1, joining(chunks=100, blob=THEIRS), *(Renew(THEIRS, index) for index in (*range(0, 100, 2), 1 << 31)))
    assert len(script.state.swarms[THEIRS].leases) == MEMBER_LEASES
    script.says(2, joining(chunks=100, blob=THEIRS), *(Renew(THEIRS, index) for index in range(1, 100)))
    assert len(script.state.swarms[THEIRS].leases) <= 2 * ADOPTED
    script.says(1, joining(chunks=100, blob=MINE))
    before = dict(script.state.swarms[MINE].leases)
    script.says(2, joining(chunks=100, blob=MINE), Renew(MINE, 99))
    assert 99 not in script.state.swarms[MINE].leases
    assert before.items() <= script.state.swarms[MINE].leases.items()


@given(
    st.lists(
        st.tuples(
            st.integers(1, 4),
            st.one_of(
                st.sets(st.sampled_from([ME, OTHER])).map(lambda view: View(sorted(view))),
                st.sampled_from([MINE, THEIRS]).flatmap(
                    lambda blob: st.one_of(
                        st.just(joining(blob=blob, chunks=20)),
                        st.just(Leave(blob)),
                        st.integers(0, 30).map(lambda index: Renew(blob, index)),
                        st.integers(0, 19).map(lambda index: done(index, chunks=20, blob=blob)),
                        st.integers(0, 19).map(lambda index: Missing(blob, pack_indices([index]))),
                    )
                ),
            ),
            st.sampled_from([0.0, 0.1, 0.3, 1.0, 6.0]),
        ),
        max_size=60,
    )
)
def test_whatever_agents_say_the_books_on_leases_agree(history: list[tuple[int, Message, float]]) -> None:
    script = among_two(1, 2, 3, 4)
    for number, message, after_s in history:
        script.tick(script.now + after_s)
        script.says(number, message)
        runs = {id(run): run for each in script.state._registries.values() for _, run in each.leases.values()}
        assert sum(each.runs for each in script.state._registries.values()) == sum(r.counted for r in runs.values())
        assert sum(member.leases for member in script.state.members.values()) == len(runs)
        for swarm in script.state.swarms.values():
            assert swarm.leased_bits == sum(1 << index for index in swarm.leases)
            assert all(holder in swarm.members for holder, _ in swarm.leases.values())
