# SPDX-License-Identifier: Apache-2.0
"""Scores, bans, and the way back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdist.core.reputation import (
    BAN_AT,
    BAN_S,
    GOOD_S,
    HALF_LIFE_S,
    MAX_BAN_S,
    MAX_NAMES,
    MAX_RECORDS,
    WEIGHTS,
    Offence,
    Reputation,
)
from tests.strategies import peer

LIAR = peer(1)


def test_a_ban_ends_by_itself() -> None:
    reputation = Reputation()
    assert reputation.offended(LIAR, Offence.CORRUPT, 100.0) == BAN_S
    assert reputation.is_banned(LIAR, 100.0 + BAN_S - 0.01)
    assert not reputation.is_banned(LIAR, 100.0 + BAN_S)
    assert not reputation.is_banned(peer(2), 100.0)


def test_each_further_ban_is_twice_as_long_up_to_an_hour() -> None:
    reputation, now, lengths = Reputation(), 0.0, []
    for _ in range(9):
        lengths.append(reputation.offended(LIAR, Offence.CORRUPT, now))
        now += lengths[-1]
    assert lengths == [min(BAN_S * 2**nth, MAX_BAN_S) for nth in range(9)]


def test_good_time_takes_back_one_doubling_after_the_other() -> None:
    reputation = Reputation()
    for at in (0.0, BAN_S, 3 * BAN_S):
        reputation.offended(LIAR, Offence.CORRUPT, at)
    ended = 7 * BAN_S
    assert [reputation.records[LIAR].bans_at(ended + nth * GOOD_S) for nth in range(5)] == [3, 2, 1, 0, 0]
    assert reputation.offended(LIAR, Offence.CORRUPT, ended + 3 * GOOD_S) == BAN_S


def test_what_the_honest_may_do_once_bans_only_who_goes_on() -> None:
    for offence, weight in WEIGHTS.items():
        reputation = Reputation()
        times = round(BAN_AT / weight + 0.4)
        lengths = [reputation.offended(LIAR, offence, 0.0) for _ in range(times)]
        assert not any(lengths[:-1])
        assert lengths[-1] == BAN_S


def test_suspicions_far_apart_never_add_up() -> None:
    reputation = Reputation()
    assert not any(reputation.offended(LIAR, Offence.SUSPECT, nth * 2 * HALF_LIFE_S) for nth in range(50))


def test_an_offence_while_banned_bans_no_second_time() -> None:
    reputation = Reputation()
    reputation.offended(LIAR, Offence.CORRUPT, 0.0)
    assert not reputation.offended(LIAR, Offence.CORRUPT, 1.0)
    assert reputation.bans == {Offence.CORRUPT: 1}


def test_a_pardon_forgets_everything() -> None:
    reputation = Reputation()
    reputation.offended(LIAR, Offence.CORRUPT, 0.0)
    reputation.pardon(LIAR)
    reputation.pardon(peer(2))
    assert not reputation.is_banned(LIAR, 0.0)
    assert reputation.offended(LIAR, Offence.CORRUPT, 1.0) == BAN_S


def test_an_address_of_many_banned_names_is_banned_itself_and_no_other() -> None:
    reputation = Reputation()
    for number in range(MAX_NAMES):
        assert not reputation.is_banned(peer(99), 1.0, "10.0.0.1")
        reputation.offended(peer(number), Offence.CORRUPT, 1.0, "10.0.0.1")
    assert reputation.is_banned(peer(99), 1.0, "10.0.0.1")
    assert not reputation.is_banned(peer(99), 1.0, "10.0.0.2")
    assert not reputation.is_banned(peer(99), 1.0 + BAN_S, "10.0.0.1")


def test_names_of_no_known_address_ban_nobody_else() -> None:
    reputation = Reputation()
    for number in range(2 * MAX_NAMES):
        reputation.offended(peer(number), Offence.CORRUPT, 0.0)
    assert not reputation.is_banned(peer(99), 0.0, "")


def test_strangers_cannot_fill_the_memory() -> None:
    reputation = Reputation()
    for number in range(MAX_RECORDS + 100):
        reputation.offended(peer(number), Offence.CORRUPT, 0.001 * number)
    assert len(reputation.records) == MAX_RECORDS
    assert reputation.is_banned(peer(MAX_RECORDS + 99), 10.0)


def test_who_is_forgiven_makes_room_first() -> None:
    reputation = Reputation()
    reputation.offended(LIAR, Offence.CORRUPT, 3 * GOOD_S)
    for number in range(2, MAX_RECORDS + 1):
        reputation.offended(peer(number), Offence.SUSPECT, 0.0)
    reputation.offended(peer(MAX_RECORDS + 1), Offence.ABSENT, 3 * GOOD_S + BAN_S)
    assert len(reputation.records) == 2
    assert LIAR in reputation.records


@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.sampled_from(list(Offence)), st.floats(0, 2000), st.sampled_from(["", "a"])),
        max_size=60,
    )
)
def test_bans_are_bounded_and_nothing_counts_against_another(
    offences: list[tuple[int, Offence, float, str]],
) -> None:
    reputation, now, offenders = Reputation(), 0.0, set()
    for number, offence, pause_s, host in offences:
        now += pause_s
        offenders.add(peer(number))
        ban_s = reputation.offended(peer(number), offence, now, host)
        assert ban_s == 0.0 or BAN_S <= ban_s <= MAX_BAN_S
        assert reputation.is_banned(peer(number), now) or not ban_s
    assert set(reputation.banned(now)) <= offenders
    assert not reputation.banned(now + MAX_BAN_S)


@pytest.mark.parametrize("offence", list(Offence))
def test_every_reason_is_fit_for_a_label(offence: Offence) -> None:
    assert offence.replace("-", "").isalpha()
