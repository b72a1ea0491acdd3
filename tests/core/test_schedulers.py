# SPDX-License-Identifier: Apache-2.0
"""Several schedulers seen by one agent: who counts, whose swarms move, and what is said to whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.schedulers import (
    HANDOVER_S,
    IN_USE,
    MAX_QUESTIONS,
    PEERAGE_S,
    PROBE_S,
    PROBES,
    RIPE_S,
    AskAgain,
    GiveUp,
    Order,
    Rejoin,
    Roster,
    Say,
    home_of,
)
from p2pdist.core.types import Digest, PeerId
from p2pdist.core.wire import (
    Ask,
    Done,
    Failed,
    Join,
    Lease,
    Leave,
    Message,
    Missing,
    Present,
    Refuted,
    Renew,
    Resolve,
    Resolved,
    Stored,
    View,
)
from tests.strategies import checksum, digest, peer, peers

A, B, C = "a:5060", "b:5060", "c:5060"
IDS = {A: peer(1), B: peer(2), C: peer(3)}
OLD_S = 1000.0
"""Of a scheduler that has run for long."""


def join(blob: Digest) -> Join:
    return Join(blob, 100, "r", b"", b"")


def blobs_of(address: str, count: int, among: tuple[str, ...] = (A, B)) -> list[Digest]:
    """Blobs whose home is this one."""
    ids = [IDS[one] for one in among]
    return [blob for blob in map(digest, range(1000)) if home_of(blob, ids) == IDS[address]][:count]


class Script:
    """A roster and its clock."""

    def __init__(self, *addresses: str) -> None:
        self.roster = Roster(addresses or (A, B))
        self.now = 100.0

    def up(self, address: str, *, age_s: float = OLD_S, scheduler: PeerId | None = None) -> list[Order]:
        """A connection is made, and who is there says so."""
        said = Present(scheduler or IDS[address], int(age_s * 1000))
        return self.roster.connected(address, self.now) + self.roster.heard(address, said, self.now)

    def down(self, address: str) -> list[Order]:
        return self.roster.lost(address, self.now)

    def at(self, now: float) -> list[Order]:
        self.now = now
        return self.roster.tick(now)

    def joined(self, *blobs: Digest) -> list[tuple[str, ...]]:
        return [tuple(self.roster.route(join(blob))) for blob in blobs]

    @property
    def counted(self) -> list[str]:
        return [seat.address for seat in self.roster.counted]

    @property
    def states(self) -> dict[str, str]:
        return {standing.address: standing.state for standing in self.roster.status()}


def views(orders: list[Order]) -> dict[str, list[PeerId]]:
    """The last View to each."""
    return {order.address: order.message.schedulers for order in orders if _is(order, View)}  # type: ignore[union-attr]


def _is(order: Order, kind: type[Message]) -> bool:
    return isinstance(order, Say) and isinstance(order.message, kind)


def both() -> Script:
    script = Script()
    script.up(A)
    script.up(B)
    return script


# ---------------------------------------------------------------- rendezvous


@given(st.sets(peers, min_size=1, max_size=8), st.lists(st.integers(0, 10**9).map(digest), max_size=30))
def test_all_who_see_the_same_schedulers_agree_and_when_one_dies_only_its_blobs_move(
    schedulers: set[PeerId], blobs: list[Digest]
) -> None:
    before = {blob: home_of(blob, sorted(schedulers)) for blob in blobs}
    assert before == {blob: home_of(blob, sorted(schedulers, reverse=True)) for blob in blobs}
    for dead in schedulers if len(schedulers) > 1 else ():
        after = {blob: home_of(blob, schedulers - {dead}) for blob in blobs}
        assert all((before[blob] == dead) == (before[blob] != after[blob]) for blob in blobs)


def test_each_scheduler_has_its_share_of_the_blobs() -> None:
    homes = [home_of(digest(number), list(IDS.values())) for number in range(3000)]
    assert all(900 < homes.count(scheduler) < 1100 for scheduler in IDS.values())


def test_the_order_and_spelling_of_the_addresses_do_not_matter() -> None:
    one, other = Script(A, B), Script("10.0.0.2:5060", "10.0.0.1:5060")
    one.up(A)
    one.up(B)
    other.up("10.0.0.2:5060", scheduler=IDS[B])
    other.up("10.0.0.1:5060", scheduler=IDS[A])
    spelled = {A: "10.0.0.1:5060", B: "10.0.0.2:5060"}
    for blob in map(digest, range(50)):
        assert [spelled[at] for at in one.roster.route(join(blob))] == list(other.roster.route(join(blob)))


# ------------------------------------------------------------------ who counts


def test_a_scheduler_counts_once_it_has_said_who_it_is_and_each_is_told_of_all() -> None:
    script = Script()
    assert script.roster.connected(A, script.now) == [Say(A, View([]))]
    assert script.counted == []
    assert script.roster.route(join(digest(1))) == ()
    orders = script.roster.heard(A, Present(IDS[A], 0), script.now)
    assert (script.counted, views(orders)) == ([A], {A: [IDS[A]]})
    assert views(script.up(B, age_s=1)) == {A: [IDS[A], IDS[B]], B: [IDS[A], IDS[B]]}


def test_schedulers_that_were_started_together_count_together() -> None:
    script = Script()
    script.up(A, age_s=PEERAGE_S)
    script.up(B, age_s=0.5)
    assert script.counted == [A, B]


def test_one_that_has_just_started_counts_for_all_agents_from_the_same_moment_on() -> None:
    early, late = Script(), Script()
    for script in (early, late):
        script.up(A)
    early.up(B, age_s=1)
    late.now += 5
    late.up(B, age_s=6)
    assert early.states == late.states == {A: IN_USE, B: "returning"}
    assert early.roster.due_at() == late.roster.due_at() == 100 + RIPE_S - 1
    assert early.at(early.roster.due_at()) != []
    assert early.counted == [A, B]


def test_one_that_was_lost_to_this_agent_alone_counts_again_when_others_may_be_back_too() -> None:
    script = both()
    script.down(B)
    script.now += 2
    script.up(B)
    assert script.counted == [A]
    script.at(script.now + RIPE_S)
    assert script.counted == [A, B]


def test_the_only_one_that_is_left_counts_whatever_its_age() -> None:
    script = both()
    script.down(A)
    script.down(B)
    assert script.counted == []
    script.up(B, age_s=0)
    assert script.counted == [B]


def test_the_same_scheduler_under_two_addresses_counts_once_and_is_said_to_be_so() -> None:
    script = Script()
    script.up(A)
    script.up(B, scheduler=IDS[A])
    assert len(script.counted) == 1
    script.down(A)
    assert script.counted == [B]
    assert script.roster.twin(A) == B
    assert script.states == {A: f"the same as {B}", B: IN_USE}
    assert script.roster.due_at() == float("inf")


# ------------------------------------------------------------------- moving


def test_when_one_dies_its_swarms_are_joined_again_elsewhere_and_the_others_stay() -> None:
    script = both()
    here, there = blobs_of(A, 3), blobs_of(B, 3)
    assert script.joined(*here, *there) == [(A,)] * 3 + [(B,)] * 3
    orders = script.down(B)
    assert views(orders) == {A: [IDS[A]]}
    assert [order for order in orders if isinstance(order, Rejoin)] == [Rejoin(blob) for blob in there]
    assert script.joined(*there) == [(A,)] * 3
    assert [standing.swarms for standing in script.roster.status()] == [6, 0]


def test_the_others_hear_of_a_death_before_they_are_joined() -> None:
    script = both()
    script.joined(*blobs_of(B, 1))
    kinds = [type(order) for order in script.down(B)]
    assert kinds == [Say, Rejoin]


def test_a_swarm_that_comes_back_is_joined_on_both_for_a_while() -> None:
    script = both()
    (blob,) = blobs_of(B, 1)
    script.joined(blob)
    script.down(B)
    script.joined(blob)
    script.up(B, scheduler=IDS[B], age_s=0)
    ripe_at = script.now + RIPE_S
    assert Rejoin(blob) in script.at(ripe_at)
    assert script.joined(blob) == [(B,)]
    for message in (Done(blob, 100, 0, checksum(0)), Renew(blob, 0), Failed(blob, 0, 0), Refuted(blob, 0, checksum(1))):
        assert list(script.roster.route(message)) == [B, A]
    assert list(script.roster.route(Missing(blob, b""))) == [B]
    assert not any(_is(order, Leave) for order in script.at(ripe_at + HANDOVER_S - 0.1))
    assert Say(A, Leave(blob)) in script.at(ripe_at + HANDOVER_S)
    assert list(script.roster.route(Renew(blob, 0))) == [B]


def test_meanwhile_each_of_the_two_is_told_of_the_leases_of_the_other() -> None:
    script = both()
    (blob,) = blobs_of(B, 1)
    script.down(B)
    script.joined(blob)
    script.up(B, age_s=OLD_S)
    assert script.roster.heard(A, Lease(blob, 3, 1000), script.now) == []
    script.at(script.now + RIPE_S)
    assert script.roster.heard(A, Lease(blob, 3, 1000, 2), script.now) == [
        Say(B, Renew(blob, 3)),
        Say(B, Renew(blob, 4)),
    ]
    assert script.roster.heard(B, Lease(blob, 9, 1000), script.now) == [Say(A, Renew(blob, 9))]


def test_a_second_move_before_the_first_is_through_leaves_no_swarm_behind() -> None:
    script = both()
    (blob,) = blobs_of(B, 1)
    script.down(B)
    script.joined(blob)
    script.up(B)
    script.at(script.now + RIPE_S)
    script.now += 0.5
    assert Rejoin(blob) in script.down(B)
    assert list(script.roster.route(Renew(blob, 0))) == [A]
    assert not any(_is(order, Leave) for order in script.at(script.now + HANDOVER_S))


def test_what_is_complete_or_left_does_not_move_and_all_are_told() -> None:
    script = both()
    left, stored = blobs_of(B, 2)
    script.joined(left, stored)
    assert list(script.roster.route(Leave(left))) == [A, B]
    assert list(script.roster.route(Stored([stored]))) == [A, B]
    assert not any(isinstance(order, Rejoin) for order in script.down(B))


def test_when_none_is_left_nothing_is_on_any() -> None:
    script = both()
    script.joined(*blobs_of(A, 2), *blobs_of(B, 2))
    script.down(A)
    assert not any(isinstance(order, Rejoin) for order in script.down(B))
    assert script.roster.route(join(digest(1))) == ()
    assert script.roster.route(Renew(digest(1), 0)) == ()
    assert script.roster.due_at() == float("inf")


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, str | Digest, float]]:
    addresses, blobs = st.sampled_from([A, B, C]), st.integers(0, 8).map(digest)
    step = st.one_of(
        st.tuples(st.sampled_from(["up", "down", "restart"]), addresses, st.floats(0, 12)),
        st.tuples(st.sampled_from(["join", "leave"]), blobs, st.floats(0, 3)),
    )
    return draw(st.lists(step, max_size=40))


@given(histories())
def test_whatever_happens_each_swarm_is_at_the_home_that_the_view_gives_and_the_orders_bring_it_there(
    history: list[tuple[str, str | Digest, float]],
) -> None:
    script = Script(A, B, C)
    up: set[str] = set()
    wanted: set[Digest] = set()
    ids = dict(IDS)

    def carry_out(orders: list[Order]) -> None:
        for order in orders:
            if isinstance(order, Rejoin):
                assert order.blob in wanted
                script.joined(order.blob)
        if not script.counted:
            wanted.clear()

    for what, which, after_s in history:
        carry_out(script.at(script.now + after_s))
        match what:
            case "up" if which not in up:
                up.add(which)
                carry_out(script.up(which, scheduler=ids[which]))
            case "down" | "restart" if which in up:
                up.discard(which)
                carry_out(script.down(which))
                if what == "restart":
                    ids[which] = peer(int(ids[which], 16) + 10)
                    up.add(which)
                    carry_out(script.up(which, scheduler=ids[which], age_s=0))
            case "join" if script.counted:
                wanted.add(Digest(which))
                script.joined(Digest(which))
            case "leave":
                wanted.discard(Digest(which))
                script.roster.route(Leave(Digest(which)))
        assert bool(script.counted) == bool(up)
        counted = {ids[address]: address for address in script.counted}
        for blob in wanted:
            assert script.roster.route(Missing(blob, b"")) == (counted[home_of(blob, counted)],)
        assert sum(standing.swarms for standing in script.roster.status()) == len(wanted)


# --------------------------------------------------------------------- tags


def question(number: int, tag: str = "v1") -> Resolve:
    return Resolve(number, "r", "lab/image", tag)


def test_a_tag_is_asked_at_its_home_and_the_answer_goes_back_there() -> None:
    script = both()
    homes = {tuple(script.roster.route(question(number, f"v{number}"))) for number in range(20)}
    assert homes == {(A,), (B,)}
    (home,) = script.roster.route(question(50))
    script.roster.heard(home, Ask(50), script.now)
    assert list(script.roster.route(Resolved(50, "", "", 0))) == [home]
    assert list(script.roster.route(Resolved(50, "", "", 0))) == []


def test_a_question_whose_scheduler_dies_is_asked_again_and_one_that_was_answered_is_not() -> None:
    script = both()
    (home,) = script.roster.route(question(1))
    script.roster.route(question(2))
    script.roster.heard(home, Resolved(2, "", "", 0), script.now)
    assert [order for order in script.down(home) if isinstance(order, AskAgain)] == [AskAgain(1)]
    (other,) = script.roster.route(question(3))
    assert other != home


def test_a_scheduler_cannot_take_the_answer_that_is_meant_for_another() -> None:
    script = both()
    (home,) = script.roster.route(question(1))
    script.roster.heard(B if home == A else A, Ask(1), script.now)
    assert list(script.roster.route(Resolved(1, "", "", 0))) == [home]


def test_open_questions_are_bounded() -> None:
    script = both()
    for number in range(2 * MAX_QUESTIONS):
        script.roster.route(question(number))
    assert len(script.roster._questions) == MAX_QUESTIONS


# ------------------------------------------------------------------- silence


def test_a_scheduler_on_which_something_depends_is_given_up_when_it_answers_nothing() -> None:
    script = both()
    script.joined(*blobs_of(A, 1))
    orders: list[Order] = []
    while script.roster.due_at() < 200 and not any(isinstance(order, GiveUp) for order in orders):
        orders = script.at(script.roster.due_at())
    assert orders == [GiveUp(A)]
    assert script.now == pytest.approx(100 + (PROBES + 1) * PROBE_S)


def test_agents_probe_at_different_times() -> None:
    rosters = [Roster([A], jitter) for jitter in (0.0, 0.5, 1.0)]
    for roster in rosters:
        roster.connected(A, 100.0)
    assert [roster.due_at() for roster in rosters] == pytest.approx([101.5, 101.75, 102.0])


def test_one_that_says_anything_is_not_asked_and_one_without_a_part_is_left_alone() -> None:
    script = both()
    (blob,) = blobs_of(A, 1)
    assert script.roster.due_at() == float("inf")
    script.joined(blob)
    for _ in range(20):
        script.now += 0.9 * PROBE_S
        script.roster.heard(A, Lease(blob, 0, 1000), script.now)
        assert script.at(script.now) == []


def test_an_agent_that_stood_still_itself_gives_nobody_up() -> None:
    script = both()
    script.joined(*blobs_of(A, 1))
    orders = script.at(script.now + 60)
    assert orders == [Say(A, View([IDS[A], IDS[B]]))]


def test_one_that_never_says_who_it_is_is_given_up() -> None:
    script = Script()
    script.roster.connected(A, script.now)
    orders: list[Order] = []
    while script.roster.due_at() < 200 and not any(isinstance(order, GiveUp) for order in orders):
        orders = script.at(script.roster.due_at())
    assert orders == [GiveUp(A)]
